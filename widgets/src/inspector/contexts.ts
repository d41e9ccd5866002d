// Where the feature fires: one line per context, peaks under each other, as in a concordance.
import { afterPaint, focusedIn, h } from "../shared/dom";
import { integer, number } from "../shared/format";
import { makeTabStop, rovingFocus } from "../shared/keyboard";
import { copiesAsText, tokenLabel, tokenSpans } from "../shared/tokens";
import type { Context, FeatureView, Group } from "./types";

/** The token under the pointer or the keyboard focus. */
export interface Hovered {
  token: string;
  value: number | null;
}

/** stacked: one line each, peaks under each other; snippet: some words around the peak; full: all there is. */
export type Mode = "stacked" | "snippet" | "full";

export interface Contexts {
  element: HTMLElement;
  mode(mode: Mode): void;
  /** One more group below. */
  add(group: Group): void;
}

const SNIPPET = 8; // tokens on each side of the peak
const TILE_LINES = 5.5; // as high as a row of pictures

/** Whether an item is shown as a picture; no other address than one that holds it. */
export const isTile = (context: Context): boolean => context.picture?.startsWith("data:image/png;base64,") === true;

export function contexts(view: FeatureView, mode: Mode, hover: (token: Hovered | null) => void, signal: AbortSignal): Contexts {
  const shown = new Map<HTMLElement, Context>();
  const grid = h(
    "div",
    { class: "saelab-contexts", role: "grid", "aria-label": "Contexts, strongest first", "data-mode": mode, "data-unit": view.unit ?? "token" },
  );
  const [first, ...others] = view.groups.map((group) => rowgroup(group, view, shown));
  if (first) {
    grid.append(first.element);
    first.fill();
  }
  const home = grid.querySelector<HTMLElement>("[data-home]");
  if (home) makeTabStop(grid, home);
  // The strongest are on the screen at once: the lines below them are made when those have been painted.
  grid.append(...others.map(({ element }) => element));
  afterPaint(() => others.forEach(({ fill }) => fill()), signal);

  const tokenAt = (target: EventTarget | null, event?: Event): Hovered | null => {
    const cell = (target as HTMLElement).closest<HTMLElement>("[data-cell]");
    const context = cell && shown.get(cell.closest<HTMLElement>("[data-row]") as HTMLElement);
    if (!cell || !context) return null;
    const position = cell instanceof HTMLImageElement ? placeAt(cell, context, event) : Number(cell.dataset.position);
    return { token: context.tokens[position] ?? "", value: context.values[position] ?? null };
  };
  const focused = () => {
    const active = focusedIn(grid);
    return active && tokenAt(active);
  };
  grid.addEventListener("pointerover", (event) => hover(tokenAt(event.target, event) ?? focused()), { signal });
  if (home?.matches("img")) grid.addEventListener("pointermove", (event) => hover(tokenAt(event.target, event)), { signal });
  grid.addEventListener("pointerleave", () => hover(focused()), { signal });
  grid.addEventListener("focusin", (event) => hover(tokenAt(event.target)), { signal });
  grid.addEventListener("focusout", () => hover(null), { signal });
  grid.addEventListener("click", (event) => toggle(event.target), { signal });
  grid.addEventListener("keydown", (event) => event.key === "Enter" && toggle(event.target), { signal });
  rovingFocus(grid, signal, (cell) => {
    // A token far from the peak is cut off in the one-line form.
    if (!cell.matches("[data-home]")) rowOf(cell)?.classList.add("saelab-open");
  });
  copiesAsText(grid, signal);
  return {
    element: grid,
    mode(next) {
      grid.dataset.mode = next;
      for (const row of grid.querySelectorAll(".saelab-open")) row.classList.remove("saelab-open");
    },
    add(group) {
      const more = rowgroup(group, view, shown);
      grid.append(more.element);
      more.fill();
    },
  };
}

function rowOf(target: EventTarget | null): HTMLElement | null {
  return (target as HTMLElement).closest<HTMLElement>("[data-row]");
}

function toggle(target: EventTarget | null): void {
  const selection = document.getSelection();
  if (selection && !selection.isCollapsed) return; // the click ended a text selection
  rowOf(target)?.classList.toggle("saelab-open");
}

/** A group, which keeps room for its lines, and what makes them. */
function rowgroup(group: Group, view: FeatureView, shown: Map<HTMLElement, Context>): { element: HTMLElement; fill(): void } {
  const element = h(
    "div",
    { class: "saelab-group", role: "rowgroup", "aria-label": group.label, "aria-busy": "true" },
    h("div", { class: "saelab-group-label", "aria-hidden": "true" }, group.label),
  );
  const tiles = group.contexts.filter(isTile).length;
  element.style.setProperty("--saelab-lines", String(group.contexts.length - tiles + TILE_LINES * Math.ceil(tiles / 8)));
  const fill = () => {
    for (const context of group.contexts) {
      const row = line(context, view.max, view.unit === "place" ? "item" : "document");
      shown.set(row, context);
      element.append(row);
    }
    element.removeAttribute("aria-busy");
  };
  return { element, fill };
}

/** The token of the place under the pointer on a picture; of its peak without a pointer. */
function placeAt(picture: HTMLElement, context: Context, event?: Event): number {
  const [first, rows, columns, left] = context.area ?? [0, 0, 0, 0];
  if (!(event instanceof MouseEvent) || rows * columns === 0) return context.peak;
  const box = picture.getBoundingClientRect();
  const scale = box.width / (picture as HTMLImageElement).naturalWidth;
  const cell = (at: number, size: number, cells: number) => Math.max(0, Math.min(cells - 1, Math.floor((at / size) * cells)));
  const x = event.clientX - box.left - left * scale;
  const down = (cells: number) => cell(event.clientY - box.top, box.height, cells);
  const place = x < 0 ? down(first) : first + down(rows) * columns + cell(x, box.width - left * scale, columns);
  return place - (context.position - context.peak); // the tokens may begin at a later place
}

/** An item of a network that is no language model, as a picture. */
function tile(context: Context): HTMLElement {
  const value = number(context.values[context.peak]);
  const label = context.tokens[context.peak] ?? "";
  const place = `item ${integer(context.document)}, place ${label}`;
  return h(
    "div",
    { class: "saelab-tile", role: "row", "data-row": true, "aria-label": `${value}, ${place}`, title: place },
    h("div", { role: "gridcell" }, h("img", { src: context.picture ?? "", alt: place, "data-cell": true, "data-home": true, tabindex: -1 })),
    h("span", { class: "saelab-context-value", role: "rowheader" }, `${value} at ${label}`),
  );
}

function line(context: Context, scale: number, item: string): HTMLElement {
  if (isTile(context)) return tile(context);
  const cells = tokenSpans(context, scale);
  for (const [i, cell] of cells.entries()) if (Math.abs(i - context.peak) > SNIPPET) cell.dataset.far = "";
  const value = number(context.values[context.peak]);
  const place = `${item} ${integer(context.document)}, position ${integer(context.position)}`;
  const peak = tokenLabel(context.tokens[context.peak] ?? "");
  return h(
    "div",
    { class: "saelab-context", role: "row", "data-row": true, "aria-label": `${value} at ${peak}, ${place}` },
    h("span", { class: "saelab-context-value", role: "rowheader", title: `${place}; click to fold or unfold` }, value),
    // Two boxes let every peak start at the same column; unfolded, they flow as one text.
    h(
      "span",
      { class: "saelab-context-text", role: "presentation" },
      h("span", { class: "saelab-before", role: "presentation" }, h("span", { role: "presentation" }, ...cells.slice(0, context.peak))),
      h("span", { class: "saelab-after", role: "presentation" }, ...cells.slice(context.peak)),
    ),
  );
}
