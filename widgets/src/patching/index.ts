// PatchingGrid.
import { freezer } from "../shared/frozen";
import { panel, widget } from "../shared/panel";

type State = { error: string };

const it = widget<State>((model, el, signal) => {
  const frame = panel(model, el, "patching", "PatchingGrid", signal);
  frame.ready(true);
});

export const freeze = freezer(it);
export default it;
