// What one types into the search box, over the page's own list: words, conditions, label:words.
import type { Sort } from "../inspector/types";
import type { Listing } from "./data";

const COLUMNS = "density|norm|max|mean|count";
const CONDITION = new RegExp(`(?:^|(?<=\\s))(${COLUMNS})\\s*(>=|<=|>|<)\\s*(\\S+)`, "gi");
const LABEL = /(?:^|(?<=\s))label:(?:"([^"]*)(?:"|$)|(\S*))/gi;

/** Live features that fit, in order. Error with the reason where the line cannot be read. */
export function found(list: Listing, line: string, sort: Sort): number[] {
  let features = list.best;
  let rest = line.replace(CONDITION, (_, column: string, sign: string, limit: string) => {
    const name = column.toLowerCase() as Exclude<Sort, "best"> | "mean" | "count";
    const values = columnOf(list, name);
    const value = Number(limit.replace(/%$/, "")) / (limit.endsWith("%") ? 100 : 1);
    if (Number.isNaN(value) || limit === "%") {
      throw new Error(`${name} is compared with a number, got “${limit}”: write for instance density>0.001 or density>0.1%`);
    }
    features = features.filter((i) => holds(values[i] ?? 0, sign, value));
    return " ";
  });
  rest = rest.replace(LABEL, (_, quoted?: string, plain?: string) => {
    const text = (quoted || plain || "").toLowerCase();
    features = features.filter((i) => [list.labels[i], list.said[i]].some((said) => said && said.toLowerCase().includes(text)));
    return " ";
  });
  const word = rest.trim().toLowerCase();
  if (word !== "") {
    const weights = list.texts.map((text) => weight(text.toLowerCase(), word));
    const scores = new Map<number, number>();
    for (const i of features) {
      const score = (list.tokens[i] ?? []).reduce((sum, number, rank) => sum + (weights[number] ?? 0) / (1 + rank), 0);
      const named = `${list.labels[i] ?? ""}\n${list.said[i] ?? ""}`.toLowerCase().includes(word) ? NAMED : 0;
      if (score + named > 0) scores.set(i, score + named);
    }
    features = [...scores.keys()].sort((a, b) => (scores.get(b) ?? 0) - (scores.get(a) ?? 0));
  }
  if (sort === "best") return features;
  const values = columnOf(list, sort);
  return [...features].sort((a, b) => (values[b] ?? 0) - (values[a] ?? 0));
}

const NAMED = 3; // above what the tokens alone can reach with one match: a person's word says more

const weight = (token: string, word: string): number => (!token.includes(word) ? 0 : token.trim() === word ? 2 : 1);

function columnOf(list: Listing, name: "density" | "norm" | "max" | "mean" | "count"): number[] {
  const values = list[name];
  if (values) return values;
  throw new Error("this page has no norms: it was written without the coder; write it again with the coder at hand");
}

function holds(value: number, sign: string, limit: number): boolean {
  return sign === ">" ? value > limit : sign === "<" ? value < limit : sign === ">=" ? value >= limit : value <= limit;
}
