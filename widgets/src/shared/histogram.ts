// A histogram as inline SVG, with a marker that other parts of a widget move.
import { h, svg } from "./dom";
import { counted, number } from "./format";

export interface Bins {
  counts: number[];
  edges: number[];
}

export interface Histogram {
  element: HTMLElement;
  /** Show where `value` lies; null takes the marker away. */
  mark(value: number | null): void;
  /** A second marker that stays; null takes it away. */
  pin(value: number | null): void;
}

/** What is counted (one of it), and along what. */
export interface Axis {
  what: string;
  along: string;
  /** A place on the axis, in words. */
  text(value: number): string;
}

const WIDTH = 400;
const HEIGHT = 100;

/** Bars on a log count axis; `reference` is an optional named value drawn as a dashed line. */
export function histogram(
  bins: Bins,
  reference?: { name: string; value: number },
  axis: Axis = { what: "token", along: "activations", text: number },
): Histogram {
  const low = bins.edges[0] ?? 0;
  // The named value may lie beyond all bars: the axis then goes on to it.
  const high = Math.max(bins.edges.at(-1) ?? 1, reference && Number.isFinite(reference.value) ? reference.value : -Infinity);
  const span = high - low || 1;
  const { text } = axis;
  const x = (value: number) => (WIDTH * (Math.min(high, Math.max(low, value)) - low)) / span;
  // Activations have a heavy tail: on a linear axis all but the first few bars would vanish.
  const tallest = Math.log1p(Math.max(1, ...bins.counts));

  const bars = bins.counts.map((count, i) => {
    const left = x(bins.edges[i] ?? low);
    const right = x(bins.edges[i + 1] ?? high);
    const tall = (HEIGHT * Math.log1p(count)) / tallest;
    return svg(
      "rect",
      { class: "saelab-bar", x: left, y: HEIGHT - tall, width: Math.max(0, right - left - 1), height: tall },
      svg("title", {}, `${text(bins.edges[i] ?? low)} to ${text(bins.edges[i + 1] ?? high)}: ${counted(count, axis.what)}`),
    );
  });
  const marker = vertical("saelab-marker");
  const pinned = vertical("saelab-pinned");
  for (const line of [marker, pinned]) line.setAttribute("visibility", "hidden");
  const dashed = reference && Number.isFinite(reference.value) ? vertical("saelab-reference") : null;
  if (dashed && reference) place(dashed, x(reference.value));

  const total = bins.counts.reduce((sum, count) => sum + count, 0);
  const picture = svg(
    "svg",
    {
      class: "saelab-histogram-plot",
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": `Histogram of ${axis.along === "activations" ? counted(total, "activation") : `${counted(total, axis.what)} by ${axis.along}`} from ${text(low)} to ${text(high)}, log counts`,
    },
    ...bars,
    dashed,
    pinned,
    marker,
  );
  const element = h(
    "div",
    { class: "saelab-histogram" },
    picture,
    h(
      "div",
      { class: "saelab-axis", "aria-hidden": "true" },
      h("span", {}, total ? text(low) : "none"),
      dashed && reference && h("span", { class: "saelab-axis-note" }, `┆ ${reference.name} ${number(reference.value)}`),
      h("span", {}, total ? text(high) : ""),
    ),
  );
  return {
    element,
    pin(value) {
      const shown = value !== null && value >= low;
      pinned.setAttribute("visibility", shown ? "visible" : "hidden");
      if (shown) place(pinned, x(value));
    },
    mark(value) {
      const shown = value !== null && value > 0;
      marker.setAttribute("visibility", shown ? "visible" : "hidden");
      if (shown) {
        place(marker, x(value));
        marker.setAttribute("data-value", String(value));
      } else {
        marker.removeAttribute("data-value");
      }
      bars.forEach((bar, i) => bar.classList.toggle("saelab-bar-marked", shown && inBin(bins.edges, i, value)));
    },
  };
}

function vertical(name: string): SVGLineElement {
  return svg("line", { class: name, y1: 0, y2: HEIGHT });
}

function place(line: SVGLineElement, x: number): void {
  line.setAttribute("x1", x.toFixed(2));
  line.setAttribute("x2", x.toFixed(2));
}

function inBin(edges: number[], i: number, value: number): boolean {
  const left = edges[i];
  const right = edges[i + 1];
  if (left === undefined || right === undefined) return false;
  const last = i === edges.length - 2;
  return value >= left && (value < right || (last && value <= right));
}
