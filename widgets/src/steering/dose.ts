// Dose and response of one feature, on demand: what it buys and what it costs, beside random directions.
import { lineChart } from "../shared/chart";
import { button, h, setText } from "../shared/dom";
import { type Names, numbered } from "../shared/name";
import { tokenLabel } from "../shared/tokens";
import type { Dose } from "./types";

export interface DoseView {
  element: HTMLElement;
  show(dose: Dose, target: string[], names: Names): void;
  progress(done: number, total: number): void;
  /** Whether it is being measured. */
  busy(yes: boolean): void;
  /** The strength on the slider. */
  mark(strength: number | null): void;
}

export interface DoseActions {
  measure(): void;
  stop(): void;
  target(tokens: string[]): void;
  /** A strength was chosen in a chart. */
  choose(strength: number): void;
}

export function dose(actions: DoseActions, signal: AbortSignal): DoseView {
  const target = h("input", {
    type: "text",
    "aria-label": "Target tokens, | between them",
    placeholder: "its top tokens",
    title: "Tokens whose log-odds are measured, with | between them; a leading space counts. Empty: those that the feature fires on most.",
    spellcheck: "false",
    autocomplete: "off",
  });
  const status = h("small", { role: "status" });
  const size = { x: "strength", height: 80, width: 360, choose: (x: number) => actions.choose(x) };
  const response = lineChart({ label: "Log-odds of the target", ...size }, signal);
  const cost = lineChart({ label: "Cost on other text, nats/token", ...size }, signal);
  const charts = h("div", { class: "saelab-dose-charts" }, response.element, cost.element);
  const says = h("span", {});
  const caption = h("p", { class: "saelab-dim" }, says, h("span", { "data-needs": "kernel" }, " Click a chart to take a strength."));
  let measuring = false;

  const start = button("Dose response", () => (measuring ? actions.stop() : actions.measure()), signal, { "data-needs": "kernel" });
  target.addEventListener("change", () => actions.target(target.value === "" ? [] : target.value.split("|")), { signal });
  return {
    element: h(
      "section",
      { class: "saelab-dose", "aria-label": "Dose response" },
      h("div", { class: "saelab-bar-row" }, start, h("label", { "data-needs": "kernel" }, "target ", target), status),
      charts,
      caption,
    ),
    show(dose, tokens, names) {
      const series = dose.series ?? [];
      charts.hidden = caption.hidden = series.length === 0;
      response.show(series.map((s) => ({ name: s.name, x: s.strength, y: s.log_odds })));
      cost.show(series.map((s) => ({ name: s.name, x: s.strength, y: s.cost })));
      const wanted = (dose.target ?? []).map(tokenLabel).join(" or ");
      const next = ` alone: the next token after ${tokenLabel(dose.prompt ?? "")} is ${wanted}.`;
      says.replaceChildren("Feature ", ...numbered(dose.feature ?? 0, names).flatMap((part) => [part, " "]), next.trim());
      target.value = tokens.join("|");
    },
    progress(done, total) {
      setText(status, `measurement ${done + 1} of ${total}`);
    },
    busy(yes) {
      measuring = yes;
      setText(start, yes ? "Stop measuring" : "Dose response");
      if (!yes) setText(status, "");
    },
    mark(strength) {
      response.mark(strength);
      cost.mark(strength);
    },
  };
}
