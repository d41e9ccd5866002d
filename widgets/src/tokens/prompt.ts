// The prompt as it is typed: one text area, or one for each message of a chat.
import { button, h, setText } from "../shared/dom";
import { integer } from "../shared/format";
import type { Message, Prompt } from "./types";

export interface PromptBox {
  element: HTMLElement;
  show(prompt: Prompt): void;
  /** Say what is going on, beside the button. */
  say(message: string): void;
}

export interface PromptActions {
  /** Read it: at once, or when typing has paused. */
  read(prompt: Prompt, live: boolean): void;
  complain(message: string): void;
}

// A longer text waits for "Run": a model takes its time over it.
const LIVE_CHARACTERS = 1500;
// A message to Python has its limits, and no model reads so much.
const MOST_CHARACTERS = 1_000_000;

export function promptBox(actions: PromptActions, signal: AbortSignal): PromptBox {
  const fields = h("div", { class: "saelab-prompt-fields" });
  const status = h("small", { role: "status" });
  const hint = h("small", {}, "Enter runs, Shift+Enter is a new line");
  let roles: string[] | null = null;
  const areas = () => [...fields.querySelectorAll("textarea")];

  const typed = (): Prompt => {
    const texts = areas().map((area) => area.value);
    return roles === null ? (texts[0] ?? "") : texts.map((content, i): Message => ({ role: roles?.[i] ?? "user", content }));
  };
  const length = () => areas().reduce((sum, area) => sum + area.value.length, 0);
  const read = (live: boolean) => {
    if (length() > MOST_CHARACTERS) {
      actions.complain(`a text has at most ${integer(MOST_CHARACTERS)} characters here, this one has ${integer(length())}: shorten it`);
      return;
    }
    actions.read(typed(), live);
  };
  fields.addEventListener(
    "input",
    () => {
      if (length() <= LIVE_CHARACTERS) read(true);
      else setText(status, `${integer(length())} characters: press Run`);
    },
    { signal },
  );
  fields.addEventListener(
    "keydown",
    (event) => {
      // While an input method composes, Enter ends a word.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      read(false);
    },
    { signal },
  );
  const run = button("Run", () => read(false), signal, { class: "saelab-run" });

  return {
    element: h(
      "div",
      { class: "saelab-prompt", "data-needs": "kernel" },
      fields,
      h("div", { class: "saelab-prompt-bar" }, run, status, hint),
    ),
    show(prompt) {
      const same = JSON.stringify(typed()) === JSON.stringify(prompt) && areas().length > 0;
      if (same) return; // the caret stays where it is
      const messages = typeof prompt === "string" ? [{ role: "", content: prompt }] : prompt;
      const kept = areas();
      const newRoles = typeof prompt === "string" ? null : messages.map((m) => m.role);
      if (JSON.stringify(newRoles) === JSON.stringify(roles) && kept.length === messages.length) {
        messages.forEach((message, i) => (kept[i]!.value = message.content));
        return;
      }
      roles = newRoles;
      fields.replaceChildren(...messages.map((message) => field(message, roles !== null)));
    },
    say(message) {
      setText(status, message);
    },
  };
}

function field(message: Message, chat: boolean): HTMLElement {
  const area = h("textarea", {
    rows: chat ? 1 : 2,
    dir: "auto",
    spellcheck: "false",
    placeholder: "Type a text",
    "aria-label": chat ? `Message of ${message.role}` : "Prompt",
  });
  area.value = message.content;
  return h("div", { class: "saelab-prompt-field" }, chat ? h("small", { "aria-hidden": "true" }, message.role) : null, area);
}
