// The numbers of one feature, and the tokens it peaks on.
import { h } from "../shared/dom";
import { figures } from "../shared/figures";
import { integer, number, percent } from "../shared/format";
import { nameOf } from "../shared/name";
import { tokenChip } from "../shared/tokens";
import type { FeatureView } from "./types";

const TOP_TOKENS = 5;

/** The same label and tokens as in the list. */
export function heading(view: FeatureView, label: string, ...buttons: HTMLElement[]): HTMLElement {
  return h(
    "div",
    { class: "saelab-heading" },
    // Focus comes here when the control that opened the feature is redrawn.
    h("h3", { tabindex: -1 }, `Feature ${view.feature}`),
    nameOf(label),
    h("span", { class: "saelab-peaks" }, ...view.tokens.slice(0, TOP_TOKENS).map(tokenChip)),
    h("span", { class: "saelab-actions" }, ...buttons),
  );
}

export function stats(view: FeatureView): HTMLElement {
  const unit = view.unit ?? "token";
  const pairs: [string, string, string][] = [
    ["density", percent(view.density), `share of kept ${unit}s on which the feature fires`],
    ["fires on", `${integer(view.count)} of ${integer(view.tokens_seen)}`, `${unit}s on which it fires, of all kept ${unit}s`],
    ["mean", number(view.mean), "mean activation"],
    ["max", number(view.max), "largest activation"],
    ["f_scale", number(view.f_scale), "99.9th percentile of activation: the unit of steering strength"],
  ];
  return figures(pairs.map(([name, value, meaning]) => ({ name, value, meaning })), "saelab-stats");
}
