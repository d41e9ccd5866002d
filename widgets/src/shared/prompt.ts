// A prompt as it is typed: one text area, or one for each message of a chat. Typing changes words, never the roles.
import { h } from "./dom";

export type Message = { role: string; content: string };
export type Prompt = string | Message[];

export interface PromptFields {
  element: HTMLElement;
  show(prompt: Prompt): void;
  /** What stands there. What a field cannot hold, such as "\r", stays as it was until it is changed. */
  get(): Prompt;
}

export interface PromptOptions {
  /** Of the area of a text; of a chat's it begins the label, before the message's role. */
  label: string;
  message: string;
  rows: number;
  placeholder?: string;
  title?: string;
}

export function promptFields(options: PromptOptions): PromptFields {
  const element = h("div", { class: "saelab-prompt-fields" });
  let given: Prompt | null = null;
  let held: string[] = []; // what the areas made of it
  const areas = () => [...element.querySelectorAll("textarea")];
  const get = (): Prompt => {
    const texts = areas().map((area, i) => (area.value === held[i] ? messagesOf(given ?? "")[i]!.content : area.value));
    return typeof given === "string" || given === null ? (texts[0] ?? "") : given.map((m, i) => ({ ...m, content: texts[i] ?? "" }));
  };
  return {
    element,
    get,
    show(prompt) {
      if (given !== null && alike(get(), prompt)) return; // the caret stays where it is
      if (given === null || !alike(rolesOf(given), rolesOf(prompt))) {
        element.replaceChildren(...messagesOf(prompt).map(({ role }) => field(options, typeof prompt === "string" ? null : role)));
      }
      given = prompt;
      held = areas().map((area, i) => {
        area.value = messagesOf(prompt)[i]!.content;
        return area.value;
      });
    },
  };
}

function field(options: PromptOptions, role: string | null): HTMLElement {
  const area = h("textarea", {
    rows: role === null ? options.rows : 1,
    dir: "auto",
    spellcheck: "false",
    placeholder: options.placeholder,
    title: options.title,
    "aria-label": role === null ? options.label : `${options.message} of ${role}`,
  });
  return h("div", { class: "saelab-prompt-field" }, role === null ? null : h("small", { "aria-hidden": "true" }, role), area);
}

const messagesOf = (prompt: Prompt): Message[] => (typeof prompt === "string" ? [{ role: "", content: prompt }] : prompt);
const rolesOf = (prompt: Prompt) => (typeof prompt === "string" ? null : prompt.map(({ role }) => role));

export const alike = (a: unknown, b: unknown) => JSON.stringify(a) === JSON.stringify(b);

/** A prompt to be read: of a chat one line a message, “user: Hello”. */
export const promptWords = (prompt: Prompt) =>
  typeof prompt === "string" ? prompt : prompt.map(({ role, content }) => `${role}: ${content}`).join("\n");
