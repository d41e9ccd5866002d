import axe from "axe-core";
import { beforeEach, describe, expect, it, vi } from "vitest";
import widget, { freeze } from "../src/patching/index";
import { asCsv } from "../src/patching/exporting";
import { type State, Values, type View } from "../src/patching/types";
import { short } from "../src/shared/heat";

const ATTACK = "<img src=x onerror=alert(1)>";

/** Traits, messages both ways; `sent` lists what went to Python. */
class Kernel {
  sent: Record<string, unknown>[] = [];
  private listeners = new Map<string, Set<(...args: unknown[]) => void>>();

  constructor(public state: State) {}

  get = <K extends keyof State>(name: K): State[K] => this.state[name];
  set = <K extends keyof State>(name: K, value: State[K]): void => {
    this.state[name] = value;
    this.tell(`change:${name}`);
  };
  on = (event: string, callback: () => void) => this.listeners.set(event, (this.listeners.get(event) ?? new Set()).add(callback));
  off = (event: string, callback: () => void) => this.listeners.get(event)?.delete(callback);
  save_changes = () => undefined;
  send = (message: Record<string, unknown>) => this.sent.push(message);
  tell = (event: string, ...args: unknown[]) => {
    for (const callback of [...(this.listeners.get(event) ?? [])]) callback(...args);
  };

  calls = (method: string) => this.sent.filter((message) => message.method === method);
  async answer(method: string, value: unknown, kind = "done"): Promise<void> {
    this.tell("msg:custom", { reply: this.calls(method).at(-1)?.call, kind, value });
    await Promise.resolve();
    await new Promise((resolve) => setTimeout(resolve));
  }
  listenerCount = () => [...this.listeners.values()].reduce((sum, set) => sum + set.size, 0);
}

const view = (): View => ({
  prompt: `The ${ATTACK}`,
  source: "The fox",
  measure: "logit difference",
  right: " the",
  wrong: " sea",
  metric: "logit difference ' the' − ' sea'",
  measures: [["logit difference", "logit difference", "right", "wrong"], ["log-probability", "log-probability", "right"], ["KL from the source", "KL from the source"]],
  base: -2,
  goal: 2,
  kinds: ["resid_post", "attn_out"],
  layers: [0, 1, 2],
  positions: [1, 2, 3],
  tokens: [["The", "The"], [ATTACK, " fox"], [" to", " to"]],
  roles: [],
  estimate: [
    [[0, 0.5, 0.001], [0, -0.25, 0.1], [0, 0, 1]],
    [[0, 0.1, 0], [0, 0.2, 0], [0, 0.3, 0]],
  ],
  coders: ["resid_post-1"],
  sides: { pairs: [["^", "^"], ["The", "The"], [ATTACK, " fox"], [" to", " to"]], lengths: [4, 4], right: [" the"], wrong: [" sea"] },
});

const state = (changes: Partial<State> = {}): State => ({
  view: view(), truth: [["resid_post", 2, 3, 0.875]], joint: [], kind: "resid_post", cell: [], feature: null, features: {}, names: {}, progress: [], error: "", ...changes,
});

let kernel: Kernel;
let el: HTMLElement;
let end: () => void;
const root = () => el.querySelector<HTMLElement>(".saelab-patching") as HTMLElement;
/** By row from the top and column. */
const cell = (row: number, column: number) => el.querySelector<HTMLElement>(`[data-cell][data-row="${row}"][data-column="${column}"]`) as HTMLElement;
const button = (name: string) => [...el.querySelectorAll("button")].find((b) => (b.getAttribute("aria-label") ?? b.textContent)?.startsWith(name)) as HTMLButtonElement;
const key = (target: Element, name: string, more: KeyboardEventInit = {}) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true, ...more }));
const pointer = (target: Element, type: string, more: MouseEventInit = {}) =>
  target.dispatchEvent(new MouseEvent(type, { bubbles: true, buttons: 1, ...more }));
const focused = () => {
  const { row, column } = (document.activeElement as HTMLElement).dataset;
  return [Number(row), Number(column)];
};

function open(changes: Partial<State> = {}): void {
  document.body.replaceChildren();
  el = document.body.appendChild(document.createElement("div"));
  kernel = new Kernel(state(changes));
  end = widget.render({ model: kernel as never, el });
}

beforeEach(() => open());

describe("the grid", () => {
  it("shows estimates slanted and patches solid, the last layer on top", () => {
    expect(root().dataset.ready).toBe("1");
    expect([...el.querySelectorAll('[role="rowheader"]')].map((e) => e.textContent)).toEqual(["2", "1", "0"]);
    expect(cell(0, 2).hasAttribute("data-sure")).toBe(true);
    expect(cell(0, 2).textContent).toContain(".88");
    expect(cell(0, 2).getAttribute("aria-label")).toBe("layer 2, “·to”: patched 0.88, estimate 1.00");
    expect(cell(1, 1).hasAttribute("data-sure")).toBe(false);
    expect(cell(1, 1).textContent).toContain("−.25");
    expect(cell(1, 1).dataset.sign).toBe("minus");
    expect(cell(1, 1).getAttribute("aria-label")).toContain(`“${ATTACK}” ← “·fox”: estimate −0.25`);
    expect(el.querySelector("img")).toBeNull();
  });

  it.each([[{ value: 0.294, sure: false }, ".29"], [{ value: -1.004, sure: true }, "−1.00"], [{ value: 0.001, sure: true }, "0"], [{ value: 0.001, sure: false }, ""], [{ value: null, sure: false }, ""]])(
    "%j reads %s",
    (value, text) => expect(short(value)).toBe(text),
  );

  it("patches a cell on a click and on Enter, and opens it; a patched one is only opened", () => {
    cell(1, 1).click();
    expect(kernel.calls("patch_cells")[0]?.args).toEqual({ cells: [["resid_post", 1, 2]] });
    expect(kernel.state.cell).toEqual([1, 2]);
    expect(root().dataset.ready).toBe("0");
    key(cell(2, 0), "Enter");
    expect(kernel.calls("patch_cells")[1]?.args).toEqual({ cells: [["resid_post", 0, 1]] });
    cell(0, 2).click();
    expect(kernel.calls("patch_cells")).toHaveLength(2);
    expect(kernel.state.cell).toEqual([2, 3]);
  });

  it("is ready again once the truth is there", async () => {
    cell(1, 1).click();
    kernel.set("progress", [0, 1]);
    kernel.set("truth", [...kernel.state.truth, ["resid_post", 1, 2, -0.5]]);
    expect(cell(1, 1).textContent).toContain("−.50");
    kernel.set("progress", []);
    await kernel.answer("patch_cells", null);
    expect(root().dataset.ready).toBe("1");
  });

  it("walks with the arrows, keeping the column, through a redraw too", () => {
    cell(0, 1).focus();
    key(cell(0, 1), "ArrowDown");
    expect(focused()).toEqual([1, 1]);
    key(cell(1, 1), "End");
    expect(focused()).toEqual([1, 2]);
    key(cell(1, 2), "PageUp");
    expect(focused()).toEqual([0, 2]);
    key(cell(0, 2), "ArrowUp");
    expect(focused()).toEqual([-1, 2]); // the column's name
    key(cell(-1, 2), "ArrowUp");
    key(cell(-1, 2), "ArrowLeft");
    key(cell(-1, 1), "Home");
    key(cell(-1, 0), "ArrowLeft");
    expect(focused()).toEqual([-1, 0]);
    key(cell(-1, 0), "ArrowDown");
    key(cell(0, 0), "ArrowLeft");
    expect(focused()).toEqual([0, -1]); // the row's
    key(cell(0, -1), "End");
    expect(focused()).toEqual([0, 2]);
    kernel.set("truth", []);
    expect(focused()).toEqual([0, 2]);
    expect(el.querySelectorAll('[data-cell][tabindex="0"]')).toHaveLength(1);
  });

  it("says beside the key how far an estimate can be off", () => {
    expect(document.querySelector(".saelab-patching-limit")!.textContent).toContain("it can say 0.3 where the true patch gives 1");
  });

  it("chooses a block with shift and the arrows, and patches what is unknown of it", () => {
    cell(0, 1).focus();
    key(cell(0, 1), "ArrowDown", { shiftKey: true });
    key(cell(1, 1), "ArrowRight", { shiftKey: true });
    expect(el.querySelectorAll("[data-block]")).toHaveLength(4);
    expect(cell(1, 2).getAttribute("aria-selected")).toBe("true");
    button("Patch block (3)").click();
    expect(kernel.calls("patch_cells")[0]?.args).toEqual({ cells: [["resid_post", 2, 2], ["resid_post", 1, 2], ["resid_post", 1, 3]] });
    key(cell(1, 2), "Escape");
    expect(el.querySelectorAll("[data-block]")).toHaveLength(0);
    expect(button("Patch block").disabled).toBe(true);
  });

  it("chooses a block by dragging, and all by Ctrl+A", () => {
    pointer(cell(0, 0), "pointerdown");
    pointer(cell(1, 1), "pointerover");
    expect(el.querySelectorAll("[data-block]")).toHaveLength(4);
    expect(kernel.calls("patch_cells")).toHaveLength(0);
    pointer(cell(2, 2), "pointerdown");
    expect(el.querySelectorAll("[data-block]")).toHaveLength(0);
    key(cell(2, 2), "a", { ctrlKey: true });
    expect(el.querySelectorAll("[data-block]")).toHaveLength(9);
  });

  it("patches a row or a column by its name: together, and each alone", async () => {
    expect(cell(-1, 1).getAttribute("role")).toBe("columnheader");
    expect(cell(-1, 1).title).toContain("resid_post of 3 layers: a click or Enter patches all together in one run");
    cell(-1, 1).click();
    expect(kernel.calls("patch_line")[0]?.args).toEqual({ kind: "resid_post", layers: [0, 1, 2], positions: [2] });
    expect(kernel.calls("patch_cells")).toHaveLength(0);
    key(cell(0, -1), "Enter");
    expect(kernel.calls("patch_line")[1]?.args).toEqual({ kind: "resid_post", layers: [2], positions: [1, 2, 3] });
    kernel.set("joint", [["resid_post", [0, 1, 2], [2], 0.625], ["attn_out", [2], [1, 2, 3], -0.5]]);
    expect(cell(-1, 1).querySelector(".saelab-heat-number")?.textContent).toBe(".63");
    expect(cell(-1, 1).getAttribute("aria-label")).toMatch(/all patched together in one run 0.63$/);
    expect(cell(0, -1).querySelector(".saelab-heat-number")?.textContent).toBe(""); // of the other kind
    kernel.set("truth", [["resid_post", 0, 2, 0.5], ["resid_post", 1, 2, 0.25], ["resid_post", 2, 2, 0]]);
    expect(cell(-1, 1).getAttribute("aria-label")).toContain("in one run 0.63, the sum of each alone 0.75");
    cell(-1, 1).click(); // all is known
    expect(kernel.calls("patch_line")).toHaveLength(2);
    cell(-1, 1).focus();
    expect(el.querySelector(".saelab-readout")?.textContent).toContain("the sum of each alone 0.75");
    expect(kernel.state.cell).toEqual([]);
  });

  it("keeps blocks to cells", () => {
    pointer(cell(0, 0), "pointerdown");
    pointer(cell(-1, 1), "pointerover");
    expect(el.querySelectorAll("[data-block]")).toHaveLength(0);
    pointer(cell(1, 1), "pointerover");
    expect(el.querySelectorAll("[data-block]")).toHaveLength(4);
    pointer(cell(-1, 0), "pointerdown"); // a name is not a corner of a block
    cell(-1, 0).click();
    expect(el.querySelectorAll("[data-block]")).toHaveLength(0);
    expect(kernel.calls("patch_line")).toHaveLength(1);
    cell(0, 0).focus();
    key(cell(0, 0), "ArrowUp", { shiftKey: true });
    expect(focused()).toEqual([0, 0]);
  });

  it("changes kind", () => {
    button("attn_out").click();
    expect(kernel.state.kind).toBe("attn_out");
    expect(cell(0, 1).textContent).toContain(".30");
    expect(button("attn_out").getAttribute("aria-pressed")).toBe("true");
  });
});

it("shows progress and cancels", () => {
  cell(1, 1).click();
  kernel.set("progress", [12, 40]);
  expect(el.querySelector("progress")?.value).toBe(12);
  expect(el.textContent).toContain("12 of 40");
  const call = kernel.calls("patch_cells")[0]?.call;
  button("Cancel").click();
  expect(kernel.calls("stop")).toHaveLength(1);
  expect(kernel.sent).toContainEqual({ cancel: call });
  kernel.set("progress", []);
  expect(el.querySelector<HTMLElement>(".saelab-patching-progress")?.hidden).toBe(true);
  expect(root().dataset.ready).toBe("1");
});

describe("an open cell", () => {
  it("asks for features where there is a coder, and selects one", () => {
    kernel.set("cell", [1, 2]);
    expect(kernel.calls("open_features")[0]?.args).toEqual({ kind: "resid_post", layer: 1, position: 2 });
    kernel.set("features", { "resid_post-1:2": { features: [[7, -0.2], [9, 0.1]], others: 0.05, active: 5, error: -0.2 } });
    const rows = el.querySelectorAll<HTMLElement>("[data-feature]");
    expect([...rows].map((row) => row.textContent)).toEqual(["7−0.20", "90.10"]);
    expect(el.textContent).toContain("3 more: 0.050; the coder's error: −0.20; all together: −0.25");
    rows[1]?.focus();
    rows[1]?.click();
    expect(kernel.state.feature).toBe(9);
    expect((document.activeElement as HTMLElement).dataset.feature).toBe("9");
    expect(document.activeElement?.getAttribute("aria-pressed")).toBe("true");
  });

  it("asks for none elsewhere", () => {
    kernel.set("cell", [2, 2]);
    expect(kernel.calls("open_features")).toHaveLength(0);
    expect(el.textContent).toContain("resid_post, layer 2, token 2");
  });

  it("shows attention in a box that may load nothing", async () => {
    kernel.state.kind = "attn_out";
    kernel.set("cell", [1, 2]);
    button("Attention of layer 1 on the source").click();
    expect(kernel.calls("attention_page")[0]?.args).toEqual({ layer: 1, source: true });
    await kernel.answer("attention_page", { page: "<p>heads</p>" });
    const frame = el.querySelector("iframe") as HTMLIFrameElement;
    expect(frame.getAttribute("sandbox")).toBe("allow-scripts");
    expect(frame.getAttribute("srcdoc")).toMatch(/default-src 'none'.*<p>heads<\/p>$/s);
    button("Attention of layer 1 on the prompt").click();
    await kernel.answer("attention_page", { why: "this model's attention cannot be exchanged" });
    expect(el.querySelector(".saelab-attention-box")?.textContent).toContain("cannot be exchanged");
    button("Hide the attention").click();
    expect(el.querySelector("iframe")).toBeNull();
  });
});

describe("texts and metric", () => {
  const type = (field: HTMLInputElement | HTMLTextAreaElement | HTMLSelectElement, value: string) => {
    field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const prompt = () => el.querySelector<HTMLTextAreaElement>('textarea[aria-label^="Prompt"]') as HTMLTextAreaElement;

  it("aligns what is typed, and runs it", async () => {
    vi.useFakeTimers();
    type(prompt(), "The big fox");
    expect(button("Run").hasAttribute("data-changed")).toBe(true);
    vi.advanceTimersByTime(300);
    vi.useRealTimers();
    expect(kernel.calls("align")[0]?.args).toEqual({ prompt: "The big fox", source: "The fox", right: " the", wrong: " sea" });
    await kernel.answer("align", { pairs: [["The", "The"], [" big", null], [" fox", " fox"]], lengths: [3, 2], right: [" the", " old"], wrong: [" sea"] });
    expect(el.querySelector('[role="status"].saelab-caution')?.textContent).toContain("The prompt has 3 tokens, the source 2");
    expect(el.querySelectorAll("[data-differ]")).toHaveLength(1);
    expect(el.textContent).toContain("2 tokens, not one");
    key(prompt(), "Enter");
    expect(kernel.calls("rerun")[0]?.args).toEqual({ prompt: "The big fox", source: "The fox", measure: "logit difference", right: " the", wrong: " sea" });
    await kernel.answer("rerun", "prompt and source need as many tokens", "error");
    expect(el.querySelector('[role="alert"]')?.textContent).toContain("as many tokens");
    expect(root().dataset.stale).toBe("true"); // the grid below is of the text before
    expect(el.querySelector(".saelab-old")?.textContent).toContain("as they were computed");
    expect(root().dataset.ready).toBe("1");
    expect(prompt().value).toBe("The big fox"); // what was typed stays
  });

  it("keeps a chat a chat, and says whose each token is", async () => {
    const chat = (content: string) => [{ role: "system", content: "Be brief." }, { role: "user", content }];
    open({ view: { ...view(), prompt: chat("A dog"), source: chat("A fox"), roles: ["template", "user", "user"] } });
    const areas = [...el.querySelectorAll("textarea")];
    expect(areas.map((a) => a.getAttribute("aria-label"))).toEqual([
      "Source, message of system", "Source, message of user", "Prompt, message of system", "Prompt, message of user",
    ]);
    expect(el.querySelector(".saelab-prompt-field")?.textContent).toBe("system");
    expect(cell(-1, 0).getAttribute("aria-label")).toContain("token 1 of the chat template: “The”");
    expect(cell(-1, 0).hasAttribute("data-dim")).toBe(true);
    expect(cell(-1, 1).getAttribute("aria-label")).toContain("token 2 of the user's message");
    expect(button("Run").hasAttribute("data-changed")).toBe(false);
    type(areas[3]!, "A cat");
    expect(button("Run").hasAttribute("data-changed")).toBe(true);
    expect(el.querySelector(".saelab-old")?.textContent).toContain("user: A dog");
    key(areas[3]!, "Enter");
    expect(kernel.calls("rerun")[0]?.args).toMatchObject({ prompt: chat("A cat"), source: chat("A fox") });
    await kernel.answer("rerun", null);
    kernel.set("view", { ...view(), prompt: "A dog" }); // from Python
    expect(el.querySelectorAll("textarea")).toHaveLength(2);
  });

  it("asks for the answers that the metric needs", () => {
    const metric = el.querySelector("select") as HTMLSelectElement;
    const shown = () => [...el.querySelectorAll<HTMLElement>(".saelab-answer-field")].map((field) => !field.hidden);
    expect(shown()).toEqual([true, true]);
    type(metric, "log-probability");
    expect(shown()).toEqual([true, false]);
    type(metric, "KL from the source");
    expect(shown()).toEqual([false, false]);
    metric.form?.dispatchEvent(new Event("submit", { cancelable: true }));
    expect(kernel.calls("rerun")[0]?.args).toMatchObject({ measure: "KL from the source" });
  });

  it("keeps an answer that a field cannot hold", () => {
    open({ view: { ...view(), right: "\n" } });
    key(prompt(), "Enter");
    expect(kernel.calls("rerun")[0]?.args).toMatchObject({ right: "\n" });
  });

  it("takes over another run", () => {
    kernel.set("view", { ...view(), prompt: "A dog", metric: "log-probability ' dog'", kinds: ["resid_post"] });
    expect(prompt().value).toBe("A dog");
    expect(el.textContent).toContain("share of the change of log-probability ' dog', from −2.00 (prompt) to 2.00 (source)");
    expect(el.querySelectorAll("[data-kind]")).toHaveLength(1);
  });

  it("asks for the features of the open cell again after another run", () => {
    kernel.set("cell", [1, 2]);
    kernel.set("features", { "resid_post-1:2": { features: [[7, 0.2]], others: 0, active: 1, error: 0 } });
    kernel.state.features = {};
    kernel.set("view", { ...view(), prompt: "A dog" });
    expect(kernel.calls("open_features")).toHaveLength(2);
  });
});

it("exports the table", () => {
  const lines = asCsv(view(), new Values(view(), state().truth)).trimEnd().split("\n");
  expect(lines).toHaveLength(1 + 2 * 3 * 3);
  expect(lines[0]).toBe("layer,kind,position,token,source_token,estimate,true");
  expect(lines[9]).toBe('2,resid_post,3," to"," to",1,0.875');
  expect(asCsv({ ...view(), tokens: [['"', ","], ["a", "a"], ["b", "b"]] }, new Values(view(), [])).split("\n")[1]).toBe('0,resid_post,1,"""",",",0,');
});

it("works in a file without a kernel: kinds, cells, no patches", () => {
  document.body.replaceChildren();
  el = document.body.appendChild(document.createElement("div"));
  freeze(el, { ...state(), cell: [1, 2], features: { "resid_post-1:2": { features: [[7, 0.2]], others: 0, active: 1, error: 0 } } });
  expect(root().dataset.connection).toBe("frozen");
  expect(el.querySelector("[data-feature]")?.textContent).toBe("70.20");
  cell(0, 1).click();
  expect(el.textContent).toContain("resid_post, layer 2, token 2");
  button("attn_out").click();
  expect(cell(0, 1).textContent).toContain(".30");
});

it("keeps to the rules of accessible pages", async () => {
  kernel.set("cell", [1, 2]);
  kernel.set("features", { "resid_post-1:2": { features: [[7, -0.2]], others: 0, active: 1, error: 0 } });
  kernel.set("progress", [1, 2]);
  const { violations } = await axe.run(el, { rules: { "color-contrast": { enabled: false }, region: { enabled: false } } });
  expect(violations.map((v) => `${v.id}: ${v.nodes[0]?.html}`)).toEqual([]);
});

it("stops listening with its view", () => {
  cell(1, 1).click();
  end();
  expect(kernel.listenerCount()).toBe(0);
  expect(kernel.sent.some((message) => "cancel" in message)).toBe(true);
});
