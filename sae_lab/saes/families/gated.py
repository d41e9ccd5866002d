from typing import Unpack

import torch
from torch import Tensor, nn

from sae_lab.saes import losses, portable
from sae_lab.saes.base import SparseCoder, Wiring, check_weight, weighted_sum
from sae_lab.saes.families.l1 import WARM_UP
from sae_lab.types import Batch, Codes, Output


class Gated(SparseCoder):
    """``sl.Gated(d_in=576, d_sae=4608, sparsity=5.0)``: one path decides which features are on, another how
    strongly (Rajamanoharan et al. 2024, arXiv:2404.16014).

        f = 1[pre > 0]·relu(e^r_mag·(pre − b_enc) + b_mag), b_enc the gate's bias

    Loss: mse + sparsity · Σrelu(pre) + ‖target − relu(pre)·W̄_dec − b̄_dec‖², the bar a stopped gradient, so that
    the penalty shrinks the gate's pre-activations and not the codes.

    Args: sparsity: weight of the penalty. d_in, d_sae, seed, d_out, skip: see ``sl.SparseCoder``.
    """

    elementwise = True
    sparsity_name = "sparsity"
    code_units = ("b_enc", "b_mag")

    def __init__(self, d_in: int, d_sae: int, sparsity: float = 5.0, seed: int = 0, **wiring: Unpack[Wiring]):
        super().__init__(d_in, d_sae, {"sparsity": sparsity}, seed=seed, **wiring)
        check_weight("sparsity", sparsity)
        self.sparsity = sparsity
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def eval_act(self):
        return portable.gated, {"r_mag": self.r_mag, "b_enc": self.b_enc, "b_mag": self.b_mag}

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        rows = self._rows(batch.x)[0]
        weight = self.sparsity * min(1.0, progress / WARM_UP)
        if isinstance(out.codes, Codes):
            opened = out.codes._replace(values=out.pre[out.codes.rows, out.codes.features])
            gate = self._encode_at(opened, rows)
        else:
            gate = out.pre.relu()
        frozen = weighted_sum(gate, self.W_dec.detach(), self.precision) + self.b_dec.detach()
        if self.W_skip is not None:
            frozen = frozen + rows @ self.W_skip.detach()
        return super().terms(batch, out, progress=progress, dead=dead) | {
            "sparsity": weight * losses.l1(gate),
            "gate": losses.mse(frozen, batch.target.flatten(1)),
        }
