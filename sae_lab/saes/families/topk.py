from typing import Unpack

from torch import Tensor

from sae_lab.arguments import check_least
from sae_lab.saes import losses, portable
from sae_lab.saes.base import SparseCoder, Wiring, check_k
from sae_lab.types import Batch, Output

MULTI_WEIGHT = 1 / 8  # Gao et al., their Multi-TopK


class TopK(SparseCoder):
    """``sl.TopK(d_in=576, d_sae=4608, k=32)``: the k largest pre-activations of each token (Gao et al. 2024,
    arXiv:2406.04093).

        f = relu(the k largest of pre), others 0

    Loss: mse + AuxK, and with ``multi`` also mse(the multi·k largest)/8.

    Args:
        k: active features per token. k_aux: dead features that fit the residual; None: d_in/2.
        multi: Multi-TopK, 4 in the paper: the coder also reconstructs well with more than k features. 1: without it.
        d_in, d_sae, seed, d_out, skip: see ``sl.SparseCoder``.
    """

    takes_multi = True
    sparsity_name = "k"

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, k_aux: int | None = None, seed: int = 0, multi: int = 1,
        **wiring: Unpack[Wiring],
    ):  # fmt: skip
        config = {"k": k, "k_aux": k_aux} | ({"multi": multi} if multi != 1 else {})
        super().__init__(d_in, d_sae, config, seed=seed, **wiring)
        check_k(k, d_sae)
        if k_aux is not None and k_aux < 1:
            raise ValueError(f"k_aux must be a positive integer, or None for d_in/2, got {k_aux!r}")
        check_least(1, multi=multi)
        if multi > 1 and not self.takes_multi:
            raise ValueError(f"{type(self).__name__} has no Multi-TopK: leave multi={multi} out, or take TopK")
        self.k, self.multi = k, multi
        self.k_aux = k_aux or max(1, d_in // 2)

    def eval_act(self):
        return portable.largest, {"k": self.k}

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        terms = super().terms(batch, out, progress=progress, dead=dead)
        if self.multi > 1:
            rows = self._rows(batch.x)[0]
            more = self._encode_at(self._choose(out.pre, min(self.multi * self.k, self.d_sae)), rows)
            x_hat = self._write(more._replace(values=more.values.relu()), rows, batch.tokens)
            terms["multi"] = MULTI_WEIGHT * losses.mse(x_hat, batch.target.flatten(1))
        return terms | self.auxk(batch, out, dead, self.k_aux)
