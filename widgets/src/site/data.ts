// What `index.to_site` writes beside the page, and how it becomes what the inspector shows. Texts stand once in a table
// of a file, and activations without their zeros: else a thousand features would take three times the room.
import type { Bins } from "../shared/histogram";
import type { Context, FeatureView, Note, Row } from "../inspector/types";

/** document, position, peak, tokens as numbers of the table, [place, activation, ...] where it fires, places left out; of a picture itself, and where places lie on it */
type PackedContext = [number, number, number, number[], number[], number[], picture?: string, area?: Context["area"]];

type PackedFeature = Omit<FeatureView, "groups" | "histogram" | "d_sae" | "tokens_seen" | "tokens" | "names"> & {
  histogram: number[];
  groups: [string, PackedContext[]][];
  note: Note;
};

/** A file of features: those from `first` on. */
export interface Chunk {
  first: number;
  texts: string[];
  features: PackedFeature[];
}

/** All features in few words: a column per figure, `tokens` as numbers of the table. */
export interface Listing {
  d_sae: number;
  tokens_seen: number;
  /** features in a file */
  size: number;
  overview: Bins;
  /** live features, the most readable first */
  best: number[];
  density: number[];
  count: number[];
  mean: number[];
  max: number[];
  /** null: it was written without the coder */
  norm: number[] | null;
  texts: string[];
  tokens: number[][];
  /** a feature's label, or the first explanation of an explained one, and all else that is said of it */
  labels: Record<string, string>;
  explained: number[];
  said: Record<string, string>;
}

export function row(list: Listing, feature: number): Row {
  return {
    feature,
    density: list.density[feature] ?? 0,
    max: list.max[feature] ?? 0,
    tokens: tokens(list, feature).slice(0, 5),
    label: list.labels[feature] ?? "",
  };
}

export const tokens = (list: Listing, feature: number): string[] =>
  (list.tokens[feature] ?? []).map((number) => list.texts[number] ?? "");

/** A feature's label, else what it fires on most, else an explanation: as everywhere where a name stands alone. */
const called = (list: Listing, feature: number, unit?: string): string => {
  const most = tokens(list, feature).slice(0, 4).map((token) => token.trim() || token);
  const tops = unit === "place" && most.length ? `at ${most.join(", ")}` : most.join(" ");
  const said = list.labels[feature] ?? "";
  return list.explained.includes(feature) ? tops || said : said || tops;
};

export function opened(list: Listing, chunk: Chunk, feature: number): { view: FeatureView; note: Note } | undefined {
  const packed = chunk.features[feature - chunk.first];
  if (!packed) return undefined;
  const { note, histogram, groups, ...rest } = packed;
  const top = packed.max || 1;
  const edges = Array.from({ length: histogram.length + 1 }, (_, i) => (top * i) / histogram.length);
  const view: FeatureView = {
    ...rest,
    d_sae: list.d_sae,
    tokens_seen: list.tokens_seen,
    histogram: { counts: histogram, edges },
    tokens: tokens(list, feature),
    names: Object.fromEntries([feature, ...packed.neighbours.map(([i]) => i), ...packed.cofiring.map(([i]) => i)].map((i) => [i, called(list, i, packed.unit)])),
    groups: groups.map(([label, contexts]) => ({ label, contexts: contexts.map((one) => context(chunk.texts, one)) })),
  };
  return { view, note };
}

function context(texts: string[], [document, position, peak, ids, fires, out, picture, area]: PackedContext): Context {
  const values: (number | null)[] = ids.map(() => 0);
  for (let i = 0; i < fires.length; i += 2) values[fires[i] as number] = fires[i + 1] as number;
  for (const place of out) values[place] = null;
  return { document, position, peak, tokens: ids.map((id) => texts[id] ?? ""), values, picture, area };
}
