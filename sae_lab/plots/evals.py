"""Pictures of what evals found: every figure on an axis of its own beside its control; curves where there is one."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Drawing

from sae_lab.evals.positions import ByPosition, Hill
from sae_lab.evals.reporting import Report
from sae_lab.plots.style import COLOURS, GREY, draw, look, plain, subplots
from sae_lab.results import Figure, Result

MOST = 30  # measures in one picture
Row = tuple[str, list[tuple[str, Figure]]]


@draw.register
def measures(result: Result) -> Drawing:
    """One row a measure, with a scale of its own: a full marker a coder, ± a standard error; a cross for the control.

    Measures are in different units: compare within a row only.
    """
    rows = _rows(result)
    if not rows:
        raise ValueError(f"this {type(result).__name__} holds no number to draw")
    names = list(dict.fromkeys(name for _, those in rows for name, _ in those))
    looks: dict[str, dict[str, Any]] = {name: look(i) | {"linestyle": "none"} for i, name in enumerate(names)}
    figure, axes = subplots(1, height=0.4 + 0.06 * len(names), width=6.0, rows=len(rows[:MOST]))
    for axis, (measure, those) in zip(axes, rows, strict=False):
        for name, found in those:
            y = -names.index(name)
            error = None if math.isnan(found.error) else found.error
            axis.errorbar(found.value, y, xerr=error, capsize=2, clip_on=False, **looks[name])
            if not math.isnan(found.control):
                axis.plot(found.control, y, clip_on=False, **looks[name] | {"marker": "x", "markersize": 5})
        axis.margins(x=0.12)
        axis.set(yticks=[], ylim=(-len(names) + 0.4, 0.6))
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="x", labelsize=6, pad=1)
        axis.set_ylabel(plain(measure), rotation=0, ha="right", va="center", fontsize=8)
    if len(names) > 1:
        marks = [axes[0].plot([], [], **one)[0] for one in looks.values()]  # clipped: else they leave no layout
        figure.legend(marks, [plain(name) for name in names], loc="outside lower center", ncols=min(5, len(names)))
    return figure


def _rows(result: Result) -> list[Row]:
    """(measure, [(coder, figure)]) of what is a number."""
    every = [("", "", found) for found in result.figures()]
    if isinstance(result, Report):
        sections = result.found.items()
        every = [(name, title, f) for i, name in enumerate(result.names) for title, of in sections for f in of[i]]
    rows: dict[tuple[str, str], Row] = {}
    for name, title, found in every:
        if not math.isnan(found.value):
            rows.setdefault((title, found.key or found.measure), (found.measure, []))[1].append((name, found))
    return list(rows.values())


@draw.register
def by_position(result: ByPosition) -> Drawing:
    """FVU and ΔCE in each bin of positions beside PCA; a line where the training context ends."""
    figure, axes = subplots(2, height=2.6)
    middle = [(a + b - 1) / 2 for a, b in pairwise(result.edges)]
    for axis, title, own, error, control in (
        (axes[0], "FVU", result.fvu, result.fvu_se, result.pca_fvu),
        (axes[1], "rise of the loss, nats/token", result.ce_delta, result.ce_delta_se, result.pca_ce_delta),
    ):
        axis.errorbar(middle, own, yerr=error, capsize=2, label="coder", color=COLOURS[0], marker="o")
        axis.plot(middle, control, label=f"PCA {result.pca_rank}", color=COLOURS[1], marker="s", linestyle="--")
        if result.trained < result.edges[-1]:
            axis.axvline(result.trained, color=GREY, linewidth=0.8, linestyle=":", label="trained up to here")
        lowest = min(value - error for value, error in zip(own, error, strict=True))
        axis.set(xlabel="position in the context", title=title, ylim=(min(0.0, 1.1 * lowest), None))
    axes[1].legend()
    return figure


@draw.register
def hill(result: Hill) -> Drawing:
    """The coders' lost share of the loss over 1/L0, and the curve through them."""
    figure, (axis,) = subplots(1, height=2.8, width=4.2)
    rare = 1 / np.array(result.l0)
    grid = np.geomspace(rare.min() / 1.5, rare.max() * 1.5, 80)
    curve = [result.lost_at(1 / s) for s in grid.tolist()]
    axis.plot(grid, curve, color=GREY, label=f"Hill, n = {result.slope:.2f}")
    axis.plot(rare, result.lost, marker="o", linestyle="none", color=COLOURS[0], label="coders")
    axis.set(xscale="log", xlabel="1 / L0", ylabel="1 − CE recovered", title=f"half is lost at L0 {result.half_l0:.2g}")
    axis.set_xticks(rare, [f"1/{l0:.3g}" for l0 in result.l0])
    axis.minorticks_off()
    axis.legend()
    return figure
