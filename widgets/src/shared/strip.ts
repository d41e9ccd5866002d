// A text as a strip of tokens with a value each: seen as colour and underline, read as a number, one of them chosen.
import { focusedIn, h } from "./dom";
import { choosing } from "./keyboard";
import { number } from "./format";
import { copiesAsText, tokenCell, tokenLabel } from "./tokens";

export interface StripToken {
  text: string;
  /** null: excluded by the token mask. Negative values are drawn cold and dashed. */
  value: number | null;
  /** What the value means here, for the label; its number otherwise. */
  note?: string;
  /** More for the eye: "new" (only on this side), "same"... as data-mark. */
  mark?: string;
  /** Of a chat: "user", "assistant"..., "template", as data-role. */
  role?: string;
}

export interface StripOptions {
  label: string;
  /** The value shown at full strength; the largest there is where it is left out. */
  scale?: number;
  /** Small numbers below the tokens. */
  numbers?: boolean;
  choose?: (position: number) => void;
  hover?: (position: number | null) => void;
}

export interface TokenStrip {
  element: HTMLElement;
  show(tokens: StripToken[]): void;
  /** Mark a token as the chosen one; null: none. */
  select(position: number | null): void;
}

export function tokenStrip(options: StripOptions, signal: AbortSignal): TokenStrip {
  const element = h("div", {
    class: options.numbers ? "saelab-strip saelab-strip-numbers" : "saelab-strip",
    role: options.choose ? "listbox" : "group",
    "aria-label": options.label,
    dir: "auto", // right-to-left text runs as it should
    tabindex: options.choose ? null : 0,
  });
  const chosen = options.choose && choosing(element, "position", options.choose, signal);
  const positionOf = (target: EventTarget | null) => {
    const cell = (target as HTMLElement).closest<HTMLElement>("[data-cell]");
    return cell ? Number(cell.dataset.position) : null;
  };
  if (options.hover) {
    const hover = options.hover;
    element.addEventListener("pointerover", (event) => hover(positionOf(event.target)), { signal });
    element.addEventListener("pointerleave", () => hover(null), { signal });
    element.addEventListener("focusin", (event) => hover(positionOf(event.target)), { signal });
  }
  copiesAsText(element, signal);
  return {
    element,
    show(tokens) {
      const focused = focusedIn(element);
      const sizes = tokens.map((token) => Math.abs(token.value ?? 0));
      const scale = options.scale ?? Math.max(...sizes, Number.MIN_VALUE);
      // One row: the arrows run through the text.
      element.replaceChildren(h("span", { "data-row": true, role: "presentation" }, ...tokens.map((t, i) => span(t, i, scale, options))));
      chosen?.mark();
      if (focused) element.querySelector<HTMLElement>('[tabindex="0"]')?.focus({ preventScroll: true });
    },
    select: (position) => chosen?.select(position),
  };
}

function span(token: StripToken, position: number, scale: number, options: StripOptions): HTMLElement {
  const { value } = token;
  const label = `${tokenLabel(token.text)} ${token.note ?? (value === null ? "excluded by the token mask" : number(value))}`;
  const chosen = options.choose ? { role: "option", tabindex: -1, "aria-label": label } : {};
  const cell = tokenCell(token.text, position, value, scale, { "data-mark": token.mark, "data-role": token.role, title: label, ...chosen });
  if (options.numbers && value) cell.append(h("small", { "aria-hidden": "true" }, number(value)));
  return cell;
}
