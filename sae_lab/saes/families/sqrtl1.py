from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import losses
from sae_lab.saes.families.l1 import L1
from sae_lab.types import Codes


class SqrtL1(L1):
    """``sl.SqrtL1(d_in=576, d_sae=4608, sparsity=5.0, drop=0.1)``: a penalty on the roots of codes (Riggs &
    Brinkmann 2024, "Improving SAE's by Sqrt()-ing L1 & Removing Lowest Activating Features").

        f = relu(pre)

    Loss: mse + sparsity · Σ√f, which shrinks strong codes less than L1 and weak ones more. Arguments: as of ``sl.L1``;
    ``drop`` removes weak codes in eval mode, as its authors do.
    """

    def penalty(self, f: Codes | Tensor, progress: float) -> Float[Tensor, ""]:
        return losses.lp(f, 0.5)
