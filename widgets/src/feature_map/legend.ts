// What the colours and shapes of a map mean; pressing one leaves its group alone in colour.
import { button, h, svg } from "../shared/dom";
import { integer } from "../shared/format";
import { nameOf } from "../shared/name";
import { HUES, SHAPES } from "./plot";
import type { Group } from "./types";

export interface Legend {
  element: HTMLElement;
  show(groups: Group[], alone: number | null): void;
}

// As on the canvas: a disc, a square, a triangle, a diamond.
const PATHS = ["M6 1a5 5 0 1 1-.01 0Z", "M1.5 1.5h9v9h-9Z", "M6 1 11 11H1Z", "M6 0 12 6 6 12 0 6Z"];

export function legend(choose: (group: number) => void, signal: AbortSignal): Legend {
  const element = h("div", { class: "saelab-feature_map-legend", role: "group", "aria-label": "Groups", "data-needs": "model" });
  return {
    element,
    show(groups, alone) {
      element.hidden = groups.length === 0;
      element.replaceChildren(
        ...groups.map(({ group, name, count }) => {
          const mark = svg("svg", { viewBox: "0 0 12 12", width: 11, height: 11, "aria-hidden": "true" }, svg("path", { d: PATHS[group % SHAPES] }));
          mark.style.fill = `var(--saelab-group-${group % HUES})`;
          const made = button("", () => choose(group), signal, { "aria-pressed": String(group === alone), title: "Show this group alone" });
          made.append(mark, nameOf(name, 24) ?? h("span", {}, String(group)), h("small", {}, integer(count)));
          return made;
        }),
      );
    },
  };
}
