// The graph as a drawing of lines and shapes that other programs edit.
import { svg } from "../shared/dom";
import { visible } from "../shared/visible";
import type { Graph, Part } from "./graph";
import { cut, DASH, GUTTER, token, WEIGHTS, weightOf } from "./plot";
import type { Layout } from "./layout";

export function picture(graph: Graph, part: Part, at: Layout, colour: (name: string) => string, label: (node: number) => string, pinned: Set<number>): string {
  const [width, height] = [at.width + GUTTER.left + GUTTER.right, at.height + GUTTER.top + GUTTER.bottom];
  const x = (node: number) => (GUTTER.left + at.x[node]!).toFixed(1);
  const y = (node: number) => (GUTTER.top + at.y[node]!).toFixed(1);
  const font = { "font-family": "system-ui, sans-serif", "font-size": 11 };
  const lines = part.edges.map((edge) => {
    const [, wide, alpha] = WEIGHTS[weightOf(graph.portion(edge))]!;
    const [from, to] = [graph.source(edge), graph.target(edge)];
    const minus = graph.effect(edge) < 0;
    return svg("line", { x1: x(from), y1: y(from), x2: x(to), y2: y(to), stroke: colour(minus ? "minus" : "plus"), "stroke-width": wide, "stroke-opacity": alpha, "stroke-dasharray": minus ? DASH.join(" ") : null });
  });
  const nodes = part.nodes.map((node) => {
    const kind = graph.kind(node);
    const r = at.radius[node]!;
    const [cx, cy] = [GUTTER.left + at.x[node]!, GUTTER.top + at.y[node]!];
    const look = { fill: colour(kind === "error" ? "bg" : kind), stroke: pinned.has(node) ? colour("text") : colour(kind), "stroke-width": pinned.has(node) ? 2 : 1 };
    const title = svg("title", {}, visible(`${graph.title(node)} ${label(node)}`.trim()));
    if (kind === "feature") return svg("circle", { cx: x(node), cy: y(node), r, ...look }, title);
    if (kind === "token") return svg("rect", { x: cx - r, y: cy - r, width: 2 * r, height: 2 * r, ...look }, title);
    const corners = kind === "error" ? [[0, -1.2], [1.2, 0], [0, 1.2], [-1.2, 0]] : [[0, -1.2], [1.2, 1], [-1.2, 1]];
    return svg("polygon", { points: corners.map(([dx, dy]) => `${(cx + dx! * r).toFixed(1)},${(cy + dy! * r).toFixed(1)}`).join(" "), ...look }, title);
  });
  const texts = [
    ...at.columns.map(({ position, left, right }) => svg("text", { x: GUTTER.left + (left + right) / 2, y: height - 12, "text-anchor": "middle", fill: colour("text") }, cut(token(graph.view.tokens[position] ?? ""), Math.max(2, Math.floor((right - left) / 6))))),
    ...Array.from({ length: graph.view.layers }, (_, layer) => layer)
      .filter((layer) => layer % Math.ceil(13 / at.rowHeight) === 0)
      .map((layer) => svg("text", { x: GUTTER.left - 7, y: GUTTER.top + at.rowAt(layer + 1) + 4, "text-anchor": "end", fill: colour("dim") }, String(layer))),
    ...part.nodes.filter((node) => graph.kind(node) === "logit").map((node) => svg("text", { transform: `translate(${x(node)} ${Number(y(node)) - 9}) rotate(36)`, "text-anchor": "end", fill: colour("text") }, cut(token(graph.output(node)), 16))),
    ...[...pinned].filter((node) => part.has[node] && graph.kind(node) !== "logit").map((node) => svg("text", { x: Number(x(node)) + 12, y: Number(y(node)) + 4, "font-weight": 600, fill: colour("text") }, cut(visible(label(node)), 28))),
  ];
  const whole = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` }, svg("rect", { width, height, fill: colour("bg") }), svg("g", {}, ...lines), svg("g", {}, ...nodes), svg("g", font, ...texts));
  return new XMLSerializer().serializeToString(whole);
}
