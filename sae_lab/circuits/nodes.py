"""Nodes of a circuit: features and errors of several coders at a position, and what replacing each would do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lab.circuits.attributing import true_effects
from sae_lab.circuits.gradients import gradients
from sae_lab.circuits.metric import Metric, numbers
from sae_lab.lm.model import LM
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch, TokenMask

ERROR = -1


class Node(NamedTuple):
    """One feature of the coder at a site, or its error (feature -1), at one position."""

    site: Site
    position: int
    feature: int

    def __repr__(self) -> str:
        return f"{self.site.key}@{self.position}/{'error' if self.feature == ERROR else self.feature}"


class Parts(NamedTuple):
    """What a coder makes of activations: x = z·W_dec + (what does not depend on z) + error."""

    z: Float[Tensor, "*batch d_sae"]
    error: Float[Tensor, "*batch d"]


@dataclass(frozen=True, repr=False)
class Scene:
    """All that circuits of some coders on some prompts are measured with.

    coders: by site, in the order in which the model computes them. batch: the prompts. keep: "batch pos", the tokens
    whose nodes count; the others pass through everything unchanged. x, clean: activations and their parts. other: the
    parts that replace them, "batch pos ...". means: the mean parts over the reference prompts, "pos ...".
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
        """What replacing the node adds to the activation at its site and position; 0 for tokens that do not count."""
        clean, other = self.clean[node.site], self.other[node.site]
        at = (slice(None), node.position)
        if node.feature == ERROR:
            added = other.error[at] - clean.error[at]
        else:
            codes = (other.z[at] - clean.z[at])[:, node.feature, None]
            added = codes * self.coders[node.site].W_dec[node.feature].detach()
        return added * self.keep[at][:, None].to(added)

    def active(self) -> dict[Site, Bool[Tensor, "pos d_sae"]]:
        """The features that are on, or would be after replacement, at any token that counts."""
        return {
            s: (((part.z > 0) | (self.other[s].z > 0)) & self.keep.to(part.z.device).unsqueeze(-1)).any(0)
            for s, part in self.clean.items()
        }


def in_order(lm: LM, coders: Sequence[SparseCoder]) -> dict[Site, SparseCoder]:
    """SAEs by site, in the order of the model. ValueError for what is no SAE of one site of its own."""
    if not coders:
        raise ValueError("a feature circuit needs at least one coder: pass SAEs of one model, e.g. [sae_8, sae_16]")
    for number, coder in enumerate(coders):
        if coder.transcodes or len(coder.reads) > 1 or (coder.writes and coder.writes != coder.reads):
            raise ValueError(
                f"a feature circuit takes coders that write where they read, SAEs of one site; coder {number} is a "
                f"{type(coder).__name__} that reads {coder.reads} and writes {coder.writes}: take an SAE at one of them"
            )
        if coder.input_norm != "none":
            raise ValueError(
                f"a feature circuit needs codes that add up to x; coder {number} has input_norm={coder.input_norm!r}, "
                "which rescales them token by token: take a coder with input_norm='none'"
            )
    times = [lm._sites.when(coder.site) for coder in coders]
    if len(set(times)) < len(times):
        raise ValueError(
            f"a feature circuit takes one coder a site, got {', '.join(repr(coder.site) for coder in coders)}: "
            "leave out all but one of those at the same place"
        )
    ordered = sorted(zip(times, coders, strict=True), key=lambda pair: pair[0])
    return {coder.site: coder.eval() for _, coder in ordered}


def kept(
    lm: LM, coders: Mapping[Site, SparseCoder], batch: TokenBatch, acts: Mapping[Site, Tensor]
) -> Bool[Tensor, "batch pos"]:
    """The real tokens that no coder's mask leaves out, at no site: one rule for all. ValueError where none is left."""
    masks: list[TokenMask] = [coder.mask or lm.mask() for coder in coders.values()]
    keep = batch.mask.clone()
    for mask in masks:
        keep &= mask.keep(batch.ids, batch.positions, {s: x.cpu() for s, x in acts.items()})
    if not keep.any():
        raise ValueError(
            f"the coders' masks leave out every token of these prompts ({'; '.join(dict.fromkeys(map(str, masks)))}): "
            "give others"
        )
    return keep


@torch.no_grad()
def parts_of(coders: Mapping[Site, SparseCoder], acts: Mapping[Site, Tensor], ids: Tensor) -> dict[Site, Parts]:
    """Codes and errors at every site."""
    found = {}
    for s, coder in coders.items():
        out = coder(acts[s], ids.to(acts[s].device))
        found[s] = Parts(out.f, acts[s] - out.x_hat)
    return found


def mean_parts(lm: LM, coders: Mapping[Site, SparseCoder], reference: TokenBatch, length: int) -> dict[Site, Parts]:
    """Means over the tokens of the reference that count: position by position where its rows are all ``length`` tokens
    long, else one mean for all positions."""
    acts = lm.run(reference, list(coders), logits=False)[0]
    keep, parts = kept(lm, coders, reference, acts), parts_of(coders, acts, reference.ids)
    aligned = bool((reference.mask.sum(1) == length).all())
    if not bool(keep.any()):
        raise ValueError("the coders' masks leave out every token of the reference: pass longer prompts")

    def mean(x: Tensor) -> Tensor:
        weights = keep.unsqueeze(-1).to(x)
        if aligned:
            return (x * weights).sum(0) / weights.sum(0).clamp_min(1)
        return ((x * weights).sum((0, 1)) / weights.sum()).expand(length, -1)

    return {s: Parts(mean(part.z), mean(part.error)) for s, part in parts.items()}


Effects = dict[Site, tuple[Tensor, Tensor]]  # features "pos d_sae", errors " pos"


def node_effects(scene: Scene, metric: Metric, steps: int) -> tuple[Effects, dict[Site, Tensor]]:
    """(effects of all nodes, gradients used): the change that replaces a node times the metric's gradient."""
    lm, batch = scene.lm, scene.batch

    def value(logits: Tensor, tokens: Any) -> Tensor:
        found = numbers(metric(logits, tokens), batch)
        if not found.requires_grad:
            raise ValueError(
                "a metric must be differentiable in the logits it gets, this one's numbers have no gradient"
            )
        return found

    if steps == 1:
        (grads,) = gradients(lm, batch, list(scene.coders), lambda _, logits: [value(logits, batch).sum()])
    else:
        grads = {s: torch.zeros_like(x) for s, x in scene.x.items()}
        for s, total in grads.items():
            clean, other = scene.clean[s], scene.other[s]
            across = (other.z - clean.z) @ scene.coders[s].W_dec.detach() + other.error - clean.error
            across = across * scene.keep.unsqueeze(-1).to(across)
            for step in range(steps):
                total += lm.gradient(batch, s, value, scene.x[s] + (step + 0.5) / steps * across) / steps
    effects = {}
    for s, coder in scene.coders.items():
        clean, other, g = scene.clean[s], scene.other[s], grads[s] * scene.keep.unsqueeze(-1).to(grads[s])
        features = ((other.z - clean.z) * (g @ coder.W_dec.detach().T)).mean(0)
        effects[s] = (features, ((other.error - clean.error) * g).sum(-1).mean(0))
    return effects, grads


def ranked(scene: Scene, effects: Effects) -> dict[Node, float]:
    """Active features and errors at positions that count, by the size of their effect, the largest first."""
    nodes: list[tuple[Node, float]] = []
    for s, on in scene.active().items():
        features, errors = effects[s]
        values = features[on].tolist()
        nodes += [(Node(s, p, f), e) for (p, f), e in zip(on.nonzero().tolist(), values, strict=True)]
        nodes += [(Node(s, p, ERROR), float(errors[p])) for p in scene.keep.any(0).nonzero().flatten().tolist()]
    return dict(sorted(nodes, key=lambda pair: -abs(pair[1])))


def checked(scene: Scene, nodes: Mapping[Node, float], count: int, metric: Metric, base: float) -> dict[Node, float]:
    """True effects, each by a patch of its own: of ``count`` features, evenly over the order of their estimates, and
    of the errors; only of nodes that replacement changes, since the others' effect is 0 whatever the method."""
    if not count:
        return {}
    features = [node for node in nodes if node.feature != ERROR and _changes(scene, node)]
    chosen = np.unique(np.linspace(0, len(features) - 1, min(count, len(features))).round().astype(int))
    wanted = [features[i] for i in chosen] + [n for n in nodes if n.feature == ERROR and _changes(scene, n)]
    found = {}
    for s in scene.coders:
        changes = {(n.position, n.feature): scene.change(n) for n in wanted if n.site == s}
        truth = true_effects(scene.lm, scene.batch, s, scene.keep, changes, metric, base)
        found |= {Node(s, p, f): effect for (p, f), effect in truth.items()}
    return found


def _changes(scene: Scene, node: Node) -> bool:
    """Whether replacing the node adds more than rounding: in front of the first word in which prompt and source
    differ nothing changes."""
    return bool(scene.change(node).norm() > 1e-5 * scene.x[node.site][:, node.position].norm())
