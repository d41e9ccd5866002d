// The open feature beside a pinned one.
import { button, h } from "../shared/dom";
import { integer, number, percent } from "../shared/format";
import { tokenChip } from "../shared/tokens";
import type { FeatureView, PairView } from "./types";

export function comparison(here: FeatureView, pair: PairView, open: (feature: number) => void, signal: AbortSignal): HTMLElement {
  const there = pair.view;
  const words = (tokens: [string, number][]) => tokens.slice(0, 6).map(([token]) => tokenChip(token));
  const other = button(String(there.feature), () => open(there.feature), signal, { class: "saelab-link" });
  const rows: [string, (Node | string)[], (Node | string)[]][] = [
    ["density", [percent(here.density)], [percent(there.density)]],
    ["mean", [number(here.mean)], [number(there.mean)]],
    ["max", [number(here.max)], [number(there.max)]],
    ["f_scale", [number(here.f_scale)], [number(there.f_scale)]],
    ["fires without the other", [`${integer(pair.only[0])} tokens`], [`${integer(pair.only[1])} tokens`]],
    ["fires on most", pair.tokens_here.map(tokenChip), pair.tokens.map(tokenChip)],
    ["promotes", words(here.promoted), words(there.promoted)],
    ["suppresses", words(here.suppressed), words(there.suppressed)],
  ];
  return h(
    "section",
    { class: "saelab-compare", "aria-label": "Comparison" },
    h(
      "h4",
      {},
      "Compared ",
      h("small", {}, `cosine ${number(pair.cosine)} · both fire on ${integer(pair.both)} tokens · Jaccard ${number(pair.jaccard)}`),
    ),
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, h("td", {}), h("th", { scope: "col" }, `${here.feature} (open)`), h("th", { scope: "col" }, other, " (pinned)"))),
      h("tbody", {}, ...rows.map(([name, a, b]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, ...a), h("td", {}, ...b)))),
    ),
  );
}
