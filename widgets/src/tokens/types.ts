// What Python sends; see sae_lab/widgets/tokens.py and token_views.py.

import type { Names } from "../shared/name";
import type { Prompt } from "../shared/prompt";

export type StripValue = "strongest" | "active" | "feature" | "loss";
export type Sort = "activation" | "effect";

export interface Text {
  labels: string[];
  /** null: left out by the coder's mask. */
  strongest: (number | null)[];
  active: (number | null)[];
  site: string;
}

export interface Row {
  feature: number;
  value: number;
  scaled: number | null;
  effect?: number;
  promoted?: [string, number][];
}

export interface Detail {
  position: number;
  label: string;
  /** How many features are active; null: the token is left out. */
  active: number | null;
  effects: boolean;
  note: string;
  rows: Row[];
  target?: string;
  target_is?: "next" | "likeliest" | "chosen";
  parts?: { features: number; error: number; bias: number; rest: number; logit: number };
}

export type State = {
  prompt: Prompt;
  coder: string;
  coders: { name: string; site: string; d_sae: number }[];
  token: number | null;
  feature: number | null;
  strip: StripValue;
  sort: Sort;
  target: string;
  text: Text | Record<string, never>;
  losses: (number | null)[];
  fires: (number | null)[];
  names: Names;
  detail: Detail | Record<string, never>;
  error: string;
};

/** What the screen may set. */
export type Wish = Partial<Pick<State, "coder" | "token" | "feature" | "strip" | "sort" | "target">>;
