import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import portable
from sae_lab.saes.base import EVERY
from sae_lab.saes.families.l1 import L1
from sae_lab.types import Codes


class ProLU(L1):
    """``sl.ProLU(d_in=576, d_sae=4608, sparsity=5.0)``: the bias switches a feature on and off, and does not lower
    its code (Taggart 2024, "ProLU: A Nonlinearity for Sparse Autoencoders").

        f = m where m > 0 and m + b_enc > 0, else 0; m = (x − b_dec)·W_enc

    Loss and arguments: as of ``sl.L1``. The bias gets the gradient of relu(m + b_enc): 1 where the feature is on.
    """

    def act(self, pre: Float[Tensor, "..."], features: Tensor | slice = EVERY) -> Codes | Tensor:
        return _Switch.apply(pre, self.b_enc[features], 0.0 if self.training else self.floor)

    def eval_act(self):
        return portable.unlowered, {"b_enc": self.b_enc, "floor": self.floor}


class _Switch(torch.autograd.Function):
    """``portable.unlowered`` with ProLU's gradients. b gets its gradient through pre, which contains b."""

    @staticmethod
    def forward(ctx, pre, b, floor):
        f = portable.unlowered(pre, None, {"b_enc": b, "floor": floor})
        ctx.save_for_backward(f > 0)
        return f

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        (on,) = ctx.saved_tensors
        return torch.where(on, g, 0.0), None, None
