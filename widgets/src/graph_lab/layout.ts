// Where nodes stand: tokens from left to right, layers from below, the outputs on top at the right.
import { type Graph, type Part } from "./graph";

const SPACING = 20; // pixels between nodes side by side, where there is room
const OUTPUTS = 27; // and between outputs, whose names stand aslant above them
const [LEAST, MOST] = [2, 6.5]; // radius

export interface Column {
  position: number;
  left: number;
  right: number;
}

export interface Layout {
  /** The nodes that are shown. */
  nodes: number[];
  /** By node, in pixels of the whole at zoom 1. */
  x: Float32Array;
  y: Float32Array;
  radius: Float32Array;
  columns: Column[];
  /** Height of a row, and of which row the middle is where. */
  rowHeight: number;
  rowAt(row: number): number;
  width: number;
  height: number;
}

export function layout(graph: Graph, part: Part, width: number, height: number): Layout {
  const rows = graph.view.layers + 2;
  const rowHeight = height / rows;
  const rowAt = (row: number) => height - (row + 0.5) * rowHeight;
  const cells = new Map<string, number[]>();
  const widest = graph.view.tokens.map(() => 1);
  for (const node of part.nodes) {
    const [row, position] = [graph.row(node), graph.position(node)];
    const key = `${row} ${position}`;
    const cell = cells.get(key) ?? [];
    cell.push(node);
    cells.set(key, cell);
    if (graph.kind(node) !== "logit") widest[position] = Math.max(widest[position] ?? 1, cell.length);
  }
  const total = widest.reduce((sum, count) => sum + count + 0.6, 0);
  const unit = width / Math.max(1, total);
  let left = 0;
  const columns = widest.map((count, position) => {
    const column = { position, left, right: left + (count + 0.6) * unit };
    left = column.right;
    return column;
  });
  const spacing = Math.min(unit, SPACING);
  const size = Math.max(LEAST, Math.min(MOST, 0.4 * spacing, 0.42 * rowHeight));
  const most = Math.max(1e-12, ...part.nodes.map((node) => graph.influence[node] || 0));
  const found: Layout = {
    nodes: part.nodes,
    x: new Float32Array(graph.length).fill(NaN),
    y: new Float32Array(graph.length).fill(NaN),
    radius: new Float32Array(graph.length),
    columns, rowHeight, rowAt, width, height,
  };
  for (const cell of cells.values()) {
    const first = cell[0] ?? 0;
    const output = graph.kind(first) === "logit";
    const column = columns[graph.position(first)] ?? { left: 0, right: width };
    const step = output ? Math.min(OUTPUTS, width / cell.length) : spacing;
    const middle = (column.left + column.right) / 2;
    const begin = output ? Math.min(width - 8 - step * (cell.length - 1), middle) : middle - ((cell.length - 1) * step) / 2;
    cell.forEach((node, i) => {
      found.x[node] = begin + i * step;
      found.y[node] = rowAt(graph.row(node));
      const share = output ? 1 : Math.sqrt((graph.influence[node] || 0) / most);
      found.radius[node] = size * (0.6 + 0.4 * share);
    });
  }
  return found;
}
