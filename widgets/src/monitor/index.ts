// TrainingMonitor: a training that runs, as curves, and the hand on it.
import { h } from "../shared/dom";
import { freezer } from "../shared/frozen";
import { onChange } from "../shared/model";
import { panel, widget } from "../shared/panel";
import { charts } from "./charts";
import { hand } from "./hand";
import { progress } from "./progress";
import { copy, type Curves, grow, type Grown, type State } from "./types";

const monitor = widget<State>((model, el, signal) => {
  const frame = panel(model, el, "monitor", "Training monitor", signal);
  let curves: Curves = copy(model.get("curves"));

  const call = (method: string, args: Record<string, unknown> = {}) => {
    frame.complain("");
    void frame.call(method, args);
  };
  const state = progress();
  const drawn = charts(signal);
  const hold = hand(
    {
      start: () => call("start"),
      pause: () => call("pause"),
      resume: () => call("resume"),
      stop: (coder) => call("stop", { coder }),
      change: (values, coder) => call("change", { ...values, coder }),
      complain: frame.complain,
    },
    signal,
  );
  const showStatus = () => {
    const status = model.get("status");
    state.show(status);
    hold.show(status.state, model.get("lines"), model.get("can_start"));
    frame.root.dataset.state = status.state;
  };
  const showCurves = () => drawn.show(curves, model.get("changes"));

  frame.root.append(
    h("div", { class: "saelab-controls" }, h("h3", {}, "Training"), state.badge, hold.buttons, frame.codeButton),
    state.element,
    hold.form,
    drawn.element,
  );
  const take = (all: Curves) => {
    curves = copy(all);
    showCurves();
  };
  // Curves grow by messages: as a trait all points would be sent for each new one.
  const hear = (message: { grown?: Grown }) => {
    if (!message.grown) return;
    grow(curves, message.grown);
    showCurves();
  };
  model.on("msg:custom", hear);
  signal.addEventListener("abort", () => model.off("msg:custom", hear));
  onChange(model, ["status", "lines", "can_start"], showStatus, signal);
  onChange(model, ["curves"], () => take(model.get("curves")), signal);
  onChange(model, ["changes"], showCurves, signal);
  showStatus();
  showCurves();
  frame.ready(true);
  // A view that is opened while training runs has missed what was sent before.
  if (frame.connection() === "live") {
    void frame.call<{ curves: Curves }>("now").then((now) => take(now.curves));
  }
});

export const freeze = freezer(monitor);
export default monitor;
