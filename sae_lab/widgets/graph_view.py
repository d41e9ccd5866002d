"""What GraphLab sends to the screen, its form without scripts, and its code."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sae_lab.circuits import AttributionGraph
from sae_lab.circuits.nodes import Node
from sae_lab.results import Html, Name, joined, tag

from .static_html import block, code, dotted, figure, table

LISTED = 12  # nodes, and edges, in the form without scripts
Groups = Sequence[Mapping[str, Any]]


def packed(graph: AttributionGraph, whole: AttributionGraph, offered: Sequence[int]) -> dict[str, Any]:
    """A graph for the screen, its arrays in base64. graph: what is sent; whole: what it was pruned from. offered: the
    layers with a coder.

    places: "nodes 3", int32, (layer, position, number). values, influence: " nodes", float32, NaN where there is none.
    sources, targets, effects: " edges", nodes by number (uint32), and float32. incoming: " nodes", float32: the sum of
    the sizes of what adds to a node, with what is not in the graph. left: nodes and edges that are left out.
    """
    rows, columns = graph.effects.nonzero(as_tuple=True)
    numbers = torch.tensor([graph.number(node) for node in graph.targets])
    incoming = torch.zeros(len(graph.nodes))
    incoming[numbers] = graph.effects.abs().sum(1) + graph.rest_size.nan_to_num(0.0)
    left = [len(whole.nodes) - len(graph.nodes), int(whole.effects.count_nonzero()) - len(rows)]
    return {
        "counts": list(graph.counts), "layers": graph.n_layers, "tokens": graph.tokens, "outputs": graph.outputs,
        "weights": graph.weights.tolist(), "offered": list(offered), "left": left,
        "places": _base64(graph.places.numpy(), "<i4"), "values": _base64(graph.values.numpy(), "<f4"),
        "influence": _base64(graph.influence.numpy(), "<f4"), "incoming": _base64(incoming.numpy(), "<f4"),
        "sources": _base64(columns.numpy(), "<u4"), "targets": _base64(numbers[rows].numpy(), "<u4"),
        "effects": _base64(graph.effects[rows, columns].numpy(), "<f4"),
    }  # fmt: skip


def _base64(array: np.ndarray, kind: str) -> str:
    return base64.b64encode(array.astype(kind).tobytes()).decode()


def title(graph: AttributionGraph, number: int, name: str = "") -> str:
    """A node in words: ‘layer 8, feature 812 at 5 months’."""
    node, kind = graph.nodes[number], graph.kinds[number]
    if kind == "logit":
        return f"output {dotted(graph.outputs[number - sum(graph.counts[:3])])!r}"
    at = f"{dotted(graph.tokens[node.position])!r} ({node.position})"
    if kind == "token":
        return f"token {at}"
    what = "error" if kind == "error" else f"feature {node.feature}"
    return f"layer {node.site.layer}, {what} at {at}{f' {Name(name)}' if name else ''}"


def items(pinned: Sequence[int], groups: Groups) -> list[tuple[str, list[int]]]:
    """What the pinned subgraph shows: (name of a group, its nodes), then ("", [node]) of each other pinned node."""
    inside = {node for group in groups for node in group["nodes"]}
    return [(group["name"], list(group["nodes"])) for group in groups] + [("", [n]) for n in pinned if n not in inside]


def summed(graph: AttributionGraph, parts: Sequence[Sequence[int]]) -> list[tuple[int, int, float]]:
    """(source, target, sum of the edges' weights) between parts, each a list of nodes, where there is an edge."""
    sources, features = graph.effects.shape[1], graph.counts[0]
    found = []
    for t, into in enumerate(parts):
        rows = [n if n < features else n - sources + features for n in into if n < features or n >= sources]
        for s, out in enumerate(parts):
            columns = [n for n in out if n < sources]
            effects = graph.effects[rows][:, columns]
            if s != t and bool(effects.any()):
                found.append((s, t, float(effects.sum())))
    return found


def expression(node: Node) -> str:
    """A node as the call that makes it."""
    layer = "" if node.site.layer is None else f", {node.site.layer}"
    return f"sl.circuits.Node(sl.Site({node.site.kind!r}{layer}), {node.position}, {node.feature})"


def graph_html(
    graph: AttributionGraph, part: AttributionGraph, names: Mapping[int, str], state: Mapping[str, Any]
) -> Html:
    """A graph as script-free HTML. graph: what is sent to the screen, which has the numbers of nodes; part: what is
    shown of it. state: pinned, groups, tests, steered, node."""
    called = lambda number: title(graph, number, names.get(number, ""))  # noqa: E731
    order = part.influence.argsort(descending=True)[:LISTED].tolist()
    nodes = [graph.number(part.nodes[i]) for i in order if float(part.influence[i]) > 0]
    rows = [[called(n), figure(_known(graph.values[n])), f"{float(graph.influence[n]):.1%}"] for n in nodes]
    edges = [[called(graph.number(e.upstream)), called(graph.number(e.downstream)), figure(e.effect)]
             for e in part.top(LISTED)] if bool(part.effects.any()) else []  # fmt: skip
    node = state["node"]
    return block(
        tag("p", tag("b", "Attribution graph"), " of ", dotted("".join(graph.tokens))),
        tag("p", part._said),
        None if node is None else tag("p", "Open: ", called(node)),
        table(["node", "activation", "influence"], rows),
        table(["from", "to", "weight"], edges),
        *_pinned_html(graph, called, state["pinned"], state["groups"]),
        *(_test_html(test, called) for test in state["tests"]),
        _steered_html(state["steered"]),
    )


def _known(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _pinned_html(graph: AttributionGraph, called: Any, pinned: Sequence[int], groups: Groups) -> list[Html | None]:
    parts = items(pinned, groups)
    words = [Name(name) if name else called(nodes[0]) for name, nodes in parts]
    listed = [[Name(name), joined(map(called, nodes), "; ")] for name, nodes in parts if name]
    rows = [[words[s], words[t], figure(weight)] for s, t, weight in summed(graph, [nodes for _, nodes in parts])]
    alone = joined((called(nodes[0]) for name, nodes in parts if not name), "; ")
    return [
        tag("p", "Pinned: ", alone) if alone else None,
        table(["group", "nodes"], listed),
        table(["from (pinned)", "to (pinned)", "sum of weights"], rows),
    ]


MEASURES = ("predicted", "frozen", "total", "responding", "free")


def _test_html(test: Mapping[str, Any], called: Any) -> Html:
    rows = [[called(row["target"]), *(figure(row[name]) for name in MEASURES)] for row in test["rows"]]
    head = ["target", "predicted", "measured", "predicted, all paths", "later features respond", "nothing held"]
    sources = joined(map(called, test["sources"]), "; ")
    return block(tag("p", "Taken out: ", Name(test["name"]) if test["name"] else sources), table(head, rows))


def _steered_html(steered: Mapping[str, Any]) -> Html | None:
    if not steered:
        return None
    rows = [[code(token), *(figure(value) for value in chances)] for token, *chances in steered["next"]]
    return block(
        tag("p", "Steered: ", code(steered["code"])),
        table(["next token", "probability", "steered"], rows),
        table(["baseline", "steered"], [[dotted(steered["baseline"]), dotted(steered["steered"])]]),
    )
