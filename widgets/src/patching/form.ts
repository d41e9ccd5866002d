// What is compared and by which number: two texts, a metric, its answers.
import { h } from "../shared/dom";
import { alike, type Prompt, promptFields } from "../shared/prompt";
import { tokenChip } from "../shared/tokens";
import type { Sides, View } from "./types";

export type Asked = { prompt: Prompt; source: Prompt; measure: string; right: string; wrong: string };

export interface Form {
  element: HTMLElement;
  show(view: View): void;
  showAnswers(sides: Sides): void;
  asked(): Asked;
}

interface Field {
  element: HTMLElement;
  set(value: string): void;
  get(): string;
}

export function form(run: (asked: Asked) => void, typed: (asked: Asked) => void, differs: (yes: boolean) => void, signal: AbortSignal): Form {
  const source = promptFields({ label: "Source: the text that patches come from", message: "Source, message", rows: 1 });
  const prompt = promptFields({ label: "Prompt: the text that is patched", message: "Prompt, message", rows: 1 });
  const right = field(h("input", { type: "text", spellcheck: "false", autocomplete: "off", "aria-label": "Right answer" }), "right");
  const wrong = field(h("input", { type: "text", spellcheck: "false", autocomplete: "off", "aria-label": "Wrong answer" }), "wrong");
  const chips = { right: h("span", { class: "saelab-answer" }), wrong: h("span", { class: "saelab-answer" }) };
  const measure = h("select", { "aria-label": "Metric" });
  const start = h("button", { type: "submit", class: "saelab-run" }, "Run");
  right.element.append(chips.right);
  wrong.element.append(chips.wrong);
  let shown: View | null = null;

  const asked = (): Asked => ({
    prompt: prompt.get(),
    source: source.get(),
    measure: measure.value,
    right: right.get(),
    wrong: wrong.get(),
  });
  const needs = () => {
    const wanted = shown?.measures.find(([kind]) => kind === measure.value)?.slice(2) ?? [];
    right.element.hidden = !wanted.includes("right");
    wrong.element.hidden = !wanted.includes("wrong");
    const now = asked();
    const changed = shown !== null && (Object.keys(now) as (keyof Asked)[]).some((name) => !alike(now[name], shown?.[name]));
    start.toggleAttribute("data-changed", changed);
    differs(changed);
    start.title = changed ? "The texts or the metric have changed: compute" : "Compute again";
  };
  const element = h(
    "form",
    { class: "saelab-patching-form", "data-needs": "kernel", "aria-label": "Prompts and metric" },
    h("div", { class: "saelab-text-field" }, h("span", { "aria-hidden": "true" }, "source"), source.element),
    h("div", { class: "saelab-text-field" }, h("span", { "aria-hidden": "true" }, "prompt"), prompt.element),
    h("div", { class: "saelab-bar-row" }, h("label", {}, "metric ", measure), right.element, wrong.element, start),
  );
  element.addEventListener(
    "submit",
    (event) => {
      event.preventDefault();
      run(asked());
    },
    { signal },
  );
  element.addEventListener(
    "keydown",
    (event) => {
      // Enter runs, as in a field of one line; with shift it breaks the line.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || !(event.target as Element).matches("textarea")) return;
      event.preventDefault();
      run(asked());
    },
    { signal },
  );
  element.addEventListener(
    "input",
    () => {
      needs();
      typed(asked());
    },
    { signal },
  );
  return {
    element,
    asked,
    show(view) {
      shown = view;
      source.show(view.source);
      prompt.show(view.prompt);
      right.set(view.right);
      wrong.set(view.wrong);
      measure.replaceChildren(...view.measures.map(([kind, name]) => h("option", { value: kind }, name ?? kind ?? "")));
      measure.value = view.measure;
      needs();
    },
    showAnswers(sides) {
      for (const name of ["right", "wrong"] as const) {
        const tokens = sides[name];
        // A space in front is part of most answers, and not to be seen in a field.
        chips[name].replaceChildren(...tokens.slice(0, 4).map(tokenChip), tokens.length > 1 ? ` ${tokens.length} tokens, not one` : "");
        chips[name].toggleAttribute("data-wrong", tokens.length > 1);
      }
    },
  };
}

/** A field with its name. What it cannot hold, such as a line break in one line, stays as it was until it is changed. */
function field(input: HTMLInputElement, name: string): Field {
  let given = "";
  let held = "";
  return {
    element: h("label", { class: "saelab-answer-field" }, h("span", {}, name), input),
    set(value) {
      given = value;
      input.value = value;
      held = input.value;
    },
    get: () => (input.value === held ? given : input.value),
  };
}
