import axe from "axe-core";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { Cloud } from "../src/feature_map/cloud";
import widget, { freeze } from "../src/feature_map/index";
import { ATTACK, MockModel } from "./mock";

const base64 = (array: { buffer: ArrayBufferLike }) => btoa(String.fromCharCode(...new Uint8Array(array.buffer)));
const FULL = 65535;

/** A cross: left, right, top, bottom, and one in the middle. */
const given = () => ({
  feature: null as number | null,
  points: base64(new Uint16Array([0, 0.5, 1, 0.5, 0.5, 0, 0.5, 1, 0.5, 0.5].map((share) => share * FULL))),
  features: base64(new Uint32Array([7, 12, 3, 90_000, 5])),
  groups: base64(new Int16Array([-1, 0, 0, 3, -1])),
  note: "3 in 2 groups",
  colour: "groups",
  names: {},
  legend: [
    { group: 0, name: "", count: 2 },
    { group: 3, name: ATTACK, count: 1 },
  ],
  error: "",
});

let model: MockModel;
let el: HTMLElement;
let end: () => void;
const stage = () => el.querySelector<HTMLElement>(".saelab-feature_map-stage") as HTMLElement;
const said = () => el.querySelector(".saelab-feature_map-said")?.textContent;
const key = (name: string, more: KeyboardEventInit = {}) => {
  const event = new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true, ...more });
  stage().dispatchEvent(event);
  return event.defaultPrevented;
};
const pointer = (type: string, clientX: number, clientY: number) =>
  stage().dispatchEvent(new MouseEvent(type, { bubbles: true, clientX, clientY }));
const saved = () => model.saved.map((values) => values.feature);

/** What was drawn, by the name of the call. */
let calls: string[];

beforeEach(() => {
  vi.useFakeTimers();
  calls = [];
  const context = new Proxy({} as Record<string, unknown>, {
    get: (target, name) => target[String(name)] ?? (() => void calls.push(String(name))),
    set: (target, name, value) => ((target[String(name)] = value), true),
  });
  vi.spyOn(HTMLCanvasElement.prototype, "getContext").mockReturnValue(context as never);
  vi.spyOn(HTMLElement.prototype, "clientWidth", "get").mockReturnValue(220);
  vi.spyOn(HTMLElement.prototype, "clientHeight", "get").mockReturnValue(120);
  model = new MockModel(given() as never);
  el = document.createElement("div");
  document.body.append(el);
  end = widget.render({ model: model as never, el });
});

afterEach(() => {
  end();
  document.body.replaceChildren();
  vi.restoreAllMocks();
  vi.useRealTimers();
});

describe("the cloud", () => {
  const cloud = () => new Cloud({ get: (name: keyof ReturnType<typeof given>) => given()[name] } as never);

  it("knows places, features and groups", () => {
    expect([cloud().length, cloud().x(1), cloud().y(2)]).toEqual([5, 1, 0]);
    expect([cloud().indexOf(90_000), cloud().indexOf(8)]).toEqual([3, -1]);
    expect([cloud().nameOf(3), cloud().nameOf(4)]).toEqual(["Feature 90000, group 3", "Feature 5"]);
  });

  it("finds the nearest, by the distances of the screen", () => {
    expect(cloud().nearest(0.3, 0.2, 1, 1)).toBe(2); // the top is nearest on a square
    expect(cloud().nearest(0.3, 0.2, 1, 100)).toBe(2);
    expect(cloud().nearest(0.3, 0.4, 1, 100)).toBe(4); // by far the nearest in height, the left comes after it
    expect(cloud().nearest(0.3, 0.2, 200, 100, 12)).toBe(-1);
    expect(cloud().middle()).toBe(4);
  });

  it("walks to the next in a direction, and stays at the rim", () => {
    expect([[-1, 0], [1, 0], [0, -1], [0, 1]].map((way) => cloud().next(4, way as never))).toEqual([0, 1, 2, 3]);
    expect(cloud().next(0, [-1, 0])).toBe(0);
    expect(cloud().next(0, [1, 0])).toBe(4);
    expect(cloud().next(2, [1, 0])).toBe(1); // aslant: nothing lies more to the right than below
  });

  it("may be empty", () => {
    const none = new Cloud({ get: () => "" } as never);
    expect([none.length, none.middle(), none.nearest(0, 0, 1, 1)]).toEqual([0, -1, -1]);
  });
});

describe("the widget", () => {
  it("draws every point, grey ones as specks", () => {
    expect(el.querySelector(".saelab-feature_map")?.getAttribute("data-ready")).toBe("1");
    expect(calls.filter((name) => name === "fillRect")).toHaveLength(2);
    expect(calls.filter((name) => name === "fill")).toHaveLength(3);
    expect(el.textContent).toContain("5 features; 3 in 2 groups");
  });

  it("says what the pointer is on, with what Python knows of it", async () => {
    pointer("pointermove", 209, 61);
    expect(said()).toBe("Feature 12, group 0");
    vi.advanceTimersByTime(100);
    expect(model.sent[0]).toMatchObject({ method: "label", args: { feature: 12 } });
    model.reply("label", ATTACK);
    await vi.runAllTimersAsync();
    expect(said()).toBe(`Feature 12, group 0: ${ATTACK}`);
    expect(el.querySelector("img")).toBeNull();
    pointer("pointermove", 60, 20); // nothing there
    expect(said()).toContain("Point at a feature");
  });

  it("asks anew when the selected feature has another name", async () => {
    model.fromPython("feature", 12);
    vi.advanceTimersByTime(100);
    model.reply("label", "cats");
    await vi.runAllTimersAsync();
    model.fromPython("names" as never, { 12: "dogs" } as never);
    vi.advanceTimersByTime(100);
    model.reply("label", "dogs");
    await vi.runAllTimersAsync();
    expect(said()).toBe("Feature 12, group 0: dogs");
  });

  it("does not say what comes when the pointer has left", async () => {
    pointer("pointermove", 209, 61);
    vi.advanceTimersByTime(100);
    pointer("pointerleave", 0, 0);
    model.reply("label", "late");
    await vi.runAllTimersAsync();
    expect(said()).toContain("Point at a feature");
  });

  it("asks once for a pointer that runs over many", () => {
    for (const x of [10, 110, 210]) pointer("pointermove", x, 60);
    vi.advanceTimersByTime(100);
    expect(model.sent.filter((message) => message.method === "label")).toHaveLength(1);
  });

  it("selects by a click", () => {
    pointer("click", 110, 11);
    pointer("click", 60, 20); // nothing there
    expect(saved()).toEqual([3]);
  });

  it("selects by keys: from the middle to the nearest, Enter opens", () => {
    expect(key("ArrowRight")).toBe(true);
    expect(said()).toContain("Feature 5");
    key("ArrowDown");
    expect(said()).toContain("Feature 90000");
    expect(saved()).toEqual([]);
    key("Enter");
    expect(saved()).toEqual([90_000]);
    expect([key("a"), key("ArrowUp", { ctrlKey: true })]).toEqual([false, false]); // the page's own keys
  });

  it("keeps to the keys while the page moves under a pointer at rest", () => {
    key("ArrowRight");
    pointer("pointerleave", 0, 0);
    key("Enter");
    expect(saved()).toEqual([5]);
    pointer("pointermove", 110, 11); // until it is moved
    expect(said()).toContain("Feature 3");
    pointer("pointerleave", 0, 0);
    expect(said()).toContain("Feature 5");
  });

  it("follows Python", () => {
    calls = [];
    model.fromPython("feature" as never, 12 as never);
    expect(said()).toBe("Feature 12, group 0");
    expect(calls).toContain("stroke");
    key("ArrowLeft"); // from there
    expect(said()).toContain("Feature 5");
    key("Escape");
    expect(said()).toContain("Feature 12");
    model.fromPython("feature" as never, 8 as never); // one that is not on the map
    expect(said()).toContain("Point at a feature");
    model.fromPython("features" as never, base64(new Uint32Array([1, 2, 3, 4, 8])) as never);
    expect(said()).toContain("Feature 8");
  });

  it("finds features by name, rings them, and Enter opens one after the other", () => {
    const box = el.querySelector<HTMLInputElement>("input[type=search]")!;
    box.value = "war";
    box.dispatchEvent(new Event("input"));
    vi.advanceTimersByTime(200);
    expect(model.sent.at(-1)).toMatchObject({ method: "find", args: { text: "war" } });
    model.reply("find", [3, 5]);
    return vi.waitFor(() => {
      expect(el.querySelector(".saelab-feature_map-search small")!.textContent).toBe("2 features found, Enter opens the next");
      for (const feature of [3, 5, 3]) {
        box.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
        expect(model.saved.at(-1)).toEqual({ feature });
      }
    });
  });

  it("zooms to a place, moves, and shows all again", () => {
    const wheel = (more: WheelEventInit) => stage().dispatchEvent(new WheelEvent("wheel", { deltaY: -120, cancelable: true, ...more }));
    expect(wheel({})).toBe(true); // the page scrolls
    expect(wheel({ ctrlKey: true })).toBe(false);
    expect(Number(stage().dataset.zoom)).toBeCloseTo(Math.E, 1);
    expect(key("+") && key("0")).toBe(true);
    expect(stage().dataset.zoom).toBe("1.00");
    for (const _ of [1, 2]) key("+");
    pointer("pointerdown", 50, 50);
    pointer("pointermove", 80, 50);
    pointer("pointerup", 80, 50);
    pointer("click", 80, 50);
    expect(model.saved).toEqual([]); // a drag chooses nothing
    expect(el.querySelector("[aria-label=Larger]")).not.toBeNull();
  });

  it("has a legend, whose groups can stand alone, and colours by label", () => {
    const groups = () => [...el.querySelectorAll<HTMLElement>(".saelab-feature_map-legend button")];
    expect(groups().map((one) => one.textContent)).toEqual(["02", `${ATTACK.slice(0, 23)}…1`]);
    groups()[1]!.click();
    expect(groups().map((one) => one.getAttribute("aria-pressed"))).toEqual(["false", "true"]);
    const colours = el.querySelector<HTMLSelectElement>("select")!;
    colours.value = "labels";
    colours.dispatchEvent(new Event("change"));
    expect(model.saved.at(-1)).toEqual({ colour: "labels" });
  });

  it("draws anew in the other theme", async () => {
    const root = el.querySelector<HTMLElement>(".saelab-feature_map") as HTMLElement;
    calls = [];
    root.dataset.saelabTheme = "dark";
    const width = vi.spyOn(HTMLElement.prototype, "clientWidth", "get").mockReturnValue(0); // JupyterLab hides it meanwhile
    await Promise.resolve();
    width.mockReturnValue(220);
    await vi.advanceTimersByTimeAsync(50);
    expect(calls).toContain("fillRect");
  });

  it("has no fault that axe finds", async () => {
    vi.useRealTimers();
    const found = await axe.run(el, { rules: { "color-contrast": { enabled: false }, region: { enabled: false } } });
    expect(found.violations.map((fault) => fault.id)).toEqual([]);
  });

  it("stops with its view", () => {
    end();
    expect(model.listenerCount()).toBe(0);
  });

  it("works in a page without a kernel", async () => {
    const page = document.createElement("div");
    document.body.append(page);
    freeze(page, { ...given(), feature: 3, labels: { 3: "cats" } });
    await vi.runAllTimersAsync();
    expect(page.querySelector(".saelab-feature_map-said")?.textContent).toBe("Feature 3, group 0: cats");
    expect(page.querySelector<HTMLElement>(".saelab-feature_map-stage")?.inert).toBeFalsy();
  });
});
