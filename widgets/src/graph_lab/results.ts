// What tests and steering found.
import { h } from "../shared/dom";
import { number, percent } from "../shared/format";
import { type Names, nameOf } from "../shared/name";
import { tokenChip } from "../shared/tokens";
import { brief, called } from "./detail";
import type { Graph } from "./graph";
import type { State, Steered, Test, TestRow } from "./types";

const COLUMNS: [keyof TestRow, string, string][] = [
  ["predicted", "predicted", "minus the edge"],
  ["frozen", "measured", "with attention, norms and all other MLPs held: the edge itself"],
  ["total", "predicted, all paths", "through the features of the graph, as if all stayed on"],
  ["responding", "measured, all paths", "with attention and norms held, while later features are made anew"],
  ["free", "nothing held", "the model as it is"],
];

export function testsView(graph: Graph, tests: Test[], names: Names): HTMLElement[] {
  return tests.map((test, i) => {
    const sources = test.name ? [h("b", {}, nameOf(test.name) ?? test.name)] : test.sources.flatMap((node, n) => [n ? "; " : "", h("b", {}, ...spaced(called(graph, node, names)))]);
    const head = COLUMNS.map(([, text, title]) => h("th", { scope: "col", title }, text));
    const rows = test.rows.map((row) =>
      h("tr", {}, h("th", { scope: "row" }, ...spaced(brief(graph, row.target, names))), ...COLUMNS.map(([name]) => h("td", {}, number(row[name])))),
    );
    const off = test.error < 1e-3 ? "predicted and measured agree" : `predicted and measured differ by up to ${percent(test.error)} of the largest effect`;
    const table = h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "change of"), ...head)), h("tbody", {}, ...rows));
    return h(
      "details",
      { class: "saelab-graph_lab-test", open: i === 0 },
      h("summary", {}, "Without ", ...sources, ": ", h("small", {}, off)),
      h("div", { class: "saelab-graph_lab-table", tabindex: 0, role: "region", "aria-label": "What changed" }, table),
    );
  });
}

const spaced = (parts: Node[]): (Node | string)[] => parts.flatMap((part, i) => (i ? [" ", part] : [part]));

/** live: the pieces that have come so far, of a steering that runs. */
export function steeredView(steered: State["steered"], live: { baseline: string; steered: string } | null): HTMLElement[] {
  const done = "code" in steered ? (steered as Steered) : null;
  const texts = live ?? done;
  if (!texts) return [];
  const side = (name: string, text: string) => h("div", {}, h("small", {}, name), h("p", { dir: "auto" }, text || "…"));
  const rows = (done && !live ? done.next : []).map(([token, before, after]) =>
    h("tr", {}, h("th", { scope: "row" }, tokenChip(token)), ...[before, after].map((chance) => h("td", {}, bar(chance), percent(chance)))),
  );
  const head = ["next token", "without", "with"].map((text) => h("th", { scope: "col" }, text));
  return [
    h("p", {}, h("code", {}, done && !live ? done.code : "…")),
    h("div", { class: "saelab-graph_lab-texts" }, side("by itself", texts.baseline), side("steered", texts.steered)),
    ...(rows.length ? [h("div", { class: "saelab-graph_lab-table", tabindex: 0, role: "region", "aria-label": "Next tokens" }, h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...rows)))] : []),
  ];
}

function bar(share: number): HTMLElement {
  const made = h("span", { class: "saelab-graph_lab-chance", "aria-hidden": "true" });
  made.style.width = `${(60 * share).toFixed(1)}px`;
  return made;
}
