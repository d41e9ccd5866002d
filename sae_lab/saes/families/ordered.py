from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes.base import Wiring
from sae_lab.saes.families.batchtopk import BatchTopK
from sae_lab.saes.families.matryoshka import prefix_terms
from sae_lab.types import Batch, Codes, Output


class Ordered(BatchTopK):
    """``sl.Ordered(d_in=576, d_sae=4608, k=32)``: every prefix of the dictionary must reconstruct without the rest,
    so that the commonest directions come first, in the same order from any seed (OSAE: "Enforcing Orderedness in SAEs
    to Improve Feature Consistency", 2025).

        f as of BatchTopK, with k falling from k_start over the first half of training

    Loss: AuxK + the mean over ℓ = 1 to d_sae of ‖target − Σ_{i<ℓ} f_i·W_dec[i] − b_dec‖².

    Args: k_start: active features per token at first; None: min(d_sae, 4k). The others as of ``sl.TopK``.
    """

    takes_multi = False

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, k_start: int | None = None, k_aux: int | None = None, seed: int = 0,
        **wiring: Unpack[Wiring],
    ):  # fmt: skip
        super().__init__(d_in, d_sae, k, k_aux, seed, **wiring)
        self.config["k_start"] = k_start
        if k_start is not None and not k <= k_start <= d_sae:
            raise ValueError(f"k_start must lie from k={k} to d_sae={d_sae}, got {k_start}")
        self.k_start = k_start or min(d_sae, 4 * k)

    def check_sparsity(self, value: float) -> None:
        super().check_sparsity(value)
        if self.config["k_start"] is not None and value > self.k_start:
            raise ValueError(f"k must be at most k_start={self.k_start}, got {value}: k_start=None makes it follow k")

    def set_sparsity(self, value: float) -> None:
        super().set_sparsity(value)
        if self.config["k_start"] is None:
            self.k_start = min(self.d_sae, 4 * self.k)

    def act(self, pre: Float[Tensor, "batch d_sae"]) -> Codes:
        if not self.training:
            return super().act(pre)
        k = self.k + (self.k_start - self.k) * max(0.0, 1 - 2 * self.progress)
        return self._choose(pre, k)

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        weights = torch.full((self.d_sae,), 1 / self.d_sae, device=self.W_dec.device)
        return prefix_terms(self, batch, out, dead, weights)
