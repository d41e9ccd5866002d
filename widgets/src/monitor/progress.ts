// How far a training is: a state, a bar, and what the speed says.
import { h, setText } from "../shared/dom";
import { counted, integer, number } from "../shared/format";
import type { Status, Training } from "./types";

export interface Progress {
  /** The state, as a word with a shape of its own. */
  badge: HTMLElement;
  element: HTMLElement;
  show(status: Status): void;
}

const SHAPES: Record<Training, string> = {
  waiting: "○", running: "▶", pausing: "❚❚", paused: "❚❚", stopping: "■", finishing: "▶",
  done: "✓", stopped: "■", interrupted: "✕", failed: "✕",
};
const WORDS: Partial<Record<Training, string>> = {
  pausing: "pausing after this step",
  stopping: "stopping: thresholds are fitted",
  finishing: "finishing: thresholds are fitted",
  stopped: "stopped early, and complete",
};

export function progress(): Progress {
  const badge = h("span", { class: "saelab-state", role: "status" });
  const fill = h("span", { class: "saelab-progress-fill" });
  const bar = h("div", { class: "saelab-progress", role: "progressbar", "aria-label": "Steps", "aria-valuemin": 0 }, fill);
  const figures = h("div", { class: "saelab-figures" });
  const why = h("div", { class: "saelab-error", role: "alert", hidden: true });
  const note = h("div", { class: "saelab-caution", role: "note", hidden: true });
  return {
    badge,
    element: h("div", { class: "saelab-monitor-progress" }, bar, figures, why, note),
    show(status) {
      const words = `${SHAPES[status.state]} ${WORDS[status.state] ?? status.state}`;
      if (badge.textContent !== words) setText(badge, words); // a screen reader says each state once
      badge.dataset.state = status.state;
      bar.setAttribute("aria-valuemax", String(Math.max(1, status.steps)));
      bar.setAttribute("aria-valuenow", String(status.step));
      bar.setAttribute("aria-valuetext", `step ${integer(status.step)} of ${integer(status.steps)}`);
      fill.style.width = `${status.steps ? Math.min(100, (100 * status.step) / status.steps) : 0}%`;
      figures.replaceChildren(...facts(status).map(([value, unit]) => h("span", {}, h("b", {}, value), ` ${unit}`)));
      setText(why, status.why);
      why.hidden = status.why === "";
      setText(note, status.note);
      note.hidden = status.note === "";
    },
  };
}

function facts(status: Status): [string, string][] {
  const found: [string, string][] = [[integer(status.step), status.steps ? `of ${counted(status.steps, "step")}` : noun(status.step, "step")]];
  if (status.tokens) found.push([integer(status.tokens), noun(status.tokens, "token")]);
  if (status.passes) found.push([status.passes.toFixed(2), "passes over the data"]); // of a stream they are not known
  if (status.tokens_per_second !== null) found.push([number(status.tokens_per_second), "tokens/s"]);
  if (status.seconds_left !== null && status.state === "running") found.push([duration(status.seconds_left), "left"]);
  return found;
}

function noun(count: number, one: string): string {
  return count === 1 ? one : `${one}s`;
}

/** Seconds as a person says them. */
export function duration(seconds: number): string {
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}
