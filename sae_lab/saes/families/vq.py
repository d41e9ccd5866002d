import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import portable
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.kernels import T
from sae_lab.types import Batch, Codes


class VQ(SparseCoder):
    """``sl.VQ(d_in=576, d_sae=4608)``: one code word per token (van den Oord et al. 2017, arXiv:1711.00937; on
    activations O'Neill & Bui 2024, arXiv:2405.12522).

        f = 1 for the row of W_dec nearest to x − b_dec, others 0

    Loss: mse. The code book is the encoder: pre = (x − b_dec)·W_decᵀ − ‖W_dec‖²/2 is largest where the distance is
    least. The paper's commitment term has no gradient then, and is left out. The book starts as tokens of the first
    batch; ``sl.saes.resample`` revives words that die.

    Args: d_sae: code words. d_in, seed: see ``sl.SparseCoder``.
    """

    tied = True
    code_units = ()

    def __init__(self, d_in: int, d_sae: int, seed: int = 0):
        super().__init__(d_in, d_sae, {}, seed=seed)
        del self.b_enc  # it is computed from the book

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        return self.W_dec.T

    def read_bias(self) -> Tensor:
        return -self.b_dec @ self.W_dec.T - self.W_dec.pow(2).sum(1) / 2

    def act(self, pre: Float[Tensor, "batch d_sae"]) -> Codes:
        nearest = self._choose(pre, 1)
        return nearest._replace(values=torch.ones_like(nearest.values))

    def eval_act(self):
        return portable.nearest, {}

    def _encode_at(self, codes: T, x: Tensor) -> T:
        return codes

    @torch.no_grad()
    def begin(self, batch: Batch) -> None:
        if bool(self.b_dec.any()):  # trained before
            return
        super().begin(batch)
        generator = torch.Generator().manual_seed(int(self.config["seed"]))
        rows = torch.randint(len(batch.target), (self.d_sae,), generator=generator).to(batch.target.device)
        self.W_dec.copy_(batch.target[rows] - self.b_dec)

    def fold(self, scale: float | Tensor, target_scale: float | Tensor | None = None) -> None:
        """Rescale the book, which has the units of activations; its codes, 0 or 1, have none."""
        assert target_scale is None or target_scale is scale, "a code book has one scale"
        super().fold(scale, scale)
        with torch.no_grad():
            self.W_dec /= scale

    def project(self) -> None:
        """Code words keep their length."""
