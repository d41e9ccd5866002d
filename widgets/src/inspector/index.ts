// FeatureInspector: a search, a list of features, and one feature in detail.
import { afterPaint, focusedIn, h, setText } from "../shared/dom";
import { type FrozenModel, freezer } from "../shared/frozen";
import { onChange, send } from "../shared/model";
import { panel, widget } from "../shared/panel";
import type { Mode } from "./contexts";
import { controls } from "./controls";
import { examples } from "./examples";
import { frozenInspector } from "./frozen";
import { noteEditor } from "./note";
import { type Pane, pane } from "./pane";
import { results } from "./results";
import { trial } from "./trial";
import type { Note, PairView, Sort, State } from "./types";

const inspector = widget<State>((model, el, signal) => {
  const frame = panel(model, el, "inspector", "Feature inspector", signal);
  const { root, call, complain } = frame;
  const detail = h("div", { class: "saelab-detail", "aria-live": "off" });
  const says = h("div", { class: "saelab-sr", role: "status" });
  let asked = 0;
  const ready = (yes: boolean) => {
    frame.ready(yes);
    detail.setAttribute("aria-busy", String(!yes));
  };
  // A view belongs to the feature asked for, or is still on its way from Python.
  const settle = () => ready(model.get("view").feature === model.get("feature"));
  const ask = (values: Partial<State>) => {
    complain("");
    asked = performance.now();
    ready(false);
    send(model, values);
  };
  const open = (feature: number) => {
    if (feature !== model.get("feature")) ask({ feature });
  };
  const bar = controls({ open, search: (query) => ask({ query }), sort: (by: Sort) => ask({ sort: by }), complain }, signal);
  const byExamples = examples(call, complain, signal);
  bar.element.append(byExamples.toggle, frame.codeButton);
  const list = results(open, signal);

  let mode: Mode = "stacked";
  let here: Pane | undefined;
  const note = noteEditor((note) => call<Note>("write_note", { ...note }), signal);
  const typed = trial(call, (value) => here?.tried(value), (value) => here?.hover(value), signal);

  let shown = new AbortController(); // ends the listeners of the feature on show
  signal.addEventListener("abort", () => shown.abort());
  const showFeature = () => {
    const view = model.get("view");
    const pair = model.get("pair");
    complain(model.get("error")); // a complaint about what was typed before is over
    const focus = focusedIn(detail);
    const kept = focus && [note.element, typed.element].some((part) => part.contains(focus));
    shown.abort();
    shown = new AbortController();
    if (asked) afterPaint(() => (root.dataset.openMs = (performance.now() - asked).toFixed(0)), shown.signal);
    bar.show(view.feature, view.d_sae, view.unit ?? "token");
    byExamples.toggle.hidden = view.unit === "place"; // examples are texts
    list.select(view.feature);
    note.show(view.feature, model.get("note"));
    here = pane(
      {
        view,
        pair: "cosine" in pair ? (pair as PairView) : null,
        note: model.get("note"),
        overview: model.get("overview"),
        live: model.get("live"),
        pinned: model.get("pinned") === view.feature,
        mode,
        open,
        pin: () => send(model, { pinned: model.get("pinned") === view.feature ? null : view.feature }),
        edit: (kind) => void call<string>("add_edit", { kind }).then((text) => setText(says, text)),
        setMode: (next) => (mode = next),
        call,
        trial: typed.element,
        noteEditor: note.element,
      },
      shown.signal,
    );
    detail.replaceChildren(...here.parts);
    typed.feature(view.feature, view.max);
    if (kept) focus.focus({ preventScroll: true });
    // The focused button is gone: keep the focus inside, else the next key goes to the notebook.
    else if (focus) detail.querySelector<HTMLElement>("h3")?.focus({ preventScroll: true });
    root.dataset.feature = String(view.feature);
    settle();
  };
  const showResults = () => {
    bar.showSearch(model.get("query"), model.get("sort"));
    list.show(model.get("results"), model.get("results_note"));
    settle();
  };
  root.append(bar.element, byExamples.element, h("div", { class: "saelab-body" }, list.element, detail), says);
  onChange(model, ["feature"], settle, signal);
  onChange(model, ["view", "pair"], showFeature, signal);
  onChange(model, ["pinned"], () => model.get("pinned") === null && showFeature(), signal);
  onChange(model, ["note"], () => note.show(model.get("view").feature, model.get("note")), signal);
  onChange(model, ["results", "results_note"], showResults, signal);
  onChange(model, ["error"], () => ready(true), signal); // after an error nothing more will come
  showResults();
  showFeature();
});

export const freeze = freezer(inspector, (model: FrozenModel) => frozenInspector(model));
export default inspector;
