// The curves of a training: a small chart a measure, a line a coder.
import { type Chart, lineChart, type Series } from "../shared/chart";
import { h, setText } from "../shared/dom";
import { figures } from "../shared/figures";
import { integer, number, percent } from "../shared/format";
import { changeText } from "./hand";
import { type Change, type Curves, HELD_OUT, type Measure } from "./types";

export interface Charts {
  element: HTMLElement;
  show(curves: Curves, changes: Change[]): void;
}

const LABELS: Record<Measure, [string, string]> = {
  loss: ["Loss", "sum of the terms, activations scaled to norm √d"],
  fvu: ["FVU", "share of the variance that the batch's reconstruction leaves"],
  fvu_held_out: ["FVU, held-out", "of tokens that no step of the training sees"],
  l0: ["L0", "active features a token, of the batch"],
  l0_held_out: ["L0, held-out", "active features a token, of tokens that no step of the training sees"],
  ce_delta: ["ΔCE, held-out", "nats a token that splicing the coder into the model costs"],
  dead: ["Dead features", "share that has not fired for dead_after tokens"],
  threshold: ["Threshold", "least code that is on, activations scaled to norm √d"],
  cosine: ["Decoder cosine", "mean over 256 decoder rows of the largest |cosine| with another row"],
  lr: ["Learning rate", "of the step"],
  coefficient: ["Coefficient", "weight of the penalty, which target_l0 moves"],
};
const LOGARITHMIC: Measure[] = ["loss", "fvu", "coefficient"];
const SHOWN = Object.keys(LABELS) as Measure[];
const DRAWN = SHOWN.filter((measure) => !Object.values(HELD_OUT).includes(measure));

export function charts(signal: AbortSignal): Charts {
  const made = {} as Record<Measure, Chart>;
  const beside = {} as Record<Measure, HTMLElement>;
  for (const measure of DRAWN) {
    const [label, meaning] = LABELS[measure];
    const log = LOGARITHMIC.includes(measure);
    made[measure] = lineChart({ label, x: "step", whole: true, height: 96, zero: !log && measure !== "cosine", log }, signal);
    made[measure].element.title = meaning + (log ? " (logarithmic)" : "");
    made[measure].element.dataset.measure = measure;
    beside[measure] = h("small", { class: "saelab-dim", hidden: true, title: "gap: held-out − batch" });
    made[measure].element.append(beside[measure]);
  }
  const grid = h("div", { class: "saelab-monitor-charts" }, ...DRAWN.map((measure) => made[measure].element));
  // One legend serves all charts: the first chart's own, which it keeps up to date wherever it stands.
  const legend = made.loss.element.querySelector<HTMLElement>(".saelab-chart-legend");
  const figures = h("div", { class: "saelab-monitor-table" });
  const list = h("div", { class: "saelab-monitor-changes" });
  const empty = h("p", { class: "saelab-dim saelab-monitor-empty" }, "Curves appear with the first step.");
  return {
    element: h("div", { class: "saelab-monitor-body" }, figures, legend, empty, grid, list),
    show(curves, changes) {
      const labels = Object.keys(curves);
      const some = labels.some((label) => curves[label]?.step.length);
      empty.hidden = some;
      grid.hidden = figures.hidden = !some;
      for (const measure of DRAWN) {
        // A measure taken now and then is a line through what is known of it, over the same steps as the others.
        const series: Series[] = labels.map((name) => line(name, curves[name]!, measure));
        const held = HELD_OUT[measure];
        if (held && labels.some((name) => last(curves[name]![held]) !== null)) {
          series.push(...labels.map((name, i) => ({ ...line(`${name}, held-out`, curves[name]!, held), beside: i })));
          const only = labels.length === 1 ? gap(curves[labels[0]!]!, measure) : "";
          setText(beside[measure], `dotted: held-out tokens${only && `, ${only}`}`);
          beside[measure].hidden = false;
        } else beside[measure].hidden = true;
        made[measure].element.hidden = !series.some(({ y }) => y.some((value) => value !== null));
        made[measure].show(series);
        made[measure].notes(changes.map((c) => ({ x: c.step, text: remark(c, labels.length > 1) })));
      }
      figures.replaceChildren(...(some ? [labels.length > 1 ? table(curves) : strip(curves[labels[0]!]!)] : []));
      list.replaceChildren(...(changes.length ? [changed(changes, labels.length > 1)] : []));
    },
  };
}

function line(name: string, curve: Curves[string], measure: Measure): Series {
  const { step, [measure]: values } = curve;
  const at = step.map((_, i) => i).filter((i) => values[i] !== null || i === 0 || i === step.length - 1);
  return { name, x: at.map((i) => step[i]!), y: at.map((i) => values[i] ?? null) };
}

/** What held-out tokens have above the batch, where both are known last. */
function gap(curve: Curves[string], measure: Measure): string {
  const held = curve[HELD_OUT[measure]!];
  const at = held.reduce<number>((found, value, i) => (value === null ? found : i), -1);
  const batch = curve[measure][at];
  return at < 0 || batch === null || batch === undefined ? "" : `gap ${held[at]! < batch ? "−" : "+"}${number(Math.abs(held[at]! - batch))}`;
}

function remark(change: Change, several: boolean): string {
  return `step ${integer(change.step)}: ${several ? `${change.coder}, ` : ""}${changeText(change.what, change.old, change.new)}`;
}

function last(values: (number | null)[]): number | null {
  return values.reduceRight<number | null>((found, value) => found ?? value, null);
}

const shown = (measure: Measure, value: number | null) => (measure === "dead" ? percent(value) : number(value));

/** The measures that any of these coders has. */
function known(curves: Curves[string][]): Measure[] {
  return SHOWN.filter((measure) => curves.some((curve) => last(curve[measure]) !== null));
}

/** The last figures of the only coder, side by side. */
function strip(curve: Curves[string]): HTMLElement {
  const items = known([curve]).map((measure) => {
    const [label, meaning] = LABELS[measure];
    return { name: label, value: shown(measure, last(curve[measure])), meaning };
  });
  return figures(items, "saelab-monitor-stats");
}

/** The last figures of all coders. */
function table(curves: Curves): HTMLElement {
  const head = h("tr", {}, ...["coder", "step"].map((t) => h("th", { scope: "col" }, t)));
  const measures = known(Object.values(curves));
  for (const measure of measures) head.append(h("th", { scope: "col", title: LABELS[measure][1] }, LABELS[measure][0]));
  const rows = Object.entries(curves).map(([label, curve]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, label),
      h("td", {}, integer(curve.step.at(-1) ?? 0)),
      ...measures.map((measure) => h("td", {}, shown(measure, last(curve[measure])))),
    ),
  );
  return h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows));
}

function changed(changes: Change[], several: boolean): HTMLElement {
  const items = changes.map((change) => h("li", {}, remark(change, several)));
  return h("div", {}, h("h4", {}, "Changed while it ran ", h("small", {}, "dotted lines")), h("ul", {}, ...items));
}
