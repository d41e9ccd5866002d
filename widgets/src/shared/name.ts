// What a feature is called: text that people wrote, so it is cut, set apart from what stands beside it, and whole on hovering.
import { h } from "./dom";

/** By number: the names of the features that are shown. */
export type Names = Record<string, string>;

const LONGEST = 60; // characters; a style may cut more
const MOST_TITLE = 10_000;

/** A name as an element, null where there is none. */
export function nameOf(name: string | undefined, longest = LONGEST): HTMLElement | null {
  if (!name) return null;
  const short = cut(name, longest);
  return h("bdi", { class: "saelab-name", title: [...name].slice(0, MOST_TITLE).join("") }, short);
}

/** A feature in words, for labels: ‘812 months’. */
export function inWords(feature: number, names: Names): string {
  const name = names[String(feature)];
  return name ? `${feature} ${cut(name, LONGEST)}` : String(feature);
}

/** A number, and the name behind it. */
export function numbered(feature: number, names: Names, longest?: number): HTMLElement[] {
  return [h("span", {}, String(feature)), nameOf(names[String(feature)], longest)].filter((part) => part !== null);
}

/** The beginning of a text in one line, no character torn from its marks. */
function cut(text: string, longest: number): string {
  const line = text.slice(0, 40 * longest).replace(/\s+/g, " ").trim();
  const letters = [...new Intl.Segmenter().segment(line)];
  return letters.length > longest ? `${line.slice(0, letters[longest - 1]!.index).trimEnd()}…` : line;
}
