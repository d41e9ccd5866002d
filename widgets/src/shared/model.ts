// A few lines over anywidget's model: listeners that end with their view.
import type { AnyModel } from "@anywidget/types";

/** Call `callback` whenever one of `names` changes, until `signal` aborts. */
export function onChange<T extends Record<string, unknown>>(
  model: AnyModel<T>,
  names: (keyof T & string)[],
  callback: () => void,
  signal: AbortSignal,
): void {
  for (const name of names) {
    const event = `change:${name}` as const;
    model.on(event, callback);
    signal.addEventListener("abort", () => model.off(event, callback));
  }
}

/** Set traits and send them to Python. */
export function send<T extends Record<string, unknown>>(model: AnyModel<T>, values: Partial<T>): void {
  for (const [name, value] of Object.entries(values)) model.set(name, value as T[string]);
  model.save_changes();
}
