// Both texts, token above token, and where they part.
import { h, setText } from "../shared/dom";
import { counted } from "../shared/format";
import { tokenLabel, tokenNodes } from "../shared/tokens";
import type { Sides } from "./types";

export interface SidesView {
  element: HTMLElement;
  show(sides: Sides): void;
}

export function sidesView(): SidesView {
  const list = h("ol", { class: "saelab-sides", "aria-label": "Tokens of source and prompt, side by side" });
  const note = h("p", { class: "saelab-dim", role: "status" });
  return {
    element: h("div", { class: "saelab-sides-box" }, h("div", { class: "saelab-sides-frame" }, names(), list), note),
    show(sides) {
      list.replaceChildren(...sides.pairs.map(pair));
      const [ours, theirs] = sides.lengths;
      const apart = sides.pairs.filter(([a, b]) => a !== b).length;
      const differ = apart === 0 ? "none differs" : `${apart} ${apart === 1 ? "differs" : "differ"} (marked ≠)`;
      const parted = ours !== theirs;
      const gaps = `The prompt has ${counted(ours, "token")}, the source ${theirs}: a patch needs as many in both. Gaps (–) show where they part.`;
      setText(note, parted ? gaps : `${counted(ours, "token")} each, ${differ}`);
      note.classList.toggle("saelab-caution", parted);
    },
  };
}

function names(): HTMLElement {
  return h("div", { class: "saelab-sides-names", "aria-hidden": "true" }, h("span", {}, "source"), h("span", {}, "prompt"), h("span", {}, ""));
}

function pair([ours, theirs]: [string | null, string | null]): HTMLElement {
  const differ = ours !== theirs;
  const side = (token: string | null, name: string) =>
    h(
      "span",
      { class: token === null ? "saelab-side saelab-side-gap" : "saelab-side", title: `${name}: ${token === null ? "no token here" : tokenLabel(token)}` },
      ...(token === null ? ["–"] : tokenNodes(token, "dot")),
    );
  return h(
    "li",
    { "data-differ": differ },
    side(theirs, "source"),
    side(ours, "prompt"),
    h("span", { class: "saelab-side-mark", "aria-hidden": "true" }, differ ? "≠" : ""),
  );
}
