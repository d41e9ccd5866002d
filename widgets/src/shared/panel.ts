// The frame of every widget: theme, keys, complaints, whether Python is there, and "copy as code".
import type { AnyModel, RenderProps } from "@anywidget/types";
import { button, h, setText } from "./dom";
import { exportMenu } from "./exporting";
import { guardKeys } from "./keyboard";
import { onChange } from "./model";
import { type Call, caller } from "./rpc";
import { followTheme } from "./theme";

/** live: Python answers; lost: the kernel was restarted or has gone; frozen: a file that never had one. */
export type Connection = "live" | "lost" | "frozen";

export interface Panel {
  root: HTMLElement;
  /** Call a method of the Python object. A refusal is shown as a complaint and the promise never settles. */
  call: Call;
  /** Show what went wrong; "" takes it away. */
  complain(message: string): void;
  /** Whether the widget shows what was asked for: `data-ready` on the root, which tests and eyes wait for. */
  ready(yes: boolean): void;
  /** "Copy as code" and "Export", for the widget's bar. */
  codeButton: HTMLElement;
  /** The menu in it, for what only this widget exports. */
  exports: HTMLElement;
  /** Where that is said: between the question and what stands below. */
  old: HTMLElement;
  /** Say that what stands below belongs to an earlier question, and grey it; "": it does not. */
  stale(words: string): void;
  connection(): Connection;
}

const LOST = "The kernel was restarted or is gone: run the cell again to reconnect. What you see here stays.";

/**
 * A root element in `el`, framed. Controls that need Python carry `data-needs="kernel"`: they rest while it is gone,
 * and a page that never had a kernel leaves them out. `data-needs="model"` also works there, on the page's own data.
 */
export function panel<T extends { error: string } & Record<string, unknown>>(
  model: AnyModel<T>,
  el: HTMLElement,
  name: string,
  label: string,
  signal: AbortSignal,
): Panel {
  const alert = h("div", { class: "saelab-error", role: "alert", hidden: true });
  const lost = h("div", { class: "saelab-lost", role: "status", hidden: true }, LOST);
  const code = h("div", { class: "saelab-code", hidden: true });
  const root = h("div", { class: `saelab saelab-${name}`, role: "region", "aria-label": label }, lost, alert, code);

  const complain = (message: string) => {
    setText(alert, message);
    alert.hidden = message === "";
  };
  let state: Connection = "frozen" in model ? "frozen" : "live";
  const rest = () => {
    root.dataset.connection = state;
    lost.hidden = state !== "lost";
    const gone = state === "lost" ? "[data-needs]" : '[data-needs="kernel"]';
    for (const part of root.querySelectorAll<HTMLElement>("[data-needs]")) part.inert = state !== "live" && part.matches(gone);
  };
  // What is drawn later rests too.
  const watch = () => {
    rest();
    const observer = new MutationObserver(rest);
    observer.observe(root, { childList: true, subtree: true });
    signal.addEventListener("abort", () => observer.disconnect());
  };
  const loseIt = () => {
    if (state !== "live") return;
    state = "lost";
    watch();
  };
  // The widget managers of JupyterLab and its kin say so when the kernel restarts; anywidget passes it on.
  const events = ["comm_live_update", "comm:close"] as unknown as "msg:custom"[];
  for (const event of events) {
    model.on(event, loseIt);
    signal.addEventListener("abort", () => model.off(event, loseIt));
  }
  if (state === "frozen") watch();
  else rest();

  const ask = caller(model, signal);
  const call: Call = (method, args, options) => {
    if (state === "lost") return new Promise(() => undefined);
    return new Promise((resolve) => {
      ask<never>(method, args, options).then(resolve, (error: Error) => {
        complain(error.message);
        root.dataset.ready = "1"; // nothing more will come
      });
    });
  };

  const old = h("div", { class: "saelab-old", role: "status", hidden: true });
  const exports = exportMenu({ ask: (what) => call("export", { what }), root, name }, signal);
  guardKeys(root, signal);
  followTheme(root, signal);
  hideKept(model as unknown as AnyModel<Kept>, root, lost, signal);
  el.append(root);
  onChange(model, ["error"], () => complain(model.get("error")), signal);
  complain(model.get("error"));
  return {
    root,
    call,
    complain,
    ready: (yes) => {
      root.dataset.ready = yes ? "1" : "0";
      root.setAttribute("aria-busy", String(!yes));
    },
    codeButton: h("span", { class: "saelab-hand-on" }, codeButton(code, call, signal), exports),
    exports,
    connection: () => state,
    old,
    stale: (words) => {
      setText(old, words);
      old.hidden = words === "";
      root.dataset.stale = String(words !== "");
    },
  };
}

type Kept = { _kept_key?: string; _kept_at?: number };
const ARRIVES_MS = 2000;
const OUTDATED = "This page was loaded after the cell ran: saved now, the notebook shows an earlier state of this. Run the cell again.";

/**
 * While the view lives, the form that a saved notebook keeps beside it is not to be seen (kept_form.py). Where its
 * renewals do not arrive, the panel says so.
 */
function hideKept(model: AnyModel<Kept>, root: HTMLElement, lost: HTMLElement, signal: AbortSignal): void {
  const key = model.get("_kept_key");
  if (!key) return;
  root.append(h("style", {}, `.${key}, .jp-OutputArea-child:has(.${key}) { display: none !important; }`));
  const outdated = h("div", { class: "saelab-lost saelab-outdated", role: "status", hidden: true }, OUTDATED);
  lost.after(outdated);
  const check = () => {
    const there = document.querySelector(`.${key}`);
    outdated.hidden = signal.aborted || !there || there.matches(`.saelab-at-${model.get("_kept_at")}`);
  };
  onChange(model, ["_kept_at"], () => setTimeout(check, ARRIVES_MS), signal);
}

/** Puts the Python behind the view on the clipboard, and shows it, since a page may not be allowed to write there. */
function codeButton(box: HTMLElement, call: Call, signal: AbortSignal): HTMLElement {
  const show = async () => {
    const source = await call<string>("copy_code");
    const copied = await navigator.clipboard?.writeText(source).then(
      () => true,
      () => false,
    );
    const note = h("small", { role: "status" }, copied ? "copied" : "select and copy");
    const close = button("×", hide, signal, { "aria-label": "Hide the code" });
    box.replaceChildren(note, close, h("pre", { tabindex: 0, "aria-label": "Python code" }, source));
    box.hidden = false;
  };
  const title = "The Python that computes what is shown";
  const copy = button("Copy as code", () => void show(), signal, { "data-needs": "kernel", class: "saelab-code-button", title });
  const hide = () => {
    box.hidden = true;
    copy.focus();
  };
  box.addEventListener("keydown", (event) => event.key === "Escape" && hide(), { signal });
  return copy;
}

/** A widget from what draws it: anywidget's entry, with one signal that ends every listener of the view. */
export function widget<T extends Record<string, unknown>>(
  draw: (model: AnyModel<T>, el: HTMLElement, signal: AbortSignal) => void,
): { render(props: Pick<RenderProps<T>, "model" | "el">): () => void } {
  return {
    render({ model, el }) {
      const view = new AbortController();
      draw(model, el, view.signal);
      return () => view.abort();
    },
  };
}
