// Two canvases: all points below, drawn once; what is marked above, drawn at each move.
import { h } from "../shared/dom";
import type { Movable } from "../shared/stage";
import type { Cloud } from "./cloud";

const EDGE = 10; // around the points
const REACH = 12; // pixels from the pointer to a point
export const SHAPES = 4;
export const HUES = 6;
const MOST_ZOOM = 64;
const ALONE = 0.12; // how much of the others is left beside a group that is shown alone

export interface Plot extends Movable {
  /** alone: the group in full colour, the others faint; null: all. */
  show(cloud: Cloud, alone: number | null): void;
  /** Ring the point under the pointer, and the selected one; -1: none. */
  mark(here: number, selected: number): void;
  /** Ring what a search found. */
  found(points: number[]): void;
  /** Move a point to the middle if it is out of sight. */
  reveal(point: number): void;
  /** The point under the pointer. */
  nearest(event: MouseEvent): number;
}

export function plot(stage: HTMLElement, root: HTMLElement, signal: AbortSignal): Plot {
  const [below, above] = [h("canvas", { "aria-hidden": "true" }), h("canvas", { "aria-hidden": "true" })];
  stage.append(below, above);
  let cloud: Cloud | null = null;
  let marked: [number, number] = [-1, -1];
  let hits: number[] = [];
  let only: number | null = null;
  let [scale, left, top] = [1, 0, 0]; // of what is shown, in shares of the whole

  const size = () => ({ width: stage.clientWidth - 2 * EDGE, height: stage.clientHeight - 2 * EDGE });
  const place = (index: number): [number, number] => {
    const { width, height } = size();
    const [x, y] = [((cloud?.x(index) ?? 0) - left) * scale, ((cloud?.y(index) ?? 0) - top) * scale];
    return [EDGE + x * width, EDGE + y * height];
  };
  const clean = (canvas: HTMLCanvasElement): CanvasRenderingContext2D | null => {
    if (!stage.clientWidth) return null; // not on show: its size will be observed
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(stage.clientWidth * ratio);
    canvas.height = Math.round(stage.clientHeight * ratio);
    const context = canvas.getContext("2d");
    context?.scale(ratio, ratio);
    return context;
  };
  const colour = (name: string) => getComputedStyle(root).getPropertyValue(`--saelab-${name}`).trim() || "#777";

  const drawAll = () => {
    const context = clean(below);
    if (!context || !cloud) return;
    const radius = Math.max(1, Math.min(3, 150 / Math.sqrt(cloud.length))) * Math.min(2.5, Math.sqrt(scale));
    const hues = Array.from({ length: HUES }, (_, i) => colour(`group-${i}`));
    const none = colour("dim");
    for (let index = 0; index < cloud.length; index += 1) {
      const group = cloud.group(index);
      const [x, y] = place(index);
      if (x < 0 || y < 0 || x > stage.clientWidth || y > stage.clientHeight) continue;
      context.globalAlpha = only === null || only === group ? 0.75 : ALONE;
      context.fillStyle = group < 0 ? none : (hues[group % HUES] ?? none);
      if (group < 0) context.fillRect(x - radius / 2, y - radius / 2, radius, radius);
      else shape(context, group % SHAPES, x, y, 1.5 * radius);
    }
  };
  const drawMarks = () => {
    const context = clean(above);
    if (!context || !cloud) return;
    const [here, selected] = marked;
    for (const index of hits) ring(context, place(index), 5, 2, colour("hot-ring"));
    if (selected >= 0) ring(context, place(selected), 8, 3, colour("focus"));
    if (here < 0) return;
    const group = cloud.group(here);
    for (let index = 0; group >= 0 && index < cloud.length; index += 1) {
      if (cloud.group(index) === group) ring(context, place(index), 4, 1, colour("text"));
    }
    ring(context, place(here), 6, 2, colour("text"));
  };
  const draw = () => {
    drawAll();
    drawMarks();
  };
  const within = () => {
    [left, top] = [left, top].map((at) => Math.max(0, Math.min(1 - 1 / scale, at))) as [number, number];
    draw();
  };
  // Its size and its colours are the page's.
  const resized = typeof ResizeObserver === "undefined" ? null : new ResizeObserver(draw);
  resized?.observe(stage);
  // The page may be away while its theme changes: what follows once it is back.
  const themed = new MutationObserver(() => requestAnimationFrame(draw));
  themed.observe(root, { attributes: true, attributeFilter: ["data-saelab-theme"] });
  signal.addEventListener("abort", () => {
    resized?.disconnect();
    themed.disconnect();
  });

  return {
    show(points, alone) {
      [cloud, only] = [points, alone];
      draw();
    },
    mark(here, selected) {
      marked = [here, selected];
      drawMarks();
    },
    found(points) {
      hits = points;
      drawMarks();
    },
    zoom(factor, px = stage.clientWidth / 2, py = stage.clientHeight / 2) {
      const { width, height } = size();
      const [x, y] = [(px - EDGE) / (width || 1), (py - EDGE) / (height || 1)];
      const next = factor ? Math.max(1, Math.min(MOST_ZOOM, scale * factor)) : 1;
      [left, top] = [left + x / scale - x / next, top + y / scale - y / next];
      scale = next;
      stage.dataset.zoom = scale.toFixed(2);
      within();
    },
    pan(right, down) {
      const { width, height } = size();
      left -= right / (width || 1) / scale;
      top -= down / (height || 1) / scale;
      within();
    },
    reveal(point) {
      if (!cloud || point < 0) return;
      const [x, y] = [cloud.x(point), cloud.y(point)];
      const seen = [x - left, y - top].every((at) => at >= 0 && at <= 1 / scale);
      if (seen) return;
      [left, top] = [x - 0.5 / scale, y - 0.5 / scale];
      within();
    },
    nearest(event) {
      if (!cloud) return -1;
      const box = stage.getBoundingClientRect();
      const { width, height } = size();
      const [x, y] = [event.clientX - box.left - EDGE, event.clientY - box.top - EDGE];
      return cloud.nearest(left + x / (width || 1) / scale, top + y / (height || 1) / scale, width * scale, height * scale, REACH);
    },
  };
}

function shape(context: CanvasRenderingContext2D, kind: number, x: number, y: number, r: number): void {
  context.beginPath();
  if (kind === 0) context.arc(x, y, r, 0, 2 * Math.PI);
  else if (kind === 1) context.rect(x - r, y - r, 2 * r, 2 * r);
  else if (kind === 2) lines(context, [[x, y - 1.2 * r], [x + 1.2 * r, y + r], [x - 1.2 * r, y + r]]);
  else lines(context, [[x, y - 1.4 * r], [x + 1.4 * r, y], [x, y + 1.4 * r], [x - 1.4 * r, y]]);
  context.fill();
}

function lines(context: CanvasRenderingContext2D, corners: [number, number][]): void {
  corners.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.closePath();
}

function ring(context: CanvasRenderingContext2D, [x, y]: [number, number], r: number, width: number, colour: string): void {
  context.beginPath();
  context.arc(x, y, r, 0, 2 * Math.PI);
  context.lineWidth = width;
  context.strokeStyle = colour;
  context.stroke();
}
