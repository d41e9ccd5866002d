// One cell: its numbers, the features that carry it, and attention where it is attention's.
import { button, h } from "../shared/dom";
import { figures } from "../shared/figures";
import { integer, number } from "../shared/format";
import { inWords, type Names, numbered } from "../shared/name";
import { tokenChip } from "../shared/tokens";
import type { Features, Values, View } from "./types";

export interface DetailActions {
  patch(): void;
  feature(feature: number): void;
  attention(source: boolean): void;
}

export interface Opened {
  view: View;
  values: Values;
  kind: string;
  cell: number[];
  features: Features | undefined;
  /** By "site number". */
  names: Names;
  /** The feature last chosen here. */
  chosen: number | null;
}

export function detail(opened: Opened, actions: DetailActions, signal: AbortSignal): HTMLElement[] {
  const { view, values, kind, cell } = opened;
  const [layer, position] = cell;
  if (layer === undefined || position === undefined) {
    return [h("p", { class: "saelab-dim" }, "Click a cell: it is patched, and what carries its effect is shown here.")];
  }
  const [ours, theirs] = view.tokens[view.positions.indexOf(position)] ?? ["", ""];
  const patched = values.patched(kind, layer, position);
  const patch = button("Patch", actions.patch, signal, { "data-needs": "kernel", hidden: patched !== null });
  return [
    h("h4", { tabindex: -1 }, `${kind}, layer ${layer}, token ${position}`),
    h("p", { class: "saelab-cell-tokens" }, tokenChip(ours), ...(ours === theirs ? [] : [" ← ", tokenChip(theirs)])),
    figures(
      [
        { name: "estimate", value: h("i", {}, number(values.estimate(kind, layer, position))) },
        { name: "patched", value: patched === null ? "–" : number(patched) },
        { name: "metric", value: patched === null ? "–" : number(view.base + patched * (view.goal - view.base)) },
      ],
      "saelab-cell-numbers",
    ),
    patch,
    ...(kind.startsWith("attn") ? [attention(layer, actions, signal)] : []),
    ...(view.coders.includes(`${kind}-${layer}`) ? [features(opened, `${kind}-${layer}`, actions, signal)] : []),
  ];
}

function attention(layer: number, actions: DetailActions, signal: AbortSignal): HTMLElement {
  const opener = (name: string, source: boolean) =>
    button(name, () => actions.attention(source), signal, { "aria-label": `Attention of layer ${layer} on the ${name}` });
  return h(
    "div",
    { class: "saelab-cell-attention", "data-needs": "kernel" },
    h("span", {}, `attention of layer ${layer} on the`),
    opener("prompt", false),
    opener("source", true),
  );
}

function features({ features: found, chosen, names }: Opened, site: string, actions: DetailActions, signal: AbortSignal): HTMLElement {
  const title = h("h4", {}, "Features ", h("small", {}, "share of the change, by gradient"));
  if (!found) return h("section", { "aria-label": "Features" }, title, h("p", { class: "saelab-dim" }, "…"));
  if (found.features.length === 0) {
    const why = "No feature differs here between the two runs, or the coder's token mask leaves this token out.";
    return h("section", { "aria-label": "Features" }, title, h("p", { class: "saelab-dim" }, why));
  }
  const most = Math.max(...found.features.map(([, share]) => Math.abs(share)), Number.MIN_VALUE);
  const rows = found.features.map(([feature, share]) => {
    const bar = h("span", { class: "saelab-effect-bar", "data-sign": share < 0 ? "minus" : "plus" });
    bar.style.width = `${((100 * Math.abs(share)) / most).toFixed(1)}%`;
    const called = { [feature]: names[`${site} ${feature}`] ?? "" };
    const label = `Select feature ${inWords(feature, called)}, share ${number(share)}`;
    const pressed = { "aria-label": label, "aria-pressed": String(feature === chosen), "data-feature": feature };
    const row = button("", () => actions.feature(feature), signal, pressed);
    row.append(bar, ...numbered(feature, called), h("span", { class: "saelab-feature-share" }, number(share)));
    return h("li", {}, row);
  });
  const total = found.features.reduce((sum, [, share]) => sum + share, 0) + found.others + found.error;
  const rest = found.active - found.features.length;
  return h(
    "section",
    { "aria-label": "Features" },
    title,
    h("ul", { class: "saelab-cell-features" }, ...rows),
    h("p", { class: "saelab-dim" }, `${integer(rest)} more: ${number(found.others)}; the coder's error: ${number(found.error)}; all together: ${number(total)}`),
  );
}
