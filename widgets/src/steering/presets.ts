// Presets by name, in the kernel's working folder.
import { h, setText } from "../shared/dom";

export interface PresetActions {
  save(name: string): Promise<string>;
  load(name: string): Promise<string>;
}

export function presets(actions: PresetActions, signal: AbortSignal): HTMLElement {
  const name = h("input", {
    type: "text",
    "aria-label": "Preset file",
    placeholder: "preset.json",
    spellcheck: "false",
    autocomplete: "off",
  });
  const status = h("small", { role: "status" });
  const button = (label: string, act: (name: string) => Promise<string>) => {
    const made = h("button", { type: "button" }, label);
    const run = async () => {
      setText(status, "");
      setText(status, await act(name.value));
    };
    made.addEventListener("click", () => void run(), { signal });
    return made;
  };
  return h(
    "div",
    { class: "saelab-bar-row saelab-presets", "data-needs": "kernel" },
    name,
    button("Save preset", actions.save),
    button("Load preset", actions.load),
    status,
  );
}
