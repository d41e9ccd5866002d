from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import losses
from sae_lab.saes.base import Wiring
from sae_lab.saes.families.l1 import L1
from sae_lab.types import Batch, Codes

STEPS = 20  # in which p falls; each changes the weight c


class PAnneal(L1):
    """``sl.PAnneal(d_in=576, d_sae=4608, sparsity=5.0, p_end=0.2)``: an L_p penalty whose p falls from 1 (Karvonen
    et al. 2024, arXiv:2408.00113).

        f = relu(pre)

    Loss: mse + sparsity · c · Σf^p. p falls from 1 to ``p_end`` between a tenth and nine tenths of training; when p
    changes, c changes with it, so that the penalty of that batch stays the same.

    Args: sparsity: weight of the penalty. p_end: the last p, in (0, 1]. The others as of ``sl.L1``.
    """

    def __init__(
        self, d_in: int, d_sae: int, sparsity: float = 5.0, p_end: float = 0.2, drop: float = 0.0, seed: int = 0,
        **wiring: Unpack[Wiring],
    ):  # fmt: skip
        super().__init__(d_in, d_sae, sparsity, drop, seed, **wiring)
        self.config["p_end"] = p_end
        if not 0 < p_end <= 1:
            raise ValueError(f"p_end must lie in (0, 1], got {p_end}: .2 is usual, 1 is L1")
        self.p_end = p_end
        self.register_buffer("p", torch.ones((), dtype=torch.float64))
        self.register_buffer("p_weight", torch.ones(()))
        self.p: Tensor
        self.p_weight: Tensor

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self.p.fill_(1.0)
        self.p_weight.fill_(1.0)

    def penalty(self, f: Codes | Tensor, progress: float) -> Float[Tensor, ""]:
        share = round(min(max((progress - 0.1) / 0.8, 0.0), 1.0) * STEPS) / STEPS
        p, before = 1 - (1 - self.p_end) * share, float(self.p)
        if p != before:
            with torch.no_grad():
                now = losses.lp(f, p)
                if now > 0:
                    self.p_weight *= losses.lp(f, before) / now
                self.p.fill_(p)
        return self.p_weight * losses.lp(f, p)
