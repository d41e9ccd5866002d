// A model without a kernel, for pages that `to_html` writes: the same widget over what it showed.
import type { AnyModel } from "@anywidget/types";

type State = Record<string, unknown>;
type Callback = (...args: unknown[]) => void;

/** Traits in this page. Calls are answered by `answer`, if it gives anything; others stay without an answer. */
export class FrozenModel {
  readonly frozen = true;
  private listeners = new Map<string, Set<Callback>>();

  constructor(
    private state: State,
    private answer: (method: string, args: State, model: FrozenModel) => unknown = () => undefined,
  ) {}

  get(name: string): unknown {
    return this.state[name];
  }

  set(name: string, value: unknown): void {
    if (this.state[name] === value) return;
    this.state[name] = value;
    this.tell(`change:${name}`);
  }

  on(event: string, callback: Callback): void {
    this.listeners.set(event, (this.listeners.get(event) ?? new Set()).add(callback));
  }

  off(event: string, callback: Callback): void {
    this.listeners.get(event)?.delete(callback);
  }

  save_changes(): void {}

  send(message: { call?: number; method?: string; args?: State }): void {
    if (message.call === undefined || message.method === undefined) return;
    const value = this.answer(message.method, message.args ?? {}, this);
    if (value !== undefined) queueMicrotask(() => this.tell("msg:custom", { reply: message.call, kind: "done", value }));
  }

  private tell(event: string, ...args: unknown[]): void {
    for (const callback of [...(this.listeners.get(event) ?? [])]) callback(...args);
  }
}

/** What `to_html` calls: draw the widget in `el` over `state`. `prepare` may listen to changes as Python would. */
export function freezer<T extends Record<string, unknown>>(
  widget: { render(props: { model: AnyModel<T>; el: HTMLElement }): unknown },
  prepare: (model: FrozenModel) => void = () => undefined,
  answer?: (method: string, args: State, model: FrozenModel) => unknown,
): (el: HTMLElement, state: State) => void {
  return (el, state) => {
    const model = new FrozenModel(state, answer);
    prepare(model);
    widget.render({ model: model as unknown as AnyModel<T>, el });
  };
}
