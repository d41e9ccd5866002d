from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import losses, portable
from sae_lab.saes.base import EVERY, SparseCoder, Wiring, check_weight
from sae_lab.types import Batch, Codes, Output

WARM_UP = 0.05  # of training, over which the sparsity weight rises from 0: without it many features die at once


class L1(SparseCoder):
    """``sl.L1(d_in=576, d_sae=4608, sparsity=5.0)``: the classic sparse autoencoder (Bricken et al. 2023, "Towards
    Monosemanticity"; Cunningham et al. 2023, arXiv:2309.08600).

        f = relu(pre)

    Loss: mse + sparsity · Σf. (In training decoder rows have unit norm, and activations norm √d_in.) The weight rises
    from 0 over the first 5 % of training. Base of the other families with a ReLU and a penalty.

    Args:
        sparsity: weight of the penalty; 5 is the usual start.
        drop: codes of at most ``drop`` are set to 0 in eval mode; in units of activations of norm √d_in. After training
            the buffer ``floor`` holds it in units of raw activations.
        d_in, d_sae, seed, d_out, skip: see ``sl.SparseCoder``.
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

    def eval_act(self):
        return portable.above, {"floor": self.floor}

    def act(self, pre: Float[Tensor, "..."], features: Tensor | slice = EVERY) -> Codes | Tensor:
        return pre.relu() if self.training else super().act(pre, features)

    def penalty(self, f: Codes | Tensor, progress: float) -> Float[Tensor, ""]:
        """The penalty, without its weight ``sparsity``."""
        return losses.l1(f)

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        weight = self.sparsity * min(1.0, progress / WARM_UP)
        penalty = weight * self.penalty(out.codes, progress)
        return super().terms(batch, out, progress=progress, dead=dead) | {"sparsity": penalty}


class Tied(L1):
    """``sl.Tied(d_in=576, d_sae=4608, sparsity=5.0)``: L1 whose encoder is the decoder's transpose (Cunningham et
    al. 2023, arXiv:2309.08600).

        f = relu((x − b_dec)·W_decᵀ + b_enc)

    Loss and arguments: as of ``sl.L1``, without d_out and skip. The one matrix gets both gradients.
    """

    tied = True

    def __init__(self, d_in: int, d_sae: int, sparsity: float = 5.0, drop: float = 0.0, seed: int = 0):
        super().__init__(d_in, d_sae, sparsity, drop, seed)

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        return self.W_dec.T
