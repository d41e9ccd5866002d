"""Edges from a feature that writes to the residual stream to one that reads it, from the weights alone."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.circuits.pairs import kept, require_here, require_linear
from sae_lab.circuits.prompt import norm_divisor
from sae_lab.lm import passes
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompts
from sae_lab.noting import Names
from sae_lab.results import Result, result
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, Write, check_feature

STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "embed")
LISTED = 32  # downstream features that ``check_edges`` takes by default


@result
class EdgeCheck(Result):
    """Result of ``circuits.check_edges`` and ``graph.check``: changes that edges predict, and changes by taking the
    upstream feature out. Its table has one row per downstream feature: means over the tokens at which the upstream one
    fires; in a graph one token.

    Attributes, "tokens features":
        predicted: -f·edge (over the norm's scale at the token). frozen: the change of the downstream feature's
            pre-activation with attention, the MLPs between and the norm's scale held fixed. free: its change with none
            of these fixed. pre: the pre-activation before the change.
        total, responding: of a graph: what the graph predicts along all paths, and the change with attention and norms
            held while later features are made anew; None for an edge from weights.
        feature, features: the upstream feature; the downstream ones; in a graph their nodes. names: of upstream and of
            downstream features. largest: " features": of a graph, the largest effect on each; None: the largest change.
    """

    predicted: Float[np.ndarray, "tokens features"]
    frozen: Float[np.ndarray, "tokens features"]
    free: Float[np.ndarray, "tokens features"]
    pre: Float[np.ndarray, "tokens features"]
    feature: Any
    features: list[Any]
    names: tuple[Any, Any] = field(default_factory=lambda: (Names(), Names()))
    total: Float[np.ndarray, "tokens features"] | None = None
    responding: Float[np.ndarray, "tokens features"] | None = None
    largest: Float[np.ndarray, " features"] | None = None

    _records, _sorted, _shown, _digits = "_means", "predicted", 8, ".4f"
    _above = (
        "{_called} taken out at {predicted!n} tokens: predicted and frozen differ by at most {error:.1e} of "
        "the largest; free: slope {slope:.3f}, correlation {correlation:.3f}"
    )

    @property
    def error(self) -> float:
        """Largest |predicted - frozen| over the largest |frozen|, in a graph over the largest effect on that target:
        rounding error, if the edges are right."""
        largest = max(np.abs(self.frozen).max(), 1e-12) if self.largest is None else self.largest.clip(1e-12)
        return float((np.abs(self.predicted - self.frozen) / largest).max())

    @property
    def slope(self) -> float:
        """Slope of free on predicted, through 0: 1 if the layers between and the norm's scale ignore the change."""
        return float((self.predicted * self.free).sum() / max((self.predicted**2).sum(), 1e-12))

    @property
    def correlation(self) -> float:
        """Pearson's correlation of predicted and free; NaN for a single change."""
        if self.predicted.size < 2:
            return float("nan")
        return float(np.corrcoef(self.predicted.ravel(), self.free.ravel())[0, 1])

    @property
    def _called(self) -> str:
        if isinstance(self.feature, int):
            return f"feature {self.names[0].numbered(self.feature)}"
        return ", ".join(f"{node!r} {self.names[0][node]}".strip() for node in self.feature)

    @property
    def _means(self) -> dict[str, Any]:
        if isinstance(self.feature, int):
            called = self.names[1].of(self.features)
            own = {"feature": self.features, "name": [called.get(f, "") for f in self.features]}
        else:
            own = {"node": [repr(n) for n in self.features], "name": [self.names[1][n] for n in self.features]}
        measures = ("predicted", "frozen", "total", "responding", "free", "pre")
        return own | {name: found.mean(0) for name in measures if (found := getattr(self, name)) is not None}


@as_annotated
@torch.no_grad()
def invariant_edges(
    lm: LM, upstream: SparseCoder, downstream: SparseCoder, features: Sequence[int] | None = None
) -> Float[Tensor, "some d_sae"]:
    """``invariant_edges(lm, transcoder_8, transcoder_10)``: input-invariant edges from upstream features to all
    downstream ones (Dunefsky et al. 2024, arXiv:2406.11944):

        edge_ij = A(W_dec_i)·W_enc_j,   and at a token   Δpre_j = f_i·edge_ij / s

    A maps a direction to the site that the downstream coder reads: by W_O for an upstream coder at attn_z; by the gain
    of the MLP's norm (1+w for Gemma) for a downstream one at mlp_in, centred if that norm centres. s, the norm's
    divisor (``norm_scale``), differs between tokens and is not part of the edge; s = 1 if the downstream coder reads
    the stream itself. Edges are the direct path: attention and MLPs between are left out. An edge is in units of the
    downstream code over the upstream one.

    Args:
        upstream: an SAE or transcoder whose output is part of the residual stream, or at attn_z.
        downstream: a coder that reads the stream, or mlp_in, at a later site. features: upstream ones; None: all.

    Raises ValueError for coders at other sites, or in the wrong order, for a model without a norm before its MLP, and
    for a coder at attn_z in a model that norms what attention adds.
    """
    writes, reads = _ends(lm, upstream, downstream)
    chosen = range(upstream.d_sae) if features is None else [check_feature(f, upstream.d_sae) for f in features]
    return (_arriving(lm, upstream.W_dec[list(chosen)], writes, reads) @ downstream.W_enc.to(lm.device)).cpu()


@as_annotated
@torch.no_grad()
def norm_scale(lm: LM, site: Site | str, prompts: Prompts) -> Float[Tensor, "batch pos"]:
    """``norm_scale(lm, "mlp_in-8", prompts)``: the divisor of the norm before the MLP, √(mean square + ε); of the
    centred stream if the norm centres.

    site: at ``mlp_in``. Raises ValueError for another site.
    """
    site = Site.of(site)
    norm, before = _norm(lm, site)
    return _scale(norm, lm.run(lm.tokenize(prompts), [before], logits=False)[0][before])


@as_annotated
@torch.no_grad()
def check_edges(
    lm: LM, upstream: SparseCoder, downstream: SparseCoder, feature: int, prompts: Prompts,
    features: Sequence[int] | None = None,
) -> EdgeCheck:  # fmt: skip
    """``check_edges(lm, transcoder_8, transcoder_10, 1571, prompts)``: compare edges with the model when one upstream
    feature's f·W_dec is subtracted wherever it fires.

    features: downstream ones; None: the 32 with the largest |edge| times the norm of their decoder rows.

    Raises ValueError as ``invariant_edges``, and for a feature that fires at no token of the prompts (position 0 and
    the tokens that the mask leaves out do not count).
    """
    writes, reads = _ends(lm, upstream, downstream)
    feature, batch = check_feature(feature, upstream.d_sae), lm.tokenize(prompts)
    edge = invariant_edges(lm, upstream, downstream, [feature])[0]
    sizes = edge.abs() * downstream.W_dec.norm(dim=1).cpu()  # independent of the unit of downstream codes
    chosen = sizes.topk(min(LISTED, len(edge))).indices.tolist() if features is None else list(features)
    chosen = [check_feature(f, downstream.d_sae) for f in chosen]
    before = _norm(lm, reads)[1] if reads.kind == "mlp_in" else reads
    between = _between(lm, writes, before)
    site = upstream.reads[0]
    base = lm.run(batch, [site, before, reads, *between], logits=False)[0]
    keep = kept(lm, [upstream], (batch, {site: base[site]}))
    f = upstream.encode(base[site])[..., feature] * keep.to(base[site].device)
    if not bool((f > 0).any()):
        raise ValueError(f"feature {feature} fires at no token of these prompts: give some where it does")
    removed = f.unsqueeze(-1) * upstream.W_dec[feature]
    take_out = Write(writes, lambda x, tokens: x - removed.to(x))
    held = [Write(s, lambda x, tokens, kept=base[s]: kept.to(x)) for s in between]
    free = lm.run(batch, [reads], [take_out], logits=False)[0][reads]
    fixed = lm.run(batch, [before], [take_out, *held], logits=False)[0][before]
    scale = torch.ones_like(f)
    if reads.kind == "mlp_in":
        norm = _norm(lm, reads)[0]
        scale = _scale(norm, base[before])
        shift = passes.called(norm, torch.zeros(1, fixed.shape[-1]))[0].to(fixed)  # the norm's bias
        normed = passes.called(norm, fixed.flatten(0, 1)).to(fixed).unflatten(0, fixed.shape[:2]) - shift
        fixed = normed * (_scale(norm, fixed) / scale).unsqueeze(-1) + shift
    places, W_enc = f > 0, downstream.W_enc[:, chosen].to(f)
    frozen, moved = (((x - base[reads])[places] @ W_enc).cpu().numpy() for x in (fixed, free))
    predicted = -(f / scale)[places].unsqueeze(-1).cpu() * edge[chosen]
    pre = downstream(base[reads][places].to(downstream.W_dec.device)).pre[:, chosen].cpu().numpy()
    return EdgeCheck(predicted.numpy(), frozen, moved, pre, feature, chosen, (Names(upstream), Names(downstream)))


def _ends(lm: LM, upstream: SparseCoder, downstream: SparseCoder) -> tuple[Site, Site]:
    """(the site that the upstream coder writes, the site that the downstream one reads), checked."""
    require_here(lm, "an edge, which is made of the model's weights,")
    for coder, name in ((upstream, "the upstream coder"), (downstream, "the downstream coder")):
        if len(coder.reads) != 1 or len(coder.writes) != 1:
            raise ValueError(f"{name} must read one site and write one, got {coder.reads} and {coder.writes}")
        require_linear(coder, "an edge", name)
    writes, reads = upstream.writes[0], downstream.reads[0]
    if writes.kind not in (*STREAM, "attn_z"):
        raise ValueError(f"the upstream coder must write to the residual stream or at attn_z, this one is at {writes}")
    if reads.kind not in ("resid_pre", "resid_mid", "resid_post", "mlp_in"):
        raise ValueError(f"the downstream coder must read the residual stream or mlp_in, this one reads {reads}")
    for site in (writes, reads):
        lm.width(site)  # ValueError if the model has no such site
    if lm._sites.when(writes) >= lm._sites.when(reads) or writes == reads:
        raise ValueError(f"the upstream coder must write before the downstream one reads: {writes} is after {reads}")
    return writes, reads


def _arriving(lm: LM, directions: Tensor, writes: Site, reads: Site) -> Float[Tensor, "n d"]:
    """Directions mapped to the site that the downstream coder reads, without the norm's division."""
    x = directions.float().cpu()
    if writes.kind == "attn_z":
        block = lm._sites.layers[writes.layer or 0]
        if block.after_attention is not None or block.w_o_factor is None:
            raise ValueError("this model norms what attention adds: take a coder at attn_out in place of attn_z")
        whole = Site("attn_z", writes.layer)
        w_o = block.w_o, lm.width(whole), lm._sites.place(writes).columns
        x = block.w_o_factor * passes.before_head(lm._module, x, w_o, [])
    x = passes.past(_norm(lm, reads)[0], x) if reads.kind == "mlp_in" else x
    return x.to(lm.device)


def _norm(lm: LM, site: Site) -> tuple[Any, Site]:
    """(the norm before an MLP, the site of the norm's input)."""
    if site.kind != "mlp_in":
        raise ValueError(f"norm_scale needs a site at mlp_in, got {site}")
    before = Site("resid_mid", site.layer)
    lm.width(before)  # ValueError if the model has no such site
    path = lm._sites.layers[site.layer or 0].before_mlp
    if path is None:
        raise ValueError(f"this model has no norm before its MLP: set the coder to read {before}")
    return lm._sites.modules[path], before


def _scale(norm: Any, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos"]:
    return norm_divisor(norm, x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _between(lm: LM, writes: Site, reads: Site) -> list[Site]:
    """The sites at which attention and MLPs add to the stream between the two sites."""
    start, end = lm._sites.when(writes), lm._sites.when(reads)
    layers = range(0 if writes.layer is None else writes.layer, (reads.layer or 0) + 1)
    sites = [Site(kind, layer) for layer in layers for kind in ("attn_out", "mlp_out")]
    own = [Site("attn_out", writes.layer)] if writes.kind == "attn_z" else []  # attn_z is written through this site
    return [s for s in sites if start < lm._sites.when(s) < end and s not in own and s != writes]
