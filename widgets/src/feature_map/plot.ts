// Two canvases: all points below, drawn once; what is marked above, drawn at each move.
import { h } from "../shared/dom";
import type { Cloud } from "./cloud";

const EDGE = 10; // around the points
const REACH = 12; // pixels from the pointer to a point
const SHAPES = 4;
const HUES = 6;

export interface Plot {
  show(cloud: Cloud): void;
  /** Ring the point under the pointer, and the selected one; -1: none. */
  mark(here: number, selected: number): void;
  /** The point under the pointer. */
  nearest(event: MouseEvent): number;
}

export function plot(stage: HTMLElement, root: HTMLElement, signal: AbortSignal): Plot {
  const [below, above] = [h("canvas", { "aria-hidden": "true" }), h("canvas", { "aria-hidden": "true" })];
  stage.append(below, above);
  let cloud: Cloud | null = null;
  let marked: [number, number] = [-1, -1];

  const size = () => ({ width: stage.clientWidth - 2 * EDGE, height: stage.clientHeight - 2 * EDGE });
  const place = (index: number): [number, number] => {
    const { width, height } = size();
    return [EDGE + (cloud?.x(index) ?? 0) * width, EDGE + (cloud?.y(index) ?? 0) * height];
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
    const radius = Math.max(1, Math.min(3, 150 / Math.sqrt(cloud.length)));
    const hues = Array.from({ length: HUES }, (_, i) => colour(`group-${i}`));
    const none = colour("dim");
    context.globalAlpha = 0.75;
    for (let index = 0; index < cloud.length; index += 1) {
      const group = cloud.group(index);
      const [x, y] = place(index);
      context.fillStyle = group < 0 ? none : (hues[group % HUES] ?? none);
      if (group < 0) context.fillRect(x - radius / 2, y - radius / 2, radius, radius);
      else shape(context, group % SHAPES, x, y, 1.5 * radius);
    }
  };
  const drawMarks = () => {
    const context = clean(above);
    if (!context || !cloud) return;
    const [here, selected] = marked;
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
    show(points) {
      cloud = points;
      draw();
    },
    mark(here, selected) {
      marked = [here, selected];
      drawMarks();
    },
    nearest(event) {
      if (!cloud) return -1;
      const { left, top } = stage.getBoundingClientRect();
      const { width, height } = size();
      const [x, y] = [event.clientX - left - EDGE, event.clientY - top - EDGE];
      return cloud.nearest(x / (width || 1), y / (height || 1), width, height, REACH);
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
