// A text as a strip of tokens with a value each: seen as colour and underline, read as a number, one of them chosen.
import { h } from "./dom";
import { makeTabStop, rovingFocus } from "./keyboard";
import { number } from "./format";
import { copiesAsText, tokenNodes, tokenLabel } from "./tokens";

export interface StripToken {
  text: string;
  /** null: excluded by the token mask. Negative values are drawn cold and dashed. */
  value: number | null;
  /** What the value means here, for the label; its number otherwise. */
  note?: string;
  /** More for the eye: "new" (only on this side), "same"... as data-mark. */
  mark?: string;
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
  const chooses = options.choose !== undefined;
  const element = h("div", {
    class: options.numbers ? "saelab-strip saelab-strip-numbers" : "saelab-strip",
    role: chooses ? "listbox" : "group",
    "aria-label": options.label,
    dir: "auto", // right-to-left text runs as it should
    tabindex: chooses ? null : 0,
  });
  let selected: number | null = null;
  const spans = () => [...element.querySelectorAll<HTMLElement>("[data-cell]")];
  const positionOf = (target: EventTarget | null) => {
    const cell = (target as HTMLElement).closest<HTMLElement>("[data-cell]");
    return cell ? Number(cell.dataset.position) : null;
  };
  const mark = () => {
    const cells = spans();
    if (!chooses) return;
    for (const cell of cells) cell.setAttribute("aria-selected", String(Number(cell.dataset.position) === selected));
    const stop = cells.find((cell) => Number(cell.dataset.position) === selected) ?? cells[0];
    if (stop) makeTabStop(element, stop);
  };
  if (chooses) {
    const choose = (target: EventTarget | null) => {
      const position = positionOf(target);
      if (position !== null) options.choose?.(position);
    };
    element.addEventListener("click", (event) => choose(event.target), { signal });
    element.addEventListener(
      "keydown",
      (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        choose(event.target);
      },
      { signal },
    );
    rovingFocus(element, signal);
  }
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
      const focused = element.contains((element.getRootNode() as Document | ShadowRoot).activeElement);
      const sizes = tokens.map((token) => Math.abs(token.value ?? 0));
      const scale = options.scale ?? Math.max(...sizes, Number.MIN_VALUE);
      // One row: the arrows run through the text.
      element.replaceChildren(h("span", { "data-row": true, role: "presentation" }, ...tokens.map((t, i) => span(t, i, scale, options))));
      mark();
      if (focused) element.querySelector<HTMLElement>('[tabindex="0"]')?.focus({ preventScroll: true });
    },
    select(position) {
      selected = position;
      mark();
    },
  };
}

function span(token: StripToken, position: number, scale: number, options: StripOptions): HTMLElement {
  const { value } = token;
  const meaning = token.note ?? (value === null ? "excluded by the token mask" : number(value));
  const label = `${tokenLabel(token.text)} ${meaning}`;
  const cell = h(
    "span",
    {
      class: "saelab-token",
      role: options.choose ? "option" : null,
      tabindex: options.choose ? -1 : null,
      "data-cell": true,
      "data-position": position,
      "data-text": token.text,
      "data-mark": token.mark,
      "data-state": value === null ? "excluded" : value > 0 ? "active" : value < 0 ? "negative" : "silent",
      title: label,
      "aria-label": options.choose ? label : null,
    },
    ...tokenNodes(token.text, "gap"),
    options.numbers && value ? h("small", { "aria-hidden": "true" }, number(value)) : null,
  );
  if (value) cell.style.setProperty("--saelab-share", Math.min(1, Math.abs(value) / scale).toFixed(3));
  return cell;
}
