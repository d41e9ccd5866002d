"""Bits per token: the description length of a coder's codes and residual at a fixed distortion."""

import math
from collections.abc import Iterable
from dataclasses import field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.activations.store import Store
from sae_lab.arguments import as_annotated
from sae_lab.evals.sampling import encoded, named, require, sample, summed, without_each
from sae_lab.results import Figure, Result, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import jackknife
from sae_lab.types import Codes


class Bits(NamedTuple):
    """Bits per token of one coder. which: the active features; values: their strengths; residual: x − x_hat."""

    which: float
    values: float
    residual: float

    @property
    def total(self) -> float:
        return self.which + self.values + self.residual


@result
class DescriptionLength(Result):
    """Result of ``sl.evals.description_length``: one entry per coder, in the order given; bits are per token.

    Attributes:
        which, values, residual: bits of the active set, of the values, and of the residual; ``bits``: their sum,
            ``bits_se`` its standard error (jackknife over groups of documents).
        precision: distortion of each coded value, in squared units of x.
        behind, behind_se: bits beyond those of the coder with the fewest, and the standard error of that difference.
        dense: bits of the raw activations without a coder, the control; PCA of any rank costs the same.
    """

    names: tuple[str, ...]
    d_sae: tuple[int, ...]
    l0: tuple[float, ...]
    fvu: tuple[float, ...]
    which: tuple[float, ...]
    values: tuple[float, ...]
    residual: tuple[float, ...]
    bits: tuple[float, ...]
    bits_se: tuple[float, ...]
    precision: tuple[float, ...]
    behind: tuple[float, ...]
    behind_se: tuple[float, ...]
    dense: float
    rho: float
    rows: int
    documents: int
    coders: tuple[SparseCoder, ...] = field(repr=False, compare=False)

    @property
    def best_index(self) -> int:
        """The index of the coder with the fewest bits."""
        return int(np.argmin(self.bits))

    @property
    def best(self) -> SparseCoder:
        """The coder whose description is shortest."""
        return self.coders[self.best_index]

    @property
    def at_edge(self) -> bool:
        """Whether, among coders of the preferred one's width, it has the least or the largest L0 tried."""
        l0 = [v for v, width in zip(self.l0, self.d_sae, strict=True) if width == self.best.d_sae]
        return len(self.names) > 1 and self.l0[self.best_index] in (min(l0), max(l0))

    def figures(self) -> list[Figure]:
        i = self.best_index
        return [
            Figure("bits per token", self.bits[i], self.bits_se[i], self.dense, "dense code of x", self.names[i],
                   "low", 1, "bits"),
            Figure("L0 preferred", self.l0[i], meaning="of the shortest description", digits=2, key="l0"),
        ]  # fmt: skip

    _records = ("name=names", "d_sae", "l0", "fvu", "which", "values", "residual", "bits", "bits_se", "precision",
                "behind", "behind_se", "dense")  # fmt: skip
    _columns = {  # noqa: RUF012
        "coder": "{name}", "L0": "{l0:.2f}", "FVU": "{fvu:.3f}", "which": "{which:.1f}", "values": "{values:.1f}",
        "residual": "{residual:.1f}", "bits/token": "{bits:.1f} ± {bits_se:.1f}",
        "more than least": "{behind:.1f} ± {behind_se:.1f}", "": "{mark}",
    }  # fmt: skip
    _mark = "< least"
    _below = (
        "dense code of x: {dense:.1f} bits/token; distortion {rho:g} of the variance; {rows:,} rows, {documents:,} "
        "documents{_remark}"
    )

    @property
    def _remark(self) -> str:
        text = "; no coder is shorter than the dense code"
        text *= self.bits[self.best_index] >= self.dense * (1 - 1e-6)
        return text + "; the least stands at an end of the L0s tried: train beyond it" * self.at_edge


class _Sums(NamedTuple):
    """The sums over rows from which bits are computed."""

    rows: Tensor
    counts: Tensor
    sums: Tensor
    squares: Tensor
    e: Tensor
    ee: Tensor


@as_annotated
@torch.no_grad()
def description_length(
    coders: SparseCoder | Iterable[SparseCoder], x: Tensor | Store, *, rho: float = 0.1, tokens: int = 16_384
) -> DescriptionLength:
    """``sl.evals.description_length(coders, store)``: bits per token of codes and residual, to choose k and width.

        which    = Σᵢ H(πᵢ),                        H(p) = −p·log₂p − (1−p)·log₂(1−p)
        values   = Σᵢ πᵢ·max(0, ½·log₂(σᵢ²/v))
        residual = R(cov(x − x̂) + Σᵢ πᵢ·min(σᵢ², v)·dᵢdᵢᵀ; D),  R(C; D) = Σⱼ max(0, ½·log₂(λⱼ/θ)), Σⱼ min(λⱼ, θ) = D

    Feature i fires in a share πᵢ of rows, where its value (``SparseCoder.strengths``: in units of x, dᵢ the unit
    decoder row) has variance σᵢ². A value sent at distortion v leaves an error of min(σᵢ², v), which is part of the
    residual; v is the power of √2 (times D/d) that minimises the sum. D = rho·E‖x − x̄‖². λ: eigenvalues of C. Every
    number costs the bits of a Gaussian of its variance (reverse water-filling), an upper bound. Probabilities, means,
    variances and the dictionary are free, which favours wide coders.

    Control: ``dense``, R(cov(x); D): the bits of a coder of all zeros, and of PCA of any rank with dense codes.

    After Ayonrinde, Pearce & Sharkey 2024 (arXiv:2410.11179). They quantise codes and compare coders of about equal
    reconstruction; here the residual counts too, so that coders of any L0 and width compare.

    Args:
        coders: one or several in eval mode, that reconstruct what they read. x: activations ``rows d_in`` (evenly
            spread over them), or a Store (its rows that no training batch held).
        rho: distortion over variance, as FVU; a coder whose FVU is below it has little residual to pay for.
        tokens: how many rows N at most. Bits of few rows are too low: by about d²/3N for the covariance alone.

    Raises ValueError for a rho outside 0 to 1, for coders that transcode or read other widths, and for constant x.
    """
    coders = [coders] if isinstance(coders, SparseCoder) else list(coders)
    if not 0 < rho < 1:
        raise ValueError(f"rho, the distortion over the variance, must be above 0 and below 1, got {rho}")
    if not coders:
        raise ValueError("no coder given: pass at least one")
    require(*coders, reconstructs="description_length")
    if len({c.in_shape for c in coders}) > 1:
        raise ValueError(f"coders must read one width, got {sorted({c.in_shape for c in coders})}")
    rows = sample(x, tokens, coders[0])
    flat = rows.x.flatten(1)
    none = Codes(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(len(flat) + 1, dtype=torch.long), 1)
    raw, each_raw = _sums(none, flat - flat.mean(0), rows.folds)
    variance = float(_covariance(raw).trace())
    if variance <= 0:
        raise ValueError("x has no variance: all its rows are equal")
    total = rho * variance
    steps = (total / flat.shape[1] * 2.0 ** torch.arange(0, 2 * math.log2(flat.shape[1]) + 2).div(2)).tolist()
    totals = [rho * float(_covariance(left).trace()) for left in each_raw]
    measured, without = [], []
    for coder in coders:
        codes, x_hat = encoded(coder, rows)
        error = flat - x_hat.flatten(1)
        sums, each = _sums(codes, error, rows.folds)
        unit = coder.directions().cpu()
        best, v = min(((bits_at(sums, unit, total, v), v) for v in steps), key=lambda one: one[0].total)
        measured.append((len(codes.values) / len(flat), float(error.pow(2).sum()) / len(flat) / variance, best, v))
        without.append([bits_at(left, unit, of, v).total for left, of in zip(each, totals, strict=True)])
    least = min(range(len(coders)), key=lambda i: measured[i][2].total)
    l0, fvu, bits, precision = zip(*measured, strict=True)
    return DescriptionLength(
        names=tuple(named(c) for c in coders),
        d_sae=tuple(c.d_sae for c in coders),
        l0=l0,
        fvu=fvu,
        which=tuple(b.which for b in bits),
        values=tuple(b.values for b in bits),
        residual=tuple(b.residual for b in bits),
        bits=tuple(b.total for b in bits),
        bits_se=tuple(map(jackknife, without)),
        precision=precision,
        behind=tuple(b.total - bits[least].total for b in bits),
        behind_se=tuple(jackknife(np.subtract(w, without[least])) for w in without),
        dense=gaussian_bits(torch.linalg.eigvalsh(_covariance(raw)), total),
        rho=rho,
        rows=len(flat),
        documents=len(rows.documents.unique()),
        coders=tuple(coders),
    )


def _sums(codes: Codes, error: Tensor, folds: Tensor) -> tuple[_Sums, list[_Sums]]:
    """(the sums over all rows, the sums without each fold; no such sums if there is one fold)."""
    n, place, values = int(folds.max()) + 1, folds[codes.rows] * codes.d_sae + codes.features, codes.values.double()
    counts, sums, squares = (summed(v, place, n, codes.d_sae) for v in (torch.ones_like(values), values, values**2))
    each = [error[folds == g] for g in range(n)]
    e, ee = torch.stack([x.sum(0, dtype=torch.float64) for x in each]), torch.stack([(x.T @ x).double() for x in each])
    folded = _Sums(torch.bincount(folds).double(), counts, sums, squares, e, ee)
    left = [_Sums(*parts) for parts in zip(*map(without_each, folded), strict=True)]
    return _Sums(*(column.sum(0) for column in folded)), left if n > 1 else []


def _covariance(sums: _Sums) -> Float[Tensor, "d d"]:
    mean = sums.e / sums.rows
    return sums.ee / sums.rows - mean[:, None] * mean


def bits_at(sums: _Sums, unit: Tensor, distortion: float, v: float) -> Bits:
    """Bits per token with every value sent at distortion v. unit: the decoder's unit rows."""
    share = sums.counts / sums.rows
    some = sums.counts.clamp_min(1)
    spread = (sums.squares / some - (sums.sums / some) ** 2).clamp_min(0)
    live = share > 0
    noise = (share * spread.clamp_max(v))[live].float()
    rows = unit[live]
    left = _covariance(sums) + ((rows.T * noise) @ rows).double()
    each = 0.5 * (spread[live] / v).clamp_min(1).log2()
    entropy = torch.special.entr(share) + torch.special.entr(1 - share)
    return Bits(
        float(entropy.sum() / math.log(2)),
        float((share[live] * each).sum()),
        gaussian_bits(torch.linalg.eigvalsh(left), distortion),
    )


def gaussian_bits(variances: Float[Tensor, " d"], distortion: float) -> float:
    """Bits for independent Gaussians at a total mean squared error: Σ max(0, ½·log₂(λ/θ)), Σ min(λ, θ) = D."""
    ascending = variances.double().clamp_min(0).sort().values
    if distortion >= float(ascending.sum()):
        return 0.0
    below = ascending.cumsum(0) - ascending  # the error from the smaller variances
    level = (distortion - below) / torch.arange(len(ascending), 0, -1)
    theta = level[(level <= ascending).nonzero()[0, 0]]
    return float(0.5 * (ascending / theta).clamp_min(1).log2().sum())
