"""What a training asks of its process: little, unless torchrun started several of them (``ranks``)."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae_lab.activations.store import Harvested, Rows
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Batch


@dataclass(frozen=True)
class Process:
    """A process that trains a coder by itself. ``ranks.Ranks`` overrides what several do together.

    shard: "batch": every process holds the whole coder and its rows of each batch. "features": every process sees all
    rows and holds its features. device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    shard: str = "batch"
    device: torch.device | str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process writes the files and shows progress."""
        return self.rank == 0

    @property
    def row_shares(self) -> int:
        return self.size if self.shard == "batch" else 1

    @property
    def feature_shares(self) -> int:
        return self.size if self.shard == "features" else 1

    def require(self, coder: SparseCoder, batch_size: int) -> None:
        """ValueError for what cannot be divided."""

    def require_same(self, facts: dict[str, Any]) -> None:
        """ValueError if another process has other facts."""

    def wait(self) -> None:
        """Until all processes are here."""

    def own_part(self, coder: SparseCoder) -> SparseCoder:
        """The coder that this process trains."""
        return coder

    def rejoin(self, part: SparseCoder, coder: SparseCoder) -> None:
        """All parts back into the whole coder."""

    def part(self, name: str, t: Tensor) -> Tensor:
        """This process's part of a whole coder's tensor."""
        return t

    def whole(self, name: str, t: Tensor) -> Tensor:
        """The whole of a tensor of which this process has a part."""
        return t

    def from_first(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What the first process says."""
        return facts

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Every process's tensors become those of the first."""

    def copy_first_state(self, coder: SparseCoder) -> None:
        """The same for tensors of the coder that every process holds whole."""

    def stopping(self) -> AbstractContextManager[Callable[[], bool]]:
        """Within, ``asked()`` says whether Ctrl-C came at any of several processes; one alone it interrupts at once."""
        return nullcontext(lambda: False)

    def batch(self, rows: Harvested | Rows, step: int, batch_size: int, seed: int) -> Batch:
        """This process's rows of a batch."""
        return rows.batch(step, batch_size, seed)

    def choosing(self, coder: SparseCoder) -> AbstractContextManager[None]:
        """Within, the coder chooses its largest pre-activations among the rows of all processes."""
        return nullcontext()

    def share_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        """Every process gets the gradients of all."""

    def over_rows(self, t: Tensor) -> Tensor:
        """The sum over processes that hold other rows."""
        return t

    def over_features(self, t: Tensor) -> Tensor:
        """The sum over processes that hold other features."""
        return t


ALONE = Process()
