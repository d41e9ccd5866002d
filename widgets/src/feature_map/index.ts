// FeatureMap: one point a feature; a click, or the arrows and Enter, select it for the whole session.
import { h, setText } from "../shared/dom";
import { integer } from "../shared/format";
import { freezer } from "../shared/frozen";
import { onChange, send } from "../shared/model";
import { panel, widget } from "../shared/panel";
import { latest } from "../shared/rpc";
import { Cloud } from "./cloud";
import { plot } from "./plot";
import type { State } from "./types";

const HOVER_MS = 60;
const KEYS: Record<string, [number, number]> = {
  ArrowLeft: [-1, 0],
  ArrowRight: [1, 0],
  ArrowUp: [0, -1],
  ArrowDown: [0, 1],
};

const map = widget<State>((model, el, signal) => {
  const frame = panel(model, el, "feature_map", "Map of features", signal);
  const said = h("p", { class: "saelab-feature_map-said", role: "status" });
  const count = h("small");
  const stage = h("div", {
    class: "saelab-feature_map-stage",
    role: "application",
    tabindex: 0,
    "aria-label": "Features as points: arrows go to the nearest, Enter opens it",
    "data-needs": "model",
  });
  const soon = latest(HOVER_MS, signal);
  let cloud = new Cloud(model);
  let here = -1; // the point under the pointer or the keys
  let byKeys = false; // a page that scrolls under a pointer at rest moves nothing
  const drawn = plot(stage, frame.root, signal);

  const point = () => {
    const feature = model.get("feature");
    return feature === null ? -1 : cloud.indexOf(feature);
  };
  const mark = () => drawn.mark(here, point());
  const say = (text: string) => {
    setText(said, text);
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
      void asked.then((label) => label && say(`${name}: ${label}`));
    });
  };
  const choose = (index: number) => {
    if (index < 0) return;
    send(model, { feature: cloud.features[index] ?? null });
    mark();
  };

  stage.addEventListener(
    "pointermove",
    (event) => {
      if (byKeys && event.movementX === 0 && event.movementY === 0) return;
      byKeys = false;
      at(drawn.nearest(event));
    },
    { signal },
  );
  stage.addEventListener("pointerleave", () => byKeys || at(-1), { signal });
  stage.addEventListener("click", (event) => choose(drawn.nearest(event)), { signal });
  stage.addEventListener(
    "keydown",
    (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const way = KEYS[event.key];
      const from = here >= 0 ? here : point();
      byKeys = true;
      if (way) at(from < 0 ? cloud.middle() : cloud.next(from, way));
      else if (event.key === "Enter" || event.key === " ") choose(here);
      else if (event.key === "Escape") at(-1);
      else return;
      event.preventDefault();
    },
    { signal },
  );
  const show = () => {
    cloud = new Cloud(model);
    here = -2; // none that there is: the words are said anew
    setText(count, `${integer(cloud.length)} features${model.get("note") ? `; ${model.get("note")}` : ""}`);
    drawn.show(cloud);
    at(-1);
    frame.ready(true);
  };
  const follow = () => {
    here = -2;
    at(-1);
  };
  frame.root.append(
    h("div", { class: "saelab-bar-row" }, h("h3", {}, "Features"), count, frame.codeButton),
    stage,
    said,
  );
  onChange(model, ["feature"], follow, signal);
  onChange(model, ["points", "features", "groups"], show, signal);
  show();
});

const labelOf = (labels: unknown, feature: unknown): string => (labels as Record<string, string>)[String(feature)] ?? "";

export const freeze = freezer(map, undefined, (method, args, model) =>
  method === "label" ? labelOf(model.get("labels") ?? {}, args.feature) : undefined,
);
export default map;
