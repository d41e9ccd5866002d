// The hand on a training: start, pause, stop and save, another learning rate or sparsity.
import { button, h, setText } from "../shared/dom";
import { counted } from "../shared/format";
import type { Line, Training } from "./types";

export interface Hand {
  buttons: HTMLElement;
  form: HTMLElement;
  show(state: Training, lines: Line[], canStart: boolean): void;
}

export interface HandActions {
  start(): void;
  pause(): void;
  resume(): void;
  /** null: all coders. */
  stop(coder: string | null): void;
  change(values: { lr?: number; sparsity?: number }, coder: string | null): void;
  complain(message: string): void;
}

const GOING: Training[] = ["running", "pausing", "paused", "stopping", "finishing"];
const OPEN: Training[] = ["running", "pausing", "paused"];
const ALL = "";

export function hand(actions: HandActions, signal: AbortSignal): Hand {
  let lines: Line[] = [];
  let held = false;

  const make = (text: string, title: string, act: () => void, more = "") =>
    button(text, act, signal, { title, class: more || null, "data-needs": "kernel" });
  const start = make("▶ Start", "Train, while the notebook stays free", actions.start, "saelab-main");
  const pause = make("❚❚ Pause", "Hold after the step under way", () => (held ? actions.resume() : actions.pause()));
  const stop = make("■ Stop and save", "End now as if training were complete", () => actions.stop(chosen()));

  const which = h("select", { "aria-label": "Coder" });
  const lr = field("Peak learning rate");
  const sparsity = field("Sparsity");
  const name = h("span", {});
  const sparsityLabel = h("label", {}, name, sparsity);
  const whichLabel = h("label", {}, "coder", which);
  const apply = h("button", { type: "submit" }, "Apply");
  const form = h(
    "form",
    { class: "saelab-monitor-form", "data-needs": "kernel", "aria-label": "Change the training", novalidate: true },
    whichLabel,
    h("label", {}, "peak learning rate", lr),
    sparsityLabel,
    apply,
    h("small", {}, "from the next step on; kept in run.changes"),
  );

  const chosen = () => (which.value === ALL ? null : which.value);
  const mine = () => lines.filter((line) => chosen() === null || line.label === chosen());
  // What is typed stays until it is applied; only then does a field follow Python again.
  const touched = new Set<HTMLInputElement>();
  for (const input of [lr, sparsity]) input.addEventListener("input", () => touched.add(input), { signal });
  const fill = () => {
    const some = mine();
    const names = [...new Set(some.map((line) => line.sparsity_name))];
    sparsityLabel.hidden = names.length !== 1 || names[0] === null;
    setText(name, names[0] ?? "");
    sparsity.setAttribute("aria-label", names[0] ?? "sparsity");
    put(lr, some.map((line) => line.lr));
    put(sparsity, some.map((line) => line.sparsity));
  };
  const put = (input: HTMLInputElement, values: (number | null)[]) => {
    const same = new Set(values);
    const [value] = same;
    input.placeholder = same.size > 1 ? "several" : "";
    if (touched.has(input)) return;
    input.value = same.size === 1 && value !== null && value !== undefined ? short(value) : "";
  };
  which.addEventListener(
    "change",
    () => {
      touched.clear();
      fill();
    },
    { signal },
  );
  form.addEventListener(
    "submit",
    (event) => {
      event.preventDefault();
      const values: { lr?: number; sparsity?: number } = {};
      for (const [key, input] of [["lr", lr], ["sparsity", sparsity]] as const) {
        if (!touched.has(input) || input.value.trim() === "") continue;
        const value = Number(input.value);
        if (!Number.isFinite(value)) {
          actions.complain(`${input.getAttribute("aria-label")} must be a number, got “${input.value}”`);
          return;
        }
        values[key] = value;
      }
      touched.clear();
      if (Object.keys(values).length) actions.change(values, chosen());
      fill();
    },
    { signal },
  );

  return {
    buttons: h("div", { class: "saelab-monitor-buttons", role: "group", "aria-label": "Training" }, start, pause, stop),
    form,
    show(state, all, canStart) {
      const before = lines.map((line) => line.label).join("\n");
      lines = all;
      held = state === "paused" || state === "pausing";
      start.hidden = !canStart || GOING.includes(state);
      pause.hidden = stop.hidden = form.hidden = !GOING.includes(state);
      setText(pause, held ? "▶ Resume" : "❚❚ Pause");
      pause.title = held ? "Go on" : "Hold after the step under way";
      pause.disabled = stop.disabled = apply.disabled = !OPEN.includes(state);
      if (all.map((line) => line.label).join("\n") !== before) {
        const options = all.map((line) => h("option", { value: line.label }, line.label));
        which.replaceChildren(h("option", { value: ALL }, "all"), ...options);
      }
      whichLabel.hidden = all.length < 2;
      fill();
    },
  };
}

function field(label: string): HTMLInputElement {
  return h("input", { type: "text", inputmode: "decimal", "aria-label": label, autocomplete: "off", spellcheck: "false" });
}

/** A number as one would type it: what comes back is the same number, to four digits. */
function short(value: number): string {
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
}

/** What was changed, for people: "k 32 → 16". */
export function changeText(what: string, old: number, now: number): string {
  return what === "stop" ? `stopped after ${counted(now, "step")}` : `${what} ${short(old)} → ${short(now)}`;
}
