"""Which features of a larger coder a smaller one lacks: each is inserted into the smaller one, one at a time."""

from dataclasses import field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from sae_lab.activations.store import Store
from sae_lab.arguments import as_annotated
from sae_lab.evals.sampling import by_content, encoded, require, sample, share_of, summed, without_each
from sae_lab.results import Result, figure, result
from sae_lab.saes import kernels
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import jackknife
from sae_lab.types import Codes


@result
class Stitching(Result):
    """Result of ``sl.evals.stitching``. Shares are of the large coder's features that fire on these rows.

    Attributes:
        novel: share of features with no row of the small decoder at a cosine of ``threshold`` or above; the others are
            reconstruction features. ``*_se``: jackknife over groups of documents.
        novel_help_shuffled: share of novel features that lower the error when their activations are shuffled over
            rows.
        swap_better: share of reconstruction features with a lower error in place of the nearest small feature than
            beside it. swap_help: share of reconstruction features whose swap does not raise the error.
        fvu_small, fvu_novel, fvu_large: variance unexplained by the small coder, by the small coder with all novel
            features, and by the large coder.
        cosines, nearest: for every large feature, the largest cosine with a row of the small decoder, and that row.
        inserted, swapped: change of the mean squared error of a row by each large feature; NaN if it never fires
            (``swapped``: also for novel features).
    """

    novel: float = figure("novel", "no small feature at a cosine of {threshold:g}")
    novel_help: float = figure("novel, MSE falls", "inserted one at a time", control="novel_help_random",
                               control_name="random directions", best="high")  # fmt: skip
    novel_help_se: float
    novel_help_random: float
    novel_help_shuffled: float
    known_hurt: float = figure("reconstruction, MSE rises", "inserted one at a time", control="_novel_hurt",
                               control_name="of novel")  # fmt: skip
    known_hurt_se: float
    swap_better: float = figure("swapped, better than inserted", "MSE does not rise for {swap_help:.3f}",
                                control="swap_better_random", control_name="for a random small feature")  # fmt: skip
    swap_better_random: float
    swap_help: float
    fvu_small: float
    fvu_novel: float = figure("FVU with all novel", "large alone {fvu_large:.3f}", control="fvu_small",
                              control_name="small alone", best="low")  # fmt: skip
    fvu_large: float
    threshold: float
    live: int
    d_small: int
    d_large: int
    rows: int
    documents: int
    cosines: Float[Tensor, " d_large"] = field(repr=False, compare=False)
    nearest: Int[Tensor, " d_large"] = field(repr=False, compare=False)
    inserted: Float[Tensor, " d_large"] = field(repr=False, compare=False)
    swapped: Float[Tensor, " d_large"] = field(repr=False, compare=False)

    _below = (
        "{d_small:,} and {d_large:,} features, {live:,} of the latter fire; {rows:,} rows of {documents:,} documents; "
        "with the activations of other rows {novel_help_shuffled:.1%} of novel features lower MSE"
    )

    @property
    def _novel_hurt(self) -> float:
        return 1 - self.novel_help


@as_annotated
@torch.no_grad()
def stitching(
    small: SparseCoder, large: SparseCoder, x: Tensor | Store, *, threshold: float = 0.7, tokens: int = 16_384,
    seed: int = 0,
) -> Stitching:  # fmt: skip
    """``sl.evals.stitching(small, large, store)``: which features of a large coder improve a small coder.

        e = x − x̂_small,  inserted_j = E‖e − g_j·d_j‖² − E‖e‖² = E[g_j²]·‖d_j‖² − 2·E[g_j·(e·d_j)]
        swapped_j = E‖e + f_i·c_i − g_j·d_j‖² − E‖e‖²,  i the nearest small feature

    f, c: codes (``SparseCoder.strengths``) and unit decoder rows of the small coder; g, d: of the large one. A feature
    is novel if no small decoder row has a cosine of ``threshold`` with it: the small coder lacks it, and inserting it
    should lower the error. Else it is a reconstruction feature, which the small coder has too: beside the nearest small
    feature it should raise the error, in its place raise it less. Sums over active features: no pass per feature.

    Leask et al. 2025 (arXiv:2502.04878) swap groups of features in turn; here each is swapped alone, and all novel ones
    are inserted together (``fvu_novel``).

    Args: small, large: two coders of the same activations, in eval mode. x: activations ``rows d_in`` (spread evenly),
    or a Store (its rows that no training batch held). tokens: how many rows at most.

    Raises ValueError for coders of other widths, or that transcode, and if no feature of the large one fires.
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold is a cosine from -1 to 1, got {threshold}")
    require(small, large, reconstructs="stitching")
    if small.in_shape != large.in_shape:
        raise ValueError(f"the coders must read the same activations, got widths {small.in_shape} and {large.in_shape}")
    rows = sample(x, tokens, small)
    f, small_hat = encoded(small, rows)
    g, large_hat = encoded(large, rows)
    error = (rows.x - small_hat).flatten(1)
    c, d = (one.directions().cpu() for one in (small, large))
    unit = normalize(c, dim=1)
    best = [(normalize(part, dim=1) @ unit.T).max(1) for part in d.split(2048)]
    cosines, nearest = torch.cat([b.values for b in best]).clamp(-1, 1), torch.cat([b.indices for b in best])
    fired = torch.bincount(g.features, minlength=large.d_sae) > 0
    if not bool(fired.any()):
        raise ValueError(f"no feature of the large coder fires on these {len(rows.x)} rows: give more tokens")
    novel, known = fired & (cosines < threshold), fired & (cosines >= threshold)
    put = _inserted(g, error, d, rows.folds)
    generator = torch.Generator().manual_seed(seed)
    other = torch.randperm(len(error), generator=generator)
    order = by_content(g)
    random, taken = torch.empty_like(d), torch.empty_like(nearest)
    random[order] = normalize(torch.randn(d.shape, generator=generator), dim=1)
    taken[order] = by_content(f)[torch.randint(small.d_sae, (large.d_sae,), generator=generator)]
    inserted, without = put.sum(0) / len(error), without_each(put)
    swap, swap_random = (inserted + _removed(f, g, error, c, d, i) for i in (nearest, taken))
    whole, novel_codes = rows.x.flatten(1), torch.where(novel[g.features], g.values, 0)
    added = kernels.weighted_rows(novel_codes, g.features, g.offsets, d)
    hats = {"small": small_hat.flatten(1), "novel": small_hat.flatten(1) + added, "large": large_hat.flatten(1)}
    variance = float((whole - whole.mean(0)).pow(2).sum(dtype=torch.float64))
    fvu = {f"fvu_{of}": float((whole - x_hat).pow(2).sum(dtype=torch.float64)) for of, x_hat in hats.items()}
    rounding = 1e-6 * float(whole.pow(2).sum(1).mean())  # a feature swapped for itself changes nothing
    return Stitching(
        novel=share_of(novel, fired),
        novel_help=share_of(inserted < 0, novel),
        novel_help_se=jackknife(share_of(change < 0, novel) for change in without),
        novel_help_random=share_of(_inserted(g, error, random, rows.folds).sum(0) < 0, novel),
        novel_help_shuffled=share_of(_inserted(g, error[other], d, rows.folds).sum(0) < 0, novel),
        known_hurt=share_of(inserted > 0, known),
        known_hurt_se=jackknife(share_of(change > 0, known) for change in without),
        swap_better=share_of(swap < inserted, known),
        swap_better_random=share_of(swap_random < inserted, known),
        swap_help=share_of(swap <= rounding, known),
        **{name: error / variance for name, error in fvu.items()},
        threshold=threshold,
        live=int(fired.sum()),
        d_small=small.d_sae,
        d_large=large.d_sae,
        rows=len(error),
        documents=len(rows.documents.unique()),
        cosines=cosines,
        nearest=nearest,
        inserted=inserted.where(fired, torch.nan).float(),
        swapped=swap.where(known, torch.nan).float(),
    )


def _inserted(g: Codes, error: Tensor, d: Tensor, folds: Tensor) -> Float[Tensor, "folds d_large"]:
    """Σ over each fold's rows of ‖e − g_j·d_j‖² − ‖e‖²."""
    along = kernels.inner_products(error, d, g.features, g.offsets).double()
    values = g.values.double()
    change = values**2 * d.double().pow(2).sum(1)[g.features] - 2 * values * along
    return summed(change, folds[g.rows] * len(d) + g.features, int(folds.max()) + 1, len(d))


def _removed(f: Codes, g: Codes, error: Tensor, c: Tensor, d: Tensor, nearest: Tensor) -> Float[Tensor, " d_large"]:
    """swapped_j − inserted_j, for removing small feature i = nearest[j]: E[f_i²]·‖c_i‖² + 2·E[f_i·(e·c_i)] −
    2·E[f_i·g_j]·(c_i·d_j)."""
    along = kernels.inner_products(error, c, f.features, f.offsets).double()
    values = f.values.double()
    change = values**2 * c.double().pow(2).sum(1)[f.features] + 2 * values * along
    alone = summed(change, f.features, len(c))[nearest]
    # Where the small feature fires beside the large one: its key among those of all active places.
    key, order = (f.rows * len(c) + f.features).sort()
    wanted = g.rows * len(c) + nearest[g.features]
    place = torch.searchsorted(key, wanted).clamp_max(max(len(key) - 1, 0))
    both = key[place] == wanted if len(key) else torch.zeros(len(wanted), dtype=torch.bool)
    together = summed(values[order[place[both]]] * g.values[both].double(), g.features[both], len(d))
    return (alone - 2 * together * (c[nearest] * d).sum(1).double()) / len(error)
