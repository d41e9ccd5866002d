"""Pictures of geometry: a map of clusters, words around a circle, patterns above noise."""

import numpy as np
from matplotlib.figure import Figure

from sae_lab.geometry import Circular, Clusters, Patterns
from sae_lab.plots.style import COLOURS, GREY, MARKERS, draw, plain, subplots
from sae_lab.results import Name

NAMED = 7  # clusters that get a colour and a marker of their own


@draw.register
def clusters(result: Clusters) -> Figure:
    """The map, the tightest clusters marked; and how tight all are, against the tightest of each control."""
    figure, (axis, tight) = subplots(2, height=3.0)
    points, labels = result.points.numpy(), result.labels.numpy()
    axis.scatter(*points.T, s=1.5, color=GREY, linewidths=0, rasterized=True)
    for number in range(min(NAMED, result.tight)):
        own = points[labels == number]
        named = result.names.of(members := result.members(number))
        called = f"{number}: {Name(next(iter(named.values())), 18)}" if named else f"{number} ({len(members)} features)"
        axis.scatter(*own.T, s=16, color=COLOURS[number], marker=MARKERS[number], linewidths=0, label=plain(called))
    axis.set(xticks=[], yticks=[], title=plain(f"{result.rows:,} features by {result.by}"))
    axis.set(xlabel=f"first axis ({result.layout})", ylabel="second axis")
    if result.tight:
        axis.legend(title="tightest clusters", loc="center right", bbox_to_anchor=(-0.08, 0.5), fontsize=7)
    tight.plot(np.arange(1, result.n + 1), result.cosines.numpy(), color=COLOURS[0], label="found")
    for number, control in enumerate(result.controls):
        if control.clusters:
            tight.axhline(control.largest, color=COLOURS[number + 1], linestyle=("--", ":")[number], label=control.name)
    tight.set(xlabel="cluster, tightest first", ylabel="mean cosine within", title=f"{result.tight} above controls")
    tight.legend()
    return figure


@draw.register
def circular(result: Circular) -> Figure:
    """The words in the plane of the features, and of the activations; a line joins them in their true order."""
    figure, axes = subplots(2, height=3.4)
    titles = (
        f"{result.n_features} features: {result.adjacent}/{result.words} in order, p {result.p:.2g}",
        f"activations: {result.raw_adjacent}/{result.words}, p {result.raw_p:.2g}",
    )
    for axis, points, title in zip(axes, (result.points, result.raw_points), titles, strict=True):
        x, y = points.numpy().T
        axis.plot([*x, x[0]], [*y, y[0]], color=GREY, linewidth=0.8, zorder=0)
        axis.plot(x, y, "o", color=COLOURS[0])
        for name, across, up in zip(result.names, x, y, strict=True):  # away from the middle, clear of the line
            right, high = np.array([across - x.mean(), up - y.mean()]) / np.hypot(np.ptp(x), np.ptp(y))
            side, level = ("left" if right > 0 else "right"), ("bottom" if high > 0 else "top")
            offset = (5 if right > 0 else -5, 3 if high > 0 else -3)
            axis.annotate(
                plain(name), (across, up), xytext=offset, textcoords="offset points", fontsize=8, ha=side, va=level
            )
        axis.margins(0.3, 0.15)
        axis.set(xticks=[], yticks=[], title=title, aspect="equal", xlabel="first axis", ylabel="second axis")
    return figure


@draw.register
def patterns(result: Patterns) -> Figure:
    """Singular values against the largest of the shuffles."""
    figure, (axis,) = subplots(1, height=2.6, width=4.6)
    ranks = np.arange(1, result.looked + 1)
    axis.plot(ranks, result.strength.numpy(), marker="o", color=COLOURS[0], label="activations")
    axis.plot(ranks, result.noise.numpy(), marker="s", color=COLOURS[1], linestyle="--", label="largest of shuffles")
    axis.set(xlabel="pattern", ylabel="singular value", ylim=(0, None), title=f"{result.rank} patterns above noise")
    axis.legend()
    return figure
