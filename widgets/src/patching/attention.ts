// Attention patterns as CircuitsVis draws them: its page comes from Python when asked for, and runs in a box of its own.
import { button, h, setText } from "../shared/dom";

/** The page, or why there is none. */
export interface AttentionAnswer {
  page?: string;
  why?: string;
}

export interface AttentionFrame {
  element: HTMLElement;
  show(name: string, answer: Promise<AttentionAnswer>): void;
  hide(): void;
}

// Its scripts are in the page: it may load nothing, and reach nothing of this one.
const HEAD =
  '<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; ' +
  "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:\">" +
  "<style>body { margin: 8px 12px; background: #fff; font: 13px system-ui, sans-serif; }</style>";

export function frame(signal: AbortSignal): AttentionFrame {
  const title = h("h4", {});
  const box = h("div", { class: "saelab-attention-box" });
  let wanted = "";
  const hide = () => {
    wanted = "";
    element.hidden = true;
    box.replaceChildren();
  };
  const close = button("×", hide, signal, { "aria-label": "Hide the attention patterns" });
  const element = h("section", { class: "saelab-attention", hidden: true }, h("div", { class: "saelab-bar-row" }, title, close), box);
  return {
    element,
    hide,
    async show(name, answer) {
      wanted = name;
      setText(title, `${name} `);
      element.hidden = false;
      element.setAttribute("aria-label", name);
      box.replaceChildren(h("p", { class: "saelab-dim", role: "status" }, "…"));
      const { page, why } = await answer;
      if (wanted !== name) return;
      const frame = page && h("iframe", { title: name, sandbox: "allow-scripts", srcdoc: HEAD + page });
      box.replaceChildren(frame || h("p", { role: "alert" }, why ?? ""));
      element.scrollIntoView?.({ block: "nearest" });
    },
  };
}
