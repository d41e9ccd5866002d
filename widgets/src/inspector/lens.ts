// What the feature's direction does to the vocabulary, read through the unembedding.
import { h } from "../shared/dom";
import { number } from "../shared/format";
import { tokenChip } from "../shared/tokens";
import type { FeatureView } from "./types";

export function lens(view: FeatureView): HTMLElement | null {
  if (view.unit === "place") return null; // a network that is no language model has none
  const all = [...view.promoted, ...view.suppressed].map(([, value]) => Math.abs(value));
  const scale = Math.max(...all, Number.MIN_VALUE);
  const columns = h(
    "div",
    { class: "saelab-lens-columns" },
    column("promoted", view.promoted, scale),
    column("suppressed", view.suppressed, scale),
  );
  const title = ["Logit lens ", h("small", {}, "arbitrary units")];
  if (view.lens_note === "") return h("section", { class: "saelab-lens", "aria-label": "Logit lens" }, h("h4", {}, ...title), columns);
  // Tokens that may be chance are read only by who asks for them.
  return h(
    "section",
    { class: "saelab-lens", "aria-label": "Logit lens" },
    h("details", {}, h("summary", {}, "Logit lens"), h("p", { class: "saelab-caution", role: "note" }, view.lens_note), all.length > 0 ? columns : null),
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
