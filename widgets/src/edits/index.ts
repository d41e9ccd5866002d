// EditStack: the edits of a session, in a cell of their own.
import { h } from "../shared/dom";
import { editList, type EditRow } from "../shared/editlist";
import { freezer } from "../shared/frozen";
import { onChange } from "../shared/model";
import { panel, widget } from "../shared/panel";

type State = { rows: EditRow[]; error: string };

const edits = widget<State>((model, el, signal) => {
  const frame = panel(model, el, "edits", "Edits", signal);
  const list = editList(
    {
      switch: (key, on) => void frame.call("switch", { key, on }),
      remove: (key) => void frame.call("remove", { key }),
    },
    signal,
  );
  const show = () => {
    frame.complain("");
    list.show(model.get("rows"));
    frame.ready(true);
  };
  frame.root.append(h("div", { class: "saelab-bar-row" }, h("h3", {}, "Edits"), frame.codeButton), list.element);
  onChange(model, ["rows"], show, signal);
  show();
});

export const freeze = freezer(edits);
export default edits;
