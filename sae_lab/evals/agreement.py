"""Whether coders find the same features, across seeds, layers, checkpoints and models; one coder on other data."""

import math
from collections.abc import Sequence
from dataclasses import field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.activations.reconstructing import Reconstruction, reconstruction
from sae_lab.activations.store import Store
from sae_lab.activations.world import World
from sae_lab.arguments import as_annotated
from sae_lab.evals.sampling import Sample, encoded, sample, summed
from sae_lab.feature_index.matching import Match, match
from sae_lab.lm.model import LM
from sae_lab.lm.text import Documents
from sae_lab.results import Figure, Result, counted, figure, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import jackknife
from sae_lab.types import Codes

_MEASURES = ("stability", "shared", "orderedness", "agreement")


@result
class Pair(Result):
    """Agreement of two dictionaries, with features of ``b`` matched one to one with those of ``a``.

    Attributes:
        stability_shuffled: stability of the same pairs in a random order; ``*_random``: of b matched with random rows.
        agreement: mean over the ``compared`` pairs whose features both fire on the rows; NaN without rows.
            agreement_se: jackknife over groups of documents; agreement_shuffled: of shuffled pairs.
        correlations: for every feature of b, NaN where it is not compared. match: the match of decoders.
    """

    a: str
    b: str
    stability: float = figure("stability", "mean cosine of {pairs:,} matched pairs", control="stability_random",
                              control_name="random rows", best="high")  # fmt: skip
    stability_shuffled: float
    stability_random: float
    shared: float = figure("shared", "pairs with a cosine of at least {threshold:g}", control="shared_random",
                           control_name="random rows", best="high")  # fmt: skip
    shared_random: float
    orderedness: float = figure("orderedness", "Spearman of the pairs' row numbers", control="orderedness_random",
                                control_name="random rows")  # fmt: skip
    orderedness_random: float
    agreement: float = figure("agreement", "correlation of activations, {compared:,} pairs of which both fire",
                              control="agreement_shuffled", control_name="shuffled pairs", best="high")  # fmt: skip
    agreement_se: float
    agreement_shuffled: float
    pairs: int
    compared: int
    threshold: float
    correlations: Float[Tensor, " rows_b"] = field(repr=False, compare=False)
    match: Match = field(repr=False, compare=False)

    _below = "{a} and {b}; shuffled pairs: mean cosine {stability_shuffled:.3f}"


@result
class Consistency(Result):
    """Result of ``sl.evals.consistency``: a ``Pair`` for every two coders; ``rows``, ``documents``: numbers of them."""

    names: tuple[str, ...]
    pairs: tuple[Pair, ...]
    rows: int
    documents: int

    @property
    def mean(self) -> dict[str, float]:
        """Mean of each measure over the pairs (of agreement, over pairs that have it)."""
        return {m: _mean([getattr(p, m) for p in self.pairs]) for m in _MEASURES}

    @property
    def neighbours(self) -> float:
        """Mean stability of neighbours in the order of the coders: adjacent layers, or successive checkpoints."""
        beside = set(zip(self.names, self.names[1:], strict=False))
        return _mean([p.stability for p in self.pairs if (p.a, p.b) in beside])

    def figures(self) -> list[Figure]:
        if len(self.pairs) == 1:
            return self.pairs[0].figures()
        meaning, found = f"mean of {counted(len(self.pairs), 'pair')} of coders", []
        for name, value in self.mean.items():
            random, control = ("shuffled pairs", "shuffled") if name == "agreement" else ("random rows", "random")
            against = _mean([getattr(p, f"{name}_{control}") for p in self.pairs])
            found.append(Figure(name, value, math.nan, against, random, meaning, key=name))
        return found

    _records = "pairs"
    _columns = {  # noqa: RUF012
        "": "{a} | {b}", "stability": "{stability:.3f}", "random": "{stability_random:.3f}",
        "shared": "{shared:.3f}", "shared, random": "{shared_random:.3f}", "orderedness": "{orderedness:.3f}",
        "agreement": "{agreement:.3f} ± {agreement_se:.3f}", "shuffled": "{agreement_shuffled:.3f}",
    }  # fmt: skip
    _below = "pairs matched by decoder; shared: cosine of at least {pairs[0].threshold:g}; {_remark}"

    @property
    def _remark(self) -> str:
        given = f"{counted(self.rows, 'row')} of {counted(self.documents, 'document')}"
        return given if self.rows else "no activations given: agreement is undefined"


@as_annotated
@torch.no_grad()
def consistency(
    *coders: SparseCoder | World | Tensor, x: Tensor | Store | Sequence[Tensor | Store] | None = None,
    names: Sequence[str] | None = None, threshold: float = 0.7, live: bool = False, tokens: int = 16_384,
    seed: int = 0,
) -> Consistency:  # fmt: skip
    """``sl.evals.consistency(a, b, x=store)``: whether coders (seeds, layers, checkpoints) share features.

    Features of every two coders are matched one to one so as to maximise the sum of decoder cosines (``sl.match``):
    stability (Stab) is the mean cosine of pairs (Fel et al. 2025, arXiv:2502.12892), orderedness (Ord) Spearman's
    correlation of their row numbers (Wang et al. 2025, arXiv:2512.02194). Agreement compares activations:

        r_ij = corr(f_i(x), g_j(x)) over rows x, for matched i and j that fire at all, averaged over pairs.

    Controls: the match of random rows, and shuffled pairs. Two decoders may agree while their encoders do not.

    Args:
        coders: two or more, in the order of layers or checkpoints if they have one; without x also worlds and tensors
            of directions.
        x: activations that all coders read; or a list, one for each coder, row by row of the same tokens: other layers
            (``store.at(site)``), or another model's activations on the same text. None: decoders only.
        names: of the coders, for the table.
        threshold: cosine of a shared pair. live: leave out features that never fired in training.
        tokens: how many rows at most.

    Raises ValueError for one coder, for widths that differ, and for lists of x whose rows are not the same tokens.
    """
    if len(coders) < 2:
        raise ValueError(f"consistency compares coders: give at least two, got {len(coders)}")
    names = [f"{type(c).__name__} {i}" for i, c in enumerate(coders)] if names is None else list(names)
    if len(names) != len(coders) or len(set(names)) != len(names):
        raise ValueError(f"names must be {len(coders)} different ones, one for each coder, got {names}")
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold is a cosine from -1 to 1, got {threshold}")
    rows, codes = _codes_of(coders, x, tokens) if x is not None else (None, [])
    pairs = []
    for i, j in combinations(range(len(coders)), 2):
        matched = match(coders[i], coders[j], threshold=min(threshold, 0.999), live=live, hungarian=True)
        of = (codes[i], codes[j], rows.folds) if rows else None
        pairs.append(_pair(matched, coders[i], coders[j], (names[i], names[j]), of, threshold, seed))
    read = (len(rows.x), len(rows.documents.unique())) if rows else (0, 0)
    return Consistency(tuple(names), tuple(pairs), *read)


def _codes_of(coders: Sequence[Any], x: Any, tokens: int) -> tuple[Sample, list[Codes]]:
    """(the rows of the first coder, the codes of every coder on the same rows)."""
    for coder in coders:
        if not isinstance(coder, SparseCoder):
            raise ValueError(f"x needs coders that read it, got a {type(coder).__name__}: omit x to match decoders")
    each = [x] * len(coders) if isinstance(x, Tensor | Store) else x
    if len(each) != len(coders):
        raise ValueError(f"x must be one for all {len(coders)} coders, or one for each, got {len(each)}")
    rows = [sample(one, tokens, coder) for one, coder in zip(each, coders, strict=True)]
    for other in rows[1:]:
        same = len(other.x) == len(rows[0].x) and torch.equal(other.number, rows[0].number)
        if same and other.tokens is not None and rows[0].tokens is not None:
            same = torch.equal(other.tokens, rows[0].tokens)
        if not same:
            raise ValueError(
                "x must hold the same tokens for every coder, row by row, and these differ: harvest the sites in one "
                "store and pass [store.at(site), ...]"
            )
    return rows[0], [encoded(coder, of)[0] for coder, of in zip(coders, rows, strict=True)]


def _pair(
    matched: Match, a: Any, b: Any, names: tuple[str, str], codes: tuple[Codes, Codes, Tensor] | None,
    threshold: float, seed: int,
) -> Pair:  # fmt: skip
    """Every measure of one match. codes: of a and of b, and the fold of each row."""
    at_b = (matched.permutation >= 0).nonzero().flatten()
    at_b = at_b[matched.cosines[at_b].argsort(descending=True, stable=True)]  # so that the shuffle depends on the rank
    at_a = matched.permutation[at_b]
    other = _derange(len(at_a), seed)
    rows = (s.dictionary if isinstance(s, World) else s if isinstance(s, Tensor) else s.W_dec for s in (a, b))
    unit_a, unit_b = (torch.nn.functional.normalize(r.detach().float().cpu().flatten(1), dim=1) for r in rows)
    shuffled = (unit_a[at_a[other]] * unit_b[at_b]).sum(1)
    control = matched.control
    assert control is not None
    correlations = torch.full((len(matched.permutation),), math.nan, dtype=torch.float64)
    agreement = error = chance = math.nan
    if codes:
        f, g, folds = codes
        sums = paired_sums(f, g, at_a, at_b, folds)
        correlations[at_b] = correlation(sums.sum(0))
        agreement = float(correlations.nanmean())
        error = jackknife(float(correlation(sums.sum(0) - one).nanmean()) for one in sums)
        chance = float(correlation(paired_sums(f, g, at_a[other], at_b, folds).sum(0)).nanmean())
    return Pair(
        a=names[0],
        b=names[1],
        stability=matched.mcc,
        stability_shuffled=float(shuffled.mean()),
        stability_random=control.mcc,
        shared=float((matched.cosines[at_b] >= threshold).float().mean()),
        shared_random=float((control.cosines[control.permutation >= 0] >= threshold).float().mean()),
        orderedness=matched.orderedness,
        orderedness_random=control.orderedness,
        agreement=agreement,
        agreement_se=error,
        agreement_shuffled=chance,
        pairs=len(at_b),
        compared=int(correlations.isfinite().sum()),
        threshold=threshold,
        correlations=correlations.float(),
        match=matched,
    )


def _derange(n: int, seed: int) -> Tensor:
    """A random permutation of 0..n-1 without a fixed point, if n is above 1."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))  # along one random cycle


def paired_sums(
    a: Codes, b: Codes, at_a: Int[Tensor, " pairs"], at_b: Int[Tensor, " pairs"], folds: Int[Tensor, " rows"]
) -> Float[Tensor, "folds six pairs"]:
    """Σ over each fold's rows of (1, f, g, f², g², f·g), f = a's feature ``at_a[p]`` and g = b's ``at_b[p]``.

    Codes stay sparse: O(active·log active).
    """
    n, groups = len(at_a), int(folds.max()) + 1
    out = torch.zeros(groups, 6, n, dtype=torch.float64)
    out[:, 0] = torch.bincount(folds, minlength=groups)[:, None].double()
    keys, values = [], []
    for codes, at, first in ((a, at_a, 1), (b, at_b, 2)):
        pair = torch.full((codes.d_sae,), -1)
        pair[at] = torch.arange(n)
        which = pair[codes.features]
        rows, which, value = codes.rows[which >= 0], which[which >= 0], codes.values[which >= 0].double()
        place = folds[rows] * n + which
        out[:, first], out[:, first + 2] = summed(value, place, groups, n), summed(value**2, place, groups, n)
        keys.append((rows * n + which).numpy())
        values.append(value)
    both, *places = map(torch.from_numpy, np.intersect1d(*keys, assume_unique=True, return_indices=True))
    product = values[0][places[0]] * values[1][places[1]]
    out[:, 5] = summed(product, folds[both // n] * n + both % n, groups, n)
    return out


def correlation(sums: Float[Tensor, "six pairs"]) -> Float[Tensor, " pairs"]:
    """Pearson's r of every pair; NaN where one of the two does not vary."""
    n, f, g, ff, gg, fg = sums
    spread = (ff - f * f / n).clamp_min(0) * (gg - g * g / n).clamp_min(0)
    r = (fg - f * g / n) / spread.sqrt()
    # Without its fold, a feature's sums may hold rounding alone: a variance that small counts as 0.
    real = ((ff - f * f / n) > 1e-12 * ff) & ((gg - g * g / n) > 1e-12 * gg) & (ff > 1e-12) & (gg > 1e-12)
    return torch.where(real, r, math.nan).clamp(-1, 1)


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).nanmean())


@result
class Transfer(Result):
    """Result of ``sl.evals.transfer``: ``at_home`` and ``elsewhere``, two reconstructions by the same coder.

    ``ce_difference``: ΔCE elsewhere minus ΔCE at home, in nats/token, ± ``ce_difference_se``; ``paired``: whether both
    were measured on the same tokens, so that the error is that of paired differences.
    """

    at_home: Reconstruction
    elsewhere: Reconstruction
    ce_difference: float = figure("dCE, difference", "elsewhere - at home, {_how}")
    ce_difference_se: float
    paired: bool

    @property
    def _how(self) -> str:
        return "paired by token" if self.paired else "other tokens"

    def figures(self) -> list[Figure]:
        one, two, both = self.at_home, self.elsewhere, self._both.items()
        return [
            *(of.figure("fvu")._replace(measure=f"FVU {name}", key=f"fvu {name}") for name, of in both),
            *(Figure(f"dCE {name}", of.ce_delta, of.ce_delta_se, of.ce_delta_mean_ablation, "mean ablation",
                     "nats/token", "low", key=f"ce_delta {name}") for name, of in both),
            *super().figures(),
            Figure("CE recovered, difference", two.ce_recovered - one.ce_recovered, key="ce_recovered",
                   control=two.pca_ce_recovered - one.pca_ce_recovered, control_name=f"PCA {one.pca_rank}"),
        ]  # fmt: skip

    @property
    def _both(self) -> dict[str, Reconstruction]:
        return {"at home": self.at_home, "elsewhere": self.elsewhere}

    _records = "_both"

    def _footer(self) -> str:
        return "\n".join(f"{name}: {of._footer()}" for name, of in self._both.items())


@as_annotated
def transfer(
    coder: SparseCoder, lm: LM, text: Documents, *, other_lm: LM | None = None,
    other_text: Documents | None = None, tokens: int = 8_192,
) -> Transfer:  # fmt: skip
    """``sl.evals.transfer(sae, lm, text, other_lm=chat)``: ``reconstruction`` here, and on another model or other text.

    Give ``other_lm``, ``other_text``, or both. With the same text and tokeniser the two are paired by token. PCA is
    fitted to each separately, and shows how hard each is to reconstruct.

    Raises ValueError without other_lm and other_text, and where ``evals.reconstruction`` does.
    """
    if other_lm is None and other_text is None:
        raise ValueError("transfer compares two: give other_lm, other_text, or both")
    one = reconstruction(coder, lm, text, tokens)
    two = reconstruction(coder, other_lm or lm, text if other_text is None else other_text, tokens)
    paired = other_text is None and torch.equal(one.token_documents, two.token_documents)
    if paired:
        difference, error = two.minus(one)
    else:
        difference, error = two.ce_delta - one.ce_delta, math.hypot(one.ce_delta_se, two.ce_delta_se)
    return Transfer(one, two, difference, error, paired)
