"""Pictures of geometry: a map of clusters, words around a circle, patterns above noise."""

import numpy as np
from matplotlib.figure import Figure

from sae_lab.geometry import Circular, Clusters, Patterns
from sae_lab.plots.style import COLOURS, GREY, MARKERS, draw, plain, subplots
from sae_lab.results import Name, counted

NAMED = 7  # clusters that get a colour and a marker of their own


@draw.register
def clusters(result: Clusters) -> Figure:
    """The map, the tightest clusters marked; and how tight all are, against the tightest of each control."""
    figure, (axis, tight) = subplots(2, height=3.0)
    points, labels = result.points.numpy(), result.labels.numpy()
    axis.scatter(*points.T, s=1.5, color="0.8", linewidths=0, rasterized=True)  # light: the clusters lie among them
    for number in range(min(NAMED, result.tight)):
        own = points[labels == number]
        named = result.names.of(members := result.members(number))
        many = counted(len(members), "feature")
        called = f"{number}: {Name(next(iter(named.values())), 18)}" if named else f"{number} ({many})"
        looks = {"color": COLOURS[number], "marker": MARKERS[number], "linewidths": 0.4, "edgecolors": "white"}
        axis.scatter(*own.T, s=22, label=plain(called), **looks)
    axis.set(xticks=[], yticks=[], title=plain(f"{counted(result.rows, 'feature')} by {result.by}"))
    axis.set(xlabel=f"first axis ({'PCA' if result.layout == 'pca' else 't-SNE'})", ylabel="second axis")
    if result.tight:
        axis.legend(title="tightest clusters", loc="center right", bbox_to_anchor=(-0.08, 0.5))
    tight.plot(np.arange(1, result.n + 1), result.cosines.numpy(), color=COLOURS[0], label="found")
    for number, control in enumerate(result.controls):
        if control.clusters:
            tight.axhline(control.largest, color=COLOURS[number + 1], linestyle=("--", ":")[number], label=control.name)
    tight.set(xlabel="cluster, tightest first", ylabel="mean cosine within")
    tight.set_title(f"{result.tight} of {counted(result.n, 'cluster')} above controls")
    tight.legend()
    return figure


@draw.register
def circular(result: Circular) -> Figure:
    """The words in the plane of the features, and of the activations; a line joins them in their true order."""
    figure, axes = subplots(2, height=3.4)
    titles = (
        f"{counted(result.n_features, 'feature')}: {result.adjacent}/{result.words} in order, p {result.p:.2g}",
        f"activations: {result.raw_adjacent}/{result.words} in order, p {result.raw_p:.2g}",
    )
    for axis, points, title in zip(axes, (result.points, result.raw_points), titles, strict=True):
        x, y = points.numpy().T
        axis.plot([*x, x[0]], [*y, y[0]], color=GREY, linewidth=0.8, zorder=0)
        axis.plot(x, y, "o", color=COLOURS[0])
        middle, places = points.numpy().mean(0), _around(points.numpy())
        for name, point, place in zip(result.names, points.numpy(), places, strict=True):
            axis.annotate(
                plain(name), point, xytext=place, textcoords="data", fontsize=8, va="center",
                ha="left" if place[0] > middle[0] else "right",
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.4, "shrinkA": 1, "shrinkB": 3},
            )  # fmt: skip
        far = float(np.abs(places - middle).max())
        axis.set(xlim=middle[0] + far * np.array([-1.7, 1.7]), ylim=middle[1] + far * np.array([-1.15, 1.15]))
        axis.set(xticks=[], yticks=[], title=title, aspect="equal", xlabel="first axis", ylabel="second axis")
    return figure


def _around(points: np.ndarray) -> np.ndarray:
    """Where names stand: on a circle around the points, each at the angle of its point, pushed apart where two names
    would cover each other."""
    x, y = (points - points.mean(0)).T
    order = np.argsort(np.arctan2(y, x))
    angles = np.arctan2(y, x)[order]
    gap = 1.8 * np.pi / len(angles)
    for _ in range(200):
        lack = (gap - np.diff(angles, append=angles[0] + 2 * np.pi)).clip(0) / 2
        angles += np.roll(lack, 1) - lack
    places = np.empty_like(points)
    places[order] = points.mean(0) + 1.2 * (np.hypot(x, y).max() or 1.0) * np.stack([np.cos(angles), np.sin(angles)], 1)
    return places


@draw.register
def patterns(result: Patterns) -> Figure:
    """Singular values against the largest of the shuffles."""
    figure, (axis,) = subplots(1, height=2.6, width=4.6)
    ranks = np.arange(1, result.looked + 1)
    axis.plot(ranks, result.strength.numpy(), marker="o", color=COLOURS[0], label="activations")
    axis.plot(ranks, result.noise.numpy(), marker="s", color=COLOURS[1], linestyle="--", label="largest of shuffles")
    title = f"{counted(result.rank, 'pattern')} above noise"
    axis.set(xlabel="pattern", ylabel="singular value", ylim=(0, None), title=title)
    axis.legend()
    return figure
