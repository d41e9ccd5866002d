// What Python sends; the shapes mirror FeatureView.to_dict() and FeatureInspector's traits.
import type { Bins } from "../shared/histogram";
import type { Names } from "../shared/name";
import type { Strip } from "../shared/tokens";

export interface Context extends Strip {
  document: number;
  position: number;
  /** of a network that is no language model: the item with heat, as a data address */
  picture?: string;
  /** where places lie on it: place of the first cell, rows, columns, and pixels left of the cells, of earlier places */
  area?: [number, number, number, number];
}

export interface Group {
  label: string;
  contexts: Context[];
}

export interface FeatureView {
  feature: number;
  d_sae: number;
  density: number;
  count: number;
  tokens_seen: number;
  mean: number;
  max: number;
  f_scale: number;
  histogram: Bins;
  groups: Group[];
  promoted: [string, number][];
  suppressed: [string, number][];
  lens_note: string;
  neighbours: [number, number][];
  /** feature, Jaccard index, tokens on which both fire */
  cofiring: [number, number, number][];
  /** what others say of it: explainers, and labels that were loaded */
  explanations?: { text: string; source: string; scores: Record<string, number> }[];
  /** those it fires on most */
  tokens: string[];
  /** of it and of the features beside it */
  names: Names;
  /** what stands in a context: places of a network that is no language model */
  unit?: "token" | "place";
}

export interface Note {
  label: string;
  text: string;
}

export interface Scored extends Strip {
  feature: number;
}

type Kept = "feature" | "density" | "count" | "mean" | "max" | "f_scale" | "promoted" | "suppressed" | "lens_note";

export interface PairView {
  features: [number, number];
  cosine: number;
  both: number;
  only: [number, number];
  jaccard: number;
  view: Pick<FeatureView, Kept>;
  /** of the pinned one */
  name?: string;
  tokens: string[];
  tokens_here: string[];
}

export interface Row {
  feature: number;
  density: number;
  max: number;
  tokens: string[];
  label: string;
  /** Why a search found it. */
  why?: string;
}

export type Sort = "best" | "density" | "max" | "norm";

export type State = {
  feature: number;
  query: string;
  sort: Sort;
  results: Row[];
  results_note: string;
  view: FeatureView;
  note: Note;
  pinned: number | null;
  /** Empty: nothing is compared. */
  pair: PairView | Record<string, never>;
  overview: Bins;
  live: boolean;
  error: string;
};
