"""Edges of a circuit: what one node does through another."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from sae_lab.circuits.gradients import gradients
from sae_lab.circuits.nodes import ERROR, Node, Scene
from sae_lab.types import Site


class Edge(NamedTuple):
    """What replacing ``upstream`` would do to the metric through ``downstream``, mean over prompts."""

    upstream: Node
    downstream: Node
    effect: float


def edge_effects(scene: Scene, nodes: Sequence[Node], slopes: Mapping[Site, Tensor]) -> list[Edge]:
    """Every edge between these nodes, from an earlier site to a later one, the strongest first:

        effect(u -> d) = mean over prompts of (dm/dd)·(dd/dx_u)·Δ_u

    d: the code of the downstream feature, whose dm/dd is W_dec[d]·dm/dx, or the downstream error, a vector, with
    dm/dx itself. x_u: the activation at u's site and position. Δ_u: what replacing u adds to it. All derivatives are
    taken on the prompts' own run; dd/dx_u runs through everything between the two sites, the nodes of sites in
    between included. So where a site is all that later layers see, the effects of u on all its nodes add up to the
    effect of u by one gradient.

    slopes: dm/dx at every site, "batch pos d", of the metric summed over prompts.
    """
    order = {s: i for i, s in enumerate(scene.coders)}
    downs = [d for d in nodes if order[d.site] > 0]
    if not downs:
        return []

    def values(acts: dict[Site, Tensor], _: Tensor) -> list[Tensor]:
        outs = {s: scene.coders[s](acts[s], scene.batch.ids.to(acts[s].device)) for s in {d.site for d in downs}}
        codes = {s: out.f for s, out in outs.items()}
        found = []
        for d in downs:
            weight = slopes[d.site][:, d.position] * scene.keep[:, d.position, None].to(slopes[d.site])
            if d.feature == ERROR:
                found.append((weight * (acts[d.site] - outs[d.site].x_hat)[:, d.position]).sum())
            else:
                weight = weight @ scene.coders[d.site].W_dec[d.feature].detach()
                found.append((weight * codes[d.site][:, d.position, d.feature]).sum())
        return found

    changes = {u: scene.change(u) for u in nodes}
    edges = []
    for d, by_site in zip(downs, gradients(scene.lm, scene.batch, list(scene.coders), values), strict=True):
        for u in nodes:
            if order[u.site] < order[d.site] and u.position <= d.position:
                effect = (by_site[u.site][:, u.position] * changes[u]).sum(-1).mean()
                edges.append(Edge(u, d, float(effect)))
    return sorted(edges, key=lambda edge: -abs(edge.effect))
