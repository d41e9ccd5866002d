"""sl.plot(result): one picture for any result, drawn by matplotlib."""

from typing import TYPE_CHECKING

from sae_lab.feature_index import FeatureView
from sae_lab.training import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot(result: Run | FeatureView) -> "Figure":
    """Draw a result: a ``Run`` (its training curves) or a ``FeatureView`` (its activations)."""
    if isinstance(result, Run):
        return _run(result)
    if isinstance(result, FeatureView):
        return _feature(result)
    raise ValueError(f"sl.plot draws a Run or a FeatureView, got {type(result).__name__}")


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


def _subplots(columns: int, height: float) -> "tuple[Figure, list[Axes]]":
    import matplotlib.pyplot  # noqa: F401 - in a notebook this is what teaches figures to show themselves
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot's: nothing global, and a notebook shows it once.
    figure = Figure(figsize=(3.6 * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    return figure, list(axes)
