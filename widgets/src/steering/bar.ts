// The bar on top: prompt, settings of generation, run and stop.
import { button, h, setText } from "../shared/dom";
import { type Prompt, promptFields } from "../shared/prompt";
import type { State } from "./types";

export interface Bar {
  element: HTMLElement;
  show(state: Pick<State, "prompt" | "temperature" | "seed" | "max_new_tokens" | "autorun" | "running">): void;
}

export interface BarActions {
  set(values: Partial<State>): void;
  run(): void;
  stop(): void;
}

// Longer than for a slider: a prompt is typed, and half a word is no prompt.
const TYPING_PAUSE_MS = 500;

export function bar(actions: BarActions, codeButton: HTMLElement, signal: AbortSignal): Bar {
  const fields = promptFields({ label: "Prompt", message: "Message", rows: 2, title: "Shift+Enter runs, Escape stops" });
  const prompt = fields.element;
  const auto = h("input", { type: "checkbox" });
  const numbers = {
    temperature: h("input", { type: "number", min: 0, step: 0.1 }),
    seed: h("input", { type: "number", min: 0, step: 1 }),
    max_new_tokens: h("input", { type: "number", min: 1, step: 1 }),
  };
  let running = false;

  let pause: ReturnType<typeof setTimeout> | undefined;
  let typed: Prompt | null = null; // not sent yet
  const send = () => {
    clearTimeout(pause);
    if (typed !== null) actions.set({ prompt: typed });
    typed = null;
  };
  signal.addEventListener("abort", () => clearTimeout(pause));
  prompt.addEventListener(
    "input",
    () => {
      typed = fields.get();
      clearTimeout(pause);
      pause = setTimeout(send, TYPING_PAUSE_MS);
    },
    { signal },
  );
  prompt.addEventListener("change", send, { signal });
  prompt.addEventListener(
    "keydown",
    (event) => {
      if (event.key !== "Enter" || !event.shiftKey) return;
      event.preventDefault();
      send();
      actions.run();
    },
    { signal },
  );
  const click = () => {
    send();
    if (running) actions.stop();
    else actions.run();
  };
  const start = button("", click, signal, { class: "saelab-run" });
  auto.addEventListener("change", () => actions.set({ autorun: auto.checked }), { signal });
  for (const [name, input] of Object.entries(numbers)) {
    input.addEventListener("change", () => input.value.trim() !== "" && actions.set({ [name]: Number(input.value) }), { signal });
  }

  const element = h(
    "div",
    { class: "saelab-controls", "data-needs": "kernel" },
    h("div", { class: "saelab-prompt-row" }, prompt, h("div", { class: "saelab-run-box" }, start, h("label", {}, auto, "run on change"))),
    h(
      "div",
      { class: "saelab-settings" },
      h("label", { title: "0: greedy, always the most likely token" }, "temperature", numbers.temperature),
      h("label", { title: "of sampling; greedy text has none" }, "seed", numbers.seed),
      h("label", {}, "new tokens", numbers.max_new_tokens),
      codeButton,
    ),
  );
  return {
    element,
    show(state) {
      running = state.running;
      setText(start, running ? "Stop" : "Run");
      start.dataset.running = String(running);
      auto.checked = state.autorun;
      // A late answer must not take away what is typed meanwhile.
      if (typed === null) fields.show(state.prompt);
      numbers.temperature.value = String(state.temperature);
      numbers.seed.value = String(state.seed);
      numbers.max_new_tokens.value = String(state.max_new_tokens);
    },
  };
}
