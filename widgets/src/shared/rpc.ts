// Calls to Python over custom messages: an id, pieces of an answer, its end, an error, and a way to cancel.
import type { AnyModel } from "@anywidget/types";

/** Python said no, in words for the user. */
export class CallError extends Error {}

export interface CallOptions {
  /** Hears each piece of an answer that comes in pieces. */
  partial?: (value: unknown) => void;
  /** Cancels the call: Python is told, and the promise never settles. */
  signal?: AbortSignal;
}

export type Call = <R = unknown>(method: string, args?: Record<string, unknown>, options?: CallOptions) => Promise<R>;

interface Pending {
  resolve(value: unknown): void;
  reject(error: Error): void;
  partial?: ((value: unknown) => void) | undefined;
}

interface Reply {
  reply: number;
  kind: "partial" | "done" | "error" | "cancelled";
  value: unknown;
}

// Views of one model share its messages: numbers must differ between them, and from those of an earlier page.
let next = Math.floor(Math.random() * 1e9);

/** What calls methods of this view's Python object, until `signal` aborts; what still runs then is cancelled. */
export function caller<T extends Record<string, unknown>>(model: AnyModel<T>, signal: AbortSignal): Call {
  const pending = new Map<number, Pending>();
  const hear = (message: unknown) => {
    const { reply, kind, value } = (message ?? {}) as Partial<Reply>;
    const call = reply === undefined ? undefined : pending.get(reply);
    if (!call || reply === undefined) return;
    if (kind === "partial") return call.partial?.(value);
    pending.delete(reply);
    if (kind === "done") call.resolve(value);
    if (kind === "error") call.reject(new CallError(String(value)));
  };
  const cancel = (number: number) => {
    if (pending.delete(number)) model.send({ cancel: number });
  };
  model.on("msg:custom", hear);
  signal.addEventListener("abort", () => {
    for (const number of [...pending.keys()]) cancel(number);
    model.off("msg:custom", hear);
  });
  return <R>(method: string, args: Record<string, unknown> = {}, options: CallOptions = {}) =>
    new Promise<R>((resolve, reject) => {
      if (options.signal?.aborted) return;
      const number = next++;
      pending.set(number, { resolve: resolve as (value: unknown) => void, reject, partial: options.partial });
      options.signal?.addEventListener("abort", () => cancel(number), { once: true });
      model.send({ call: number, method, args });
    });
}

/** Runs the last of several requests: a new one cancels the one before, after a pause without another. */
export function latest(pauseMs: number, signal: AbortSignal): (run: (signal: AbortSignal) => void) => void {
  let current = new AbortController();
  let timer: ReturnType<typeof setTimeout> | undefined;
  signal.addEventListener("abort", () => {
    clearTimeout(timer);
    current.abort();
  });
  return (run) => {
    clearTimeout(timer);
    current.abort();
    current = new AbortController();
    const mine = current.signal;
    timer = setTimeout(() => !mine.aborted && run(mine), pauseMs);
  };
}
