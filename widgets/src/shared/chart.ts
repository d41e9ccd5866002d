// Lines over a shared x axis, as inline SVG: large as a chart with axes, small as a sparkline.
import { h, svg, setText } from "./dom";
import { integer, number } from "./format";
import { visible } from "./visible";

export interface Series {
  name: string;
  x: number[];
  /** null: no value there. */
  y: (number | null)[];
  /** The number of the line that this one goes with: it has that line's colour, and is dotted. */
  beside?: number;
}

export interface ChartOptions {
  label: string;
  /** What x is, for the readout. */
  x: string;
  width?: number;
  height?: number;
  /** The y axis begins at 0. */
  zero?: boolean;
  /** x counts something: it reads without decimals. */
  whole?: boolean;
  /** y on a logarithmic scale; values that are not above 0 are left out. */
  log?: boolean;
  /** Called with the x that a click, or Enter, chose. */
  choose?: (x: number) => void;
}

export interface Chart {
  element: HTMLElement;
  show(series: Series[]): void;
  /** A vertical line at x; null: none. */
  mark(x: number | null): void;
  /** Lasting vertical lines, each with a word that a pointer over it shows. */
  notes(notes: Note[]): void;
}

export interface Note {
  x: number;
  text: string;
}

// Told apart without colour: each line has its own dash and its own shape at its end.
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "1 2", "10 4"];

export function lineChart(options: ChartOptions, signal: AbortSignal): Chart {
  const width = options.width ?? 320;
  const height = options.height ?? 120;
  const lines = svg("g", {});
  const remarks = svg("g", {});
  const marker = svg("line", { class: "saelab-marker", y1: 0, y2: height, visibility: "hidden" });
  const cursor = svg("line", { class: "saelab-reference", y1: 0, y2: height, visibility: "hidden" });
  const picture = svg(
    "svg",
    {
      class: "saelab-chart-plot",
      viewBox: `0 0 ${width} ${height}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": options.label,
      tabindex: 0,
    },
    remarks,
    lines,
    cursor,
    marker,
  );
  const low = h("span", {});
  const high = h("span", {});
  const left = h("span", {});
  const right = h("span", {});
  const middle = h("span", {}, options.x);
  const legend = h("div", { class: "saelab-chart-legend" });
  const readout = h("small", { class: "saelab-readout", role: "status" });
  const element = h(
    "div",
    { class: "saelab-chart" },
    h("div", { class: "saelab-chart-title" }, h("strong", {}, options.label), readout),
    h("div", { class: "saelab-chart-frame" }, h("div", { class: "saelab-chart-y", "aria-hidden": "true" }, high, low), picture),
    h("div", { class: "saelab-axis saelab-chart-x", "aria-hidden": "true" }, left, middle, right),
    legend,
  );

  let shown: Series[] = [];
  let xs: number[] = [];
  let range = { x0: 0, x1: 1, y0: 0, y1: 1 };
  let at: number | null = null;
  const px = (x: number) => (range.x1 === range.x0 ? width / 2 : (width * (x - range.x0)) / (range.x1 - range.x0));
  const scaled = options.log ? Math.log : (y: number) => y;
  const py = (y: number) => height - ((height - 4) * (scaled(y) - scaled(range.y0))) / (scaled(range.y1) - scaled(range.y0) || 1) - 2;

  const xText = options.whole ? integer : number;

  const say = (x: number | null) => {
    at = x;
    cursor.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x === null) {
      setText(readout, "");
      return;
    }
    cursor.setAttribute("x1", px(x).toFixed(1));
    cursor.setAttribute("x2", px(x).toFixed(1));
    const values = shown.map((s) => {
      const value = s.y[s.x.indexOf(x)];
      return value === undefined || value === null ? "" : `${shown.length > 1 ? `${s.name} ` : ""}${number(value)}`;
    });
    setText(readout, `${options.x} ${xText(x)}: ${values.filter(Boolean).join(", ")}`);
  };
  const nearest = (event: PointerEvent | MouseEvent): number | null => {
    const box = picture.getBoundingClientRect();
    const wanted = range.x0 + ((event.clientX - box.left) / (box.width || 1)) * (range.x1 - range.x0);
    return xs.reduce<number | null>((best, x) => (best === null || Math.abs(x - wanted) < Math.abs(best - wanted) ? x : best), null);
  };
  picture.addEventListener("pointermove", (event) => say(nearest(event)), { signal });
  picture.addEventListener("pointerleave", () => say(null), { signal });
  picture.addEventListener("blur", () => say(null), { signal });
  picture.addEventListener(
    "click",
    (event) => {
      const x = nearest(event);
      if (x !== null) options.choose?.(x);
    },
    { signal },
  );
  picture.addEventListener(
    "keydown",
    (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step !== undefined && xs.length) {
        event.preventDefault();
        const next = at === null ? (step > 0 ? 0 : xs.length - 1) : xs.indexOf(at) + step;
        say(xs[Math.max(0, Math.min(xs.length - 1, next))] ?? null);
      } else if (event.key === "Enter" && at !== null) options.choose?.(at);
    },
    { signal },
  );

  let marked: number | null = null;
  const placeMark = () => {
    const visible = marked !== null && xs.length > 0;
    marker.setAttribute("visibility", visible ? "visible" : "hidden");
    if (!visible || marked === null) return;
    const x = px(Math.min(range.x1, Math.max(range.x0, marked))).toFixed(1);
    marker.setAttribute("x1", x);
    marker.setAttribute("x2", x);
  };
  let noted: Note[] = [];
  const placeNotes = () => {
    const inside = noted.filter((note) => note.x >= range.x0 && note.x <= range.x1);
    remarks.replaceChildren(
      ...inside.map(({ x, text }) => {
        const at = px(x).toFixed(1);
        return svg("line", { class: "saelab-note-line", x1: at, x2: at, y1: 0, y2: height }, svg("title", {}, text));
      }),
    );
  };
  return {
    element,
    show(all) {
      const series = options.log ? all.map((s) => ({ ...s, y: s.y.map((y) => (y !== null && y > 0 ? y : null)) })) : all;
      shown = series;
      xs = [...new Set(series.flatMap((s) => s.x))].sort((a, b) => a - b);
      const ys = series.flatMap((s) => s.y).filter((y): y is number => y !== null && Number.isFinite(y));
      const y0 = options.zero ? Math.min(0, ...ys) : Math.min(...ys);
      range = { x0: xs[0] ?? 0, x1: xs.at(-1) ?? 1, y0: ys.length ? y0 : 0, y1: ys.length ? Math.max(...ys) : 1 };
      lines.replaceChildren(...series.map((s, i) => path(s, i, px, py)));
      const single = range.x0 === range.x1; // it stands in the middle, and so does its x
      setText(left, single ? "" : xText(range.x0));
      setText(middle, single ? `${options.x} ${xText(range.x0)}` : options.x);
      setText(right, single ? "" : xText(range.x1));
      const [least, most] = apart(range.y0, range.y1);
      setText(low, least);
      setText(high, most);
      const keys = series.filter((s) => s.beside === undefined);
      legend.hidden = keys.length < 2;
      legend.replaceChildren(...keys.map((s, i) => key(s.name, i)));
      picture.setAttribute("aria-label", visible(describe(options.label, series)));
      placeMark();
      placeNotes();
      say(at !== null && xs.includes(at) ? at : null);
    },
    mark(x) {
      marked = x;
      placeMark();
    },
    notes(notes) {
      noted = notes;
      placeNotes();
    },
  };
}

/** Both ends of an axis, in as many digits as tell them apart. A flat line lies at the bottom, and has one value. */
function apart(low: number, high: number): [string, string] {
  if (low === high) return [number(low), ""];
  const same = number(low) === number(high);
  const digits = same ? [4, 5, 6, 7, 8].find((n) => low.toPrecision(n) !== high.toPrecision(n)) : undefined;
  return digits ? [low.toPrecision(digits), high.toPrecision(digits)] : [number(low), number(high)];
}

function path(series: Series, index: number, px: (x: number) => number, py: (y: number) => number): SVGElement {
  let drawing = false;
  const d = series.x.map((x, i) => {
    const y = series.y[i];
    if (y === null || y === undefined || !Number.isFinite(y)) {
      drawing = false;
      return "";
    }
    const move = drawing ? "L" : "M";
    drawing = true;
    const alone = move === "M" && !Number.isFinite(series.y[i + 1] ?? NaN); // a short line: one of no length is not drawn
    return `${move}${px(x).toFixed(1)} ${py(y).toFixed(1)}${alone ? "m-2 0h4" : ""}`;
  });
  const own = series.beside ?? index;
  const dotted = series.beside !== undefined;
  return svg("path", {
    class: dotted ? "saelab-line saelab-dotted" : "saelab-line",
    d: d.join(""),
    "data-series": own % 6,
    "stroke-dasharray": dotted ? "0.1 4" : DASHES[own % 6],
  });
}

function key(name: string, index: number): HTMLElement {
  const line = svg(
    "svg",
    { width: 24, height: 8, "aria-hidden": "true" },
    svg("path", { class: "saelab-line", d: "M0 4H24", "data-series": index % 6, "stroke-dasharray": DASHES[index % 6] }),
  );
  return h("span", {}, line, name);
}

/** What a listener hears: each line's first and last value. */
function describe(label: string, series: Series[]): string {
  const parts = series.map((s) => {
    const values = s.y.filter((y): y is number => y !== null && Number.isFinite(y));
    return values.length ? `${s.name} from ${number(values[0])} to ${number(values.at(-1))}` : `${s.name}: no values`;
  });
  return `${label}: ${parts.join("; ") || "no values yet"}`;
}
