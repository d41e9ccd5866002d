"""Stream: activations go from the model into a mixing buffer in memory, and from there into training."""

import copy
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sae_lab.activations.harvesting import prepared, tried
from sae_lab.activations.mixing import Held, Mixer, Place, Source
from sae_lab.activations.sharding import in_numpy
from sae_lab.activations.store import RESERVE_EVERY, Harvested, Store, permute
from sae_lab.arguments import Count, as_annotated, check_least
from sae_lab.costs import Cost
from sae_lab.lm.model import LM
from sae_lab.lm.text import Documents
from sae_lab.processes import Peers
from sae_lab.results import visible
from sae_lab.types import Batch, Site, TokenMask

LEAST_BUFFER = 64  # rows; so few mix badly: they are for tests


@as_annotated
class Stream(Harvested):
    """``sl.train(sae, sl.Stream(lm, site, text), config)``: train on activations that come straight from the model.

    The model reads on while the coder takes its steps, on a thread: two devices then work at the same time; on one CPU
    both share its cores. A text that ends begins again. Every fifth document (in a text of fewer than ten, every fifth
    context) is kept from training, as in a store; those at the start of the text give the held-out rows. Model and
    coder may be on different devices and of different dtypes: the buffer is in main memory, in half precision.

    Args:
        sites: one or several, as for ``sl.harvest``; so are text, context, pack, mask and roles.
        buffer: rows that are mixed, half of them new in each round. It takes 2 bytes a number. The first rows of the
            text, held-out ones and those for calibration, stay in memory beside it and take about two thirds of that
            again (as much again and more where the first documents are long).
        keep: "disk" also writes the store that ``sl.harvest`` would write, and what lies there already is not read by
            the model again: ``stream.store`` opens it.
        path: of that store; None is its place in the cache.

    Under torchrun every rank has a model of its own and reads every N-th shard; the ranks exchange what they have read,
    and each holds the whole buffer. So batches are those of one process, bit for bit, and a run may go on over another
    number of ranks. ``keep`` needs one process.

    A training with ``path=`` that was interrupted goes on to the bits of an unbroken one: its checkpoint says where in
    the text the buffer's rows stand, and they are read again; the text before them is only cut into tokens.

    Raises ValueError as ``sl.harvest`` does, and for a buffer too small for a batch, and a text too short for one.
    """

    def __init__(
        self, lm: LM, sites: Site | str | Iterable[Site | str], text: Documents, *, buffer: int = 65_536,
        context: int = 128, pack: bool = False, mask: TokenMask | None = None, roles: str | Sequence[str] = (),
        keep: str | None = None, path: str | Path | None = None,
    ):  # fmt: skip
        if keep not in (None, "disk"):
            raise ValueError(f"keep must be 'disk' or None, got {keep!r}")
        if path is not None and keep is None:
            raise ValueError(f"path is where the store goes, got {str(path)!r} without keep: pass keep='disk' too")
        check_least(LEAST_BUFFER, buffer=buffer)
        call = prepared(lm, sites, text, 1, path, context, pack, mask, roles, None)
        self.lm, self.sites, self.identity, self.buffer = lm, call.sites, call.identity, buffer
        self.reads = self.writes = tuple(call.sites) if len(call.sites) == 1 else ()
        self._source = Source(call, buffer // 8 * 4, keep is not None)
        self._mixer = Mixer(self._source)

    @property
    def manifest(self) -> dict[str, Any]:
        """The mask and the scales, which the first tokens of the text fix."""
        return self._source.manifest

    @property
    def excluded(self) -> float:
        """The share of tokens that the mask leaves out, at the start of the text."""
        return self._source.head.excluded

    @property
    def fingerprint(self) -> str:
        """Changes with the settings, the sites read and the buffer."""
        sites = [[s.key for s in self.reads], [s.key for s in self.writes]]
        content = json.dumps([self.identity, self.buffer, self._source.on_disk, sites])
        return f"{zlib.crc32(content.encode()):08x}-stream"

    @property
    def source(self) -> Source:
        """What cuts the text into contexts, and says which of them training sees."""
        return self._source

    @property
    def kept(self) -> bool:
        """Whether what is read is also written to a store."""
        return self._source.on_disk

    @property
    def store(self) -> Store:
        """The store that was written so far. ValueError without ``keep="disk"``."""
        if not self._source.on_disk:
            raise ValueError("this stream keeps nothing: make it with sl.Stream(..., keep='disk')")
        return Store(self._source.call.folder)

    def _width(self, site: Site) -> int:
        return self.lm.width(site)

    def _viewed(self, reads: Sequence[Site], writes: Sequence[Site]) -> "Stream":
        other = copy.copy(self)  # it reads the same buffer
        vars(other).pop("watched", None)  # of the sites that were read before
        other.reads, other.writes = tuple(reads), tuple(writes) or tuple(reads)
        return other

    def __len__(self) -> int:
        """The number of rows at the start of the text that stay in memory."""
        return len(self._source.head.reserved)

    def __repr__(self) -> str:
        of = f"{self.identity['text']!r}, {visible(self.identity['model'])}"
        return f"Stream({of}, {', '.join(map(repr, self.sites))}, buffer of {self.buffer:,} rows)"

    def rows(self, rows: np.ndarray, key: str) -> Tensor:
        """Any of the rows that stay in memory, of one tensor, as ``Store.rows``."""
        return self._source.head.held.get(rows, key)

    @cached_property
    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        reserved = self._source.head.reserved
        return np.flatnonzero(~reserved), np.flatnonzero(reserved)

    @property
    def training_rows(self) -> None:
        """Not known: a text is read to its end only by training on it."""
        return None

    def first(self, rows: Count, seed: int = 0) -> Batch:
        training = self._split[0]
        return self._batch(training[permute(np.arange(min(rows, len(training))), len(training), seed)])

    def batch(self, step: Count, batch_size: Count, seed: int = 0) -> Batch:
        """Batch number ``step`` of an endless stream. Batches in order cost the model one reading of their rows; to go
        back, or far ahead, costs a reading from the last known place."""
        held = self._mixer.take(step * batch_size, batch_size, seed)
        return self._made(partial(held.get, np.arange(batch_size)))

    def share(self, step: Count, batch_size: Count, seed: int, part: Count, parts: Count) -> Batch:
        """One of several equal parts of a batch."""
        held, size = self._mixer.take(step * batch_size, batch_size, seed), batch_size // parts
        return self._made(partial(held.get, np.arange(part * size, (part + 1) * size)))

    @contextmanager
    def shared_by(self, peers: Peers) -> Iterator[None]:
        """Within, the ranks read together. ValueError for a stream that keeps a store."""
        if self._source.on_disk:
            raise ValueError(
                f"keep='disk' needs one process, got {peers.size}: harvest a store first, which ranks do together, or "
                "leave keep out"
            )
        self._source.peers = peers
        try:
            yield
        finally:
            self._source.peers = None

    def state(self, rows: Count) -> dict[str, int]:
        """Where in the text that stands which the buffer holds after so many training rows: for a checkpoint."""
        half = self._mixer.known(rows)
        return {"half": half} | self._mixer.starts[half]._asdict()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave. ValueError for anything else."""
        values: list[Any] = [None]
        if isinstance(state, Mapping):
            values = [state.get(name) for name in ("half", *Place._fields)]
        if not all(type(value) is int and 0 <= value < 1 << 40 for value in values):
            raise ValueError(
                f"a stream's place in its text is four whole numbers, got {state!r:.80}: delete the checkpoint to "
                "start over"
            )
        self._mixer.starts[values[0]] = Place(*values[1:])

    def rest(self) -> None:
        """End the reading ahead, and free the buffer. The next batch fills it again."""
        self._mixer.rest()

    def cost(self, rows: Count, ranks: Count = 1) -> tuple[Cost, Batch, int]:
        """(the cost of reading so many training rows, by several ranks, and of the memory that holds some; a few rows;
        how many stay in memory), for ``sl.estimate``."""
        call, half, on_disk = self._source.call, self._source.rows, self._source.on_disk
        wanted = rows + 2 * half  # the buffer is filled first, and is full at the end
        with_reserved = RESERVE_EVERY / (RESERVE_EVERY - 1)
        stay = int(half * with_reserved)
        if on_disk:  # reserved rows are read too, and no row twice
            wanted = int(wanted * with_reserved)
        found, tensors, scales = tried(call, wanted, min(call.rows_there(), wanted) if on_disk else 0, ranks)
        held = Held.of(in_numpy(tensors), scales)
        cost = found._replace(
            seconds=found.seconds if on_disk else wanted / found.parts["tokens per second"],
            disk=found.disk * on_disk,
            ram=found.ram + held.nbytes * (self.buffer + stay) // len(held),
        )
        return cost, self._made(partial(held.get, np.arange(len(held)))), stay
