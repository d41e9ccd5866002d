"""sl.estimate: what a harvest, a training, an index or a graph will take."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sae_lab import costs
from sae_lab.activations import harvesting
from sae_lab.activations.harvesting import harvest
from sae_lab.arguments import Count, as_annotated, check_least
from sae_lab.costs import cuda_devices
from sae_lab.feature_index import build
from sae_lab.feature_index.build import index_features
from sae_lab.results import text_table
from sae_lab.training import costing
from sae_lab.training.start import train


@dataclass(frozen=True, repr=False)
class Estimate:
    """What a call will take. Made by ``sl.estimate``; prints as a table.

    Attributes:
        what: the function's name.
        minutes: on this machine, as busy as it is now.
        disk: bytes, the most that the call adds at any moment: a checkpoint is there twice while it is replaced.
        ram: bytes above what is in use now, at the peak. Activations that are read from a store count: they stay in
            memory until it is needed for something else.
        vram: the same of CUDA devices; 0 without.
        probe: what was run to tell.
        parts: more figures, by names that say their unit.
    """

    what: str
    minutes: float
    disk: int
    ram: int
    vram: int
    probe: str
    parts: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        rows = {
            "time": f"{_figure(self.minutes)} min" + (f" ({self.minutes / 60:.1f} h)" if self.minutes > 120 else ""),
            "disk": _size(self.disk),
            "RAM": f"{_size(self.ram)} above what is in use now",
            "VRAM": _size(self.vram),
        }
        rows |= {name: _figure(value) for name, value in self.parts.items()}
        return f"{self.what}: {self.probe}\n" + text_table([("", *row) for row in rows.items()])


def _called(function: Callable[..., Any]) -> str:
    """A public function as it is called."""
    return f"sl.{'' if function in (harvest, train, index_features) else 'circuits.'}{function.__name__}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.1f}"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{_figure(size / 1e6)} MB"


@as_annotated
def estimate(what: Callable[..., Any], /, *args: Any, ranks: Count = 1, **kwargs: Any) -> Estimate:
    """Minutes, disk and memory of a call of ``sl.harvest``, ``sl.train``, ``sl.index_features`` or
    ``sl.circuits.trace``, before it is made.

        sl.estimate(sl.harvest, lm, site, text, tokens=2_000_000)

    The arguments are those of the call itself. A trial of a few seconds does the real work on a small piece, with a
    copy of the coder and in a folder that is deleted, and is scaled up. A store, a run or an index that exists already,
    or the finished part of one, costs nothing. The estimate is meant to be within a factor of 1.5 while the machine
    stays as busy as it is. Of a training on a stream the model's time is added where model and coder are on one device,
    else the longer of the two counts.

    Not known beforehand: how many features die, which slows steps down as AuxK revives them (the table says how much).
    A family without k begins with half of its features active: a few seconds of training on small batches tell when
    its steps become sparse, and the L0 at their end is taken for the rest. Callbacks are left out.

    ``ranks=8``: a harvest or a training by 8 processes of torchrun, each on a device like the one here and with as many
    cores to itself. The time is the job's, the memory that of one rank, the disk that of all. The time to exchange
    gradients and rows depends on the network and is left out; the table says how much a rank sends in a step. The trial
    runs in this process alone.

    Raises ValueError for another function, for a training with an ``objective`` through the model, for ``ranks`` with
    another than these two or with ``shard="features"``, and otherwise what the call itself would raise before its work
    begins.
    """
    check_least(1, ranks=ranks)
    rooms = {harvest: harvesting.cost, train: costing.cost, index_features: build.cost, **costs.ROOMS}
    room = next((cost for function, cost in rooms.items() if function is what), None)
    if room is None:
        names = ", ".join(_called(function) for function in rooms)
        raise ValueError(
            f"estimate knows {names}, got {getattr(what, '__name__', repr(what))}: pass one of them and its arguments"
        )
    try:
        call = inspect.signature(what).bind(*args, **kwargs)
    except TypeError as err:
        raise TypeError(f"{what.__name__}() {err}") from None
    call.apply_defaults()
    several = {"ranks": ranks} if ranks != 1 else {}
    if several and room not in (harvesting.cost, costing.cost):
        raise ValueError(f"ranks= is for sl.harvest and sl.train, got ranks={ranks} for {what.__name__}: leave it out")
    with torch.random.fork_rng(cuda_devices()):
        found = room(**call.arguments, **several)
    minutes, parts = found.seconds / 60, {**several, **found.parts}
    return Estimate(what.__name__, minutes, found.disk, found.ram, found.vram, found.trial, parts)
