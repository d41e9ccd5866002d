// What Python and the view of a training say to each other.

export type Training =
  | "waiting" | "running" | "pausing" | "paused" | "stopping" | "finishing" | "done" | "stopped" | "interrupted" | "failed";

export interface Status {
  state: Training;
  /** Of a failed one. */
  why: string;
  step: number;
  steps: number;
  tokens: number;
  passes: number;
  tokens_per_second: number | null;
  seconds_left: number | null;
  /** What the user should know of this kernel. */
  note: string;
}

/** One coder: what may be changed of it. */
export interface Line {
  label: string;
  /** null: its family has nothing that says how sparse it is. */
  sparsity_name: string | null;
  sparsity: number | null;
  lr: number;
  over: boolean;
}

export interface Change {
  coder: string;
  step: number;
  what: string;
  old: number;
  new: number;
}

export const MEASURES = [
  "loss", "fvu", "l0", "dead", "threshold", "cosine", "lr", "fvu_held_out", "l0_held_out", "ce_delta", "coefficient",
] as const;
export type Measure = (typeof MEASURES)[number];
/** What is drawn in the chart of another measure. */
export const HELD_OUT: Partial<Record<Measure, Measure>> = { fvu: "fvu_held_out", l0: "l0_held_out" };

/** Of one coder; null where a measure is not known. */
export type Curve = { step: number[] } & Record<Measure, (number | null)[]>;
export type Curves = Record<string, Curve>;

/** The points of each coder from one on: `[at, [[step, loss, ...], ...]]`. */
export type Grown = Record<string, [number, (number | null)[][]]>;

export type State = {
  status: Status;
  lines: Line[];
  changes: Change[];
  curves: Curves;
  can_start: boolean;
  error: string;
};

/** Put what a message brings to the curves, in place. */
export function grow(curves: Curves, grown: Grown): void {
  for (const [label, [at, points]] of Object.entries(grown)) {
    const curve = (curves[label] ??= empty());
    curve.step.splice(at);
    for (const measure of MEASURES) curve[measure].splice(at);
    for (const [step, ...values] of points) {
      curve.step.push(step ?? 0);
      MEASURES.forEach((measure, i) => curve[measure].push(values[i] ?? null));
    }
  }
}

/** A copy: what Python sent as a trait is not to change by itself. */
export function copy(curves: Curves): Curves {
  return Object.fromEntries(
    Object.entries(curves).map(([label, curve]) => [
      label,
      Object.fromEntries(Object.entries(curve).map(([name, values]) => [name, [...values]])) as Curve,
    ]),
  );
}

function empty(): Curve {
  return Object.fromEntries(["step", ...MEASURES].map((name) => [name, []])) as unknown as Curve;
}
