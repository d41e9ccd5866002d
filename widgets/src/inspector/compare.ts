// The open feature beside a pinned one.
import { button, h } from "../shared/dom";
import { counted, number, percent } from "../shared/format";
import { nameOf } from "../shared/name";
import { tokenChip } from "../shared/tokens";
import type { FeatureView, PairView } from "./types";

export function comparison(here: FeatureView, pair: PairView, open: (feature: number) => void, signal: AbortSignal): HTMLElement {
  const there = pair.view;
  const unit = here.unit ?? "token";
  const words = (tokens: [string, number][]) => tokens.slice(0, 6).map(([token]) => tokenChip(token));
  const other = button(String(there.feature), () => open(there.feature), signal, { class: "saelab-link" });
  const called = (name: string | undefined) => [" ", nameOf(name, 24)];
  const lens = (view: PairView["view"], tokens: [string, number][]) => (view.lens_note === "" ? words(tokens) : ["may be chance"]);
  const rows: [string, (Node | string)[], (Node | string)[]][] = [
    ["density", [percent(here.density)], [percent(there.density)]],
    ["mean", [number(here.mean)], [number(there.mean)]],
    ["max", [number(here.max)], [number(there.max)]],
    ["f_scale", [number(here.f_scale)], [number(there.f_scale)]],
    ["fires without the other", [counted(pair.only[0], unit)], [counted(pair.only[1], unit)]],
    ["fires on most", pair.tokens_here.map(tokenChip), pair.tokens.map(tokenChip)],
  ];
  if (unit === "token") rows.push(["promotes", lens(here, here.promoted), lens(there, there.promoted)]);
  if (unit === "token") rows.push(["suppresses", lens(here, here.suppressed), lens(there, there.suppressed)]);
  return h(
    "section",
    { class: "saelab-compare", "aria-label": "Comparison" },
    h(
      "h4",
      {},
      "Compared ",
      h("small", {}, `cosine ${number(pair.cosine)} · both fire on ${counted(pair.both, unit)} · Jaccard ${number(pair.jaccard)}`),
    ),
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, h("td", {}), h("th", { scope: "col" }, String(here.feature), ...called(here.names[here.feature]), " (open)"), h("th", { scope: "col" }, other, ...called(pair.name), " (pinned)"))),
      h("tbody", {}, ...rows.map(([name, a, b]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, ...a), h("td", {}, ...b)))),
    ),
  );
}
