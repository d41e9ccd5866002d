"""Groups of nodes of an attribution graph that do the same: found, scored by taking them out, changed by hand."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import check_least
from sae_lab.circuits import group_scores
from sae_lab.circuits.graph_files import unused
from sae_lab.circuits.nodes import Node
from sae_lab.feature_index.index import FeatureIndex
from sae_lab.results import Name, Result, by_column, result
from sae_lab.spelling import check_text

ALIKE = 0.5**0.5  # the cosine at which a profile explains half of another's sum of squares
NAN = float("nan")


class Group(NamedTuple):
    """A group of a graph's nodes. influence: the sum of its nodes'. effect: the change of the graph's logits when the
    group is taken out of the model; random, random_sd: mean and standard deviation of that of random groups; p: the
    share of them, the group itself included, whose effect is as large. NaN before ``groups.score()``."""

    name: str
    nodes: tuple[Node, ...]
    influence: float
    effect: float = NAN
    random: float = NAN
    random_sd: float = NAN
    p: float = NAN


@result
class GraphGroups(Result):
    """Result of ``graph.groups()``: nodes that do the same, the group with most influence first.

        groups = graph.prune().groups()
        groups = groups.score()                          # takes each out of the model, beside random groups
        groups = groups.rename("group 1", "say a capital").merge(["group 2", "group 3"], "France")
        groups = groups.move([node], "France").move([other], None)      # None: into no group
        groups.split("France", [node], "Paris")          # some nodes of a group become another
        groups.graph.save("graph.safetensors")           # with these groups; to_json writes them as supernodes
        groups.grouped()                                 # the graph with each group as one node

    Each of these gives a new object. A group whose nodes change loses its score.

    Attributes:
        groups: see ``circuits.Group``. graph: the graph, which keeps these groups as ``supernodes``.
        alike: how alike two nodes of a group are at least. share: of the features' influence that lies in these groups;
            share_shuffled: that of groups found in the same way after each row's effects were dealt anew among the
            nodes that it could read. Both NaN for groups by hand. draws: random groups drawn for each score.
    """

    groups: list[Group]
    graph: Any = field(repr=False, compare=False)
    alike: float = NAN
    share: float = NAN
    share_shuffled: float = NAN
    draws: int = 0

    _records, _above, _below = "_table", "{groups!n} groups{_found}", "{_drawn}"

    # ---- which

    @property
    def names(self) -> list[str]:
        return [group.name for group in self.groups]

    def __getitem__(self, name: str) -> Group:
        """A group by its name. ValueError for an unknown one."""
        for group in self.groups:
            if group.name == name:
                return group
        raise ValueError(f"there is no group of the name {name!r:.60}; the groups are: {', '.join(self.names)}")

    def of(self, node: Node) -> str | None:
        """The name of a node's group; None where it is in no group."""
        return next((group.name for group in self.groups if node in group.nodes), None)

    # ---- by hand

    def rename(self, name: str, new: str) -> "GraphGroups":
        """``groups.rename("group 1", "say Paris")``. ValueError for an unknown name, and for one that is taken."""
        old = self[name]
        return self._with([group._replace(name=checked_name(new)) if group is old else group for group in self.groups])

    def merge(self, names: Sequence[str], name: str | None = None) -> "GraphGroups":
        """``groups.merge(["group 1", "group 4"], "France")``: make one group of several, with the name of the first
        where none is given. ValueError for fewer than two."""
        merged = [self[one] for one in dict.fromkeys(names)]
        if isinstance(names, str) or len(merged) < 2:
            raise ValueError(f"merge takes the names of at least two groups, got {names!r:.80}")
        nodes = [node for group in merged for node in group.nodes]
        others = [group for group in self.groups if group not in merged]
        return self._with([*others, self._group(merged[0].name if name is None else name, nodes)])

    def split(self, name: str, nodes: Sequence[Node], new: str) -> "GraphGroups":
        """``groups.split("France", [node], "Paris")``: make another group of some nodes of a group. ValueError for
        nodes that are not in it, and for all of them."""
        group, chosen = self[name], list(nodes)
        if not chosen or not set(chosen) < set(group.nodes):
            raise ValueError(f"split takes some of the {len(group.nodes)} nodes of {name!r}, and not all: got {chosen}")
        return self._with([*self.move(chosen, None).groups, self._group(new, chosen)])

    def move(self, nodes: Sequence[Node], name: str | None) -> "GraphGroups":
        """``groups.move([node], "France")``: take nodes out of their groups and into this one; None: into no group. A
        group without a node is gone. ValueError for a node that is not in the graph."""
        chosen = dict.fromkeys(nodes)
        if name is not None:
            self[name]
        for node in chosen:
            self.graph.number(node)
        found = []
        for group in self.groups:
            stays = [node for node in group.nodes if node not in chosen]
            if group.name == name:
                stays += chosen
            same = set(stays) == set(group.nodes)
            found += [group if same else self._group(group.name, stays)] if stays else []
        return self._with(found)

    def _group(self, name: str, nodes: Iterable[Node]) -> Group:
        return group_of(self.graph, name, nodes)

    def _with(self, groups: list[Group]) -> "GraphGroups":
        names = [group.name for group in groups]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"there is a group of the name {twice[0]!r:.60} already: give another")
        groups = ordered(groups)
        return replace(self, groups=groups, graph=self.graph.with_groups({g.name: g.nodes for g in groups}))

    # ---- measured

    def score(self, draws: int = 20, seed: int = 0) -> "GraphGroups":
        """``groups.score()``: take each group's nodes out of the model at once, and beside it ``draws`` random groups.

        A feature's f·W_dec is subtracted from the MLP's output, nothing is held. The effect is the change of the
        graph's logits, less the vocabulary's mean, weighted by their probabilities. A random group has as many other
        active features, each at the layer and position of one of the group, or in its layer, and of a near norm of
        f·W_dec; where there are too few, or a node is no feature, random is NaN. A group that was drawn before counts
        once. p = (1 + random groups with an effect as large) / (1 + random groups).

        Raises ValueError for a graph from a file that was loaded without lm= and coders=, and for a logit in a group.
        """
        check_least(1, draws=draws)
        scored = group_scores.score(self.graph, [group.nodes for group in self.groups], draws, seed)
        found = [group._replace(**one._asdict()) for group, one in zip(self.groups, scored, strict=True)]
        return replace(self, groups=found, draws=draws)

    def grouped(self) -> "GroupedGraph":
        """``groups.grouped()``: the graph with each group as one node; effects between two groups are added up."""
        graph, names = self.graph, {node: group.name for group in self.groups for node in group.nodes}
        becomes: dict[Node, str | Node] = {**{node: node for node in graph.nodes}, **names}
        listed = list(dict.fromkeys(becomes.values()))
        place = {one: i for i, one in enumerate(listed)}
        at = torch.tensor([place[becomes[node]] for node in graph.nodes])
        rows = at[[graph.number(node) for node in graph.targets]]
        effects = torch.zeros(len(listed), graph.effects.shape[1]).index_add_(0, rows, graph.effects)
        whole = torch.zeros(len(listed), len(listed)).index_add_(1, at[: effects.shape[1]], effects)
        inside = {name: float(whole[place[name], place[name]]) for name in dict.fromkeys(names.values())}
        whole.fill_diagonal_(0.0)
        influence = torch.zeros(len(listed)).index_add_(0, at, graph.influence)
        called = [Name(one) if isinstance(one, str) else f"{one!r} {graph.name(one)}".strip() for one in listed]
        return GroupedGraph(listed, called, whole, influence, inside)

    # ---- shown

    @property
    def _found(self) -> str:
        if np.isnan(self.share):
            return " by hand"
        return (
            f" of nodes alike by {self.alike:.2f} or more: {self.share:.1%} of the features' influence, "
            f"{self.share_shuffled:.1%} where effects are shuffled"
        )

    @property
    def _drawn(self) -> str:
        return f"random: up to {self.draws} groups of the same places and norms for each" if self.draws else ""

    @property
    def _table(self) -> dict[str, list[Any]]:
        rows = [(Name(g.name), len(g.nodes), " ".join(map(repr, g.nodes)), *g[2:]) for g in self.groups]
        return by_column("name nodes members influence effect random random_sd p", rows)


@result
class GroupedGraph(Result):
    """Result of ``groups.grouped()``: an attribution graph whose groups are one node each. Two groups can have edges
    both ways, for a group may lie in several layers. Its table has a row for each edge, the largest effect first.

    Attributes:
        nodes: names of groups, and the nodes that are in none. names: what they are called.
        effects: "targets sources", both in this order: the sum over the nodes of both; 0 from a node to itself.
        influence: " nodes": the sum over a group's nodes. inside: by group, the sum of its effects on itself.
    """

    nodes: list[str | Node]
    names: list[str]
    effects: Float[Tensor, "nodes nodes"]
    influence: Float[Tensor, " nodes"]
    inside: dict[str, float]

    _records = "_table"
    _above = "{nodes!n} nodes, {inside!n} of them groups"

    def effect(self, source: str | Node, target: str | Node) -> float:
        """What one adds to another. ValueError for one that is not in the graph."""
        for one in (source, target):
            if one not in self.nodes:
                raise ValueError(f"this graph has no node {one!r}: take one of grouped.nodes")
        return float(self.effects[self.nodes.index(target), self.nodes.index(source)])

    @property
    def _table(self) -> dict[str, list[Any]]:
        t, s = self.effects.nonzero(as_tuple=True)
        effects = self.effects[t, s]
        order = effects.abs().argsort(descending=True).tolist()
        rows = [(self.names[s[i]], self.names[t[i]], float(effects[i])) for i in order]
        return by_column("upstream downstream effect", rows)


# ---- made


def by_hand(graph: Any, named: Mapping[str, Sequence[Node]]) -> GraphGroups:
    """These groups of the graph. ValueError for a node that is not in it, or in two groups."""
    groups = ordered(group_of(graph, name, nodes) for name, nodes in named.items())
    return GraphGroups(groups=groups, graph=graph.with_groups({group.name: group.nodes for group in groups}))


def find(graph: Any, index: FeatureIndex | Sequence[FeatureIndex] | None, alike: float, seed: int) -> GraphGroups:
    """See ``AttributionGraph.groups``."""
    if not 0 < alike < 1:
        raise ValueError(f"alike is a cosine between 0 and 1, at which two nodes do the same, got {alike}")
    fires = None if index is None else group_scores.fires_alike(graph, index)
    labels = group_scores.clustered(group_scores.similarity(graph, graph.effects, fires), alike)
    shuffled = group_scores.shuffled(graph, torch.Generator().manual_seed(seed))
    by_chance = group_scores.clustered(group_scores.similarity(graph, shuffled, fires), alike)
    nodes, groups = graph.nodes, []
    for label in np.flatnonzero(np.bincount(labels, minlength=1) > 1):
        members = np.flatnonzero(labels == label)
        groups.append(group_of(graph, _name(graph, members.tolist()), [nodes[i] for i in members]))
    named: dict[str, Sequence[Node]] = {}
    for group in ordered(groups):  # two groups may have features of one label
        named[unused(group.name, named)] = group.nodes
    share, chance = (_share(graph, which) for which in (labels, by_chance))
    return replace(by_hand(graph, named), alike=alike, share=share, share_shuffled=chance)


def group_of(graph: Any, name: str, nodes: Iterable[Node]) -> Group:
    listed = sorted(dict.fromkeys(nodes), key=graph.number)
    if not listed:
        raise ValueError(f"a group has at least one node, {name!r} got none")
    influence = float(graph.influence[[graph.number(node) for node in listed]].sum())
    return Group(checked_name(name), tuple(listed), influence)


def checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"a group's name is a text that is not empty, got {name!r:.60}")
    check_text(name, "a group's name")
    return name


def ordered(groups: Iterable[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: -np.nan_to_num(group.influence))


def _name(graph: Any, members: Sequence[int]) -> str:
    """The name of the member with most influence that has one; else its place and token."""
    by_influence = sorted(members, key=lambda i: -float(graph.influence[i]))
    if names := [name for name in graph._names_of(by_influence) if name]:
        return names[0]
    node = graph.nodes[by_influence[0]]
    kind = "" if node.site.kind == "mlp_out" else "attention "
    return f"{kind}{node.site.layer}/{node.feature} at {graph.tokens[node.position]!r}"


def _share(graph: Any, labels: np.ndarray) -> float:
    """Of the features' influence that lies in clusters of two and more."""
    influence = graph.influence[: graph.counts[0]].numpy()
    together = np.bincount(labels, minlength=1)[labels] > 1
    return float(influence[together].sum() / max(influence.sum(), 1e-12))
