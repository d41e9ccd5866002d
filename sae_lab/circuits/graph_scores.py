"""The published scores of attribution graphs (Ameisen et al. 2025), with the conventions of circuit-tracer 0.5.0.

A graph's effects are "targets sources": rows are the features, then the logits; columns the features, errors, tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def shares(effects: Float[Tensor, "targets sources"]) -> Float[Tensor, "targets sources"]:
    """|effects|, each row divided by its sum."""
    sizes = effects.abs()
    return sizes / sizes.sum(1, keepdim=True).clamp_min(1e-10)


def influence_of(
    shared: Float[Tensor, "targets sources"], weights: Float[Tensor, " logits"], features: int
) -> Float[Tensor, " sources"]:
    """w·(A + A² + ...) of a matrix whose rows are the features, then the logits of these weights."""
    flow = weights @ shared[features:]
    total = flow.clone()
    for _ in range(features + 1):  # at most one step a layer: edges lead upwards
        if not bool(flow[:features].any()):
            return total
        flow = flow[:features] @ shared[:features]
        total += flow
    raise ValueError("the edges of this graph lead round in a circle, and influence would have no end: trace it anew")


def scores(
    effects: Float[Tensor, "targets sources"], rest_size: Float[Tensor, " targets"], weights: Float[Tensor, " logits"],
    counts: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """The fields of a graph that follow from its effects: influence, share and the scores."""
    features, errors, _, logits = counts
    shared = shares(effects)
    found = influence_of(shared, weights, features)
    influence = torch.cat([found, found.new_zeros(logits)])
    of = torch.cat([found[:features], weights])  # of the targets
    wrong, token = found[features : features + errors].sum(), found[features + errors :].sum()
    explained = 1 - shared[:, features : features + errors].sum(1)
    sources = found[features:].sum()  # errors and tokens have no inputs: nothing of them comes from an error
    sizes = effects.abs().sum(1)
    unseen = rest_size / (sizes + rest_size).clamp_min(1e-10)
    return {
        "influence": influence, "share": _cumulated(influence),
        "replacement": float(token / (token + wrong)),
        "completeness": float(((explained * of).sum() + sources) / (of.sum() + sources)),
        "completeness_inner": float((explained * of).sum() / of.sum()),
        "left_out": float((unseen * of).sum() / of.sum()),
    }  # fmt: skip


def _cumulated(influence: Float[Tensor, " nodes"]) -> Float[Tensor, " nodes"]:
    ordered, order = influence.sort(descending=True)
    found = torch.zeros_like(influence)
    found[order] = ordered.cumsum(0) / ordered.sum()
    return found


def _threshold(scores: Float[Tensor, " n"], share: float) -> float:
    """The least score among the largest that make up this share of all."""
    if share == 1:  # the sum of float32 numbers may reach 1 before the last of them
        return float(scores.min())
    ordered = scores.sort(descending=True).values
    place = int(torch.searchsorted(ordered.cumsum(0) / ordered.sum(), share))
    return float(ordered[min(place, len(ordered) - 1)])


def edge_scores(effects: Tensor, weights: Tensor, features: int) -> Float[Tensor, "targets sources"]:
    shared = shares(effects)
    found = influence_of(shared, weights, features)
    return shared * torch.cat([found[:features], weights])[:, None]


def levels(
    effects: Float[Tensor, "targets sources"], influence: Float[Tensor, " nodes"], weights: Float[Tensor, " logits"],
    counts: Sequence[int], nodes: int, edges: int,
) -> tuple[float, float]:  # fmt: skip
    """(nodes, edges): the largest shares, in steps of 1e-4, with which ``pruned`` keeps at most this many features and
    errors, and this many edges. 1 where nothing has to go."""
    features, sources = counts[0], effects.shape[1]
    keep, share = torch.ones_like(influence, dtype=torch.bool), 1.0
    if features + counts[1] > nodes:
        share = _share_of(influence, nodes)
        keep = influence >= _threshold(influence, share)
        keep[features + counts[1] :] = True
    rows = torch.cat([keep[:features], keep[sources:]])
    found = edge_scores(effects * rows[:, None] * keep[:sources], weights, features)
    some = found[found > 0]
    return share, 1.0 if len(some) <= edges else _share_of(some, edges)


def _share_of(scores: Float[Tensor, " n"], most: int) -> float:
    """The share of all that the largest scores have, rounded down, so that no more than ``most`` make it up."""
    ordered = scores.sort(descending=True).values
    return math.floor(1e4 * float(ordered[:most].sum() / ordered.sum()) - 1e-3) / 1e4


def pruned(
    effects: Float[Tensor, "targets sources"], influence: Float[Tensor, " nodes"], weights: Float[Tensor, " logits"],
    counts: Sequence[int], nodes: float, edges: float,
) -> tuple[Bool[Tensor, " nodes"], Bool[Tensor, "targets sources"]]:  # fmt: skip
    """(which nodes stay, which edges stay), see ``AttributionGraph.prune``."""
    features, sources = counts[0], effects.shape[1]
    inner = features + counts[1]  # features and errors, of which some are left out
    keep = influence >= _threshold(influence, nodes)
    keep[inner:] = True
    effects = effects * torch.cat([keep[:features], keep[sources:]])[:, None] * keep[:sources]
    found = edge_scores(effects, weights, features)
    some = found[found > 0]
    linked = (found > 0) & (found >= (_threshold(some, edges) if len(some) else 0.0))
    while True:
        before = keep.clone()
        keep[:inner] &= linked[:, :inner].any(0)
        keep[:features] &= linked[:features].any(1)
        if torch.equal(keep, before):
            return keep, linked
        linked &= torch.cat([keep[:features], keep[sources:]])[:, None] & keep[:sources]
