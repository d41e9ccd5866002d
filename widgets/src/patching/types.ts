// What Python sends.
import type { Names } from "../shared/name";

/** Tokens of both texts side by side; null where the other one has a token more. */
export interface Sides {
  pairs: [string | null, string | null][];
  lengths: [number, number];
  /** The answers' tokens. */
  right: string[];
  wrong: string[];
}

export interface View {
  prompt: string;
  source: string;
  measure: string;
  right: string;
  wrong: string;
  /** What the metric is called. */
  metric: string;
  /** [kind, name, the answers it asks for...] of each metric on offer. */
  measures: string[][];
  /** The metric for the prompt and for the source. */
  base: number;
  goal: number;
  kinds: string[];
  layers: number[];
  positions: number[];
  /** [prompt's, source's] at each position. */
  tokens: [string, string][];
  /** kind, layer, position. */
  estimate: number[][][];
  /** Keys of the sites whose features can be listed. */
  coders: string[];
  sides: Sides;
}

/** Features that carry a cell's effect, as shares of the metric's change. */
export interface Features {
  features: [number, number][];
  others: number;
  active: number;
  error: number;
}

/** kind, layer, position, value. */
export type Patch = [string, number, number, number];

export type State = {
  view: View;
  truth: Patch[];
  kind: string;
  cell: number[];
  /** The chosen one of the open cell. */
  feature: number | null;
  features: Record<string, Features>;
  /** By "site number". */
  names: Names;
  progress: number[];
  error: string;
};

/** Values by cell, for one state of the traits. */
export class Values {
  private true = new Map<string, number>();

  constructor(
    private view: View,
    truth: Patch[],
  ) {
    for (const [kind, layer, position, value] of truth) this.true.set(`${kind} ${layer} ${position}`, value);
  }

  patched(kind: string, layer: number, position: number): number | null {
    return this.true.get(`${kind} ${layer} ${position}`) ?? null;
  }

  estimate(kind: string, layer: number, position: number): number | null {
    const { kinds, layers, positions, estimate } = this.view;
    return estimate[kinds.indexOf(kind)]?.[layers.indexOf(layer)]?.[positions.indexOf(position)] ?? null;
  }
}
