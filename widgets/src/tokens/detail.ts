// The chosen token: its active features, what each does to the next token, and what they add up to.
import { focusedIn, h, setText } from "../shared/dom";
import { counted, number } from "../shared/format";
import { inWords, type Names, nameOf } from "../shared/name";
import { makeTabStop, rovingFocus } from "../shared/keyboard";
import { tokenChip, tokenLabel } from "../shared/tokens";
import type { Detail, Row, Sort, Wish } from "./types";

export interface DetailBox {
  element: HTMLElement;
  show(detail: Detail | null, sort: Sort, names: Names): void;
  /** Mark the chosen feature's row. */
  select(feature: number | null): void;
}

export function detailBox(wish: (what: Wish) => void, signal: AbortSignal): DetailBox {
  const head = h("div", { class: "saelab-token-head" });
  const note = h("p", { class: "saelab-token-note", hidden: true });
  const sum = h("p", { class: "saelab-token-sum" });
  const body = h("tbody", {});
  const columns = h("tr", {});
  const table = h("table", { class: "saelab-features", "aria-label": "Active features" }, h("thead", {}, columns), body);
  let chosen: number | null = null;

  const buttons = () => [...body.querySelectorAll<HTMLElement>("[data-cell]")];
  const mark = () => {
    for (const button of buttons()) {
      const on = Number(button.dataset.feature) === chosen;
      button.setAttribute("aria-pressed", String(on));
      button.closest("tr")!.dataset.chosen = String(on);
    }
    const stop = buttons().find((button) => Number(button.dataset.feature) === chosen) ?? buttons()[0];
    if (stop) makeTabStop(body, stop);
  };
  body.addEventListener(
    "click",
    (event) => {
      const row = (event.target as HTMLElement).closest<HTMLElement>("tr[data-feature]");
      if (row) wish({ feature: Number(row.dataset.feature) });
    },
    { signal },
  );
  columns.addEventListener(
    "click",
    (event) => {
      const sort = (event.target as HTMLElement).closest<HTMLElement>("[data-sort]")?.dataset.sort;
      if (sort) wish({ sort: sort as Sort });
    },
    { signal },
  );
  rovingFocus(body, signal);

  return {
    element: h("div", { class: "saelab-token-detail" }, head, note, sum, h("div", { class: "saelab-features-box" }, table)),
    show(detail, sort, names) {
      const held = focusedIn(table);
      const again = held?.dataset.sort ?? held?.dataset.feature;
      table.hidden = !detail || detail.rows.length === 0;
      head.replaceChildren();
      note.hidden = !detail?.note;
      setText(note, detail?.note ?? "");
      sum.replaceChildren(...(detail?.parts ? parts(detail) : []));
      if (!detail) return;
      head.append(
        h("h4", {}, `Token ${detail.position} `, tokenChip(detail.label)),
        h("small", {}, detail.active === null ? "left out" : counted(detail.active, "active feature"), listed(detail)),
      );
      columns.replaceChildren(...headings(detail, sort));
      const strongest = Math.max(...detail.rows.map((row) => row.value), Number.MIN_VALUE);
      const rows = [...detail.rows].sort((a, b) => (sort === "effect" ? size(b) - size(a) : b.value - a.value));
      body.replaceChildren(...rows.map((row) => line(row, strongest, detail.effects, names)));
      mark();
      if (again === undefined) return;
      const next = table.querySelector<HTMLElement>(`button[data-sort="${again}"], button[data-feature="${again}"]`);
      (next ?? buttons()[0])?.focus({ preventScroll: true });
    },
    select(feature) {
      chosen = feature;
      mark();
    },
  };
}

const size = (row: Row) => Math.abs(row.effect ?? 0);

function listed(detail: Detail): string {
  return detail.active !== null && detail.active > detail.rows.length ? `, ${detail.rows.length} listed` : "";
}

function headings(detail: Detail, sort: Sort): HTMLElement[] {
  const sortable = (by: Sort, name: string, title: string) => {
    const on = by === sort;
    const button = h("button", { type: "button", "data-sort": by, "data-needs": "model", title }, name, on ? " ▾" : "");
    return h("th", { scope: "col", "aria-sort": on ? "descending" : "none" }, button);
  };
  const plain = (name: string, title: string) => h("th", { scope: "col", title }, name);
  const found = [
    plain("feature", "Its number in the coder, and its name"),
    sortable("activation", "activation", "Sort by activation"),
    plain("× f_scale", "In units of the 99.9th percentile of its activations on training text"),
  ];
  if (!detail.effects) return found;
  const label = tokenLabel(detail.target ?? "");
  return [
    ...found,
    sortable("effect", `effect on ${label}`, `Direct effect on the logit of ${label}, nats, centred over the vocabulary. Sort by its size`),
    plain("promotes most", "The tokens whose logits it raises most directly"),
  ];
}

function line(row: Row, strongest: number, effects: boolean, names: Names): HTMLElement {
  const name = `Feature ${inWords(row.feature, names)}, activation ${number(row.value)}`;
  const pick = h(
    "button",
    { type: "button", class: "saelab-pick", "data-cell": true, "data-feature": row.feature, "data-needs": "model", "aria-label": name, tabindex: -1 },
    String(row.feature),
  );
  const meter = h("span", { class: "saelab-meter", "aria-hidden": "true" });
  meter.style.setProperty("--saelab-share", (row.value / strongest).toFixed(3));
  const cells = [
    h("th", { scope: "row" }, pick, nameOf(names[row.feature])),
    h("td", { class: "saelab-number" }, meter, h("span", {}, number(row.value))),
    h("td", { class: "saelab-number" }, number(row.scaled)),
  ];
  if (effects) {
    const effect = row.effect ?? 0;
    const words = (row.promoted ?? []).flatMap(([token, value]) => {
      const chip = tokenChip(token);
      chip.title = `${tokenLabel(token)} ${signed(value)}`;
      chip.dir = "auto";
      return [chip, " "];
    });
    cells.push(
      h("td", { class: "saelab-number", "data-sign": effect < 0 ? "down" : "up" }, signed(effect)),
      h("td", { class: "saelab-promoted" }, ...words),
    );
  }
  return h("tr", { "data-row": true, "data-feature": row.feature }, ...cells);
}

export function signed(value: number): string {
  return value > 0 ? `+${number(value)}` : number(value);
}

function parts(detail: Detail): (Node | string)[] {
  const { features, error, bias, rest, logit } = detail.parts!;
  const what = { next: "the next token", likeliest: "the likeliest next token", chosen: "the chosen token" }[detail.target_is ?? "next"];
  const fixed = (value: number) => {
    const size = Math.abs(value).toFixed(2);
    return size === "0.00" ? size : `${value < 0 ? "−" : "+"}${size}`;
  };
  const piece = (name: string, value: number, title: string) => [h("b", { title }, fixed(value)), ` ${name}`];
  return [
    `Logit of ${what} `,
    tokenChip(detail.target ?? ""),
    ", centred: ",
    h("b", {}, fixed(logit)),
    " = ",
    ...piece("features", features, "All active features together"),
    ", ",
    ...piece("error", error, "What the coder does not reconstruct"),
    ", ",
    ...piece("bias", bias, "What the coder writes beside features: its b_dec"),
    ", ",
    ...piece("rest of the stream", rest, "All that other parts of the model add, and the biases of the final norm and W_U"),
  ];
}
