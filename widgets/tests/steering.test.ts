import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import widget, { freeze } from "../src/steering/index";
import type { State } from "../src/steering/types";

const ATTACK = "<img src=x onerror=alert(1)>";

type Message = { call?: number; cancel?: number; method?: string; args?: Record<string, unknown> };

/** anywidget's model with a Python that a test plays. */
class Kernel {
  sent: Message[] = [];
  saved: Partial<State>[] = [];
  private listeners = new Map<string, Set<(...args: unknown[]) => void>>();
  private dirty: Partial<State> = {};

  constructor(public state: State) {}

  get = <K extends keyof State>(name: K) => this.state[name];
  set = <K extends keyof State>(name: K, value: State[K]) => {
    this.dirty[name] = value;
    this.put({ [name]: value });
  };
  on = (event: string, callback: () => void) => {
    this.listeners.set(event, (this.listeners.get(event) ?? new Set()).add(callback));
  };
  off = (event: string, callback: () => void) => this.listeners.get(event)?.delete(callback);
  save_changes = () => {
    this.saved.push(this.dirty);
    this.dirty = {};
  };
  send = (message: Message) => this.sent.push(message);

  /** Python sets traits: all of them stand before anybody hears of one. */
  put(values: Partial<State>): void {
    const changed = (Object.keys(values) as (keyof State)[]).filter((name) => this.state[name] !== values[name]);
    Object.assign(this.state, values);
    for (const name of changed) this.tell(`change:${name}`);
  }
  reply(call: Message | undefined, kind: string, value: unknown = null): void {
    this.tell("msg:custom", { reply: call?.call, kind, value });
  }
  calls(method: string): Message[] {
    return this.sent.filter((message) => message.method === method);
  }
  last(method: string): Message | undefined {
    return this.calls(method).at(-1);
  }
  count(): number {
    return [...this.listeners.values()].reduce((sum, set) => sum + set.size, 0);
  }
  private tell(event: string, ...args: unknown[]): void {
    for (const callback of [...(this.listeners.get(event) ?? [])]) callback(...args);
  }
}

const slider = (key: number, feature: number, strength: number, more = {}) => ({
  key, on: true, features: [feature], vector: "", strength, scales: [40], more: "", ...more,
});

function comparison() {
  const steered = [
    { text: "<|endoftext|>", mark: "prompt" as const },
    { text: "I went", mark: "prompt" as const },
    { text: " to war", mark: "new" as const },
    { text: ATTACK, mark: "" as const },
  ];
  return {
    baseline: [...steered.slice(0, 2), { text: " home", mark: "new" as const }, steered[3] as (typeof steered)[0]],
    steered,
    measures: [
      { name: "KL", group: "KL", values: [0, 0.5, 1, 2] },
      { name: "change of log-probability", group: "change", values: [null, -1, 0.25, 0.5] },
      { name: "resid_post-8 #7 with edits", group: "resid_post-8 #7", values: [0, 40, 80, 40] },
      { name: "resid_post-8 #7 without", group: "resid_post-8 #7", values: [0, 0, 20, 0] },
    ],
    perplexity: [12, 34.5],
    mean_kl: 0.875,
    next: [[" war", -5, -0.5] as [string, number, number]],
  };
}

function state(changes: Partial<State> = {}): State {
  return {
    prompt: "I went", temperature: 0, seed: 0, max_new_tokens: 30, target: [], autorun: true, sliders: [slider(0, 7, 2)],
    others: [], names: {}, selected: null, baseline: `I went home${ATTACK}`, steered: `I went to war${ATTACK}`,
    comparison: comparison(), dose: {}, version: 1, shown: 1, running: false, measuring: false, d_sae: 100, error: "",
    ...changes,
  };
}

let el: HTMLElement;
let end: () => void;

function open(changes: Partial<State> = {}): Kernel {
  const kernel = new Kernel(state(changes));
  el = document.createElement("div");
  document.body.append(el);
  end = widget.render({ model: kernel as never, el });
  return kernel;
}

const root = () => el.querySelector<HTMLElement>(".saelab-steering") as HTMLElement;
const by = <E extends HTMLElement>(label: string) => el.querySelector<E>(`[aria-label="${label}"]`) as E;
const button = (name: string) => [...el.querySelectorAll("button")].find((b) => b.textContent === name) as HTMLButtonElement;
const fire = (target: HTMLElement, type: string, init: object = {}) =>
  target.dispatchEvent(Object.assign(new Event(type, { bubbles: true, cancelable: true }), init));
const text = (side: string) => by(side).querySelector(".saelab-strip:not([hidden])")?.textContent;

beforeEach(() => void vi.useFakeTimers());
afterEach(() => {
  end();
  el.remove();
  vi.useRealTimers();
});

describe("what is there", () => {
  it("is drawn at once, and nothing is generated again", () => {
    const kernel = open();
    vi.advanceTimersByTime(1000);
    expect(kernel.calls("stream")).toHaveLength(0);
    expect(root().dataset.ready).toBe("1");
    expect(text("Baseline")).toContain("I went");
    expect(by("Steered").querySelector("[data-mark=new]")?.textContent).toBe(" to war");
    expect(el.querySelector(".saelab-summary")?.textContent).toContain("perplexity 12.0 → 34.5");
    expect(root().textContent).toContain("1 not in the other text");
  });

  it("shows markup and never runs it", () => {
    const kernel = open({ prompt: ATTACK });
    kernel.put({ others: [{ key: 5, on: true, label: ATTACK, code: ATTACK }], error: ATTACK });
    expect(el.querySelector("img")).toBeNull();
    expect(text("Steered")).toContain("<img");
  });

  it("keeps a chat a chat, and shows its template as what it is", () => {
    const chat = [{ role: "system", content: "Be brief." }, { role: "user", content: "Hi" }];
    const template = { text: "<|im_start|>", mark: "prompt" as const, role: "template" };
    const said = { text: "Hi", mark: "prompt" as const, role: "user" };
    const seen = { ...comparison(), steered: [template, said, { text: " there", mark: "new" as const }], baseline: [template, said] };
    const kernel = open({ prompt: chat, comparison: seen, steered: "user\nHi there", version: 1, shown: 1 });
    const areas = [...el.querySelectorAll("textarea")];
    expect(areas.map((area) => [area.getAttribute("aria-label"), area.value])).toEqual([["Message of system", "Be brief."], ["Message of user", "Hi"]]);
    expect(text("Steered")).toBe("<|im_start|>Hi there");
    const first = by("Steered").querySelector<HTMLElement>("[data-role]")!;
    expect([first.dataset.role, first.title]).toEqual(["template", "“<|im_start|>” of the chat template"]);
    expect(by("Steered").querySelectorAll<HTMLElement>("[data-role]")[1]?.title).toContain("of the user's message");
    areas[1]!.value = "Bye";
    fire(areas[1]!, "input");
    vi.advanceTimersByTime(600);
    expect(kernel.saved).toEqual([{ prompt: [chat[0], { role: "user", content: "Bye" }] }]);
    button("Run").click();
    vi.advanceTimersByTime(30);
    kernel.reply(kernel.last("stream"), "partial", { side: "steered", text: "!" });
    expect(text("Steered")).toBe("system: Be brief.\nuser: Bye!");
    kernel.put({ prompt: "plain" }); // from Python
    expect(el.querySelectorAll("textarea")).toHaveLength(1);
  });

  it("names a vector where it has no feature", () => {
    const kernel = open({ sliders: [slider(0, 7, 2), slider(1, 0, 1, { features: [], vector: "praise" })] });
    expect(by("Vector praise on")).not.toBeNull();
    expect(by("Strength of vector praise")).not.toBeNull();
    button("praise").click();
    expect(kernel.saved).toHaveLength(0);
    by("Remove vector praise").click();
    expect(kernel.last("remove")?.args).toEqual({ key: 1 });
  });

  it("shows strength and amount", () => {
    open();
    expect(el.querySelector(".saelab-amount")?.textContent).toBe("2.00 × 40.0 = 80.0");
    end();
    el.remove();
    const kernel = open({ sliders: [slider(0, 7, 2, { on: false })] });
    expect(el.querySelector(".saelab-amount")?.textContent).toBe("off · 2.00 × 40.0 = 80.0");
    kernel.put({ sliders: [slider(0, 7, 2, { scales: [0] })] });
    expect(el.querySelector(".saelab-amount")?.textContent).toContain("never fired");
  });
});

describe("generating", () => {
  it("begins by itself where nothing is there yet", () => {
    const kernel = open({ shown: -1 });
    expect(root().dataset.ready).toBe("0");
    vi.advanceTimersByTime(30);
    const call = kernel.last("stream");
    kernel.put({ running: true });
    expect(button("Stop")).toBeDefined();
    kernel.reply(call, "partial", { side: "steered", text: " to" });
    kernel.reply(call, "partial", { side: "baseline", text: " home" });
    kernel.reply(call, "partial", { side: "steered", text: "wards" });
    expect(text("Steered")).toBe("I went towards");
    expect(text("Baseline")).toBe("I went home");
    kernel.put({ running: false, shown: 1 });
    kernel.reply(call, "done");
    expect(root().dataset.ready).toBe("1");
    expect(text("Steered")).toContain(" to war");
  });

  it("waits for Run where it is told to", () => {
    const kernel = open({ shown: -1, autorun: false });
    vi.advanceTimersByTime(1000);
    expect(kernel.calls("stream")).toHaveLength(0);
    expect(root().dataset.ready).toBe("1");
    button("Run").click();
    vi.advanceTimersByTime(30);
    expect(kernel.calls("stream")).toHaveLength(1);
  });

  it("ends the old run when something changes, and hears no more of it", () => {
    const kernel = open({ shown: -1 });
    vi.advanceTimersByTime(30);
    const old = kernel.last("stream");
    kernel.put({ running: true });
    kernel.reply(old, "partial", { side: "steered", text: " old" });
    kernel.put({ version: 2 });
    vi.advanceTimersByTime(30);
    expect(kernel.sent.some((m) => m.cancel === old?.call)).toBe(true);
    kernel.reply(old, "partial", { side: "steered", text: " late" });
    kernel.put({ running: false }); // the old one has ended, the new one is not yet heard of
    expect(root().dataset.ready).toBe("0");
    kernel.put({ running: true });
    kernel.reply(kernel.last("stream"), "partial", { side: "steered", text: " new" });
    expect(text("Steered")).toBe("I went new");
  });

  it("stops, and what has come stays", () => {
    const kernel = open({ shown: -1 });
    vi.advanceTimersByTime(30);
    kernel.put({ running: true });
    kernel.reply(kernel.last("stream"), "partial", { side: "steered", text: " to the" });
    fire(root(), "keydown", { key: "Escape" });
    expect(kernel.calls("stop")).toHaveLength(1);
    kernel.put({ running: false });
    expect(text("Steered")).toBe("I went to the");
    expect(root().dataset.ready).toBe("1");
    vi.advanceTimersByTime(1000);
    expect(kernel.calls("stream")).toHaveLength(1);
  });

  it("says what was refused, and lets go", async () => {
    const kernel = open({ shown: -1 });
    vi.advanceTimersByTime(30);
    kernel.put({ running: true });
    kernel.put({ running: false });
    kernel.reply(kernel.last("stream"), "error", "the prompt is empty: write some text");
    await vi.advanceTimersByTimeAsync(1);
    expect(el.querySelector("[role=alert]")?.textContent).toContain("the prompt is empty");
    expect(root().dataset.ready).toBe("1");
    expect(button("Run")).toBeDefined();
  });
});

describe("sliders", () => {
  it("send the last of quick moves, and are not moved back by a late answer", () => {
    const kernel = open();
    const range = by<HTMLInputElement>("Strength of feature 7");
    for (const value of ["2.25", "2.5", "3"]) {
      range.value = value;
      fire(range, "input");
      vi.advanceTimersByTime(50);
    }
    expect(kernel.calls("set_strength")).toHaveLength(0);
    expect(el.querySelector(".saelab-amount")?.textContent).toBe("3.00 × 40.0 = 120");
    kernel.put({ sliders: [slider(0, 7, 2.25)] });
    expect(range.value).toBe("3");
    vi.advanceTimersByTime(150);
    expect(kernel.calls("set_strength").map((m) => m.args)).toEqual([{ key: 0, strength: 3 }]);
  });

  it("follow Python again once it has answered", async () => {
    const kernel = open();
    const range = by<HTMLInputElement>("Strength of feature 7");
    range.value = "3";
    fire(range, "input");
    vi.advanceTimersByTime(200);
    kernel.put({ sliders: [slider(0, 7, 3)] });
    kernel.reply(kernel.last("set_strength"), "done");
    await vi.advanceTimersByTimeAsync(1);
    kernel.put({ sliders: [slider(0, 7, -1)] });
    expect(range.value).toBe("-1");
    expect(by<HTMLInputElement>("Strength of feature 7, exact").value).toBe("-1");
  });

  it("take exact values beyond their reach", () => {
    const kernel = open();
    const exact = by<HTMLInputElement>("Strength of feature 7, exact");
    exact.value = "12.5";
    fire(exact, "input");
    vi.advanceTimersByTime(200);
    expect(kernel.last("set_strength")?.args).toEqual({ key: 0, strength: 12.5 });
    exact.value = "";
    fire(exact, "input");
    vi.advanceTimersByTime(200);
    expect(kernel.calls("set_strength")).toHaveLength(1);
  });

  it("stay the same elements while others come and go", () => {
    const kernel = open();
    const range = by("Strength of feature 7");
    kernel.put({ sliders: [slider(3, 9, 1), slider(0, 7, 2)] });
    expect(by("Strength of feature 7")).toBe(range);
    expect([...el.querySelectorAll(".saelab-feature-name")].map((e) => e.textContent)).toEqual(["9", "7"]);
    by<HTMLButtonElement>("Remove feature 9").focus();
    by<HTMLButtonElement>("Remove feature 9").click();
    expect(kernel.last("remove")?.args).toEqual({ key: 3 });
    kernel.put({ sliders: [slider(0, 7, 2)] });
    expect(document.activeElement).toBe(by("Feature to add"));
  });

  it("are switched, selected and added", () => {
    const kernel = open({ selected: 12 });
    by<HTMLInputElement>("Feature 7 on").click();
    expect(kernel.last("switch")?.args).toEqual({ key: 0, on: false });
    button("7").click();
    expect(kernel.saved.at(-1)).toEqual({ selected: 7 });
    kernel.put({ selected: 12 });
    button("Add selected (12)").click();
    expect(kernel.last("add_feature")?.args).toEqual({ feature: 12 });
    kernel.put({ selected: 7 });
    expect(button("Add selected (7)").hidden).toBe(true);
    expect(button("7").getAttribute("aria-pressed")).toBe("true");
    by<HTMLInputElement>("Feature to add").value = "100";
    button("Add").click();
    expect(el.querySelector("[role=alert]")?.textContent).toContain("from 0 to 99");
    expect(kernel.calls("add_feature")).toHaveLength(1);
  });
});

describe("the bar", () => {
  it("sends the prompt after a pause, and runs at once with Shift+Enter", () => {
    const kernel = open();
    const prompt = by<HTMLTextAreaElement>("Prompt");
    prompt.value = "I we";
    fire(prompt, "input");
    vi.advanceTimersByTime(100);
    kernel.put({ prompt: "late" });
    expect(prompt.value).toBe("I we");
    vi.advanceTimersByTime(500);
    expect(kernel.saved.at(-1)).toEqual({ prompt: "I we" });
    prompt.value = "I went on";
    fire(prompt, "input");
    fire(prompt, "keydown", { key: "Enter", shiftKey: true });
    expect(kernel.saved.at(-1)).toEqual({ prompt: "I went on" });
    vi.advanceTimersByTime(30);
    expect(kernel.calls("stream")).toHaveLength(1);
  });

  it("sends settings, and shows what Python makes of them", () => {
    const kernel = open();
    const temperature = el.querySelector<HTMLInputElement>(".saelab-settings input") as HTMLInputElement;
    temperature.value = "-1";
    fire(temperature, "change");
    expect(kernel.saved.at(-1)).toEqual({ temperature: -1 });
    kernel.put({ temperature: 0, error: "temperature must be 0 (greedy) or a positive number, got -1.0" });
    expect(temperature.value).toBe("0");
    expect(el.querySelector("[role=alert]")?.textContent).toContain("temperature must be");
  });
});

describe("the comparison", () => {
  it("shows the value that was chosen, on the scale of its group", () => {
    open();
    const select = by<HTMLSelectElement>("Value of each token");
    const strip = by("Steered text, token by token");
    const share = (i: number) => strip.querySelector<HTMLElement>(`[data-position="${i}"]`)?.style.getPropertyValue("--saelab-share");
    expect(share(3)).toBe("1.000");
    select.value = "resid_post-8 #7 without";
    fire(select, "change");
    expect(share(2)).toBe("0.250"); // 20 of the 80 that the feature reaches with the edits
    select.value = "change of log-probability";
    fire(select, "change");
    expect(strip.querySelector('[data-position="1"]')?.getAttribute("data-state")).toBe("negative");
  });

  it("reads out all values of a token, and chooses it by keyboard", () => {
    const kernel = open();
    const strip = by("Steered text, token by token");
    const token = strip.querySelector<HTMLElement>('[data-position="1"]') as HTMLElement;
    fire(token, "keydown", { key: "Enter" });
    expect(el.querySelector(".saelab-comparison .saelab-readout")?.textContent).toContain(
      "KL 0.50 · change −1.00 · resid_post-8 #7 0 → 40.0",
    );
    expect(token.getAttribute("aria-selected")).toBe("true");
    expect(kernel.last("select")?.args).toEqual({ token: 1 });
    fire(strip.querySelector('[data-position="2"]') as HTMLElement, "click");
    expect(kernel.calls("select")).toHaveLength(1); // what was generated is no token of the prompt
  });

  it("says why there is none", () => {
    open({ comparison: { note: "a text of more than 1,024 tokens is not compared" } });
    expect(root().textContent).toContain("is not compared");
    expect(el.querySelector<HTMLElement>(".saelab-comparison")?.hidden).toBe(true);
    expect(text("Steered")).toContain("I went to war");
  });
});

describe("dose and response", () => {
  const dose = {
    feature: 7, target: [" war"], prompt: "I went",
    series: [
      { name: "feature", strength: [0, 1, 2], log_odds: [-5, -3, -1], cost: [0, 0.1, 0.5] },
      { name: "random direction", strength: [0, 1, 2], log_odds: [-5, -5.1, -5], cost: [0, 0.1, 0.4] },
    ],
  };

  it("is measured on demand, tells how far it is, and stops", () => {
    const kernel = open();
    button("Dose response").click();
    const call = kernel.last("measure_dose");
    kernel.put({ measuring: true });
    kernel.reply(call, "partial", { done: 2, total: 13 });
    expect(by("Dose response").textContent).toContain("measurement 3 of 13");
    button("Stop measuring").click();
    expect(kernel.sent.at(-1)).toEqual({ cancel: call?.call });
    kernel.put({ measuring: false });
    expect(button("Dose response")).toBeDefined();
  });

  it("draws both lines, and a click takes a strength", () => {
    const kernel = open({ dose });
    const plot = el.querySelector<SVGElement>(".saelab-dose svg.saelab-chart-plot") as SVGElement;
    expect(plot.getAttribute("aria-label")).toContain("feature from −5.00 to −1.00; random direction from −5.00 to −5.00");
    expect(plot.querySelector(".saelab-marker")?.getAttribute("visibility")).toBe("visible");
    fire(plot as unknown as HTMLElement, "keydown", { key: "ArrowRight" });
    fire(plot as unknown as HTMLElement, "keydown", { key: "ArrowRight" });
    fire(plot as unknown as HTMLElement, "keydown", { key: "Enter" });
    expect(kernel.last("set_strength")?.args).toEqual({ key: 0, strength: 1 });
  });

  it("takes targets", () => {
    const kernel = open();
    const target = by<HTMLInputElement>("Target tokens, | between them");
    target.value = " war| battle";
    fire(target, "change");
    expect(kernel.saved.at(-1)).toEqual({ target: [" war", " battle"] });
  });
});

describe("presets, and the end", () => {
  it("saves and loads by name", async () => {
    const kernel = open();
    by<HTMLInputElement>("Preset file").value = "war";
    button("Save preset").click();
    expect(kernel.last("save_preset")?.args).toEqual({ name: "war" });
    kernel.reply(kernel.last("save_preset"), "done", "saved as war.json");
    await vi.advanceTimersByTimeAsync(1);
    expect(root().textContent).toContain("saved as war.json");
    button("Load preset").click();
    kernel.reply(kernel.last("load_preset"), "error", "no file war.json");
    await vi.advanceTimersByTimeAsync(1);
    expect(el.querySelector("[role=alert]")?.textContent).toBe("no file war.json");
  });

  it("cancels what runs when the view goes, and listens no more", () => {
    const kernel = open({ shown: -1 });
    vi.advanceTimersByTime(30);
    end();
    expect(kernel.sent.at(-1)).toEqual({ cancel: kernel.last("stream")?.call });
    expect(kernel.count()).toBe(0);
  });

  it("reads without a kernel", () => {
    open(); // for the clean-up
    const page = document.createElement("div");
    freeze(page, state({ shown: -1 }));
    vi.advanceTimersByTime(1000);
    expect(page.textContent).toContain("to war");
    const select = page.querySelector("select") as HTMLSelectElement;
    expect(select.closest('[data-needs="kernel"]')).toBeNull();
    expect(page.querySelector<HTMLElement>(".saelab-steering")?.dataset.connection).toBe("frozen"); // hides what needs Python
    expect(page.querySelector(".saelab-slider-row")?.getAttribute("data-needs")).toBe("kernel");
    expect(page.querySelector(".saelab-amount")?.closest('[data-needs="kernel"]')).toBeNull();
  });
});
