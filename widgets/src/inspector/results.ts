// The list of features: the answer to the search, or the first of all live features.
import { h, setText } from "../shared/dom";
import { number, percent } from "../shared/format";
import { makeTabStop, rovingFocus } from "../shared/keyboard";
import { tokenChip, tokenLabel } from "../shared/tokens";
import type { Row } from "./types";

export interface Results {
  element: HTMLElement;
  show(rows: Row[], note: string): void;
  select(feature: number): void;
}

export function results(open: (feature: number) => void, signal: AbortSignal): Results {
  const list = h("div", { class: "saelab-results", role: "listbox", "aria-label": "Features" });
  const note = h("div", { class: "saelab-dim saelab-results-note", role: "status" });
  let selected = -1;

  const openFrom = (target: EventTarget | null) => {
    const row = (target as HTMLElement).closest<HTMLElement>("[data-feature]");
    if (row) open(Number(row.dataset.feature));
  };
  list.addEventListener("click", (event) => openFrom(event.target), { signal });
  list.addEventListener(
    "keydown",
    (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      openFrom(event.target);
    },
    { signal },
  );
  rovingFocus(list, signal);

  const mark = () => {
    const rows = [...list.querySelectorAll<HTMLElement>("[data-feature]")];
    for (const row of rows) row.setAttribute("aria-selected", String(Number(row.dataset.feature) === selected));
    const stop = rows.find((row) => Number(row.dataset.feature) === selected) ?? rows[0];
    if (stop) makeTabStop(list, stop);
  };
  return {
    element: h("section", { class: "saelab-side", "aria-label": "Feature list", "data-needs": "model" }, note, list),
    show(rows, text) {
      setText(note, text);
      list.replaceChildren(...rows.map(option));
      list.scrollTop = 0;
      mark();
    },
    select(feature) {
      selected = feature;
      mark();
    },
  };
}

function option(row: Row): HTMLElement {
  const tokens = row.tokens.map(tokenLabel).join(" ");
  return h(
    "div",
    {
      class: "saelab-result",
      role: "option",
      tabindex: -1,
      "data-row": true,
      "data-cell": true,
      "data-feature": row.feature,
      "aria-label": `Feature ${row.feature}, density ${percent(row.density)}, max ${number(row.max)}, fires on ${tokens}${row.label ? `, label ${row.label}` : ""}`,
    },
    h("span", { class: "saelab-result-id" }, String(row.feature)),
    h("span", { class: "saelab-result-numbers" }, `${percent(row.density)} · max ${number(row.max)}`),
    row.label ? h("span", { class: "saelab-result-label" }, row.label) : null,
    h("span", { class: "saelab-result-tokens" }, ...row.tokens.map(tokenChip)),
  );
}
