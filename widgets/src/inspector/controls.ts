// The bar on top: which feature, a search, and the order of the list.
import { button, choice, h, setText } from "../shared/dom";
import { integer } from "../shared/format";
import type { Sort } from "./types";

export interface Controls {
  element: HTMLElement;
  show(feature: number, d_sae: number, unit: string): void;
  showSearch(query: string, sort: Sort): void;
}

export interface ControlActions {
  open(feature: number): void;
  search(query: string): void;
  sort(by: Sort): void;
  complain(message: string): void;
}

const SORTS: [Sort, string][] = [
  ["best", "most readable"],
  ["density", "density"],
  ["max", "max activation"],
  ["norm", "norm at f_scale"],
];
// Long enough to type a word without a query per letter, short enough to feel direct.
const SEARCH_PAUSE_MS = 250;

export function controls(actions: ControlActions, signal: AbortSignal): Controls {
  let features = 0;
  let current = 0;

  const id = h("input", { type: "number", class: "saelab-feature", min: 0, step: 1, "aria-label": "Feature number" });
  const step = (text: string, by: number, title: string) =>
    button(text, () => actions.open(current + by), signal, { "aria-label": title, title });
  const previous = step("‹", -1, "Previous feature");
  const next = step("›", 1, "Next feature");
  const total = h("span", { class: "saelab-dim" });
  const search = h("input", {
    type: "search",
    class: "saelab-search",
    placeholder: "1 to 3 words, or a longer sentence, or density>0.1% label:word",
    title:
      "One to three words: features that fire on them. Four or more, or quotation marks: a sentence, and what fires in it. " +
      "Conditions: density, norm, max, mean, count with > or <; label: text of your notes",
    "aria-label": "Search features",
    spellcheck: "false",
    autocomplete: "off",
  });
  const sort = choice("Sort features by", SORTS, (by) => actions.sort(by as Sort), signal);

  const commit = () => {
    const feature = Number(id.value);
    if (id.value.trim() !== "" && Number.isInteger(feature) && feature >= 0 && feature < features) {
      actions.open(feature);
      return;
    }
    actions.complain(`feature must be an int from 0 to ${features - 1}, got “${id.value}”; type a number in that range`);
    id.value = String(current);
  };
  id.addEventListener("change", commit, { signal });

  let pause: ReturnType<typeof setTimeout> | undefined;
  let asked = "";
  const ask = () => {
    clearTimeout(pause);
    if (search.value === asked) return;
    asked = search.value;
    actions.search(asked);
  };
  search.addEventListener(
    "input",
    () => {
      clearTimeout(pause);
      pause = setTimeout(ask, SEARCH_PAUSE_MS);
    },
    { signal },
  );
  search.addEventListener("keydown", (event) => event.key === "Enter" && ask(), { signal });
  signal.addEventListener("abort", () => clearTimeout(pause));

  const element = h(
    "div",
    { class: "saelab-controls", "data-needs": "model" },
    h("div", { class: "saelab-stepper", role: "group", "aria-label": "Open a feature" }, previous, id, next),
    total,
    search,
    h("label", { class: "saelab-sort" }, "sort by ", sort),
  );
  return {
    element,
    show(feature, d_sae, unit) {
      if (unit === "place") {
        search.placeholder = "density<1% label:word";
        search.title = "Conditions: density, norm, max, mean, count with > or <; label: text of your notes";
        (sort.options[0] as HTMLOptionElement).text = "most selective";
      }
      current = feature;
      features = d_sae;
      id.value = String(feature);
      id.max = String(d_sae - 1);
      previous.disabled = feature <= 0;
      next.disabled = feature >= d_sae - 1;
      setText(total, `of ${integer(d_sae)}`);
    },
    showSearch(query, by) {
      // A late answer must not take away what the user typed meanwhile.
      if (query !== asked) {
        asked = query;
        search.value = query;
      }
      sort.value = by;
    },
  };
}
