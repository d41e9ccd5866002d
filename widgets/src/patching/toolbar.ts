// Below the grid: what a cell says, the colours' key, and patches of a block with their progress.
import { button, h, setText } from "../shared/dom";
import { number } from "../shared/format";

export interface Toolbar {
  element: HTMLElement;
  /** What the cell under the pointer or the focus says; "": none. */
  say(words: string): void;
  /** How many cells of the chosen block are to be patched; null: no block. */
  block(count: number | null): void;
  scale(scale: number): void;
  progress(progress: number[]): void;
}

// As docs/limits.md says.
const LIMIT = "An estimate comes from one gradient: for a whole residual stream it can say 0.3 where the true patch gives 1.";
const HINT = "Enter or a click patches a cell, on the name of a row or column all of it; drag, or shift and the arrows, choose a block";

export function toolbar(actions: { patch(): void; stop(): void }, signal: AbortSignal): Toolbar {
  const readout = h("small", { class: "saelab-readout" }, HINT);
  const patch = button("Patch block", actions.patch, signal, { disabled: true, "data-needs": "kernel" });
  const bar = h("progress", { max: 1, value: 0, "aria-label": "Patches done" });
  const count = h("span", { role: "status" });
  const cancel = button("Cancel", actions.stop, signal);
  const running = h("span", { class: "saelab-patching-progress", hidden: true, "data-needs": "kernel" }, bar, count, cancel);
  const low = h("span", {});
  const high = h("span", {});
  const key = h(
    "div",
    { class: "saelab-heat-key", "aria-hidden": "true" },
    low,
    h("span", { class: "saelab-heat-ramp" }),
    high,
    swatch(".5 estimate", false),
    swatch(".5 patched", true),
  );
  const limit = h("small", { class: "saelab-patching-limit" }, LIMIT);
  return {
    element: h("div", { class: "saelab-patching-tools" }, readout, h("div", { class: "saelab-bar-row" }, key, patch, running), limit),
    say: (words) => setText(readout, words || HINT),
    block(cells) {
      patch.disabled = !cells;
      setText(patch, cells === null ? "Patch block" : cells ? `Patch block (${cells})` : "Block is patched");
    },
    scale(scale) {
      setText(low, number(-scale));
      setText(high, `+${number(scale)}`);
    },
    progress([done, of]) {
      running.hidden = !of;
      bar.max = of || 1;
      bar.value = done ?? 0;
      setText(count, of ? `${done} of ${of}` : "");
    },
  };
}

function swatch(words: string, sure: boolean): HTMLElement {
  const [number_, name] = words.split(" ");
  const cell = h("span", { class: "saelab-heat-cell", "data-sign": "plus", "data-sure": sure }, number_ ?? "");
  cell.style.setProperty("--saelab-share", "0.5");
  return h("span", { class: "saelab-heat-swatch" }, cell, name ?? "");
}
