import axe from "axe-core";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { Graph } from "../src/graph_lab/graph";
import widget, { freeze } from "../src/graph_lab/index";
import { layout } from "../src/graph_lab/layout";
import { items, sums } from "../src/graph_lab/pinned";
import { cut, token } from "../src/graph_lab/plot";
import type { State, View } from "../src/graph_lab/types";
import { ATTACK, MockModel } from "./mock";

const base64 = (array: { buffer: ArrayBufferLike }) => btoa(String.fromCharCode(...new Uint8Array(array.buffer)));
const nan = NaN;

// Two tokens, two layers: features 0 (layer 0), 1 and 2 (layer 1), an error of layer 0 (3), tokens 4 and 5, outputs 6, 7.
const EDGES: [number, number, number][] = [
  [4, 0, 3], [5, 1, -1], [0, 1, 2], [0, 2, 0.02], [1, 6, 4], [2, 7, 0.5], [3, 6, -1], [5, 7, 0.1],
];
const view = (): View => ({
  counts: [3, 1, 2, 2],
  layers: 2,
  tokens: ["<|endoftext|>", ATTACK],
  outputs: [" Paris", ATTACK],
  weights: [0.9, 0.1],
  offered: [0, 1],
  left: [7, 1200],
  places: base64(new Int32Array([0, 1, 11, 1, 1, 12, 1, 1, 13, 0, 1, -1, -1, 0, 0, -1, 1, 5, 2, 1, 100, 2, 1, 101])),
  values: base64(new Float32Array([1.5, 2, 0.1, nan, nan, nan, 7, 3])),
  influence: base64(new Float32Array([0.52, 0.72, 0.08, 0.18, 0.52, 0.25, 0, 0])),
  incoming: base64(new Float32Array([4, 3, 0.1, 0, 0, 0, 6, 0.6])),
  sources: base64(new Uint32Array(EDGES.map(([from]) => from))),
  targets: base64(new Uint32Array(EDGES.map(([, to]) => to))),
  effects: base64(new Float32Array(EDGES.map(([, , weight]) => weight))),
});
const given = (changes: Partial<State> = {}): State => ({
  view: view(), node: null, edge: [], selected: [], pinned: [], groups: [], nodes: 1, edges: 1, show: "graph",
  tests: [], steered: {}, running: "", unable: "", names: { "1": ATTACK }, error: "", ...changes,
});

let model: MockModel;
let el: HTMLElement;
let end: () => void;
let calls: string[];
const mount = (changes: Partial<State> = {}) => {
  model = new MockModel(given(changes) as never);
  el = document.createElement("div");
  document.body.append(el);
  end = widget.render({ model: model as never, el });
};
const stage = () => el.querySelector<HTMLElement>(".saelab-graph_lab-stage") as HTMLElement;
const said = () => el.querySelector(".saelab-graph_lab-said")?.textContent;
const side = () => el.querySelector<HTMLElement>(".saelab-graph_lab-detail") as HTMLElement;
const named = (root: ParentNode, text: string) => [...root.querySelectorAll<HTMLButtonElement>("button")].find((one) => one.textContent === text)!;
const key = (name: string, more: KeyboardEventInit = {}) => {
  const event = new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true, ...more });
  stage().dispatchEvent(event);
  return event.defaultPrevented;
};
const pointer = (type: string, clientX: number, clientY: number, more: MouseEventInit = {}) => stage().dispatchEvent(new MouseEvent(type, { bubbles: true, clientX, clientY, ...more }));
const trait = (name: string, value: unknown) => model.fromPython(name as never, value as never);
// The stage is 448 by 308: 400 by 200 for nodes, four rows of 50, from tokens below to outputs on top.
const WIDTH = 448;
const HEIGHT = 308;
const at = (node: number): [number, number] => {
  const graph = new Graph(view());
  const found = layout(graph, graph.prune(1, 1), 400, 200);
  return [34 + (found.x[node] ?? 0), 74 + (found.y[node] ?? 0)];
};

beforeEach(() => {
  vi.useFakeTimers();
  calls = [];
  const context = new Proxy({} as Record<string, unknown>, {
    get: (target, name) => target[String(name)] ?? ((...args: unknown[]) => (calls.push(`${String(name)} ${args[0]}`), { width: 10 })),
    set: (target, name, value) => ((target[String(name)] = value), true),
  });
  vi.stubGlobal("Path2D", class {
    moveTo() {}
    lineTo() {}
    arc() {}
    rect() {}
    closePath() {}
  });
  vi.spyOn(HTMLCanvasElement.prototype, "getContext").mockReturnValue(context as never);
  vi.spyOn(HTMLElement.prototype, "clientWidth", "get").mockReturnValue(WIDTH);
  vi.spyOn(HTMLElement.prototype, "clientHeight", "get").mockReturnValue(HEIGHT);
  mount();
});

afterEach(() => {
  end();
  document.body.replaceChildren();
  vi.restoreAllMocks();
  vi.unstubAllGlobals();
  vi.useRealTimers();
});

describe("the graph", () => {
  const graph = () => new Graph(view());

  it("knows kinds, places and words", () => {
    expect([0, 3, 4, 6].map((node) => graph().kind(node))).toEqual(["feature", "error", "token", "logit"]);
    expect(graph().title(1)).toBe(`layer 1, feature 12 at “${ATTACK}” (1)`);
    expect([graph().title(3), graph().title(6)]).toEqual([`layer 0, error at “${ATTACK}” (1)`, "output “·Paris”"]);
    expect(graph().portion(0)).toBeCloseTo(3 / 4);
    expect([graph().edgeOf(0, 1), graph().edgeOf(1, 0)]).toEqual([2, -1]);
  });

  it("prunes as graph.prune of Python does", () => {
    expect(graph().prune(1, 1).nodes).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
    // By influence 1, 0 and 4 make up .77 of all, with 5 it is .89: feature 2 and the error go, and with them their edges.
    const some = graph().prune(0.8, 1);
    expect(some.nodes).toEqual([0, 1, 4, 5, 6, 7]);
    expect(some.edges).toEqual([0, 1, 2, 4, 7]);
    // Edges then carry .9 (1 to 6), .6 (4 to 0 and 0 to 1), .3 (5 to 1) and .1 (5 to 7) of 2.5: three make up .84, four .96.
    expect(graph().prune(0.8, 0.95).edges).toEqual([0, 1, 2, 4]);
    expect(graph().prune(0.8, 0.83).edges).toEqual([0, 2, 4]);
    // Without an edge out, a feature goes.
    expect(graph().prune(0.8, 0.3).nodes).toEqual([4, 5, 6, 7]);
  });

  it("stands in columns and rows", () => {
    const found = layout(graph(), graph().prune(1, 1), 400, 200);
    expect(found.y[4]).toBeGreaterThan(found.y[0]!);
    expect(found.y[0]).toBe(found.y[3]); // an error stands beside the features of its layer
    expect(found.y[1]).toBeLessThan(found.y[0]!);
    expect(found.x[4]).toBeLessThan(found.x[5]!);
    expect(found.x[2]! - found.x[1]!).toBeGreaterThan(found.radius[1]! + found.radius[2]!);
    expect(Math.max(...found.nodes.map((node) => found.x[node]!))).toBeLessThan(400);
  });

  it("sums the edges between what is pinned", () => {
    const all = items([6, 0, 1], [{ name: "both", nodes: [1, 3] }]);
    expect(all.map((item) => item.nodes)).toEqual([[1, 3], [6], [0]]);
    const found = sums(graph(), all).map(({ from, to, weight }) => [from, to, Number(weight.toFixed(3))]);
    expect(found).toEqual([[0, 1, 3], [2, 0, 2]]);
  });

  it("cuts texts between letters, and shows what is not seen", () => {
    expect(cut("👨‍👩‍👧‍👦👨‍👩‍👧‍👦👨‍👩‍👧‍👦", 2)).toBe("👨‍👩‍👧‍👦…");
    expect([token(" bank"), token("\n"), token(""), token("  ")]).toEqual(["bank", "↵", "∅", "··"]);
  });
});

describe("the widget", () => {
  it("draws nodes and edges, and says how many", () => {
    expect(el.querySelector(".saelab-graph_lab")?.getAttribute("data-ready")).toBe("1");
    expect(el.textContent).toContain("8 of 8 nodes, 8 of 8 edges; 7 weak nodes and 1,200 weak edges were not sent");
    expect(calls.filter((name) => name.startsWith("stroke ")).length).toBeGreaterThan(5);
    expect(calls).toContain("fillText Paris .90");
    expect(el.querySelector("img")).toBeNull();
  });

  it("says what the pointer is on, and opens it by a click", () => {
    pointer("pointermove", ...at(1));
    expect(said()).toBe(`layer 1, feature 12 at “${ATTACK}” (1)${ATTACK}activation 2.00, influence 72 %`);
    pointer("click", ...at(1));
    expect(model.saved.at(-1)).toEqual({ node: 1, edge: [] });
    expect(side().querySelector("h4")?.textContent).toContain("feature 12");
    expect([...side().querySelectorAll("section")].map((one) => one.getAttribute("aria-label"))).toEqual(["Edges into it", "Edges out of it"]);
    expect(side().querySelectorAll("section")[0]!.textContent).toContain("2.00");
  });

  it("selects by Shift and a click, and groups", () => {
    pointer("click", ...at(1), { shiftKey: true });
    pointer("click", ...at(2), { shiftKey: true });
    expect(model.saved.at(-1)).toEqual({ selected: [1, 2] });
    const name = el.querySelector<HTMLInputElement>("[aria-label='Name of the group']")!;
    name.value = "two of layer 1";
    named(el, "Group 2 selected").click();
    expect(model.saved.at(-1)).toEqual({ groups: [{ name: "two of layer 1", nodes: [1, 2] }], selected: [] });
    named(el.querySelector(".saelab-graph_lab-kept")!, "Test").click();
    expect(model.sent.at(-1)).toMatchObject({ method: "run_test", args: { sources: [1, 2], targets: null, name: "two of layer 1" } });
    el.querySelector<HTMLElement>("[aria-label^='Dissolve']")!.click();
    expect(model.saved.at(-1)).toEqual({ groups: [] });
  });

  it("opens the edge under the pointer", () => {
    const [[ax, ay], [bx, by]] = [at(4), at(0)];
    pointer("click", (ax + bx) / 2, (ay + by) / 2 + 2);
    expect(model.saved.at(-1)).toEqual({ edge: [4, 0] });
    expect(side().querySelector("h4")?.textContent).toBe("Edge that adds");
    named(side(), "Test").click();
    expect(model.sent.at(-1)).toMatchObject({ method: "run_test", args: { sources: [4], targets: [0] } });
    trait("edge", [3, 6]);
    expect(side().querySelector("h4")?.textContent).toBe("Edge that takes away");
    pointer("click", 300, 20); // nothing is there
    expect(model.saved.at(-1)).toMatchObject({ edge: [] });
  });

  it("works by keys: from node to node, open, pin, select, test", () => {
    expect(key("ArrowUp")).toBe(true); // at first the node with most influence
    expect(said()).toContain("feature 12");
    key("ArrowDown");
    expect(said()).toContain("layer 0");
    key("ArrowUp");
    key("Enter");
    expect(model.saved.at(-1)).toMatchObject({ edge: [] });
    key("p");
    key("s");
    expect(model.saved.slice(-2)).toEqual([{ pinned: [model.get("node" as never)] }, { selected: [model.get("node" as never)] }]);
    key("t");
    expect(model.sent.at(-1)).toMatchObject({ method: "run_test", args: { targets: null } });
    key("Escape");
    expect([model.get("node" as never), model.get("selected" as never)]).toEqual([null, []]);
    expect([key("q"), key("ArrowUp", { ctrlKey: true })]).toEqual([false, false]); // the page's own
  });

  it("prunes at once, and tells Python a little later", () => {
    const slider = el.querySelector<HTMLInputElement>("input[type=range]")!;
    for (const value of ["0.9", "0.8"]) {
      slider.value = value;
      slider.dispatchEvent(new Event("input"));
    }
    expect(el.textContent).toContain("6 of 8 nodes");
    expect(model.saved).toEqual([]);
    vi.advanceTimersByTime(200);
    expect(model.saved).toEqual([{ nodes: 0.8 }]);
    trait("nodes", 1);
    expect(el.textContent).toContain("8 of 8 nodes");
  });

  it("has a list of nodes, which a search shortens", () => {
    const rows = () => [...el.querySelectorAll<HTMLElement>("[role=option]")];
    expect(rows().map((row) => row.dataset.position)).toEqual(["1", "0", "4", "5", "3", "2", "6", "7"]);
    const search = el.querySelector<HTMLInputElement>("input[type=search]")!;
    search.value = "0, ERROR";
    search.dispatchEvent(new Event("input"));
    expect(rows().map((row) => row.dataset.position)).toEqual(["3"]);
    search.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
    expect(model.get("node" as never)).toBe(3);
    rows()[0]!.click();
    expect(rows()[0]!.getAttribute("aria-selected")).toBe("true");
  });

  it("shows the pinned subgraph, and opens what stands in it", () => {
    trait("pinned", [0, 1, 6]);
    named(el, "Pinned (3)").click();
    expect(model.saved.at(-1)).toEqual({ show: "pinned" });
    expect(stage().hidden).toBe(true);
    const boxes = () => [...el.querySelectorAll<SVGElement>(".saelab-graph_lab-pinned g[role=button]")];
    expect(boxes().map((box) => box.getAttribute("data-kind"))).toEqual(["feature", "feature", "logit"]);
    expect(el.querySelectorAll(".saelab-graph_lab-pinned line")).toHaveLength(2);
    boxes()[1]!.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    expect(model.saved.at(-1)).toEqual({ node: 1, edge: [] });
    const sum = [...el.querySelectorAll(".saelab-graph_lab-kept tbody tr")].map((row) => row.textContent);
    expect(sum).toEqual([`${ATTACK} → Paris4.00–Test`, `feature 11 → ${ATTACK}2.00–Test`]);
    trait("tests", [{ sources: [1], name: "", error: 1e-6, rows: [{ target: 6, predicted: -4, frozen: -3.99, total: null, responding: -4, free: -2.5 }] }]);
    expect(el.querySelector(".saelab-graph_lab-kept tbody tr")!.textContent).toContain("−3.99");
    expect(el.querySelector(".saelab-graph_lab-tests")!.textContent).toContain("−2.50");
    expect(el.querySelector(".saelab-graph_lab-tests")!.textContent).toContain("predicted and measured agree");
  });

  it("renames, steers and shows what comes", async () => {
    trait("node", 1);
    const label = side().querySelector<HTMLInputElement>("[aria-label=Label]")!;
    label.value = "rivers";
    label.dispatchEvent(new Event("change"));
    expect(model.sent.at(-1)).toMatchObject({ method: "rename", args: { number: 1, name: "rivers" } });
    named(side(), "Steer").click();
    expect(model.sent.at(-1)).toMatchObject({ method: "run_steer", args: { number: 1, strength: 2, here: false } });
    trait("running", "steer");
    model.reply("run_steer", { side: "steered", text: ATTACK }, "partial");
    const shown = () => el.querySelector(".saelab-graph_lab-steered")!;
    expect(shown().textContent).toContain(ATTACK);
    trait("running", "");
    expect((shown() as HTMLElement).hidden).toBe(true); // nothing has come of it yet
    trait("steered", { node: 1, strength: 2, here: false, code: "sl.Steer(coder, 12)", baseline: "a", steered: "b", next: [[" x", 0.5, 0.25]] });
    model.reply("run_steer", null);
    await vi.runAllTimersAsync();
    expect(shown().textContent).toContain("sl.Steer(coder, 12)");
    expect(shown().querySelector("tbody")!.textContent).toContain("25 %");
    named(side(), "Ablate").click();
    expect(model.sent.at(-1)).toMatchObject({ method: "run_steer", args: { strength: null } });
    trait("running", "steer");
    expect(named(side(), "Steer").disabled).toBe(true);
    named(el, "Stop").click();
    expect(model.sent.at(-1)).toMatchObject({ method: "stop" });
  });

  it("says why nothing can be tested", () => {
    end();
    mount({ unable: "no model", node: 1 });
    expect(side().textContent).toContain("no model");
    expect(named(side(), "Test").disabled).toBe(true);
    key("t");
    expect(model.sent).toEqual([]);
  });

  it("zooms and moves, and a drag opens nothing", () => {
    const wheel = (more: WheelEventInit) => stage().dispatchEvent(new WheelEvent("wheel", { deltaY: -120, cancelable: true, ...more }));
    expect(wheel({})).toBe(true); // the page scrolls
    expect(wheel({ ctrlKey: true })).toBe(false);
    expect(Number(stage().dataset.zoom)).toBeCloseTo(Math.E, 1);
    key("0");
    const [x, y] = at(1);
    pointer("pointerdown", x, y);
    pointer("pointermove", x - 40, y);
    pointer("pointerup", x - 40, y);
    pointer("click", x - 40, y);
    expect(model.saved).toEqual([]);
    pointer("click", x - 40, y, {}); // still that drag's
    pointer("pointerdown", x - 40, y);
    pointer("click", x - 40, y);
    expect(model.saved.at(-1)).toEqual({ node: 1, edge: [] }); // the node has moved along
  });

  it("gives a drawing whose texts are text", async () => {
    const made: string[] = [];
    const read = (blob: Blob) => {
      const reader = new FileReader();
      reader.addEventListener("load", () => made.push(String(reader.result)));
      reader.readAsText(blob);
      return "blob:x";
    };
    vi.useRealTimers();
    Object.assign(URL, { createObjectURL: read, revokeObjectURL: () => undefined });
    trait("pinned", [1]);
    named(el, "SVG").click();
    await vi.waitFor(() => expect(made).toHaveLength(1));
    const drawn = new DOMParser().parseFromString(made[0]!, "image/svg+xml");
    expect([drawn.querySelectorAll("line").length, drawn.querySelectorAll("circle, rect[stroke], polygon").length]).toEqual([8, 8]);
    expect(drawn.querySelector("img, script, parsererror")).toBeNull();
  });

  it("has no fault that axe finds", async () => {
    trait("pinned", [0, 1]);
    trait("node", 1);
    trait("tests", [{ sources: [1], name: "", error: 0.2, rows: [{ target: 6, predicted: -4, frozen: -3, total: null, responding: null, free: null }] }]);
    for (const show of ["graph", "pinned"]) {
      trait("show", show);
      vi.useRealTimers();
      const found = await axe.run(el, { rules: { "color-contrast": { enabled: false }, region: { enabled: false } } });
      expect(found.violations.map((fault) => `${fault.id} ${fault.nodes[0]?.html}`)).toEqual([]);
    }
  });

  it("stops with its view", () => {
    end();
    expect(model.listenerCount()).toBe(0);
  });

  it("works in a page without a kernel", async () => {
    const page = document.createElement("div");
    document.body.append(page);
    freeze(page, { ...given({ node: 1 }) });
    const slider = page.querySelector<HTMLInputElement>("input[type=range]")!;
    slider.value = "0.8";
    slider.dispatchEvent(new Event("input"));
    await vi.advanceTimersByTimeAsync(10);
    expect(page.textContent).toContain("6 of 8 nodes");
    expect(page.querySelector<HTMLElement>(".saelab-graph_lab-stage")?.inert).toBeFalsy();
    expect(named(page, "Test").inert).toBe(true);
    named(page.querySelector(".saelab-graph_lab-detail")!, "Pin").click();
    expect(page.textContent).toContain("Pinned (1)");
  });
});
