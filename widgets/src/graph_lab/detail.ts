// One node or one edge: its numbers, its strongest edges, and what can be done with it.
import { button, h } from "../shared/dom";
import { figures } from "../shared/figures";
import { counted, number, percent } from "../shared/format";
import { type Names, nameOf } from "../shared/name";
import type { Graph, Part } from "./graph";
import type { State, Test, TestRow } from "./types";

const LISTED = 8; // edges each way

export interface Actions {
  open(node: number): void;
  openEdge(edge: number): void;
  pin(node: number): void;
  select(node: number): void;
  rename(node: number, name: string): void;
  test(sources: number[], targets: number[] | null, name?: string): void;
  steer(node: number, strength: number | null, here: boolean): void;
  keep(node: number, strength: number | null, here: boolean): void;
}

export interface Opened {
  graph: Graph;
  part: Part;
  names: Names;
  state: Pick<State, "node" | "edge" | "pinned" | "selected" | "tests" | "unable" | "running">;
  /** What is typed in the steering row. */
  dose: { strength: string; here: boolean };
}

/** A node in words, its name behind them. */
export function called(graph: Graph, node: number, names: Names, longest = 40): Node[] {
  const name = nameOf(names[String(node)], longest);
  return [h("span", {}, graph.title(node)), ...(name ? [name] : [])];
}

/** The same for a list, where its name comes first. */
export function brief(graph: Graph, node: number, names: Names, longest = 40): Node[] {
  const name = nameOf(names[String(node)], longest);
  return name ? [name, h("small", {}, graph.place(node))] : [h("span", {}, graph.title(node))];
}

/** What a test measured of an edge. */
export const measured = (tests: Test[], sources: number[], target: number): TestRow | undefined =>
  tests.find((test) => test.sources.length === sources.length && test.sources.every((s) => sources.includes(s)) && test.rows.some((row) => row.target === target))?.rows.find((row) => row.target === target);

export function detail(opened: Opened, act: Actions, signal: AbortSignal): HTMLElement[] {
  const { graph, state } = opened;
  const [source, target] = state.edge;
  if (source !== undefined && target !== undefined) return edgeDetail(opened, graph.edgeOf(source, target), act, signal);
  if (state.node === null) {
    return [h("h4", { tabindex: -1 }, "Nothing is open"), h("p", { class: "saelab-dim" }, "Click a node, or an edge. Shift and a click select several nodes for a group. Keys: arrows move, Enter opens, P pins, S selects, T tests, plus and minus zoom, Shift and arrows move the graph.")];
  }
  return nodeDetail(opened, state.node, act, signal);
}

function nodeDetail(opened: Opened, node: number, act: Actions, signal: AbortSignal): HTMLElement[] {
  const { graph, part, names, state } = opened;
  const kind = graph.kind(node);
  const [pinned, selected] = [state.pinned.includes(node), state.selected.includes(node)];
  const row = h(
    "div",
    { class: "saelab-graph_lab-actions" },
    button(pinned ? "Unpin" : "Pin", () => act.pin(node), signal, { "aria-pressed": String(pinned), "data-needs": "model", "data-act": "pin" }),
    button(selected ? "Deselect" : "Select", () => act.select(node), signal, { "aria-pressed": String(selected), title: "Select several nodes, then group them", "data-needs": "model", "data-act": "select" }),
    kind === "logit" ? null : tester(opened, "Test", "Take it out of the model, and see what changes beside what its edges predict", () => act.test([node], null), signal),
  );
  const items = [
    { name: kind === "logit" ? "logit" : "activation", value: number(graph.values[node]), meaning: kind === "logit" ? "less the mean of the vocabulary" : "on this prompt" },
    kind === "logit"
      ? { name: "probability", value: percent(graph.chance(node)) }
      : { name: "influence", value: percent(graph.influence[node]), meaning: "the part of the outputs' weights that flows through it" },
  ];
  return [
    h("h4", { tabindex: -1 }, ...called(graph, node, names)),
    figures(kind === "feature" || kind === "logit" ? items : items.slice(1), "saelab-graph_lab-numbers"),
    row,
    ...(kind === "feature" ? [renamer(opened, node, act, signal), steerer(opened, node, act, signal)] : []),
    state.unable && kind !== "logit" ? h("p", { class: "saelab-dim saelab-graph_lab-unable", "data-needs": "kernel" }, state.unable) : h("span", { hidden: true }),
    part.has[node] ? h("span", { hidden: true }) : h("p", { class: "saelab-dim" }, "The sliders hide it; its edges in the graph that was sent:"),
    edges(opened, node, "in", act, signal),
    edges(opened, node, "out", act, signal),
  ];
}

function edgeDetail(opened: Opened, edge: number, act: Actions, signal: AbortSignal): HTMLElement[] {
  const { graph, names, state } = opened;
  const [source, target] = [graph.source(edge), graph.target(edge)];
  const effect = graph.effect(edge);
  const link = (node: number) => {
    const made = button("", () => act.open(node), signal, { class: "saelab-graph_lab-link" });
    made.append(...called(graph, node, names));
    return made;
  };
  const found = measured(state.tests, [source], target);
  return [
    h("h4", { tabindex: -1 }, effect < 0 ? "Edge that takes away" : "Edge that adds"),
    h("p", { class: "saelab-graph_lab-ends" }, "from ", link(source)),
    h("p", { class: "saelab-graph_lab-ends" }, "to ", link(target)),
    figures(
      [
        { name: "weight", value: number(effect), meaning: "what the source adds to the target's pre-activation" },
        { name: "share", value: percent(graph.portion(edge)), meaning: "of the sizes of all that adds to the target" },
        { name: "without source", value: number(found?.frozen), meaning: "measured change of the target, beside minus the weight" },
      ],
      "saelab-graph_lab-numbers",
    ),
    h("div", { class: "saelab-graph_lab-actions" }, tester(opened, "Test", "Take the source out of the model, and see what the target does", () => act.test([source], [target]), signal)),
    state.unable ? h("p", { class: "saelab-dim saelab-graph_lab-unable", "data-needs": "kernel" }, state.unable) : h("span", { hidden: true }),
  ];
}

export function tester({ state }: Pick<Opened, "state">, text: string, title: string, test: () => void, signal: AbortSignal): HTMLButtonElement {
  return button(text, test, signal, { "data-needs": "kernel", "data-act": "test", title: state.unable || title, disabled: state.unable !== "" || state.running !== "" });
}

function renamer({ graph, names }: Opened, node: number, act: Actions, signal: AbortSignal): HTMLElement {
  const able = graph.view.offered.includes(graph.layer(node));
  const box = h("input", { type: "text", "aria-label": "Label", placeholder: able ? "a label of yours" : "a label needs the coder", value: names[String(node)] ?? "", dir: "auto", spellcheck: "false", autocomplete: "off", disabled: !able, "data-act": "label" });
  const give = () => box.value !== (names[String(node)] ?? "") && act.rename(node, box.value);
  box.addEventListener("change", give, { signal });
  return h("label", { class: "saelab-graph_lab-rename", "data-needs": "kernel" }, h("small", {}, "label"), box);
}

function steerer({ state, dose }: Opened, node: number, act: Actions, signal: AbortSignal): HTMLElement {
  const strength = h("input", { type: "number", step: 0.5, value: dose.strength, "aria-label": "Strength, in units of f_scale", title: "1 adds f_scale, about the largest activation on other texts", "data-act": "strength" });
  const here = h("input", { type: "checkbox", checked: dose.here, "data-act": "here" });
  const off = state.unable !== "" || state.running !== "";
  strength.addEventListener("input", () => (dose.strength = strength.value), { signal });
  here.addEventListener("change", () => (dose.here = here.checked), { signal });
  const go = (act: (strength: number | null) => void, ablate: boolean) => () => {
    const value = ablate ? null : Number(strength.value);
    if (value === null || Number.isFinite(value)) act(value);
  };
  const make = (text: string, title: string, ablate: boolean) =>
    button(text, go((value) => act.steer(node, value, here.checked), ablate), signal, { title: state.unable || title, disabled: off, "data-act": text });
  return h(
    "div",
    { class: "saelab-graph_lab-actions", role: "group", "aria-label": "Steer", "data-needs": "kernel" },
    strength,
    make("Steer", "Push along the feature's direction, and read what the model says", false),
    make("Ablate", "Set the feature to 0, and read what the model says", true),
    h("label", {}, here, " here only"),
    button("Add to edits", go((value) => act.keep(node, value, here.checked), false), signal, { title: state.unable || "Put this steering on the session's edits", disabled: off, "data-act": "keep" }),
  );
}

function edges(opened: Opened, node: number, way: "in" | "out", act: Actions, signal: AbortSignal): HTMLElement {
  const { graph, part, names, state } = opened;
  const near = way === "in" ? graph.target : graph.source;
  const far = way === "in" ? graph.source : graph.target;
  const known = part.has[node] ? part.edges : [...graph.sources.keys()];
  const mine = known.filter((edge) => near(edge) === node).sort((a, b) => graph.portion(b) - graph.portion(a));
  if (way === "in") mine.sort((a, b) => Math.abs(graph.effect(b)) - Math.abs(graph.effect(a)));
  if (!mine.length) return h("span", { hidden: true });
  const most = Math.max(...mine.map((edge) => graph.portion(edge)), 1e-12);
  const rows = mine.slice(0, LISTED).map((edge) => {
    const other = far(edge);
    const effect = graph.effect(edge);
    const bar = h("span", { class: "saelab-graph_lab-bar", "data-sign": effect < 0 ? "minus" : "plus" });
    bar.style.width = `${((100 * graph.portion(edge)) / most).toFixed(1)}%`;
    const found = measured(state.tests, [graph.source(edge)], graph.target(edge));
    const open = button("", () => act.open(other), signal, { class: "saelab-graph_lab-row", title: `${percent(graph.portion(edge))} of all that adds to the target` });
    const result = found ? h("small", { title: "Without the source the target changed by this" }, ` test ${number(found.frozen)}`) : null;
    open.append(bar, h("span", { class: "saelab-graph_lab-what" }, ...brief(graph, other, names)), h("span", { class: "saelab-graph_lab-weight" }, number(effect), ...(result ? [result] : [])));
    const look = button("→", () => act.openEdge(edge), signal, { "aria-label": `The edge ${way === "in" ? "from" : "to"} ${graph.title(other)}`, title: "Open this edge" });
    return h("li", {}, open, look);
  });
  const more = mine.length > LISTED ? h("small", {}, ` and ${counted(mine.length - LISTED, "weaker edge")}`) : null;
  const title = h("h4", {}, way === "in" ? "Comes from" : "Goes to", ...(more ? [more] : []));
  return h("section", { "aria-label": way === "in" ? "Edges into it" : "Edges out of it" }, title, h("ul", { class: "saelab-graph_lab-edges" }, ...rows));
}
