// A stand-in for anywidget's model, and a hand-made state to show.
import type { FeatureView, State } from "../src/inspector/types";

type Callback = (...args: unknown[]) => void;

/** Traits with change events; `saved` lists what save_changes() sent to Python, `sent` its custom messages, in order. */
export class MockModel {
  saved: Partial<State>[] = [];
  sent: { call?: number; method?: string; args?: Record<string, unknown>; cancel?: number }[] = [];
  private dirty: Partial<State> = {};
  private listeners = new Map<string, Set<Callback>>();

  constructor(private state: State) {}

  get<K extends keyof State>(name: K): State[K] {
    return this.state[name];
  }

  set<K extends keyof State>(name: K, value: State[K]): void {
    if (this.state[name] === value) return;
    this.state[name] = value;
    this.dirty[name] = value;
    for (const callback of [...(this.listeners.get(`change:${name}`) ?? [])]) callback();
  }

  on(event: string, callback: Callback): void {
    if (!this.listeners.has(event)) this.listeners.set(event, new Set());
    this.listeners.get(event)?.add(callback);
  }

  off(event: string, callback: Callback): void {
    this.listeners.get(event)?.delete(callback);
  }

  save_changes(): void {
    this.saved.push(this.dirty);
    this.dirty = {};
  }

  /** Python sets a trait. */
  fromPython<K extends keyof State>(name: K, value: State[K]): void {
    this.set(name, value);
    this.dirty = {};
  }

  send(message: MockModel["sent"][number]): void {
    this.sent.push(message);
  }

  /** Python answers the last call of a method. */
  reply(method: string, value: unknown, kind = "done"): void {
    const call = this.sent.filter((message) => message.method === method).at(-1)?.call;
    this.fire("msg:custom", { reply: call, kind, value });
  }

  fire(event: string, ...args: unknown[]): void {
    for (const callback of [...(this.listeners.get(event) ?? [])]) callback(...args);
  }

  listenerCount(): number {
    return [...this.listeners.values()].reduce((sum, set) => sum + set.size, 0);
  }
}

export const ATTACK = "<img src=x onerror=alert(1)>";

export function view(feature: number): FeatureView {
  return {
    feature,
    d_sae: 4608,
    density: 0.00214,
    count: 1024,
    tokens_seen: 478120,
    mean: 1.5,
    max: 4,
    f_scale: 3.5,
    histogram: {
      counts: Array.from({ length: 40 }, (_, i) => 40 - i),
      edges: Array.from({ length: 41 }, (_, i) => i / 10),
    },
    groups: [
      {
        label: "top",
        contexts: [
          {
            tokens: ["<|endoftext|>", "The", " cat", "\n", ATTACK],
            values: [null, 0, 4, 1, 0],
            peak: 2,
            document: 3,
            position: 17,
          },
        ],
      },
      {
        label: "quantile 75-100 %",
        contexts: [{ tokens: ["a", " dog", "  "], values: [0, 2.05, 0], peak: 1, document: 5, position: 9 }],
      },
    ],
    promoted: [[" cat", 2.5], [ATTACK, 1]],
    suppressed: [["\n", -1.25]],
    lens_note: "",
    neighbours: [[17, 0.61], [405, 0.5]],
    cofiring: [[405, 0.2, 31]],
    tokens: [" cat", " dog"],
    names: { "812": "pets", "17": ATTACK },
  };
}

export function state(changes: Partial<State> = {}): State {
  return {
    feature: 812,
    query: "",
    sort: "best",
    results: [
      { feature: 812, density: 0.00214, max: 4, tokens: [" cat", " dog"], label: "pets" },
      { feature: 17, density: 0.1, max: 7, tokens: ["\n", ATTACK], label: "" },
      { feature: 405, density: 0.01, max: 2, tokens: [" red"], label: "" },
    ],
    results_note: "3 of 3 live features",
    view: view(812),
    note: { label: "pets", text: "" },
    pinned: null,
    pair: {},
    overview: { counts: [1, 2, 3], edges: [-4, -3, -2, -1] },
    live: true,
    error: "",
    ...changes,
  };
}
