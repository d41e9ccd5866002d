"""TrainConfig: how to train, and what it refuses."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from sae_lab.activations.store import Harvested, Rows
from sae_lab.arguments import Count, as_annotated, check_least
from sae_lab.types import Site, as_sites

MAX_LR = 1e30  # beyond it one step overflows float32 before the loss can say so
Shard = Literal["batch", "features"]
Precision = Literal["float32", "tf32", "bf16"]
Objective = Literal["reconstruction", "kl", "ce"]


@as_annotated
@dataclass(frozen=True)
class TrainConfig:
    """How to train: ``sl.train(sae, store, sl.TrainConfig(tokens=1_000_000))``. Give ``tokens`` or ``steps``.

    Args:
        tokens, steps: how long to train, in tokens or in batches.
        batch_size: tokens in a batch.
        lr: Adam's peak learning rate; None is 2e-3·sqrt(4608/d_sae), so that wider coders learn slower.
        warmup, decay: shares of the steps over which lr rises from 0 and falls to 0.
        seed: of the order of tokens.
        dead_after: a feature that fires on none of this many tokens counts as dead, and AuxK revives it.
        log_every: steps from one row of ``Run.history`` to the next.
        checkpoint_every: steps from one checkpoint to the next (only with ``path=``).
        target_l0: active features per token, in eval mode on held-out tokens, to which a penalty is to bring them: a
            JumpReLU's by a cost of (L0/target_l0 − 1)² in place of one of L0; that of L1, Gated and their kin by a
            controller, which moves ``sparsity``, from a tenth of the coder's, and rests for the last fifth of training.
            ``Run.reached`` says how near it came. Families with k refuse it, as do several processes.
        shard: what several processes (``sl.train`` under torchrun) divide: "batch", each takes its rows of every batch;
            "features", each holds a part of the coder, which may then be wider than one device can hold.
        precision: of the dense products, x·W_enc, and f·W_dec where most codes are on: "float32"; "tf32", float32 whose
            numbers are rounded to 10 bits, on NVIDIA's GPUs from 2020 on; "bf16", numbers and result of 8 bits, on
            devices that multiply bfloat16. Weights, sums over active features, losses and Adam's moments are float32
            with each, as are checkpoints, figures of held-out tokens and the finished coder.
        objective: "reconstruction": the family's own loss. "kl" and "ce" add the loss through the model with the coder
            spliced in at the site it writes, where ``sl.Splice`` would change it (not at position 0, special and very
            large tokens): the KL of its next-token distributions from the clean ones, or its cross-entropy on the text
            (nats/token, over all tokens of a context). For coders of one site, on an ``sl.Stream`` of a model on this
            machine, in one process. A batch is then whole contexts in the order of the text, whatever the seed, and its
            clean logits are kept: batch_size × vocabulary numbers. Few tokens of it finetune a trained coder.
        share: of the loss through the model: 0 is plain training on these batches, .5 weighs it as much as the mse, 1
            leaves the mse out. In each batch it is scaled to the size of the mse: (1 - share)·mse + share·(mse/KL)·loss
            (Karvonen 2025, arXiv:2503.17272, with .5; Braun et al. 2024, arXiv:2405.12241, with 1). ``Run.history`` has
            kl, ce, and as "through" the scaled loss.
        downstream: later sites, such as ("resid_post-16",), whose activations are also to stay as they are without the
            coder; their squared distance counts as much as the KL.
    """

    tokens: int | None = None
    steps: int | None = None
    batch_size: int = 4096
    lr: float | None = None
    warmup: float = 0.05
    decay: float = 0.2
    seed: int = 0
    dead_after: int = 100_000
    log_every: int = 1
    checkpoint_every: int = 100
    target_l0: float | None = None
    shard: Shard = "batch"
    precision: Precision = "float32"
    objective: Objective = "reconstruction"
    share: float = 0.5
    downstream: Sequence[Site | str] = ()

    def __post_init__(self):
        if (self.tokens is None) == (self.steps is None):
            raise ValueError(f"give tokens or steps, one of them: got tokens={self.tokens}, steps={self.steps}")
        counts = ("tokens", "steps", "batch_size", "dead_after", "log_every", "checkpoint_every")
        check_least(1, **{name: value for name in counts if (value := getattr(self, name)) is not None})
        if self.lr is not None:
            check_lr(self.lr)
        if self.target_l0 is not None and not 0 < self.target_l0 < math.inf:
            raise ValueError(f"target_l0 must be a positive number, got {self.target_l0}: 32 is a usual L0")
        if self.shard not in get_args(Shard):
            raise ValueError(f"shard must be one of {', '.join(get_args(Shard))}, got {self.shard!r}")
        if self.precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise ValueError(f"precision must be one of {known}, got {self.precision!r}")
        if self.objective not in get_args(Objective):
            known = ", ".join(get_args(Objective))
            raise ValueError(f"objective must be one of {known}, got {self.objective!r}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie between 0 (the mse alone) and 1 (without it), got {self.share}")
        sites = as_sites(self.downstream) if self.downstream else []
        object.__setattr__(self, "downstream", tuple(site.key for site in sites))
        if self.downstream and self.objective == "reconstruction":
            raise ValueError(f"downstream={self.downstream} needs the model: pass objective='kl' too")
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise ValueError(f"warmup and decay are shares of training, together <= 1, got {self.warmup}, {self.decay}")

    @property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else -(-int(self.tokens or 0) // self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """All settings, as JSON holds them."""
        return asdict(self) | {"downstream": list(self.downstream)}

    def peak(self, d_sae: Count) -> float:
        """The largest learning rate."""
        return self.lr if self.lr is not None else 2e-3 * math.sqrt(4608 / d_sae)

    def lr_at(self, step: Count, d_sae: Count, peak: float | None = None) -> float:
        """The learning rate of a step: a trapezoid. peak: another than the config's."""
        peak = self.peak(d_sae) if peak is None else peak
        rise = (step + 1) / max(1, round(self.warmup * self.total_steps))
        fall = (self.total_steps - step) / max(1, round(self.decay * self.total_steps))
        return peak * min(1.0, rise, fall)


def one_pass(rows: Harvested | Rows) -> TrainConfig:
    """The config of a training that is given none: every training row once. ValueError for a stream, whose number of
    rows is not known."""
    if rows.training_rows is None:
        raise ValueError("how long to train on a stream must be said: pass sl.TrainConfig(tokens=1_000_000)")
    return TrainConfig(tokens=rows.training_rows, batch_size=min(TrainConfig.batch_size, rows.training_rows))


def require_precision(precision: str, device: torch.device) -> None:
    """ValueError for a precision that a device lacks."""
    if precision == "tf32" and not _multiplies_tf32(device):
        raise ValueError(
            f"precision='tf32' needs an NVIDIA GPU from 2020 on, and the coder lies on {device}: leave precision out"
        )
    if precision == "bf16" and not _multiplies_bfloat16(device):
        raise ValueError(
            f"precision='bf16' needs a device that multiplies bfloat16, and {_named(device)} does not: leave precision "
            "out, since products would be slower than those of float32"
        )


def _multiplies_tf32(device: torch.device) -> bool:
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    asks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile", "arm_bf16"))
    return any(ask is not None and ask() for ask in asks)


def _named(device: torch.device) -> str:
    return "this CPU" if device.type == "cpu" else str(device)


def check_lr(lr: Any) -> None:
    """ValueError unless lr is a positive number below ``MAX_LR``."""
    if not is_number(lr) or not 0 < lr < MAX_LR:
        raise ValueError(f"lr must be a positive number below {MAX_LR:g}, got {lr}; None chooses one by d_sae")


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
