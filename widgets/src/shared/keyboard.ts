// Keys inside a widget: they must not reach the notebook ("a" would insert a cell), and arrows move a focus.

/** Stop keys at `root`. Ctrl and Cmd chords pass, so that saving the notebook still works. */
export function guardKeys(root: HTMLElement, signal: AbortSignal): void {
  const stop = (event: KeyboardEvent) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  };
  for (const name of ["keydown", "keypress", "keyup"] as const) root.addEventListener(name, stop, { signal });
}

/**
 * One tab stop for a whole list or grid; arrows, Home and End move inside it.
 *
 * Rows carry `data-row`, cells `data-cell`; moving up or down lands on the row's `data-home` cell, else on its
 * first. `moved` hears which cell the keyboard reached.
 */
export function rovingFocus(root: HTMLElement, signal: AbortSignal, moved?: (cell: HTMLElement) => void): void {
  root.addEventListener(
    "keydown",
    (event) => {
      const cell = (event.target as HTMLElement).closest<HTMLElement>("[data-cell]");
      if (!cell || event.ctrlKey || event.metaKey || event.altKey) return;
      const next = neighbour(root, cell, event.key);
      if (!next) return;
      event.preventDefault();
      moved?.(next); // first: it may unfold a row, so that the focused cell can be seen
      next.focus();
    },
    { signal },
  );
  root.addEventListener(
    "focusin",
    (event) => {
      const cell = (event.target as HTMLElement).closest<HTMLElement>("[data-cell]");
      if (cell) makeTabStop(root, cell);
    },
    { signal },
  );
}

/** The choice of one cell of a list by a click, Enter or Space; cells carry their number as `data-position`, say. */
export function choosing(
  root: HTMLElement,
  name: "position" | "feature",
  choose: (number: number) => void,
  signal: AbortSignal,
): { mark(): void; select(number: number | null): void } {
  let chosen: number | null = null;
  const act = (event: Event) => {
    const cell = (event.target as HTMLElement).closest<HTMLElement>("[data-cell]");
    if (cell) choose(Number(cell.dataset[name]));
  };
  const keydown = (event: KeyboardEvent) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    act(event);
  };
  root.addEventListener("click", act, { signal });
  root.addEventListener("keydown", keydown, { signal });
  rovingFocus(root, signal);
  const mark = () => {
    const cells = [...root.querySelectorAll<HTMLElement>("[data-cell]")];
    const isChosen = (cell: HTMLElement) => Number(cell.dataset[name]) === chosen;
    for (const cell of cells) cell.setAttribute("aria-selected", String(isChosen(cell)));
    const stop = cells.find(isChosen) ?? cells[0];
    if (stop) makeTabStop(root, stop);
  };
  return {
    mark,
    select(number) {
      chosen = number;
      mark();
    },
  };
}

/** Make `cell` the only cell of `root` that Tab reaches. */
export function makeTabStop(root: HTMLElement, cell: HTMLElement): void {
  for (const other of root.querySelectorAll<HTMLElement>('[data-cell][tabindex="0"]')) other.tabIndex = -1;
  cell.tabIndex = 0;
}

function neighbour(root: HTMLElement, cell: HTMLElement, key: string): HTMLElement | undefined {
  const row = cell.closest<HTMLElement>("[data-row]");
  if (!row) return undefined;
  if (key === "ArrowUp" || key === "ArrowDown") {
    const rows = [...root.querySelectorAll<HTMLElement>("[data-row]")];
    const next = rows[rows.indexOf(row) + (key === "ArrowDown" ? 1 : -1)];
    return next && homeCell(next);
  }
  const inRow = cellsOf(row);
  // A list has one cell per row: there Home and End mean its ends.
  const cells = inRow.length > 1 ? inRow : [...root.querySelectorAll<HTMLElement>("[data-cell]")];
  if (key === "Home") return cells[0];
  if (key === "End") return cells.at(-1);
  if (inRow.length < 2) return undefined;
  if (key === "ArrowLeft") return cells[cells.indexOf(cell) - 1];
  if (key === "ArrowRight") return cells[cells.indexOf(cell) + 1];
  return undefined;
}

function cellsOf(row: HTMLElement): HTMLElement[] {
  return row.matches("[data-cell]") ? [row] : [...row.querySelectorAll<HTMLElement>("[data-cell]")];
}

function homeCell(row: HTMLElement): HTMLElement | undefined {
  return row.querySelector<HTMLElement>("[data-home]") ?? cellsOf(row)[0];
}
