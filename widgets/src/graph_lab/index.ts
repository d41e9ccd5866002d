// GraphLab: an attribution graph, to be read, pruned, pinned, grouped and tested.
import { button, focusedIn, h, setText, svg } from "../shared/dom";
import { download } from "../shared/exporting";
import { counted, number, percent } from "../shared/format";
import { freezer } from "../shared/frozen";
import { choosing } from "../shared/keyboard";
import { onChange, send } from "../shared/model";
import { nameOf } from "../shared/name";
import { panel, widget } from "../shared/panel";
import { latest } from "../shared/rpc";
import { type Acts, movable, zoomButtons } from "../shared/stage";
import { type Actions, brief, called, detail, measured, tester } from "./detail";
import { Graph, type Part } from "./graph";
import { picture } from "./picture";
import { items, pinnedView, sums, words } from "./pinned";
import { coloursOf, type Plot, plot } from "./plot";
import { steeredView, testsView } from "./results";
import type { State } from "./types";

const SLIDE_MS = 120; // until Python hears of a slider
const LISTED = 100;

const lab = widget<State>((model, el, signal) => {
  const frame = panel(model, el, "graph_lab", "Attribution graph", signal);
  const graph = new Graph(model.get("view"));
  let part: Part = { nodes: [], edges: [], has: new Uint8Array(0) };
  let here = -1; // the node under the pointer or the keys
  let found: number[] = [];
  const dose = { strength: "2", here: false };
  const names = () => model.get("names");
  const nameAt = (node: number) => names()[String(node)] ?? "";
  const label = (node: number) => nameAt(node) || (graph.kind(node) === "feature" ? String(graph.feature(node)) : graph.kind(node) === "error" ? "error" : "");

  // ---- what a click or a key does

  const without = (list: number[], node: number) => (list.includes(node) ? list.filter((one) => one !== node) : [...list, node]);
  const act: Actions = {
    open: (node) => send(model, { node, edge: [] }),
    openEdge: (edge) => send(model, { edge: [graph.source(edge), graph.target(edge)] }),
    pin: (node) => send(model, { pinned: without(model.get("pinned"), node) }),
    select: (node) => send(model, { selected: without(model.get("selected"), node) }),
    rename: (number, name) => void frame.call("rename", { number, name }),
    test: (sources, targets, name = "") => begin("run_test", { sources, targets, name }),
    steer: (number, strength, only) => {
      live = { baseline: "", steered: "" };
      showSteered();
      begin("run_steer", { number, strength, here: only }, (piece) => {
        const { side, text } = piece as { side: "baseline" | "steered"; text: string };
        if (live) live[side] += text;
        showSteered();
      });
    },
    keep: (number, strength, only) => void frame.call("keep_edit", { number, strength, here: only }),
  };
  let live: { baseline: string; steered: string } | null = null;
  const begin = (method: string, args: Record<string, unknown>, partial?: (piece: unknown) => void) => {
    frame.complain("");
    void frame.call(method, args, partial ? { partial } : {});
  };

  // ---- the stage

  const stage = h("div", {
    class: "saelab-graph_lab-stage",
    role: "application",
    tabindex: 0,
    "aria-label": "Attribution graph: arrows go to the next node, Enter opens it, P pins, S selects, T tests, plus and minus zoom, 0 shows all, Shift and arrows move",
    "data-needs": "model",
  });
  const said = h("p", { class: "saelab-graph_lab-said", role: "status" });
  const drawn: Plot = plot(stage, frame.root, signal);
  const mark = () => {
    const [source, target] = model.get("edge");
    const edge = source === undefined || target === undefined ? -1 : graph.edgeOf(source, target);
    const pinned = new Set([...model.get("pinned"), ...model.get("groups").flatMap((group) => group.nodes)]);
    drawn.mark({ here, open: edge < 0 ? (model.get("node") ?? -1) : -1, edge, selected: model.get("selected"), pinned, found: new Set(found), label });
  };
  const at = (node: number) => {
    if (node === here) return;
    here = node;
    mark();
    say();
  };
  const say = () => {
    const node = here >= 0 ? here : (model.get("node") ?? -1);
    if (node < 0) return said.replaceChildren("Point at a node, or use the arrow keys.");
    const value = graph.values[node] ?? NaN;
    const facts = [Number.isFinite(value) ? `${graph.kind(node) === "logit" ? "logit" : "activation"} ${number(value)}` : "", graph.kind(node) === "logit" ? `probability ${percent(graph.chance(node))}` : `influence ${percent(graph.influence[node])}`];
    said.replaceChildren(...called(graph, node, names(), 120), h("small", {}, facts.filter(Boolean).join(", ")));
  };
  const acts: Acts = {
    hover: (event) => at(event ? drawn.nodeAt(event) : -1),
    click(event) {
      const node = drawn.nodeAt(event);
      if (node >= 0 && (event.shiftKey || event.ctrlKey || event.metaKey)) return act.select(node);
      if (node >= 0) return act.open(node);
      const edge = drawn.edgeAt(event);
      if (edge >= 0) act.openEdge(edge);
      else send(model, { node: null, edge: [], selected: [] });
    },
    key(event, way) {
      const from = here >= 0 ? here : (model.get("node") ?? -1);
      const key = event.key.toLowerCase();
      if (way) {
        at(drawn.next(from, way));
        drawn.reveal(here);
      } else if (key === "enter" && from >= 0) act.open(from);
      else if (key === "p" && from >= 0) act.pin(from);
      else if ((key === "s" || key === " ") && from >= 0) act.select(from);
      else if (key === "t" && from >= 0) {
        if (frame.connection() === "live" && !model.get("unable") && !model.get("running") && graph.kind(from) !== "logit") act.test([from], null);
      } else if (key === "escape") {
        if (here >= 0) at(-1);
        else send(model, { node: null, edge: [], selected: [] });
      } else return false;
      return true;
    },
  };
  movable(stage, drawn, acts, signal);

  // ---- bar: sliders, search, views, zoom

  const count = h("small", { class: "saelab-graph_lab-count" });
  const heard = latest(SLIDE_MS, signal);
  const slider = (trait: "nodes" | "edges", title: string) => {
    const value = h("output", { class: "saelab-graph_lab-value" });
    const made = h("input", { type: "range", min: 0, max: 1, step: 0.005, "aria-label": `${trait}: ${title}`, title });
    const show = () => setText(value, percent(Number(made.value)));
    made.addEventListener(
      "input",
      () => {
        show();
        prune();
        heard(() => send(model, { nodes: Number(nodes.made.value), edges: Number(edges.made.value) }));
      },
      { signal },
    );
    return { made, element: h("label", { "data-needs": "model" }, h("small", {}, trait), made, value), set: (share: number) => ((made.value = String(share)), show()) };
  };
  const nodes = slider("nodes", "those with most influence, up to this share of all");
  const edges = slider("edges", "those that carry most, up to this share of all");
  const hits = h("small", { role: "status" });
  const search = h("input", { type: "search", placeholder: "find a node", "aria-label": "Find nodes", spellcheck: "false", autocomplete: "off", dir: "auto" });
  const find = () => {
    const wanted = search.value.trim().toLowerCase();
    const holds = (node: number) => `${graph.title(node)} ${nameAt(node)}`.toLowerCase().includes(wanted);
    found = wanted ? part.nodes.filter(holds) : [];
    setText(hits, wanted ? `${counted(found.length, "node")}` : "");
    showList();
    mark();
  };
  search.addEventListener("input", find, { signal });
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && found.length) act.open(found[(found.indexOf(model.get("node") ?? -1) + 1) % found.length]!);
  }, { signal });
  const views = h(
    "div",
    { class: "saelab-graph_lab-views", role: "group", "aria-label": "View", "data-needs": "model" },
    button("Graph", () => send(model, { show: "graph" }), signal),
    button("Pinned", () => send(model, { show: "pinned" }), signal),
  );
  const zoom = zoomButtons(drawn, "graph_lab", signal);

  // ---- parts below the stage

  const small = h("div", { class: "saelab-graph_lab-small" });
  const side = h("div", { class: "saelab-graph_lab-detail", role: "region", "aria-label": "What is open" });
  const list = h("ul", { class: "saelab-graph_lab-list", role: "listbox", "aria-label": "Nodes, those with most influence first", "data-needs": "model" });
  const chosen = choosing(list, "position", act.open, signal);
  const listTitle = h("h4", {});
  const kept = h("div", { class: "saelab-graph_lab-kept", role: "region", "aria-label": "Pinned and groups" });
  const running = h("p", { class: "saelab-graph_lab-running", role: "status", hidden: true });
  const stop = button("Stop", () => void frame.call("stop"), signal, { "data-needs": "kernel" });
  const what = h("span", {});
  running.append(what, stop);
  const tests = h("section", { class: "saelab-graph_lab-tests", "aria-label": "Tests" });
  const steered = h("section", { class: "saelab-graph_lab-steered", "aria-label": "Steered" });

  const showList = () => {
    const focused = focusedIn(list);
    const some = search.value.trim() ? found : part.nodes;
    const order = [...some].sort((a, b) => (graph.influence[b] || 0) - (graph.influence[a] || 0));
    setText(listTitle, search.value.trim() ? "Found" : "Nodes by influence");
    list.replaceChildren(
      ...order.slice(0, LISTED).map((node) =>
        h("li", { role: "option", tabindex: -1, "data-row": true, "data-cell": true, "data-position": node, "aria-selected": "false" }, h("span", { class: "saelab-graph_lab-what" }, ...brief(graph, node, names())), h("small", {}, graph.kind(node) === "logit" ? percent(graph.chance(node)) : percent(graph.influence[node]))),
      ),
    );
    chosen.select(model.get("node"));
    if (focused) list.querySelector<HTMLElement>('[tabindex="0"]')?.focus({ preventScroll: true });
  };
  let shown = new AbortController();
  signal.addEventListener("abort", () => shown.abort());
  const showDetail = () => {
    const active = focusedIn(side);
    const focused = active?.dataset.act;
    shown.abort();
    shown = new AbortController();
    const state = { node: model.get("node"), edge: model.get("edge"), pinned: model.get("pinned"), selected: model.get("selected"), tests: model.get("tests"), unable: model.get("unable"), running: model.get("running") };
    const opened = { graph, part, names: names(), state, dose };
    side.replaceChildren(...detail(opened, act, shown.signal));
    if (active) side.querySelector<HTMLElement>(focused ? `[data-act="${focused}"]:not(:disabled)` : "h4")?.focus({ preventScroll: true });
    showKept(opened);
  };
  const showKept = (opened: Parameters<typeof detail>[0]) => {
    const [pinned, groups, selected] = [model.get("pinned"), model.get("groups"), model.get("selected")];
    const all = items(pinned, groups);
    const drop = (i: number) => {
      const item = all[i]!;
      if (item.name) send(model, { groups: groups.filter((group) => group.name !== item.name || group.nodes[0] !== item.nodes[0]) });
      else send(model, { pinned: pinned.filter((node) => node !== item.nodes[0]) });
    };
    const rows = all.map((item, i) => {
      const open = button("", () => act.open(item.nodes[0]!), shown.signal, { class: "saelab-graph_lab-row" });
      const [first, second] = words(graph, item, names());
      open.append(h("span", { class: "saelab-graph_lab-what" }, ...(item.name ? [nameOf(item.name, 40) ?? item.name, h("small", {}, ` ${second}`)] : brief(graph, item.nodes[0]!, names()))));
      const sources = item.nodes.filter((node) => graph.kind(node) !== "logit");
      const test = item.name && sources.length ? tester(opened, "Test", "Take the whole group out of the model", () => act.test(sources, null, item.name), shown.signal) : null;
      return h("li", {}, open, test, button("×", () => drop(i), shown.signal, { "aria-label": item.name ? `Dissolve the group ${item.name}` : `Unpin ${first}`, "data-needs": "model" }));
    });
    const name = h("input", { type: "text", "aria-label": "Name of the group", placeholder: "name", dir: "auto", "data-act": "group" });
    const group = () => {
      const given = name.value.trim() || nameAt(selected[0] ?? -1) || `group ${groups.length + 1}`;
      const others = groups.map((one) => ({ ...one, nodes: one.nodes.filter((node) => !selected.includes(node)) })).filter((one) => one.nodes.length);
      send(model, { groups: [...others, { name: given, nodes: selected }], selected: [] });
    };
    name.addEventListener("keydown", (event) => event.key === "Enter" && group(), { signal: shown.signal });
    const grouper = selected.length > 1 ? h("div", { class: "saelab-graph_lab-actions", "data-needs": "model" }, name, button(`Group ${selected.length} selected`, group, shown.signal)) : null;
    const hint = selected.length === 1 ? "One node is selected: select another to group them." : "Pin a node, or select several (Shift and a click) to group them.";
    kept.replaceChildren(
      h("h4", {}, "Pinned and groups"),
      grouper ?? h("p", { class: "saelab-dim" }, all.length && !selected.length ? "" : hint),
      h("ul", { class: "saelab-graph_lab-edges" }, ...rows),
      ...between(opened, all),
    );
  };
  /** Sums of edges between what is pinned, with what a test measured of them. */
  const between = (opened: Parameters<typeof detail>[0], all: ReturnType<typeof items>) => {
    const rows = sums(graph, all).slice(0, 20).map(({ from, to, weight }) => {
      const [source, target] = [all[from]!, all[to]!];
      const [a, b] = [source, target].map((item) => words(graph, item, names())[0]);
      const results = target.nodes.map((node) => measured(model.get("tests"), source.nodes, node)?.frozen);
      const result = results.every((one) => one !== undefined && one !== null) ? (results as number[]).reduce((sum, one) => sum + one, 0) : null;
      const aimed = target.nodes.filter((node) => graph.kind(node) === "feature" || graph.kind(node) === "logit");
      return h("tr", {}, h("th", { scope: "row" }, h("bdi", {}, a!), " → ", h("bdi", {}, b!)), h("td", {}, number(weight)), h("td", {}, number(result)), h("td", {}, tester(opened, "Test", "Take the source out of the model", () => act.test(source.nodes, aimed, source.name), shown.signal)));
    });
    if (!rows.length) return [];
    const head = h("tr", {}, h("th", { scope: "col" }, "edges between"), h("th", { scope: "col", title: "the sum of the edges" }, "sum"), h("th", { scope: "col", title: "the change of the target without the source" }, "without"), h("th", { scope: "col" }, h("span", { class: "saelab-sr" }, "test")));
    return [h("div", { class: "saelab-graph_lab-table", tabindex: 0, role: "region", "aria-label": "Edges between what is pinned" }, h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows)))];
  };

  const showTests = () => {
    const all = model.get("tests");
    tests.hidden = all.length === 0;
    tests.replaceChildren(h("h4", {}, "Tests ", h("small", {}, "what was taken out of the model, and how the pre-activations behind it changed")), ...testsView(graph, all, names()));
  };
  const showSteered = () => {
    const parts = steeredView(model.get("steered"), live);
    steered.hidden = parts.length === 0;
    steered.replaceChildren(h("h4", {}, "Steered"), ...parts);
  };
  const showPinned = () => {
    const pinned = model.get("show") === "pinned";
    stage.hidden = zoom.hidden = legend.hidden = pinned;
    small.hidden = !pinned;
    const all = items(model.get("pinned"), model.get("groups"));
    const buttons = [...views.children] as HTMLElement[];
    buttons.forEach((one, i) => one.setAttribute("aria-pressed", String((i === 1) === pinned)));
    setText(buttons[1]!, all.length ? `Pinned (${all.length})` : "Pinned");
    if (pinned) small.replaceChildren(pinnedView(graph, all, names(), Math.max(320, small.clientWidth || 640), act.open, signal));
  };
  const prune = () => {
    part = graph.prune(Number(nodes.made.value), Number(edges.made.value));
    if (here >= 0 && !part.has[here]) here = -1;
    setText(count, graph.said(part));
    drawn.show(graph, part);
    find();
    showDetail();
  };
  const showAll = () => {
    nodes.set(model.get("nodes"));
    edges.set(model.get("edges"));
    prune();
    say();
    showPinned();
    showTests();
    showRunning();
    frame.ready(true);
  };
  const showRunning = () => {
    if (model.get("running") === "") live = null; // it may have been refused, or stopped
    showSteered();
    running.hidden = model.get("running") === "";
    setText(what, model.get("running") === "test" ? "Testing: the model runs without the node…" : "Steering…");
  };

  // ---- handed on

  const drawing = () => {
    const inside = small.querySelector("svg");
    if (model.get("show") === "pinned" && inside) {
      const copy = inside.cloneNode(true) as SVGElement;
      copy.prepend(svg("style", {}, PLAIN));
      return new XMLSerializer().serializeToString(copy);
    }
    const layout = drawn.layout();
    const colours = coloursOf(frame.root);
    return layout ? picture(graph, part, layout, (name) => colours[name] ?? "#777", label, new Set(model.get("pinned"))) : "";
  };
  frame.exports.append(
    button("SVG", () => download("graph.svg", "image/svg+xml", drawing()), signal, { title: "The graph as lines and shapes" }),
    button("Neuronpedia", () => void frame.call<string>("neuronpedia").then((text) => download("graph.json", "application/json", text)), signal, { "data-needs": "kernel", title: "What is shown as Neuronpedia and circuit-tracer read it, with pins and groups" }),
    button("Code", () => void frame.call<string>("copy_code").then((text) => download("graph.py", "text/x-python", text)), signal, { "data-needs": "kernel", title: "The Python that computes what is shown, as a file" }),
  );
  const legend = key();
  frame.root.append(
    h("div", { class: "saelab-bar-row" }, h("h3", {}, "Attribution graph"), count, frame.codeButton),
    h("div", { class: "saelab-bar-row saelab-graph_lab-bar-row" }, views, nodes.element, edges.element, h("span", { class: "saelab-graph_lab-search", "data-needs": "model" }, search, hits), zoom),
    stage,
    small,
    said,
    legend,
    running,
    h("div", { class: "saelab-graph_lab-body" }, side, kept, h("div", { class: "saelab-graph_lab-nodes" }, listTitle, list)),
    steered,
    tests,
  );
  const follow = () => {
    here = -1;
    mark();
    drawn.reveal(model.get("node") ?? -1);
    say();
    chosen.select(model.get("node"));
    showDetail();
  };
  const again = () => (mark(), showDetail(), showPinned());
  onChange(model, ["node", "edge"], follow, signal);
  onChange(model, ["selected", "pinned", "groups", "unable"], again, signal);
  onChange(model, ["tests"], () => (showTests(), showDetail()), signal);
  onChange(model, ["steered"], showSteered, signal);
  onChange(model, ["running"], () => (showRunning(), showDetail()), signal);
  onChange(model, ["show"], showPinned, signal);
  onChange(model, ["names"], () => (again(), find(), say(), showTests()), signal);
  const thresholds = () => {
    if (Number(nodes.made.value) === model.get("nodes") && Number(edges.made.value) === model.get("edges")) return;
    nodes.set(model.get("nodes"));
    edges.set(model.get("edges"));
    prune();
  };
  onChange(model, ["nodes", "edges"], thresholds, signal);
  const resized = typeof ResizeObserver === "undefined" ? null : new ResizeObserver(() => model.get("show") === "pinned" && showPinned());
  resized?.observe(frame.root);
  signal.addEventListener("abort", () => resized?.disconnect());
  showAll();
});

/** Colours of the pinned subgraph in a file of its own. */
const PLAIN =
  "text{font:11px system-ui,sans-serif;fill:#1f2328}.saelab-graph_lab-first{font-weight:600}rect{fill:#f6f7f9;stroke:#5b6570}line{stroke:#0072b2}line[data-sign=minus]{stroke:#c2410c}.saelab-graph_lab-sums text{paint-order:stroke;stroke:#fff;stroke-width:4px}";

/** What shapes and lines mean. */
function key(): HTMLElement {
  const mark = (name: string, d: string) => svg("svg", { viewBox: "0 0 12 12", width: 11, height: 11, "aria-hidden": "true", "data-kind": name }, svg("path", { d }));
  const line = (sign: string) => svg("svg", { viewBox: "0 0 26 12", width: 26, height: 11, "aria-hidden": "true", "data-sign": sign }, svg("path", { d: "M1 6H25", "stroke-dasharray": sign === "minus" ? "5 3" : null }));
  const parts: [Element, string][] = [
    [mark("feature", "M6 1a5 5 0 1 1-.01 0Z"), "feature"],
    [mark("error", "M6 1 11 6 6 11 1 6Z"), "error"],
    [mark("token", "M1.5 1.5h9v9h-9Z"), "token"],
    [mark("logit", "M6 1 11 11H1Z"), "output"],
    [line("plus"), "adds"],
    [line("minus"), "takes away"],
  ];
  return h("p", { class: "saelab-graph_lab-legend" }, ...parts.map(([drawing, text]) => h("span", {}, drawing as unknown as Node, text)), h("span", {}, "wider: a larger part of what adds to the target"));
}

export const freeze = freezer(lab);
export default lab;
