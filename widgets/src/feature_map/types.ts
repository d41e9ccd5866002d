// What Python sends. Arrays come as base64: a hundred thousand points are a megabyte.

import type { Names } from "../shared/name";

export interface Group {
  group: number;
  /** A label, where colours stand for labels. */
  name: string;
  count: number;
}

export type State = {
  /** The selected feature. */
  feature: number | null;
  /** x and y of each point in turn, unsigned 16 bit, 0 to 65535 from the left and from the top. */
  points: string;
  /** Each point's feature, unsigned 32 bit. */
  features: string;
  /** Each point's group, signed 16 bit; -1: none. */
  groups: string;
  /** What the groups are. */
  note: string;
  colour: "groups" | "labels";
  /** The largest groups. */
  legend: Group[];
  /** What the selected feature is called. */
  names: Names;
  error: string;
};
