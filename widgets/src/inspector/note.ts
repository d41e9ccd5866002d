// What you wrote on the feature: a label and a text, kept beside the index.
import { h } from "../shared/dom";
import type { Note } from "./types";

export interface NoteEditor {
  element: HTMLElement;
  show(feature: number, note: Note): void;
}

const PAUSE_MS = 600;

export function noteEditor(write: (feature: number, note: Note) => Promise<unknown>, signal: AbortSignal): NoteEditor {
  const label = h("input", { type: "text", class: "saelab-note-label", placeholder: "label", "aria-label": "Label", maxlength: 200 });
  const text = h("textarea", { rows: 1, placeholder: "notes", "aria-label": "Notes" });
  const says = h("small", { role: "status" });
  let feature = -1;
  let saved: Note = { label: "", text: "" };
  let timer: ReturnType<typeof setTimeout> | undefined;

  const save = () => {
    clearTimeout(timer);
    const [of, now] = [feature, { label: label.value.trim(), text: text.value }];
    if (now.label === saved.label && now.text === saved.text) return;
    saved = now;
    says.textContent = "saving…";
    void write(of, now).then(() => {
      if (of === feature) says.textContent = "saved beside the index";
    });
  };
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(save, PAUSE_MS);
  };
  for (const field of [label, text]) {
    field.addEventListener("input", later, { signal });
    field.addEventListener("change", save, { signal });
  }
  signal.addEventListener("abort", save); // what was typed last is not lost with the view
  return {
    element: h("div", { class: "saelab-note", "data-needs": "kernel" }, label, text, says),
    show(number, note) {
      if (number !== feature) {
        if (feature >= 0) save();
        feature = number;
        says.textContent = "";
      } else if (label.value.trim() !== saved.label || text.value !== saved.text) return; // still typing
      saved = note;
      [label.value, text.value] = [note.label, note.text];
    },
  };
}
