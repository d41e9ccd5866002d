// The steered text token by token: what the edits change there.
import { h, setText } from "../shared/dom";
import { number } from "../shared/format";
import { type StripOptions, tokenStrip } from "../shared/strip";
import { tokenChip, tokenLabel } from "../shared/tokens";
import type { Comparison, Measure } from "./types";

export interface ComparisonView {
  element: HTMLElement;
  show(comparison: Comparison): void;
  /** It belongs to texts of other settings. */
  stale(yes: boolean): void;
}

const HINT = "hover a token, or use the arrow keys";
const NEXT = 4;

export function comparison(choose: (position: number) => void, signal: AbortSignal): ComparisonView {
  const select = h("select", { "aria-label": "Value of each token" });
  const readout = h("small", { class: "saelab-readout", role: "status" });
  const summary = h("p", { class: "saelab-summary" });
  const next = h("p", { class: "saelab-next" });
  let shown: Comparison = {};
  let chosen: number | null = null;

  const say = (position: number | null) => {
    const at = position ?? chosen;
    const token = at === null ? undefined : shown.steered?.[at];
    if (at === null || !token) {
      setText(readout, HINT);
      return;
    }
    setText(readout, `${tokenLabel(token.text)} ${inWords(shown.measures ?? [], at)}`);
  };
  const options: StripOptions = {
    label: "Steered text, token by token",
    numbers: true,
    hover: say,
    choose: (position) => {
      chosen = position;
      strip.select(position);
      say(position);
      choose(position);
    },
  };
  const strip = tokenStrip(options, signal);
  strip.element.addEventListener("focusout", () => say(null), { signal });

  const draw = () => {
    const measures = shown.measures ?? [];
    const measure = measures.find((m) => m.name === select.value) ?? measures[0];
    if (!measure) return;
    options.scale = scaleOf(measures, measure);
    say(null); // first: a strip that has the focus keeps it, and then says its token
    strip.show(
      (shown.steered ?? []).map((token, i) => {
        const value = measure.values[i] ?? null;
        return { text: token.text, value: value ?? 0, note: `${measure.name} ${number(value)}`, mark: token.mark === "prompt" ? "prompt" : "", role: token.role };
      }),
    );
    strip.select(chosen);
  };
  select.addEventListener("change", draw, { signal });

  const note = h("p", { class: "saelab-dim" });
  const element = h(
    "section",
    { class: "saelab-comparison", "aria-label": "Comparison" },
    h("div", { class: "saelab-bar-row" }, h("h4", {}, "Steered text, token by token"), select, summary),
    strip.element,
    readout,
    next,
  );
  return {
    element: h("div", {}, element, note),
    stale(yes) {
      element.dataset.stale = String(yes);
    },
    show(comparison) {
      shown = comparison;
      chosen = null;
      element.hidden = !comparison.measures;
      setText(note, comparison.note ?? "");
      note.hidden = !comparison.note;
      const named = comparison.measures ?? [];
      const before = select.value;
      select.replaceChildren(...named.map(({ name, label }) => h("option", { value: name, selected: name === before }, label ?? name)));
      const [without, with_] = comparison.perplexity ?? [];
      setText(summary, `perplexity ${number(without)} → ${number(with_)} with the edits · mean KL ${number(comparison.mean_kl)} nats`);
      const changes = (comparison.next ?? []).slice(0, NEXT).map(([token, a, b]) => h("span", {}, tokenChip(token), ` ${number(a)} → ${number(b)}`));
      next.replaceChildren(h("small", {}, "next token, log-probability "), ...changes);
      draw();
    },
  };
}

/** All values of one token; of a pair, without → with the edits. */
function inWords(measures: Measure[], at: number): string {
  const groups = [...new Set(measures.map((m) => m.group))];
  const values = groups.map((group) => {
    const [first, second] = measures.filter((m) => m.group === group).map((m) => number(m.values[at]));
    return `${group} ${second === undefined ? first : `${second} → ${first}`}`;
  });
  return values.join(" · ");
}

function scaleOf(measures: Measure[], measure: Measure): number {
  const sizes = measures.filter((m) => m.group === measure.group).flatMap((m) => m.values.map((v) => Math.abs(v ?? 0)));
  return Math.max(...sizes, Number.MIN_VALUE);
}
