"""Spline: each feature bends its own pre-activation (the KAN-SAE of an unpublished note; splines of Liu et al. 2024,
arXiv:2404.19756)."""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.saes import kernels, portable
from sae_lab.saes.base import Wiring
from sae_lab.saes.families.topk import TopK
from sae_lab.types import Codes


class Spline(TopK):
    """f = the k largest of h(pre), h_i(p) = p + Σ_b bend[i, b]·B_b(p): hats B_b on ``knots`` even places from −span to
    span. Starts as TopK (bend = 0). Loss: mse + AuxK.

    Args: knots: at least 2. span: where the hats end, in pre-activations (activations have norm √d_in in training).
    """

    takes_multi = False

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, knots: int = 8, span: float = 4.0, k_aux: int | None = None,
        seed: int = 0, **wiring: Unpack[Wiring],
    ):  # fmt: skip
        super().__init__(d_in, d_sae, k, k_aux, seed, **wiring)
        if not isinstance(knots, int) or knots < 2 or not 0 < span < float("inf"):
            raise ValueError(f"a spline needs knots >= 2 and span > 0, got knots={knots!r}, span={span}")
        self.config |= {"knots": knots, "span": span}
        self.bend = nn.Parameter(torch.zeros(d_sae, knots))
        self.register_buffer("span", torch.tensor(float(span)))
        self.span: Tensor

    code_units = ("b_enc", "span", "bend")

    def _bent(self, p: Tensor, features: Tensor) -> Tensor:
        """h at pre-activations p of these features."""
        knots = self.bend.shape[1]
        place = ((p + self.span) * ((knots - 1) / (2 * self.span))).clamp(0, knots - 1)
        left = place.detach().floor().long().clamp_max(knots - 2)
        share = place - left
        flat, at = self.bend.reshape(-1), features * knots + left
        return p + (1 - share) * flat[at] + share * flat[at + 1]

    def act(self, pre: Float[Tensor, "batch d_sae"]) -> Codes:
        return kernels.top_per_row(self._bent(pre, torch.arange(self.d_sae, device=pre.device)), self.k)

    def eval_act(self):
        return portable.bent, {"bend": self.bend, "span": self.span, "k": self.k}

    def _codes(self, x: Tensor) -> tuple[Tensor, Codes]:
        with torch.no_grad():
            pre = self._read(x)
            chosen = self.act(pre)
            chosen = chosen._replace(values=pre[chosen.rows, chosen.features])
        chosen = self._encode_at(chosen, x)
        return pre, chosen._replace(values=self._bent(chosen.values, chosen.features).relu())
