// Presets by name, in the kernel's working folder.
import { button, h, setText } from "../shared/dom";

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
  const run = async (act: (name: string) => Promise<string>) => {
    setText(status, "");
    setText(status, await act(name.value));
  };
  return h(
    "div",
    { class: "saelab-bar-row saelab-presets", "data-needs": "kernel" },
    name,
    button("Save preset", () => void run(actions.save), signal),
    button("Load preset", () => void run(actions.load), signal),
    status,
  );
}
