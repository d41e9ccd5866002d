from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import losses
from sae_lab.saes.base import Wiring, check_weight
from sae_lab.saes.families.l1 import L1
from sae_lab.types import Codes


class SmoothL0(L1):
    """``sl.SmoothL0(d_in=576, d_sae=4608, sparsity=1.0, width=0.3)``: a differentiable count of active features
    (Mohimani et al. 2008, arXiv:0809.2508; on SAEs, in another form, Quaisley 2024).

        f = relu(pre)

    Loss: mse + sparsity · Σ 1 − exp(−f²/2w²), w falling from 3·width to ``width`` over training.

    Args: sparsity: cost of an active feature, in squared error. width: codes well above it count as active; in units of
    activations of norm √d_in. The others as of ``sl.L1``.
    """

    def __init__(
        self, d_in: int, d_sae: int, sparsity: float = 1.0, width: float = 0.3, drop: float = 0.0, seed: int = 0,
        **wiring: Unpack[Wiring],
    ):  # fmt: skip
        super().__init__(d_in, d_sae, sparsity, drop, seed, **wiring)
        self.config["width"] = width
        check_weight("width", width)
        if width == 0:
            raise ValueError(f"width must be above 0, got {width}: at 0 the count has no gradient")
        self.width = width

    def penalty(self, f: Codes | Tensor, progress: float) -> Float[Tensor, ""]:
        return losses.smooth_l0(f, self.width * 3 ** (1 - progress))
