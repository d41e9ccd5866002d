// The list of features: the answer to the search, or the first of all live features.
import { h, setText } from "../shared/dom";
import { number, percent } from "../shared/format";
import { choosing } from "../shared/keyboard";
import { inWords, nameOf } from "../shared/name";
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
  const chosen = choosing(list, "feature", open, signal);
  let shown: Row[] = [];
  return {
    element: h("section", { class: "saelab-side", "aria-label": "Feature list", "data-needs": "model" }, note, list),
    show(rows, text) {
      setText(note, text);
      const longer = shown.length > 0 && rows.length > shown.length && shown.every((row, i) => row === rows[i]);
      if (longer) list.append(...rows.slice(shown.length).map(option)); // the place and the focus stay
      else {
        list.replaceChildren(...rows.map(option));
        list.scrollTop = 0;
      }
      shown = rows;
      chosen.mark();
    },
    select: chosen.select,
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
      "aria-label": `Feature ${inWords(row.feature, { [row.feature]: row.label })}, density ${percent(row.density)}, max ${number(row.max)}, fires on ${tokens}${row.why ? `, ${row.why}` : ""}`,
    },
    h("span", { class: "saelab-result-id" }, String(row.feature)),
    h("span", { class: "saelab-result-numbers" }, `${percent(row.density)} · max ${number(row.max)}`),
    row.label ? h("span", { class: "saelab-result-label" }, nameOf(row.label)) : null,
    h("span", { class: "saelab-result-tokens" }, ...row.tokens.map(tokenChip)),
    row.why ? h("span", { class: "saelab-result-why" }, row.why) : null,
  );
}
