"""BatchTopK: k active features per token on average over the batch (Bussmann et al. 2024, arXiv:2412.06410)."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes import portable, sparse
from sae_lab.saes.topk import TopK
from sae_lab.types import Codes


class BatchTopK(TopK):
    """Training: the batch*k largest pre-activations of the batch. Eval: f = pre·1[pre > θ], θ fitted on training data
    so that k features are active on average; a row's codes then depend on that row alone.

    ``threshold`` is θ; NaN until fitted, and eval mode then raises ValueError.
    """

    code_units = ("b_enc", "threshold")

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, k_aux: int | None = None, seed: int = 0, multi: int = 1,
        **wiring: Any,
    ):  # fmt: skip
        super().__init__(d_in, d_sae, k, k_aux, seed, multi, **wiring)
        self.register_buffer("threshold", torch.tensor(float("nan")))
        self.threshold: Tensor

    def act(self, pre: Float[Tensor, "batch d_sae"]) -> Codes:
        if self.training:
            return self._choose(pre, self.k)
        self._require_threshold()
        return sparse.above(pre, self.threshold)

    def _require_threshold(self) -> None:
        if bool(self.threshold.isnan()):
            raise ValueError(
                f"this {type(self).__name__} has no inference threshold yet: train it with sl.train, call "
                "sae.calibrate([activations]), or use sae.train() for batch-wise selection"
            )

    def eval_act(self):
        self._require_threshold()
        return portable.above, {"floor": self.threshold}

    def training_threshold(self, codes: Codes | Tensor) -> Tensor | None:
        """The least code that the batch left on."""
        values = codes.values if isinstance(codes, Codes) else codes
        on = values.detach()[values > 0]
        return on.min() if len(on) else None

    def _choose(self, pre: Tensor, k: float) -> Codes:
        return sparse.top_of_batch(pre, round(k * len(pre)))

    def fit_threshold(self, blocks: Iterable[Tensor]) -> None:
        """θ = the (k·rows)-th largest pre-activation of each block, averaged over the rows; never below 0."""
        self.train()
        total, rows = torch.zeros_like(self.threshold), 0
        for x in blocks:
            codes = self.codes(x)
            assert isinstance(codes, Codes)
            total += codes.values.min() * len(x)
            rows += len(x)
        self.threshold.copy_((total / rows).clamp_min(0))
