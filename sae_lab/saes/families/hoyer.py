"""Hoyer: a scale-free penalty (Quaisley 2024, "Alternative sparsity methods for SAEs with OthelloGPT"; Hoyer-Square of
arXiv:1908.09979)."""

from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import losses
from sae_lab.saes.families.l1 import L1
from sae_lab.types import Codes


class Hoyer(L1):
    """f = relu(pre). Loss: mse + sparsity · (Σf)²/Σf², which shrinking all codes alike does not lower.

    The penalty is at most d_sae, so ``sparsity`` is larger by d_in/L0 or so than for L1.
    """

    def penalty(self, f: Codes | Tensor, progress: float) -> Float[Tensor, ""]:
        return losses.hoyer(f)
