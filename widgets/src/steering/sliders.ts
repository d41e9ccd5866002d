// One slider a feature, in units of f_scale.
import { button, focusedIn, h, setText } from "../shared/dom";
import { number } from "../shared/format";
import { inWords, type Names, nameOf } from "../shared/name";
import type { SliderRow } from "./types";

export interface Sliders {
  element: HTMLElement;
  show(rows: SliderRow[], selected: number | null, d_sae: number, names: Names): void;
}

export interface SliderActions {
  /** Resolves when Python has taken it. */
  strength(key: number, strength: number): Promise<unknown>;
  switch(key: number, on: boolean): void;
  remove(key: number): void;
  select(feature: number): void;
  add(feature: number): void;
  complain(message: string): void;
}

const REACH = 4; // above 4 f_scale most text breaks; the number field takes any value
const STEP = 0.25;
const PAUSE_MS = 150;

interface Line {
  element: HTMLElement;
  show(row: SliderRow, selected: boolean, names: Names): void;
}

export function sliders(actions: SliderActions, signal: AbortSignal): Sliders {
  const list = h("ul", { class: "saelab-sliders", "aria-label": "Sliders" });
  const none = h("p", { class: "saelab-dim" }, "No sliders: add a feature by its number.");
  const input = h("input", { type: "number", min: 0, step: 1, "aria-label": "Feature to add", placeholder: "feature" });
  const lines = new Map<number, Line & { end: AbortController }>();
  let size = 0;
  let picked: number | null = null;

  const commit = () => {
    const feature = Number(input.value);
    if (input.value.trim() === "" || !Number.isInteger(feature) || feature < 0 || feature >= size) {
      actions.complain(`feature must be an int from 0 to ${size - 1}, got “${input.value}”; type a number in that range`);
      return;
    }
    actions.add(feature);
    input.value = "";
  };
  const add = button("Add", commit, signal);
  const addSelected = button("", () => picked !== null && actions.add(picked), signal, { hidden: true });
  input.addEventListener("keydown", (event) => event.key === "Enter" && commit(), { signal });

  return {
    element: h(
      "section",
      { class: "saelab-slider-box", "aria-label": "Sliders" },
      h("h4", {}, "Steering ", h("small", {}, "strength in f_scale")),
      list,
      none,
      h("div", { class: "saelab-add", "data-needs": "kernel" }, input, add, addSelected),
    ),
    show(rows, selected, d_sae, names) {
      size = d_sae;
      picked = selected;
      input.max = String(d_sae - 1);
      none.hidden = rows.length > 0;
      // A row stays the same element while it is there: what is being dragged must not be replaced.
      const keys = new Set(rows.map((row) => row.key));
      for (const [key, line] of lines) {
        if (keys.has(key)) continue;
        const focused = focusedIn(line.element);
        line.end.abort();
        line.element.remove();
        lines.delete(key);
        if (focused) input.focus({ preventScroll: true }); // else the next key goes to the notebook
      }
      for (const row of rows) {
        let line = lines.get(row.key);
        if (!line) {
          const end = new AbortController();
          signal.addEventListener("abort", () => end.abort());
          line = { ...slider(row, actions, end.signal), end };
          lines.set(row.key, line);
        }
        if (list.children[rows.indexOf(row)] !== line.element) list.insertBefore(line.element, list.children[rows.indexOf(row)] ?? null);
        line.show(row, row.features.length === 1 && row.features[0] === selected, names);
      }
      const there = rows.some((row) => row.features.length === 1 && row.features[0] === selected);
      addSelected.hidden = selected === null || there;
      setText(addSelected, `Add selected (${inWords(selected ?? 0, names)})`);
    },
  };
}

function slider(first: SliderRow, actions: SliderActions, signal: AbortSignal): Line {
  const name = first.vector || first.features.join(" + ");
  const kind = first.vector ? "vector" : "feature";
  const box = h("input", { type: "checkbox", "aria-label": `${first.vector ? "Vector" : "Feature"} ${name} on`, "data-needs": "kernel" });
  const select = () => row.features[0] !== undefined && actions.select(row.features[0]);
  const title = button(name, select, signal, { class: "saelab-feature-name", title: first.vector ? "A vector" : "Make it the selected feature" });
  const called = h("span", { class: "saelab-slider-called" });
  const amount = h("small", { class: "saelab-amount" });
  const removing = { class: "saelab-remove", "aria-label": `Remove ${kind} ${name}`, title: "Remove", "data-needs": "kernel" };
  const remove = button("×", () => actions.remove(row.key), signal, removing);
  const label = `Strength of ${kind} ${name}`;
  const range = h("input", { type: "range", min: -REACH, max: REACH, step: STEP, "aria-label": label });
  const exact = h("input", { type: "number", step: STEP, "aria-label": `${label}, exact` });
  let row = first;
  let asked = 0; // what was asked and not yet taken: its echo must not move the thumb back
  let taken = 0;
  let pause: ReturnType<typeof setTimeout> | undefined;
  signal.addEventListener("abort", () => clearTimeout(pause));

  const draw = (strength: number) => {
    const absolute = row.scales.map((scale) => number(strength * scale)).join(", ");
    const product = `${row.on ? "" : "off · "}${number(strength)} × ${row.scales.map(number).join(", ")} = ${absolute}`;
    setText(amount, row.scales.every((scale) => scale > 0) ? product : "no f_scale: it never fired");
    range.setAttribute("aria-valuetext", `${number(strength)} f_scale, ${absolute}`);
  };
  const ask = (strength: number) => {
    const mine = ++asked;
    draw(strength);
    clearTimeout(pause);
    pause = setTimeout(() => void actions.strength(row.key, strength).then(() => (taken = Math.max(taken, mine))), PAUSE_MS);
  };
  range.addEventListener(
    "input",
    () => {
      exact.value = range.value;
      ask(Number(range.value));
    },
    { signal },
  );
  exact.addEventListener(
    "input",
    () => {
      if (exact.value.trim() === "" || !Number.isFinite(Number(exact.value))) return;
      range.value = exact.value;
      ask(Number(exact.value));
    },
    { signal },
  );
  box.addEventListener("change", () => actions.switch(row.key, box.checked), { signal });
  const more = h("small", {});

  return {
    element: h(
      "li",
      { "data-key": first.key },
      h("div", { class: "saelab-slider-head" }, box, title, amount, remove),
      called,
      more,
      h("div", { class: "saelab-slider-row", "data-needs": "kernel" }, range, exact),
    ),
    show(next, selected, names) {
      row = next;
      const known = row.features.map((feature) => nameOf(names[feature], 60)).filter((name) => name !== null);
      called.replaceChildren(...known.flatMap((name, i) => (i ? [" + ", name] : [name])));
      called.hidden = known.length === 0;
      if (known.length) range.setAttribute("aria-label", `Strength of feature ${row.features.map((feature) => inWords(feature, names)).join(" + ")}`);
      box.checked = row.on;
      setText(more, row.more);
      more.hidden = row.more === "";
      box.closest("li")?.setAttribute("data-on", String(row.on));
      title.setAttribute("aria-pressed", String(selected));
      if (asked > taken) return;
      draw(row.strength);
      range.value = String(row.strength);
      if (Number(exact.value) !== row.strength || exact.value === "") exact.value = String(row.strength);
    },
  };
}
