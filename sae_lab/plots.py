"""sl.plot(result): one picture for any result, drawn by matplotlib."""

import sys
from typing import TYPE_CHECKING, Any

from sae_lab.circuits import Attribution, PatchGrid
from sae_lab.dosing import PROMPT, DoseResponse
from sae_lab.evals.choosing import L0Choice
from sae_lab.feature_index import FeatureView
from sae_lab.sweeping import MEASURES, Sweep
from sae_lab.training import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot(
    result: Run | FeatureView | Sweep | L0Choice | DoseResponse | PatchGrid | Attribution,
) -> "Figure":
    """Draw a result: a ``Run`` (its training curves), a ``FeatureView`` (its activations), a ``Sweep`` (its Pareto
    fronts), a ``DoseResponse`` (what steering buys and costs), a ``PatchGrid``, an ``Attribution`` (estimates against
    true effects), or what ``evals.choose_l0`` gave."""
    drawers = {
        Run: _run, FeatureView: _feature, Sweep: _sweep, L0Choice: _l0_choice, DoseResponse: _doses,
        PatchGrid: _patches, Attribution: _attribution,
    }  # fmt: skip
    for kind, draw in drawers.items():
        if isinstance(result, kind):
            figure = draw(result)
            for axis in figure.axes:
                axis.title.set_fontsize(10)  # axis.set(title=) would undo it
            return figure
    names = ", ".join(kind.__name__ for kind in drawers)
    raise ValueError(f"sl.plot draws results of these kinds: {names}; got {type(result).__name__}")


def _run(run: Run) -> "Figure":
    history = run.to_pandas()
    names = {"fvu": "FVU of the batch", "l0": "L0 (active features per token)", "dead": "dead features (share)"}
    figure, axes = _subplots(len(names), height=2.6)
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        axis.plot(history["tokens"] / 1e6, history[name], color="tab:blue", linewidth=1.2)
        axis.set(xlabel="million tokens", title=label, ylim=(0, None))
    axes[0].set_ylim(0, min(1.0, 1.05 * max(row["fvu"] for row in run.history)))
    return figure


def _feature(view: FeatureView) -> "Figure":
    figure, (axis,) = _subplots(1, height=2.4)
    edges, counts = view.histogram["edges"], view.histogram["counts"]
    axis.bar(edges[:-1], counts, width=edges[1] - edges[0], align="edge", color="tab:blue")
    title = f"feature {view.feature}: {view.density:.3%} of tokens"
    axis.set(yscale="log", xlabel="activation", ylabel="tokens", title=title)
    return figure


def _sweep(sweep: Sweep) -> "Figure":
    """What is lost against L0, a line a family: nearer to the lower left is better. A point is the mean over seeds."""
    table = sweep.to_pandas()
    measures = {"fvu": "FVU, unseen tokens", "ce_delta": "ΔCE (nats/token)", "mmcs": "MMCS, true features found"}
    shown = [name for name in measures if name in table]
    figure, axes = _subplots(len(shown), height=3.2)
    varied = [c for c in table.columns if c not in (*MEASURES, "seed")]
    groups: Any = table.groupby(varied, dropna=False)
    points = groups[["l0", *shown]].mean().reset_index()
    for axis, name in zip(axes, shown, strict=True):
        lines = points.sort_values("l0").groupby([c for c in ("family", "site") if c in points], sort=False)
        for number, (names, part) in enumerate(lines):
            marker = "osD^vP*Xd"[number // 10 % 9]
            axis.plot(part["l0"], part[name], marker=marker, markersize=4, linewidth=1.2, label=", ".join(names))
        axis.set(xlabel="L0 (active features per token)", title=measures[name])
    axes[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _l0_choice(choice: L0Choice) -> "Figure":
    """What says which L0 is right, beside FVU, which does not: it falls with every further feature."""
    table = choice.to_pandas().sort_values("l0")
    titles = {
        "c_dec": "c_dec (mean |cosine| of rows): its minimum", "s_n": "s_n (decoder projection): its minimum",
        "fvu": "FVU: falls on and on",
    }  # fmt: skip
    figure, axes = _subplots(len(titles), height=2.8)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.plot(table["l0"], table[name], marker="o", markersize=4, color="tab:blue", linewidth=1.2)
        axis.set(xlabel="L0 (active features per token)", title=title)
        if name != "fvu":
            lowest = int(table[name].to_numpy().argmin())
            axis.axvline(float(table["l0"].to_numpy()[lowest]), color="0.6", linewidth=1, linestyle="--")
    return figure


def _doses(result: DoseResponse) -> "Figure":
    """Log-odds against strength, and against what it costs: at equal cost, higher is better."""
    table = result.to_pandas()
    figure, axes = _subplots(2, height=3.0)
    for number, (method, part) in enumerate(table.groupby("method", sort=False)):
        for axis, x in zip(axes, ("strength", "cost"), strict=True):
            if method == PROMPT and x == "strength":
                axis.axhline(float(part["log_odds"].iloc[0]), color=f"C{number}", linewidth=1, linestyle=":")
                continue
            marker = "*" if method == PROMPT else "o"
            bars = part["se"].fillna(0)
            axis.errorbar(
                part[x], part["log_odds"], bars, marker=marker, markersize=4, linewidth=1.2, color=f"C{number}",
                label=method,
            )  # fmt: skip
    axes[0].set(xlabel="strength (f_scale)", title="log-odds of the target (nats)")
    axes[1].set(xlabel="rise of loss on other text (nats)", title="log-odds at a cost")
    axes[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _patches(grid: PatchGrid) -> "Figure":
    """A map for each kind of site, layers upward, one colour scale for all, white at no effect."""
    figure, axes = _subplots(len(grid.kinds), height=4.2)
    most = float(grid.values.abs().max())
    labels = [a if a == b else f"{a} ← {b}" for a, b in grid.tokens]
    image = None
    for axis, kind, values in zip(axes, grid.kinds, grid.values, strict=True):
        image = axis.imshow(values, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        marks = range(0, len(grid.layers), max(1, len(grid.layers) // 8))
        axis.set_yticks(list(marks), [str(grid.layers[i]) for i in marks], fontsize=7)
        axis.set(title=kind)
    axes[0].set_ylabel("layer")
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("share of the metric's change", fontsize=8)
    return figure


def _attribution(result: Attribution) -> "Figure":
    """Estimates against true effects: on the line, they agree."""
    table = result.to_pandas().dropna()
    figure, (axis,) = _subplots(1, height=3.4)
    is_error = table["feature"] < 0
    for name, part, colour in (
        ("features", table[~is_error], "tab:blue"),
        ("the SAE's error", table[is_error], "tab:orange"),
    ):
        axis.scatter(part["estimate"], part["truth"], s=12, color=colour, label=name)
    axis.axline((0, 0), slope=1, color="0.6", linewidth=1, linestyle="--")
    axis.set(xlabel="estimate", ylabel="effect of the patch", title="units of the metric")
    axis.legend(fontsize=8, frameon=False)
    return figure


def _subplots(columns: int, height: float) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    if "ipykernel" in sys.modules:  # a figure shows itself once pyplot has loaded the notebook's backend: now it does
        import matplotlib.pyplot

        matplotlib.pyplot.draw_if_interactive()
    # A Figure of its own, not pyplot's: nothing global, and a notebook shows it once.
    figure = Figure(figsize=(3.6 * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)
