"""Graphs of many prompts as one: sums by hand, alignment, groups as nodes, intervals, what carries over."""

import numpy as np
import pytest
import torch

from sae_lab.circuits import Node, trace, trace_many
from sae_lab.circuits.task_graph import _members, _summed
from sae_lab.types import Site
from tests.circuits.test_attribution_graphs import PROMPT, by_hand, made  # noqa: F401 (fixtures)


def test_the_circuit_by_hand_is_one_graph_wherever_its_letters_stand(by_hand):  # noqa: F811
    lm, coders, (a, b, x, y), _ = by_hand
    prompts = ["-AB", "--AB", "-A-B", "---AB", "-A--B"]
    task = trace_many(lm, coders, prompts, [["X", "Y"]] * 5, nodes=1.0, edges=1.0, held_out=0.4)
    feature = lambda layer, number: ("feature", layer, number, -1)  # noqa: E731
    x, y = ("logit", 2, 0, -1), ("logit", 2, 1, -1)
    large = {(e.upstream, e.downstream) for e in task.edges if abs(e.effect) > 1e-4}
    assert large == {
        (("token", -1, a, -1), feature(0, 0)), (feature(0, 0), feature(1, 0)), (feature(1, 0), x),
        (("token", -1, b, -1), feature(1, 1)), (feature(1, 1), y),
    }  # fmt: skip
    (edge,) = (e for e in task.edges_of(x) if e.upstream == feature(1, 0))
    assert edge.share == edge.held_out_share == 1.0 and 0 < edge.low <= edge.effect <= edge.high
    assert (task.prompts, task.held_out) == (3, 2) and task.carried == task.common == 1.0
    named = task.to_pandas()
    assert {"0/0", "1/1", "token 'A'"} <= set(named.upstream) and "logit of target 0" in set(named.downstream)
    graph = trace(lm, coders, prompts[0], ["X", "Y"])
    own = [e for e in graph.top(50) if e.downstream.site.layer == 1 and e.downstream.feature == x[2]]
    assert own, "the same edges stand in a prompt's own graph"


def test_effects_are_added_up_within_a_prompt_and_averaged_over_prompts(made):  # noqa: F811
    lm, coders, _ = made
    prompts = ["The river rose", "The moon rose", "A fox ran away", "The river ran"]
    task = trace_many(lm, coders, prompts, [" in"] * 4, nodes=1.0, edges=1.0, held_out=0.25, seed=3)
    assert (task.prompts, task.held_out) == (2, 2), "two at least"
    graphs = [trace(lm, coders, prompt, " in").prune(1.0, 1.0) for prompt in prompts]
    edge = task.edges[0]
    sums = []
    for graph in graphs:
        total = 0.0
        for t, s in graph.effects.nonzero().tolist():
            up, down = graph.nodes[s], graph.targets[t]
            kinds = graph.kinds[s], graph.kinds[graph.number(down)]
            layers = [graph.places[s, 0].item(), graph.places[graph.number(down), 0].item()]
            numbers = [up.feature, 0 if kinds[1] == "logit" else down.feature]
            keys = [(k, n, i, -1) for k, n, i in zip(kinds, layers, numbers, strict=True)]
            total += float(graph.effects[t, s]) * (keys == [edge.upstream, edge.downstream])
        sums.append(total)

    order = torch.randperm(4, generator=torch.Generator().manual_seed(3)).tolist()
    assert edge.effect == pytest.approx(np.mean([sums[i] for i in order[:2]]), rel=1e-4)
    assert edge.held_out == pytest.approx(np.mean([sums[i] for i in order[2:]]), rel=1e-4)
    placed = trace_many(lm, coders, ["The river rose"] * 4, by_position=True)
    assert placed.edges[0].upstream[3] >= 0 and placed.edges[0].low == placed.edges[0].high == placed.edges[0].effect


def test_a_group_is_one_node_whose_edges_are_the_sums_of_its_members(made):  # noqa: F811
    lm, coders, _ = made
    prompts = ["The river rose", "The moon rose", "A fox ran away", "The river ran"]
    settings = {"nodes": 1.0, "edges": 1.0, "held_out": 0.25, "seed": 3}
    plain = trace_many(lm, coders, prompts, [" in"] * 4, **settings)
    feature = lambda key: key[0] == "feature"  # noqa: E731
    inner = next(e for e in plain.edges if feature(e.upstream) and feature(e.downstream))
    other = next(e.upstream for e in plain.edges if feature(e.upstream) and e.upstream not in inner[:2])
    inside = {inner.upstream, inner.downstream, other}
    nodes = [Node(Site("mlp_out", layer), 2, number) for _, layer, number, _ in inside]
    task = trace_many(lm, coders, prompts, [" in"] * 4, groups={"ours": nodes}, **settings)
    sums = {}
    for e in plain.edges:
        ends = tuple(("group", -1, 0, -1) if end in inside else end for end in e[:2])
        sums[ends] = sums.get(ends, 0.0) + e.effect
    assert sums.pop((("group", -1, 0, -1),) * 2), "an edge lies within the group"
    found = {e[:2]: e.effect for e in task.edges}
    assert found == pytest.approx(sums, rel=1e-4, abs=1e-6), "no edge within, all others as they were or added up"
    assert task.edges_of("ours") == [e for e in task.edges if ("group", -1, 0, -1) in e[:2]] and task.edges_of("ours")
    table = task.to_pandas()
    assert "ours" in set(table.upstream) and "ours" in set(table.downstream)


def test_groups_found_on_one_graph_are_nodes_of_the_task(made):  # noqa: F811
    """Also by position: then a group's feature elsewhere in the prompt is none of it."""
    lm, coders, graph = made
    graph = graph.prune(1.0, 1.0)
    group = graph.groups(of={"one": graph.nodes[:1], "a token": [graph.nodes[sum(graph.counts[:2]) + 1]]})
    whole = {"nodes": 1.0, "edges": 1.0}
    task = trace_many(lm, coders, [PROMPT] * 4, groups=group, by_position=True, **whole)
    assert list(task.groups) == group.names and task.edges_of("one") and task.edges_of("a token")
    site, position, number = graph.nodes[0]
    key = ("feature", site.layer, number, position)
    assert all(key not in e[:2] for e in task.edges)
    own = ("group", -1, group.names.index("one"), -1)
    found = sorted(e.effect for e in task.edges_of("one") if e.upstream == own)
    assert found == pytest.approx(sorted(graph.effects[graph.effects[:, 0] != 0, 0].tolist()), rel=1e-4)
    elsewhere = Node(site, position + 1, number)
    moved = trace_many(lm, coders, [PROMPT] * 4, groups={"moved": [elsewhere]}, by_position=True, **whole)
    assert any(key in e[:2] for e in moved.edges), "this position's feature is another node"


def test_groups_that_cannot_be_right_are_refused(made):  # noqa: F811
    lm, coders, graph = made
    a = Node(Site("mlp_out", 0), 2, 1)
    for groups, words in [
        ({"g": [a], "h": [a._replace(position=3)]}, "is in the groups 'g' and 'h', wherever in a prompt it is"),
        ({"g": []}, "a group is a list of nodes of a graph, at least one, and 'g' got \\[\\]"),
        ({"g": [graph.nodes[-1]]}, "features and errors at mlp_out, and tokens at embed, got resid_post"),
        ({" ": [a]}, "a group's name is a text that is not empty"),
    ]:
        with pytest.raises(ValueError, match=words):
            trace_many(lm, coders, ["The river rose"] * 4, groups=groups)
    for nodes in ([(1, 2)], 3, "ab"):  # beartype would stop these at trace_many
        with pytest.raises(ValueError, match="a list of nodes of a graph, at least one, and 'g' got"):
            _members({"g": nodes}, False)
    apart = {"g": [a], "h": [a._replace(position=3)]}
    task = trace_many(lm, coders, ["The river rose"] * 4, groups=apart, by_position=True)
    with pytest.raises(ValueError, match="no group 'i'; its groups: g, h"):
        task.edges_of("i")


def test_intervals_and_what_carries_over():
    """An effect of 1 ± 0.1 in every prompt, noise around 0, and an edge that one prompt has."""
    draw = np.random.default_rng(0)
    table = np.stack([1 + 0.1 * draw.normal(size=60), draw.normal(size=60), np.eye(60)[0]], 1)
    keys = [(("feature", 0, i, -1), ("feature", 1, i, -1)) for i in range(3)]
    task = _summed(keys, table[:40], table[40:], False, {}, seed=0)
    first, *others = task.edges
    assert first.upstream == keys[0][0] and first.high - first.low == pytest.approx(2 * 1.96 * 0.1 / 40**0.5, rel=0.3)
    assert task.sure == 1 and task.carried == task.common == 1.0
    assert task.common_control == 0.0 and task.carried_control == 0.0, "no held-out prompt has the third"
    assert all(edge.low <= 0 <= edge.high for edge in others)


def test_bad_input(made):  # noqa: F811
    lm, coders, _ = made
    for call, words in [
        (lambda: trace_many(lm, coders, ["The river"] * 3), "at least four prompts, two of them held out, got 3"),
        (lambda: trace_many(lm, coders, ["The river"] * 4, [" a"]), "targets for each prompt: got 1 target for 4"),
        (lambda: trace_many(lm, coders, ["The river"] * 4, held_out=1.0), "share of prompts from 0 to 1 .*, got 1"),
        (
            lambda: trace_many(lm, coders, ["The river", "The", "A", "The moon"], by_position=True),
            "needs prompts of equally many tokens, got",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
