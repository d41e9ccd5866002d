// The pinned subgraph: pinned nodes and groups as boxes, the edges between them summed.
import { h, svg } from "../shared/dom";
import { number } from "../shared/format";
import type { Names } from "../shared/name";
import { visible } from "../shared/visible";
import type { Graph } from "./graph";
import { cut, DASH, token } from "./plot";
import type { Group } from "./types";

export interface Item {
  /** Of a group; "" of a single node. */
  name: string;
  nodes: number[];
}

export interface Sum {
  from: number;
  to: number;
  weight: number;
}

/** Groups, then the pinned nodes that are in none. */
export function items(pinned: number[], groups: Group[]): Item[] {
  const inside = new Set(groups.flatMap((group) => group.nodes));
  return [...groups, ...pinned.filter((node) => !inside.has(node)).map((node) => ({ name: "", nodes: [node] }))];
}

/** The sums of the edges between items, the largest first. */
export function sums(graph: Graph, all: Item[]): Sum[] {
  const of = new Map(all.flatMap((item, i) => item.nodes.map((node) => [node, i] as [number, number])));
  const found = new Map<string, Sum>();
  for (let edge = 0; edge < graph.sources.length; edge += 1) {
    const [from, to] = [of.get(graph.source(edge)), of.get(graph.target(edge))];
    if (from === undefined || to === undefined || from === to) continue;
    const sum = found.get(`${from} ${to}`) ?? { from, to, weight: 0 };
    found.set(`${from} ${to}`, sum);
    sum.weight += graph.effect(edge);
  }
  return [...found.values()].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}

/** Two short lines: what it is called, and where it stands. */
export function words(graph: Graph, item: Item, names: Names): [string, string] {
  const [node = 0] = item.nodes;
  if (item.name) return [item.name, `${item.nodes.length} nodes`];
  const kind = graph.kind(node);
  if (kind === "logit") return [token(graph.output(node)), graph.chance(node) < 1 ? `output, ${graph.chance(node).toFixed(2)}` : "output"];
  const at = `${token(graph.view.tokens[graph.position(node)] ?? "")} (${graph.position(node)})`;
  if (kind === "token") return [at, "token"];
  if (kind === "error") return [`error of layer ${graph.layer(node)}`, `at ${cut(at, 16)}`];
  const place = `layer ${graph.layer(node)}, ${cut(at, 14)}`;
  const name = names[String(node)];
  return name ? [name, `${graph.feature(node)}, ${place}`] : [`feature ${graph.feature(node)}`, place];
}

const [BOX, TALL, GAP, EDGE] = [150, 40, 34, 16];

export function pinnedView(graph: Graph, all: Item[], names: Names, width: number, open: (node: number) => void, signal: AbortSignal): Element {
  if (all.length === 0) return h("p", { class: "saelab-graph_lab-none saelab-dim" }, "Nothing is pinned yet: open a node and pin it, or select several and group them.");
  const height = (item: Item) => item.nodes.reduce((sum, node) => sum + graph.row(node), 0) / item.nodes.length;
  const across = (item: Item) => item.nodes.reduce((sum, node) => sum + graph.position(node), 0) / item.nodes.length;
  const perRow = Math.max(1, Math.floor((width - 2 * EDGE + 12) / (BOX + 12)));
  const rows: number[][] = [];
  const order = all.map((_, i) => i).sort((a, b) => height(all[b]!) - height(all[a]!) || across(all[a]!) - across(all[b]!));
  for (const i of order) {
    const row = rows.at(-1);
    const same = row && Math.abs(height(all[row[0]!]!) - height(all[i]!)) < 0.5 && row.length < perRow;
    if (same) row.push(i);
    else rows.push([i]);
  }
  const tall = 2 * EDGE + rows.length * TALL + (rows.length - 1) * GAP;
  const places: [number, number][] = [];
  const reach = Math.max(1, graph.view.tokens.length - 1);
  rows.forEach((row, r) => {
    row.sort((a, b) => across(all[a]!) - across(all[b]!));
    let end = EDGE - 12;
    row.forEach((i, n) => {
      const wanted = EDGE + ((width - 2 * EDGE - BOX) * across(all[i]!)) / reach;
      const last = width - EDGE - BOX - (row.length - 1 - n) * (BOX + 12);
      const x = Math.max(EDGE, Math.min(last, Math.max(end + 12, wanted)));
      end = x + BOX;
      places[i] = [x, EDGE + r * (TALL + GAP)];
    });
  });
  const edges = sums(graph, all);
  const most = Math.max(1e-12, ...edges.map(({ weight }) => Math.abs(weight)));
  const labels: Element[] = [];
  const lines = edges.map(({ from, to, weight }) => {
    const [[ax, ay], [bx, by]] = [places[from]!, places[to]!];
    const [x1, y1, x2, y2] = [ax + BOX / 2, ay, bx + BOX / 2, by + TALL];
    labels.push(svg("text", { x: x1 + 0.3 * (x2 - x1), y: y1 + 0.3 * (y2 - y1), "text-anchor": "middle" }, number(weight)));
    const sign = weight < 0 ? "minus" : "plus";
    return svg("line", { x1, y1, x2, y2, "data-sign": sign, "stroke-width": (1 + (4 * Math.abs(weight)) / most).toFixed(1), "stroke-dasharray": weight < 0 ? DASH.join(" ") : null });
  });
  const boxes = all.map((item, i) => {
    const [first, second] = words(graph, item, names);
    const [x, y] = places[i]!;
    const kind = item.name ? "group" : graph.kind(item.nodes[0]!);
    const whole = item.name ? `group ${item.name}: ${item.nodes.map((node) => graph.title(node)).join("; ")}` : `${first}, ${second}`;
    const box = svg(
      "g",
      { role: "button", tabindex: 0, "aria-label": whole, "data-kind": kind, transform: `translate(${x.toFixed(1)} ${y})` },
      svg("title", {}, visible(whole)),
      svg("rect", { width: BOX, height: TALL, rx: kind === "token" ? 0 : 8 }),
      svg("text", { x: BOX / 2, y: 17, "text-anchor": "middle", class: "saelab-graph_lab-first" }, cut(visible(first), 19)),
      svg("text", { x: BOX / 2, y: 32, "text-anchor": "middle" }, cut(visible(second), 24)),
    );
    const choose = () => open(item.nodes[0]!);
    box.addEventListener("click", choose, { signal });
    box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose();
    }, { signal });
    return box;
  });
  return svg(
    "svg",
    { class: "saelab-graph_lab-pinned", viewBox: `0 0 ${width} ${tall}`, width, height: tall, role: "group", "aria-label": "Pinned subgraph" },
    svg("g", {}, ...lines),
    svg("g", { class: "saelab-graph_lab-sums" }, ...labels),
    ...boxes,
  );
}
