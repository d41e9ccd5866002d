// The points of a map, and which of them lies where.
import type { State } from "./types";

const FULL = 65535;
/** Sideways counts double on the way to the next point. */
const SIDEWAYS = 2;

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
    return this.best((dx, dy) => Math.hypot(dx * width, dy * height), x, y, most);
  }

  /** The point nearest to the middle. */
  middle(): number {
    return this.nearest(0.5, 0.5, 1, 1);
  }

  /** The nearest point from one in a direction, more that way than sideways if there is one; itself at the rim. */
  next(from: number, [right, down]: [number, number]): number {
    const cost = (least: number) => (dx: number, dy: number) => {
      const ahead = dx * right + dy * down;
      const aside = Math.abs(dx * down) + Math.abs(dy * right);
      return ahead > 0 && ahead >= least * aside ? ahead + SIDEWAYS * aside : Infinity;
    };
    const [x, y] = [this.x(from), this.y(from)];
    const found = this.best(cost(1), x, y, Infinity);
    if (found >= 0) return found;
    const aslant = this.best(cost(0), x, y, Infinity);
    return aslant < 0 ? from : aslant;
  }

  private best(cost: (dx: number, dy: number) => number, x: number, y: number, most: number): number {
    let [found, least] = [-1, most];
    for (let index = 0; index < this.length; index += 1) {
      const here = cost(this.x(index) - x, this.y(index) - y);
      if (here < least) [found, least] = [index, here];
    }
    return found;
  }
}

function bytes(text: string): ArrayBuffer {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer;
}
