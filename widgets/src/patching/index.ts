// PatchingGrid: layers by positions, estimates at once, patches on a click.
import type { AnyModel } from "@anywidget/types";
import { button, focusedIn, h, setText } from "../shared/dom";
import { download } from "../shared/exporting";
import { counted, number } from "../shared/format";
import { freezer } from "../shared/frozen";
import { type At, type Block, heatGrid } from "../shared/heat";
import { onChange, send } from "../shared/model";
import { panel, widget } from "../shared/panel";
import { promptWords } from "../shared/prompt";
import { latest } from "../shared/rpc";
import { tokenLabel, tokenNodes } from "../shared/tokens";
import { detail } from "./detail";
import { asCsv } from "./exporting";
import { type Asked, form } from "./form";
import { type AttentionAnswer, frame as attentionFrame } from "./attention";
import { sidesView } from "./sides";
import { type Sides, type State, Values } from "./types";
import { toolbar } from "./toolbar";

const TYPING_MS = 200;

const patching = widget<State>((model, el, signal) => draw(model, el, signal));

function draw(model: AnyModel<State>, el: HTMLElement, signal: AbortSignal): void {
  const frame = panel(model, el, "patching", "Patching grid", signal);
  const sides = sidesView();
  const summary = h("p", { class: "saelab-patching-metric" });
  const kinds = h("div", { class: "saelab-segments", role: "group", "aria-label": "Kind of site" });
  const side = h("div", { class: "saelab-cell-detail", role: "region", "aria-label": "The open cell" });
  const attention = attentionFrame(signal);
  let values = new Values(model.get("view"), model.get("truth"), model.get("joint"));
  let block: Block | null = null;

  // ---- what is asked of Python

  const settled = () => frame.ready(model.get("progress").length === 0);
  const ask = async (method: string, args: Record<string, unknown>, until: AbortSignal) => {
    frame.complain("");
    frame.ready(false);
    await frame.call(method, args, { signal: until });
    settled();
  };
  let patches = new AbortController();
  let running = new AbortController();
  signal.addEventListener("abort", () => {
    patches.abort();
    running.abort();
  });
  const patch = (cells: [string, number, number][]) => {
    const unknown = cells.filter((cell) => values.patched(...cell) === null);
    if (unknown.length && frame.connection() === "live") void ask("patch_cells", { cells: unknown }, patches.signal);
  };
  // A whole row or column: all its cells in one run, then each alone.
  const patchLine = (at: At) => {
    const { kind, layers, positions, whole, alone } = lineAt(at);
    const known = whole !== null && alone.length === layers.length * positions.length;
    if (!known && frame.connection() === "live") void ask("patch_line", { kind, layers, positions }, patches.signal);
  };
  const stop = () => {
    void frame.call("stop"); // those of other views too
    patches.abort();
    patches = new AbortController();
  };
  const run = (asked: Asked) => {
    running.abort();
    stop();
    running = new AbortController();
    void ask("rerun", asked, running.signal);
  };
  const soon = latest(TYPING_MS, signal);
  const typed = ({ prompt, source, right, wrong }: Asked) =>
    soon(async (mine) => {
      const found = await frame.call<Sides>("align", { prompt, source, right, wrong }, { signal: mine });
      frame.complain("");
      showSides(found);
    });
  const differs = (yes: boolean) => {
    const { prompt, metric } = model.get("view");
    frame.stale(yes ? `Below: ${tokenLabel(promptWords(prompt))}, ${metric}, as they were computed. Run computes what stands above.` : "");
  };
  const fields = form(run, typed, differs, signal);

  // ---- the grid

  const cellOf = ({ row, column }: At): [number, number] => {
    const { layers, positions } = model.get("view");
    return [layers[layers.length - 1 - row] ?? 0, positions[column] ?? 0]; // the last layer on top
  };
  const atOf = (cell: number[]): At | null => {
    const { layers, positions } = model.get("view");
    const [layer, position] = cell;
    if (layer === undefined || position === undefined) return null;
    return { row: layers.length - 1 - layers.indexOf(layer), column: positions.indexOf(position) };
  };
  const cellsOf = ({ rows, columns }: Block): [string, number, number][] => {
    const found: [string, number, number][] = [];
    for (let row = rows[0]; row <= rows[1]; row++) {
      for (let column = columns[0]; column <= columns[1]; column++) found.push([model.get("kind"), ...cellOf({ row, column })]);
    }
    return found;
  };
  const lineAt = (at: At) => {
    const { layers: all, positions: places } = model.get("view");
    const [layer, position] = cellOf(at);
    const kind = model.get("kind");
    const [layers, positions] = at.row < 0 ? [all, [position]] : [[layer], places];
    const cells = layers.flatMap((l) => positions.map((p) => values.patched(kind, l, p)));
    return { kind, layers, positions, whole: values.together(kind, layers, positions), alone: cells.filter((v) => v !== null) };
  };
  const tokenAt = (column: number): string => {
    const { tokens, positions, roles } = model.get("view");
    const [ours = "", theirs = ""] = tokens[column] ?? [];
    const role = roles[column] === "template" ? " of the chat template" : roles[column] ? ` of the ${roles[column]}'s message` : "";
    return `token ${positions[column]}${role}: ${tokenLabel(ours)}${ours === theirs ? "" : ` ← ${tokenLabel(theirs)}`}`;
  };
  const lineLabel = (at: At): string => {
    const { kind, layers, positions, whole, alone } = lineAt(at);
    const name = at.row < 0 ? `${tokenAt(at.column)}; ${kind} of ${counted(layers.length, "layer")}` : `${kind} of layer ${layers[0]} at ${counted(positions.length, "token")}`;
    if (whole === null) return `${name}: a click or Enter patches all together in one run, whose number stands here, and then each alone`;
    const all = layers.length * positions.length;
    const sum = alone.length === all ? `, the sum of each alone ${number(alone.reduce((a, b) => a + b, 0))}` : "";
    return `${name}: all patched together in one run ${number(whole)}${sum}`;
  };
  const labelOf = (at: At): string => {
    if (at.row < 0 || at.column < 0) return lineLabel(at);
    const [layer, position] = cellOf(at);
    const [ours = "", theirs = ""] = model.get("view").tokens[at.column] ?? [];
    const kind = model.get("kind");
    const token = ours === theirs ? tokenLabel(ours) : `${tokenLabel(ours)} ← ${tokenLabel(theirs)}`;
    const patched = values.patched(kind, layer, position);
    const estimate = `estimate ${number(values.estimate(kind, layer, position))}`;
    return `layer ${layer}, ${token}: ${patched === null ? estimate : `patched ${number(patched)}, ${estimate}`}`;
  };
  const bar = toolbar({ patch: () => block && patch(cellsOf(block)), stop }, signal);
  const grid = heatGrid(
    {
      label: "Effects of patches, layers by tokens",
      corner: "layer",
      choose: (at) => {
        if (at.row < 0 || at.column < 0) return patchLine(at);
        const cell = cellOf(at);
        patch([[model.get("kind"), ...cell]]);
        send(model, { cell });
      },
      hover: (at) => bar.say(at ? labelOf(at) : ""),
      block: (now) => {
        block = now;
        bar.block(now ? cellsOf(now).filter((cell) => values.patched(...cell) === null).length : null);
      },
    },
    signal,
  );
  kinds.addEventListener(
    "click",
    (event) => {
      const name = (event.target as HTMLElement).closest<HTMLElement>("[data-kind]")?.dataset.kind;
      if (name && name !== model.get("kind")) send(model, { kind: name });
    },
    { signal },
  );

  // ---- what is shown

  const showSides = (found: Sides) => {
    sides.show(found);
    fields.showAnswers(found);
  };
  const showGrid = () => {
    const view = model.get("view");
    const kind = model.get("kind");
    values = new Values(view, model.get("truth"), model.get("joint"));
    const rows = [...view.layers].reverse();
    const cells = rows.map((layer, row) =>
      view.positions.map((position, column) => {
        const patched = values.patched(kind, layer, position);
        const value = patched ?? values.estimate(kind, layer, position);
        return { value, sure: patched !== null, label: labelOf({ row, column }) };
      }),
    );
    const scale = Math.max(...cells.flat().map((cell) => Math.abs(cell.value ?? 0)), 1e-9);
    const line = (at: At) => ({ label: lineLabel(at), whole: lineAt(at).whole });
    const columns = view.tokens.map(([ours, theirs], i) => ({
      nodes: ours === theirs ? tokenNodes(ours, "dot") : [...tokenNodes(ours, "dot"), "\n←", ...tokenNodes(theirs, "dot")],
      ...line({ row: -1, column: i }),
      marked: ours !== theirs,
      dim: view.roles[i] === "template",
    }));
    grid.show({ rows: rows.map((layer, row) => ({ nodes: [String(layer)], ...line({ row, column: -1 }) })), columns, cells, scale });
    grid.select(atOf(model.get("cell")));
    bar.scale(scale);
    if (block) bar.block(cellsOf(block).filter((cell) => values.patched(...cell) === null).length);
    for (const button of kinds.children) button.setAttribute("aria-pressed", String((button as HTMLElement).dataset.kind === kind));
  };
  let shown = new AbortController();
  signal.addEventListener("abort", () => shown.abort());
  const showDetail = () => {
    const [view, kind, cell] = [model.get("view"), model.get("kind"), model.get("cell")];
    const key = `${kind}-${cell[0]}:${cell[1]}`;
    const active = focusedIn(side);
    const focused = active && (active.dataset.feature ?? "");
    shown.abort();
    shown = new AbortController();
    const actions = {
      patch: () => patch([[kind, cell[0] ?? 0, cell[1] ?? 0]]),
      feature: (feature: number) => send(model, { feature }),
      attention: (source: boolean) => {
        const name = `Attention of layer ${cell[0]} on the ${source ? "source" : "prompt"}`;
        attention.show(name, frame.call<AttentionAnswer>("attention_page", { layer: cell[0], source }));
      },
    };
    side.replaceChildren(...detail({ view, values, kind, cell, features: model.get("features")[key], names: model.get("names"), chosen: model.get("feature") }, actions, shown.signal));
    if (focused !== null) side.querySelector<HTMLElement>(focused ? `[data-feature="${focused}"]` : "h4")?.focus({ preventScroll: true });
    grid.select(atOf(cell));
  };
  // Features come when a cell is opened, from Python or here.
  const wantFeatures = () => {
    const [kind, [layer, position]] = [model.get("kind"), model.get("cell")];
    if (layer === undefined || position === undefined || frame.connection() !== "live") return;
    const site = `${kind}-${layer}`;
    if (!model.get("view").coders.includes(site) || model.get("features")[`${site}:${position}`]) return;
    void frame.call("open_features", { kind, layer, position });
  };
  const showView = () => {
    const view = model.get("view");
    const words = `share of the change of ${view.metric}, from ${number(view.base)} (prompt) to ${number(view.goal)} (source)`;
    setText(summary, words);
    kinds.replaceChildren(...view.kinds.map((kind) => h("button", { type: "button", "data-kind": kind, "aria-pressed": "false" }, kind)));
    fields.show(view);
    showSides(view.sides);
    grid.clearBlock();
    attention.hide();
    showGrid();
    const parted = view.tokens.findIndex(([ours, theirs]) => ours !== theirs); // a template may fill what is in sight
    requestAnimationFrame(() => grid.reveal(parted));
    wantFeatures();
    showDetail();
    settled();
  };

  const save = () => download("patching.csv", "text/csv", asCsv(model.get("view"), values));
  frame.exports.append(button("Table", save, signal, { title: "The effects as a CSV file" }));
  frame.root.append(
    h("div", { class: "saelab-bar-row saelab-patching-bar" }, h("h3", {}, "Patching"), kinds, frame.codeButton),
    fields.element,
    sides.element,
    frame.old,
    summary,
    h("div", { class: "saelab-patching-body" }, h("div", { class: "saelab-patching-grid" }, grid.element, bar.element), side),
    attention.element,
  );
  onChange(model, ["view"], showView, signal);
  onChange(model, ["truth", "joint"], () => (showGrid(), showDetail()), signal);
  onChange(model, ["features", "feature", "names"], showDetail, signal);
  onChange(model, ["kind"], () => (grid.clearBlock(), showGrid(), wantFeatures(), showDetail()), signal);
  onChange(model, ["cell"], () => (wantFeatures(), showDetail()), signal);
  onChange(model, ["progress"], () => (bar.progress(model.get("progress")), settled()), signal);
  bar.progress(model.get("progress"));
  showView();
}

export const freeze = freezer(patching);
export default patching;
