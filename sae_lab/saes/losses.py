"""Loss terms: plain functions of tensors, in squared units of the (normalised) activations."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import kernels
from sae_lab.types import Codes

LEAST = 1e-3  # codes below (of norm √d_in in all) get no gradient from roots, whose slope at 0 is infinite


def mse(x_hat: Float[Tensor, "batch *d"], target: Float[Tensor, "batch *d"]) -> Float[Tensor, ""]:
    """Squared error summed over the axes of an activation, averaged over the batch."""
    return torch.nn.functional.mse_loss(x_hat, target, reduction="sum") / len(target)


def fvu(x_hat: Float[Tensor, "batch *d"], target: Float[Tensor, "batch *d"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained: Σ‖x−x̂‖² / Σ‖x−x̄‖², x̄ the mean of these rows."""
    return (x_hat - target).pow(2).sum() / (target - target.mean(0)).pow(2).sum()


def _row_sums(f: Codes | Tensor, of: Callable[[Tensor], Tensor]) -> Float[Tensor, " batch"]:
    """Σ of(code) for each row of dense or sparse codes; of(0) must be 0."""
    if isinstance(f, Tensor):
        return of(f).sum(-1)
    return f.values.new_zeros(len(f.offsets) - 1).index_add(0, f.rows, of(f.values))


def l1(f: Codes | Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
    """Sum of the codes, averaged over the batch (decoder rows have unit norm)."""
    return _row_sums(f, torch.abs).mean()


def lp(f: Codes | Float[Tensor, "batch d_sae"], p: float) -> Float[Tensor, ""]:
    """Σf^p, averaged over the batch, for codes f >= 0 and 0 < p <= 1."""
    if p == 1:
        return l1(f)
    return _row_sums(f, lambda v: torch.where(v > 0, v.clamp_min(LEAST).pow(p), 0.0)).mean()


def hoyer(f: Codes | Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
    """(Σf)²/Σf², between 1 (one feature active) and d_sae (all alike), averaged over the batch; 0 for rows of zeros.

    Hoyer-Square (Yang et al. 2019, arXiv:1908.09979): the number of active features where they are equally strong.
    """
    return (_row_sums(f, torch.abs).pow(2) / _row_sums(f, torch.square).clamp_min(LEAST**2)).mean()


def smooth_l0(f: Codes | Float[Tensor, "batch d_sae"], width: float) -> Float[Tensor, ""]:
    """Σ 1 − exp(−f²/2·width²), averaged over the batch: the count of codes well above ``width`` (Mohimani et al. 2008,
    arXiv:0809.2508)."""
    return _row_sums(f, lambda v: 1 - (-v.pow(2) / (2 * width**2)).exp()).mean()


def prefix(
    codes: Codes, W_dec: Float[Tensor, "d_sae d_out"], target: Float[Tensor, "batch d_out"],
    weights: Float[Tensor, " d_sae"],
) -> Float[Tensor, ""]:  # fmt: skip
    """Σ_ℓ weights[ℓ-1]·‖target − Σ_{i<ℓ} f_i·W_dec[i]‖², averaged over the batch: the error of every prefix of the
    dictionary, of ℓ = 1 to d_sae features. (Subtract b_dec from the target.)

    Matryoshka gives a few prefixes weight, Ordered gives all. A prefix reconstructs otherwise than the one before only
    where its last feature is active, so all of them cost batch·L0·d_out, whatever the weights.
    """
    if int((weights > 0).sum()) <= 16:
        return _FewPrefixes.apply(codes.values, W_dec, target, codes, weights)
    return _AllPrefixes.apply(codes.values, W_dec, target, codes.features, codes.offsets, weights)


class _FewPrefixes(torch.autograd.Function):
    """One decode for each group of features between two prefixes that count; their running sum is the prefixes'
    reconstructions. A group owns a stretch of W_dec, so that all their gradients together are as large as it once."""

    @staticmethod
    def forward(ctx, values, W_dec, target, codes, weights):
        rows, batch = codes.rows, len(target)
        counted = weights.nonzero().flatten()
        groups, residuals, total, start = [], [], target.new_zeros(()), 0
        residual = -target
        for end, weight in zip((counted + 1).tolist(), weights[counted].tolist(), strict=True):
            mine = ((codes.features >= start) & (codes.features < end)).nonzero().flatten()
            offsets = torch.searchsorted(rows[mine], torch.arange(batch + 1, device=rows.device))
            group = Codes(values[mine], codes.features[mine] - start, offsets, end - start)
            residual = residual + kernels.weighted_rows(group.values, group.features, offsets, W_dec[start:end])
            total += weight * residual.pow(2).sum()
            residuals.append((weight, residual))
            groups.append((start, end, mine, group))
            start = end
        ctx.save_for_backward(W_dec)
        ctx.groups, ctx.residuals, ctx.active = groups, residuals, len(values)
        return total / batch

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        (W_dec,), groups, residuals = ctx.saved_tensors, ctx.groups, ctx.residuals
        pull = torch.zeros_like(residuals[0][1])  # the weighted residuals of this prefix and of all longer ones
        active = groups[0][3].values.new_zeros(ctx.active)
        grad_W = torch.zeros_like(W_dec)  # of features behind the last prefix it stays 0
        for (start, end, mine, group), (weight, residual) in zip(groups[::-1], residuals[::-1], strict=True):
            pull.addcmul_(residual, 2 * weight / len(pull) * g)
            active[mine] = kernels.inner_products(pull, W_dec[start:end], group.features, group.offsets)
            kernels.ByFeature(group).sum(group.values, pull, out=grad_W[start:end])
        return active, grad_W, -pull, None, None


CHUNK = 1 << 22  # numbers in one piece of _AllPrefixes: 16 MiB


class _AllPrefixes(torch.autograd.Function):
    """The residual after each active feature, a few rows at a time; gradients are made along the way."""

    @staticmethod
    def forward(ctx, values, W_dec, target, features, offsets, weights):
        before = torch.cat([weights.new_zeros(1), weights.cumsum(0)])  # the weight of prefixes up to a length
        batch, d_out = target.shape
        counts = offsets.diff()
        grad_values, grad_W, grad_target = torch.zeros_like(values), torch.zeros_like(W_dec), torch.zeros_like(target)
        total = target.new_zeros(())
        by_count = counts.argsort()  # rows of like length share a piece
        lengths = counts[by_count].tolist()
        start = 0
        while start < batch:
            stop = start + 1
            while stop < batch and (stop + 1 - start) * (lengths[stop] + 1) * d_out <= CHUNK:
                stop += 1
            rows, width = by_count[start:stop], lengths[stop - 1]
            slot = torch.arange(width, device=values.device)
            real = slot < counts[rows, None]
            place = torch.where(real, offsets[rows, None] + slot, 0)
            feature, order = torch.where(real, features[place], len(W_dec)).sort(dim=1)
            place, real = place.gather(1, order), real.gather(1, order)
            feature = torch.where(real, feature, len(W_dec))
            f = torch.where(real, values[place], 0.0)
            # After how many features (0 to width) the reconstruction stands still, and what that stretch weighs.
            ends = torch.cat([torch.zeros_like(rows)[:, None], feature], 1)
            nexts = torch.cat([feature, torch.full_like(rows, len(W_dec))[:, None]], 1)
            w = before[nexts] - before[ends]
            atoms = W_dec[feature.clamp_max(len(W_dec) - 1)]
            steps = torch.cat([target[rows, None], -f[..., None] * atoms], 1)
            residual = steps.cumsum_(1)
            total += (w * residual.pow(2).sum(-1)).sum()
            pull = residual.mul_(w[..., None]).flip(1).cumsum(1).flip(1)  # the weighted residuals from here on
            grad_target[rows] = 2 * pull[:, 0]
            pull = pull[:, 1:]
            grad_values[place[real]] = (-2 * (pull * atoms).sum(-1))[real]
            grad_W.index_add_(0, feature[real], (-2 * f[..., None] * pull)[real])
            start = stop
        ctx.save_for_backward(grad_values, grad_W, grad_target)
        return total / batch

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        grad_values, grad_W, grad_target = ctx.saved_tensors
        scale = g / len(grad_target)
        return grad_values * scale, grad_W * scale, grad_target * scale, None, None, None


@torch.no_grad()
def geometric_median(x: Float[Tensor, "rows d"], steps: int = 30) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows (Weiszfeld's iteration), a start for b_dec."""
    middle = x.mean(0)
    for _ in range(steps):
        weights = 1 / (x - middle).norm(dim=-1).clamp_min(1e-6)
        middle = (weights[:, None] * x).sum(0) / weights.sum()
    return middle
