// A page of all features, from files beside it: the inspector over a list and files of a thousand features each. They
// are scripts that call `saelab`, since a page opened from disk may load scripts and nothing else.
import type { AnyModel } from "@anywidget/types";
import { h, setText } from "../shared/dom";
import { FrozenModel } from "../shared/frozen";
import { counted, integer } from "../shared/format";
import inspector from "../inspector/index";
import type { Row, Sort, State } from "../inspector/types";
import { type Chunk, type Listing, opened, row } from "./data";
import { found } from "./search";

const AT_ONCE = 100; // features listed before one scrolls on

declare global {
  // eslint-disable-next-line no-var
  var saelab: { list(data: Listing): void; features(data: Chunk): void };
}

const chunks = new Map<number, Chunk>();
const asked = new Map<number, Promise<Chunk>>();

/** The file of the features from `first` on. */
function chunk(first: number): Promise<Chunk> {
  const loading =
    asked.get(first) ??
    new Promise<Chunk>((resolve, reject) => {
      const script = h("script", { src: `features-${first}.js` });
      const fail = (why: string) => {
        asked.delete(first); // the next click tries again
        reject(new Error(`features-${first}.js ${why}`));
      };
      script.addEventListener("load", () => {
        script.remove();
        const here = chunks.get(first);
        if (here) resolve(here);
        else fail("is damaged: write the page again");
      });
      script.addEventListener("error", () => {
        script.remove();
        fail("is not beside this page: keep its folder together");
      });
      document.head.append(script);
    });
  asked.set(first, loading);
  return loading;
}

/** The feature that the address names; null where it names none, NaN where it names none of this coder. */
function named(list: Listing): number | null {
  const text = location.hash.slice(1);
  if (text === "") return null;
  return /^\d{1,9}$/.test(text) && Number(text) < list.d_sae ? Number(text) : Number.NaN;
}

async function start(list: Listing): Promise<void> {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => document.documentElement.classList.toggle("dark", dark.matches);
  dark.addEventListener("change", theme);
  theme();
  const get = async (feature: number) => opened(list, await chunk(feature - (feature % list.size)), feature);
  const wrong = () => `no feature “${location.hash.slice(1)}” here: the address ends in # and a number from 0 to ${list.d_sae - 1}`;
  const [began, at] = [location.hash, named(list)];
  const first = at === null || Number.isNaN(at) ? (list.best[0] ?? 0) : at;
  const place = document.getElementById("panel") as HTMLElement;
  const shown = await get(first).catch((error: Error) => {
    setText(place, error.message);
  });
  if (!shown) return;
  let features = found(list, "", "best");
  let length = AT_ONCE;
  const rows = new Map<number, Row>(); // the same row for the same feature: a longer list then only grows
  const rowOf = (feature: number): Row => rows.get(feature) ?? rows.set(feature, row(list, feature)).get(feature)!;
  const listed = () => features.slice(0, length).map(rowOf);
  const note = (query: string) =>
    query ? `${integer(features.length)} for “${query.length > 80 ? `${query.slice(0, 80)}…` : query}”` : `${counted(features.length, "live feature")} of ${integer(list.d_sae)}`;
  const state: State = {
    feature: first, query: "", sort: "best", results: listed(), results_note: note(""), view: shown.view, note: shown.note,
    pinned: null, pair: {}, overview: list.overview, live: false, error: Number.isNaN(at) ? wrong() : "",
  }; // prettier-ignore
  const model = new FrozenModel(state);
  const open = async () => {
    const feature = model.get("feature") as number;
    const view = model.get("view") as State["view"];
    if (feature === view.feature) return; // it is shown already
    try {
      const next = await get(feature);
      if (!next || feature !== model.get("feature")) return; // another was asked for meanwhile
      model.set("error", "");
      model.set("note", next.note);
      model.set("view", next.view);
      if (named(list) !== feature) location.hash = String(feature);
      document.title = `Feature ${feature} · ${title}`;
    } catch (error) {
      model.set("feature", view.feature);
      model.set("error", (error as Error).message);
    }
  };
  const title = document.title;
  const search = () => {
    const query = (model.get("query") as string).trim();
    try {
      features = found(list, query, model.get("sort") as Sort);
      length = AT_ONCE;
      model.set("error", "");
      model.set("results_note", note(query));
      model.set("results", listed());
    } catch (error) {
      model.set("error", (error as Error).message);
    }
  };
  model.on("change:feature", () => void open());
  model.on("change:query", search);
  model.on("change:sort", search);
  const follow = () => {
    const feature = named(list);
    if (Number.isNaN(feature)) model.set("error", wrong());
    else if (feature !== null) model.set("feature", feature);
  };
  addEventListener("hashchange", follow);
  inspector.render({ model: model as unknown as AnyModel<State>, el: place });
  if (location.hash !== began) follow(); // it changed while the first feature was on its way

  const box = place.querySelector(".saelab-results") as HTMLElement;
  const more = () => {
    if (length >= features.length) return;
    length += AT_ONCE;
    model.set("results", listed());
  };
  box.addEventListener("scroll", () => box.scrollTop + 2 * box.clientHeight > box.scrollHeight && more());
  box.addEventListener("focusin", (event) => event.target === box.lastElementChild && more());
  const slash = (event: KeyboardEvent) => {
    const typing = (event.target as Element).matches?.("input, textarea, select");
    if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    place.querySelector<HTMLElement>("[type=search]")?.focus();
  };
  addEventListener("keydown", slash, { capture: true }); // the inspector keeps its keys to itself
}

globalThis.saelab = {
  list: (data) => void start(data),
  features: (data) => chunks.set(data.first, data),
};
