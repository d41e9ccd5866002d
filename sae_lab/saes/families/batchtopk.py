from collections.abc import Iterable
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import kernels, portable
from sae_lab.saes.base import Wiring
from sae_lab.saes.families.topk import TopK
from sae_lab.types import Codes

SPARE = 1000  # for a wider gap around θ, one code in a thousand more or fewer than k may be on


class BatchTopK(TopK):
    """``sl.BatchTopK(d_in=576, d_sae=4608, k=32)``: k active features per token on average over the batch, so that
    tokens may differ in how many they take (Bussmann et al. 2024, arXiv:2412.06410).

        training:   f = relu(the rows·k largest of pre in the batch), others 0
        eval mode:  f = pre·1[pre > θ], so that a row's codes depend on that row alone

    Loss: mse + AuxK. θ is ``threshold``, fitted after training so that k features are active on average (within a
    thousandth). It is NaN until then, and eval mode raises ValueError. It lies in the middle of the widest gap between
    two codes, so that rounding turns none of them on or off. (The paper's θ is the mean over batches of the least
    chosen code, and a code may be equal to it.)

    Args: as of ``sl.TopK``; k: active features per token on average.
    """

    code_units = ("b_enc", "threshold")

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, k_aux: int | None = None, seed: int = 0, multi: int = 1,
        **wiring: Unpack[Wiring],
    ):  # fmt: skip
        super().__init__(d_in, d_sae, k, k_aux, seed, multi, **wiring)
        self.register_buffer("threshold", torch.tensor(float("nan")))
        self.threshold: Tensor

    def act(self, pre: Float[Tensor, "batch d_sae"]) -> Codes:
        return self._choose(pre, self.k) if self.training else kernels.above(pre, self.eval_act()[1]["floor"])

    def eval_act(self):
        if bool(self.threshold.isnan().any()):
            raise ValueError(
                f"this {type(self).__name__} has no inference threshold yet: train it with sl.train, call "
                "sae.calibrate([activations]), or use sae.train() for batch-wise selection"
            )
        return portable.above, {"floor": self.threshold}

    def training_threshold(self, codes: Codes | Tensor) -> Tensor | None:
        """The least code that the batch left on."""
        values = codes.values if isinstance(codes, Codes) else codes
        on = values.detach()[values > 0]
        return on.min() if len(on) else None

    def _choose(self, pre: Tensor, k: float) -> Codes:
        return self.select.of_batch(pre, k)

    @torch.no_grad()
    def fit_threshold(self, blocks: Iterable[Tensor]) -> None:
        """θ between the k·rows largest pre-activations of all blocks and the others; 0 where fewer are above 0."""
        blocks = list(blocks)
        n = self.k * sum(map(len, blocks))
        if not n:
            raise ValueError("the threshold is fitted on activations, got no row of them")
        most = n + n // SPARE + 1  # the largest pre-activations, which suffice to find θ
        values, least = self.threshold.new_empty(0), 0.0
        for x in blocks:
            pre = self._ranked(self._read(self._enter(self._rows(x)[0])[0]))
            values = torch.cat([values, kernels.above(pre, least).values])
            if len(values) >= most:
                values = values.topk(most, sorted=False).values
                least = float(values.min())
        self.threshold.copy_(widest_gap(self.select.everywhere(values), n, n // SPARE))

    def _ranked(self, pre: Tensor) -> Tensor:
        """The numbers of which the largest are chosen."""
        return pre


def widest_gap(values: Float[Tensor, " some"], n: int, spare: int) -> Tensor:
    """The middle of the widest gap between two neighbours among values > 0 that leaves n of them above it, up to
    ``spare`` more or fewer; 0 for at most n values.

    If these neighbours are all equal, so that there is no gap, none of them exceeds the result.
    """
    ordered = values.sort().values
    if len(ordered) <= n:
        return ordered.new_zeros(())
    near = ordered[max(0, len(ordered) - n - spare - 1) : len(ordered) - n + spare + 1]
    gaps = near.diff()
    at = int(gaps.argmax())
    low, high = near[at], near[at + 1]
    if low == high:
        higher = ordered[ordered > low]
        high = higher[0] if len(higher) else low
    return low + (high - low) / 2
