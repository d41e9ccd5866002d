// Element builders. Text always goes in as text: markup in a token is shown, never run, and what is not seen is marked.
import { readable, visible } from "./visible";

export type Attributes = Record<string, string | number | boolean | null | undefined>;
type Child = Node | string | null | undefined;

/** Make an HTML element; `false`, null and undefined attributes are left out, strings become text nodes. */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  return fill(document.createElement(tag), attributes, children);
}

/** A button that does something on a click. */
export function button(text: string, act: () => void, signal: AbortSignal, attributes: Attributes = {}): HTMLButtonElement {
  const made = h("button", { type: "button", ...attributes }, text);
  made.addEventListener("click", () => act(), { signal });
  return made;
}

/** A select of [value, name] pairs. */
export function choice(label: string, options: readonly [string, string][], chose: (value: string) => void, signal: AbortSignal): HTMLSelectElement {
  const made = h("select", { "aria-label": label }, ...options.map(([value, name]) => h("option", { value }, name)));
  made.addEventListener("change", () => chose(made.value), { signal });
  return made;
}

/** The focused element of the page, or of the shadow root, if it is inside of `root`. */
export function focusedIn(root: Element): HTMLElement | null {
  const active = (root.getRootNode() as Document | ShadowRoot).activeElement;
  return root.contains(active) ? (active as HTMLElement) : null;
}

/** Run this when what stands in the page now has been painted, unless `signal` aborts before. */
export function afterPaint(run: () => void, signal: AbortSignal): void {
  requestAnimationFrame(() => setTimeout(() => signal.aborted || run()));
}

const SVG = "http://www.w3.org/2000/svg";

/** Make an SVG element, with the same rules as `h`. */
export function svg<K extends keyof SVGElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: Child[]
): SVGElementTagNameMap[K] {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill<E extends Element>(element: E, attributes: Attributes, children: Child[]): E {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    element.setAttribute(name, value === true ? "" : READ.test(name) ? visible(String(value)) : String(value));
  }
  for (const child of children) {
    if (child !== null && child !== undefined) element.append(typeof child === "string" ? readable(child) : child);
  }
  return element;
}

const READ = /^(title|placeholder|aria-)/; // attributes that a person reads, or hears

/** Put a text in place of what an element holds. */
export function setText(element: Element, text: string): void {
  element.textContent = readable(text);
}
