"""The loop over several processes: what they do together that one process does alone."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_lab.activations.store import Rows, Store
from sae_lab.saes.base import SparseCoder
from sae_lab.training import checkpoint
from sae_lab.training.checkpoint import Found
from sae_lab.training.config import TrainConfig
from sae_lab.training.loop import Training
from sae_lab.training.ranks import Ranks
from sae_lab.training.run import Metrics, Run
from sae_lab.types import Batch, Output


class SharedTraining(Training):
    """This process's share of a training: its rows of every batch, or its features of the coder."""

    alone = False

    def __init__(
        self, ranks: Ranks, coder: SparseCoder, rows: Store | Rows, config: TrainConfig, path: Path | None,
        callbacks: tuple, *, changes: Iterable[Mapping[str, Any]] = (),
    ):  # fmt: skip
        ranks.require(coder, config.batch_size)
        self.ranks, self.first = ranks, ranks.first
        refused = f"{ranks.size} processes train this coder: only one alone can be changed"
        super().__init__(coder, rows, config, path, callbacks, changes=changes, refused=refused)

    # ---- begin and end

    def on_disk(self) -> tuple[Run | None, Found | None]:
        run, found = super().on_disk()
        self._require_same_everywhere(found.header["step"] if found else "finished" if run else 0)
        return run, found

    def _require_same_everywhere(self, begun: int | str) -> None:
        """All ranks must do the same: a coder is as random as its seed."""
        here = self.identity | {"config": asdict(self.config), "steps done": begun}
        first, *others = map(json.loads, self.ranks.texts(json.dumps(here)))
        for rank, other in enumerate(others, 1):
            if wrong := checkpoint.differences(other, first):
                raise ValueError(
                    f"rank {rank} trains otherwise than rank 0: it differs in {wrong}. Every rank must run the same "
                    "script, with fixed seeds and folders that all of them see"
                )

    def new_id(self) -> str:
        return self.ranks.from_first({"run": super().new_id()})["run"]

    def share(self) -> SparseCoder:
        return self.ranks.own_part(self.whole)

    def part(self, name: str, t: Tensor) -> Tensor:
        return self.ranks.part(name, t)

    def level(self) -> None:
        scales = [self.scale] if self.target_scale is None else [self.scale, self.target_scale]
        self.ranks.copy_first(scales + self.ranks.held_whole(self.coder.state_dict()))

    def packed(self) -> dict[str, Tensor]:
        whole = ((name, self.ranks.whole(name, part)) for name, part in super().packed().items())
        return {name: t for name, t in whole if self.first}

    def calibrate(self, data: Callable[[], tuple[list[Tensor], Tensor | None]]) -> Metrics:
        """One rank does it for all, unless each has a part of the coder."""
        facts = super().calibrate(data) if self.first or self.coder is not self.whole else {}
        self.ranks.copy_first(self.ranks.held_whole(self.coder.state_dict()))
        self.ranks.rejoin(self.coder, self.whole)
        return self.ranks.from_first(facts)

    def end(self, data: Callable[[], tuple[list[Tensor], Tensor | None]] | None = None) -> Run:
        run = super().end(data)
        self.ranks.wait()  # nobody leaves before the files are there
        return run

    # ---- steps

    @property
    def own_rows(self) -> int:
        return self.config.batch_size // self.ranks.row_shares

    def read(self, step: int) -> Batch:
        return self.ranks.batch(self.rows, step, self.config.batch_size, self.config.seed)

    def take_steps(self) -> None:
        with self.ranks.stopping() as self.asked:
            super().take_steps()

    def one_step(self, raw: Batch | None = None) -> None:
        super().one_step(raw)
        self.ranks.copy_first(b for b in self.coder.buffers() if not b.dim())  # PAnneal's weight goes by own rows
        if self.asked():  # all ranks stop after the same step
            self.keep()
            raise KeyboardInterrupt

    def losses(self, batch: Batch) -> tuple[Output, dict[str, Tensor]]:
        with self.ranks.choosing(self.coder):
            return super().losses(batch)

    def join_gradients(self) -> None:
        self.ranks.share_gradients(self.parameters)

    def sum_over_rows(self, t: Tensor) -> Tensor:
        return self.ranks.over_rows(t)

    def mean_over_rows(self, t: Tensor) -> Tensor:
        return self.ranks.over_rows(t) / self.ranks.row_shares

    def sum_over_features(self, t: Tensor) -> Tensor:
        return self.ranks.over_features(t)
