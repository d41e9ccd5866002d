"""GraphLab: an attribution graph to read, prune, pin and group; its edges are tested and its nodes steered from."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import traitlets

from sae_lab.circuits import AttributionGraph, Edge, EdgeCheck, GraphGroups, Node, graph_checks, graph_files
from sae_lab.circuits.graph_scores import levels, scores
from sae_lab.circuits.layout import Layout, as_set, by_layer
from sae_lab.edits.edit import Ablate, Steer
from sae_lab.feature_index import FeatureIndex
from sae_lab.feature_index.annotations import notes
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import label
from sae_lab.noting import Names, names_of
from sae_lab.results import Html, counted
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.sets import TranscoderSet
from sae_lab.spelling import check_text

from .coding import expression as edit_code
from .coding import lm_line, name_of
from .graph_view import MEASURES, expression, graph_html, items, packed, summed, title
from .panel import STATIC, Job, beside, checked, quick
from .session import Linked, Session
from .steering import side_by_side

MOST_NODES, MOST_EDGES = 1_000, 5_000  # features and errors, and edges, that are sent to the screen
TESTED = 12  # targets of a test, the strongest
TESTS = 20  # kept
NEW_TOKENS = 20
NEXT = 5  # likeliest next tokens, without and with the edit
NO_MODEL = (
    "Test and Steer run the model, and this graph came without one: sl.GraphLab(graph, lm, coders) with those of its "
    "making"
)

Coders = TranscoderSet | SparseCoder | Sequence[SparseCoder]


class GraphLab(Linked):
    """An attribution graph: tokens from left to right, layers from below, influence by size. It zooms and pans; a click
    opens a node, its edges and its feature in the session's other widgets.

        graph = sl.circuits.trace(lm, coders, "The capital of France is")
        lab = sl.GraphLab(graph)
        lab.test(lab.part.top(1)[0])      # an edge beside what the model does when its source is taken out
        lab.pinned, lab.groups            # what was pinned and grouped on the screen, as numbers of lab.graph.nodes
        lab.named_groups().score()        # the groups, each taken out of the model beside random groups

    On the screen a graph has at most 1,000 features and errors, and 5,000 edges: ``lab.graph`` is the graph, pruned to
    that many where it has more. The sliders ``nodes`` and ``edges`` prune it further: ``lab.part`` is what is shown,
    ``lab.graph.prune(lab.nodes, lab.edges)``.

    Args:
        graph: from ``circuits.trace``, or from a file.
        lm, coders: those of its making, for Test and Steer. A graph that was traced in this kernel brings its own; None
            for one from a file: both stay off.
        index: feature indexes of the coders, one, several, or by layer: their top tokens name features without a label.
        session: what it shares with other widgets (``sl.Session``); None: a new one.

    Traits that can be read, set and observed (nodes are numbers of ``lab.graph.nodes``): ``node``, the open one, or
    None; ``edge``, the open one, [source, target] or []; ``selected``, the nodes that a group would be made of;
    ``pinned``; ``groups``, a dict of name and nodes each, at first the graph's; ``nodes`` and ``edges``, shares of the
    influence from 0 to 1; ``show``, "graph" or "pinned". Read only: ``view``, the graph as it is sent; ``tests``, what
    was tested; ``steered``, what the last steering did; ``running``, "test", "steer" or ""; ``unable``, why Test and
    Steer are off, "" where they are on; ``error``.

    Raises ValueError for a model without coders or the reverse, for those that give other activations, and for a graph
    with features of attention.
    """

    _esm = STATIC / "graph_lab.js"
    _css = STATIC / "graph_lab.css"
    _chooses = ("node",)

    view = traitlets.Dict().tag(sync=True)
    node = traitlets.Any(None).tag(sync=True)
    edge = traitlets.List(traitlets.Int()).tag(sync=True)
    selected = traitlets.List(traitlets.Int()).tag(sync=True)
    pinned = traitlets.List(traitlets.Int()).tag(sync=True)
    groups = traitlets.List(traitlets.Dict()).tag(sync=True)
    nodes = traitlets.Float(0.8).tag(sync=True)
    edges = traitlets.Float(0.98).tag(sync=True)
    show = traitlets.Enum(["graph", "pinned"], "graph").tag(sync=True)
    tests = traitlets.List(traitlets.Dict()).tag(sync=True)
    steered = traitlets.Dict().tag(sync=True)
    running = traitlets.Unicode("").tag(sync=True)
    unable = traitlets.Unicode("").tag(sync=True)

    def __init__(
        self,
        graph: AttributionGraph,
        lm: LM | None = None,
        coders: Coders | None = None,
        index: FeatureIndex | Sequence[FeatureIndex] | Mapping[int, FeatureIndex] | None = None,
        session: Session | None = None,
    ) -> None:
        if "sites" in graph.facts:
            raise ValueError("GraphLab has one row a layer, and this graph has features of attention too: trace with "
                             "transcoders alone")  # fmt: skip
        self._given, self._whole = graph, _scored(_connected(graph, lm, coders))
        local = self._whole.local
        self._lm: LM | None = None if local is None else local.lm
        self._coders: Layout | None = None if local is None else local.coders
        self._indexes = _by_layer(index)
        self._names = _names(graph, self._coders, self._indexes)
        whole = self._whole
        self._levels = levels(whole.effects, whole.influence, whole.weights, whole.counts, MOST_NODES, MOST_EDGES)
        self.graph = whole if self._levels == (1.0, 1.0) else whole.prune(*self._levels)
        self._part: tuple[Any, AttributionGraph] | None = None
        self._prompt = "" if self._lm is None else _prompt_of(self._lm, whole.facts["ids"])
        self._busy = threading.Lock()  # one test or steering at a time: the local model makes one run at once
        pruned = graph.facts.get("nodes") is not None
        kept = {name: [self.graph.number(node) for node in nodes] for name, nodes in self.graph.supernodes.items()}
        super().__init__(
            session or Session(), view=packed(self.graph, whole, self._coders.layers if self._coders else []),
            groups=[{"name": name, "nodes": nodes} for name, nodes in kept.items() if nodes],
            nodes=1.0 if pruned else 0.8, edges=1.0 if pruned else 0.98, unable="" if self._lm else NO_MODEL,
        )  # fmt: skip
        self._take("feature")
        self._link()

    # ---- what is shown

    @property
    def part(self) -> AttributionGraph:
        """What is shown: the graph, pruned as the sliders say."""
        key = self.nodes, self.edges
        if self._part is None or self._part[0] != key:
            self._part = key, self.graph.prune(*key)
        return self._part[1]

    def named_groups(self) -> GraphGroups:
        """The groups on the screen, to be scored, changed, or saved: ``lab.named_groups().graph.save(path)``."""
        nodes = self.graph.nodes
        return self.graph.groups(of={group["name"]: [nodes[n] for n in group["nodes"]] for group in self.groups})

    def pinned_edges(self) -> list[tuple[str, str, float]]:
        """The edges of the pinned subgraph: (from, to, sum of the weights); a group is one node there."""
        parts = items(self.pinned, self.groups)
        words = [name or self._title(nodes[0]) for name, nodes in parts]
        return [(words[s], words[t], weight) for s, t, weight in summed(self.graph, [nodes for _, nodes in parts])]

    def _title(self, number: int) -> str:
        return title(self.graph, number, self._called().get(number, ""))

    def _called(self) -> dict[int, str]:
        by_layer: dict[int, list[tuple[int, int]]] = {}
        for number, (layer, _, feature) in enumerate(self.graph.places[: self.graph.counts[0]].tolist()):
            by_layer.setdefault(layer, []).append((number, feature))
        found = {}
        for layer, mine in by_layer.items():
            known = self._names[layer].of(f for _, f in mine) if layer in self._names else {}
            found |= {number: known[feature] for number, feature in mine if feature in known}
        return found

    # ---- checks of traits

    @checked("node")
    def _valid_node(self, node: Any) -> int | None:
        return None if node is None else self._numbers([node])[0]

    _valid_nodes = checked("selected", "pinned")(lambda self, numbers: self._numbers(numbers))

    def _numbers(self, numbers: Any) -> list[int]:
        """Numbers of nodes, each once. ValueError for what is none."""
        most = len(self.graph.nodes)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < most:
                raise ValueError(
                    f"a node is an int from 0 to {most - 1}, its place in lab.graph.nodes, got {number!r}: "
                    "lab.graph.number(node) tells it"
                )
        return list(dict.fromkeys(numbers))

    @checked("edge")
    def _valid_edge(self, edge: list[int]) -> list[int]:
        if edge and (len(edge) != 2 or not self._effect(*self._numbers(edge))):
            raise ValueError(f"edge must be [source, target] of an edge of lab.graph, or [], got {edge!r}")
        return edge

    @checked("groups")
    def _valid_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found, seen = [], set()
        for group in groups:
            if set(group) != {"name", "nodes"} or not isinstance(group["name"], str) or not group["name"].strip():
                raise ValueError(f"a group is a dict of name, a text, and nodes, a list of numbers, got {group!r:.80}")
            check_text(group["name"], "a group's name")
            nodes = self._numbers(group["nodes"])
            if twice := seen & set(nodes):
                raise ValueError(f"a node is in one group at most, and node {min(twice)} is in two: take it out of one")
            seen |= set(nodes)
            found += [{"name": group["name"].strip(), "nodes": nodes}] if nodes else []
        return found

    @checked("nodes", "edges")
    def _valid_share(self, share: float) -> float:
        if not 0 <= share <= 1:
            raise ValueError(f"nodes and edges are shares of the influence from 0 to 1, got {share}")
        return share

    def _effect(self, source: int, target: int) -> float:
        graph, sources = self.graph, self.graph.effects.shape[1]
        row = target if target < graph.counts[0] else target - sources + graph.counts[0]
        reads = target < graph.counts[0] or target >= sources
        return float(graph.effects[row, source]) if reads and source < sources else 0.0

    # ---- the session

    def _site_of(self, layer: int) -> str:
        coder = self._coders[layer] if self._coders is not None and layer in self._coders else None
        return coder.site.key if coder is not None else self._indexes[layer].site.key if layer in self._indexes else ""

    def _chosen(self) -> dict[str, Any]:
        if self.node is None:
            return {}
        node, kind = self.graph.nodes[self.node], self.graph.kinds[self.node]
        found: dict[str, Any] = {"prompt": self._prompt, "token": node.position} if self._prompt else {}
        site = self._site_of(node.site.layer or 0) if kind == "feature" else ""
        return found | ({"feature": node.feature, "site": site} if site else {})

    def _take(self, name: str) -> None:
        """Open the selected feature: at the selected token if it is there, else where it has most influence."""
        chosen = self.session.selection
        features = self.graph.nodes[: self.graph.counts[0]]
        alike = [i for i, node in enumerate(features) if node.feature == chosen.feature]
        mine = [i for i in alike if chosen.site and self._site_of(features[i].site.layer or 0) == chosen.site]
        if not mine:
            return
        here = chosen.token if self._prompt and chosen.prompt == self._prompt else None
        at = [i for i in mine if features[i].position == here]
        if at or self.node not in mine:
            self.node = max(at or mine, key=lambda i: float(self.graph.influence[i]))

    # ---- names

    @quick
    def rename(self, number: int, name: str) -> None:
        """Give a feature another label, in the notes on its coder."""
        layer, _, feature = self.graph.places[self._numbers([number])[0]].tolist()
        if self.graph.kinds[number] != "feature":
            raise ValueError(f"{self._title(number)} is no feature, and only a feature has a label")
        if self._coders is not None and layer in self._coders:
            notes(self._coders[layer]).write(feature, name)
        elif layer in self._indexes:
            self._indexes[layer].annotate(feature, label=name)
        else:
            raise ValueError(
                "a label is kept with the coder, and this graph came without: sl.GraphLab(graph, lm, coders)"
            )

    # ---- tests

    def test(self, source: Edge | Node | Sequence[Node], targets: Sequence[Node] | Node | None = None) -> EdgeCheck:
        """``lab.test(edge)``, ``lab.test(node)``: ``graph.check``, and show it. targets: None: the edge's, else the
        strongest 12 that are shown."""
        return self._test(source, targets, "", lambda: None)

    @beside
    def run_test(self, job: Job, sources: list[int], targets: list[int] | None = None, name: str = "") -> None:
        """``test`` for the screen. name: of the group that these sources are."""
        nodes = self.graph.nodes
        wanted = None if targets is None else [nodes[n] for n in self._numbers(targets)]
        self._test([nodes[n] for n in self._numbers(sources)], wanted, name, job.check)

    @quick
    def stop(self) -> None:
        """End what runs for the screen, before the next run of the model."""
        for job in list(self._jobs.values()):
            job.cancel()

    def _test(self, source: Any, targets: Any, name: str, pause: Callable[[], object]) -> EdgeCheck:
        if isinstance(source, Edge):
            source, targets = source.upstream, source.downstream if targets is None else targets
        sources = [source] if isinstance(source, Node) else list(source)
        with self._busy, self._at_work("test"):
            pause()
            targets = self._strongest(sources) if targets is None else targets
            found = graph_checks.check(self._whole, sources, targets, pause)
        pause()
        rows = [
            {"target": self.graph.number(node)}
            | {m: None if value is None else _finite(value[0, i]) for m in MEASURES for value in [getattr(found, m)]}
            for i, node in enumerate(found.features)
        ]
        test = {"sources": [self.graph.number(n) for n in sources], "name": name, "rows": rows, "error": found.error}
        with self._lock:
            same = lambda old: (old["sources"], [row["target"] for row in old["rows"]])  # noqa: E731
            self.tests = [test, *(old for old in self.tests if same(old) != same(test))][:TESTS]
        return found

    def _strongest(self, sources: Sequence[Node]) -> list[Node]:
        """The targets with the largest edges from these nodes: of what is shown, else of the whole that was sent."""
        for graph in (self.part, self.graph):
            known = set(graph.nodes[: graph.effects.shape[1]])
            sizes = graph.effects[:, [graph.number(node) for node in sources if node in known]].sum(1).abs()
            best = sizes.topk(min(TESTED, int((sizes > 0).sum()))).indices.tolist()
            if found := [graph.targets[i] for i in best if graph.targets[i] not in sources]:
                return found
        raise ValueError(
            "what is to be tested has no edge in lab.graph, the part of the graph that is sent: name targets="
        )

    @contextlib.contextmanager
    def _at_work(self, what: str) -> Iterator[None]:
        if self._lm is None:
            raise ValueError(NO_MODEL)
        self.running = what
        try:
            yield
        finally:
            self.running = ""

    # ---- steering

    def steer(self, node: Node, strength: float | None = 2.0, here: bool = False) -> dict[str, Any]:
        """``lab.steer(node, 4.0)``: what the model says with ``sl.Steer`` of the node's feature, beside what it says by
        itself: {code, baseline, steered, next}, as the trait ``steered``.

        strength: in units of f_scale; None: ``sl.Ablate``. here: at the node's token alone, else everywhere.
        """
        with torch.no_grad():
            return self._steer(self.graph.number(node), strength, here, lambda: None, lambda side, piece: None)

    @beside
    def run_steer(self, job: Job, number: int, strength: float | None, here: bool) -> None:
        """``steer`` for the screen, which gets the pieces as {side, text}."""
        hear = lambda side, text: job.partial({"side": side, "text": text})  # noqa: E731
        self._steer(self._numbers([number])[0], strength, here, job.check, hear)

    @quick
    def keep_edit(self, number: int, strength: float | None, here: bool) -> None:
        """Put the edit on the session's stack."""
        self.session.edits.add(self._edit(self._numbers([number])[0], strength, here))

    def _edit(self, number: int, strength: float | None, here: bool) -> Steer | Ablate:
        node = self.graph.nodes[number]
        if self._coders is None:
            raise ValueError(NO_MODEL)
        if self.graph.kinds[number] != "feature":
            raise ValueError(f"{self._title(number)} is no feature: steer from a feature")
        coder, at = self._coders[node.site.layer or 0], node.position if here else None
        if strength is None:
            return Ablate(coder, node.feature, positions=at)
        return Steer(coder, node.feature, strength=float(strength), positions=at)

    def _steer(
        self, number: int, strength: float | None, here: bool, pause: Callable[[], None],
        hear: Callable[[str, str], None],
    ) -> dict[str, Any]:  # fmt: skip
        with self._busy, self._at_work("steer"):
            edit = self._edit(number, strength, here)
            lm, ids = self._lm, self._whole.facts["ids"]
            assert lm is not None, "_at_work has looked"
            chances = []
            for edits in ([], [edit]):
                pause()
                chances.append(lm.logits(ids, edits)[0, -1].softmax(-1).cpu())
            streams = {"baseline": lm.stream(ids, max_new_tokens=NEW_TOKENS)}
            streams["steered"] = lm.stream(ids, [edit], max_new_tokens=NEW_TOKENS)
            said = side_by_side(streams, pause, hear)
        listed = list(dict.fromkeys(i for c in chances for i in c.topk(NEXT).indices.tolist()))
        rows = [[label(lm.tokenizer, i), *(float(c[i]) for c in chances)] for i in listed]
        found = {
            "node": number, "strength": strength, "here": here,
            "code": edit_code(edit, {id(edit.coder): ("coder", edit.coder)}), "next": rows, **said,
        }  # fmt: skip
        with self._lock:
            self.steered = found
        return found

    # ---- handed on

    def to_json(self, slug: str = "graph") -> dict[str, Any]:
        """What is shown, with pins and groups, as Neuronpedia reads it (see ``graph.to_json``)."""
        nodes = self.graph.nodes
        groups = [(group["name"], [nodes[n] for n in group["nodes"]]) for group in self.groups]
        return graph_files.as_json(self.part, slug, None, [nodes[n] for n in self.pinned], groups)

    @beside
    def neuronpedia(self, job: Job) -> str:
        """The text of Neuronpedia's file."""
        return json.dumps(self.to_json(), ensure_ascii=False)

    def data(self) -> dict[str, Any]:
        """What is shown as plain data for a JSON file: nodes and edges, what is pinned and grouped, tests, steering."""
        part, called = self.part, self._called()
        numbers = [self.graph.number(node) for node in part.nodes]
        nodes = [
            {"node": number, "what": repr(node), "kind": kind, "name": called.get(number, ""),
             "activation": _finite(part.values[i]), "influence": _finite(part.influence[i])}
            for i, (number, node, kind) in enumerate(zip(numbers, part.nodes, part.kinds, strict=True))
        ]  # fmt: skip
        rows = [self.graph.number(node) for node in part.targets]
        edges = [
            {"source": numbers[s], "target": rows[t], "weight": float(part.effects[t, s])}
            for t, s in part.effects.nonzero().tolist()
        ]
        kept = {name: getattr(self, name) for name in ("pinned", "groups", "tests", "steered")}
        return {"tokens": part.tokens, "outputs": part.outputs, "nodes": nodes, "edges": edges, **kept}

    def code(self) -> str:
        name, nodes = name_of(self._given, "graph"), self.graph.nodes
        first = "" if self._levels == (1.0, 1.0) else f".prune(nodes={self._levels[0]}, edges={self._levels[1]})"
        lines = ["import sae_lab as sl", "", f"# {name}: the graph that sl.GraphLab was given"]
        lines += [f"part = {name}{first}.prune(nodes={self.nodes!r}, edges={self.edges!r})"]
        if self.pinned:
            lines += ["pinned = [", *(f"    {expression(nodes[n])}," for n in self.pinned), "]"]
        for group in self.groups:
            lines += [f"# the group {group['name']!r}", *(f"#   {expression(nodes[n])}" for n in group["nodes"])]
        checked = "" if self._given.local is not None or self._lm is None else "  # load it with lm and coders"
        for test in reversed(self.tests):
            sources = ", ".join(expression(nodes[n]) for n in test["sources"])
            targets = ", ".join(expression(nodes[row["target"]]) for row in test["rows"])
            lines += [f"print({name}.check([{sources}], [{targets}])){checked}"]
        if self.steered and self._lm is not None:
            lm, layer = name_of(self._lm, "lm"), self.graph.nodes[self.steered["node"]].site.layer
            lines += [lm_line(self._lm, lm), f"coder = {name_of(self._coders, 'coders')}[{layer}]"]
            told = f"max_new_tokens={NEW_TOKENS}"
            lines += [f"print({lm}.generate({self._whole.facts['ids']}, edits={self.steered['code']}, {told}))"]
        return "\n".join(lines)

    def _html(self) -> Html:
        state = {name: getattr(self, name) for name in ("node", "pinned", "groups", "tests", "steered")}
        return graph_html(self.graph, self.part, self._called(), state)

    def __repr__(self) -> str:
        features, errors, *_ = self.part.counts
        shown = f"{counted(features, 'feature')}, {counted(errors, 'error')}"
        edges = counted(int(self.part.effects.count_nonzero()), "edge")
        return f"GraphLab({shown} and {edges} shown, {len(self.pinned)} pinned, {counted(len(self.groups), 'group')})"


def _finite(value: Any) -> float | None:
    value = float(value)
    return value if abs(value) < float("inf") else None


def _connected(graph: AttributionGraph, lm: LM | None, coders: Coders | None) -> AttributionGraph:
    """The graph with its local model, if there is one. ValueError for one of both alone."""
    if (lm is None) != (coders is None):
        given, other = ("lm", "coders") if coders is None else ("coders", "lm")
        raise ValueError(f"Test and Steer need the model and its transcoders, got {given} alone: pass {other} too")
    if lm is None or coders is None:
        return graph
    local, given = graph.local, [coder for _, coder in by_layer(as_set(coders))]
    same = local is not None and local.lm is lm and list(local.coders) == given
    return graph if same else graph_checks.connected(graph, lm, coders)


def _scored(graph: AttributionGraph) -> AttributionGraph:
    """A graph from Neuronpedia's file does not tell influence, which follows from its edges."""
    if not bool(graph.influence.isnan().any()):
        return graph
    weights = graph.weights if bool(graph.weights.any()) else torch.ones_like(graph.weights)
    found = scores(graph.effects, graph.rest_size.nan_to_num(0.0), weights, graph.counts)
    return replace(graph, weights=weights, influence=found["influence"], share=found["share"])


def _by_layer(index: Any) -> dict[int, FeatureIndex]:
    if index is None or isinstance(index, Mapping):
        return dict(index or {})
    many = [index] if isinstance(index, FeatureIndex) else list(index)
    return {one.site.layer or 0: one for one in many}


def _names(graph: AttributionGraph, coders: Layout | None, indexes: Mapping[int, FeatureIndex]) -> dict[int, Any]:
    """What features are called, by layer."""
    if coders is not None:
        return names_of({layer: coders[layer] for layer in coders.layers}, list(indexes.values()) or None)
    return {**graph.names, **{layer: Names(None, one) for layer, one in indexes.items()}}


def _prompt_of(lm: LM, ids: list[int]) -> str:
    """The text of these tokens; "" where its tokens are others."""
    text = lm.tokenizer.decode(ids, skip_special_tokens=True)
    return text if text and lm.tokenize(text).ids[0].tolist() == ids else ""
