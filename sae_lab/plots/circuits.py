"""Pictures of circuits: the map of patches, estimates against truth, the graph of features."""

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sae_lab.circuits import Attribution, Edge, FeatureCircuit, Node, PatchGrid
from sae_lab.circuits.nodes import ERROR
from sae_lab.plots.style import COLOURS, GREY, NEGATIVE, POSITIVE, draw, plain, subplots
from sae_lab.results import Name, counted
from sae_lab.types import KINDS, Site

NODES, EDGES = 30, 60  # how many are drawn at most, the strongest
DASHED = (0, (3, 1.6))
LETTERS = 11  # of a line of a name below its node
SIDE = 0.62  # inches from one node of a cell to the next
NOTICEABLE = 0.15  # share of the largest value from which a negative cell of a map is marked, an effect named


@draw.register
def patches(grid: PatchGrid) -> Figure:
    """A map for each kind of site, layers upward, on one colour scale; white is no effect. A bar marks negative values,
    which look like positive ones in grey."""
    figure, axes = subplots(len(grid.kinds), height=4.2, width=max(2.6, min(3.6, 0.9 + 0.24 * len(grid.positions))))
    values = grid.values.numpy()
    most = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    labels = [plain(a if a == b else f"{a} ← {b}") for a, b in grid.tokens]
    for axis, kind, shown in zip(axes, grid.kinds, values, strict=True):
        axis.imshow(shown, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
        rows, columns = np.nonzero(shown < -NOTICEABLE * most)
        axis.scatter(columns, rows, marker="_", s=16, linewidths=1, color="black")
        axis.set_xticks(range(len(labels)), labels, rotation=90)
        marks = range(0, len(grid.layers), max(1, len(grid.layers) // 8))
        axis.set_yticks(list(marks), [str(grid.layers[i]) for i in marks])
        axis.tick_params(axis="y", labelleft=axis is axes[0])  # the layers of all maps are the same
        axis.set(title=plain(kind))
        axis.spines[["top", "right"]].set_visible(True)
    axes[0].set_ylabel("layer")
    bar = figure.colorbar(axes[0].images[0], ax=axes, shrink=0.8)
    what = "estimated share" if grid.estimated else "share"
    bar.set_label(f"{what} of the metric's change (–: negative)", fontsize=8)
    return figure


@draw.register
def attribution(result: Attribution) -> Figure:
    """Estimates against true effects; on the line they agree."""
    table = result.to_pandas().dropna()
    figure, (axis,) = subplots(1, height=3.4)
    is_error = table["feature"] < 0
    for name, part, colour, marker in (
        ("features", table[~is_error], COLOURS[0], "o"),
        ("the SAE's error", table[is_error], COLOURS[1], "s"),
    ):
        axis.scatter(part["estimate"], part["truth"], s=13, color=colour, marker=marker, label=name)
    axis.axline((0, 0), slope=1, color=GREY, linewidth=1, linestyle="--", label="estimate = measured")
    large = table[~is_error & (table["truth"].abs() >= NOTICEABLE * table["truth"].abs().max())]
    for feature, estimate, truth in zip(large["feature"], large["estimate"], large["truth"], strict=True):
        left = estimate < table["estimate"].mean()
        axis.annotate(
            plain(result.names.numbered(int(feature))), (estimate, truth), xytext=(6 if left else -6, 4),
            textcoords="offset points", fontsize=8, ha="left" if left else "right",
        )  # fmt: skip
    axis.set(xlabel="estimate (units of the metric)", ylabel="measured by a patch (units of the metric)")
    axis.set_title("effects of features")
    both = table[["estimate", "truth"]].to_numpy() if len(table) else np.zeros((1, 2))
    room = 0.08 * float(np.ptp(both)) or 1.0
    ends = float(both.min()) - room, float(both.max()) + room
    axis.set(xlim=ends, ylim=ends)  # on equal scales one sees how far off an estimate is
    axis.legend()
    return figure


@draw.register
def graph(circuit: FeatureCircuit) -> Figure:
    """Sites upward, tokens from left to right. A node is a feature (a disc with its number and name) or an error (a
    square); its area, and the width of an edge, is the size of the effect. Negative: hollow nodes, dashed edges.

    Only the strongest edges are drawn, with their ends; without edges, the strongest nodes.
    """
    edges = [edge for edge in circuit.edges if edge.effect][:EDGES]
    nodes = _shown(circuit, edges)
    edges = [edge for edge in edges if edge.upstream in nodes and edge.downstream in nodes]
    sites = sorted({node.site for node in nodes}, key=_depth)
    positions = sorted({node.position for node in nodes})
    places, ticks, width = _places(nodes, sites, positions)
    figure, (axis,) = subplots(1, height=1.3 + 0.95 * len(sites), width=max(4.2, 1.6 + SIDE * width))
    _draw_edges(axis, edges, places)
    _draw_nodes(axis, circuit, nodes, places)
    tokens = [f"{plain(circuit.tokens[p].strip() or repr(circuit.tokens[p]))}\n{p}" for p in positions]
    axis.set_xticks(ticks, tokens)
    axis.set_yticks(range(len(sites)), [plain(site.key) for site in sites])
    axis.set(xlim=(-0.8, width - 0.2), ylim=(-0.55, len(sites) - 0.35))
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    every = counted(len(circuit.nodes), "node"), counted(len(circuit.edges), "edge")
    more = f"{len(nodes)} of {every[0]}, {len(edges)} of {every[1]}"
    axis.set_title(f"{more}\nmetric {circuit.base:.2f}, {circuit.source:.2f} with the sources", loc="left")
    _legend(axis, bool(edges))
    return figure


def _shown(circuit: FeatureCircuit, edges: Sequence[Edge]) -> list[Node]:
    ends = list(dict.fromkeys(node for edge in edges for node in (edge.upstream, edge.downstream)))
    wanted = ends or list(circuit.nodes)
    return sorted(wanted, key=lambda node: -abs(circuit.nodes.get(node, 0.0)))[:NODES]


def _depth(site: Site) -> tuple[int, int]:
    """The order of the model, as far as names tell."""
    kind = KINDS.index(site.kind) if site.kind in KINDS else len(KINDS)
    return (-1 if site.layer is None and site.kind == "embed" else site.layer or 0, kind)


def _places(
    nodes: Sequence[Node], sites: Sequence[Site], positions: Sequence[int]
) -> tuple[dict[Node, tuple[float, float]], list[float], float]:
    """(each node's place, the middle of each position's column, the width), in units of a node. A column is as wide as
    its fullest cell."""
    places: dict[Node, tuple[float, float]] = {}
    ticks, left = [], 0.0
    for position in positions:
        cells = [[n for n in nodes if n.site == site and n.position == position] for site in sites]
        widest = max(len(cell) for cell in cells)
        for height, cell in enumerate(cells):
            for number, node in enumerate(sorted(cell, key=lambda n: n.feature)):
                # Half a step up and down by turns: an edge between two nodes of a column does not run through a third.
                lift = 0.13 * (-1) ** number if len(cell) > 1 else 0.0
                places[node] = (left + (widest - len(cell)) / 2 + number, height + lift)
        ticks.append(left + (widest - 1) / 2)
        left += widest + 0.35
    return places, ticks, left


def _draw_edges(axis: Axes, edges: Sequence[Edge], places: dict[Node, tuple[float, float]]) -> None:
    most = max((abs(edge.effect) for edge in edges), default=1.0)
    for edge in reversed(edges):  # the strongest on top
        share = abs(edge.effect) / most
        ends: Any = [places[edge.upstream], places[edge.downstream]]
        positive = edge.effect > 0
        axis.plot(
            *np.array(ends).T, color=POSITIVE if positive else NEGATIVE, linewidth=0.4 + 3.2 * share,
            linestyle="-" if positive else DASHED, alpha=0.35 + 0.55 * share, zorder=1, solid_capstyle="round",
        )  # fmt: skip


def _draw_nodes(
    axis: Axes, circuit: FeatureCircuit, nodes: Sequence[Node], places: dict[Node, tuple[float, float]]
) -> None:
    effects = {node: circuit.nodes.get(node, 0.0) for node in nodes}
    most = max(map(abs, effects.values()), default=1.0) or 1.0
    for node, effect in effects.items():
        colour = POSITIVE if effect >= 0 else NEGATIVE
        axis.scatter(
            *places[node], s=22 + 150 * abs(effect) / most, marker="s" if node.feature == ERROR else "o", zorder=2,
            facecolor=colour if effect >= 0 else "white", edgecolor=colour, linewidth=1.4,
        )  # fmt: skip
        axis.annotate(
            "error" if node.feature == ERROR else _called(circuit, node), places[node], xytext=(0, -9.5), fontsize=6.5,
            textcoords="offset points", ha="center", va="top", zorder=3,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4},
        )  # fmt: skip


def _called(circuit: FeatureCircuit, node: Node) -> str:
    """The number, and the name below it in two short lines."""
    words = wrap(Name(circuit.name(node), 2 * LETTERS), LETTERS)[:2]
    return "\n".join([str(node.feature), *map(plain, words)])


def _legend(axis: Axes, edges: bool) -> None:
    nodes = (("o", POSITIVE, POSITIVE, "feature, effect > 0"), ("o", "white", NEGATIVE, "feature, effect < 0"),
             ("s", "0.6", "0.6", "error"))  # fmt: skip
    shown = [
        Line2D([], [], linestyle="", marker=marker, markersize=7, markerfacecolor=face, markeredgecolor=edge,
               markeredgewidth=1.4, label=label)
        for marker, face, edge, label in nodes
    ]  # fmt: skip
    if edges:
        shown += [
            Line2D([], [], color=POSITIVE, linewidth=2, label="edge, effect > 0"),
            Line2D([], [], color=NEGATIVE, linewidth=2, linestyle=DASHED, label="edge, effect < 0"),
        ]
    axis.legend(handles=shown, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=2.4)
