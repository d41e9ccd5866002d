// Some figures side by side, each with its name above it.
import { h } from "./dom";

export interface Figure {
  name: string;
  value: Node | string;
  /** What the figure is, for who asks. */
  meaning?: string;
}

export function figures(items: Figure[], name: string): HTMLElement {
  const parts = items.map(({ name, value, meaning }) => h("div", { title: meaning }, h("dt", {}, name), h("dd", {}, value)));
  return h("dl", { class: `saelab-figure-row ${name}` }, ...parts);
}
