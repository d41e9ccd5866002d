"""TopK: the k largest pre-activations of each token (Gao et al. 2024, arXiv:2406.04093)."""

from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import sparse
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Batch, Codes, Output


def check_k(k: int, d_sae: int) -> None:
    if not isinstance(k, int) or not 1 <= k <= d_sae:
        raise ValueError(f"k must be an integer from 1 to d_sae={d_sae}, got {k!r}")


class TopK(SparseCoder):
    """f = relu(the k largest of pre), others 0. Loss: mse + AuxK.

    Args: d_in, d_sae: widths. k: active features per token. k_aux: dead features that fit the residual (None: d_in/2).
    """

    def __init__(self, d_in: int, d_sae: int, k: int = 32, k_aux: int | None = None, seed: int = 0):
        super().__init__(d_in, d_sae, seed=seed, k=k, k_aux=k_aux)
        check_k(k, d_sae)
        if k_aux is not None and (not isinstance(k_aux, int) or k_aux < 1):
            raise ValueError(f"k_aux must be a positive integer, or None for d_in/2, got {k_aux!r}")
        self.k = k
        self.k_aux = k_aux or max(1, d_in // 2)

    def act(self, pre: Float[Tensor, "batch d_sae"]) -> Codes:
        return sparse.top_per_row(pre, self.k)

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        return super().terms(batch, out, progress=progress, dead=dead) | self.auxk(batch, out, dead, self.k_aux)
