"""What a training tells: an ``Event`` to its callbacks at each step, and the ``Run`` at its end."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sae_lab.activations.store import Harvested, Rows
from sae_lab.results import counted
from sae_lab.saes.base import SparseCoder
from sae_lab.training.aiming import Reached
from sae_lab.training.config import TrainConfig
from sae_lab.training.control import Change, Control

Metrics = dict[str, int | float]


class Event(NamedTuple):
    """What a callback gets: ``callbacks=[lambda event: print(event.step, event.metrics)]``.

    kind: "start", "step" (a logged one), "checkpoint", "pause", "resume", "end", or "left" (interrupted or failed:
    ``error`` says by what). metrics: the last row of ``Run.history``. control: steers this training. history: all rows
    so far, not to be changed. data: what serves the batches. label: which of a sweep's coders this is.
    """

    kind: str
    step: int
    metrics: Metrics
    coder: SparseCoder
    config: TrainConfig
    control: Control
    history: list[Metrics]
    data: Harvested | Rows
    label: str
    path: Path | None = None
    error: BaseException | None = None


@dataclass
class Run:
    """A finished training: the coder, its config, and one row of metrics per logged step.

    changes: what was changed while it ran, {"step", "what", "old", "new"} each (see ``Control``).
    reached: with ``TrainConfig(target_l0=)``, the L0 that was reached, on held-out tokens; else None.
    """

    coder: SparseCoder
    config: TrainConfig
    history: list[Metrics] = field(repr=False)
    path: Path | None = None
    changes: list[Change] = field(default_factory=list)
    reached: Reached | None = None

    @property
    def stopped(self) -> bool:
        """Whether it was ended before its last step."""
        return any(change["what"] == "stop" for change in self.changes)

    def to_pandas(self):
        """The history: step, tokens, passes (not of a stream), loss, fvu, l0, dead, lr and the loss terms, of the
        batch; fvu_held_out and l0_held_out, of up to 2,048 tokens that no batch holds, in eval mode, and with ``watch``
        ce_delta, in the rows where they were measured; with ``target_l0`` coefficient, the weight of the penalty; with
        an ``objective`` through the model kl and ce, nats/token with the coder spliced in."""
        import pandas as pd

        return pd.DataFrame(self.history)

    def __repr__(self) -> str:
        m, meta = self.history[-1], self.coder.meta
        passes = f" in {m['passes']:.1f} passes" if "passes" in m else ""
        return (
            f"Run({type(self.coder).__name__}, {counted(int(m['tokens']), 'token')}{passes}: last batch "
            f"FVU {m['fvu']:.3f}, L0 {m['l0']:.1f}"
            f"{'; held-out FVU {fvu_held_out:.3f}, L0 {l0_held_out:.1f}'.format(**m) if 'fvu_held_out' in m else ''}"
            f"; dead {meta['dead']:.2%} on {counted(meta['dead_tokens'], 'token')}"
            f"{''.join(f'; {_words(change)}' for change in self.changes)})"
        )


def _words(change: Change) -> str:
    if change["what"] == "stop":
        return f"stopped after {change['new']:,} of {counted(change['old'], 'step')}"
    return f"{change['what']} {change['old']:.4g} to {change['new']:.4g} at step {change['step']:,}"
