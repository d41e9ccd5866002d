from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from sae_lab.saes import losses
from sae_lab.saes.base import Wiring
from sae_lab.saes.families.batchtopk import BatchTopK
from sae_lab.types import Batch, Codes, Output


def check_prefixes(prefixes: Sequence[int], d_sae: int) -> tuple[int, ...]:
    """The prefixes as a tuple. ValueError unless they rise to d_sae."""
    ends = tuple(prefixes)
    rising = all(isinstance(e, int) for e in ends) and all(a < b for a, b in zip((0, *ends), ends, strict=False))
    if not ends or not rising or ends[-1] != d_sae:
        raise ValueError(
            f"prefixes must be rising numbers of features that end with d_sae={d_sae}, got {ends}: "
            f"try {tuple(d_sae // n for n in (16, 8, 4, 2, 1) if d_sae >= n)}"
        )
    return ends


class Matryoshka(BatchTopK):
    """``sl.Matryoshka(d_in=576, d_sae=4608, k=32)``: the first features must reconstruct without the later ones
    (Bussmann et al. 2025, arXiv:2503.17547).

        f as of BatchTopK

    Loss: AuxK + the mean over ℓ of ‖target − Σ_{i<ℓ} f_i·W_dec[i] − b_dec‖², ℓ the prefixes of the dictionary.

    Args: prefixes: rising numbers of features, the last d_sae; None: d_sae/16, /8, /4, /2 and d_sae. The others as of
    ``sl.TopK``.
    """

    takes_multi = False

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, prefixes: Sequence[int] | None = None, k_aux: int | None = None,
        seed: int = 0, **wiring: Unpack[Wiring],
    ):  # fmt: skip
        super().__init__(d_in, d_sae, k, k_aux, seed, **wiring)
        if prefixes is None:
            prefixes = sorted({d_sae // n for n in (16, 8, 4, 2, 1) if d_sae >= n})
        self.prefixes = check_prefixes(prefixes, d_sae)
        self.config["prefixes"] = list(self.prefixes)

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        weights = torch.zeros(self.d_sae, device=self.W_dec.device)
        weights[torch.tensor(self.prefixes) - 1] = 1 / len(self.prefixes)
        return prefix_terms(self, batch, out, dead, weights)


def prefix_terms(coder: BatchTopK, batch: Batch, out: Output, dead: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The prefix loss in place of mse, and AuxK."""
    target = batch.target.flatten(1) - coder.b_dec
    if coder.W_skip is not None:
        target = target - coder._rows(batch.x)[0] @ coder.W_skip
    assert isinstance(out.codes, Codes)
    loss = losses.prefix(out.codes, coder.W_dec, target, weights)
    return {"mse": loss} | coder.auxk(batch, out, dead, coder.k_aux)
