// What the feature's direction does to the vocabulary, read through the unembedding.
import { h } from "../shared/dom";
import { number } from "../shared/format";
import { tokenChip } from "../shared/tokens";
import type { FeatureView } from "./types";

export function lens(view: FeatureView): HTMLElement {
  const all = [...view.promoted, ...view.suppressed].map(([, value]) => Math.abs(value));
  const scale = Math.max(...all, Number.MIN_VALUE);
  return h(
    "section",
    { class: "saelab-lens", "aria-label": "Logit lens" },
    h("h4", {}, "Logit lens ", h("small", {}, "arbitrary units")),
    view.lens_note !== "" ? h("p", { class: "saelab-caution", role: "note" }, `Caution: ${view.lens_note}`) : null,
    h(
      "div",
      { class: "saelab-lens-columns" },
      column("promoted", view.promoted, scale),
      column("suppressed", view.suppressed, scale),
    ),
  );
}

function column(name: "promoted" | "suppressed", tokens: [string, number][], scale: number): HTMLElement {
  const rows = tokens.map(([token, value]) => {
    const bar = h("span", { class: "saelab-lens-bar" });
    bar.style.width = `${((100 * Math.abs(value)) / scale).toFixed(1)}%`;
    return h(
      "tr",
      {},
      h("td", { class: "saelab-lens-token" }, bar, tokenChip(token)),
      h("td", { class: "saelab-lens-value" }, number(value)),
    );
  });
  return h(
    "table",
    { class: `saelab-${name}` },
    h("caption", {}, name),
    h("tbody", {}, ...rows),
  );
}
