"""sl.match: which directions of one dictionary another one has, and in which order."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.activations.world import World
from sae_lab.arguments import as_annotated
from sae_lab.results import Figure, Result, counted, figure, result
from sae_lab.saes.base import SparseCoder

_TAG = 0x434F4E54524F4C  # seed of the control's rows; no coder has it, else an untrained one could be its own control
MOST_ROWS = 8192  # above this many rows Hungarian matching takes minutes and gigabytes: only when asked for
_CHUNK = 2048


@result
class Match(Result):
    """Result of ``sl.match(a, b)``. Cosines are signed: a direction and its opposite do not match.

    Attributes:
        a_to_b: mean over a's rows of the largest cosine with a row of b (MMCS); ``b_to_a``: the other way round.
        mcc: mean cosine of the pairs of the one-to-one matching with the largest sum (Hungarian), min(rows) pairs.
        recall: the share of b's rows that have a row of a at a cosine above ``threshold``.
        orderedness: Spearman correlation of the row numbers of matched pairs, 1: b's order is a's.
        rows: the numbers of compared rows of a and of b; ``left_out``: of rows that ``match`` leaves out.
        best: for every row of b the largest cosine with a row of a; NaN for rows left out.
        permutation: for every row of b the row of a matched to it, -1: none; ``cosines``: of these pairs, NaN: none.
            Above ``MOST_ROWS`` rows these, mcc and orderedness are not computed.
        control: the same match for as many random unit rows in a's place.
    """

    a_to_b: float = figure("a to b", "MMCS: mean over a of the best cosine in b")
    b_to_a: float = figure("b to a", "MMCS: mean over b of the best cosine in a")
    mcc: float = figure("MCC", "mean cosine of one-to-one pairs")
    recall: float = figure("recall", "b's rows with a cosine above {threshold:g} in a")
    orderedness: float = figure("orderedness", "Spearman of the pairs' row numbers")
    threshold: float
    rows: tuple[int, int]
    left_out: tuple[int, int]
    best: Float[Tensor, " rows_b"]
    permutation: Int[Tensor, " rows_b"]
    cosines: Float[Tensor, " rows_b"]
    control: "Match | None" = None

    def _figure(self, f: Any, named: set[str]) -> Figure:
        """With the control's value beside it."""
        found = super()._figure(f, named)
        if self.control is None:
            return found
        return found._replace(control=getattr(self.control, f.name), control_name="random rows")

    def to_pandas(self):
        """Two rows, the match and its control; one column a measure."""
        import pandas as pd

        both = {"match": self} | ({"random rows": self.control} if self.control else {})
        return pd.DataFrame({name: {f.key: f.value for f in one.figures()} for name, one in both.items()}).T

    def _footer(self) -> str:
        text = f"a: {counted(self.rows[0], 'row')}, b: {counted(self.rows[1], 'row')}"
        text += f"; left out: {self.left_out[0]:,} of a, {self.left_out[1]:,} of b" if any(self.left_out) else ""
        missing = self.rows[1] > 0 and bool((self.permutation < 0).all())
        return text + (f"; no pairs above {MOST_ROWS:,} rows: match(..., hungarian=True)" if missing else "")


@as_annotated
def match(
    a: SparseCoder | World | Tensor, b: SparseCoder | World | Tensor, *, threshold: float = 0.9, live: bool = False,
    hungarian: bool | None = None,
) -> Match:  # fmt: skip
    """How well a's directions match b's: MMCS both ways, MCC, recall and orderedness, beside those of random rows.

    Rows i of a and j of b have cosine cᵢⱼ. a_to_b = meanᵢ maxⱼ cᵢⱼ; b_to_a = meanⱼ maxᵢ cᵢⱼ (Sharkey et al. 2022;
    Cunningham et al. 2023, arXiv:2309.08600). With µ the one-to-one matching of largest sum, mcc = meanⱼ c_µ(j)j
    ("stability" of Fel et al. 2025, arXiv:2502.12892) and orderedness = Spearman(j, µ(j)) over matched rows j (Wang et
    al. 2025, arXiv:2512.02194): b's rows stand for the true order, which in a planted world is that of frequency.

    a_to_b alone is high for a coder that found one feature many times, b_to_a alone for one with many more rows than b.

    Args:
        a, b: coders (their ``W_dec``), worlds (their ``dictionary``) or tensors ``rows width``.
        threshold: cosine above which a row of b counts as found.
        live: leave out features that never fired in training (``f_scale`` 0). Rows of zeros, which have no direction,
            are always left out.
        hungarian: match one to one; None does so up to ``MOST_ROWS`` rows (the cost is cubic in them at worst).

    Raises ValueError for widths that differ, for NaN, and where no row is left.
    """
    if not -1 <= threshold < 1:
        raise ValueError(f"threshold is a cosine from -1 to below 1, got {threshold}")
    (rows_a, keep_a), (rows_b, keep_b) = _directions(a, "a", live), _directions(b, "b", live)
    if rows_a.shape[1] != rows_b.shape[1]:
        raise ValueError(
            f"a and b must have rows of the same width, got {rows_a.shape[1]} and {rows_b.shape[1]}: match "
            "dictionaries of the same site"
        )
    pairs = hungarian if hungarian is not None else max(len(rows_a), len(rows_b)) <= MOST_ROWS
    drawn = np.random.default_rng(np.random.SeedSequence([_TAG])).standard_normal(rows_a[keep_a].shape, np.float32)
    random = torch.nn.functional.normalize(torch.from_numpy(drawn), dim=1)
    control = _match(random, torch.ones(len(random), dtype=torch.bool), rows_b, keep_b, threshold, pairs)
    return replace(_match(rows_a, keep_a, rows_b, keep_b, threshold, pairs), control=control)


def _directions(source: SparseCoder | World | Tensor, name: str, live: bool) -> tuple[Tensor, Tensor]:
    """(unit rows, which of them count)."""
    rows = source.W_dec if isinstance(source, SparseCoder) else source
    rows = rows.dictionary if isinstance(rows, World) else rows
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"{name} must have float rows (rows, width), got {tuple(rows.shape)} {rows.dtype}")
    rows = rows.detach().float().cpu()
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{name} holds NaN or Inf: a dictionary's rows must be finite")
    norms = rows.norm(dim=1, keepdim=True)
    keep = norms[:, 0] > 0
    if live and isinstance(source, SparseCoder):
        keep &= source.f_scale.cpu() > 0
    if not bool(keep.any()):
        why = "no feature of it ever fired, or it was never trained: try live=False" if live else "all rows are zero"
        raise ValueError(f"{name} has no direction to match: {why}")
    return rows / norms.clamp_min(torch.finfo(torch.float32).tiny), keep


def _match(rows_a: Tensor, keep_a: Tensor, rows_b: Tensor, keep_b: Tensor, threshold: float, pairs: bool) -> Match:
    """The measures of kept unit rows, a chunk of a's rows at a time; all cosines at once only for pairs."""
    a, b = rows_a[keep_a], rows_b[keep_b]
    best_a, best_b, whole = [], torch.full((len(b),), -1.0), []
    for chunk in a.split(_CHUNK):
        cosines = (chunk @ b.T).clamp(-1, 1)  # rounding must not give more than 1
        best_a.append(cosines.amax(1))
        best_b = torch.maximum(best_b, cosines.amax(0))
        whole += [cosines] if pairs else []
    best = torch.full((len(rows_b),), float("nan"))
    best[keep_b] = best_b
    permutation, matched = torch.full((len(rows_b),), -1), torch.full((len(rows_b),), float("nan"))
    mcc = orderedness = float("nan")
    if pairs:
        from scipy.optimize import linear_sum_assignment

        cosines = torch.cat(whole)
        i, j = (torch.from_numpy(side) for side in linear_sum_assignment(cosines.numpy(), maximize=True))
        at_a, at_b = keep_a.nonzero().flatten()[i], keep_b.nonzero().flatten()[j]
        permutation[at_b], matched[at_b] = at_a, cosines[i, j]
        mcc, orderedness = float(matched[at_b].mean()), _spearman(at_a, at_b)
    return Match(
        a_to_b=float(torch.cat(best_a).mean()),
        b_to_a=float(best_b.mean()),
        mcc=mcc,
        recall=float((best_b > threshold).float().mean()),
        orderedness=orderedness,
        threshold=threshold,
        rows=(len(a), len(b)),
        left_out=(len(rows_a) - len(a), len(rows_b) - len(b)),
        best=best,
        permutation=permutation,
        cosines=matched,
    )


def _spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of numbers without ties; NaN for fewer than two."""
    if len(x) < 2:
        return float("nan")
    ranks = torch.stack([x.argsort().argsort(), y.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])
