"""L1: the classic sparse autoencoder (Cunningham et al. 2023, arXiv:2309.08600; Bricken et al. 2023)."""

from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import losses
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Batch, Output

WARM_UP = 0.05  # of training, over which the sparsity weight rises from 0: without it many features die at once


class L1(SparseCoder):
    """f = relu(pre). Loss: mse + sparsity · Σf (decoder rows have unit norm, activations norm √d_in in training).

    Args: d_in, d_sae: widths. sparsity: weight of the L1 term; 5 is the usual start.
    """

    def __init__(self, d_in: int, d_sae: int, sparsity: float = 5.0, seed: int = 0):
        super().__init__(d_in, d_sae, seed=seed, sparsity=sparsity)
        if not sparsity >= 0:
            raise ValueError(f"sparsity must be a number of at least 0, got {sparsity}")
        self.sparsity = sparsity

    def act(self, pre: Float[Tensor, "batch d_sae"]) -> Tensor:
        return pre.relu()

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        weight = self.sparsity * min(1.0, progress / WARM_UP)
        return super().terms(batch, out, progress=progress, dead=dead) | {"sparsity": weight * losses.l1(out.f)}
