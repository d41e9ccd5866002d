"""Loss terms: plain functions of tensors, in nats of nothing: squared units of the (normalised) activations."""

import torch
from jaxtyping import Float
from torch import Tensor


def mse(x_hat: Float[Tensor, "batch d"], target: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """Squared error summed over the axes of an activation, averaged over the batch."""
    return (x_hat - target).pow(2).sum(-1).mean()


def fvu(x_hat: Float[Tensor, "batch d"], target: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained: Σ‖x−x̂‖² / Σ‖x−x̄‖², x̄ the mean of these rows."""
    return (x_hat - target).pow(2).sum() / (target - target.mean(0)).pow(2).sum()


def l1(f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
    """Sum of the codes, averaged over the batch (decoder rows have unit norm)."""
    return f.abs().sum(-1).mean()


@torch.no_grad()
def geometric_median(x: Float[Tensor, "rows d"], steps: int = 30) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows (Weiszfeld's iteration), a start for b_dec."""
    middle = x.mean(0)
    for _ in range(steps):
        weights = 1 / (x - middle).norm(dim=-1).clamp_min(1e-6)
        middle = (weights[:, None] * x).sum(0) / weights.sum()
    return middle
