// Search by examples: two lists of texts, one a line, which open below the bar.
import { button, h, setText } from "../shared/dom";
import type { Call } from "../shared/rpc";

export interface Examples {
  /** Opens and closes the lists. */
  toggle: HTMLElement;
  element: HTMLElement;
}

export function examples(call: Call, complain: (message: string) => void, signal: AbortSignal): Examples {
  const list = (label: string, placeholder: string) => h("textarea", { rows: 4, "aria-label": label, placeholder, spellcheck: "false" });
  const texts = list("Examples", "Examples, one text a line: four or more");
  const against = list("Counter-examples", "Counter-examples, one text a line: four or more");
  const hint = "Features are ranked on one half of the texts; the list shows the AUROC on the other half.";
  const says = h("small", { role: "status" }, hint);
  const find = () => {
    complain("");
    setText(says, "reading…");
    void call("find_by_examples", { examples: texts.value, against: against.value }).then(() => setText(says, hint));
  };
  const element = h(
    "section",
    { class: "saelab-examples", "aria-label": "Search by examples", "data-needs": "kernel", hidden: true },
    texts,
    against,
    h("div", { class: "saelab-examples-foot" }, button("Find features", find, signal), says),
  );
  const open = () => {
    element.hidden = !element.hidden;
    toggle.setAttribute("aria-expanded", String(!element.hidden));
    if (!element.hidden) texts.focus();
  };
  const toggle = button("By examples", open, signal, { "aria-expanded": "false", "data-needs": "kernel", title: "What tells some texts from others" });
  return { toggle, element };
}
