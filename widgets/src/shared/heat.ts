// A grid of signed numbers: read as colour with a number or a sign, walked with the arrows, cells and blocks chosen.
import { type Attributes, focusedIn, h } from "./dom";
import { makeTabStop } from "./keyboard";

export interface HeatCell {
  /** null: no number. */
  value: number | null;
  /** Measured, drawn solid; else an estimate, drawn hatched, its number slanted. */
  sure: boolean;
  /** What is heard, and shown on hover. */
  label: string;
}

/** A row or a column: its name, which is chosen as a cell is, and one number of the whole line. */
export interface HeatLine {
  nodes: (Node | string)[];
  label: string;
  whole: number | null;
  /** Set apart by a line below and a mark. */
  marked?: boolean;
  /** Set apart as no part of the text. */
  dim?: boolean;
}

export interface HeatData {
  /** The top one first. */
  rows: HeatLine[];
  columns: HeatLine[];
  cells: HeatCell[][];
  /** The value at full strength. */
  scale: number;
}

/** A cell; row -1: the name of a column; column -1: the name of a row. */
export interface At {
  row: number;
  column: number;
}

const isLine = ({ row, column }: At) => row < 0 || column < 0;

/** Cells from a corner to the opposite one, both within. */
export interface Block {
  rows: [number, number];
  columns: [number, number];
}

export interface HeatOptions {
  label: string;
  /** What the rows are, in the corner. */
  corner: string;
  /** A click on a cell or the name of a line, or Enter. */
  choose(at: At): void;
  /** The cell under the pointer or the focus. */
  hover?(at: At | null): void;
  /** The block that a drag, shift and the arrows, or a shift-click has chosen; null: none. */
  block?(block: Block | null): void;
}

export interface HeatGrid {
  element: HTMLElement;
  show(data: HeatData): void;
  /** Mark the open cell. */
  select(at: At | null): void;
  clearBlock(): void;
  /** Scroll to a column, if it is out of sight. */
  reveal(column: number): void;
}

/** So many columns still leave room for numbers. */
const ROOMY = 18;

export function heatGrid(options: HeatOptions, signal: AbortSignal): HeatGrid {
  const element = h("div", {
    class: "saelab-heat",
    role: "grid",
    "aria-label": options.label,
    "aria-multiselectable": "true",
  });
  let cells: HTMLElement[][] = [];
  let heads: { rows: HTMLElement[]; columns: HTMLElement[] } = { rows: [], columns: [] };
  let selected: At | null = null;
  let anchor: At | null = null; // where a block begins
  let block: Block | null = null;
  let dragging = false;

  const at = (target: EventTarget | null): At | null => {
    const cell = (target as HTMLElement | null)?.closest?.<HTMLElement>("[data-cell]");
    return cell ? { row: Number(cell.dataset.row), column: Number(cell.dataset.column) } : null;
  };
  const cellAt = (where: At | null) => {
    if (where === null) return undefined;
    if (where.row < 0) return heads.columns[where.column];
    return where.column < 0 ? heads.rows[where.row] : cells[where.row]?.[where.column];
  };
  const within = ({ row, column }: At) =>
    block !== null && row >= block.rows[0] && row <= block.rows[1] && column >= block.columns[0] && column <= block.columns[1];
  const mark = () => {
    cells.forEach((line, row) =>
      line.forEach((cell, column) => {
        const open = selected?.row === row && selected.column === column;
        cell.toggleAttribute("data-open", open);
        cell.setAttribute("aria-selected", String(open || within({ row, column })));
        cell.toggleAttribute("data-block", within({ row, column }));
      }),
    );
  };
  const setBlock = (to: At | null) => {
    const from = anchor ?? to;
    const before = block;
    block =
      from && to
        ? {
            rows: [Math.min(from.row, to.row), Math.max(from.row, to.row)],
            columns: [Math.min(from.column, to.column), Math.max(from.column, to.column)],
          }
        : null;
    if (before === null && block === null) return;
    mark();
    options.block?.(block);
  };
  const focus = (where: At) => {
    const cell = cellAt(where);
    if (!cell) return;
    makeTabStop(element, cell);
    cell.focus();
  };

  const keydown = (event: KeyboardEvent) => {
    const here = at(event.target);
    if (!here || event.altKey) return;
    const last: At = { row: cells.length - 1, column: (cells[0]?.length ?? 1) - 1 };
    if (event.ctrlKey || event.metaKey) {
      if (event.key !== "a") return;
      anchor = { row: 0, column: 0 };
      setBlock(last);
    } else if (event.key === "Enter" || event.key === " ") {
      options.choose(here);
    } else if (event.key === "Escape") {
      setBlock(null);
    } else {
      const to = moved(here, event.key, last);
      if (!to || (event.shiftKey && (isLine(to) || isLine(here)))) return;
      if (!event.shiftKey) setBlock(null);
      else if (block === null) anchor = here;
      focus(to);
      if (event.shiftKey) setBlock(to);
    }
    event.preventDefault();
    event.stopPropagation();
  };
  const pointerdown = (event: PointerEvent) => {
    const here = at(event.target);
    if (!here || event.button !== 0) return;
    if (isLine(here)) {
      setBlock(null);
      return;
    }
    if (event.shiftKey) {
      const focused = at(focusedIn(element));
      anchor = focused && !isLine(focused) ? focused : (selected ?? here);
      setBlock(here);
      event.preventDefault(); // no selection of text
      return;
    }
    dragging = true;
    setBlock(null);
    anchor = here;
  };
  const pointerover = (event: PointerEvent) => {
    const here = at(event.target);
    options.hover?.(here);
    if (!dragging || !here || !anchor || isLine(here)) return;
    if (event.buttons === 0) dragging = false; // let go outside
    else if (block !== null || here.row !== anchor.row || here.column !== anchor.column) setBlock(here);
  };
  const click = (event: MouseEvent) => {
    dragging = false;
    const here = at(event.target);
    if (here && block === null) options.choose(here); // else the click ended a drag
  };
  element.addEventListener("keydown", keydown, { signal });
  element.addEventListener("pointerdown", pointerdown, { signal });
  element.addEventListener("pointerover", pointerover, { signal });
  element.addEventListener("pointerleave", () => options.hover?.(null), { signal });
  element.addEventListener("click", click, { signal });
  element.addEventListener("focusin", (event) => options.hover?.(at(event.target)), { signal });
  element.addEventListener("focusout", () => options.hover?.(null), { signal });

  return {
    element,
    show(data) {
      const focused = focusedIn(element);
      const stop = at(focused ?? element.querySelector('[data-cell][tabindex="0"]'));
      const { scrollLeft, scrollTop } = element;
      element.dataset.dense = String(data.columns.length > ROOMY);
      element.style.setProperty("--saelab-columns", String(data.columns.length));
      cells = data.cells.map((line, row) => line.map((cell, column) => draw(cell, { row, column }, data.scale)));
      heads = {
        columns: data.columns.map((line, column) => head(line, "columnheader", { row: -1, column }, data.scale)),
        rows: data.rows.map((line, row) => head(line, "rowheader", { row, column: -1 }, data.scale)),
      };
      const corner = h("span", { role: "columnheader", class: "saelab-heat-corner" }, options.corner);
      const row = (...parts: HTMLElement[]) => h("div", { class: "saelab-heat-row", role: "row" }, ...parts);
      const top = row(corner, ...heads.columns);
      top.classList.add("saelab-heat-head");
      element.replaceChildren(top, ...cells.map((line, i) => row(...heads.rows.slice(i, i + 1), ...line)));
      mark();
      const home = cellAt(stop) ?? cellAt(selected) ?? cells[0]?.[0];
      if (home) makeTabStop(element, home);
      if (focused) home?.focus({ preventScroll: true });
      [element.scrollLeft, element.scrollTop] = [scrollLeft, scrollTop];
    },
    select(where) {
      selected = where;
      mark();
    },
    clearBlock: () => setBlock(null),
    reveal(column) {
      const { offsetLeft = 0, offsetWidth = 0 } = heads.columns[column] ?? {};
      if (offsetLeft + offsetWidth > element.scrollLeft + element.clientWidth) element.scrollLeft = offsetLeft - element.clientWidth / 2;
    },
  };
}

function moved({ row, column }: At, key: string, last: At): At | null {
  const steps: Record<string, At> = {
    ArrowUp: { row: Math.max(column < 0 ? 0 : -1, row - 1), column },
    ArrowDown: { row: Math.min(last.row, row + 1), column },
    ArrowLeft: { row, column: Math.max(row < 0 ? 0 : -1, column - 1) },
    ArrowRight: { row, column: Math.min(last.column, column + 1) },
    Home: { row, column: 0 },
    End: { row, column: last.column },
    PageUp: { row: 0, column },
    PageDown: { row: last.row, column },
  };
  return steps[key] ?? null;
}

function head({ nodes, label, whole, marked, dim }: HeatLine, role: string, { row, column }: At, scale: number): HTMLElement {
  const more = { title: label, "aria-label": label, "data-marked": marked, "data-dim": dim };
  const name = h("span", { class: "saelab-heat-name" }, ...nodes);
  return h(
    "span",
    { role, tabindex: -1, "data-cell": true, "data-row": row, "data-column": column, ...more },
    name,
    tinted({ value: whole, sure: whole !== null }, scale, { "aria-hidden": "true" }),
  );
}

function draw(cell: HeatCell, { row, column }: At, scale: number): HTMLElement {
  const { label } = cell;
  const place = { role: "gridcell", tabindex: -1, "data-cell": true, "data-row": row, "data-column": column };
  return tinted(cell, scale, { ...place, title: label, "aria-label": label });
}

function tinted(cell: Omit<HeatCell, "label">, scale: number, more: Attributes): HTMLElement {
  const value = cell.value ?? 0;
  const share = Math.min(1, Math.abs(value) / (scale || 1));
  const sign = value > 0 ? "+" : value < 0 ? "−" : "";
  const drawn = h(
    "span",
    {
      class: "saelab-heat-cell",
      "data-sign": value > 0 ? "plus" : value < 0 ? "minus" : "none",
      "data-sure": cell.sure,
      "data-nil": short(cell) === "0",
      ...more,
    },
    h("span", { class: "saelab-heat-number", "aria-hidden": "true" }, short(cell)),
    h("span", { class: "saelab-heat-mark", "aria-hidden": "true" }, share >= 0.15 ? sign : ""),
  );
  drawn.style.setProperty("--saelab-share", share.toFixed(3));
  return drawn;
}

/** Two digits: ".29", "−.07", "1.01"; an estimate of next to nothing is left out. */
export function short({ value, sure }: Omit<HeatCell, "label">): string {
  if (value === null) return "";
  const text = Math.abs(value).toFixed(2);
  if (text === "0.00") return sure ? "0" : "";
  return `${value < 0 ? "−" : ""}${text.replace(/^0/, "")}`;
}
