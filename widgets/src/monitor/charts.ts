// The curves of a training: a small chart a measure, a line a coder.
import { type Chart, lineChart } from "../shared/chart";
import { h } from "../shared/dom";
import { figures } from "../shared/figures";
import { integer, number, percent } from "../shared/format";
import { changeText } from "./hand";
import { type Change, type Curves, MEASURES, type Measure } from "./types";

export interface Charts {
  element: HTMLElement;
  show(curves: Curves, changes: Change[]): void;
}

const LABELS: Record<Measure, [string, string]> = {
  loss: ["Loss", "sum of the terms, activations scaled to norm √d"],
  fvu: ["FVU", "share of the variance that the batch's reconstruction leaves"],
  l0: ["L0", "active features a token"],
  dead: ["Dead features", "share that has not fired for dead_after tokens"],
  threshold: ["Threshold", "least code that is on, activations scaled to norm √d"],
  cosine: ["Decoder cosine", "mean over 256 decoder rows of the largest |cosine| with another row"],
  lr: ["Learning rate", "of the step"],
};
const LOGARITHMIC: Measure[] = ["loss", "fvu"];

export function charts(signal: AbortSignal): Charts {
  const made = {} as Record<Measure, Chart>;
  for (const measure of MEASURES) {
    const [label, meaning] = LABELS[measure];
    const log = LOGARITHMIC.includes(measure);
    made[measure] = lineChart({ label, x: "step", whole: true, height: 96, zero: !log && measure !== "cosine", log }, signal);
    made[measure].element.title = meaning + (log ? " (logarithmic)" : "");
    made[measure].element.dataset.measure = measure;
  }
  const grid = h("div", { class: "saelab-monitor-charts" }, ...MEASURES.map((measure) => made[measure].element));
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
      for (const measure of MEASURES) {
        // A measure taken now and then is a line through what is known of it, over the same steps as the others.
        const series = labels.map((name) => {
          const { step, [measure]: values } = curves[name]!;
          const at = step.map((_, i) => i).filter((i) => values[i] !== null || i === 0 || i === step.length - 1);
          return { name, x: at.map((i) => step[i]!), y: at.map((i) => values[i] ?? null) };
        });
        made[measure].element.hidden = !series.some(({ y }) => y.some((value) => value !== null));
        made[measure].show(series);
        made[measure].notes(changes.map((c) => ({ x: c.step, text: remark(c, labels.length > 1) })));
      }
      figures.replaceChildren(...(some ? [labels.length > 1 ? table(curves) : strip(curves[labels[0]!]!)] : []));
      list.replaceChildren(...(changes.length ? [changed(changes, labels.length > 1)] : []));
    },
  };
}

function remark(change: Change, several: boolean): string {
  return `step ${integer(change.step)}: ${several ? `${change.coder}, ` : ""}${changeText(change.what, change.old, change.new)}`;
}

function last(values: (number | null)[]): number | null {
  return values.reduceRight<number | null>((found, value) => found ?? value, null);
}

const shown = (measure: Measure, value: number | null) => (measure === "dead" ? percent(value) : number(value));

/** The last figures of the only coder, side by side. */
function strip(curve: Curves[string]): HTMLElement {
  const items = MEASURES.map((measure) => {
    const [label, meaning] = LABELS[measure];
    return { name: label, value: shown(measure, last(curve[measure])), meaning };
  });
  return figures(items, "saelab-monitor-stats");
}

/** The last figures of all coders. */
function table(curves: Curves): HTMLElement {
  const head = h("tr", {}, ...["coder", "step"].map((t) => h("th", { scope: "col" }, t)));
  for (const measure of MEASURES) head.append(h("th", { scope: "col", title: LABELS[measure][1] }, LABELS[measure][0]));
  const rows = Object.entries(curves).map(([label, curve]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, label),
      h("td", {}, integer(curve.step.at(-1) ?? 0)),
      ...MEASURES.map((measure) => h("td", {}, shown(measure, last(curve[measure])))),
    ),
  );
  return h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows));
}

function changed(changes: Change[], several: boolean): HTMLElement {
  const items = changes.map((change) => h("li", {}, remark(change, several)));
  return h("div", {}, h("h4", {}, "Changed while it ran ", h("small", {}, "dotted lines")), h("ul", {}, ...items));
}
