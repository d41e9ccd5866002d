// The session's edits: a switch and a way out for each.
import { focusedIn, h } from "./dom";
import { nameOf } from "./name";

export interface EditRow {
  key: number;
  on: boolean;
  label: string;
  code: string;
  /** of its features */
  name?: string;
}

export interface EditActions {
  switch(key: number, on: boolean): void;
  remove(key: number): void;
}

export interface EditList {
  element: HTMLElement;
  show(rows: EditRow[]): void;
}

export function editList(actions: EditActions, signal: AbortSignal): EditList {
  const list = h("ul", { class: "saelab-edits-list", "aria-label": "Edits", "data-needs": "kernel" });
  const none = h("p", { class: "saelab-dim" }, "No edits yet.");
  const keyOf = (target: EventTarget | null) => Number((target as HTMLElement).closest<HTMLElement>("[data-key]")?.dataset.key);
  list.addEventListener(
    "change",
    (event) => {
      const box = event.target as HTMLInputElement;
      if (box.type === "checkbox") actions.switch(keyOf(box), box.checked);
    },
    { signal },
  );
  list.addEventListener(
    "click",
    (event) => {
      if ((event.target as HTMLElement).closest("button")) actions.remove(keyOf(event.target));
    },
    { signal },
  );
  return {
    element: h("div", { class: "saelab-edits-box" }, list, none),
    show(rows) {
      none.hidden = rows.length > 0;
      list.hidden = rows.length === 0;
      const focus = focusedIn(list);
      const [key, tag] = focus ? [keyOf(focus), focus.localName] : [-1, ""];
      list.replaceChildren(
        ...rows.map((row) =>
          h(
            "li",
            { "data-key": row.key, "data-on": row.on },
            h("label", {}, h("input", { type: "checkbox", checked: row.on }), h("code", {}, row.code), nameOf(row.name)),
            h("button", { type: "button", "aria-label": `Remove ${row.code}`, title: "Remove" }, "×"),
          ),
        ),
      );
      if (key >= 0) list.querySelector<HTMLElement>(`[data-key="${key}"] ${tag}`)?.focus({ preventScroll: true });
    },
  };
}
