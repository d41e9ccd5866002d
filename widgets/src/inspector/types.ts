// What Python sends; the shapes mirror FeatureView.to_dict() and FeatureInspector's traits.
import type { Bins } from "../shared/histogram";
import type { Strip } from "../shared/tokens";

export interface Context extends Strip {
  document: number;
  position: number;
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
}

export interface Row {
  feature: number;
  density: number;
  max: number;
  tokens: string[];
}

export type Sort = "best" | "density" | "max";

export type State = {
  feature: number;
  query: string;
  sort: Sort;
  results: Row[];
  results_note: string;
  view: FeatureView;
  error: string;
};
