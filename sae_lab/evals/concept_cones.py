"""Whether concepts are sums of few features: directions as sparse non-negative combinations of decoder rows."""

import math
from collections.abc import Sequence
from dataclasses import field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from sae_lab.activations.store import Store
from sae_lab.arguments import as_annotated
from sae_lab.evals.sampling import encoded, require, sample
from sae_lab.results import Figure, Result, counted, result
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Codes

SIZES = (1, 2, 4, 8, 16, 32)
RANDOM = 64  # random directions in the control


@result
class Cones(Result):
    """Result of ``sl.evals.cones``: means over concepts, one entry for every size.

    Attributes:
        sizes: how many features a concept may use; best_size: the size with the largest held_out.
        r2: share of the concept's squared length that its features explain; held_out: r2 on held-out coordinates.
        r2_random, held_out_random: of random directions, the controls. held_out_se: over concepts.
        correlation: of the concept's activation with that of its features on rows of x; ``correlation_shuffled``: with
            the features of another concept; NaN without x.
        per_concept: r2 of every concept, ``concepts sizes``; ``features``, ``weights``: those of the largest size, in
            the order of choice; feature -1 with weight 0 after the last feature that helps.
    """

    sizes: tuple[int, ...]
    r2: tuple[float, ...]
    r2_random: tuple[float, ...]
    held_out: tuple[float, ...]
    held_out_se: tuple[float, ...]
    held_out_random: tuple[float, ...]
    correlation: tuple[float, ...]
    correlation_shuffled: tuple[float, ...]
    concepts: int
    rows: int
    d_sae: int
    per_concept: Float[Tensor, "concepts sizes"] = field(repr=False, compare=False)
    features: Int[Tensor, "concepts most"] = field(repr=False, compare=False)
    weights: Float[Tensor, "concepts most"] = field(repr=False, compare=False)

    @property
    def best_index(self) -> int:
        return int(np.argmax(self.held_out))

    @property
    def best_size(self) -> int:
        """The number of features whose combination fits held-out coordinates best."""
        return self.sizes[self.best_index]

    @property
    def interior(self) -> bool:
        """Whether ``best_size`` is neither the smallest nor the largest size tried."""
        return 0 < self.best_index < len(self.sizes) - 1

    def figures(self) -> list[Figure]:
        i = self.best_index
        return [
            Figure("features a concept", self.best_size, meaning="most held-out r2", digits=0, key="best_size"),
            Figure("r2", self.r2[i], control=self.r2_random[i], control_name="random directions", best="high",
                   key="r2"),
            Figure("r2, held out", self.held_out[i], self.held_out_se[i], self.held_out_random[i], "random directions",
                   "on coordinates not fitted; ± over concepts", "high", key="held_out"),
            Figure("correlation", self.correlation[i], control=self.correlation_shuffled[i],
                   control_name="another concept", meaning="of activations", best="high", key="correlation"),
        ]  # fmt: skip

    _records = ("size=sizes", "r2", "r2_random", "held_out", "held_out_se", "held_out_random", "correlation",
                "correlation_shuffled")  # fmt: skip
    _columns = {  # noqa: RUF012
        "features": "{size:.0f}", "r2": "{r2:.3f}", "random": "{r2_random:.3f}",
        "held-out r2": "{held_out:.3f} ± {held_out_se:.3f}", "random, held-out": "{held_out_random:.3f}",
        "correlation": "{correlation:.3f}", "another's": "{correlation_shuffled:.3f}", "": "{mark}",
    }  # fmt: skip
    _mark = "< most"
    _below = "{concepts:,} concepts, {d_sae:,} features; ± over concepts{_remark}"

    @property
    def _remark(self) -> str:
        text = f"; {counted(self.rows, 'row')}" if self.rows else "; no x given: correlations are undefined"
        return text + "; the most stands at an end of the sizes tried" * (not self.interior)


@as_annotated
@torch.no_grad()
def cones(
    coder: SparseCoder, concepts: Float[Tensor, "concepts d_out"] | None = None, x: Tensor | Store | None = None, *,
    labels: Tensor | None = None, sizes: Sequence[int] = SIZES, tokens: int = 16_384, seed: int = 0,
) -> Cones:  # fmt: skip
    """``sl.evals.cones(sae, concepts)``: whether concepts are sparse non-negative sums of decoder rows.

        ĉ = Σ_{i in S} w_i·d_i,  w ≥ 0, |S| ≤ m;   r² = 1 − ‖c − ĉ‖²/‖c‖²

    S grows greedily: the row with the largest positive correlation with the residual is added, and all weights are
    fitted again. Held out: in a random orthonormal basis S and w are fitted on one half of the coordinates and r² is
    taken on the other half, then the halves are swapped; held-out r² falls once features overfit. Correlation: of the
    concept's activation on rows of x (its label, or x·c) with Σ w_i·f_i.

    After the "concept cones" that compare a concept bottleneck's directions with an SAE's rows; the fit, its controls
    and the held-out coordinates are additions of sae_lab. Compare r² with that of random directions, which grows with
    the width of the dictionary.

    Args:
        concepts: directions ``concepts d_out``, such as a probe's weights; None: difference of the means of rows with
            and without each label.
        x: activations ``rows d_in`` (spread evenly), or a Store (its rows that training left out); for correlations.
        labels: ``rows concepts``, of all rows of x: concepts' activations; booleans where concepts is None.
        sizes: numbers of features, ascending.

    Raises ValueError for a transcoder, for concepts of another width, zero or not finite, for sizes out of range, and
    for labels that are not one column a concept or hold one class.
    """
    require(coder, reconstructs="cones")
    most = max(1, min(coder.d_sae, coder.d_out // 2))  # half the coordinates must determine the weights
    sizes = tuple(m for m in SIZES if m <= most) if tuple(sizes) == SIZES else tuple(sizes)
    if not sizes or list(sizes) != sorted(set(sizes)) or not 1 <= sizes[0] <= sizes[-1] <= most:
        raise ValueError(f"sizes must be ascending integers from 1 to {most}, min(d_sae, d_out/2), got {sizes}")
    rows = truth = None
    if x is not None:
        rows = sample(x, tokens, coder)
        if labels is not None:
            if labels.dim() != 2 or len(labels) != len(x):
                raise ValueError(f"labels must be (rows, concepts) for x's {len(x)} rows, got {tuple(labels.shape)}")
            truth = labels[rows.number]
    elif concepts is None or labels is not None:
        raise ValueError("labels are of rows: give x, the activations they belong to")
    if concepts is None:  # mean of rows with each label minus mean of rows without it
        if rows is None or truth is None or truth.dtype != torch.bool:
            raise ValueError("without concepts, labels must be booleans (rows, concepts): directions come from them")
        count, n = truth.sum(0), len(truth)
        if bool(((count == 0) | (count == n)).any()):
            raise ValueError(f"every label needs rows with and without it, got {count.tolist()} of {n} rows with")
        concepts = (truth.T.float() / count[:, None] - (~truth).T.float() / (n - count)[:, None]) @ rows.x.flatten(1)
    W = coder.directions().cpu()
    if concepts.shape[1] != W.shape[1] or not len(concepts) or not bool(concepts.any(1).all()):
        raise ValueError(
            f"concepts must be directions of width {W.shape[1]}, which the coder writes, one or more and none of them "
            f"zero, got {tuple(concepts.shape)} with {int((~concepts.any(1)).sum())} that are zero"
        )
    c = normalize(concepts.detach().float().cpu(), dim=1)
    if truth is not None and truth.shape[1] != len(c):
        raise ValueError(f"labels must have one column for each of the {len(c)} concepts, got {truth.shape[1]}")
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(W.shape[1], W.shape[1], generator=generator)).Q
    random = normalize(torch.randn(RANDOM, W.shape[1], generator=generator), dim=1)
    r2, features, weights = fit(W, c, sizes)
    held = _held_out(W @ basis, c @ basis, sizes)
    own = other = (math.nan,) * len(sizes)
    if rows is not None:
        f, _ = encoded(coder, rows)
        truth = rows.x.flatten(1) @ c.T if truth is None else truth
        own, other = _correlations(f, truth.double(), features, weights)
    return Cones(
        sizes=sizes,
        r2=_means(r2),
        r2_random=_means(fit(W, random, sizes)[0]),
        held_out=_means(held),
        held_out_se=tuple((held.std(0) / len(c) ** 0.5).tolist()),
        held_out_random=_means(_held_out(W @ basis, random @ basis, sizes)),
        correlation=own,
        correlation_shuffled=other,
        concepts=len(c),
        rows=0 if rows is None else len(rows.x),
        d_sae=coder.d_sae,
        per_concept=r2,
        features=features[:, -1],
        weights=weights[:, -1],
    )


def fit(
    W: Float[Tensor, "d_sae d"], c: Float[Tensor, "concepts d"], sizes: Sequence[int]
) -> tuple[Float[Tensor, "concepts sizes"], Int[Tensor, "concepts sizes most"], Float[Tensor, "concepts sizes most"]]:
    """(r², features, weights) of greedy non-negative least squares of each row of c at every size."""
    from scipy.optimize import nnls

    most, table = max(sizes), W.numpy()
    r2 = np.zeros((len(c), len(sizes)), np.float32)
    features, weights = np.full((len(c), len(sizes), most), -1), np.zeros((len(c), len(sizes), most), np.float32)
    norms = W.norm(dim=1).clamp_min(1e-12).numpy()
    for k, target in enumerate(c.numpy()):
        chosen, w, left = [], np.zeros(0), target.copy()
        whole = float(target @ target)
        for m in range(1, most + 1):
            along = table @ left / norms
            along[chosen] = -np.inf
            best = int(along.argmax())
            if along[best] > 1e-6 * whole**0.5:
                chosen.append(best)
                w, _ = nnls(table[chosen].T.astype(np.float64), target.astype(np.float64))
                left = target - (w @ table[chosen]).astype(np.float32)
            for at in (i for i, size in enumerate(sizes) if size == m):
                r2[k, at] = 1 - float(left @ left) / whole
                features[k, at, : len(chosen)], weights[k, at, : len(chosen)] = chosen, w
    return torch.from_numpy(r2), torch.from_numpy(features), torch.from_numpy(weights)


def _held_out(W: Tensor, c: Tensor, sizes: Sequence[int]) -> Tensor:
    """r² on each half of the coordinates of a fit on the other half; the mean of both, ``concepts sizes``."""
    half, out = W.shape[1] // 2, torch.zeros(len(c), len(sizes))
    parts = (slice(0, half), slice(half, None))
    for seen, unseen in (parts, parts[::-1]):
        _, features, weights = fit(W[:, seen].contiguous(), c[:, seen].contiguous(), sizes)
        target = c[:, unseen]
        for at in range(len(sizes)):  # features of -1 have weight 0
            hat = torch.einsum("cm,cmd->cd", weights[:, at], W[:, unseen][features[:, at]])
            out[:, at] += 0.5 * (1 - (target - hat).pow(2).sum(1) / target.pow(2).sum(1))
    return out


def _correlations(f: Codes, truth: Tensor, features: Tensor, weights: Tensor) -> tuple[tuple[float, ...], ...]:
    """For each size, mean correlation of concepts' activations with their features', and with the next concept's."""
    found, rows = [], len(f.offsets) - 1
    for at in range(features.shape[1]):
        table = torch.zeros(f.d_sae, len(truth.T), dtype=torch.float64)
        there = features[:, at] >= 0
        concept = torch.arange(len(features))[:, None].expand_as(there)
        table[features[:, at][there], concept[there]] = weights[:, at][there].double()
        activity = torch.zeros(rows, len(truth.T), dtype=torch.float64)
        for start in range(0, rows, 8192):  # an active place times a concept: in pieces
            offsets = f.offsets[start : start + 8193]
            here = slice(int(offsets[0]), int(offsets[-1]))
            places = f.rows[here]
            activity.index_add_(0, places, f.values[here, None].double() * table[f.features[here]])
        a, b = activity - activity.mean(0), truth - truth.mean(0)
        r = (a.T @ b) / (a.norm(dim=0)[:, None] * b.norm(dim=0))
        other = float(r.roll(1, 0).diagonal().nanmean()) if len(r) > 1 else math.nan
        found.append((float(r.diagonal().nanmean()), other))
    return tuple(zip(*found, strict=True))


def _means(values: Tensor) -> tuple[float, ...]:
    return tuple(values.mean(0).tolist())
