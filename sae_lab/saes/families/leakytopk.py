from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes.base import Wiring
from sae_lab.saes.families.topk import TopK
from sae_lab.types import Codes


class LeakyTopK(TopK):
    """``sl.LeakyTopK(d_in=576, d_sae=4608, k=32, leak=0.1)``: features outside the top k pass a little (Quaisley
    2024, "Alternative sparsity methods for SAEs with OthelloGPT", which does not give the size of the leak).

        f = relu(pre), times leak·(1 − progress) outside the k largest; progress runs from 0 to 1 over training

    At first every feature has a gradient; at the end of training, and in eval mode, this is TopK. Loss: mse + AuxK.

    Args: leak: in [0, 1). The others as of ``sl.TopK``.
    """

    dense = True

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, leak: float = 0.1, k_aux: int | None = None, seed: int = 0,
        **wiring: Unpack[Wiring],
    ):  # fmt: skip
        super().__init__(d_in, d_sae, k, k_aux, seed, **wiring)
        self.config["leak"] = leak
        if not 0 <= leak < 1:
            raise ValueError(f"leak must lie in [0, 1), got {leak}: 0 is TopK, .1 a usual leak")
        self.leak = leak

    def act(self, pre: Float[Tensor, "batch d_sae"]) -> Codes | Tensor:
        top = self._choose(pre, self.k)
        if not self.training:
            return top._replace(values=top.values.relu())
        share = torch.full_like(pre, self.leak * (1 - self.progress))
        share[top.rows, top.features] = 1.0
        return share * pre.relu()
