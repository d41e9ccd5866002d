"""Rows of a graph in a folder, so that the same call of ``trace`` goes on where it was interrupted."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from sae_lab import cache, files

log = logging.getLogger(__name__)

FORMAT, VERSION, HEAD = "sae_lab trace", 1, "trace.json"
KEPT = "the rows that were written stay there: make room on that disk, and the same call goes on"


def identity(local: Any, targets: list[Any] | None, features: int) -> dict[str, Any]:
    """What a graph follows from. targets: as ``trace`` checked them."""
    return {
        "model": local.lm.id, "model_fingerprint": local.lm.fingerprint(), "prompt": local.batch.ids[0].tolist(),
        "coders": {local.sites[n].key: local.coders[n].fingerprint() for n in local.coders.layers},
        "targets": None if targets is None else [_told(target) for target in targets],
        "first": local.first, "features": features,
    }  # fmt: skip


def _told(target: Any) -> Any:
    if isinstance(target, Tensor):
        return hashlib.sha256(target.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
    return list(target) if isinstance(target, tuple) else target


class Journal:
    """The folder of one graph. Each file has the rows of features that were visited together, and the features that
    come next in the same round: a new ranking would find others than an unbroken call."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self._identity, self._number = folder, identity, 0

    def begin(self) -> None:
        """ValueError for a folder with another graph's rows, or with other files."""
        head = self.folder / HEAD
        if not head.exists():
            if any(not file.name.startswith(".") for file in self.folder.iterdir()):
                raise ValueError(f"{self.folder} has files of something else: pass path= a new folder")
            with cache.atomic(head, KEPT) as temporary:
                files.write_json(temporary, {"format": FORMAT, "version": VERSION, **self._identity})
            return
        try:
            there = files.read_json(head)
        except (OSError, ValueError) as err:
            raise ValueError(f"{head} cannot be read ({err}): pass path= a new folder") from err
        wanted = {"format": FORMAT, "version": VERSION, **self._identity}
        if different := [key for key in wanted if there.get(key) != wanted[key]]:
            key = different[0]
            raise ValueError(
                f"{self.folder} has rows of another graph ({key}: {str(there.get(key))[:60]} there, "
                f"{str(wanted[key])[:60]} now): pass path= a new folder"
            )

    def _file(self, number: int) -> Path:
        return self.folder / f"rows-{number:05}.safetensors"

    def rows(self) -> Iterator[dict[str, Tensor]]:
        """What each file has, in order, up to the first that is missing or damaged; those after it are removed."""
        for self._number in count():
            file = self._file(self._number)
            try:
                yield files.read_tensors(file)[0]
            except FileNotFoundError:
                break
            except ValueError as err:
                log.warning("%s is damaged (%s): its rows and all later ones are computed anew", file, err)
                break
        for number in count(self._number):
            if not self._file(number).exists():
                return
            self._file(number).unlink()

    def write(self, features: Int[Tensor, " n"], planned: Int[Tensor, " more"], **rows: Tensor) -> None:
        found = {"features": features, "planned": planned, **rows}
        with cache.atomic(self._file(self._number), KEPT) as temporary:
            files.write_tensors({name: tensor.contiguous().clone() for name, tensor in found.items()}, temporary)
        self._number += 1


@contextmanager
def journal(path: str | Path | None, local: Any, targets: list[Any] | None, features: int) -> Iterator[Journal | None]:
    """The journal of a call, while no other process writes there; None without a path."""
    if path is None:
        yield None
        return
    folder = Path(path).expanduser()
    with cache.sole_writer(folder), cache.told(folder, KEPT):
        made = Journal(folder, identity(local, targets, features))
        made.begin()
        yield made
