from typing import Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_lab.saes import portable
from sae_lab.saes.base import EVERY, SparseCoder, Wiring, check_weight
from sae_lab.saes.families.l1 import WARM_UP
from sae_lab.types import Batch, Codes, Output

# With target_l0. What an active feature may cost (stiffness·share of sparsity), by the share that L0 is off: a feature
# too many costs about 1, so that L0 ends within some hundredths. Adam remembers large gradients for thousands of
# steps, in which θ would hardly move: hence the start at a few times the target, and no more cost beyond NEAR.
STIFFNESS, NEAR, HEAD = 50.0, 1.25, 4


class JumpReLU(SparseCoder):
    """``sl.JumpReLU(d_in=576, d_sae=4608, sparsity=1.0)``: each feature has a threshold that is learnt
    (Rajamanoharan et al. 2024, arXiv:2407.14435).

        f = relu(pre)·1[pre > θ], θ the parameter ``threshold`` " d_sae"

    Loss: mse + sparsity · L0; with ``TrainConfig(target_l0=T)`` mse + sparsity · 25T · (L0/T − 1)² (Gemma Scope 2,
    2025), beyond 1.25T with the slope that it has there, and θ starts where 4T features are active. A step has no
    gradient, so θ gets that of a kernel estimate, a rectangle of width ε: ∂f/∂θ = −θ/ε and ∂L0/∂θ = −1/ε where
    |pre − θ| < ε/2, else 0.

    Args:
        sparsity: cost of an active feature, in squared error (activations have norm √d_in in training).
        bandwidth: ε. start: θ at first. θ moves by about the learning rate a step, so that in short runs ``start`` sets
            L0 more than ``sparsity`` does.
        d_in, d_sae, seed, d_out, skip: see ``sl.SparseCoder``.
    """

    elementwise = True
    holds_l0 = True
    sparsity_name = "sparsity"
    code_units = ("b_enc", "threshold")

    def __init__(
        self, d_in: int, d_sae: int, sparsity: float = 1.0, bandwidth: float = 0.5, start: float = 0.1, seed: int = 0,
        **wiring: Unpack[Wiring],
    ):  # fmt: skip
        config = {"sparsity": sparsity, "bandwidth": bandwidth, "start": start}
        super().__init__(d_in, d_sae, config, seed=seed, **wiring)
        check_weight("sparsity", sparsity)
        check_weight("start", start)
        if not 0 < bandwidth < float("inf"):
            raise ValueError(f"bandwidth must be a positive number, got {bandwidth}: .5 is usual")
        self.sparsity, self.bandwidth = sparsity, bandwidth
        self.threshold = nn.Parameter(torch.full((d_sae,), float(start)))

    def act(self, pre: Float[Tensor, "..."], features: Tensor | slice = EVERY) -> Tensor:
        return _Jump.apply(pre, self.threshold[features], self.bandwidth)

    def training_threshold(self, codes: Codes | Tensor) -> Tensor:
        """The mean θ over features."""
        return self.threshold.detach().mean()

    def eval_act(self):
        return portable.above, {"floor": self.threshold.clamp_min(0)}

    def reach(self, pre: Float[Tensor, "batch d_sae"]) -> Bool[Tensor, "batch d_sae"]:
        """In training also a little below θ, since θ learns from there."""
        return pre > (self.threshold - self.bandwidth / 2 if self.training else self.threshold)

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        penalty = {"sparsity": JumpReLU.penalty(self, out, progress)}
        return super().terms(batch, out, progress=progress, dead=dead) | penalty

    def penalty(self, out: Output, progress: float) -> Tensor:
        """The cost of L0, also for a coder of another class that has this one's attributes."""
        weight = self.sparsity * min(1.0, progress / WARM_UP)
        if isinstance(out.codes, Codes):
            near = out.pre[out.codes.rows, out.codes.features]
            on = _Step.apply(near, self.threshold[out.codes.features], self.bandwidth)
        else:
            on = _Step.apply(out.pre, self.threshold, self.bandwidth)
        cost = l0 = on.sum() / len(out.pre)
        if self.target_l0 is not None:
            held = (l0.detach() / NEAR).clamp_min(self.target_l0)
            cost = STIFFNESS / 2 * held * (l0 / held - 1).square()
        return weight * cost

    @torch.no_grad()
    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        if self.target_l0 is not None and bool((self.threshold == self.config["start"]).all()):  # else trained before
            pre = self._read(self._rows(batch.x[:1024])[0]).flatten()
            most = min(len(pre), round(HEAD * self.target_l0 * len(batch.x[:1024])))
            self.threshold.clamp_min_(pre.topk(most, sorted=False).values.min())

    @torch.no_grad()
    def project(self) -> None:
        super().project()
        self.threshold.clamp_min_(0)


class _Jump(torch.autograd.Function):
    """relu(pre)·1[pre > θ]"""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return portable.above(pre, None, {"floor": threshold.clamp_min(0)})

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        nudge = -(g * near) * threshold / ctx.bandwidth
        return torch.where(pre > threshold.clamp_min(0), g, 0.0), nudge.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    """1[pre > θ], with a gradient for θ only"""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, -(g * near).sum_to_size(threshold.shape) / ctx.bandwidth, None
