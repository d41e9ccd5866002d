// Points on a plane: which is nearest, and which comes next in a direction.

/** Sideways counts double on the way to the next point. */
const SIDEWAYS = 2;

export interface Places {
  /** How many; points are the numbers below. */
  length: number;
  x(index: number): number;
  y(index: number): number;
}

/** The point of least cost, by its distance to the right and down of a place; -1 where none costs less than `most`. */
export function best(places: Places, cost: (dx: number, dy: number) => number, x: number, y: number, most: number): number {
  let [found, least] = [-1, most];
  for (let index = 0; index < places.length; index += 1) {
    const here = cost(places.x(index) - x, places.y(index) - y);
    if (here < least) [found, least] = [index, here];
  }
  return found;
}

/** The nearest point from one in a direction, more that way than sideways if there is one; itself at the rim. */
export function next(places: Places, from: number, [right, down]: [number, number]): number {
  const cost = (least: number) => (dx: number, dy: number) => {
    const ahead = dx * right + dy * down;
    const aside = Math.abs(dx * down) + Math.abs(dy * right);
    return ahead > 0 && ahead >= least * aside ? ahead + SIDEWAYS * aside : Infinity;
  };
  const [x, y] = [places.x(from), places.y(from)];
  const found = best(places, cost(1), x, y, Infinity);
  if (found >= 0) return found;
  const aslant = best(places, cost(0), x, y, Infinity);
  return aslant < 0 ? from : aslant;
}
