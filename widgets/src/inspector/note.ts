// What you wrote on the feature: a label and a text. They follow the coder, and others may write them at the same time.
import { h, setText } from "../shared/dom";
import type { Note } from "./types";

type Name = keyof Note;

/** What goes to Python: both values, what the screen showed while they were typed, and when that was, in seconds. */
export interface Typed extends Note {
  feature: number;
  was: Note;
  typed: Record<Name, number>;
}

export interface NoteEditor {
  element: HTMLElement;
  show(feature: number, note: Note): void;
}

/** known: Python's value; seen: the one it had at the last key that was pressed; typed: when that was, 0 where saved. */
interface Field {
  name: Name;
  input: HTMLInputElement | HTMLTextAreaElement;
  known: string;
  seen: string;
  typed: number;
}

const PAUSE_MS = 600;

export function noteEditor(write: (note: Typed) => Promise<Note>, signal: AbortSignal): NoteEditor {
  const label = h("input", { type: "text", class: "saelab-note-label", placeholder: "label", "aria-label": "Label", dir: "auto", maxlength: 10_000 });
  const text = h("textarea", { rows: 1, placeholder: "notes", "aria-label": "Notes", dir: "auto" });
  const says = h("small", { role: "status" });
  const field = (name: Name, input: Field["input"]): Field => ({ name, input, known: "", seen: "", typed: 0 });
  const fields = [field("label", label), field("text", text)];
  const value = ({ name, input }: Field) => (name === "label" ? input.value.trim() : input.value);
  const put = (one: Field, content: string) => {
    one.known = content;
    if (!one.typed && value(one) !== content) one.input.value = content; // the caret stays where nothing changes
  };
  let feature = -1;
  let timer: ReturnType<typeof setTimeout> | undefined;

  const save = () => {
    clearTimeout(timer);
    const changed = fields.filter((one) => one.typed && value(one) !== one.known);
    const [of, now] = [feature, { label: label.value.trim(), text: text.value }];
    const [was, typed] = [{ ...now }, { label: 0, text: 0 }];
    for (const one of changed) [was[one.name], typed[one.name]] = [one.seen, one.typed];
    for (const one of fields) one.typed = 0;
    if (!changed.length) return;
    for (const one of changed) one.known = now[one.name];
    setText(says, "saving…");
    void write({ feature: of, ...now, was, typed }).then((note) => {
      if (of !== feature) return;
      const lost = changed.filter(({ name }) => note[name] !== now[name]);
      for (const one of lost) put(one, note[one.name]);
      const yours = lost.map(({ name }) => `“${now[name]}”`).join(", ");
      setText(says, lost.length ? `changed elsewhere in the meantime; you had typed ${yours}` : "saved");
    });
  };
  for (const one of fields) {
    const typing = () => {
      [one.seen, one.typed] = [one.known, Date.now() / 1000];
      clearTimeout(timer);
      timer = setTimeout(save, PAUSE_MS);
    };
    one.input.addEventListener("input", typing, { signal });
    one.input.addEventListener("change", save, { signal });
  }
  signal.addEventListener("abort", save); // what was typed last is not lost with the view
  return {
    element: h("div", { class: "saelab-note", "data-needs": "kernel" }, label, text, says),
    show(number, note) {
      if (number !== feature) {
        if (feature >= 0) save();
        feature = number;
        setText(says, "");
      }
      for (const one of fields) put(one, note[one.name]);
    },
  };
}
