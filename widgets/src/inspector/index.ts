// FeatureInspector: a search, a list of features, and one feature in detail.
import type { AnyModel, RenderProps } from "@anywidget/types";
import { h } from "../shared/dom";
import { guardKeys } from "../shared/keyboard";
import { onChange, send } from "../shared/model";
import { followTheme } from "../shared/theme";
import { controls } from "./controls";
import { pane } from "./pane";
import { results } from "./results";
import type { Sort, State } from "./types";

function render({ model, el }: Pick<RenderProps<State>, "model" | "el">): () => void {
  const view = new AbortController(); // ends every listener of this view
  inspector(model, el, view.signal);
  return () => view.abort();
}

function inspector(model: AnyModel<State>, el: HTMLElement, signal: AbortSignal): void {
  const alert = h("div", { class: "saelab-error", role: "alert", hidden: true });
  const detail = h("div", { class: "saelab-detail", "aria-live": "off" });
  const root = h("div", { class: "saelab saelab-inspector", role: "region", "aria-label": "Feature inspector" });

  const complain = (message: string) => {
    alert.textContent = message;
    alert.hidden = message === "";
  };
  const ready = (yes: boolean) => {
    root.dataset.ready = yes ? "1" : "0";
    detail.setAttribute("aria-busy", String(!yes));
  };
  // A view belongs to the feature asked for, or is still on its way from Python.
  const settle = () => ready(model.get("view").feature === model.get("feature"));
  const ask = (values: Partial<State>) => {
    complain("");
    ready(false);
    send(model, values);
  };
  const open = (feature: number) => {
    if (feature !== model.get("feature")) ask({ feature });
  };
  const search = (query: string) => ask({ query });
  const sort = (by: Sort) => ask({ sort: by });
  const bar = controls({ open, search, sort, complain }, signal);
  const list = results(open, signal);

  let shown = new AbortController(); // ends the listeners of the feature on show
  signal.addEventListener("abort", () => shown.abort());
  const showFeature = () => {
    const view = model.get("view");
    complain(model.get("error")); // a complaint about what was typed before is over
    const hadFocus = detail.contains((root.getRootNode() as Document | ShadowRoot).activeElement);
    shown.abort();
    shown = new AbortController();
    bar.show(view.feature, view.d_sae);
    list.select(view.feature);
    detail.replaceChildren(...pane(view, open, shown.signal));
    // The focused button is gone: keep the focus inside, else the next key goes to the notebook.
    if (hadFocus) detail.querySelector<HTMLElement>("h3")?.focus({ preventScroll: true });
    root.dataset.feature = String(view.feature);
    settle();
  };
  const showResults = () => {
    bar.showSearch(model.get("query"), model.get("sort"));
    list.show(model.get("results"), model.get("results_note"));
    settle();
  };
  const showError = () => {
    complain(model.get("error"));
    ready(true); // after an error nothing more will come
  };

  guardKeys(root, signal);
  followTheme(root, signal);
  root.append(bar.element, alert, h("div", { class: "saelab-body" }, list.element, detail));
  el.append(root);
  onChange(model, ["feature"], settle, signal);
  onChange(model, ["view"], showFeature, signal);
  onChange(model, ["results", "results_note"], showResults, signal);
  onChange(model, ["error"], showError, signal);
  showError();
  showResults();
  showFeature();
}

export default { render };
