"""Pictures of training: a run's curves, a sweep's Pareto fronts, the choice of L0."""

from typing import Any

from matplotlib.figure import Figure

from sae_lab.evals.choosing import L0Choice
from sae_lab.plots.style import COLOURS, GREY, draw, legend_beside, look, plain, subplots
from sae_lab.training.run import Run
from sae_lab.training.sweeping import MEASURES, Sweep

L0 = "L0 (active features per token)"


@draw.register
def run(result: Run) -> Figure:
    """FVU and L0 of the batch and of held-out tokens, and dead features over training; ΔCE and the coefficient of a
    penalty where there are any."""
    history = result.to_pandas()
    names = {"fvu": "FVU", "l0": L0, "dead": "dead features (share)", "ce_delta": "ΔCE, held-out (nats/token)",
             "coefficient": "coefficient of the penalty"}  # fmt: skip
    names = {name: label for name, label in names.items() if name in history}
    figure, axes = subplots(len(names), height=2.6)
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        known = history.dropna(subset=name)
        axis.plot(known["tokens"] / 1e6, known[name], color=COLOURS[0], label="batch")
        if (held := f"{name}_held_out") in history:
            known = history.dropna(subset=held)
            axis.plot(known["tokens"] / 1e6, known[held], color=COLOURS[1], linestyle="--", label="held-out")
            label += f"\ngap (held-out − batch) {known[held].iloc[-1] - known[name].iloc[-1]:+.2g}"
            axis.legend()
        axis.set(xlabel="million tokens", title=label, ylim=(0, None))
    axes[0].set_ylim(0, min(1.0, 1.05 * max(row["fvu"] for row in result.history)))
    return figure


@draw.register
def sweep(result: Sweep) -> Figure:
    """What is lost against L0, a line a family: nearer to the lower left is better. A point is the mean over seeds."""
    table = result.to_pandas()
    fvu = f"FVU, {'held-out' if result.held_out else 'training'} tokens"
    measures = {"fvu": fvu, "ce_delta": "ΔCE (nats/token)", "mmcs": "MMCS, true features found"}
    shown = [name for name in measures if name in table]
    figure, axes = subplots(len(shown), height=3.2)
    varied = [c for c in table.columns if c not in (*MEASURES, "seed")]
    groups: Any = table.groupby(varied, dropna=False)
    points = groups[["l0", *shown]].mean().reset_index()
    for axis, name in zip(axes, shown, strict=True):
        lines = points.sort_values("l0").groupby([c for c in ("family", "site") if c in points], sort=False)
        for number, (names, part) in enumerate(lines):
            axis.plot(part["l0"], part[name], label=plain(", ".join(names)), **look(number))
        axis.set(xlabel=L0, title=measures[name])
    legend_beside(axes[-1])
    return figure


@draw.register
def l0_choice(choice: L0Choice) -> Figure:
    """What says which L0 is right, beside FVU, which does not: it falls with every further feature."""
    table = choice.to_pandas().sort_values("l0")
    titles = {
        "c_dec": "c_dec (mean |cosine| of rows): its minimum", "s_n": "s_n (decoder projection): its minimum",
        "fvu": "FVU: falls on and on",
    }  # fmt: skip
    figure, axes = subplots(len(titles), height=2.8)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.plot(table["l0"], table[name], marker="o", color=COLOURS[0])
        axis.set(xlabel=L0, title=title)
        if name != "fvu":
            lowest = int(table[name].to_numpy().argmin())
            axis.axvline(float(table["l0"].to_numpy()[lowest]), color=GREY, linewidth=1, linestyle="--")
    return figure
