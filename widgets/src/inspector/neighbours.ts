// Features whose decoder rows point the same way; a click opens one.
import { h } from "../shared/dom";
import { number } from "../shared/format";

export function neighbours(
  rows: [number, number][],
  open: (feature: number) => void,
  signal: AbortSignal,
): HTMLElement {
  const buttons = rows.map(([feature, cosine]) => {
    const button = h(
      "button",
      { type: "button", class: "saelab-neighbour", "aria-label": `Open feature ${feature}, cosine ${number(cosine)}` },
      h("span", {}, String(feature)),
      h("small", {}, number(cosine)),
    );
    button.addEventListener("click", () => open(feature), { signal });
    return button;
  });
  return h(
    "section",
    { class: "saelab-neighbours", "aria-label": "Nearest decoder rows" },
    h("h4", {}, "Nearest decoder rows ", h("small", {}, "cosine")),
    h("div", {}, ...buttons),
  );
}
