// One feature: everything right of the list. Rebuilt whenever Python sends another view.
import { button, choice, h, setText } from "../shared/dom";
import { counted, number, percent } from "../shared/format";
import { type Bins, histogram } from "../shared/histogram";
import type { Call } from "../shared/rpc";
import { tokenLabel, valueText } from "../shared/tokens";
import { type Contexts, contexts, type Hovered, isTile, type Mode } from "./contexts";
import { comparison } from "./compare";
import { lens } from "./lens";
import { neighbours } from "./neighbours";
import { heading, stats } from "./stats";
import type { Context, FeatureView, Note, PairView } from "./types";

const hint = (unit: string) => `hover a ${unit}, or use the arrow keys`;
const MODES: [Mode, string][] = [
  ["stacked", "stacked"],
  ["snippet", "snippets"],
  ["full", "full text"],
];

export interface PaneOptions {
  view: FeatureView;
  note: Note;
  pair: PairView | null;
  overview: Bins;
  live: boolean;
  pinned: boolean;
  mode: Mode;
  open(feature: number): void;
  pin(): void;
  edit(kind: "steer" | "ablate"): void;
  setMode(mode: Mode): void;
  call: Call;
  /** Parts that outlive the feature: what was typed stays. */
  trial: HTMLElement;
  noteEditor: HTMLElement;
}

export interface Pane {
  parts: HTMLElement[];
  /** A marker for the value under the pointer in the tried text, and one for its largest. */
  tried(largest: number | null): void;
  hover(value: number | null): void;
}

export function pane(options: PaneOptions, signal: AbortSignal): Pane {
  const { view } = options;
  const what = view.unit ?? "token";
  const unit = view.f_scale > 0 ? { name: "f_scale", value: view.f_scale } : undefined;
  const plot = histogram(view.histogram, unit);
  const alive = view.groups.some((group) => group.contexts.length > 0);
  const readout = h("small", { class: "saelab-readout" }, alive ? hint(what) : "");
  const hover = (at: Hovered | null) => {
    plot.mark(at?.value ?? null);
    setText(readout, at === null ? hint(what) : describe(at, view.max));
  };
  const parts = [
    heading(view, options.note.label || (view.explanations?.[0]?.text ?? ""), ...actions(options, signal)),
    options.live ? options.noteEditor : null,
    !options.live && options.note.text ? h("p", { class: "saelab-explanation" }, options.note.text) : null,
    ...(view.explanations ?? []).map(explanation),
    stats(view),
    options.pair && comparison(view, options.pair, options.open, signal),
    h(
      "div",
      { class: "saelab-row" },
      h(
        "section",
        { class: "saelab-activations", "aria-label": "Activations" },
        h("h4", {}, "Activations ", h("small", {}, `log counts, silent ${what}s left out`)),
        plot.element,
        readout,
        density(options.overview, view),
      ),
      lens(view),
    ),
    options.live && what === "token" ? options.trial : null,
    alive ? texts(options, hover, signal) : silent(view),
    neighbours(view, options.open, signal),
  ];
  return {
    parts: parts.filter((part): part is HTMLElement => part !== null),
    tried: (largest) => plot.pin(largest),
    hover: (value) => plot.mark(value),
  };
}

/** What somebody else says of the feature, who, and how well it told where the feature fires. */
function explanation({ text, source, scores }: NonNullable<FeatureView["explanations"]>[number]): HTMLElement {
  const said = [source, ...Object.entries(scores).map(([name, value]) => `${name} ${number(value)}`)];
  return h("p", { class: "saelab-explanation" }, h("bdi", {}, text), " ", h("small", {}, said.join(", ")));
}

function actions(options: PaneOptions, signal: AbortSignal): HTMLElement[] {
  const { feature } = options.view;
  const make = (label: string, title: string, run: () => void, pressed?: boolean) =>
    button(label, run, signal, { title, "data-needs": "kernel", "aria-pressed": pressed === undefined ? null : String(pressed) });
  if (!options.live) return [];
  return [
    make("Steer", `Put sl.Steer of feature ${feature} on the session's edits`, () => options.edit("steer")),
    make("Ablate", `Put sl.Ablate of feature ${feature} on the session's edits`, () => options.edit("ablate")),
    make(options.pinned ? "Unpin" : "Pin", "Compare other features with this one", options.pin, options.pinned),
  ];
}

/** Where this feature stands among all; the axis is log10 of density, and reads as shares. */
function density(overview: Bins, view: FeatureView): HTMLElement {
  const share = (power: number) => `${Number((100 * 10 ** power).toPrecision(2))} %`;
  const plot = histogram(overview, undefined, { what: "feature", along: "density", text: share });
  if (view.density > 0) plot.pin(Math.log10(view.density));
  return h("div", { class: "saelab-density" }, h("small", {}, `density of all live features, share of ${view.unit ?? "token"}s (logarithmic); marked: this one`), plot.element);
}

function texts(options: PaneOptions, hover: (at: Hovered | null) => void, signal: AbortSignal): HTMLElement {
  const shown: Contexts = contexts(options.view, options.mode, hover, signal);
  const setMode = (mode: string) => {
    shown.mode(mode as Mode);
    options.setMode(mode as Mode);
  };
  const mode = choice("How contexts are shown", MODES, setMode, signal);
  mode.value = options.mode;
  mode.hidden = options.view.groups.every((group) => group.contexts.every(isTile));
  const beside = options.view.groups.some((group) => group.contexts.some(({ area }) => area && area[3] > 0));
  const tiles = beside ? "the bar at the left: places outside of the picture" : "a line around the strongest place";
  const about = mode.hidden ? tiles : "click a line for its whole text";
  const addWeakest = async () => {
    weakest.disabled = true;
    const found = await options.call<Context[]>("weakest", {}, { signal });
    shown.add({ label: "bottom: the smallest activations", contexts: found });
    weakest.hidden = true;
  };
  const weakest = button("Show the weakest too", () => void addWeakest(), signal, { "data-needs": "kernel" });
  return h(
    "section",
    { "aria-label": "Contexts" },
    h("div", { class: "saelab-bar-row" }, h("h4", {}, "Contexts ", h("small", {}, about)), mode, options.live ? weakest : null),
    shown.element,
  );
}

function silent(view: FeatureView): HTMLElement {
  return h(
    "section",
    { "aria-label": "Contexts" },
    h("h4", {}, "Contexts"),
    h("p", { class: "saelab-dim" }, `It fires on none of these ${counted(view.tokens_seen, view.unit ?? "token")}.`),
  );
}

function describe(at: Hovered, max: number): string {
  const share = at.value !== null && at.value > 0 && max > 0 ? `, ${percent(at.value / max)} of max` : "";
  const value = at.value !== null && at.value > 0 ? number(at.value) : valueText(at.value);
  return `${tokenLabel(at.token)} ${value}${share}`;
}
