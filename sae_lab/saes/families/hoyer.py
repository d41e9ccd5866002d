from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import losses
from sae_lab.saes.families.l1 import L1
from sae_lab.types import Codes


class Hoyer(L1):
    """``sl.Hoyer(d_in=576, d_sae=4608, sparsity=50.0)``: a penalty that scaling all codes down does not lower
    (Hoyer-Square, Yang et al. 2019, arXiv:1908.09979; on SAEs Quaisley 2024, "Alternative sparsity methods for SAEs
    with OthelloGPT").

        f = relu(pre)

    Loss: mse + sparsity · (Σf)²/Σf².

    Args: sparsity: weight of the penalty, about d_in/L0 times that of L1 (the penalty is at most d_sae). The others as
    of ``sl.L1``.
    """

    def penalty(self, f: Codes | Tensor, progress: float) -> Float[Tensor, ""]:
        return losses.hoyer(f)
