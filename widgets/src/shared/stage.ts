// A picture of points that one moves and points at: by pointer (hover, click, drag, Ctrl and the wheel) and by keys.
import { button, h } from "./dom";

const STEP = 1.6; // of a zoom
const MOVE = 60; // pixels of a move by keys
const DRAGGED = 4; // pixels that make a click a drag
const WHEEL = 120; // pixels of the wheel that make the picture e times as large
const WAYS: Record<string, Way> = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Right and down. */
export type Way = [number, number];

export interface Movable {
  /** Larger by a factor, around a place in pixels of the stage; 0: all of it again. */
  zoom(factor: number, x?: number, y?: number): void;
  /** Move what is shown by pixels. */
  pan(right: number, down: number): void;
}

export interface Acts {
  /** The pointer moved; null: it left. */
  hover(event: PointerEvent | null): void;
  click(event: MouseEvent): void;
  /** A key other than those that zoom and pan; way: of an arrow. Gives whether it does anything here. */
  key(event: KeyboardEvent, way: Way | undefined): boolean;
}

export function movable(stage: HTMLElement, drawn: Movable, acts: Acts, signal: AbortSignal): void {
  let held: [number, number] | null = null; // where the pointer went down, then where it was last
  let dragged = false;
  let byKeys = false; // a page that scrolls under a pointer at rest moves nothing
  const hear = <K extends keyof HTMLElementEventMap>(kinds: K[], act: (event: HTMLElementEventMap[K]) => void) => {
    for (const kind of kinds) stage.addEventListener(kind, act, { signal, passive: false });
  };
  hear(["wheel"], (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    const box = stage.getBoundingClientRect();
    drawn.zoom(Math.exp(-event.deltaY / WHEEL), event.clientX - box.left, event.clientY - box.top);
  });
  hear(["pointerdown"], (event) => ([held, dragged] = [[event.clientX, event.clientY], false]));
  hear(["pointerup", "pointercancel", "pointerleave"], () => (held = null));
  hear(["pointermove"], (event) => {
    if (held && (dragged || Math.hypot(event.clientX - held[0], event.clientY - held[1]) > DRAGGED)) {
      drawn.pan(event.clientX - held[0], event.clientY - held[1]);
      [held, dragged] = [[event.clientX, event.clientY], true];
      return;
    }
    if (byKeys && event.movementX === 0 && event.movementY === 0) return;
    byKeys = false;
    acts.hover(event);
  });
  hear(["pointerleave"], () => byKeys || acts.hover(null));
  hear(["click"], (event) => dragged || acts.click(event));
  hear(["keydown"], (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const way = WAYS[event.key];
    byKeys = true;
    if (way && event.shiftKey) drawn.pan(-way[0] * MOVE, -way[1] * MOVE);
    else if (event.key === "+" || event.key === "=") drawn.zoom(STEP);
    else if (event.key === "-") drawn.zoom(1 / STEP);
    else if (event.key === "0") drawn.zoom(0);
    else if (!acts.key(event, way)) return;
    event.preventDefault();
  });
}

/** Buttons for those without a wheel. */
export function zoomButtons(drawn: Movable, of: string, signal: AbortSignal): HTMLElement {
  const one = (text: string, label: string, factor: number) =>
    button(text, () => drawn.zoom(factor), signal, { "aria-label": label, title: label, "data-needs": "model" });
  const title = "Ctrl and the wheel zoom too, dragging moves";
  const buttons = [one("−", "Smaller", 1 / STEP), one("+", "Larger", STEP), one("All", "Show all", 0)];
  return h("span", { class: `saelab-${of}-zoom`, role: "group", "aria-label": "Zoom", title }, ...buttons);
}
