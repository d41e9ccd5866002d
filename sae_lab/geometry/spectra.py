"""Patterns of activation: which features fire together over which contexts, by a singular value decomposition."""

from dataclasses import field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.arguments import as_annotated, check_least
from sae_lab.geometry.clustering import other_columns
from sae_lab.results import Figure, Result, counted, figure, result
from sae_lab.saes import kernels
from sae_lab.types import Codes


@result
class Patterns(Result):
    """Result of ``sl.geometry.patterns``.

    Attributes:
        rank: the finding: leading patterns stronger than the pattern of equal number after shuffling. There may be more
            than ``looked``.
        explained: share of the (scaled) variance in these patterns; ``shuffled``: of shuffled activations.
        strength, noise: singular values, and the largest over shuffles of each: both ``looked``.
        features: ``looked d_sae``, unit vectors, 0 for features that never fire; ``contexts``: ``looked contexts``.
    """

    rank: int = figure("rank", "patterns above noise, of {looked} looked at", control="_none", digits=0,
                       control_name="expected when shuffled")  # fmt: skip
    looked: int
    explained: float = figure("explained", "share of variance in these patterns", control="shuffled",
                              control_name="shuffled")  # fmt: skip
    shuffled: float
    contexts_read: int
    live: int
    draws: int
    strength: Tensor = field(repr=False, compare=False)
    noise: Tensor = field(repr=False, compare=False)
    features: Tensor = field(repr=False, compare=False)
    contexts: Tensor = field(repr=False, compare=False)

    _none = 0
    _below = "{live:,} live features x {contexts_read:,} contexts; noise: largest of {draws} shuffles{_more}"

    @property
    def _more(self) -> str:
        return "; all that were looked at are above noise: look at more" * (self.rank == self.looked)

    def top(self, pattern: int, n: int = 10) -> list[tuple[int, float]]:
        """``found.top(0)``: the features that weigh most in a pattern, with their (signed) weights."""
        if not 0 <= pattern < self.looked:
            raise ValueError(f"pattern must be an int from 0 to {self.looked - 1}, got {pattern!r}")
        weights = self.features[pattern]
        return [(int(i), float(weights[i])) for i in weights.abs().topk(min(n, len(weights))).indices]

    def figures(self) -> list[Figure]:
        most, noise = float(self.strength[0]), float(self.noise[0])
        strongest = Figure("strongest", most, control=noise, control_name="shuffled", meaning="singular value")
        return [*super().figures(), strongest]


@as_annotated
def patterns(
    activations: Codes | Float[Tensor, "rows d_sae"],
    contexts: Int[Tensor, " tokens"] | None = None,
    *,
    looked: int = 20,
    draws: int = 5,
    seed: int = 0,
) -> Patterns:
    """``patterns(codes, contexts)``: singular value decomposition of activations, features by contexts, and how many of
    its patterns are above noise.

    a_fc: mean activation of feature f over the rows (tokens) of context c; A = (a_fc − ā_f)/s_f with ā_f, s_f mean and
    standard deviation over contexts, so that each feature counts alike; A = Σ_k σ_k u_k v_kᵀ. Parallel analysis (Horn
    1965): pattern k is above noise while σ_k, and all before it, exceed the largest σ_k of ``draws`` shuffles, which
    give each feature's values to the contexts in a random order. A is never made dense.

    Read the rank as the number of patterns worth looking at. Loud or long contexts make a pattern too, since a shuffle
    evens them out. It also spreads noise evenly: if the contexts of a pattern are the noisiest ones, one planted
    pattern can count as up to four (tests/geometry/test_geometry.py).

    Args:
        activations: codes of tokens. contexts: of each token the number of its context (a document, a prompt); None:
            each row is a context.
        looked: how many patterns to compute, fewer than contexts and live features.

    Raises ValueError for contexts of another length, and for too few contexts or features for ``looked`` patterns.
    """
    check_least(1, draws=draws)
    by_feature: Any = _by_context(activations, contexts)
    d_sae, n = by_feature.shape
    spread = _spread(by_feature)
    live = np.flatnonzero(spread)
    most = min(len(live), n) - 1
    if most < 1:
        raise ValueError(
            f"patterns are of features that vary over contexts, two of each at least: got {len(live)} that vary and "
            f"{counted(n, 'context')}"
        )
    if not 1 <= looked <= most:
        raise ValueError(
            f"looked must be an integer from 1 to {most}, one less than the {len(live)} features that vary and the {n} "
            f"contexts; got {looked!r}"
        )
    rows, spread, rng = by_feature[live], spread[live], np.random.default_rng(seed)
    strength, left, right = _decompose(rows, spread, looked, seed)
    noise = np.stack([_decompose(other_columns(rows, rng), spread, looked, seed)[0] for _ in range(draws)])
    rank = int(np.append(strength <= noise.max(0), True).argmax())  # how many before the first that is not above
    features = torch.zeros(looked, d_sae)
    features[:, live] = torch.from_numpy(left).float()
    total = float(len(live) * n)  # Σ A², for rows of variance 1
    return Patterns(
        rank=rank, looked=looked, explained=float((strength[:rank] ** 2).sum() / total),
        shuffled=float((noise[:, :rank] ** 2).sum(1).mean() / total), contexts_read=n, live=len(live), draws=draws,
        strength=torch.from_numpy(strength).float(), noise=torch.from_numpy(noise.max(0)).float(), features=features,
        contexts=torch.from_numpy(right).float(),
    )  # fmt: skip


def _by_context(activations: Codes | Tensor, contexts: Tensor | None) -> Any:
    """Mean activations, a sparse matrix "d_sae contexts"."""
    from scipy import sparse

    if isinstance(activations, Codes):
        by_row: Any = kernels.feature_rows(activations)
    else:
        by_row = sparse.csr_matrix(activations.detach().float().cpu().numpy().T)
    if contexts is None:
        return by_row.astype(np.float64)
    if len(contexts) != by_row.shape[1]:
        raise ValueError(f"contexts must name one context a row, got {len(contexts)} for {by_row.shape[1]} rows")
    numbers, where, counts = np.unique(contexts.cpu().numpy(), return_inverse=True, return_counts=True)
    mean = sparse.csr_matrix((1 / counts[where], (np.arange(len(where)), where)), (len(where), len(numbers)))
    return sparse.csr_matrix(by_row.astype(np.float64) @ mean)


def _spread(rows: Any) -> np.ndarray:
    """Standard deviation of each row of a sparse matrix, 0 where only rounding makes one."""
    mean = np.asarray(rows.mean(1)).ravel()
    squares = np.asarray(rows.multiply(rows).mean(1)).ravel()
    variance = squares - mean**2
    return np.sqrt(np.where(variance > 1e-9 * squares, variance, 0))


def _decompose(rows: Any, spread: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(σ descending, "k rows" left, "k columns" right vectors) of the rows centred and scaled, which are never made."""
    from scipy import sparse
    from scipy.sparse.linalg import LinearOperator, svds

    scaled: Any = sparse.csr_matrix(sparse.diags(1 / spread) @ rows)
    mean = np.asarray(scaled.mean(1)).ravel()
    ways: Any = {
        "dtype": np.float64,
        "matvec": lambda v: scaled @ v.ravel() - mean * v.sum(),
        "rmatvec": lambda u: scaled.T @ u.ravel() - (mean @ u.ravel()),
    }
    start = np.random.default_rng(seed).standard_normal(min(rows.shape))
    factors: Any = svds(LinearOperator(scaled.shape, **ways), k=k, v0=start)
    left, values, right = factors
    order = np.argsort(-values)
    return values[order], left.T[order], right[order]
