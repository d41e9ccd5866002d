// The prompt as it is typed, read while it is short, with a button.
import { button, h, setText } from "../shared/dom";
import { integer } from "../shared/format";
import { type Prompt, promptFields, promptWords } from "../shared/prompt";

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
  const typed = promptFields({ label: "Prompt", message: "Message", rows: 2, placeholder: "Type a text" });
  const fields = typed.element;
  const status = h("small", { role: "status" });
  const hint = h("small", {}, "Enter runs, Shift+Enter is a new line");
  const length = () => promptWords(typed.get()).length;
  const read = (live: boolean) => {
    if (length() > MOST_CHARACTERS) {
      actions.complain(`a text has at most ${integer(MOST_CHARACTERS)} characters here, this one has ${integer(length())}: shorten it`);
      return;
    }
    actions.read(typed.get(), live);
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
    show: typed.show,
    say(message) {
      setText(status, message);
    },
  };
}
