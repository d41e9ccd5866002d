"""Scores and pruning of small random graphs, against the same formulas written with dense matrices and plain loops."""

import pytest
import torch

from sae_lab.circuits.graph_scores import edge_scores, influence_of, levels, pruned, scores, shares

COUNTS = (9, 4, 3, 2)  # features, errors, tokens, logits
FEATURES, SOURCES = 9, 16
WEIGHTS = torch.tensor([0.7, 0.2])


def graph(seed):
    """Effects of a graph in which a feature is read by later ones alone; about a third of the edges are 0."""
    generator = torch.Generator().manual_seed(seed)
    effects = torch.randn(FEATURES + 2, SOURCES, generator=generator)
    effects *= torch.rand(effects.shape, generator=generator) < 0.7
    effects[:FEATURES, :FEATURES] = effects[:FEATURES, :FEATURES].tril(-1)
    return effects


def flow_by_inverse(effects):
    """(A, influence) of all nodes: w·((1 − A)⁻¹ − 1), w the weights of the logits, A with a row for every node."""
    n = sum(COUNTS)
    matrix, at_logits = torch.zeros(n, n, dtype=torch.double), torch.zeros(n, dtype=torch.double)
    at_logits[SOURCES:] = WEIGHTS.double()
    sizes = effects.double().abs()
    sizes = torch.where(sizes.sum(1, keepdim=True) > 0, sizes / sizes.sum(1, keepdim=True), 0.0)
    matrix[:FEATURES, :SOURCES], matrix[SOURCES:, :SOURCES] = sizes[:FEATURES], sizes[FEATURES:]
    one = torch.eye(n, dtype=torch.double)
    return matrix, at_logits @ (torch.linalg.inv(one - matrix) - one)


def largest(sizes, share):
    """The fewest of some numbers, by name, whose sum is this share of all, the largest first."""
    chosen, total = set(), sum(sizes.values())
    for name in sorted(sizes, key=sizes.get, reverse=True):
        if share < 1 and sum(sizes[c] for c in chosen) >= share * total:
            break
        chosen.add(name)
    return chosen


def edges_by_inverse(effects):
    """The score of each edge above 0, by (target, source): what arrives at its target times its share of it."""
    matrix, influence = flow_by_inverse(effects)
    influence[SOURCES:] += WEIGHTS.double()
    found = influence[:, None] * matrix
    return {(t, s): float(found[t, s]) for t, s in found.nonzero().tolist()}


def pruned_by_loops(effects, nodes, edges):
    """(nodes, edges) that stay, as sets of numbers of nodes and of (target, source)."""
    ends = set(range(FEATURES + 4, sum(COUNTS)))  # tokens and logits always stay
    keep = largest(dict(enumerate(flow_by_inverse(effects)[1].tolist())), nodes) | ends
    left = effects.clone()
    for row in range(len(left)):
        for column in range(SOURCES):
            if (row if row < FEATURES else row - FEATURES + SOURCES) not in keep or column not in keep:
                left[row, column] = 0
    linked = largest(edges_by_inverse(left), edges)
    while True:
        linked = {(t, s) for t, s in linked if t in keep and s in keep}
        read, fed = {s for _, s in linked}, {t for t, _ in linked}
        stay = {n for n in keep if n in ends or (n in read and (n >= FEATURES or n in fed))}
        if stay == keep:
            return keep, linked
        keep = stay


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_inverse(seed):
    effects, rest = graph(seed), torch.rand(FEATURES + 2, generator=torch.Generator().manual_seed(seed))
    found = scores(effects, rest, WEIGHTS, COUNTS)
    matrix, influence = flow_by_inverse(effects)
    assert found["influence"].tolist() == pytest.approx(influence.tolist(), abs=1e-6)
    # Each row of A sums to 1: all that the logits weigh comes from errors and tokens.
    assert float(found["influence"][FEATURES:].sum()) == pytest.approx(0.9)
    for node, share in enumerate(found["share"].tolist()):
        assert share == pytest.approx(
            float(influence[influence >= influence[node] - 1e-9].sum() / influence.sum())
        ) or (influence[node] == 0 and share == pytest.approx(1.0))
    arrives = influence.clone()
    arrives[SOURCES:] += WEIGHTS.double()
    explained = 1 - matrix[:, FEATURES : FEATURES + 4].sum(1)
    targets = torch.tensor([*range(FEATURES), SOURCES, SOURCES + 1])
    of = arrives[targets]
    assert found["replacement"] == pytest.approx(float(influence[FEATURES + 4 :].sum() / influence[FEATURES:].sum()))
    assert found["completeness"] == pytest.approx(float((arrives * explained).sum() / arrives.sum()))
    assert found["completeness_inner"] == pytest.approx(float((of * explained[targets]).sum() / of.sum()))
    unseen = (rest / (rest + effects.abs().sum(1))).double()
    assert found["left_out"] == pytest.approx(float((of * unseen).sum() / of.sum()))


def test_a_target_without_inputs_has_no_shares():
    effects = graph(0)
    effects[2] = 0
    assert shares(effects)[2].tolist() == [0.0] * SOURCES
    found = scores(effects, torch.zeros(len(effects)), WEIGHTS, COUNTS)
    assert found["left_out"] == 0.0 and found["influence"].tolist() == pytest.approx(
        flow_by_inverse(effects)[1].tolist(), abs=1e-6
    )


def test_the_longest_way_and_one_without_end():
    """Each feature reads the one before, and the logit reads the last: influence goes through all of them."""
    chain = torch.zeros(5, 5)  # four features and a logit; four features and a token
    chain[0, 4] = 1.0
    chain[torch.arange(1, 5), torch.arange(4)] = 1.0
    assert influence_of(chain, torch.ones(1), 4).tolist() == [1.0] * 5
    chain[0, 3] = 1.0
    with pytest.raises(ValueError, match="lead round in a circle"):
        influence_of(chain, torch.ones(1), 4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("nodes", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("edges", [0.5, 0.8, 1.0])
def test_pruning_is_that_of_plain_loops(seed, nodes, edges):
    effects = graph(seed)
    influence = scores(effects, torch.zeros(len(effects)), WEIGHTS, COUNTS)["influence"]
    keep, linked = pruned(effects, influence, WEIGHTS, COUNTS, nodes, edges)
    kept, stay = pruned_by_loops(effects, nodes, edges)
    assert set(keep.nonzero().flatten().tolist()) == kept
    assert {(t if t < FEATURES else t - FEATURES + SOURCES, s) for t, s in linked.nonzero().tolist()} == stay


def test_edge_scores_are_what_arrives_times_the_share():
    effects = graph(1)
    found = edge_scores(effects, WEIGHTS, FEATURES)
    named = {
        (t if t < FEATURES else t - FEATURES + SOURCES, s): float(found[t, s]) for t, s in found.nonzero().tolist()
    }
    assert named == pytest.approx(edges_by_inverse(effects), abs=1e-6)
    # What flows out of a node in all is what arrives there: the node's influence.
    assert found.sum(0).tolist() == pytest.approx(flow_by_inverse(effects)[1][:SOURCES].tolist(), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [1, 4, 12])
def test_levels_are_the_largest_that_keep_this_many(seed, most):
    """A step of 1e-4 more, or two where the level was rounded down by nearly one, and there is one too many."""
    effects = graph(seed)
    influence = scores(effects, torch.zeros(len(effects)), WEIGHTS, COUNTS)["influence"]
    nodes, edges = levels(effects, influence, WEIGHTS, COUNTS, most, 2 * most)
    sizes = dict(enumerate(influence.tolist()))
    assert len(largest(sizes, nodes)) <= most < len(largest(sizes, nodes + 2e-4))
    keep, linked = pruned(effects, influence, WEIGHTS, COUNTS, nodes, edges)
    assert int(keep[: FEATURES + 4].sum()) <= most and int(linked.sum()) <= 2 * most
    first = torch.ones(len(influence), dtype=torch.bool)
    first[: FEATURES + 4] = torch.tensor([n in largest(sizes, nodes) for n in range(FEATURES + 4)])
    left = effects * torch.cat([first[:FEATURES], first[SOURCES:]])[:, None] * first[:SOURCES]
    of_edges = edges_by_inverse(left)
    assert len(largest(of_edges, edges)) <= 2 * most
    assert edges == 1.0 or len(largest(of_edges, edges + 2e-4)) > 2 * most


def test_levels_of_a_graph_that_is_small_enough():
    effects = graph(0)
    influence = scores(effects, torch.zeros(len(effects)), WEIGHTS, COUNTS)["influence"]
    some = int((edge_scores(effects, WEIGHTS, FEATURES) > 0).sum())
    assert levels(effects, influence, WEIGHTS, COUNTS, FEATURES + 4, some) == (1.0, 1.0)
    nodes, _ = levels(effects, influence, WEIGHTS, COUNTS, FEATURES + 3, some - 1)
    assert nodes < 1 and levels(effects, influence, WEIGHTS, COUNTS, FEATURES + 4, some - 1)[1] < 1
