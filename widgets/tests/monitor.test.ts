import { afterEach, describe, expect, it } from "vitest";
import widget, { freeze } from "../src/monitor/index";
import { duration } from "../src/monitor/progress";
import { type Curve, type Curves, grow, type Line, type State, type Status } from "../src/monitor/types";

const ATTACK = "<img src=x onerror=alert(1)>";

type Callback = (...args: never[]) => void;

/** Python's end: traits, messages, and the calls that came. */
class Kernel {
  calls: { call: number; method: string; args: Record<string, unknown> }[] = [];
  private listeners = new Map<string, Set<Callback>>();

  constructor(private state: State) {}

  get(name: keyof State): unknown {
    return this.state[name];
  }

  set<K extends keyof State>(name: K, value: State[K]): void {
    this.state[name] = value;
    this.fire(`change:${name}`);
  }

  on(event: string, callback: Callback): void {
    this.listeners.set(event, (this.listeners.get(event) ?? new Set()).add(callback));
  }

  off(event: string, callback: Callback): void {
    this.listeners.get(event)?.delete(callback);
  }

  save_changes(): void {}

  send(message: (typeof this.calls)[number]): void {
    if (message.call !== undefined) this.calls.push(message);
  }

  fire(event: string, ...args: unknown[]): void {
    for (const callback of [...(this.listeners.get(event) ?? [])]) (callback as (...all: unknown[]) => void)(...args);
  }

  answer(method: string, value: unknown, kind = "done"): void {
    this.fire("msg:custom", { reply: this.calls.filter((c) => c.method === method).at(-1)?.call, kind, value });
  }

  get listening(): number {
    return [...this.listeners.values()].reduce((sum, set) => sum + set.size, 0);
  }
}

function status(changes: Partial<Status> = {}): Status {
  return {
    state: "running", why: "", step: 120, steps: 1000, tokens: 491520, passes: 0.5, tokens_per_second: 9000, seconds_left: 400,
    note: "", ...changes,
  };
}

function curve(n: number): Curve {
  const up = Array.from({ length: n }, (_, i) => i + 1);
  return {
    step: up, loss: up.map((i) => 100 / i), fvu: up.map((i) => 1 / i), l0: up.map(() => 32), dead: up.map(() => 0.125),
    threshold: up.map(() => null), cosine: up.map((i) => (i % 3 ? null : 0.4)), lr: up.map(() => 2e-3),
    fvu_held_out: up.map((i) => (i % 3 ? null : 1 / i + 0.05)), l0_held_out: up.map(() => null), ce_delta: up.map(() => null),
    coefficient: up.map(() => null),
  };
}

const line = (label: string, more: Partial<Line> = {}): Line => ({ label, sparsity_name: "k", sparsity: 32, lr: 2e-3, over: false, ...more });

let kernel: Kernel;
let el: HTMLElement;
let cleanup: () => void;

function open(changes: Partial<State> = {}): HTMLElement {
  kernel = new Kernel({
    status: status(), lines: [line("BatchTopK")], changes: [], curves: { BatchTopK: curve(9) }, can_start: true, error: "", ...changes,
  });
  el = document.createElement("div");
  document.body.append(el);
  cleanup = widget.render({ model: kernel as never, el });
  return one(".saelab-monitor");
}

const one = (selector: string) => el.querySelector<HTMLElement>(selector)!;
const all = (selector: string) => [...el.querySelectorAll<HTMLElement>(selector)];
const button = (text: string) => all("button").find((b) => b.textContent?.includes(text) && !b.hidden);
const input = (label: string) => all("input").find((i) => i.getAttribute("aria-label") === label) as HTMLInputElement;
const calls = (method: string) => kernel.calls.filter((c) => c.method === method).map((c) => c.args);

function type(target: HTMLInputElement, value: string): void {
  target.value = value;
  target.dispatchEvent(new Event("input", { bubbles: true }));
}

afterEach(() => {
  cleanup();
  document.body.replaceChildren();
});

describe("what it shows", () => {
  it("is ready, and asks for what it missed", async () => {
    const root = open();
    expect(root.dataset.ready).toBe("1");
    expect(calls("now")).toHaveLength(1);
    kernel.answer("now", { curves: { BatchTopK: curve(40) } });
    await new Promise((resolve) => setTimeout(resolve));
    expect(one("[data-measure=loss] svg").getAttribute("aria-label")).toBe("Loss: BatchTopK from 100 to 2.50");
  });

  it("tells state, speed and progress in words", () => {
    open();
    expect(one(".saelab-state").textContent).toBe("▶ running");
    expect(one(".saelab-figures").textContent).toContain("491,520 tokens0.50 passes over the data9,000 tokens/s6 min 40 s left");
    expect(one("[role=progressbar]").getAttribute("aria-valuetext")).toBe("step 120 of 1,000");
    kernel.set("status", status({ passes: 0 })); // of a stream they are not known
    expect(one(".saelab-figures").textContent).toContain("491,520 tokens9,000 tokens/s");
    kernel.set("status", status({ state: "failed", why: `ValueError: ${ATTACK}` }));
    expect(one(".saelab-monitor-progress [role=alert]").textContent).toContain(ATTACK);
    expect(el.querySelector("img")).toBeNull();
  });

  it("leaves out the chart of a measure that is not known", () => {
    open();
    expect(one("[data-measure=threshold]").hidden).toBe(true);
    expect(one("[data-measure=cosine]").hidden).toBe(false);
    // Taken at every third step: still one line.
    expect(one("[data-measure=cosine] path").getAttribute("d")).toMatch(/^M[^M]*L[^M]*L[^M]*$/);
  });

  it("draws held-out tokens beside the batch, and names their gap", () => {
    open();
    const [batch, held] = all("[data-measure=fvu] .saelab-chart-plot path");
    expect(held!.classList.contains("saelab-dotted")).toBe(true);
    expect(held!.dataset.series).toBe(batch!.dataset.series);
    expect(one("[data-measure=fvu] small.saelab-dim").textContent).toBe("dotted: held-out tokens, gap +0.050");
    expect(one("[data-measure=fvu] svg").getAttribute("aria-label")).toContain("BatchTopK, held-out from 0.38 to 0.16");
    expect(one("[data-measure=l0] small.saelab-dim").hidden).toBe(true);
    expect(el.querySelector("[data-measure=fvu_held_out]")).toBeNull();
  });

  it("shows the last figures that are known", () => {
    open({ curves: { BatchTopK: curve(10) } });
    expect(one(".saelab-monitor-stats").textContent).toBe(
      "Loss10.0FVU0.10FVU, held-out0.16L032.0Dead features13 %Decoder cosine0.40Learning rate0.0020",
    );
  });

  it("has a line and a row for each coder of a sweep, told apart without colour", () => {
    open({ lines: [line("TopK k=2"), line(ATTACK)], curves: { "TopK k=2": curve(5), [ATTACK]: curve(7) } });
    expect(all(".saelab-monitor-table tbody tr")).toHaveLength(2);
    expect(all("[data-measure=fvu] .saelab-chart-plot path").map((p) => p.getAttribute("stroke-dasharray"))).toEqual(["", "6 3", "0.1 4", "0.1 4"]);
    expect(one("[data-measure=fvu] small.saelab-dim").textContent).toBe("dotted: held-out tokens");
    expect(all(".saelab-monitor-body > .saelab-chart-legend > span").map((s) => s.textContent)).toEqual(["TopK k=2", ATTACK]);
    expect(el.querySelector("img")).toBeNull();
  });

  it("marks changes in every chart and in words", () => {
    open({ changes: [{ coder: "BatchTopK", step: 4, what: "k", old: 32, new: 16 }] });
    expect(all(".saelab-note-line title").map((t) => t.textContent)).toContain("step 4: k 32 → 16");
    expect(all("[data-measure=l0] .saelab-note-line")).toHaveLength(1);
    expect(one(".saelab-monitor-changes li").textContent).toBe("step 4: k 32 → 16");
  });

  it("says that nothing is there yet", () => {
    open({ curves: {}, lines: [], status: status({ state: "waiting", step: 0, tokens: 0 }) });
    expect(one(".saelab-monitor-empty").hidden).toBe(false);
    expect(button("Start")).toBeDefined();
    expect(button("Pause")).toBeUndefined();
    expect(one("form").hidden).toBe(true);
  });
});

describe("what comes while it runs", () => {
  it("grows by the points that are sent; the last one may be replaced", () => {
    open();
    kernel.fire("msg:custom", { grown: { BatchTopK: [8, [[9, 5, 0.5, 30, 0, 1.5, null, 1e-3], [10, 4, 0.4, 30, 0, 1.5, 0.9, 1e-3]]] } });
    expect(one("[data-measure=loss] svg").getAttribute("aria-label")).toBe("Loss: BatchTopK from 100 to 4.00");
    expect(one("[data-measure=threshold]").hidden).toBe(false);
    expect((kernel.get("curves") as Curves).BatchTopK!.step).toHaveLength(9); // Python's own stays as it was
  });

  it("puts messages together to the whole", () => {
    const curves: Curves = {};
    grow(curves, { a: [0, [[1, 9, 1, 1, 1, 1, 1, 1]]] });
    grow(curves, { a: [0, [[2, 8, 1, 1, 1, 1, 1, 1], [3, 7, 1, 1, 1, null, 1, 1]]] });
    expect(curves.a!.step).toEqual([2, 3]);
    expect(curves.a!.loss).toEqual([8, 7]);
    expect(curves.a!.threshold).toEqual([1, null]);
  });
});

describe("the hand", () => {
  it("pauses, resumes, stops and starts", () => {
    open();
    button("Pause")!.click();
    kernel.set("status", status({ state: "paused" }));
    expect(one(".saelab-state").textContent).toBe("❚❚ paused");
    button("Resume")!.click();
    button("Stop and save")!.click();
    expect(["pause", "resume", "stop"].map((m) => calls(m).length)).toEqual([1, 1, 1]);
    expect(calls("stop")[0]).toEqual({ coder: null });
    kernel.set("status", status({ state: "stopping" }));
    expect((button("Stop") as HTMLButtonElement).disabled).toBe(true);
    kernel.set("status", status({ state: "done" }));
    button("Start")!.click();
    expect(calls("start")).toHaveLength(1);
  });

  it("applies what was typed, and only that", () => {
    open();
    expect(input("k").value).toBe("32");
    expect(input("Peak learning rate").value).toBe("0.002");
    type(input("k"), "16");
    kernel.fire("msg:custom", { status: status({ step: 130 }) });
    expect(input("k").value).toBe("16"); // an update does not take away what is being typed
    one("form").dispatchEvent(new Event("submit", { cancelable: true }));
    expect(calls("change")).toEqual([{ sparsity: 16, coder: null }]);
    kernel.set("lines", [line("BatchTopK", { sparsity: 16 })]);
    expect(input("k").value).toBe("16");
    one("form").dispatchEvent(new Event("submit", { cancelable: true }));
    expect(calls("change")).toHaveLength(1);
  });

  it("refuses what is no number, and shows what Python refuses", async () => {
    open();
    type(input("Peak learning rate"), "fast");
    one("form").dispatchEvent(new Event("submit", { cancelable: true }));
    expect(calls("change")).toHaveLength(0);
    expect(one(".saelab-error").textContent).toBe("Peak learning rate must be a number, got “fast”");
    type(input("Peak learning rate"), "1e-3");
    type(input("k"), "9999");
    one("form").dispatchEvent(new Event("submit", { cancelable: true }));
    expect(calls("change")).toEqual([{ lr: 0.001, sparsity: 9999, coder: null }]);
    kernel.answer("change", "k must be an integer from 1 to d_sae=24, got 9999", "error");
    await Promise.resolve();
    await Promise.resolve();
    expect(one(".saelab-error").textContent).toContain("k must be an integer");
  });

  it("has no field for a family without sparsity", () => {
    open({ lines: [line("VQ", { sparsity_name: null, sparsity: null })] });
    expect(input("sparsity").closest("label")!.hidden).toBe(true);
  });

  it("changes one coder of a sweep, or all", () => {
    open({ lines: [line("TopK k=2", { sparsity: 2 }), line("L1", { sparsity_name: "sparsity", sparsity: 0.3 })], curves: {} });
    expect(input("sparsity")).toBeUndefined(); // k of one, sparsity of the other: not for all
    const select = one("select") as HTMLSelectElement;
    select.value = "L1";
    select.dispatchEvent(new Event("change"));
    expect(input("sparsity").value).toBe("0.3");
    type(input("sparsity"), "1");
    one("form").dispatchEvent(new Event("submit", { cancelable: true }));
    expect(calls("change")).toEqual([{ sparsity: 1, coder: "L1" }]);
    button("Stop and save")!.click();
    expect(calls("stop")).toEqual([{ coder: "L1" }]);
  });
});

describe("its ends", () => {
  it("leaves no listener behind", () => {
    open();
    cleanup();
    expect(kernel.listening).toBe(0);
    cleanup = () => undefined;
  });

  it("rests when the kernel is gone", () => {
    const root = open();
    kernel.fire("comm:close");
    expect(root.dataset.connection).toBe("lost");
    expect(button("Pause")!.inert).toBe(true);
  });

  it("is drawn from a file, with curves and without a hand", () => {
    el = document.createElement("div");
    document.body.append(el);
    cleanup = () => undefined;
    freeze(el, { status: status({ state: "done" }), lines: [line("a")], changes: [], curves: { a: curve(5) }, can_start: true, error: "" });
    expect(one(".saelab-monitor").dataset.connection).toBe("frozen");
    one("[data-measure=loss] svg").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    expect(one("[data-measure=loss] .saelab-readout").textContent).toBe("step 1: 100");
  });
});

describe("durations", () => {
  it.each([[0.2, "1 s"], [59, "59 s"], [400, "6 min 40 s"], [7300, "2 h 2 min"]])("%s", (s, text) => expect(duration(s)).toBe(text));
});
