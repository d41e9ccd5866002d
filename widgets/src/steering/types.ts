// What Python sends; the shapes mirror sae_lab/widgets/steering_views.py.
import type { Names } from "../shared/name";
import type { EditRow } from "../shared/editlist";
import type { Prompt } from "../shared/prompt";

export interface SliderRow {
  key: number;
  on: boolean;
  features: number[];
  /** The name of the vector that it has in place of features; "": none. */
  vector: string;
  /** In units of f_scale. */
  strength: number;
  scales: number[];
  /** Further settings of the edit, in words. */
  more: string;
}

export interface TextToken {
  text: string;
  mark: "prompt" | "new" | "";
  /** Whose message of a chat it belongs to; "template": the chat template's own. */
  role?: string;
}

export interface Measure {
  name: string;
  /** The name, with what its feature is called. */
  label?: string;
  /** Measures of one group are drawn on one scale: one, or a pair, with and without the edits. */
  group: string;
  values: (number | null)[];
}

export interface Comparison {
  baseline?: TextToken[];
  steered?: TextToken[];
  measures?: Measure[];
  perplexity?: (number | null)[];
  mean_kl?: number | null;
  next?: [string, number | null, number | null][];
  /** Why there is none. */
  note?: string;
}

export interface Dose {
  feature?: number;
  target?: string[];
  prompt?: string;
  series?: { name: string; strength: number[]; log_odds: (number | null)[]; cost: (number | null)[] }[];
}

export type Side = "baseline" | "steered";

export type State = {
  prompt: Prompt;
  temperature: number;
  seed: number;
  max_new_tokens: number;
  target: string[];
  autorun: boolean;
  sliders: SliderRow[];
  others: EditRow[];
  names: Names;
  selected: number | null;
  baseline: string;
  steered: string;
  comparison: Comparison;
  dose: Dose;
  version: number;
  shown: number;
  running: boolean;
  measuring: boolean;
  d_sae: number;
  error: string;
};
