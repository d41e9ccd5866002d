// Three canvases: edges, nodes and names of the axes, and above them what is marked. Shapes are paths in pixels of the
// whole, made anew for another part, size or zoom; a move draws the same paths at another place. The edges are many, and
// a browser without a graphics card takes long to paint them: while the graph moves, their canvas is moved as it is.
import { h } from "../shared/dom";
import { best, next } from "../shared/places";
import type { Movable, Way } from "../shared/stage";
import { visible } from "../shared/visible";
import type { Graph, Kind, Part } from "./graph";
import { type Layout, layout } from "./layout";

export const GUTTER = { left: 34, right: 14, top: 74, bottom: 34 };
const REACH = 11; // pixels from the pointer to a node
const NEAR = 5; // and to an edge
const MOST_ZOOM = 40;
const NAMED = 2.5; // zoom from which on all features have their name
const FONT = "11px system-ui, sans-serif";
const TOKEN = 16; // letters of a token on an axis, at most
/** From which part of its target's sum an edge is drawn how wide and how strong. */
export const WEIGHTS: [number, number, number][] = [
  [0, 0.7, 0.22],
  [0.03, 1.2, 0.42],
  [0.12, 2.2, 0.75],
];
export const DASH = [5, 3];
const REST_MS = 100; // without a move, after which the edges are painted anew
const FAR = 0.2; // of the stage, and after such a move
const MANY = 800; // edges, above which all are drawn fainter

export interface Marks {
  /** Under the pointer or the keys, the open one, the open edge by number; -1: none. */
  here: number;
  open: number;
  edge: number;
  selected: number[];
  pinned: Set<number>;
  found: Set<number>;
  label(node: number): string;
}

export interface Plot extends Movable {
  show(graph: Graph, part: Part): void;
  mark(marks: Marks): void;
  /** Move a node into sight. */
  reveal(node: number): void;
  /** The node, and the edge, under the pointer; -1: none. */
  nodeAt(event: MouseEvent): number;
  edgeAt(event: MouseEvent): number;
  /** The next node from one in a direction; from none, the one with most influence. */
  next(from: number, way: Way): number;
  layout(): Layout | null;
}

export function plot(stage: HTMLElement, root: HTMLElement, signal: AbortSignal): Plot {
  const [below, middle, above] = [0, 1, 2].map(() => h("canvas", { "aria-hidden": "true" })) as [HTMLCanvasElement, HTMLCanvasElement, HTMLCanvasElement];
  stage.append(h("div", { class: "saelab-graph_lab-under" }, below), middle, above);
  let graph: Graph | null = null;
  let part: Part = { nodes: [], edges: [], has: new Uint8Array(0) };
  let at: Layout | null = null;
  let marks: Marks | null = null;
  let [scale, left, top] = [1, 0, 0]; // left and top: pixels by which the whole is moved
  let paths: { edges: { path: Path2D; negative: boolean; width: number; alpha: number }[]; nodes: Map<Kind, Path2D> } | null = null;
  let colours: Record<string, string> = {};
  let [width, height] = [0, 0];
  const fits = new Map<string, string>(); // tokens as they fit below their columns

  const x = (node: number) => GUTTER.left + left + scale * (at?.x[node] ?? 0);
  const y = (node: number) => GUTTER.top + top + scale * (at?.y[node] ?? 0);
  const grown = () => Math.min(2, Math.sqrt(scale));
  const radius = (node: number) => (at?.radius[node] ?? 0) * grown();

  const sized = (canvas: HTMLCanvasElement): CanvasRenderingContext2D | null => {
    if (!width) return null; // not on show: its size will be observed
    const ratio = window.devicePixelRatio || 1;
    const [w, tall] = [Math.round(width * ratio), Math.round(height * ratio)];
    const context = canvas.getContext("2d");
    if (canvas.width !== w || canvas.height !== tall) [canvas.width, canvas.height] = [w, tall];
    context?.setTransform(ratio, 0, 0, ratio, 0, 0);
    context?.clearRect(0, 0, width, height);
    return context;
  };
  const within = (context: CanvasRenderingContext2D) => {
    context.save();
    context.beginPath();
    context.rect(GUTTER.left, 0, width - GUTTER.left, height - GUTTER.bottom + 2);
    context.clip();
  };
  const moved = (context: CanvasRenderingContext2D) => {
    context.translate(GUTTER.left + left, GUTTER.top + top);
    context.scale(scale, scale);
  };

  const build = () => {
    if (!graph || !at) return;
    const edges = [false, true].flatMap((negative) => WEIGHTS.map(([, wide, alpha]) => ({ path: new Path2D(), negative, width: wide, alpha })));
    for (const edge of part.edges) {
      const bucket = weightOf(graph.portion(edge)) + (graph.effect(edge) < 0 ? WEIGHTS.length : 0);
      const [from, to] = [graph.source(edge), graph.target(edge)];
      edges[bucket]?.path.moveTo(at.x[from] ?? 0, at.y[from] ?? 0);
      edges[bucket]?.path.lineTo(at.x[to] ?? 0, at.y[to] ?? 0);
    }
    const nodes = new Map<Kind, Path2D>();
    for (const node of part.nodes) {
      const kind = graph.kind(node);
      const path = nodes.get(kind) ?? new Path2D();
      nodes.set(kind, path);
      shape(path, kind, at.x[node] ?? 0, at.y[node] ?? 0, radius(node) / scale);
    }
    edges.sort((a, b) => a.width - b.width);
    const thin = Math.min(1, Math.sqrt(MANY / Math.max(1, part.edges.length)));
    for (const bucket of edges) bucket.alpha *= thin;
    fits.clear();
    paths = { edges, nodes };
  };

  let painted: [number, number] = [0, 0]; // where the edges were painted last
  let later: ReturnType<typeof setTimeout> | undefined;
  const drawEdges = () => {
    clearTimeout(later);
    below.style.transform = "";
    painted = [left, top];
    const context = sized(below);
    if (!context || !paths) return;
    context.save();
    moved(context);
    for (const { path, negative, width: wide, alpha } of paths.edges) {
      context.globalAlpha = alpha;
      context.lineWidth = wide / scale;
      context.strokeStyle = colours[negative ? "minus" : "plus"] ?? "";
      context.setLineDash(negative ? DASH.map((length) => length / scale) : []);
      context.stroke(path);
    }
    context.restore();
    context.globalAlpha = 1;
  };

  const drawNodes = () => {
    const context = sized(middle);
    if (!context || !graph || !at || !paths) return;
    axes(context);
    within(context);
    moved(context);
    context.lineWidth = 1.5 / scale;
    for (const [kind, path] of paths.nodes) {
      context.fillStyle = colours[kind === "error" ? "bg" : kind] ?? "";
      context.strokeStyle = colours[kind] ?? "";
      context.fill(path);
      if (kind === "error") context.stroke(path);
    }
    context.restore();
    outputs(context);
  };

  /** Layers at the left, tokens below, a line between columns. */
  const axes = (context: CanvasRenderingContext2D) => {
    if (!graph || !at) return;
    context.font = FONT;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(13 / (at.rowHeight * scale));
    const floor = height - GUTTER.bottom;
    for (let row = 0; row <= graph.view.layers + 1; row += 1) {
      const here = GUTTER.top + top + scale * at.rowAt(row);
      if (here < 8 || here > floor) continue;
      context.fillStyle = colours.line ?? "";
      context.fillRect(GUTTER.left, here, width, 0.5);
      const text = row === 0 ? "tok" : row > graph.view.layers ? "out" : (row - 1) % every === 0 ? String(row - 1) : "";
      context.fillStyle = colours.dim ?? "";
      if (text) context.fillText(text, GUTTER.left - 7, here);
    }
    context.textAlign = "center";
    for (const { position, left: from, right: to } of at.columns) {
      const [begin, end] = [from, to].map((side) => GUTTER.left + left + scale * side) as [number, number];
      if (end < GUTTER.left || begin > width) continue;
      context.fillStyle = colours.line ?? "";
      if (position > 0 && begin > GUTTER.left) context.fillRect(begin, GUTTER.top - 10, 0.5, floor - GUTTER.top + 14);
      context.fillStyle = colours.text ?? "";
      const room = end - begin - 4;
      const key = `${position} ${Math.round(room)}`;
      const text = fits.get(key) ?? fitted(context, token(graph.view.tokens[position] ?? ""), room);
      fits.set(key, text);
      context.fillText(text, Math.max(GUTTER.left + 12, (begin + end) / 2), floor + 17);
    }
  };

  /** Names of the outputs, aslant above them. */
  const outputs = (context: CanvasRenderingContext2D) => {
    if (!graph || !at) return;
    context.font = FONT;
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillStyle = colours.text ?? "";
    for (const node of part.nodes) {
      if (graph.kind(node) !== "logit") continue;
      context.save();
      context.translate(x(node) + 1, y(node) - 9);
      context.rotate(Math.PI / 5);
      const chance = graph.chance(node);
      context.fillText(`${cut(token(graph.output(node)), TOKEN)} ${chance < 1 ? chance.toFixed(2).replace(/^0/, "") : ""}`.trim(), 0, 0);
      context.restore();
    }
  };

  const drawMarks = () => {
    const context = sized(above);
    if (!context || !graph || !at || !marks) return;
    const { here, open, edge, selected, pinned, found } = marks;
    const focus = part.has[here] ? here : part.has[open] ? open : -1;
    below.style.opacity = focus >= 0 || edge >= 0 ? "0.3" : "1";
    within(context);
    for (const one of part.edges) {
      const [from, to] = [graph.source(one), graph.target(one)];
      if (one !== edge && from !== focus && to !== focus) continue;
      const [, wide] = WEIGHTS[weightOf(graph.portion(one))] ?? [0, 1];
      context.lineWidth = one === edge ? 4 : wide + 0.3;
      context.strokeStyle = colours[graph.effect(one) < 0 ? "minus" : "plus"] ?? "";
      context.setLineDash(graph.effect(one) < 0 ? DASH : []);
      context.beginPath();
      context.moveTo(x(from), y(from));
      context.lineTo(x(to), y(to));
      context.stroke();
    }
    const ring = (node: number, more: number, wide: number, colour: string, dash: number[] = []) => {
      if (!part.has[node]) return;
      context.beginPath();
      context.setLineDash(dash);
      context.arc(x(node), y(node), radius(node) + more, 0, 2 * Math.PI);
      context.lineWidth = wide;
      context.strokeStyle = colours[colour] ?? "";
      context.stroke();
    };
    for (const node of found) ring(node, 5, 1.5, "found");
    for (const node of pinned) ring(node, 3, 2, "text");
    for (const node of selected) ring(node, 6, 1.5, "focus", [3, 2]);
    if (open >= 0) ring(open, 4, 3, "focus");
    if (here >= 0) ring(here, 3, 1.5, "text");
    context.setLineDash([]);
    const inSight = (node: number) => graph?.kind(node) === "feature" && x(node) > 0 && x(node) < width && y(node) > 0 && y(node) < height;
    names(context, [...new Set([here, open, ...pinned, ...(scale >= NAMED ? part.nodes.filter(inSight) : [])])]);
    context.restore();
  };

  /** Names beside nodes, none over another. */
  const names = (context: CanvasRenderingContext2D, wanted: number[]) => {
    const taken: [number, number, number, number][] = [];
    context.font = `600 ${FONT}`;
    context.textBaseline = "middle";
    context.textAlign = "left";
    context.lineWidth = 3.5;
    context.lineJoin = "round";
    for (const node of wanted) {
      const text = part.has[node] && graph?.kind(node) !== "logit" && marks ? cut(visible(marks.label(node)), 28) : "";
      if (!text) continue;
      const long = context.measureText(text).width;
      const right = x(node) + radius(node) + 6;
      const begin = right + long > width - 4 ? x(node) - radius(node) - 6 - long : right;
      const box: [number, number, number, number] = [begin, y(node) - 7, begin + long, y(node) + 7];
      if (taken.some(([a, b, c, d]) => box[0] < c && a < box[2] && box[1] < d && b < box[3])) continue;
      taken.push(box);
      context.strokeStyle = colours.bg ?? "";
      context.fillStyle = colours.text ?? "";
      context.strokeText(text, begin, y(node));
      context.fillText(text, begin, y(node));
    }
  };

  let due = 0;
  let whole = false;
  const draw = () => {
    drawEdges();
    drawNodes();
    drawMarks();
  };
  const move = () => {
    const [right, down] = [left - painted[0], top - painted[1]];
    if (Math.abs(right) > FAR * width || Math.abs(down) > FAR * height) return drawEdges();
    below.style.transform = `translate(${right}px, ${down}px)`;
    clearTimeout(later);
    later = setTimeout(drawEdges, REST_MS);
  };
  /** all: with the edges painted anew. */
  const soon = (all: boolean) => {
    whole ||= all;
    due ||= requestAnimationFrame(() => {
      if (whole) drawEdges();
      else move();
      [due, whole] = [0, false];
      drawNodes();
      drawMarks();
    });
  };
  const keep = () => {
    // A part of the graph stays in sight.
    const [wide, tall] = [scale * (at?.width ?? 0), scale * (at?.height ?? 0)];
    const [room, rise] = [width - GUTTER.left - GUTTER.right, height - GUTTER.top - GUTTER.bottom];
    left = Math.max(Math.min(0, room - wide) - room / 2, Math.min(room / 2, left));
    top = Math.max(Math.min(0, rise - tall) - rise / 2, Math.min(rise / 2, top));
  };
  const arrange = () => {
    [width, height] = [stage.clientWidth, stage.clientHeight];
    if (!graph || !width) return;
    colours = coloursOf(root);
    at = layout(graph, part, width - GUTTER.left - GUTTER.right, height - GUTTER.top - GUTTER.bottom);
    keep();
    build();
    draw();
  };
  const resized = typeof ResizeObserver === "undefined" ? null : new ResizeObserver(arrange);
  resized?.observe(stage);
  // The page may be away while its theme changes: what follows once it is back.
  const themed = new MutationObserver(() => requestAnimationFrame(arrange));
  themed.observe(root, { attributes: true, attributeFilter: ["data-saelab-theme"] });
  signal.addEventListener("abort", () => {
    resized?.disconnect();
    themed.disconnect();
    cancelAnimationFrame(due);
    clearTimeout(later);
  });

  const pointed = (event: MouseEvent): [number, number] => {
    const box = stage.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const places = {
    get length() {
      return part.nodes.length;
    },
    x: (index: number) => x(part.nodes[index] ?? -1),
    y: (index: number) => y(part.nodes[index] ?? -1),
  };
  return {
    show(given, shown) {
      [graph, part] = [given, shown];
      arrange();
    },
    mark(given) {
      marks = given;
      drawMarks();
    },
    zoom(factor, px = width / 2, py = height / 2) {
      const bigger = factor ? Math.max(1, Math.min(MOST_ZOOM, scale * factor)) : 1;
      const by = bigger / scale;
      left = px - GUTTER.left - by * (px - GUTTER.left - left);
      top = py - GUTTER.top - by * (py - GUTTER.top - top);
      scale = bigger;
      if (scale === 1) [left, top] = [0, 0];
      stage.dataset.zoom = scale.toFixed(2);
      keep();
      build();
      soon(true);
    },
    pan(right, down) {
      left += right;
      top += down;
      keep();
      soon(false);
    },
    reveal(node) {
      if (!part.has[node]) return;
      const [px, py] = [x(node), y(node)];
      if (px > GUTTER.left && px < width - GUTTER.right && py > 8 && py < height - GUTTER.bottom) return;
      left += width / 2 - px;
      top += height / 2 - py;
      soon(true);
    },
    nodeAt(event) {
      const [px, py] = pointed(event);
      const found = best(places, (dx, dy) => Math.hypot(dx, dy), px, py, REACH);
      return found < 0 ? -1 : (part.nodes[found] ?? -1);
    },
    edgeAt(event) {
      const [px, py] = pointed(event);
      let [found, least] = [-1, NEAR];
      for (const edge of part.edges) {
        const [from, to] = [graph?.source(edge) ?? 0, graph?.target(edge) ?? 0];
        const away = distance(px, py, x(from), y(from), x(to), y(to));
        if (away < least) [found, least] = [edge, away];
      }
      return found;
    },
    next(from, way) {
      const index = part.nodes.indexOf(from);
      if (index >= 0) return part.nodes[next(places, index, way)] ?? from;
      const most = (a: number, b: number) => ((graph?.influence[b] || 0) > (graph?.influence[a] || 0) ? b : a);
      return part.nodes.length ? part.nodes.reduce(most) : -1;
    },
    layout: () => at,
  };
}

/** The colours of a widget's style sheet, by name. */
export function coloursOf(root: HTMLElement): Record<string, string> {
  const style = getComputedStyle(root);
  const shared = ["bg", "text", "dim", "line", "focus"].map((name) => [name, `--saelab-${name}`]);
  const own = ["plus", "minus", "feature", "error", "token", "logit", "found"].map((name) => [name, `--saelab-graph_lab-${name}`]);
  return Object.fromEntries([...shared, ...own].map(([name, from]) => [name, style.getPropertyValue(from!).trim() || "#777"]));
}

export const weightOf = (portion: number): number => WEIGHTS.reduce((found, [least], i) => (portion >= least ? i : found), 0);

/** A disc for a feature, a hollow diamond for an error, a square for a token, a triangle for an output. */
export function shape(path: Path2D | CanvasRenderingContext2D, kind: Kind, x: number, y: number, r: number): void {
  if (kind === "feature") {
    path.moveTo(x + r, y);
    path.arc(x, y, r, 0, 2 * Math.PI);
  } else if (kind === "token") path.rect(x - r, y - r, 2 * r, 2 * r);
  else {
    const corners = kind === "error" ? [[x, y - 1.2 * r], [x + 1.2 * r, y], [x, y + 1.2 * r], [x - 1.2 * r, y]] : [[x, y - 1.2 * r], [x + 1.2 * r, y + r], [x - 1.2 * r, y + r]];
    corners.forEach(([a = 0, b = 0], i) => (i ? path.lineTo(a, b) : path.moveTo(a, b)));
    path.closePath();
  }
}

/** A token on an axis: what is not seen has a mark, and a space at its begin is left out. */
export const token = (text: string): string => visible(text.replace(/^ (?=\S)/, "")).replace(/^ +$/, (spaces) => "·".repeat(spaces.length)) || "∅";

const CUTS = new Map<string, string>(); // each frame asks for the same ones

/** The beginning of a text, no character torn from its marks. */
export function cut(text: string, longest: number): string {
  const key = `${longest} ${text.slice(0, 40 * longest)}`;
  let found = CUTS.get(key);
  if (found === undefined) {
    const letters = [...new Intl.Segmenter().segment(text.slice(0, 40 * longest))];
    found = letters.length > longest ? `${text.slice(0, letters[longest - 1]!.index).trimEnd()}…` : text;
    if (CUTS.size > 5000) CUTS.clear();
    CUTS.set(key, found);
  }
  return found;
}

/** As much of a text as there is room for; "" where that is no letter. */
function fitted(context: CanvasRenderingContext2D, text: string, room: number): string {
  for (let letters = TOKEN; letters > 1; letters -= 1) {
    const short = cut(text, letters);
    if (context.measureText(short).width <= room) return short;
  }
  return "";
}

function distance(px: number, py: number, ax: number, ay: number, bx: number, by: number): number {
  const [dx, dy] = [bx - ax, by - ay];
  const along = Math.max(0, Math.min(1, ((px - ax) * dx + (py - ay) * dy) / (dx * dx + dy * dy || 1)));
  return Math.hypot(px - ax - along * dx, py - ay - along * dy);
}
