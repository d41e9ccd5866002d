// A text of one's own: how strongly the open feature fires on it, while one types.
import { h, setText } from "../shared/dom";
import { number } from "../shared/format";
import { latest, type Call } from "../shared/rpc";
import { tokenStrip } from "../shared/strip";
import type { Scored } from "./types";

export interface Trial {
  element: HTMLElement;
  /** Another feature is open: score the text again. `max`: its largest activation on the store. */
  feature(feature: number, max: number): void;
}

const PAUSE_MS = 200;

/** `found` hears the largest value, for the histogram's marker; null when there is none. */
export function trial(call: Call, found: (value: number | null) => void, hover: (value: number | null) => void, signal: AbortSignal): Trial {
  const text = h("textarea", {
    rows: 2,
    placeholder: "type a text: the feature's activation on each token",
    "aria-label": "Try a text",
    spellcheck: "false",
  });
  const says = h("small", { role: "status" });
  let values: (number | null)[] = [];
  const strip = tokenStrip(
    {
      label: "Activation on your text",
      hover: (position) => hover(position === null ? null : (values[position] ?? null)),
    },
    signal,
  );
  strip.element.hidden = true;
  const next = latest(PAUSE_MS, signal);
  let max = 0;
  let open = -1;

  const ask = () => {
    if (text.value === "") {
      next(() => undefined); // what runs is no longer wanted
      strip.element.hidden = true;
      setText(says, "");
      found(null);
      return;
    }
    strip.element.dataset.stale = "true"; // of the text before, or of another feature
    found(null);
    next((signal) => {
      setText(says, "scoring…");
      const asked = performance.now();
      void call<Scored>("score", { text: text.value }, { signal }).then((scored) => {
        if (scored.feature !== open) return;
        values = scored.values;
        const largest = Math.max(0, ...values.map((v) => v ?? 0));
        strip.show(scored.tokens.map((token, i) => ({ text: token, value: values[i] ?? null })));
        strip.element.hidden = false;
        strip.element.dataset.stale = "false";
        setText(says, `largest ${number(largest)}, ${max > 0 ? `${Math.round((100 * largest) / max)} % of the maximum on the store` : "it never fired on the store"}`);
        element.dataset.scoreMs = (performance.now() - asked).toFixed(0);
        found(largest);
      });
    });
  };
  text.addEventListener("input", ask, { signal });
  const element = h(
    "section",
    { class: "saelab-trial", "aria-label": "A text of your own", "data-needs": "kernel" },
    h("h4", {}, "Try a text ", says),
    text,
    strip.element,
  );
  return {
    element,
    feature(feature, largest) {
      if (feature === open) return;
      open = feature;
      max = largest;
      if (text.value !== "") ask();
    },
  };
}
