// What Python sends. Arrays come as base64; nodes are numbers: features, errors, tokens, outputs, in this order.
import type { Names } from "../shared/name";

export interface View {
  /** How many of the four kinds. */
  counts: [number, number, number, number];
  layers: number;
  tokens: string[];
  outputs: string[];
  /** Probabilities of the outputs. */
  weights: number[];
  /** Layers that have a coder here. */
  offered: number[];
  /** Nodes and edges that were left out. */
  left: [number, number];
  /** (layer, position, number) of each node, signed 32 bit. */
  places: string;
  /** float32; NaN where there is none. */
  values: string;
  influence: string;
  /** Sum of the sizes of all that adds to a node, float32. */
  incoming: string;
  /** Of each edge, unsigned 32 bit. */
  sources: string;
  targets: string;
  /** float32 */
  effects: string;
}

export interface Group {
  name: string;
  nodes: number[];
}

export interface TestRow {
  target: number;
  predicted: number | null;
  frozen: number | null;
  total: number | null;
  responding: number | null;
  free: number | null;
}

export interface Test {
  sources: number[];
  name: string;
  rows: TestRow[];
  /** Largest difference of predicted and measured, as a share of the largest effect on the target. */
  error: number;
}

export interface Steered {
  node: number;
  strength: number | null;
  here: boolean;
  code: string;
  baseline: string;
  steered: string;
  /** (token, probability, probability with the edit) */
  next: [string, number, number][];
}

export type State = {
  view: View;
  node: number | null;
  edge: number[];
  selected: number[];
  pinned: number[];
  groups: Group[];
  nodes: number;
  edges: number;
  show: "graph" | "pinned";
  tests: Test[];
  steered: Steered | Record<string, never>;
  running: string;
  unable: string;
  names: Names;
  error: string;
};
