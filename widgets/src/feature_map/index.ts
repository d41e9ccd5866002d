// FeatureMap: one point a feature; a click, or the arrows and Enter, select it for the whole session.
import { choice, h, setText } from "../shared/dom";
import { counted } from "../shared/format";
import { freezer } from "../shared/frozen";
import { onChange, send } from "../shared/model";
import { nameOf } from "../shared/name";
import { panel, widget } from "../shared/panel";
import { latest } from "../shared/rpc";
import { type Acts, movable, zoomButtons } from "../shared/stage";
import { Cloud } from "./cloud";
import { legend } from "./legend";
import { plot } from "./plot";
import type { State } from "./types";

const HOVER_MS = 60;
const SEARCH_MS = 200;

const map = widget<State>((model, el, signal) => {
  const frame = panel(model, el, "feature_map", "Map of features", signal);
  const said = h("p", { class: "saelab-feature_map-said", role: "status" });
  const count = h("small");
  const stage = h("div", {
    class: "saelab-feature_map-stage",
    role: "application",
    tabindex: 0,
    "aria-label": "Features as points: arrows go to the nearest, Enter opens it, plus and minus zoom, 0 shows all, Shift and arrows move",
    "data-needs": "model",
  });
  const soon = latest(HOVER_MS, signal);
  const typed = latest(SEARCH_MS, signal);
  let cloud = new Cloud(model);
  let here = -1; // the point under the pointer or the keys
  const drawn = plot(stage, frame.root, signal);

  const point = () => {
    const feature = model.get("feature");
    return feature === null ? -1 : cloud.indexOf(feature);
  };
  const mark = () => drawn.mark(here, point());
  const say = (text: string, name = "") => {
    said.replaceChildren(text, ...(name ? [": ", nameOf(name, 200) ?? ""] : []));
  };
  const at = (index: number) => {
    if (index === here) return;
    here = index;
    mark();
    const shown = index >= 0 ? index : point();
    if (shown < 0) {
      soon(() => undefined); // an answer that is on its way is about another
      return say("Point at a feature, or use the arrow keys.");
    }
    const name = cloud.nameOf(shown);
    say(name);
    soon((still) => {
      const asked = frame.call<string>("label", { feature: cloud.features[shown] }, { signal: still });
      void asked.then((label) => label && say(name, label));
    });
  };
  const choose = (index: number) => {
    if (index < 0) return;
    send(model, { feature: cloud.features[index] ?? null });
    mark();
  };

  // ---- search, zoom, legend
  let alone: number | null = null;
  const groups = legend((group) => {
    alone = group === alone ? null : group;
    drawn.show(cloud, alone);
    groups.show(model.get("legend"), alone);
  }, signal);
  const hits = h("small", { role: "status" });
  let hit: number[] = [];
  const search = h("input", { type: "search", placeholder: "a name, or a number", "aria-label": "Find features", spellcheck: "false", autocomplete: "off", dir: "auto" });
  const find = async (still: AbortSignal) => {
    const features = search.value.trim() ? await frame.call<number[]>("find", { text: search.value }, { signal: still }) : [];
    hit = features.map((feature) => cloud.indexOf(feature));
    drawn.found(hit);
    setText(hits, search.value.trim() ? `${counted(hit.length, "feature")} found${hit.length ? ", Enter opens the next" : ""}` : "");
  };
  search.addEventListener("input", () => typed((still) => void find(still)), { signal });
  search.addEventListener(
    "keydown",
    (event) => {
      if (event.key === "Enter" && hit.length) choose(hit[(hit.indexOf(point()) + 1) % hit.length] ?? -1);
    },
    { signal },
  );
  const colours = choice("Colour features by", [["groups", "group"], ["labels", "your labels"]], (colour) => send(model, { colour: colour as State["colour"] }), signal);
  colours.dataset.needs = "kernel";
  const acts: Acts = {
    hover: (event) => at(event ? drawn.nearest(event) : -1),
    click: (event) => choose(drawn.nearest(event)),
    key(event, way) {
      const from = here >= 0 ? here : point();
      if (way) {
        at(from < 0 ? cloud.middle() : cloud.next(from, way));
        drawn.reveal(here);
      } else if (event.key === "Enter" || event.key === " ") choose(here);
      else if (event.key === "Escape") at(-1);
      else return false;
      return true;
    },
  };
  movable(stage, drawn, acts, signal);
  const show = () => {
    cloud = new Cloud(model);
    here = -2; // none that there is: the words are said anew
    setText(count, `${counted(cloud.length, "feature")}${model.get("note") ? `; ${model.get("note")}` : ""}`);
    if (!model.get("legend").some(({ group }) => group === alone)) alone = null;
    colours.value = model.get("colour");
    groups.show(model.get("legend"), alone);
    drawn.show(cloud, alone);
    at(-1);
    frame.ready(true);
  };
  const again = (index: number) => {
    here = -2;
    at(index);
  };
  const follow = () => {
    again(-1);
    drawn.reveal(point());
  };
  frame.root.append(
    h("div", { class: "saelab-bar-row" }, h("h3", {}, "Features"), count, frame.codeButton),
    h(
      "div",
      { class: "saelab-bar-row" },
      h("span", { class: "saelab-feature_map-search", "data-needs": "model" }, search, hits),
      h("label", { "data-needs": "kernel" }, h("small", {}, "colour by "), colours),
      zoomButtons(drawn, "feature_map", signal),
    ),
    stage,
    groups.element,
    said,
  );
  onChange(model, ["feature"], follow, signal);
  onChange(model, ["names"], () => again(here), signal); // a new label of the selected one
  onChange(model, ["points", "features", "groups", "legend", "colour"], show, signal);
  show();
});

// A page without a kernel has the names of its features.
const answer = (method: string, { feature, text }: Record<string, unknown>, labels: Record<string, string>): unknown => {
  if (method === "label") return labels[String(feature)] ?? "";
  const wanted = String(text).trim().toLowerCase();
  const holds = ([number, name]: [string, string]) => number === wanted || name.toLowerCase().includes(wanted);
  return method === "find" ? Object.entries(labels).filter(holds).map(([number]) => Number(number)) : undefined;
};

export const freeze = freezer(map, undefined, (method, args, model) => answer(method, args, (model.get("labels") ?? {}) as Record<string, string>));
export default map;
