// What all widgets stand on: calls, strips, charts, the edit list, pages without a kernel.
import { afterEach, describe, expect, it, vi } from "vitest";
import edits, { freeze } from "../src/edits/index";
import { lineChart } from "../src/shared/chart";
import { drawing } from "../src/shared/exporting";
import { FrozenModel } from "../src/shared/frozen";
import { caller, latest } from "../src/shared/rpc";
import { tokenStrip } from "../src/shared/strip";
import { ATTACK, MockModel, state } from "./mock";

const view = () => new AbortController();
const put = (element: HTMLElement) => {
  document.body.append(element);
  return element;
};
const press = (target: Element, key: string) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));

afterEach(() => {
  document.body.replaceChildren();
  vi.useRealTimers();
});

describe("calls", () => {
  const make = () => {
    const model = new MockModel(state());
    const life = view();
    return { model, life, call: caller(model as never, life.signal) };
  };

  it("bring pieces, then the answer", async () => {
    const { model, call } = make();
    const pieces: unknown[] = [];
    const answer = call("generate", { seed: 1 }, { partial: (piece) => pieces.push(piece) });
    expect(model.sent[0]).toMatchObject({ method: "generate", args: { seed: 1 } });
    model.reply("generate", "a", "partial");
    model.reply("generate", "b", "partial");
    model.reply("generate", 7);
    expect(await answer).toBe(7);
    expect(pieces).toEqual(["a", "b"]);
  });

  it("fail with Python's words", async () => {
    const { model, call } = make();
    const answer = call("score");
    model.reply("score", "type some text", "error");
    await expect(answer).rejects.toThrow("type some text");
  });

  it("do not hear answers to other calls", async () => {
    const { model, call } = make();
    const heard = vi.fn();
    void call("one").then(heard);
    model.fire("msg:custom", { reply: -5, kind: "done", value: 1 });
    model.fire("msg:custom", "nonsense");
    await Promise.resolve();
    expect(heard).not.toHaveBeenCalled();
  });

  it("are cancelled by their signal, and by the end of the view", () => {
    const { model, life, call } = make();
    const stop = view();
    void call("one", {}, { signal: stop.signal });
    void call("two");
    stop.abort();
    expect(model.sent.at(-1)).toEqual({ cancel: model.sent[0]!.call });
    life.abort();
    expect(model.sent.at(-1)).toEqual({ cancel: model.sent[1]!.call });
    expect(model.listenerCount()).toBe(0);
  });

  it("that follow each other: the last one wins", () => {
    vi.useFakeTimers();
    const life = view();
    const next = latest(100, life.signal);
    const ran: string[] = [];
    const signals: AbortSignal[] = [];
    for (const name of ["a", "b"]) next((signal) => (ran.push(name), signals.push(signal)));
    vi.advanceTimersByTime(150);
    next((signal) => (ran.push("c"), signals.push(signal)));
    expect(signals[0]!.aborted).toBe(true);
    vi.advanceTimersByTime(150);
    expect(ran).toEqual(["b", "c"]);
    next(() => ran.push("never"));
    life.abort();
    vi.advanceTimersByTime(150);
    expect(ran).toEqual(["b", "c"]);
  });
});

describe("a token strip", () => {
  const tokens = [
    { text: "<|x|>", value: null },
    { text: " cat", value: 2 },
    { text: "\n", value: 0 },
    { text: ATTACK, value: -1, note: "log-probability −1", mark: "new" },
  ];
  const cells = (element: HTMLElement) => [...element.querySelectorAll<HTMLElement>("[data-cell]")];

  it("shows values by colour, underline and words", () => {
    const strip = tokenStrip({ label: "text" }, view().signal);
    put(strip.element);
    strip.show(tokens);
    expect(cells(strip.element).map((cell) => cell.dataset.state)).toEqual(["excluded", "active", "silent", "negative"]);
    expect(cells(strip.element)[1]!.style.getPropertyValue("--saelab-share")).toBe("1.000");
    expect(cells(strip.element)[3]!.style.getPropertyValue("--saelab-share")).toBe("0.500");
    expect(cells(strip.element)[3]!.title).toContain("log-probability −1");
    expect(strip.element.querySelector("img")).toBeNull();
    expect(strip.element.dir).toBe("auto");
  });

  it("is a list to choose from, by click and by key", () => {
    const chosen: number[] = [];
    const strip = tokenStrip({ label: "text", choose: (position) => chosen.push(position) }, view().signal);
    put(strip.element);
    strip.show(tokens);
    strip.select(1);
    const [, cat, line] = cells(strip.element);
    expect(cat!.getAttribute("aria-selected")).toBe("true");
    expect(cat!.tabIndex).toBe(0);
    cat!.focus();
    press(cat!, "ArrowRight");
    expect(document.activeElement).toBe(line);
    press(line!, "Enter");
    cat!.click();
    expect(chosen).toEqual([2, 1]);
  });

  it("keeps the focus when it is drawn anew", () => {
    const strip = tokenStrip({ label: "text", choose: () => undefined }, view().signal);
    put(strip.element);
    strip.show(tokens);
    strip.select(1);
    cells(strip.element)[1]!.focus();
    strip.show(tokens);
    expect(document.activeElement).toBe(cells(strip.element)[1]);
  });
});

describe("a chart", () => {
  const series = [
    { name: "feature", x: [0, 1, 2], y: [0, 2, 4] },
    { name: "control", x: [0, 1, 2], y: [0, null, 1] },
  ];

  it("draws lines with gaps, told apart by dashes, and says its values", () => {
    const chart = lineChart({ label: "log-odds", x: "strength", width: 200, height: 100 }, view().signal);
    put(chart.element);
    chart.show(series);
    const paths = [...chart.element.querySelectorAll(".saelab-chart-plot path")];
    expect(paths[0]!.getAttribute("d")).toMatch(/^M0\.0 98\.0L100\.0 50\.0L200\.0 2\.0$/);
    expect(paths[1]!.getAttribute("d")!.match(/M[^M]*h4/g)!.length).toBe(2); // a point alone is seen
    expect(paths[1]!.getAttribute("stroke-dasharray")).not.toBe(paths[0]!.getAttribute("stroke-dasharray"));
    expect(chart.element.querySelector("svg")!.getAttribute("aria-label")).toContain("feature from 0 to 4");
  });

  it("reads out by arrows and chooses by Enter", () => {
    const chosen: number[] = [];
    const chart = lineChart({ label: "log-odds", x: "strength", choose: (x) => chosen.push(x) }, view().signal);
    put(chart.element);
    chart.show(series);
    const plot = chart.element.querySelector(".saelab-chart-plot")!;
    press(plot, "ArrowRight");
    press(plot, "ArrowRight");
    expect(chart.element.querySelector(".saelab-readout")!.textContent).toBe("strength 1.00: feature 2.00");
    press(plot, "Enter");
    expect(chosen).toEqual([1]);
  });

  it("says the value where the line is: of a flat one at the bottom, of one point in the middle", () => {
    const chart = lineChart({ label: "dead", x: "step", whole: true, zero: true, width: 200, height: 100 }, view().signal);
    put(chart.element);
    const said = () => [...chart.element.querySelectorAll(".saelab-chart-y span, .saelab-chart-x span")].map((s) => s.textContent);
    const path = () => chart.element.querySelector(".saelab-chart-plot path")!.getAttribute("d");
    chart.show([{ name: "a", x: [0, 1000], y: [0, 0] }]);
    expect([said(), path()]).toEqual([["", "0", "0", "step", "1,000"], "M0.0 98.0L200.0 98.0"]);
    chart.show([{ name: "a", x: [5], y: [3] }]);
    expect([said(), path()]).toEqual([["3.00", "0", "", "step 5", ""], "M100.0 2.0m-2 0h4"]);
  });

  it("gives the ends of its axis in digits that tell them apart", () => {
    const chart = lineChart({ label: "cosine", x: "step" }, view().signal);
    put(chart.element);
    chart.show([{ name: "a", x: [0, 1], y: [0.36118, 0.36142] }]);
    expect([...chart.element.querySelectorAll(".saelab-chart-y span")].map((s) => s.textContent)).toEqual(["0.3614", "0.3612"]);
  });

  it("is not broken by nothing", () => {
    const chart = lineChart({ label: "loss", x: "step" }, view().signal);
    put(chart.element);
    for (const empty of [[], [{ name: "a", x: [], y: [] }], [{ name: "a", x: [1], y: [null] }]]) chart.show(empty);
    expect(chart.element.innerHTML).not.toContain("NaN");
    expect(chart.element.innerHTML).not.toContain("Infinity");
  });
});

describe("the edit stack", () => {
  const rows = [
    { key: 3, on: true, label: "Steer", code: `sl.Steer(sae, 7)${ATTACK}` },
    { key: 5, on: false, label: "Ablate", code: "sl.Ablate(sae, 8)" },
  ];

  it("switches and removes", () => {
    const model = new MockModel({ ...state(), rows } as never);
    const el = put(document.createElement("div"));
    edits.render({ model: model as never, el });
    const boxes = [...el.querySelectorAll<HTMLInputElement>("input")];
    expect(boxes.map((box) => box.checked)).toEqual([true, false]);
    boxes[1]!.click();
    el.querySelectorAll<HTMLElement>("li button")[0]!.click();
    expect(model.sent.map(({ method, args }) => [method, args])).toEqual([
      ["switch", { key: 5, on: true }],
      ["remove", { key: 3 }],
    ]);
    expect(el.querySelector("img")).toBeNull();
  });

  it("keeps the focus on the edit that was switched", () => {
    const model = new MockModel({ ...state(), rows } as never);
    const el = put(document.createElement("div"));
    edits.render({ model: model as never, el });
    el.querySelectorAll<HTMLInputElement>("input")[1]!.focus();
    model.fromPython("rows" as never, [rows[0], { ...rows[1], on: true }] as never);
    expect(document.activeElement).toBe(el.querySelectorAll("input")[1]);
  });

  it("stands still in a page", async () => {
    const el = put(document.createElement("div"));
    freeze(el, { rows, error: "" });
    await Promise.resolve(); // an observer sees what was drawn
    expect(el.querySelector<HTMLElement>("ul")!.inert).toBe(true);
    expect(el.querySelectorAll("li").length).toBe(2);
  });
});

describe("the frame", () => {
  const make = (more: Record<string, unknown>) => {
    const model = new MockModel({ ...state(), rows: [], ...more } as never);
    const el = put(document.createElement("div"));
    const end = edits.render({ model: model as never, el });
    return { model, el, end, root: el.querySelector<HTMLElement>(".saelab-edits")! };
  };

  it("hides the form that a saved notebook keeps, and says where it is not renewed", () => {
    vi.useFakeTimers();
    const form = put(document.createElement("div"));
    form.className = "k1 saelab-at-1";
    const { model, el, end } = make({ _kept_key: "k1", _kept_at: 1 });
    expect(getComputedStyle(form).display).toBe("none");
    const outdated = el.querySelector<HTMLElement>(".saelab-outdated")!;
    model.fromPython("_kept_at" as never, 2 as never);
    form.className = "k1 saelab-at-2";
    vi.advanceTimersByTime(2100);
    expect(outdated.hidden).toBe(true);
    model.fromPython("_kept_at" as never, 3 as never);
    vi.advanceTimersByTime(2100);
    expect(outdated.hidden).toBe(false);
    expect(outdated.textContent).toContain("Run the cell again");
    end();
    el.remove();
    expect(getComputedStyle(form).display).not.toBe("none");
  });

  it("exports page and data as Python gives them", async () => {
    const saved: [string, Blob][] = [];
    URL.createObjectURL = (blob) => (saved.push(["", blob as Blob]), "blob:x");
    URL.revokeObjectURL = () => undefined;
    const click = vi.spyOn(HTMLAnchorElement.prototype, "click").mockImplementation(function (this: HTMLAnchorElement) {
      saved.at(-1)![0] = this.download;
    });
    const { model, el } = make({});
    const menu = el.querySelector<HTMLDetailsElement>(".saelab-export")!;
    for (const [name, value] of [["Page", "<p>a</p>"], ["Data", { rows: [] }]] as const) {
      menu.open = true;
      [...menu.querySelectorAll("button")].find((b) => b.textContent === name)!.click();
      expect(menu.open).toBe(false);
      model.reply("export", value);
      await new Promise((resolve) => setTimeout(resolve));
    }
    expect(model.sent.map(({ args }) => args?.what)).toEqual(["page", "data"]);
    expect(saved.map(([name, blob]) => [name, blob.type])).toEqual([
      ["edits.html", "text/html"],
      ["edits.json", "application/json"],
    ]);
    click.mockRestore();
  });

  it("draws itself with what is typed and with its style sheets", () => {
    const style = document.createElement("style");
    style.textContent = ".saelab { color: var(--jp-ui-font-color1); } .other { color: red; }";
    put(style);
    const { root } = make({});
    const field = document.createElement("input");
    root.append(field);
    field.value = "<b>&";
    const drawn = new DOMParser().parseFromString(drawing(root), "image/svg+xml");
    expect(drawn.querySelector("parsererror")).toBeNull();
    expect(drawn.querySelector("input")?.getAttribute("value")).toBe("<b>&");
    expect(drawn.documentElement.textContent).toContain("--jp-ui-font-color1");
    expect(drawn.documentElement.textContent).not.toContain(".other");
  });
});

describe("a frozen model", () => {
  it("answers what the page can answer, and nothing else", async () => {
    const model = new FrozenModel({ a: 1 }, (method, args) => (method === "known" ? args : undefined));
    const heard: unknown[] = [];
    model.on("msg:custom", (message) => heard.push(message));
    model.send({ call: 4, method: "known", args: { x: 1 } });
    model.send({ call: 5, method: "unknown" });
    await Promise.resolve();
    expect(heard).toEqual([{ reply: 4, kind: "done", value: { x: 1 } }]);
  });
});
