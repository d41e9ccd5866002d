// Features that point the same way, and features that fire on the same tokens; a click opens one.
import { button, h } from "../shared/dom";
import { counted, number } from "../shared/format";
import { inWords, numbered } from "../shared/name";
import type { FeatureView } from "./types";

const COFIRING = 10;

export function neighbours(view: FeatureView, open: (feature: number) => void, signal: AbortSignal): HTMLElement {
  const near = view.neighbours.map(([feature, cosine]) => [feature, number(cosine), `cosine ${number(cosine)}`] as const);
  const together = view.cofiring
    .slice(0, COFIRING)
    .map(([feature, jaccard, both]) => [feature, number(jaccard), `Jaccard ${number(jaccard)}, ${counted(both, view.unit ?? "token")}`] as const);
  const opener = (feature: number, value: string, meaning: string) => {
    const label = `Open feature ${inWords(feature, view.names)}, ${meaning}`;
    const made = button("", () => open(feature), signal, { class: "saelab-neighbour", title: meaning, "aria-label": label });
    made.append(...numbered(feature, view.names), h("small", {}, value));
    return made;
  };
  const group = (title: string, unit: string, rows: (readonly [number, string, string])[]) =>
    h(
      "section",
      { class: "saelab-neighbours", "aria-label": title, "data-needs": "model" },
      h("h4", {}, `${title} `, h("small", {}, unit)),
      h("div", {}, ...rows.map(([feature, value, meaning]) => opener(feature, value, meaning))),
      rows.length === 0 ? h("small", {}, "none") : null,
    );
  return h(
    "div",
    { class: "saelab-row" },
    group("Nearest decoder rows", "cosine", near),
    group("Fires together with", `Jaccard index of ${view.unit ?? "token"}s`, together),
  );
}
