// Element builders. Text always goes in as text: markup in a token is shown, never run, and what is not seen is marked.
import { readable, visible } from "./visible";

type Attributes = Record<string, string | number | boolean | null | undefined>;
type Child = Node | string | null | undefined;

/** Make an HTML element; `false`, null and undefined attributes are left out, strings become text nodes. */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  return fill(document.createElement(tag), attributes, children);
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
