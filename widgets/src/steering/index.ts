// SteeringSliders: features on sliders, the text with and without them, and what the edits change in it.
import { h, setText } from "../shared/dom";
import { editList } from "../shared/editlist";
import { freezer } from "../shared/frozen";
import { onChange, send } from "../shared/model";
import { panel, widget } from "../shared/panel";
import { promptWords } from "../shared/prompt";
import { latest } from "../shared/rpc";
import { bar } from "./bar";
import { comparison } from "./comparison";
import { dose } from "./dose";
import { presets } from "./presets";
import { sliders } from "./sliders";
import { texts } from "./texts";
import type { Side, State } from "./types";

// Several traits may change at once: one run is for all of them.
const GATHER_MS = 20;

const steering = widget<State>((model, el, signal) => {
  const frame = panel(model, el, "steering", "Steering sliders", signal);
  const newest = latest(GATHER_MS, signal);
  const row = (feature: number | undefined) => model.get("sliders").find((r) => r.features.length === 1 && r.features[0] === feature);

  let began = -1; // the version that is on its way, or was stopped on it
  let waiting = false; // for texts
  const run = () => {
    began = model.get("version");
    waiting = true;
    frame.complain("");
    frame.ready(false);
    newest((mine) => {
      columns.begin(promptWords(model.get("prompt")));
      const partial = (value: unknown) => {
        const { side, text } = value as { side: Side; text: string };
        columns.hear(side, text);
      };
      void frame.call("stream", {}, { signal: mine, partial });
    });
  };
  const act = (method: string, args: Record<string, unknown>) => {
    frame.complain("");
    return frame.call(method, args);
  };
  const set = (values: Partial<State>) => {
    frame.complain("");
    send(model, values);
  };

  const stop = () => {
    waiting = false;
    void frame.call("stop");
  };

  const top = bar({ set, run, stop }, frame.codeButton, signal);
  const rows = sliders(
    {
      strength: (key, strength) => act("set_strength", { key, strength }),
      switch: (key, on) => void act("switch", { key, on }),
      remove: (key) => void act("remove", { key }),
      select: (feature) => set({ selected: feature }),
      add: (feature) => void act("add_feature", { feature }),
      complain: frame.complain,
    },
    signal,
  );
  const list = editList(
    { switch: (key, on) => void act("switch", { key, on }), remove: (key) => void act("remove", { key }) },
    signal,
  );
  const others = h("section", { class: "saelab-others", "aria-label": "Other edits" }, h("h4", {}, "Other edits of the session"), list.element);
  const columns = texts(signal);
  const strip = comparison((token) => {
    if (model.get("comparison").steered?.[token]?.mark === "prompt") void frame.call("select", { token });
  }, signal);
  let dosing = new AbortController();
  const measured = dose(
    {
      measure: () => {
        frame.complain("");
        dosing = new AbortController();
        const partial = (value: unknown) => {
          const { done, total } = value as { done: number; total: number };
          measured.progress(done, total);
        };
        void frame.call("measure_dose", {}, { signal: dosing.signal, partial });
      },
      stop: () => dosing.abort(),
      target: (target) => set({ target }),
      choose: (strength) => {
        const found = row(model.get("dose").feature);
        if (found) void act("set_strength", { key: found.key, strength });
      },
    },
    signal,
  );
  const how = h("p", { class: "saelab-dim saelab-how" });

  const showControls = () => {
    top.show({
      prompt: model.get("prompt"),
      temperature: model.get("temperature"),
      seed: model.get("seed"),
      max_new_tokens: model.get("max_new_tokens"),
      autorun: model.get("autorun"),
      running: model.get("running"),
    });
    const greedy = model.get("temperature") === 0;
    const sampled = `temperature ${model.get("temperature")}, seed ${model.get("seed")}`;
    setText(how, `${greedy ? "greedy" : sampled}, at most ${model.get("max_new_tokens")} new tokens`);
  };
  const showSliders = () => {
    rows.show(model.get("sliders"), model.get("selected"), model.get("d_sae"), model.get("names"));
    list.show(model.get("others"));
    others.hidden = model.get("others").length === 0;
    measured.mark(row(model.get("dose").feature)?.strength ?? null);
  };
  const showDose = () => {
    measured.show(model.get("dose"), model.get("target"), model.get("names"));
    measured.busy(model.get("measuring"));
    measured.mark(row(model.get("dose").feature)?.strength ?? null);
  };
  const current = () => model.get("shown") === model.get("version");
  const showTexts = () => {
    if (model.get("running")) return;
    // What was stopped stays as far as it came.
    if (current() || began !== model.get("version")) {
      columns.show(model.get("baseline"), model.get("steered"), model.get("comparison"));
      strip.show(model.get("comparison"));
      columns.stale(!current());
    }
    strip.stale(!current());
    if (current()) waiting = false;
    frame.ready(!waiting);
  };
  const changed = () => {
    if (current()) return;
    columns.stale(true);
    strip.stale(true);
    if (model.get("autorun") && frame.connection() === "live") run();
  };

  const body = h(
    "div",
    { class: "saelab-body" },
    h("div", { class: "saelab-side" }, rows.element, others),
    h("div", { class: "saelab-main" }, columns.element, how),
  );
  const foot = presets(
    { save: (name) => act("save_preset", { name }) as Promise<string>, load: (name) => act("load_preset", { name }) as Promise<string> },
    signal,
  );
  frame.root.prepend(top.element);
  frame.root.append(body, strip.element, h("div", { class: "saelab-foot" }, measured.element, foot));
  frame.root.addEventListener("keydown", (event) => event.key === "Escape" && model.get("running") && stop(), { signal });

  onChange(model, ["prompt", "temperature", "seed", "max_new_tokens", "autorun", "running"], showControls, signal);
  onChange(model, ["sliders", "others", "selected", "d_sae", "names"], showSliders, signal);
  onChange(model, ["shown", "running"], showTexts, signal);
  onChange(model, ["dose", "target", "measuring", "names"], showDose, signal);
  onChange(model, ["version"], changed, signal);
  onChange(model, ["error"], () => showControls(), signal); // a refused setting is put right
  showControls();
  showSliders();
  showDose();
  showTexts();
  if (model.get("autorun") && !current() && frame.connection() === "live") run();
});

export const freeze = freezer(steering);
export default steering;
