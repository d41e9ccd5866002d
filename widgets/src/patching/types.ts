// What Python sends.
import type { Names } from "../shared/name";
import type { Prompt } from "../shared/prompt";

/** Tokens of both texts side by side; null where the other one has a token more. */
export interface Sides {
  pairs: [string | null, string | null][];
  lengths: [number, number];
  /** The answers' tokens. */
  right: string[];
  wrong: string[];
}

export interface View {
  prompt: Prompt;
  source: Prompt;
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
  /** Of a chat: whose message the prompt's token at each position belongs to, or "template". */
  roles: string[];
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

/** kind, layers, positions, value: of cells that were patched in one run. */
export type Joint = [string, number[], number[], number];

export type State = {
  view: View;
  truth: Patch[];
  joint: Joint[];
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
  private joint = new Map<string, number>();

  constructor(
    private view: View,
    truth: Patch[],
    joint: Joint[] = [],
  ) {
    for (const [kind, layers, positions, value] of joint) this.joint.set(JSON.stringify([kind, layers, positions]), value);
    for (const [kind, layer, position, value] of truth) this.true.set(`${kind} ${layer} ${position}`, value);
  }

  patched(kind: string, layer: number, position: number): number | null {
    return this.true.get(`${kind} ${layer} ${position}`) ?? null;
  }

  together(kind: string, layers: number[], positions: number[]): number | null {
    return this.joint.get(JSON.stringify([kind, layers, positions])) ?? null;
  }

  estimate(kind: string, layer: number, position: number): number | null {
    const { kinds, layers, positions, estimate } = this.view;
    return estimate[kinds.indexOf(kind)]?.[layers.indexOf(layer)]?.[positions.indexOf(position)] ?? null;
  }
}
