"""Bits per token: what a coder's codes and its residual cost at a fixed distortion."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.activations.store import Rows, Store
from sae_lab.arguments import as_annotated
from sae_lab.evals.choosing import _evenly, _name
from sae_lab.results import Figure, Result, number
from sae_lab.saes import kernels
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import jackknife
from sae_lab.types import Codes

FOLDS = 10  # of documents, for the jackknife
_CHUNK = 2048

# --------------------------------------------------------------- rows, codes and errors, for the evals of codes


class Sample(NamedTuple):
    """Rows that an eval is measured on. number: their place in what they were taken from; documents: clusters of rows
    that are not independent (a plain tensor's rows each stand alone); tokens: ids, where they are known."""

    x: Tensor
    number: Int[Tensor, " rows"]
    documents: Int[Tensor, " rows"]
    tokens: Int[Tensor, " rows"] | None = None

    @property
    def folds(self) -> Int[Tensor, " rows"]:
        """Which of at most ten groups of documents each row is in."""
        return self.documents.unique(return_inverse=True)[1] % FOLDS


def sample(x: Tensor | Store, tokens: int, coder: SparseCoder) -> Sample:
    """At most so many rows, evenly over a tensor, or over the rows of a store that no batch held.

    ValueError for fewer than two rows, for NaN, and where the coder would be measured in training mode.
    """
    if coder.training:
        raise ValueError(f"this eval needs coders in eval mode, got {_name(coder)} in training: call sae.eval()")
    if not isinstance(tokens, int) or tokens < 2:
        raise ValueError(f"tokens must be an integer of at least 2, got {tokens!r}")
    if isinstance(x, Tensor):
        where = _evenly(len(x), min(tokens, len(x)))
        found = Sample(Rows(x).x[where].float().cpu(), where, where)
    else:
        store = x if x.reads else x.at(coder.site)
        unseen = store._split[1]
        every = len(unseen) if len(unseen) else len(store)
        where = _evenly(every, min(tokens, every)).numpy()
        where = unseen[where] if len(unseen) else where
        rows = torch.cat([store._acts(part, store.reads) for part in np.array_split(where, 1 + len(where) // 8192)])
        found = Sample(rows, torch.from_numpy(where), store.rows(where, "document"), store.rows(where, "token"))
    if len(found.x) < 2:
        raise ValueError(f"x must have at least 2 rows, got {len(found.x)}")
    if not bool(found.x.isfinite().all()):
        raise ValueError("x holds NaN or Inf: activations must be finite")
    return found


@torch.no_grad()
def run_coder(coder: SparseCoder, rows: Sample) -> tuple[Codes, Tensor]:
    """(codes that are not 0, as ``SparseCoder.strengths``; x_hat) of all rows, on the CPU."""
    device = coder.W_dec.device
    tokens = [None] * len(rows.x) if rows.tokens is None else rows.tokens.split(_CHUNK)
    parts, x_hats = [], []
    for x, ids in zip(rows.x.split(_CHUNK), tokens, strict=False):
        out = coder(x.to(device), None if ids is None else ids.to(device))
        parts.append(coder.strengths(_nonzero(out.codes), x.to(device)))
        x_hats.append(out.x_hat.cpu())
    counts = torch.cat([torch.zeros(1, dtype=torch.long), *(p.offsets.diff().cpu() for p in parts)])
    values, features = (torch.cat([getattr(p, name).cpu() for p in parts]) for name in ("values", "features"))
    return Codes(values, features, counts.cumsum(0), coder.d_sae), torch.cat(x_hats)


def _nonzero(codes: Codes | Tensor) -> Codes:
    if isinstance(codes, Tensor):
        codes = kernels.where(codes, codes != 0)
    on = codes.values != 0
    before = torch.cat([on.new_zeros(1, dtype=torch.long), on.long().cumsum(0)])
    return Codes(codes.values[on], codes.features[on], before[codes.offsets], codes.d_sae)


def by_content(codes: Codes) -> Int[Tensor, " d_sae"]:
    """The features in the order of how much they write in all, the most first. What is drawn in this order does not
    depend on the features' numbers."""
    total = torch.zeros(codes.d_sae, dtype=torch.float64).index_add(0, codes.features, codes.values.double().abs())
    return total.argsort(descending=True, stable=True)


# --------------------------------------------------------------------------------------------- description length


class Bits(NamedTuple):
    """Bits per token of one coder. which: the active features; values: their sizes; residual: what is left."""

    which: float
    values: float
    residual: float

    @property
    def total(self) -> float:
        return self.which + self.values + self.residual


@dataclass(frozen=True, repr=False)
class DescriptionLength(Result):
    """Result of ``sl.evals.description_length``: one entry per coder, in the order given.

    Attributes:
        names: family and settings; ``d_sae``, ``l0``, ``fvu``: width, active features a row, variance unexplained.
        which, values, residual: bits per token of the active set, of their sizes, and of the residual; ``bits``: their
            sum, ``bits_se`` its standard error (jackknife over groups of documents).
        precision: distortion that each value was coded at, in squared units of x.
        behind: bits more than the preferred coder's, ``behind_se`` the standard error of that difference.
        dense: bits per token of the raw activations without a coder, the control; PCA of any rank costs the same.
        rho, rows, documents: distortion over variance; what it was measured on.
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
        """Which coder costs least."""
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
                   "low", 1),
            Figure("L0 preferred", self.l0[i], meaning="of the shortest description", digits=2),
        ]  # fmt: skip

    def to_pandas(self):
        """One row a coder."""
        import pandas as pd

        columns = ("d_sae", "l0", "fvu", "which", "values", "residual", "bits", "bits_se", "precision", "behind",
                   "behind_se")  # fmt: skip
        return pd.DataFrame({"name": self.names} | {c: getattr(self, c) for c in columns} | {"dense": self.dense})

    def _rows(self) -> list[tuple[str, ...]]:
        head = ("", "L0", "FVU", "which", "values", "residual", "bits/token", "more than least", "")
        body = [
            (self.names[i], f"{self.l0[i]:.2f}", f"{self.fvu[i]:.3f}", f"{self.which[i]:.1f}", f"{self.values[i]:.1f}",
             f"{self.residual[i]:.1f}", f"{self.bits[i]:.1f} ± {number(self.bits_se[i], 1)}",
             f"{self.behind[i]:.1f} ± {number(self.behind_se[i], 1)}", "< least" * (i == self.best_index))
            for i in range(len(self.names))
        ]  # fmt: skip
        dense = ("dense code of x", "", "", "", "", f"{self.dense:.1f}", f"{self.dense:.1f}", "", "")
        return [head, *body, dense]

    def _footer(self) -> str:
        text = f"distortion {self.rho:g} of the variance; {self.rows:,} rows, {self.documents:,} documents"
        if self.bits[self.best_index] >= self.dense * (1 - 1e-6):
            text += "; no coder is shorter than the dense code"
        return text + ("; the least stands at an end of the L0s tried: train beyond it" if self.at_edge else "")


class _Sums(NamedTuple):
    """What the bits are made of; sums over rows, so that those without a fold are a difference."""

    rows: Tensor
    counts: Tensor
    sums: Tensor
    squares: Tensor
    e: Tensor
    ee: Tensor

    def less(self, other: "_Sums") -> "_Sums":
        return _Sums(*(a - b for a, b in zip(self, other, strict=True)))


@as_annotated
@torch.no_grad()
def description_length(
    coders: SparseCoder | Iterable[SparseCoder], x: Tensor | Store, *, rho: float = 0.1, tokens: int = 16_384
) -> DescriptionLength:
    """Choose k and width by bits per token: which features, their values, and the residual, at a fixed distortion.

        which    = Σᵢ H(πᵢ),                        H(p) = −p·log₂p − (1−p)·log₂(1−p)
        values   = Σᵢ πᵢ·max(0, ½·log₂(σᵢ²/v))
        residual = R(cov(x − x̂) + Σᵢ πᵢ·min(σᵢ², v)·dᵢdᵢᵀ; D),  R(C; D) = Σⱼ max(0, ½·log₂(λⱼ/θ)), Σⱼ min(λⱼ, θ) = D

    Feature i fires in a share πᵢ of rows, where its value (``SparseCoder.strengths``: in units of x, dᵢ the unit
    decoder row) has variance σᵢ². A value sent at distortion v leaves an error of min(σᵢ², v), which is part of the
    residual; v is the power of √2 (times D/d) that makes the sum least. D = rho·E‖x − x̄‖². λ: eigenvalues of C. Every
    number costs what it would if it were Gaussian (reverse water-filling), an upper bound; probabilities, means,
    variances and the dictionary are known to both sides and not charged, which favours wide coders.

    Controls: ``dense``, R(cov(x); D), is what a coder of all zeros costs, and PCA of any rank with dense codes. A coder
    whose codes are as dense as x pays for its values as often as it fires.

    After Ayonrinde, Pearce & Sharkey 2024 (arXiv:2410.11179). They quantise codes and compare coders of about equal
    reconstruction; here the residual is paid for, so that coders of any L0 and width compare.

    Args:
        coders: one or several in eval mode, that reconstruct what they read. x: activations ``rows d_in`` (used evenly
            over their length), or a Store (of which the rows that no batch held).
        rho: distortion over variance, as FVU; a coder whose FVU is below it has little residual to pay for.
        tokens: how many rows N at most. Bits of few rows are too low: by about d²/3N for the covariance alone.

    Raises ValueError for a rho outside 0 to 1, for coders that transcode or read other widths, and for constant x.
    """
    coders = [coders] if isinstance(coders, SparseCoder) else list(coders)
    _check(coders, rho)
    rows = sample(x, tokens, coders[0])
    flat = rows.x.flatten(1)
    folds = rows.folds
    groups = folds.unique().tolist()
    none = Codes(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(len(flat) + 1, dtype=torch.long), 1)
    raw = _sums(none, flat - flat.mean(0), folds)
    variance = float(_covariance(raw[-1]).trace())
    if variance <= 0:
        raise ValueError("x has no variance: all its rows are equal")
    total = rho * variance
    measured, without = [], []
    for coder in coders:
        codes, x_hat = run_coder(coder, rows)
        error = flat - x_hat.flatten(1)
        parts = _sums(codes, error, folds)
        unit = coder.directions().cpu()
        steps = total / flat.shape[1] * 2.0 ** torch.arange(0, 2 * math.log2(flat.shape[1]) + 2).div(2)
        tried = [(bits_at(parts[-1], unit, total, float(v)), float(v)) for v in steps]
        best, v = min(tried, key=lambda one: one[0].total)
        measured.append(
            (coder, len(codes.values) / len(flat), float(error.pow(2).sum()) / len(flat) / variance, best, v)
        )
        left = [bits_at(parts[-1].less(parts[g]), unit, rho * _trace_without(raw, g), v).total for g in groups]
        without.append(left if len(groups) > 1 else [best.total])
    least = min(range(len(coders)), key=lambda i: measured[i][3].total)
    _, l0, fvu, bits, precision = zip(*measured, strict=True)
    return DescriptionLength(
        names=tuple(_name(c) for c in coders),
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
        dense=gaussian_bits(torch.linalg.eigvalsh(_covariance(raw[-1])), total),
        rho=rho,
        rows=len(flat),
        documents=len(rows.documents.unique()),
        coders=tuple(coders),
    )


def _check(coders: list[SparseCoder], rho: float) -> None:
    if not 0 < rho < 1:
        raise ValueError(f"rho, the distortion over the variance, must be above 0 and below 1, got {rho}")
    if not coders:
        raise ValueError("no coder given: pass at least one")
    for coder in coders:
        if coder.training:
            raise ValueError(f"this eval needs coders in eval mode, got {_name(coder)} in training: call sae.eval()")
        if coder.transcodes:
            raise ValueError(
                f"description_length needs coders that reconstruct what they read, {_name(coder)} does not"
            )
    if len({c.in_shape for c in coders}) > 1:
        raise ValueError(f"coders must read one width, got {sorted({c.in_shape for c in coders})}")


def _sums(codes: Codes, error: Tensor, folds: Tensor) -> dict[int, _Sums]:
    """The sums of every fold, and of all rows at -1."""
    place = folds[codes.rows]
    out = {}
    for g in folds.unique().tolist():
        on, here = place == g, error[folds == g]
        values, features = codes.values[on].double(), codes.features[on]
        zeros = torch.zeros(codes.d_sae, dtype=torch.float64)
        out[g] = _Sums(
            torch.tensor(float(len(here)), dtype=torch.float64),
            torch.bincount(features, minlength=codes.d_sae).double(),
            zeros.index_add(0, features, values),
            zeros.index_add(0, features, values**2),
            here.sum(0, dtype=torch.float64),
            (here.T @ here).double(),
        )
    out[-1] = _Sums(*(torch.stack(column).sum(0) for column in zip(*out.values(), strict=True)))
    return out


def _covariance(sums: _Sums) -> Float[Tensor, "d d"]:
    mean = sums.e / sums.rows
    return sums.ee / sums.rows - mean[:, None] * mean


def _trace_without(raw: dict[int, _Sums], fold: int) -> float:
    return float(_covariance(raw[-1].less(raw[fold])).trace())


def bits_at(sums: _Sums, unit: Tensor, distortion: float, v: float) -> Bits:
    """Bits per token with every value sent at distortion v. unit: the decoder's rows, which the values are along."""
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
    below = ascending.cumsum(0) - ascending  # what the smaller ones leave as error
    level = (distortion - below) / torch.arange(len(ascending), 0, -1)
    theta = level[(level <= ascending).nonzero()[0, 0]]
    return float(0.5 * (ascending / theta).clamp_min(1).log2().sum())
