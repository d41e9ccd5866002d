"""SqrtL1: a penalty on the roots of codes (Riggs & Brinkmann 2024, "Improving SAE's by Sqrt()-ing L1 & Removing Lowest
Activating Features")."""

from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import losses
from sae_lab.saes.families.l1 import L1
from sae_lab.types import Codes


class SqrtL1(L1):
    """f = relu(pre). Loss: mse + sparsity · Σ√f: strong codes are shrunk less than by L1, weak ones more.

    ``drop`` removes weak codes in eval mode, as its authors do.
    """

    def penalty(self, f: Codes | Tensor, progress: float) -> Float[Tensor, ""]:
        return losses.lp(f, 0.5)
