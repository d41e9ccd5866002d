"""``TrainConfig(target_l0=)``: while a coder trains, its L0 is brought to a target."""

import logging
import math
from typing import NamedTuple

from sae_lab.saes.base import SparseCoder

log = logging.getLogger(__name__)

WANTED = 50_000  # held-out tokens that an L0 is measured on in the end
BEGINS, FROZEN = 0.05, 0.8  # shares of training between which the coefficient is moved
START = 0.1  # of the coder's sparsity: L0 comes from above, for features that went out come back slowly
GAIN = 20.0  # over a whole training the logarithm of the coefficient moves by this times its mean error
FASTEST = 1 / 30  # and in a step by this share of it at most: in short trainings weights could not follow
MOST = 1.0  # the error counts no more than this: at the start L0 is far off whatever the coefficient
AHEAD = 0.1  # the error is what it would be after this share of training, if L0 went on as it does: weights lag behind
MEMORY = 0.9  # of the mean of log L0 over steps, which is less noisy than a batch's
TRUST = 0.5  # in one held-out measurement
NEAR = 0.3  # a penalty that holds L0 by itself is corrected only where log L0 is as near as this


class Reached(NamedTuple):
    """What came of ``TrainConfig(target_l0=)``: ``run.reached``. l0: in eval mode, on ``tokens`` kept tokens that no
    training step saw (0: the data is too small to reserve any; it was then measured on training tokens). tolerance:
    by which share of the target l0 may be off."""

    target: float
    l0: float
    tokens: int
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether l0 is as near to the target as it should be."""
        return abs(self.l0 / self.target - 1) <= self.tolerance


class Aim:
    """Brings a coder's L0 to a target. A family whose penalty holds L0 by itself (``holds_l0``) is told what the
    penalty is to hold, corrected by how held-out tokens differ from it. Of any other, an integral controller moves the
    logarithm of the penalty's weight by log L0 - log target, and rests for the last fifth of training.

    The coder's ``config`` keeps the weight that it was made with until ``settle``.
    """

    def __init__(self, coder: SparseCoder, target: float):
        name, family = coder.sparsity_name, type(coder).__name__
        if name is None or name == "k":
            instead = f"leave it out and set k={max(1, round(target))}" if name else "train a JumpReLU, L1 or Gated"
            raise ValueError(f"target_l0={target:g} needs a penalty, and a {family} has none: {instead}")
        if target >= coder.d_sae:
            raise ValueError(f"target_l0 must be below d_sae={coder.d_sae}, got {target:g}: 32 is a usual L0")
        if not coder.config[name] > 0:
            raise ValueError(f"with target_l0 the coder's {name} must be above 0, got 0: 1 will do, it is moved")
        self.coder, self.target, self.name = coder, target, name
        self.tolerance = 0.05 if coder.holds_l0 else 0.1
        start = coder.config[name] * (1 if coder.holds_l0 else START)
        # All are logarithms: the penalty's weight; the running mean of batches' L0, and its growth in a step; what
        # held-out L0 is above it.
        self.state = {"coefficient": math.log(start), "l0": math.log(coder.d_sae), "slope": 0.0, "gap": 0.0}

    @property
    def coefficient(self) -> float:
        """The weight of the penalty."""
        return math.exp(self.state["coefficient"])

    def apply(self) -> None:
        """Set what the coder's loss goes by."""
        if self.coder.holds_l0:
            self.coder.target_l0 = self.target * math.exp(-self.state["gap"])
        else:
            setattr(self.coder, self.name, self.coefficient)

    def follow(self, l0: float, steps: int, done: float) -> None:
        """After each step. l0: of its batch. steps: of the training. done: the share of them taken."""
        state, now = self.state, math.log(max(l0, 0.01))
        grown = (1 - MEMORY) * (now - state["l0"])
        state["l0"] += grown
        state["slope"] += (1 - MEMORY) * (grown - state["slope"])
        if not self.coder.holds_l0 and BEGINS <= done < FROZEN:
            error = state["l0"] + AHEAD * steps * state["slope"] + state["gap"] - math.log(self.target)
            state["coefficient"] += min(GAIN / steps, FASTEST) * max(-MOST, min(MOST, error))
        self.apply()

    def correct(self, held_out: float, batch: float) -> None:
        """After a held-out measurement. held_out, batch: L0 of both, of the same weights or nearly."""
        state, held = self.state, math.log(max(held_out, 0.01))
        if not self.coder.holds_l0:
            state["gap"] += TRUST * (held - math.log(max(batch, 0.01)) - state["gap"])
        elif abs(off := held - math.log(self.target)) < NEAR:
            state["gap"] += TRUST * off
        self.apply()

    def release(self) -> None:
        """Training is over, or was left: the coder has its own penalty again."""
        self.coder.target_l0 = None
        setattr(self.coder, self.name, self.coder.config[self.name])

    def settle(self) -> None:
        """Training is complete: the coefficient that gave this L0 becomes an argument of the coder."""
        if not self.coder.holds_l0:
            self.coder.set_sparsity(self.coefficient)

    def reached(self, l0: float, tokens: int) -> Reached:
        """What came of it; what is not as it should be is logged."""
        found = Reached(self.target, l0, tokens, self.tolerance)
        if not found.within:
            log.warning("L0 is %.1f, not within %.0f %% of target_l0=%g: train for more steps", l0,
                        100 * self.tolerance, self.target)  # fmt: skip
        if tokens < WANTED:
            log.warning("L0 was measured on %d held-out tokens, fewer than %d: harvest more", tokens, WANTED)
        return found
