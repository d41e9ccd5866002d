"""Nodes of a circuit, features and errors of several coders at a position: the effect of replacing each, in total and
through another node."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lab.circuits.attributing import evenly, true_effects
from sae_lab.circuits.gradients import gradients, mean_gradient
from sae_lab.circuits.metric import Metric
from sae_lab.circuits.pairs import Acts, Runs, kept, require_linear, require_sae
from sae_lab.lm.model import LM
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch

ERROR = -1


class Node(NamedTuple):
    """One feature of the coder at a site, or its error (feature -1), at one position. In an ``AttributionGraph`` also a
    token, at embed, and a logit, at resid_post of the last layer; both with the token's id."""

    site: Site
    position: int
    feature: int

    def __repr__(self) -> str:
        return f"{self.site.key}@{self.position}/{'error' if self.feature == ERROR else self.feature}"


class Edge(NamedTuple):
    """The effect of replacing ``upstream`` on the metric through ``downstream``, mean over prompts; in an
    ``AttributionGraph`` what ``upstream`` adds to the pre-activation of ``downstream``."""

    upstream: Node
    downstream: Node
    effect: float


class Parts(NamedTuple):
    """A coder's parts of activations: x = z·W_dec + (a part that does not depend on z) + error."""

    z: Float[Tensor, "*batch d_sae"]
    error: Float[Tensor, "*batch d"]


@dataclass(frozen=True, repr=False)
class Scene:
    """The data with which circuits of some coders on some prompts are measured.

    coders: by site, in the order in which the model computes them. batch: the prompts. keep: "batch pos", the tokens
    that have nodes; the others stay unchanged in every run. x, clean: activations and their parts. other: the
    replacement parts, "batch pos ...". means: the mean parts over the reference prompts, "pos ...".
    """

    lm: LM
    coders: Mapping[Site, SparseCoder]
    batch: TokenBatch
    keep: Bool[Tensor, "batch pos"]
    x: Mapping[Site, Tensor]
    clean: Mapping[Site, Parts]
    other: Mapping[Site, Parts]
    means: Mapping[Site, Parts]

    def change(self, node: Node) -> Float[Tensor, "batch d"]:
        """What replacing the node adds to the activation at its site and position; 0 at tokens outside ``keep``."""
        clean, other = self.clean[node.site], self.other[node.site]
        at = (slice(None), node.position)
        if node.feature == ERROR:
            added = other.error[at] - clean.error[at]
        else:
            codes = (other.z[at] - clean.z[at])[:, node.feature, None]
            added = codes * self.coders[node.site].W_dec[node.feature].detach()
        return added * self.keep[at][:, None].to(added)

    def changes(self, node: Node) -> bool:
        """Whether replacing the node changes x by more than rounding. Before the first word in which prompt and source
        differ it changes nothing."""
        return bool(self.change(node).norm() > 1e-5 * self.x[node.site][:, node.position].norm())

    def active(self) -> dict[Site, Bool[Tensor, "pos d_sae"]]:
        """The features that are active at a kept token of any prompt, before or after replacement."""
        return {
            s: (((part.z > 0) | (self.other[s].z > 0)) & self.keep.to(part.z.device).unsqueeze(-1)).any(0)
            for s, part in self.clean.items()
        }


def in_order(lm: LM, coders: Sequence[SparseCoder]) -> dict[Site, SparseCoder]:
    """SAEs by site, in the order of the model. ValueError for a coder that is no SAE of one site, and two of one."""
    if not coders:
        raise ValueError("a feature circuit needs at least one coder: pass SAEs of one model, e.g. [sae_8, sae_16]")
    for number, coder in enumerate(coders):
        require_sae(coder, "a feature circuit", f"coder {number}")
        require_linear(coder, "a feature circuit", f"coder {number}")
    times = [lm._sites.when(coder.site) for coder in coders]
    if len(set(times)) < len(times):
        raise ValueError(
            f"a feature circuit takes one coder a site, got {', '.join(repr(coder.site) for coder in coders)}: "
            "leave out all but one of those at the same place"
        )
    return {coder.site: coder.eval() for coder in sorted(coders, key=lambda coder: lm._sites.when(coder.site))}


def scene_of(
    lm: LM, coders: dict[Site, SparseCoder], runs: Runs, baseline: str, reference: Sequence[str] | None
) -> Scene:
    """The scene of these runs: the parts of both runs, and mean parts over the reference (None: over both runs)."""
    batch, theirs = runs.batch, runs.theirs
    keep = kept(lm, list(coders.values()), (batch, runs.x), (theirs, runs.given))
    others = lm.tokenize(torch.cat([batch.ids, theirs.ids]) if reference is None else list(reference))
    means = _mean_parts(lm, coders, others, batch.ids.shape[1])
    clean = _parts(coders, runs.x, batch.ids)
    if baseline == "source":
        other = _parts(coders, runs.given, theirs.ids)
    else:
        other = {s: Parts(*(t.expand(len(batch.ids), -1, -1) for t in part)) for s, part in means.items()}
    return Scene(lm, coders, batch, keep, runs.x, clean, other, means)


@torch.no_grad()
def _parts(coders: Mapping[Site, SparseCoder], acts: Acts, ids: Tensor) -> dict[Site, Parts]:
    outs = {s: coder(acts[s], ids.to(acts[s].device)) for s, coder in coders.items()}
    return {s: Parts(out.f, acts[s] - out.x_hat) for s, out in outs.items()}


def _mean_parts(lm: LM, coders: Mapping[Site, SparseCoder], reference: TokenBatch, length: int) -> dict[Site, Parts]:
    """Means over the kept tokens of the reference: position by position if all its rows are ``length`` tokens long,
    else one mean for all positions."""
    acts = lm.run(reference, list(coders), logits=False)[0]
    keep, parts = kept(lm, list(coders.values()), (reference, acts)), _parts(coders, acts, reference.ids)
    aligned = bool((reference.mask.sum(1) == length).all())

    def mean(x: Tensor) -> Tensor:
        weights = keep.unsqueeze(-1).to(x)
        if aligned:
            return (x * weights).sum(0) / weights.sum(0).clamp_min(1)
        return ((x * weights).sum((0, 1)) / weights.sum()).expand(length, -1)

    return {s: Parts(mean(part.z), mean(part.error)) for s, part in parts.items()}


def slopes_of(scene: Scene, metric: Metric, steps: int) -> dict[Site, Float[Tensor, "batch pos d"]]:
    """dm/dx at every site: on the prompts' run (steps 1), or the mean over points between x and its replacement."""
    lm, batch = scene.lm, scene.batch
    if steps == 1:
        return gradients(lm, batch, list(scene.coders), lambda _, logits: [metric(logits, batch).sum()])[0]
    found = {}
    for s, x in scene.x.items():
        clean, other = scene.clean[s], scene.other[s]
        across = (other.z - clean.z) @ scene.coders[s].W_dec.detach() + other.error - clean.error
        across = across * scene.keep.unsqueeze(-1).to(across)
        found[s] = mean_gradient(lm, batch, s, metric, x, across, steps)
    return found


def ranked(scene: Scene, slopes: Acts) -> dict[Node, float]:
    """Effects of active features, and of errors at kept positions, the largest first: the change that replaces the
    node times the metric's gradient, mean over prompts."""
    nodes: list[tuple[Node, float]] = []
    for s, on in scene.active().items():
        clean, other, g = scene.clean[s], scene.other[s], slopes[s] * scene.keep.unsqueeze(-1).to(slopes[s])
        features = ((other.z - clean.z) * (g @ scene.coders[s].W_dec.detach().T)).mean(0)
        errors = ((other.error - clean.error) * g).sum(-1).mean(0)
        places = zip(on.nonzero().tolist(), features[on].tolist(), strict=True)
        nodes += [(Node(s, p, f), effect) for (p, f), effect in places]
        nodes += [(Node(s, p, ERROR), float(errors[p])) for p in scene.keep.any(0).nonzero().flatten().tolist()]
    return dict(sorted(nodes, key=lambda pair: -abs(pair[1])))


def checked(scene: Scene, nodes: Mapping[Node, float], count: int, metric: Metric, base: float) -> dict[Node, float]:
    """Effects measured by a patch each: of ``count`` features, evenly spread over their ranking, and of the errors.
    Nodes that replacement does not change are left out: their effect is 0 by any method."""
    if not count:
        return {}
    features = [node for node in nodes if node.feature != ERROR and scene.changes(node)]
    wanted = [features[i] for i in evenly(len(features), count)]
    wanted += [node for node in nodes if node.feature == ERROR and scene.changes(node)]
    found = {}
    for s in scene.coders:
        changes = {(n.position, n.feature): scene.change(n) for n in wanted if n.site == s}
        truth = true_effects(scene.lm, scene.batch, s, scene.keep, changes, metric, base)
        found |= {Node(s, p, f): effect for (p, f), effect in truth.items()}
    return found


def edge_effects(scene: Scene, nodes: Sequence[Node], slopes: Acts) -> list[Edge]:
    """Every edge between these nodes, from an earlier site to a later one, the strongest first:

        effect(u -> d) = mean over prompts of (dm/dd)·(dd/dx_u)·Δ_u

    d: the code of the downstream feature, with dm/dd = W_dec[d]·dm/dx, or the downstream error, a vector, with dm/dx
    itself. x_u: the activation at u's site and position. Δ_u: what replacing u adds to it. All derivatives are those
    of the prompts' run. dd/dx_u goes through the whole model between the two sites, nodes in between included, so that
    if later layers see one site alone, the effects of u on all nodes there add up to the effect of u by gradient.

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
