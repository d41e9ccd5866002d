"""Statistics that more than one measurement needs: standard errors, AUROC, permutation p-values."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(mean, its standard error) of independent values; NaN for none, and the error NaN for one."""
    if not len(values):
        return math.nan, math.nan
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


def with_error(**measured: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Means of independent values and their standard errors, as a result's fields: ``name`` and ``name_se``."""
    found = {name: mean_and_error(values) for name, values in measured.items()}
    return {name: mean for name, (mean, _) in found.items()} | {f"{name}_se": se for name, (_, se) in found.items()}


def share_interval(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share seen in n independent trials (Wilson 1927): also of shares of 0 and 1."""
    z = 1.96
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def jackknife(left_out: Iterable[float]) -> float:
    """Standard error from the estimates without each of G groups: √((G−1)/G·Σ(θ_g − θ̄)²); NaN for one group."""
    values = torch.tensor(list(left_out), dtype=torch.float64)
    if len(values) < 2:
        return math.nan
    return float((values - values.mean()).pow(2).sum().mul((len(values) - 1) / len(values)).sqrt())


def clustered_error(differences: Tensor, clusters: Tensor) -> float:
    """Standard error of the mean of paired differences whose clusters (documents) are independent.

    √(G/(G−1)·Σ_g(Σ_{i∈g}(d_i − d̄))²)/n; NaN for a single cluster.
    """
    names, where = clusters.unique(return_inverse=True)
    if len(names) < 2:
        return math.nan
    residual = (differences - differences.mean()).double()
    sums = torch.zeros(len(names), dtype=torch.double).index_add_(0, where, residual)
    correction = len(names) / (len(names) - 1)
    return float((correction * sums.pow(2).sum()).sqrt() / len(differences))


def ratio_error(top: Tensor, bottom: Tensor, clusters: Tensor) -> float:
    """Standard error of Σtop/Σbottom whose clusters are independent: that of the mean of top − ratio·bottom, over the
    mean of bottom (delta method); NaN for a single cluster, or a bottom of 0."""
    top, bottom = top.double(), bottom.double()
    if not bottom.sum():
        return math.nan
    residual = top - top.sum() / bottom.sum() * bottom
    return clustered_error(residual, clusters) / abs(float(bottom.mean()))


def ratio_difference(top: Tensor, bottom: Tensor, one: Tensor, other: Tensor, clusters: Tensor) -> tuple[float, float]:
    """(Σtop/Σbottom over ``one`` less that over ``other``, its standard error); NaN where one of them is empty.

    Both vary with the cluster: their influences are added before clustering.
    """
    if not one.any() or not other.any():
        return math.nan, math.nan
    top, bottom = top.double(), bottom.double()
    influence, ratios = torch.zeros_like(top), []
    for sign, members in ((1, one), (-1, other)):
        ratio = top[members].sum() / bottom[members].sum()
        influence[members] = sign * (top[members] - ratio * bottom[members]) / bottom[members].sum()
        ratios.append(float(ratio))
    return ratios[0] - ratios[1], clustered_error(influence, clusters) * len(top)


def auroc(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """For each column of scores, "rows columns": the share of pairs of a positive and a negative row in which the
    positive row has the larger score; ties count one half. positive: a bool for each row. NaN without both kinds."""
    from scipy.stats import rankdata

    p, n = int(positive.sum()), int((~positive).sum())
    if not p or not n:
        return np.full(scores.shape[1:], np.nan)
    return (rankdata(scores, axis=0)[positive].sum(0) - p * (p + 1) / 2) / (p * n)


class Ranks(NamedTuple):
    """Ranks of sparse scores within each feature; all rows where a feature is silent share one rank.

    order: the firings by feature, then by value; features, above: of the firings in this order, the feature and the
    rank less ``silent``. silent: the rank of silence, of each feature.
    """

    order: np.ndarray
    features: np.ndarray
    above: np.ndarray
    silent: np.ndarray


def sparse_ranks(features: np.ndarray, values: np.ndarray, n: int, rows: int) -> Ranks:
    """Ranks of the values of firings, of ``n`` features on ``rows`` rows: O(firings·log firings)."""
    order = np.lexsort((values, features))
    features, values = features[order], values[order]
    counts = np.bincount(features, minlength=n)
    zeros = rows - counts
    place = np.arange(len(features)) - (counts.cumsum() - counts)[features] + 1.0 + zeros[features]
    starts = np.ones(len(features), bool)
    starts[1:] = (features[1:] != features[:-1]) | (values[1:] != values[:-1])
    tie = starts.cumsum() - 1  # firings of equal strength share their mean rank
    place = (np.bincount(tie, place) / np.bincount(tie))[tie] if len(place) else place
    silent = (zeros + 1) / 2
    return Ranks(order, features, place - silent[features], silent)


def area(sums: Any, silent: Any, positives: Any, negatives: Any) -> Any:
    """AUROC from ``sums`` of ``Ranks.above`` over the positive rows, ties counted one half: (R − p(p+1)/2)/(p·n), R the
    rank sum of p positive and n negative rows."""
    return (sums + positives * silent - positives * (positives + 1) / 2) / (positives * negatives)


def f1(hits: Any, said: Any, true: Any) -> Any:
    """F1 = 2·hits/(said + true) of counts, 0 where both are 0."""
    return 2 * hits / np.maximum(said + true, 1)


def permutation_p(found: float, drawn: np.ndarray) -> float:
    """The share of n draws under the null that are at least as large as the value found: (1 + hits)/(1 + n). The value
    found counts as a draw, so that p is never 0."""
    return (1 + int((np.asarray(drawn) >= found).sum())) / (1 + len(drawn))
