"""TrainConfig: how to train, and what it refuses."""

import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sae_lab.activations.store import Harvested, Rows
from sae_lab.arguments import Count, as_annotated, check_least

MAX_LR = 1e30  # beyond it one step overflows float32 before the loss can say so
Shard = Literal["batch", "features"]


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
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise ValueError(f"warmup and decay are shares of training, together <= 1, got {self.warmup}, {self.decay}")

    @property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else -(-int(self.tokens or 0) // self.batch_size)

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


def check_lr(lr: Any) -> None:
    """ValueError unless lr is a positive number below ``MAX_LR``."""
    if not is_number(lr) or not 0 < lr < MAX_LR:
        raise ValueError(f"lr must be a positive number below {MAX_LR:g}, got {lr}; None chooses one by d_sae")


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
