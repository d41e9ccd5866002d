// Tokens as text: white space made visible, activation shown by colour AND by the weight of an underline.
import { type Attributes, h } from "./dom";
import { number } from "./format";
import { HIDDEN_CLASS, markOf } from "./visible";

// Of the spaces, only those that an eye would miss: a single one between letters is seen.
const UNSEEN = new RegExp(`(^ +| {2,}| +$|${HIDDEN_CLASS})`, "u");

const CHIP_LETTERS = 32;

/** How a single leading space is shown: as a gap (running text) or as a dot (a token on its own). */
export type LeadingSpace = "gap" | "dot";

/** A token as nodes: text as it is, white space and invisible characters as dim glyphs. */
export function tokenNodes(token: string, leading: LeadingSpace): Node[] {
  if (token === "") return [glyph("∅")];
  const nodes: Node[] = [];
  let rest = token;
  if (leading === "gap" && /^ [^\s]/.test(token)) {
    nodes.push(document.createTextNode(" "));
    rest = token.slice(1);
  }
  for (const [part, unseen] of split(rest)) {
    nodes.push(unseen ? glyph(part) : document.createTextNode(part));
  }
  return nodes;
}

/** A token in one line of plain text, for labels: quoted, white space as glyphs. */
export function tokenLabel(token: string): string {
  const parts = split(token).map(([part]) => part);
  return `“${parts.join("")}”`;
}

/** Pieces of a token in order: text to draw, and whether it stands for what would not be seen. */
function split(token: string): [string, boolean][] {
  // With one capturing group, every odd piece is a match.
  const pieces = token.split(UNSEEN).map((part, i): [string, boolean] => {
    return i % 2 === 1 ? [[...part].map(glyphOf).join(""), true] : [part, false];
  });
  return pieces.filter(([part]) => part !== "");
}

/** A token on its own, as in a list of top tokens; of a very long one the beginning, the whole on hovering. */
export function tokenChip(token: string): HTMLElement {
  const letters = [...token];
  const long = letters.length > CHIP_LETTERS;
  const shown = long ? `${letters.slice(0, CHIP_LETTERS - 1).join("")}…` : token;
  return h("span", { class: "saelab-chip", title: long ? token : null }, ...tokenNodes(shown, "dot"));
}

function glyph(text: string): HTMLElement {
  return h("span", { class: "saelab-glyph" }, text);
}

function glyphOf(character: string): string {
  return character === " " ? "·" : markOf(character);
}

/** What a token's value means in words; null is a token the mask leaves out. */
export function valueText(value: number | null): string {
  if (value === null) return "excluded by the token mask";
  return value === 0 ? "silent" : number(value);
}

export interface Strip {
  tokens: string[];
  /** null: excluded by the token mask; 0: silent. */
  values: (number | null)[];
  /** Index of the token with the largest value. */
  peak: number;
}

/** A token within a text, for `rovingFocus`. `value`: null where the token mask leaves it out; `scale`: at full strength. */
export function tokenCell(text: string, position: number, value: number | null, scale: number, more: Attributes): HTMLElement {
  const state = value === null ? "excluded" : value > 0 ? "active" : value < 0 ? "negative" : "silent";
  const attributes = { class: "saelab-token", "data-cell": true, "data-position": position, "data-text": text, "data-state": state };
  const cell = h("span", { ...attributes, ...more }, ...tokenNodes(text, "gap"));
  if (value) cell.style.setProperty("--saelab-share", Math.min(1, scale > 0 ? Math.abs(value) / scale : 1).toFixed(3));
  return cell;
}

/** One grid cell per token, in order; the peak is the row's home cell. */
export function tokenSpans(strip: Strip, scale: number): HTMLElement[] {
  return strip.tokens.map((token, position) => {
    const value = strip.values[position] ?? null;
    const peak = position === strip.peak;
    const label = `${tokenLabel(token)} ${valueText(value)}${peak ? ", peak" : ""}`;
    return tokenCell(token, position, value, scale, { role: "gridcell", tabindex: -1, "data-home": peak, title: label, "aria-label": label });
  });
}

/** What is copied from `root` is the text of the tokens, not the glyphs that stand for white space. */
export function copiesAsText(root: HTMLElement, signal: AbortSignal): void {
  root.addEventListener(
    "copy",
    (event) => {
      const selection = document.getSelection();
      if (!selection || selection.isCollapsed || !event.clipboardData) return;
      const spans = [...root.querySelectorAll<HTMLElement>("[data-text]")];
      const range = selection.getRangeAt(0);
      const text = spans.filter((span) => range.intersectsNode(span)).map((span) => span.dataset.text ?? "");
      if (text.length === 0) return;
      event.clipboardData.setData("text/plain", text.join(""));
      event.preventDefault();
    },
    { signal },
  );
}
