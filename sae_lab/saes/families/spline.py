from typing import Unpack

import torch
from torch import Tensor, nn

from sae_lab.saes import portable
from sae_lab.saes.base import Wiring
from sae_lab.saes.families.topk import TopK
from sae_lab.types import Codes


class Spline(TopK):
    """``sl.Spline(d_in=576, d_sae=4608, k=32)``: each feature bends its own pre-activation by a spline (the
    KAN-SAE of an unpublished note; splines of Liu et al. 2024, arXiv:2404.19756).

        f = relu(the k largest of h(pre)), others 0; h_i(p) = p + Σ_b bend[i, b]·B_b(p)

    B_b: hat functions at ``knots`` evenly spaced points from −span to span; bend starts at 0 (TopK). Loss: mse + AuxK.

    Args: knots: at least 2. span: the last knot, in units of pre-activations (activations have norm √d_in in training).
    The others as of ``sl.TopK``.
    """

    takes_multi = False
    code_units = ("b_enc", "span", "bend")

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

    def eval_act(self):
        return portable.bent, {"bend": self.bend, "span": self.span, "k": self.k}

    def _codes(self, x: Tensor) -> tuple[Tensor, Codes]:
        with torch.no_grad():
            pre = self._read(x)
            chosen = self.act(pre)
            assert isinstance(chosen, Codes)
            chosen = chosen._replace(values=pre[chosen.rows, chosen.features])
        chosen = self._encode_at(chosen, x)
        return pre, chosen._replace(values=portable.bend(chosen.values, chosen.features, self.eval_act()[1]).relu())
