"""Clusters of features: by the directions of their decoder rows, or by the tokens on which they fire."""

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lab.arguments import as_annotated, check_least, is_finite
from sae_lab.noting import Names
from sae_lab.results import Result, counted, figure, result
from sae_lab.saes import kernels
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Codes

LAYOUTS = ("pca", "tsne")
MOST_PAIRS = 6_000  # rows whose cosines are all held (8 bytes each); beyond, PCA comes first


class Control(NamedTuple):
    """The same clustering of rows without clusters. cosine and largest: median and maximum over the clusters that it
    finds of the mean cosine within one; NaN if it finds none."""

    name: str
    clusters: int
    share: float
    cosine: float
    largest: float


@result
class Clusters(Result):
    """Result of ``sl.geometry.clusters``.

    Attributes:
        n: clusters found; ``share``: of the rows that lie in one; ``cosine``: median over clusters of the mean cosine
            within one (NaN without clusters).
        tight: clusters whose mean cosine is above that of every cluster of every control; ``tight_by_chance``: their
            expected number if these clusters were drawn like the controls': n/(m + 1), m the controls' clusters in all.
        silent: rows of zeros, which lie in no cluster.
        labels: ``rows``, the cluster of each row, tightest first, -1 where in none; ``cosines``: the mean cosine within
            each cluster; ``points``: ``rows 2``, a map to look at, NaN for silent rows.
        controls: the same clustering of rows without clusters. names: what a coder's features are called.
    """

    n: int = figure("clusters", "density-based: more of them is no finding", control="_first.clusters",
                    control_name="{_first.name}", digits=0)  # fmt: skip
    share: float = figure("rows in one", "share", control="_first.share", control_name="{_first.name}")
    cosine: float = figure("cosine within", "median over clusters of the mean", control="_first.cosine",
                           control_name="{_first.name}")  # fmt: skip
    tight: int = figure("tight clusters", "{_bar}", control="tight_by_chance", control_name="by chance", digits=1)
    tight_by_chance: float
    rows: int
    silent: int
    min_cluster_size: int
    min_samples: int
    layout: str
    by: str
    controls: tuple[Control, ...] = field(repr=False)
    labels: Tensor = field(repr=False, compare=False)
    cosines: Tensor = field(repr=False, compare=False)
    points: Tensor = field(repr=False, compare=False)
    names: Names = field(default_factory=Names, repr=False, compare=False)

    _below = (
        "{rows:,} features{_silent} by {by}; min_cluster_size {min_cluster_size}, min_samples {min_samples}; {_nothing}"
    )

    def members(self, cluster: int) -> list[int]:
        """``found.members(0)``: the rows of one cluster; 0 is the tightest."""
        if not 0 <= cluster < self.n:
            raise ValueError(f"cluster must be an int from 0 to {self.n - 1}, of {self.n} found; got {cluster!r}")
        return (self.labels == cluster).nonzero()[:, 0].tolist()

    @property
    def _first(self) -> Control:
        return self.controls[0]

    @property
    def _bar(self) -> str:
        most = _tightest(self.controls)
        return f"mean cosine above {most:.3f}, the most in any control" if most > -1 else "no control has a cluster"

    @property
    def _silent(self) -> str:
        return f" ({self.silent:,} silent)" if self.silent else ""

    @property
    def _nothing(self) -> str:
        return "; ".join(f"{c.name}: {counted(c.clusters, 'cluster')}, cosine {c.cosine:.3f}" for c in self.controls)


def _tightest(controls: Sequence[Control]) -> float:
    """The largest mean cosine of a cluster; -1 without clusters."""
    return max((c.largest for c in controls if not math.isnan(c.largest)), default=-1.0)


@as_annotated
def clusters(
    what: SparseCoder | Tensor | Codes,
    min_cluster_size: int = 5,
    min_samples: int = 2,
    *,
    components: int = 50,
    layout: str = "pca",
    seed: int = 0,
) -> Clusters:
    """``clusters(sae)``: cluster features by HDBSCAN on 1 − cosine, beside the same on rows without clusters.

    With a coder or a tensor ``rows d``: features with similar decoder rows. Controls: equally many random unit rows;
    the rows with each coordinate shuffled over them. With ``Codes``: features that fire on the same tokens (their
    activations over tokens as rows). Control: each feature's firings at tokens drawn at random.

    Clusters are the leaves of HDBSCAN's tree (McInnes, Healy & Astels 2017). It finds many in random rows too, so
    ``tight`` counts those whose mean cosine no cluster of a control has. Up to 6,000 rows all cosines are computed; for
    more rows, those in ``components`` principal components, by which random rows pass more easily.

    Args:
        min_cluster_size: rows that make a cluster. min_samples: how dense its surroundings must be.
        layout: the map, "pca" or "tsne" (scikit-learn's, on the same cosines; slower).

    Raises ValueError for fewer rows than four times ``min_cluster_size``, and for settings out of range.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    check_least(2, min_cluster_size=min_cluster_size, components=components)
    check_least(1, min_samples=min_samples)
    if isinstance(what, Codes):
        every = kernels.feature_rows(what)
    else:
        directions = what if isinstance(what, Tensor) else what.W_dec
        if directions.ndim < 2 or not is_finite(directions):
            raise ValueError(f"clusters takes finite rows of two axes, rows and d, got shape {tuple(directions.shape)}")
        every = directions.detach().flatten(1).float().cpu().numpy()
    norms = _norms(every)
    live = np.flatnonzero(norms > 0)
    if len(live) < 4 * min_cluster_size:
        raise ValueError(
            f"clusters of {min_cluster_size} need at least {4 * min_cluster_size} rows that are not zero, got "
            f"{len(live)}: give more features, or a smaller min_cluster_size"
        )
    rows = _unit(every[live])
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    settings = (min_cluster_size, min_samples, components, seed)
    found, within = _cluster(rows, *settings)
    controls = []
    for name, other in _nothing(rows, rng):
        its, cosines = _cluster(other, *settings)
        largest = float(max(cosines, default=math.nan))
        controls.append(Control(name, len(cosines), float((its >= 0).mean()), _middle(cosines), largest))
    labels, points = torch.full((len(norms),), -1), torch.full((len(norms), 2), math.nan)
    labels[live], points[live] = torch.from_numpy(found), torch.from_numpy(_map(rows, layout, components, seed))
    return Clusters(
        n=len(within), share=float((found >= 0).mean()), cosine=_middle(within),
        tight=int((within > _tightest(controls)).sum()),
        tight_by_chance=len(within) / (sum(c.clusters for c in controls) + 1),
        rows=len(norms), silent=len(norms) - len(live), min_cluster_size=min_cluster_size, min_samples=min_samples,
        layout=layout, by="activations" if isinstance(what, Codes) else "direction", controls=tuple(controls),
        labels=labels, cosines=torch.from_numpy(within), points=points,
        names=Names(what if isinstance(what, SparseCoder) else None),
    )  # fmt: skip


def _norms(rows: Any) -> np.ndarray:
    squares = rows.multiply(rows).sum(1) if hasattr(rows, "nnz") else (rows**2).sum(1)
    return np.sqrt(np.asarray(squares).ravel())


def _unit(rows: Any) -> Any:
    from sklearn.preprocessing import normalize

    return normalize(rows)  # shuffled coordinates of rows that are mostly zero can leave a row of zeros


def _nothing(rows: Any, rng: np.random.Generator) -> list[tuple[str, Any]]:
    """Unit rows without clusters, by name."""
    if hasattr(rows, "nnz"):
        order = np.lexsort((rows.indices[rows.indptr[:-1]], np.diff(rows.indptr)))  # in any order of features
        return [("other tokens", other_columns(rows[order], rng))]
    random = rng.standard_normal(rows.shape, dtype=np.float32)
    shuffled = rng.permuted(np.sort(rows, axis=0), axis=0)  # sorted: in any order of features
    return [("random rows", _unit(random)), ("shuffled coordinates", _unit(shuffled))]


def other_columns(rows: Any, rng: np.random.Generator) -> Any:
    """A sparse matrix with each row's values in columns drawn for it alone."""
    from scipy import sparse

    drawn = [rng.choice(rows.shape[1], n, replace=False) for n in np.diff(rows.indptr)]
    made = sparse.csr_matrix((rows.data, np.concatenate(drawn), rows.indptr), rows.shape, copy=True)
    made.sort_indices()  # products of rows i and j then add in the same order as those of j and i
    return made


def _middle(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _cluster(rows: Any, size: int, samples: int, components: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(cluster of each unit row, tightest first and -1 for none; mean cosine within each)."""
    from sklearn.cluster import HDBSCAN

    settings: dict[str, Any] = {
        "min_cluster_size": size, "min_samples": samples, "cluster_selection_method": "leaf", "copy": False,
    }  # fmt: skip
    if rows.shape[0] <= MOST_PAIRS:
        labels = HDBSCAN(metric="precomputed", **settings).fit(_distances(rows)).labels_
    else:
        labels = HDBSCAN(**settings).fit(_unit(_reduce(rows, components, seed))).labels_
    within = []
    for members in (rows[np.flatnonzero(labels == c)] for c in range(labels.max() + 1)):
        n, total = members.shape[0], np.asarray(members.sum(0), dtype=np.float64)
        within.append(float(((total**2).sum() - n) / (n * (n - 1))))  # mean cosine of two different unit rows
    within = np.array(within)
    order = np.argsort(-within, kind="stable")
    place = np.full(len(order) + 1, -1)  # the last entry is that of -1
    place[order] = np.arange(len(order))
    return place[labels], within[order]


def _distances(rows: Any) -> np.ndarray:
    """1 − cosine of all pairs of unit rows."""
    cosines = rows @ rows.T
    distances = 1 - np.asarray(cosines.toarray() if hasattr(cosines, "nnz") else cosines, dtype=np.float64)
    np.fill_diagonal(distances, 0)
    return np.maximum(distances, 0, out=distances)


def _reduce(rows: Any, components: int, seed: int) -> np.ndarray:
    """Principal components of the rows (of sparse ones, which stay uncentred, the leading singular ones)."""
    from sklearn.decomposition import PCA, TruncatedSVD

    components = min(components, min(rows.shape) - 1)
    if hasattr(rows, "nnz"):
        return TruncatedSVD(components, random_state=seed).fit_transform(rows)
    return PCA(components, svd_solver="randomized", random_state=seed).fit_transform(rows)


def _map(rows: Any, layout: str, components: int, seed: int) -> np.ndarray:
    start = _reduce(rows, 2, seed).astype(np.float32)
    if layout == "pca":
        return start
    from sklearn.manifold import TSNE

    start *= 1e-4 / start[:, 0].std()
    few = len(start) <= MOST_PAIRS
    settings: dict[str, Any] = {"perplexity": min(30.0, (len(start) - 1) / 3), "max_iter": 500, "random_state": seed}
    made = TSNE(2, init=start, metric="precomputed" if few else "cosine", **settings)
    return made.fit_transform(_distances(rows) if few else _reduce(rows, components, seed)).astype(np.float32)
