"""One attribution graph for many prompts of a task: edges between features or groups of them, wherever they are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from sae_lab.arguments import as_annotated, check_least
from sae_lab.circuits.attribution_graph import AttributionGraph
from sae_lab.circuits.groups import GraphGroups, checked_name
from sae_lab.circuits.layout import WithAttention, as_set
from sae_lab.circuits.nodes import ERROR, Node
from sae_lab.circuits.tracing import trace
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import label
from sae_lab.results import Result, by_column, counted, figure, result
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.sets import TranscoderSet

Key = tuple[str, int, int, int]  # kind, layer, number, position; position -1: anywhere; ("group", -1, which, -1)
DRAWS = 1000  # bootstrap samples


class TaskEdge(NamedTuple):
    """An edge of a ``TaskGraph``. upstream, downstream: (kind, layer, number, position); of a group ("group", -1, its
    place among the groups, -1). effect: mean over the first prompts, 0 where the edge is not in a prompt's graph; low,
    high: its 95 % interval. share: of these prompts that have it. held_out, held_out_share: the same of the held-out
    prompts."""

    upstream: Key
    downstream: Key
    effect: float
    low: float
    high: float
    share: float
    held_out: float
    held_out_share: float


@result
class TaskGraph(Result):
    """Result of ``circuits.trace_many``: the edges that prompts of a task have in common, the largest effect first.

        task.edges[0]; task.to_pandas()
        task.edges_of(("feature", 8, 812, -1))      # those to and from one node
        task.edges_of("say a capital")              # those to and from a group

    Attributes:
        edges: see ``circuits.TaskEdge``. prompts, held_out: numbers of prompts. by_position: whether a node is a
            feature at one position. names: {node: what it is called}. groups: names of the groups, by their numbers.
        sure: edges whose interval is without 0. carried: the share of them with the same sign in the mean over held-out
            prompts; common: in which share of the held-out prompts they are, in the mean. The controls are those of
            edges that only one of the first prompts has.
    """

    edges: list[TaskEdge]
    prompts: int
    held_out: int
    by_position: bool
    sure: int
    carried: float = figure(
        "carried over", "share of the {sure} sure edges with the same sign held out", control="carried_control",
        control_name="edges of one prompt", best="high",
    )  # fmt: skip
    common: float = figure(
        "common", "their mean share of the held-out prompts", control="common_control",
        control_name="edges of one prompt", best="high",
    )  # fmt: skip
    carried_control: float
    common_control: float
    names: Mapping[Key, str] = field(default_factory=dict, repr=False)
    groups: Sequence[str] = ()

    _records = "_table"
    _above = "{edges!n} edges of {prompts} prompts, and of {held_out} held out; sure: an interval without 0"

    def edges_of(self, node: Sequence[Any] | str) -> list[TaskEdge]:
        """The edges to and from a node, or to and from a group, by its name. ValueError for one that has none."""
        if isinstance(node, str) and node not in self.groups:
            raise ValueError(f"this graph has no group {node!r:.60}; its groups: {', '.join(self.groups) or 'none'}")
        key = _group_key(self.groups.index(node)) if isinstance(node, str) else tuple(node)
        found = [edge for edge in self.edges if key in (edge.upstream, edge.downstream)]
        if not found:
            raise ValueError(f"this graph has no edge of {node!r}: take a node of task.edges")
        return found

    def _called(self, key: Key) -> str:
        kind, layer, number, position = key
        if kind == "group":
            return self.groups[number]
        at = f"@{position}" if position >= 0 else ""
        what = {"feature": f"{layer}/{number}", "error": f"{layer}/error"}.get(kind, kind) + at
        return f"{what} {self.names.get(key, '')}".strip()

    @property
    def _table(self) -> dict[str, list[Any]]:
        rows = [(self._called(e.upstream), self._called(e.downstream), *e[2:]) for e in self.edges]
        return by_column("upstream downstream effect low high share held_out held_out_share", rows)


@as_annotated
def trace_many(
    lm: LM,
    coders: TranscoderSet | SparseCoder | Sequence[SparseCoder],
    prompts: Sequence[Any],
    targets: Sequence[Any] | None = None,
    *,
    by_position: bool = False,
    nodes: float = 0.8,
    edges: float = 0.98,
    groups: GraphGroups | Mapping[str, Sequence[Node]] | None = None,
    held_out: float = 0.5,
    features: int = 4096,
    seed: int = 0,
) -> TaskGraph:
    """``task = trace_many(lm, coders, prompts, [" Paris", " Rome", ...])``: what the graphs of many prompts of one task
    have in common. Each prompt is traced and pruned by itself; then features are the same node wherever they fire, and
    effects between two nodes are added up within a prompt.

    Args:
        prompts: at least four. targets: of each prompt, as of ``trace``: a token, a difference of two, or a list; the
            first target of all prompts is one node, and so on. None: the likeliest tokens, each a node of its own.
        by_position: a feature is another node at each position; then all prompts have equally many tokens.
        nodes, edges: as of ``graph.prune``. features: as of ``trace``. held_out: the share of the prompts, drawn by the
            seed, that only measure what carries over.
        groups: ``graph.groups()`` of one graph, or {name: nodes}: each is one node of the task's graph. A group's
            features, errors and tokens belong to it wherever in a prompt they are (with by_position: at their own
            positions), and its effects are the sums of theirs. What they add to each other is left out. Find
            groups on a prompt that is not among these: on its own prompt a group's edges are no news.

    Raises ValueError for fewer than four prompts, targets of another number, prompts of several lengths with
    by_position, and for a group without a node, with a logit, or with a node that another group has too. Bootstrap
    over prompts, 1,000 samples.
    """
    from tqdm.auto import tqdm

    prompts = list(prompts)
    if isinstance(as_set(coders), WithAttention):
        raise ValueError("trace_many takes transcoders alone, got an SAE of attention besides: leave it out")
    if len(prompts) < 4:
        raise ValueError(f"a task needs at least four prompts, two of them held out, got {len(prompts)}")
    if targets is not None and len(targets) != len(prompts):
        raise ValueError(
            f"give targets for each prompt: got {counted(len(targets), 'target')} for {len(prompts)} prompts"
        )
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is the share of prompts from 0 to 1 that are held out, got {held_out}")
    check_least(1, features=features)
    lengths = [lm.tokenize(prompt).ids.shape[1] for prompt in prompts]
    if by_position and len(set(lengths)) > 1:
        raise ValueError(f"by_position=True needs prompts of equally many tokens, got {sorted(set(lengths))}")
    named, member = _members(groups, by_position)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    first = len(prompts) - min(len(prompts) - 2, max(2, round(held_out * len(prompts))))
    found, names = [], {}
    for i in tqdm(order, unit="prompt", desc="trace", dynamic_ncols=True, disable=None):
        graph = trace(lm, coders, prompts[i], None if targets is None else targets[i], features=features)
        found.append(_edges(graph.prune(nodes, edges), by_position, targets is not None, names, member))
    listed = sorted({edge for one in found for edge in one})
    table = np.array([[one.get(edge, 0.0) for edge in listed] for one in found])
    names |= _token_names(lm, listed)
    return _summed(listed, table[:first], table[first:], by_position, names, seed, named)


def _group_key(which: int) -> Key:
    return "group", -1, which, -1


def _members(groups: Any, by_position: bool) -> tuple[list[str], dict[Key, Key]]:
    """(names of the groups, {node of the task: the group that it is part of}). ValueError for what is no group."""
    given = {} if groups is None else groups.graph.supernodes if isinstance(groups, GraphGroups) else groups
    names, member = [checked_name(name) for name in given], {}
    for which, (name, nodes) in enumerate(given.items()):
        if not nodes or not isinstance(nodes, Sequence) or not all(isinstance(node, Node) for node in nodes):
            raise ValueError(f"a group is a list of nodes of a graph, at least one, and {name!r} got {nodes!r:.80}")
        for node in nodes:
            key = _key_of(node, by_position)
            if member.setdefault(key, _group_key(which)) != _group_key(which):
                other = names[member[key][2]]
                where = "" if by_position else ", wherever in a prompt it is: leave it in one, or use by_position=True"
                raise ValueError(f"{node!r} is in the groups {other!r} and {name!r}{where}")
    return names, member


def _key_of(node: Node, by_position: bool) -> Key:
    """What a group's node is in the graph of a task."""
    kind, position = node.site.kind, node.position if by_position else -1
    if kind == "mlp_out":
        return "error" if node.feature == ERROR else "feature", node.site.layer or 0, node.feature, position
    if kind != "embed":
        raise ValueError(f"a group has features and errors at mlp_out, and tokens at embed, got {node!r}: leave it out")
    return "token", -1, node.feature, position


def _edges(
    graph: AttributionGraph, by_position: bool, numbered: bool, names: dict[Key, str], member: Mapping[Key, Key]
) -> dict[tuple[Key, Key], float]:
    """The effects of one prompt's graph between nodes of the task. numbered: logits by their place among targets.
    member: the group of a node that is in one."""
    ends, begin = [], sum(graph.counts[:3])
    for i, (kind, (layer, position, number)) in enumerate(zip(graph.kinds, graph.places.tolist(), strict=True)):
        number = i - begin if kind == "logit" and numbered else number
        ends.append((kind, layer, number, position if by_position else -1))
    called = graph._names_of(range(len(ends)))
    for key, name in zip(ends, called, strict=True):
        if key[0] == "logit":
            names[key] = f"of target {key[2]}" if numbered else repr(name)
        elif key[0] == "feature" and name:
            names[key] = name
    ends = [member.get(key, key) for key in ends]
    targets = [ends[graph.number(node)] for node in graph.targets]
    found: dict[tuple[Key, Key], float] = {}
    for t, s in graph.effects.nonzero().tolist():
        edge = ends[s], targets[t]
        if edge[0] != edge[1]:  # else within a group
            found[edge] = found.get(edge, 0.0) + float(graph.effects[t, s])
    return found


def _token_names(lm: LM, edges: Iterable[tuple[Key, Key]]) -> dict[Key, str]:
    keys = {key for edge in edges for key in edge if key[0] == "token"}
    return {key: repr(label(lm.tokenizer, key[2])) for key in keys}


def _summed(
    listed: list[tuple[Key, Key]], here: Float[np.ndarray, "prompts edges"], there: Float[np.ndarray, "held edges"],
    by_position: bool, names: Mapping[Key, str], seed: int, groups: Sequence[str] = (),
) -> TaskGraph:  # fmt: skip
    mean, other = here.mean(0), there.mean(0)
    drawn = np.random.default_rng(seed).multinomial(len(here), [1 / len(here)] * len(here), DRAWS) / len(here)
    low, high = np.quantile(drawn @ here, [0.025, 0.975], axis=0)
    share, other_share = (here != 0).mean(0), (there != 0).mean(0)
    order = np.argsort(-np.abs(mean), kind="stable")
    numbers = np.stack([mean, low, high, share, other, other_share], 1).tolist()
    edges = [TaskEdge._make((*listed[i], *numbers[i])) for i in order if share[i] > 0]
    sure, once = (low * high > 0) & (share > 0), (here != 0).sum(0) == 1
    same = np.sign(mean) == np.sign(other)
    carried, common = ([_mean(what[which]) for which in (sure, once)] for what in (same, other_share))
    return TaskGraph(
        edges=edges, prompts=len(here), held_out=len(there), by_position=by_position, sure=int(sure.sum()),
        carried=carried[0], common=common[0], carried_control=carried[1], common_control=common[1], names=names,
        groups=groups,
    )  # fmt: skip


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
