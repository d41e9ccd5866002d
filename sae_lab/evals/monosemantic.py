"""Similarity of the inputs on which a feature fires: the monosemanticity score."""

from dataclasses import field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sae_lab.activations.store import Store
from sae_lab.arguments import as_annotated, is_finite
from sae_lab.evals.sampling import Sample, encoded, sample
from sae_lab.results import Figure, Result, figure, result
from sae_lab.saes import kernels
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import jackknife
from sae_lab.types import Codes

RANDOM_FEATURES = 512  # random directions in the control


@result
class Monosemanticity(Result):
    """Result of ``sl.evals.monosemanticity``; cosines, from -1 to 1.

    Attributes:
        score_se: jackknife over groups of documents.
        neurons: score of x's coordinates, each as two neurons (its positive and its negative part); ``neurons_raw``:
            of the coordinates scaled from their least to their largest value, as published.
        random: of random directions, each firing on as many rows as a feature, where its projection is largest.
        p_neurons, p_random: of one-sided Mann-Whitney tests that features score above neurons, random directions.
        shuffled: of the features with activations shuffled over rows: the mean cosine of two rows.
        features: number of live features, with at least ``least`` firings.
        per_feature: score of all d_sae features, NaN for one that is not live.
    """

    score: float = figure("monosemanticity", "mean over live features", control="shuffled",
                          control_name="shuffled rows", best="high")  # fmt: skip
    score_se: float
    median: float = figure("median", "of live features", best="high")
    neurons: float
    neurons_raw: float
    p_neurons: float
    random: float
    p_random: float
    shuffled: float
    features: int
    d_sae: int
    rows: int
    documents: int
    least: int
    embedding: str
    per_feature: Float[Tensor, " d_sae"] = field(repr=False, compare=False)

    def figures(self) -> list[Figure]:
        return [
            *super().figures(),
            Figure("less neurons", self.score - self.neurons, control=self.neurons, control_name="neurons", best="high",
                   meaning=f"coordinates of x, both signs; p = {self.p_neurons:.2g}", key="neurons"),
            Figure("less random", self.score - self.random, control=self.random, control_name="random directions",
                   meaning=f"as sparse as features; p = {self.p_random:.2g}", best="high", key="random"),
        ]  # fmt: skip

    _below = (
        "{features:,} of {d_sae:,} features fire on at least {least} of {rows:,} rows ({documents:,} documents); "
        "E: {embedding}; raw neurons {neurons_raw:.3f}"
    )


@as_annotated
@torch.no_grad()
def monosemanticity(
    coder: SparseCoder, x: Tensor | Store, embeddings: Float[Tensor, "rows e"] | Store | None = None, *,
    tokens: int = 16_384, least: int = 10, seed: int = 0,
) -> Monosemanticity:  # fmt: skip
    """``sl.evals.monosemanticity(sae, store)``: cosine of two inputs' embeddings, weighted by a feature's activations.

        MS_k = Σ_{i<j} a_ik·a_jk·cos(E_i, E_j) / Σ_{i<j} a_ik·a_jk
             = (‖Σᵢ a_ik·Eᵢ‖² − Σᵢ a_ik²) / ((Σᵢ a_ik)² − Σᵢ a_ik²)        (unit Eᵢ: linear in the rows)

    a: a feature's activations, rescaled from their range over these rows to 0..1. E: the mean over rows is subtracted,
    and rows have unit norm. 1: all inputs are identical; 0: no more alike than two random inputs.

    The score rises with sparsity alone, and with E = x the rows of any direction's largest projections are alike:
    compare with ``random``, directions of equal sparsity. Another E (another layer's activations, a model's embeddings
    of the same inputs) tests similarity by data that the coder has not seen.

    Pach et al. 2025 (arXiv:2504.02821), on images; there E is an image encoder's, not centred.

    Args:
        x: activations ``rows d_in`` (spread evenly), or a Store (its rows that no training batch held).
        embeddings: ``rows e`` of the same rows, or a Store of the same tokens (``store.at(another_site)``); None: x.
        tokens: how many rows at most. least: firings that make a feature live, at least 2.

    Raises ValueError for embeddings of other rows, and if no feature is live.
    """
    if least < 2:
        raise ValueError(f"least must be at least 2 (a score is of pairs), got {least}")
    rows = sample(x, tokens, coder)
    E, name = _embeddings(x, embeddings, rows)
    E = unit(E)
    codes = _scaled(encoded(coder, rows)[0])
    fired = torch.bincount(codes.features, minlength=codes.d_sae)
    score = torch.where(fired >= least, scores(codes, E), torch.nan)
    live = score.isfinite()
    if not bool(live.any()):
        of = f"{least} of these {len(rows.x)} rows" + (" and varies" if bool((fired >= least).any()) else "")
        raise ValueError(f"no feature fires on {of}: give more tokens, or lower least")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(E), generator=generator)
    flat = rows.x.flatten(1)
    neurons = scores(_both_signs(flat), E)
    random = scores(_random_directions(flat, fired[live], generator), E)
    own = score[live]
    parts, folds = _sums(codes, E), rows.folds  # without a group of documents: a difference of sums
    without = (
        _score(*(whole - part for whole, part in zip(parts, _sums(codes, E, (folds == g).numpy()), strict=True)))
        for g in folds.unique()
    )
    return Monosemanticity(
        score=float(own.mean()),
        score_se=jackknife(float(score[live].nanmean()) for score in without),
        median=float(own.median()),
        neurons=float(neurons.nanmean()),
        neurons_raw=float(_dense_scores(flat, E).nanmean()),
        p_neurons=_p_above(own, neurons),
        random=float(random.nanmean()),
        p_random=_p_above(own, random),
        shuffled=float(scores(codes, E[order])[live].nanmean()),
        features=int(live.sum()),
        d_sae=codes.d_sae,
        rows=len(E),
        documents=len(rows.documents.unique()),
        least=least,
        embedding=name,
        per_feature=score.float(),
    )


def _embeddings(x: Tensor | Store, embeddings: Tensor | Store | None, rows: Sample) -> tuple[Tensor, str]:
    """(the embedding of each sampled row, the embedding's name)."""
    if embeddings is None:
        return rows.x.flatten(1), "x itself"
    if len(embeddings) != len(x):
        raise ValueError(f"embeddings must be of the same rows as x: got {len(embeddings)} for {len(x)} rows of x")
    if isinstance(embeddings, Tensor):
        return embeddings.detach()[rows.number.to(embeddings.device)].float().cpu(), "the embeddings given"
    if rows.tokens is None or not torch.equal(embeddings.rows(rows.number.numpy(), "token"), rows.tokens):
        raise ValueError("embeddings must be a store of the same tokens as x: harvest both sites in one store")
    found = embeddings.rows(rows.number.numpy(), embeddings.site.key)
    if not is_finite(found):
        raise ValueError("embeddings hold NaN or Inf: they must be finite")
    return found, repr(embeddings.site)


def unit(E: Float[Tensor, "rows e"]) -> Float[Tensor, "rows e"]:
    """E minus its mean, with rows scaled to unit norm."""
    return normalize(E - E.mean(0), dim=1)


def _scaled(codes: Codes) -> Codes:
    """Activations with each feature's range rescaled to 0..1; negative codes count as 0. The least value of a feature
    that is off in some row is 0."""
    values, rows = codes.values.double().clamp_min(0), len(codes.offsets) - 1
    most = torch.zeros(codes.d_sae, dtype=torch.float64).scatter_reduce(0, codes.features, values, "amax")
    least = torch.full_like(most, torch.inf).scatter_reduce(0, codes.features, values, "amin")
    least[torch.bincount(codes.features, minlength=codes.d_sae) < rows] = 0
    span = (most - least).clamp_min(torch.finfo(torch.float64).tiny)
    return codes._replace(values=(values - least[codes.features]) / span[codes.features])


def scores(codes: Codes, E: Float[Tensor, "rows e"]) -> Float[Tensor, " d_sae"]:
    """The score of every feature for weights a = codes and unit rows E; NaN where a feature has no pair of rows."""
    return _score(*_sums(codes, E))


def _sums(codes: Codes, E: Tensor, only: Any = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ a·E, Σ a, Σ a²) of every feature, in double precision, over ``only`` these rows."""
    a = kernels.feature_rows(codes._replace(values=codes.values.double()))[:, only]
    sums = (a @ normalize(E[only].double(), dim=1).numpy(), a.sum(1), a.multiply(a).sum(1))
    vectors, ones, squares = (torch.from_numpy(np.asarray(part)) for part in sums)
    return vectors, ones.flatten(), squares.flatten()


def _score(vectors: Tensor, a: Tensor, squares: Tensor) -> Tensor:
    pairs = a**2 - squares
    score = (vectors.pow(2).sum(1) - squares) / pairs
    return torch.where(pairs > 1e-9 * a**2, score, torch.nan)


def _dense_scores(x: Tensor, E: Tensor) -> Tensor:
    """The scores of x's coordinates, each rescaled from its range to 0..1."""
    least, most = x.amin(0), x.amax(0)
    a = (x - least).double() / (most - least).clamp_min(1e-30).double()
    return _score(a.T @ normalize(E.double(), dim=1), a.sum(0), a.pow(2).sum(0))


def _both_signs(x: Tensor) -> Codes:
    """The positive and the negative parts of x's coordinates as codes: twice as many features."""
    parts = torch.cat([x.relu(), (-x).relu()], dim=1)
    return _scaled(kernels.above(parts, 0.0))


def _random_directions(x: Tensor, fired: Tensor, generator: torch.Generator) -> Codes:
    """Codes of random directions: each fires on as many rows as a feature, by its excess over a threshold."""
    drawn = torch.randperm(len(fired), generator=generator)[:RANDOM_FEATURES]
    chosen = fired.sort().values[drawn]  # whatever the order of features
    directions = normalize(torch.randn(x.shape[1], len(chosen), generator=generator), dim=0)
    rows, values, features = [], [], []
    centred = x - x.mean(0)
    for i, (direction, n) in enumerate(zip(directions.T, chosen.tolist(), strict=True)):
        top, where = (centred @ direction).topk(min(n + 1, len(x)))
        rows.append(where[:n])
        values.append(top[:n] - top[-1])
        features.append(torch.full((min(n, len(x)),), i))
    row, feature, value = torch.cat(rows), torch.cat(features), torch.cat(values)
    order = row.sort(stable=True).indices
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(row, minlength=len(x)).cumsum(0)])
    return _scaled(Codes(value[order], feature[order], offsets, len(chosen)))


def _p_above(own: Tensor, control: Tensor) -> float:
    from scipy.stats import mannwhitneyu

    control = control[control.isfinite()]
    return float(mannwhitneyu(own.numpy(), control.numpy(), alternative="greater").pvalue) if len(control) else 1.0
