"""ProLU: a bias that only switches (Taggart 2024, "ProLU: A Nonlinearity for Sparse Autoencoders")."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import portable
from sae_lab.saes.base import EVERY
from sae_lab.saes.families.l1 import L1


class ProLU(L1):
    """m = (x − b_dec)·W_enc; f = m where m > 0 and m + b_enc > 0, else 0. Loss: mse + sparsity · Σf.

    Unlike in a ReLU the bias does not lower the code. As it then has no gradient either, it gets that of
    relu(m + b_enc): 1 where the feature is on.
    """

    def act(self, pre: Float[Tensor, "..."], features: Tensor | slice = EVERY) -> Tensor:
        return _Switch.apply(pre, self.b_enc[features], 0.0 if self.training else self.floor)

    def eval_act(self):
        return portable.unlowered, {"b_enc": self.b_enc, "floor": self.floor}



class _Switch(torch.autograd.Function):
    """pre − b where pre > 0 and pre − b > floor. pre depends on b: its gradient of 1 there is what b is to get."""

    @staticmethod
    def forward(ctx, pre, b, floor):
        m = pre - b
        on = (pre > 0) & (m > floor)
        ctx.save_for_backward(on)
        return torch.where(on, m, 0.0)

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        (on,) = ctx.saved_tensors
        return torch.where(on, g, 0.0), None, None
