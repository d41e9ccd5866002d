"""L1 and Tied: the classic sparse autoencoders (Bricken et al. 2023; Cunningham et al. 2023, arXiv:2309.08600)."""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import losses, portable
from sae_lab.saes.base import EVERY, SparseCoder, Wiring
from sae_lab.types import Batch, Codes, Output

WARM_UP = 0.05  # of training, over which the sparsity weight rises from 0: without it many features die at once


class L1(SparseCoder):
    """f = relu(pre). Loss: mse + sparsity · Σf (decoder rows have unit norm, activations norm √d_in in training).

    Also the base of the other families with a ReLU and a penalty.

    Args: d_in, d_sae: widths. sparsity: weight of the penalty; 5 is the usual start. drop: in eval mode, codes up to it
    are set to 0 (in units of activations of norm √d_in while training; the buffer ``floor`` holds it in raw units).
    """

    elementwise = True
    sparsity_name = "sparsity"
    code_units = ("b_enc", "floor")

    def __init__(
        self, d_in: int, d_sae: int, sparsity: float = 5.0, drop: float = 0.0, seed: int = 0, **wiring: Unpack[Wiring]
    ):
        super().__init__(d_in, d_sae, {"sparsity": sparsity, "drop": drop}, seed=seed, **wiring)
        check_weight("sparsity", sparsity)
        check_weight("drop", drop)
        self.sparsity = sparsity
        self.register_buffer("floor", torch.tensor(float(drop)))
        self.floor: Tensor

    def act(self, pre: Float[Tensor, "..."], features: Tensor | slice = EVERY) -> Tensor:
        return pre.relu() if self.training else torch.where(pre > self.floor, pre, 0.0)

    def check_sparsity(self, value: float) -> None:
        check_weight("sparsity", value)

    def eval_act(self):
        return portable.above, {"floor": self.floor}

    def penalty(self, f: Codes | Tensor, progress: float) -> Float[Tensor, ""]:
        """What ``sparsity`` multiplies."""
        return losses.l1(f)

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        weight = self.sparsity * min(1.0, progress / WARM_UP)
        penalty = weight * self.penalty(out.codes, progress)
        return super().terms(batch, out, progress=progress, dead=dead) | {"sparsity": penalty}


class Tied(L1):
    """L1 whose encoder is the decoder's transpose: W_enc = W_decᵀ, one matrix with both gradients."""

    tied = True

    def __init__(self, d_in: int, d_sae: int, sparsity: float = 5.0, drop: float = 0.0, seed: int = 0):
        super().__init__(d_in, d_sae, sparsity, drop, seed)

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        return self.W_dec.T


def check_weight(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number of at least 0, got {value}")
