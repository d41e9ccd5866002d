// One feature: everything right of the list. Rebuilt whenever Python sends another view.
import { h } from "../shared/dom";
import { integer, number, percent } from "../shared/format";
import { histogram } from "../shared/histogram";
import { tokenLabel, valueText } from "../shared/tokens";
import { contexts, type Hovered } from "./contexts";
import { lens } from "./lens";
import { neighbours } from "./neighbours";
import { heading, stats } from "./stats";
import type { FeatureView } from "./types";

const HINT = "hover a token, or use the arrow keys";

export function pane(view: FeatureView, open: (feature: number) => void, signal: AbortSignal): HTMLElement[] {
  const unit = view.f_scale > 0 ? { name: "f_scale", value: view.f_scale } : undefined;
  const plot = histogram(view.histogram, unit);
  const alive = view.groups.some((group) => group.contexts.length > 0);
  const readout = h("small", { class: "saelab-readout" }, alive ? HINT : "");
  const hover = (at: Hovered | null) => {
    plot.mark(at?.value ?? null);
    readout.textContent = at === null ? HINT : describe(at, view.max);
  };
  return [
    heading(view),
    stats(view),
    h(
      "div",
      { class: "saelab-row" },
      h(
        "section",
        { class: "saelab-activations", "aria-label": "Activations" },
        h("h4", {}, "Activations ", h("small", {}, "log counts, silent tokens left out")),
        plot.element,
        readout,
      ),
      lens(view),
    ),
    h(
      "section",
      { "aria-label": "Contexts" },
      h("h4", {}, "Contexts ", alive ? h("small", {}, "click a line for its whole text") : null),
      alive
        ? contexts(view, hover, signal)
        : h("p", { class: "saelab-dim" }, `It fires on none of these ${integer(view.tokens_seen)} tokens.`),
    ),
    neighbours(view.neighbours, open, signal),
  ];
}

function describe(at: Hovered, max: number): string {
  const share = at.value !== null && at.value > 0 && max > 0 ? `, ${percent(at.value / max)} of max` : "";
  const value = at.value !== null && at.value > 0 ? number(at.value) : valueText(at.value);
  return `${tokenLabel(at.token)} ${value}${share}`;
}
