"""Attribution graphs: what features, errors and tokens add to each other and to the logits, on one prompt."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.arguments import check_least
from sae_lab.circuits import graph_checks, graph_faithfulness, graph_files, group_scores, groups
from sae_lab.circuits.faithfulness import Faithfulness
from sae_lab.circuits.graph_scores import edge_scores, pruned
from sae_lab.circuits.invariant import EdgeCheck
from sae_lab.circuits.nodes import Edge, Node
from sae_lab.feature_index.index import FeatureIndex
from sae_lab.lm.model import LM
from sae_lab.results import Result, by_column, counted, figure, result
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.sets import TranscoderSet
from sae_lab.types import Site

KINDS = ("feature", "error", "token", "logit")


@result
class AttributionGraph(Result):
    """Result of ``circuits.trace``: what each node adds to each other's pre-activation, directly, on one prompt.

        graph.top(10)                   # the edges that carry most to the logits; into=node: those of one node
        small = graph.prune()           # the nodes and edges that carry most of the influence
        graph.check(graph.top(1)[0])    # an edge beside what the model does when its source is taken out
        small.groups()                  # nodes that do the same
        graph.save("graph.safetensors"); small.to_json("graph.json")

    Nodes come in this order: features by (layer, position, number), errors by (layer, position), tokens, logits. As
    ``Node``: a feature and an error (feature -1) are at mlp_out of their layer, a token at embed with its id, a logit
    at resid_post of the last layer with its token's id (from the size of the vocabulary on: differences, directions).

    Attributes:
        effects: "targets sources": what a source adds to a target; targets are features and logits, sources are
            features, errors and tokens. effects.sum(1) + rest + bias = pre.
        pre, bias: " targets": a feature's pre-activation, or a logit less the mean of the vocabulary; what the biases
            of model and transcoders add to it. rest, rest_size: " targets": what nodes and edges that are not in the
            graph add, the sum and the sum of sizes.
        values: " nodes": activations of features, pre of logits, NaN for others. weights: " logits": probabilities; 1
            for a difference or a direction. directions: "logits d_model": what each reads of the final norm's output.
        influence, share: " nodes": the part of the logits' weights that flows through a node, with rows of |effects|
            made to sum to 1; the share of all influence that this node and all with more have.
        places: "nodes 3": (part, position, number); part: the layer, or, with SAEs of attention, the place in
            ``sites``; -1 for tokens. counts: of the four kinds. tokens: of the
            prompt. outputs: names of the logits. facts: model, token ids, settings. names: of features, by layer.
        supernodes: groups of nodes by name: see ``groups``.
        active: number of the prompt's active features. visited: share of them that have a row.
        left_out: share of incoming effects, weighted by the influence of their targets, that come from no node of the
            whole graph: from active features without a row, and with first="drop" from MLPs at position 0.
        replacement, completeness: scores of the whole graph (Ameisen et al. 2025): the share of the influence that
            comes from tokens and not from errors; the share of incoming effects that come from no error, weighted by
            influence, over all nodes as published and over features and logits alone.
    """

    effects: Float[Tensor, "targets sources"]
    places: Int[Tensor, "nodes 3"]
    counts: tuple[int, int, int, int]
    values: Float[Tensor, " nodes"]
    pre: Float[Tensor, " targets"]
    bias: Float[Tensor, " targets"]
    rest: Float[Tensor, " targets"]
    rest_size: Float[Tensor, " targets"]
    weights: Float[Tensor, " logits"]
    directions: Float[Tensor, "logits d_model"]
    influence: Float[Tensor, " nodes"]
    share: Float[Tensor, " nodes"]
    tokens: list[str]
    outputs: list[str]
    facts: dict[str, Any]
    active: int
    visited: float = figure("visited", "share of {active:,} active features", digits=".1%")
    left_out: float = figure("left out", "share of incoming effects from what is no node", best="low", digits=".1%")
    replacement: float = figure("replacement", "share of influence from tokens, not errors", best="high")
    completeness: float = figure("completeness", "share of incoming effects from no error", best="high")
    completeness_inner: float = figure("completeness, inner", "over features and logits alone", best="high")
    names: Mapping[int, Any] = field(default_factory=dict)
    supernodes: Mapping[str, Sequence[Node]] = field(default_factory=dict)
    local: Any = field(default=None, repr=False, compare=False)  # the LocalModel, for checks

    _records = "_table"
    _above = "{_said}"
    _below = "{_prompt}"

    # ---- nodes and edges

    @cached_property
    def nodes(self) -> list[Node]:
        """All nodes, in order."""
        sites = [*self.sites, Site("resid_post", self.n_layers - 1), Site("embed")]  # embed: number -1
        return [Node(sites[part], position, number) for part, position, number in self.places.tolist()]

    @property
    def sites(self) -> list[Site]:
        """What the parts of the model are, by the numbers in ``places``: mlp_out of each layer, and, before it, the
        site of the attention that has an SAE."""
        told = self.facts.get("sites")
        return [Site("mlp_out", n) for n in range(self.n_layers)] if told is None else [Site.of(key) for key in told]

    @cached_property
    def kinds(self) -> list[str]:
        """"feature", "error", "token" or "logit", by node."""
        return [kind for kind, count in zip(KINDS, self.counts, strict=True) for _ in range(count)]

    @property
    def n_layers(self) -> int:
        return int(self.facts["n_layers"])

    @cached_property
    def _numbers(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.nodes)}

    def number(self, node: Node) -> int:
        """A node's place in the order of nodes. ValueError for one that is not in the graph."""
        if node not in self._numbers:
            raise ValueError(f"this graph has no node {node!r}, as source or target: take one of graph.nodes")
        return self._numbers[node]

    def row(self, node: Node) -> int:
        """The row of ``effects`` of a feature or a logit. ValueError for an error or a token, which read nothing."""
        number = self.number(node)
        if self.kinds[number] in ("error", "token"):
            raise ValueError(f"{node!r} is a source alone, nothing adds to it: take a feature or a logit")
        return number if number < self.counts[0] else number - sum(self.counts[1:3])

    @property
    def targets(self) -> list[Node]:
        """The nodes of the rows of ``effects``."""
        return self.nodes[: self.counts[0]] + self.nodes[sum(self.counts[:3]) :]

    def effect(self, source: Node, target: Node) -> float:
        """What the source adds to the target's pre-activation."""
        number = self.number(source)
        return float(self.effects[self.row(target), number]) if number < self.effects.shape[1] else 0.0

    def top(self, n: int = 20, into: Node | None = None) -> list[Edge]:
        """The n edges that carry most influence to the logits; into: those to one node with the largest effects."""
        check_least(1, n=n)
        sizes = self.effects.abs() if into is not None else edge_scores(self.effects, self.weights, self.counts[0])
        rows = torch.arange(len(sizes)) if into is None else torch.tensor([self.row(into)])
        sizes, targets = sizes[rows], self.targets
        best = sizes.flatten().topk(min(n, int((sizes > 0).sum()))).indices
        places = [(int(rows[i // sizes.shape[1]]), int(i % sizes.shape[1])) for i in best.tolist()]
        return [Edge(self.nodes[s], targets[t], float(self.effects[t, s])) for t, s in places]

    def name(self, node: Node) -> str:
        """What a node is called: a feature's label, "" without one; a token; a logit's token."""
        number = self.number(node)
        return self._names_of([number])[0]

    def _names_of(self, numbers: Sequence[int]) -> list[str]:
        """What the nodes of these numbers are called, as ``name``."""
        wanted = [(i, self.kinds[i], self.places[i].tolist()) for i in numbers]
        known = {
            part: names.of(number for _, kind, (own, _, number) in wanted if kind == "feature" and own == part)
            for part, names in self.names.items()
        }
        found = []
        for i, kind, (part, position, number) in wanted:
            named = known.get(part, {}).get(number, "") if kind == "feature" else ""
            named = self.tokens[position] if kind == "token" else named
            found.append(self.outputs[i - sum(self.counts[:3])] if kind == "logit" else named)
        return found

    # ---- pruning

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> "AttributionGraph":
        """The part of the graph that carries most, as published: the nodes with most influence, up to this share of
        all, tokens and logits always; then the edges, up to this share; then no feature without an edge in and out, no
        error without an edge out. What is left out goes into ``rest`` and ``rest_size``; the scores stay those of the
        whole graph. ValueError for a share that is not from 0 to 1."""
        for name, share in (("nodes", nodes), ("edges", edges)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be a share of the influence from 0 to 1, got {share}")
        keep, linked = pruned(self.effects, self.influence, self.weights, self.counts, nodes, edges)
        features, sources = self.counts[0], self.effects.shape[1]
        rows = torch.cat([keep[:features], keep[sources:]])
        effects = self.effects * linked
        left = self.effects - effects
        counts = [int(part.sum()) for part in keep.split(list(self.counts))]
        return replace(
            self, effects=effects[rows][:, keep[:sources]], places=self.places[keep], counts=tuple(counts),
            values=self.values[keep], pre=self.pre[rows], bias=self.bias[rows],
            rest=(self.rest + left.sum(1))[rows], rest_size=(self.rest_size + left.abs().sum(1))[rows],
            influence=self.influence[keep], share=self.share[keep], supernodes=self._kept(keep),
            facts={**self.facts, "nodes": nodes, "edges": edges},
        )  # fmt: skip

    # ---- groups

    def groups(
        self,
        index: FeatureIndex | Sequence[FeatureIndex] | None = None,
        *,
        alike: float = groups.ALIKE,
        seed: int = 0,
        of: Mapping[str, Sequence[Node]] | None = None,
    ) -> groups.GraphGroups:
        """``graph.prune().groups()``: features of this graph that do the same, in groups of two and more.

        How alike two features are is the geometric mean of the cosines of what they read (their rows of effects) and of
        what they write (their columns, as shares of the influence on the logits); with an index also of their
        activations over its store. In a group any two are at least ``alike`` (agglomerative clustering, complete
        linkage). The default, √½, is where what one does explains half of what the other does, in squares: the rule
        sets the number of groups, and features like no other are in none.

        Args: index: one of each layer with features, all of one store. seed: of the shuffled control. of: groups by
            name, in place of those found: your own, or ``graph.supernodes`` of a graph from a file. Errors and tokens
            may be in them. ValueError for a node in two groups, or not in the graph.
        """
        return groups.find(self, index, alike, seed) if of is None else groups.by_hand(self, of)

    def with_groups(self, named: Mapping[str, Sequence[Node]]) -> "AttributionGraph":
        """The graph with these groups as its ``supernodes``, which files keep. ValueError as from ``groups``."""
        counts = Counter(node for nodes in named.values() for node in nodes)
        if twice := [node for node, many in counts.items() if self.number(node) >= 0 and many > 1]:
            raise ValueError(f"{twice[0]!r} is in two groups: leave it in one of them")
        return replace(self, supernodes={name: tuple(nodes) for name, nodes in named.items()})

    def _kept(self, keep: Tensor) -> dict[str, tuple[Node, ...]]:
        """The groups' nodes that stay."""
        stay = {name: tuple(n for n in nodes if keep[self.number(n)]) for name, nodes in self.supernodes.items()}
        return {name: nodes for name, nodes in stay.items() if nodes}

    # ---- checks and files

    def check(self, source: Edge | Node | Sequence[Node], targets: Sequence[Node] | Node | None = None) -> EdgeCheck:
        """``graph.check(edge)``, ``graph.check(node, targets)``: edges beside what happens when their source is taken
        out of the model: a feature's f·W_dec, an error or a token's embedding, or those of several nodes.

        predicted: minus the edge. frozen: the change of the target's pre-activation with attention, norms and all other
        MLPs' outputs held. total: minus the effect along all paths, by (I - A)⁻¹ of the graph, as if all its features
        stayed on; NaN for families whose codes are not their pre-activations. responding: the change with attention,
        norms and errors held, while later features are made anew. free: the change with nothing held.

        Args: targets: features and logits; None: the edge's, else all that the source has an edge to. Raises ValueError
        for a node that is not in the graph, and for a graph from a file that was loaded without lm= and coders=.
        """
        return graph_checks.check(self, source, targets)

    def heads(self, node: Node) -> Float[Tensor, " head"]:
        """``graph.heads(node)``: what each head of its layer adds to the pre-activation of a feature of attention: the
        head's part of the output times W_enc. Their sum is ``pre`` less the biases of attention and SAE.

        Raises ValueError for another node, and for a graph from a file that was loaded without lm= and coders=."""
        return graph_checks.heads(self, node)

    def faithfulness(
        self, sizes: Sequence[int] | None = None, errors: bool = True, draws: int = 3, seed: int = 0
    ) -> Faithfulness:
        """``graph.faithfulness()``: how much of the logits the n features with most influence keep by themselves, while
        attention and norms respond: 1 is the model, 0 the model without any feature or error of its transcoders.

        Args: sizes: numbers of features; None: 4, 16, 64, ... and all of the graph. errors: whether all errors stay;
            ``no_errors`` of the result is without them in any case. draws, seed: of the controls, other active features
            at the same layers and positions and of near norms (``random``; NaN where there are too few).

        ``activation`` and ``gradient`` of the result are other rankings: by the norm of f·W_dec, and by f·gradient of
        the logits. Raises ValueError for a size that the graph does not have, and for a graph from a file that was
        loaded without lm= and coders=.
        """
        check_least(1, draws=draws)
        return graph_faithfulness.faithfulness(self, sizes, errors, draws, seed)

    def matched(self, nodes: Sequence[Node], seed: int = 0) -> list[Node]:
        """``graph.matched(group.nodes)``: a control for some features: as many other active features of the prompt,
        each at the layer and position of one of them, or, where none is left, in its layer, and among the five of the
        nearest norms of f·W_dec. Fewer where a layer has too few. They need not be in this graph.

        Raises ValueError for a node that is no feature of the graph, and for a graph from a file that was loaded
        without lm= and coders=."""
        return group_scores.others_like(self, nodes, seed)

    def save(self, path: str | Path) -> Path:
        """``graph.save("graph.safetensors")``: write one file, which ``AttributionGraph.load`` reads."""
        return graph_files.save(self, Path(path))

    @staticmethod
    def load(
        path: str | Path, lm: LM | None = None,
        coders: TranscoderSet | SparseCoder | Sequence[SparseCoder] | None = None,
    ) -> "AttributionGraph":  # fmt: skip
        """``AttributionGraph.load("graph.safetensors", lm, coders)``: read what ``save`` wrote.

        lm, coders: those that the graph was made with, for ``check``. Raises ValueError for a file of another kind or
        version, and for a model or coders that give other activations.
        """
        graph = graph_files.named(AttributionGraph, graph_files.load(Path(path)))
        return graph if lm is None or coders is None else graph_checks.connected(graph, lm, coders)

    def to_json(self, path: str | Path, slug: str = "graph", scan: str | None = None) -> Path:
        """``graph.prune().to_json("graph.json")``: write a graph as Neuronpedia and circuit-tracer read it (schema 1).

        A feature of layer 0 whose node id would be that of an error gets another number in its id; the metadata says
        so. slug, scan: the graph's name, and that of the transcoders on Neuronpedia; None: the model's name.
        """
        return graph_files.to_json(self, Path(path), slug, scan)

    @staticmethod
    def from_json(path: str | Path) -> "AttributionGraph":
        """``AttributionGraph.from_json("graph.json")``: read a graph of Neuronpedia or circuit-tracer.

        Such a file has no biases, no rest and no scores: they are NaN here. Raises ValueError for another schema, and
        for a file that contradicts itself."""
        return graph_files.named(AttributionGraph, graph_files.from_json(Path(path)))

    # ---- shown

    @property
    def _said(self) -> str:
        features, errors, tokens, _ = self.counts
        edges = int(self.effects.count_nonzero())
        ends = ", ".join(f"{n!r} {p:.2f}" for n, p in zip(self.outputs, self.weights.tolist(), strict=True))
        return (
            f"{counted(features, 'feature')}, {counted(errors, 'error')}, {counted(tokens, 'token')}, "
            f"{counted(edges, 'edge')} to {ends}"
        )

    @property
    def _prompt(self) -> str:
        return "".join(self.tokens)

    @property
    def _table(self) -> dict[str, list[Any]]:
        names = self._names_of(range(len(self.nodes)))
        tokens = [self.tokens[node.position] for node in self.nodes]
        columns = map(repr, self.nodes), self.kinds, tokens, names, self.values.tolist(), self.influence.tolist()
        rows = sorted(zip(*columns, strict=True), key=lambda row: (row[1] != "logit", -row[5]))
        return by_column("node kind token name value influence", rows)

    def edges_to_pandas(self):
        """One row an edge, the largest effect first: upstream, its name, downstream, its name, effect."""
        import pandas as pd

        nodes = np.array([*map(repr, self.nodes)], object)
        names = np.array(self._names_of(range(len(nodes))), object)
        t, s = self.effects.nonzero(as_tuple=True)
        effects = self.effects[t, s]
        order = effects.abs().argsort(descending=True)
        up, down = s[order].numpy(), torch.tensor([self.number(node) for node in self.targets])[t[order]].numpy()
        ends = {"upstream": nodes[up], "upstream_name": names[up], "downstream": nodes[down]}
        return pd.DataFrame({**ends, "downstream_name": names[down], "effect": effects[order].numpy()})
