// The points of a map, and which of them lies where.
import { best, next } from "../shared/places";
import type { State } from "./types";

const FULL = 65535;

export class Cloud {
  readonly xy: Uint16Array;
  readonly features: Uint32Array;
  readonly groups: Int16Array;
  private places: Map<number, number>;

  constructor(model: { get<K extends keyof State>(name: K): State[K] }) {
    this.xy = new Uint16Array(bytes(model.get("points")));
    this.features = new Uint32Array(bytes(model.get("features")));
    this.groups = new Int16Array(bytes(model.get("groups")));
    this.places = new Map([...this.features].map((feature, index) => [feature, index]));
  }

  get length(): number {
    return this.features.length;
  }

  /** From 0 to 1, from the left and from the top. */
  x = (index: number): number => (this.xy[2 * index] ?? 0) / FULL;
  y = (index: number): number => (this.xy[2 * index + 1] ?? 0) / FULL;
  group = (index: number): number => this.groups[index] ?? -1;

  indexOf(feature: number): number {
    return this.places.get(feature) ?? -1;
  }

  nameOf(index: number): string {
    const group = this.group(index);
    return `Feature ${this.features[index]}${group >= 0 ? `, group ${group}` : ""}`;
  }

  /** The point nearest to a place, distances weighed per axis; -1 where none is within `most`. */
  nearest(x: number, y: number, width: number, height: number, most = Infinity): number {
    return best(this, (dx, dy) => Math.hypot(dx * width, dy * height), x, y, most);
  }

  /** The point nearest to the middle. */
  middle(): number {
    return this.nearest(0.5, 0.5, 1, 1);
  }

  /** The next point from one in a direction; itself at the rim. */
  next(from: number, way: [number, number]): number {
    return next(this, from, way);
  }
}

function bytes(text: string): ArrayBuffer {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer;
}
