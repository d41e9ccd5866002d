import { afterEach, describe, expect, it, vi } from "vitest";
import widget, { direction, freeze } from "../src/tokens/index";
import type { Detail, State, Text } from "../src/tokens/types";

const ATTACK = "<img src=x onerror=alert(1)>";

type Sent = { call?: number; method?: string; args?: Record<string, unknown>; cancel?: number };

/** Traits, and a Python that answers when the test says so. */
class Model {
  sent: Sent[] = [];
  saved: Record<string, unknown>[] = [];
  private dirty: Record<string, unknown> = {};
  private listeners = new Map<string, Set<(...args: unknown[]) => void>>();
  constructor(private state: Record<string, unknown>) {}
  get = (name: string) => this.state[name];
  on = (event: string, callback: () => void) => {
    this.listeners.set(event, (this.listeners.get(event) ?? new Set()).add(callback));
  };
  off = (event: string, callback: () => void) => void this.listeners.get(event)?.delete(callback);
  set = (name: string, value: unknown) => {
    if (this.state[name] === value) return;
    this.dirty[name] = this.state[name] = value;
    for (const callback of this.listeners.get(`change:${name}`) ?? []) callback();
  };
  save_changes = () => {
    this.saved.push(this.dirty);
    this.dirty = {};
  };
  send = (message: Sent) => void this.sent.push(message);
  calls = () => this.sent.filter((m) => m.call !== undefined).map(({ method, args }) => [method, args]);
  reply(value: unknown = null, kind = "done"): void {
    const { call } = this.sent.filter((m) => m.call !== undefined).at(-1)!;
    for (const callback of [...(this.listeners.get("msg:custom") ?? [])]) callback({ reply: call, kind, value });
  }
  listenerCount = () => [...this.listeners.values()].reduce((sum, set) => sum + set.size, 0);
}

const text: Text = {
  labels: ["<|endoftext|>", "The", " cat", "\n", ATTACK],
  strongest: [null, 2, 4, 0, 1],
  active: [null, 3, 8, 0, 1],
  site: "resid_post-1",
};

function detail(position: number): Detail {
  return {
    position, label: text.labels[position]!, active: 8, effects: true, note: "", target: "\n", target_is: "next",
    parts: { features: 2, error: -0.5, bias: 0.25, rest: 1, logit: 2.75 },
    rows: [
      { feature: 812, value: 4, scaled: 1.25, effect: -0.5, promoted: [[" dog", 0.5], [ATTACK, 0.25]] },
      { feature: 17, value: 2, scaled: null, effect: 2, promoted: [["\n", 1]] },
      { feature: 405, value: 1, scaled: 0.5, effect: 0.1, promoted: [] },
    ],
  };
}

function state(changes: Partial<State> = {}): State {
  return {
    prompt: "The cat", coder: "sae", coders: [{ name: "sae", site: "resid_post-1", d_sae: 1000 }], token: 2, feature: null,
    strip: "strongest", sort: "activation", target: "", text, losses: [], fires: [], names: {}, detail: detail(2), error: "", ...changes,
  };
}

let el: HTMLElement;
let model: Model;
let end: () => void = () => undefined;

function mount(changes: Partial<State> = {}): HTMLElement {
  el = document.createElement("div");
  document.body.append(el);
  model = new Model(state(changes));
  end = widget.render({ model: model as never, el });
  return one(".saelab-tokens");
}

const all = (selector: string) => [...el.querySelectorAll<HTMLElement>(selector)];
const one = <E extends HTMLElement = HTMLElement>(selector: string) => el.querySelector<E>(selector)!;
const token = (position: number) => one(`.saelab-token[data-position="${position}"]`);
const turn = () => new Promise((resolve) => setTimeout(resolve, 5));
const press = (target: HTMLElement, key: string, more: KeyboardEventInit = {}) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more }));
function type(field: HTMLInputElement | HTMLTextAreaElement, value: string, event = "input"): void {
  field.value = value;
  field.dispatchEvent(new Event(event, { bubbles: true }));
}

afterEach(() => {
  end();
  document.body.replaceChildren();
  vi.useRealTimers();
});

describe("the strip", () => {
  it("shows tokens and values, markup as text", () => {
    const root = mount();
    expect(root.dataset.ready).toBe("1");
    expect(all(".saelab-strip .saelab-token").map((t) => t.dataset.state)).toEqual(["excluded", "active", "active", "silent", "active"]);
    expect(token(4).textContent).toBe(ATTACK);
    expect(el.querySelector("img")).toBeNull();
    expect(token(2).getAttribute("aria-selected")).toBe("true");
    expect(one(".saelab-strip-readout").textContent).toBe("5 tokens, largest 4.00");
  });

  it("is coloured by what is chosen", () => {
    mount();
    const by = one<HTMLSelectElement>('[aria-label="Colour tokens by"]');
    by.value = "loss";
    by.dispatchEvent(new Event("change"));
    expect(model.saved).toEqual([{ strip: "loss" }]);
    model.set("losses", [null, 1, 2, 3, 4]);
    expect(token(0).title).toContain("no value");
    expect(token(4).title).toContain("loss 4.00 nats");
    model.set("strip", "active");
    expect(token(2).title).toContain("8 active features");
  });

  it("chooses a token, and is ready when Python has answered", () => {
    const root = mount();
    token(2).click();
    expect(root.dataset.ready).toBe("1"); // it is open
    token(1).click();
    expect(model.saved.at(-1)).toEqual({ token: 1 });
    expect(root.dataset.ready).toBe("0");
    model.set("detail", detail(1));
    expect(root.dataset.ready).toBe("1");
    expect(one("h4").textContent).toBe("Token 1 The");
    expect(token(1).getAttribute("aria-selected")).toBe("true");
  });

  it("is ready again when Python refuses", () => {
    const root = mount();
    token(1).click();
    model.set("error", "token must be a position from 0 to 0 in this prompt, got 1");
    expect(root.dataset.ready).toBe("1");
    expect(one(".saelab-error").textContent).toContain("from 0 to 0");
  });

  it("keeps bytes and special tokens from turning around in a text from right to left", () => {
    const labels = ["<|endoftext|>", "ש", "⟨D7⟩", " a"];
    mount({ text: { ...text, labels, strongest: [null, 1, 2, 0] } });
    expect(one(".saelab-strip").dir).toBe("rtl");
    expect([0, 1, 2, 3].map((i) => token(i).dir)).toEqual(["ltr", "", "ltr", ""]);
  });

  it("works by keyboard", () => {
    mount();
    token(2).focus();
    press(token(2), "ArrowRight");
    expect(document.activeElement).toBe(token(3));
    press(token(3), "Enter");
    expect(model.saved).toEqual([{ token: 3 }]);
  });

  it.each([
    [["<|endoftext|>", "שלום", " a"], [null, 1, 0], "rtl"],
    [["<|endoftext|>", "(", "مرحبا"], [null, 1, 0], "rtl"],
    [["<|endoftext|>", "日本", "語"], [null, 1, 0], "ltr"],
    [["1", "2"], [0, 0], "ltr"],
  ])("%j runs %s", (labels, values, way) => expect(direction(labels as string[], values as number[])).toBe(way));
});

describe("the list", () => {
  const order = () => all("tbody tr").map((row) => row.dataset.feature);

  it("shows features, effects and what they add up to", () => {
    mount();
    expect(order()).toEqual(["812", "17", "405"]);
    expect(one("tbody tr").textContent).toContain("−0.50");
    expect(one(".saelab-token-sum").textContent).toBe(
      "Logit of the next token ↵, centred: +2.75 = +2.00 features, −0.50 error, +0.25 bias, +1.00 rest of the stream",
    );
    expect(all("thead th").map((th) => th.getAttribute("aria-sort"))).toEqual([null, "descending", null, "none", null]);
  });

  it("sorts by effect", () => {
    mount();
    one('[data-sort="effect"]').click();
    expect(model.saved).toEqual([{ sort: "effect" }]);
    expect(order()).toEqual(["17", "812", "405"]);
  });

  it("opens a feature, with what can be done with it", async () => {
    mount();
    all("tbody .saelab-pick")[1]!.click();
    expect(model.saved).toEqual([{ feature: 17 }]);
    expect(one(".saelab-feature-about").textContent).toBe("Feature 17"); // no numbers of another one
    model.set("fires", [null, 0, 2, 0, 9]);
    model.set("strip", "feature");
    expect(one(".saelab-feature-about").textContent).toBe("Feature 17 2.00 here, at most 9.00 in this text");
    expect(one('tr[data-feature="17"]').dataset.chosen).toBe("true");
    expect(token(4).style.getPropertyValue("--saelab-share")).toBe("1.000");
    all("button").find((b) => b.textContent === "Steer")!.click();
    expect(model.calls().at(-1)).toEqual(["steer", {}]);
    model.reply("sl.Steer(sae, 17) is in session.edits, 1 on");
    await turn();
    expect(one(".saelab-feature-bar [role=status]").textContent).toContain("1 on");
  });

  it("moves by keyboard and keeps its place when it is drawn anew", () => {
    mount();
    const picks = () => all("tbody .saelab-pick");
    expect(picks().map((p) => p.tabIndex)).toEqual([0, -1, -1]);
    picks()[0]!.focus();
    press(picks()[0]!, "ArrowDown");
    expect(document.activeElement).toBe(picks()[1]);
    model.set("detail", { ...detail(2) });
    expect((document.activeElement as HTMLElement).dataset.feature).toBe("17");
  });

  it("says why there is nothing", () => {
    mount({ detail: { position: 0, label: "x", active: null, effects: false, rows: [], note: "left out by the mask" } });
    expect(one(".saelab-token-note").textContent).toBe("left out by the mask");
    expect(one("table").hidden).toBe(true);
    expect(one(".saelab-target-row").hidden).toBe(true);
  });

  it("sends a target", () => {
    mount();
    type(one<HTMLInputElement>(".saelab-target"), " Paris", "change");
    expect(model.saved).toEqual([{ target: " Paris" }]);
    expect(one<HTMLInputElement>(".saelab-target").placeholder).toBe("next: “↵”");
  });
});

describe("the prompt", () => {
  const area = () => one<HTMLTextAreaElement>("textarea");

  it("is read once typing pauses, and at once on Enter", async () => {
    vi.useFakeTimers();
    mount();
    type(area(), "The d");
    type(area(), "The dog");
    vi.advanceTimersByTime(100);
    expect(model.calls()).toEqual([]);
    vi.advanceTimersByTime(400);
    expect(model.calls()).toEqual([["read", { prompt: "The dog" }]]);
    type(area(), "The dogs");
    press(area(), "Enter", { shiftKey: true });
    press(area(), "Enter", { isComposing: true });
    vi.advanceTimersByTime(10);
    expect(model.calls().length).toBe(1);
    press(area(), "Enter");
    vi.advanceTimersByTime(1000);
    expect(model.calls().slice(1)).toEqual([["read", { prompt: "The dogs" }]]);
  });

  it("waits for Run where it is long, and refuses what is endless", async () => {
    vi.useFakeTimers();
    mount();
    type(area(), "a".repeat(5000));
    vi.advanceTimersByTime(1000);
    expect(model.calls()).toEqual([]);
    expect(one(".saelab-prompt [role=status]").textContent).toBe("5,000 characters: press Run");
    one(".saelab-run").click();
    vi.advanceTimersByTime(10);
    expect(model.calls().length).toBe(1);
    type(area(), "a".repeat(1_000_001));
    one(".saelab-run").click();
    vi.advanceTimersByTime(10);
    expect(model.calls().length).toBe(1);
    expect(one(".saelab-error").textContent).toContain("at most 1,000,000 characters");
  });

  it("shows Python's refusal, and the text that was read stays", async () => {
    const root = mount();
    type(area(), "too long");
    press(area(), "Enter");
    await turn();
    model.reply("a prompt has 20001 tokens and this model reads at most 8192", "error");
    await turn();
    expect(one(".saelab-error").textContent).toContain("reads at most 8192");
    expect(root.dataset.ready).toBe("1");
    expect(all(".saelab-strip .saelab-token").length).toBe(5);
    expect(root.dataset.stale).toBe("true"); // they are not of the text above
    expect(one(".saelab-old").textContent).toContain("Below: the text before");
    type(area(), "shorter");
    press(area(), "Enter");
    await turn();
    model.reply("", "done");
    await turn();
    expect(root.dataset.stale).toBe("false");
  });

  it("shows a chat by its messages", async () => {
    mount({ prompt: [{ role: "user", content: "Hi" }, { role: "assistant", content: "Hello" }] });
    expect(all("textarea").map((a) => a.getAttribute("aria-label"))).toEqual(["Message of user", "Message of assistant"]);
    type(all("textarea")[1] as HTMLTextAreaElement, "Bye");
    press(all("textarea")[1]!, "Enter");
    await turn();
    expect(model.calls()).toEqual([["read", { prompt: [{ role: "user", content: "Hi" }, { role: "assistant", content: "Bye" }] }]]);
    model.set("prompt", "plain");
    expect(all("textarea").length).toBe(1);
  });

  it("has an empty state", () => {
    mount({ prompt: "", text: {}, detail: {}, token: null });
    expect(one(".saelab-strip").hidden).toBe(true);
    expect(el.textContent).toContain("No text yet");
    expect(el.outerHTML).not.toContain("NaN");
  });

  it("keeps a caret that is already there", () => {
    mount();
    const before = area();
    before.focus();
    before.setSelectionRange(2, 2);
    model.set("prompt", "The cat");
    expect(area()).toBe(before);
    expect(before.selectionStart).toBe(2);
  });
});

describe("several coders", () => {
  it("are chosen from", () => {
    mount({ coders: [{ name: "a", site: "s", d_sae: 4 }, { name: "b", site: "t", d_sae: 4 }], coder: "a" });
    const coder = one<HTMLSelectElement>('[aria-label="Coder"]');
    expect(coder.hidden).toBe(false);
    coder.value = "b";
    coder.dispatchEvent(new Event("change"));
    expect(model.saved).toEqual([{ coder: "b" }]);
  });
});

it("stops listening when the view ends", () => {
  mount();
  expect(model.listenerCount()).toBeGreaterThan(0);
  end();
  expect(model.listenerCount()).toBe(0);
});

describe("a page without a kernel", () => {
  it("still opens tokens and features", () => {
    el = document.createElement("div");
    document.body.append(el);
    const pages = { "1": { ...detail(1), rows: detail(1).rows.slice(0, 1) }, "2": detail(2) };
    freeze(el, { ...state(), pages, firing: { "812": { "2": 4, "4": 1 } } });
    token(1).click();
    expect(one("h4").textContent).toBe("Token 1 The");
    one("tbody .saelab-pick").click();
    expect(token(4).style.getPropertyValue("--saelab-share")).toBe("0.250");
    expect(token(1).dataset.state).toBe("silent");
    expect(one(".saelab-tokens").dataset.connection).toBe("frozen");
    token(4).click();
    expect(one(".saelab-token-note").textContent).toContain("around the one that was open");
  });
});
