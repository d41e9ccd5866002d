// What would not be seen, or would change how the rest is seen, has a mark in its place.

// In code points. `sae_lab/results.py` has the same list and the same marks: the script-free forms read alike.
const HIDDEN =
  "0000-001F 007F-00A0 00AD 034F 061C 115F-1160 17B4-17B5 180B-180F 200B-200F 2028-202E 2060-206F 3164 D800-DFFF " +
  "FE00-FE0F FEFF FFA0 FFF0-FFFB 1BCA0-1BCA3 1D173-1D17A E0000-E0FFF";
const GLYPHS: Record<string, string> = { "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };

/** A class of a regular expression (with the flag u) that matches one such character. */
export const HIDDEN_CLASS = `[${HIDDEN.replace(/[0-9A-F]+/g, "\\u{$&}").replaceAll(" ", "")}]`;
// A mark of an emoji's form, or a join of two, behind an emoji: the only hidden ones that draw something.
const DRAWN = "(?!(?<=[\\u203c\\u2049\\u2122-\\u2bff\\u3030\\u303d\\u3297\\u3299\\u{1f000}-\\u{1faff}]\\ufe0f?)[\\ufe0f\\u200d])";
const ALL = new RegExp(DRAWN + HIDDEN_CLASS, "gu");
const BUT_LAYOUT = new RegExp(`${DRAWN}(?![\\n\\t])${HIDDEN_CLASS}`, "gu");

export function markOf(character: string): string {
  const code = character.codePointAt(0) ?? 0;
  return GLYPHS[character] ?? `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

/** A text in one line. */
export const visible = (text: string) => text.replace(ALL, markOf);

/** A text whose lines and tabs stay as they are. */
export const readable = (text: string) => text.replace(BUT_LAYOUT, markOf);
