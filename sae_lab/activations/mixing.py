"""The buffer of a stream: rows come in as the model reads them, in the order of the text, and go out mixed.

What is read, and which tokens count, is what ``sl.harvest`` would read: the reader is the same. Training rows are dealt
in the order of the text into halves of the buffer. A quarter of a half's rows is served in the round in which the half
comes in, two quarters in the next round, the last quarter in the one after; which rows, and in which order, ``permute``
says. So the rows of a round are of three halves, and its number and the text alone say which they are.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lab.activations.dealing import ahead, attempt
from sae_lab.activations.sharding import Harvest
from sae_lab.activations.store import RESERVE_EVERY, permute
from sae_lab.lm.text import Context
from sae_lab.processes import Peers
from sae_lab.types import TokenMask

log = logging.getLogger(__name__)

SHARES = (0, 1, 3, 4)  # quarters of a half that are served before each of its rounds, and after the last
SHARDS_AHEAD = 2  # that the model reads before there is room for them


class Held:
    """Rows in memory as a store has them: activations in half precision after a scale, beside token ids and
    positions."""

    def __init__(self, arrays: Mapping[str, np.ndarray], wide: Mapping[str, np.ndarray], scales: Mapping[str, float]):
        self.arrays, self.wide, self.scales = arrays, wide, scales  # wide: which rows are bfloat16

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray], scales: Mapping[str, float]) -> "Held":
        arrays = {key: tensors[key] for key in ("token", "position")}
        arrays |= {key: tensors[key].view(np.uint16) for key in scales}
        wide = {key: np.full(len(tensors[key]), tensors[key].dtype == np.uint16) for key in scales}
        return cls(arrays, wide, scales)

    @classmethod
    def joined(cls, parts: "Sequence[Held]") -> "Held":
        arrays, wide = (
            {key: np.concatenate([one[key] for one in found]) for key in found[0]}
            for found in ([p.arrays for p in parts], [p.wide for p in parts])
        )
        return cls(arrays, wide, parts[0].scales)

    def empty(self, rows: int) -> "Held":
        """Room for rows like these."""
        arrays = {key: np.empty((rows, *a.shape[1:]), a.dtype) for key, a in self.arrays.items()}
        return Held(arrays, {key: np.zeros(rows, bool) for key in self.wide}, self.scales)

    def __len__(self) -> int:
        return len(self.arrays["token"])

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.arrays.values(), *self.wide.values()))

    def put(self, at: np.ndarray, other: "Held", rows: np.ndarray) -> None:
        for mine, its in ((self.arrays, other.arrays), (self.wide, other.wide)):
            for key, array in mine.items():
                array[at] = its[key][rows]

    def get(self, rows: np.ndarray, key: str) -> Tensor:
        part = self.arrays[key][rows]
        if key not in self.scales:
            return torch.from_numpy(part).long()
        x, wide = part.view(np.float16).astype(np.float32), self.wide[key][rows]
        if wide.any():
            x[wide] = torch.from_numpy(part[wide]).view(torch.bfloat16).float().numpy()
        x *= self.scales[key]  # in numpy, so that a thread that reads ahead does not use torch's threads
        return torch.from_numpy(x)


class Head(NamedTuple):
    """The start of the text, which stays in memory. reserved: of each row. bounds: the rows of shard i are bounds[i] to
    bounds[i + 1]. whole: the text has no more."""

    held: Held
    reserved: np.ndarray
    bounds: list[int]
    excluded: float
    whole: bool


class Part(NamedTuple):
    """Training rows of one shard."""

    place: "Place"
    held: Held
    rows: np.ndarray


class Owed(NamedTuple):
    """A part that one of several ranks makes; made: here, if it is this one."""

    place: "Place"
    rank: int
    made: Any


class Place(NamedTuple):
    """A place in the text: number of the pass over it, of the shard, and of the training row in the shard."""

    epoch: int
    shard: int
    row: int


class Source:
    """Reads shards: those at the start of the text whole, until there are ``rows`` training rows; of later ones only
    what training sees, unless they are written to disk.

    peers: the ranks that train together. Each makes every N-th shard, ahead of what is needed, and all get it when its
    turn comes: so every rank has the rows that one process would have.
    """

    peers: Peers | None = None

    def __init__(self, call: Harvest, rows: int, on_disk: bool):
        self.call, self.rows, self.on_disk = call, rows, on_disk
        try:
            self._by_document = len(call.text) >= 2 * RESERVE_EVERY
        except TypeError:  # a stream of documents
            self._by_document = True

    @cached_property
    def head(self) -> Head:
        from tqdm.auto import tqdm

        self.call.open(self.on_disk)
        parts, flags, excluded, whole = [], [], 0, False
        training = held_out = 0
        with tqdm(total=self.rows, unit="tok", desc="fill the buffer", dynamic_ncols=True, leave=False) as bar:
            for passes, first, (tensors, out) in self._from_start():
                parts.append(Held.of(tensors, self.call.manifest["scales"]))
                flags.append(self._reserved(passes, first)[tensors["context"]])
                excluded, held_out = excluded + out, held_out + int(flags[-1].sum())
                training += int((~flags[-1]).sum())
                bar.update(len(flags[-1]))
                # A long first document may hold no reserved row: then it ends somewhere.
                if training >= self.rows and (8 * held_out >= self.rows or training >= 2 * self.rows):
                    break
            else:
                whole = True
        if training == 0:
            mask = TokenMask.from_dict(self.call.manifest["mask"])
            raise ValueError(
                f"no token of the text is left to train on: the mask leaves out {excluded:,} ({mask}): pass longer "
                "documents, or another mask="
            )
        if held_out == 0:
            log.warning("no token of this text is held out (it is too short): thresholds are fitted on training rows")
        bounds = np.cumsum([0, *map(len, parts)]).tolist()
        reserved = np.concatenate(flags)
        return Head(Held.joined(parts), reserved, bounds, excluded / (excluded + len(reserved)), whole)

    def _from_start(self) -> Iterator[tuple[list[list[Context]], int, tuple[dict[str, np.ndarray], int]]]:
        """(passes, the number of the first context, (tensors, tokens left out)) of each shard."""
        peers, call = self.peers, self.call
        if peers is None:
            for number, passes, first in ahead(self._shards()):
                yield passes, first, call.shard(number, passes, self.on_disk)
            return

        def made(number: int, passes: list[list[Context]]) -> Any:
            if number % peers.size == peers.rank:
                return attempt(lambda: self._telling(call.shard(number, passes, False)))

        shards = self._shards()
        number, passes, first = next(shards)  # the first one fixes the mask and the scales
        tensors, facts = peers.shared(made(number, passes), 0)
        call.manifest |= {key: facts[key] for key in ("mask", "scales")}
        yield passes, first, (tensors, facts["excluded"])
        for number, passes, first, mine in ahead(((n, p, f, made(n, p)) for n, p, f in shards), peers.size):
            tensors, facts = peers.shared(mine, number % peers.size)
            yield passes, first, (tensors, facts["excluded"])

    def _telling(self, shard: tuple[dict[str, np.ndarray], int]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What the other ranks need of a shard."""
        tensors, excluded = shard
        manifest = self.call.manifest
        names = ("token", "position", "context", *manifest["scales"])
        facts = {"excluded": excluded, "mask": manifest["mask"], "scales": manifest["scales"]}
        return {name: tensors[name] for name in names}, facts

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the harvest, with the mask and the scales that its first shard fixes."""
        self.head  # noqa: B018 (it reads that shard)
        return self.call.manifest

    def parts(self, place: Place) -> Iterator[Part | Owed]:
        """Training rows from this shard on; the text begins again where it ends."""
        head, epoch, start = self.head, place.epoch, place.shard
        turns = count()
        while True:
            for number, passes, first in self._shards():
                if number >= start:
                    part = self._part(Place(epoch, number, 0), passes, first, head, turns)
                    if isinstance(part, Owed) or (part is not None and len(part.rows)):
                        yield part
                elif self.on_disk and not self.call.has(number):  # a store's shards are written in order
                    self.call.shard(number, passes, on_disk=True)
            if self.on_disk:
                self.call.finish()
            if epoch == 0:
                log.warning("the text has ended: training goes on from its start again")
            epoch, start = epoch + 1, 0

    def _part(
        self, place: Place, passes: list[list[Context]], first: int, head: Head, turns: Iterator[int]
    ) -> Part | Owed | None:
        if (number := place.shard) < len(head.bounds) - 1:
            rows = np.arange(head.bounds[number], head.bounds[number + 1])
            return Part(place, head.held, rows[~head.reserved[rows]])
        reserved = self._reserved(passes, first)
        if not self.on_disk:  # the model does not read what nobody needs
            numbers = iter(~reserved)
            passes = [kept for group in passes if (kept := [c for c in group if next(numbers)])]
            reserved = reserved[~reserved]
        if not passes:
            return None
        if self.peers is not None:
            return self._owed(place, passes, self.peers, next(turns))
        tensors, _ = self.call.shard(number, passes, self.on_disk)
        return Part(place, Held.of(tensors, head.held.scales), np.flatnonzero(~reserved[tensors["context"]]))

    def _owed(self, place: Place, passes: list[list[Context]], peers: Peers, turn: int) -> Owed:
        rank, made = turn % peers.size, None
        if rank == peers.rank:
            made = attempt(lambda: self._telling(self.call.shard(place.shard, passes, False)))
        return Owed(place, rank, made)

    def contexts(self, start: Place) -> Iterator[tuple[Place, Context]]:
        """(its place, the context) of each context that training sees, from a place on; the text begins again where it
        ends. A place's row is here the number of the context in its shard."""
        for epoch in count(start.epoch):
            for number, passes, first in self._shards():
                if (epoch, number) < start[:2]:
                    continue
                contexts = [c for group in passes for c in group]
                for at in np.flatnonzero(~self._reserved(passes, first)).tolist():
                    if (place := Place(epoch, number, at)) >= start:
                        yield place, contexts[at]
            if epoch == 0:
                log.warning("the text has ended: training goes on from its start again")

    def settled(self, part: Part | Owed) -> Part:
        """A part whose rows are here. Every rank must ask for the same ones in the same order."""
        if isinstance(part, Part):
            return part
        assert self.peers is not None
        tensors, _ = self.peers.shared(part.made, part.rank)
        return Part(part.place, Held.of(tensors, self.head.held.scales), np.arange(len(tensors["token"])))

    def _shards(self) -> Iterator[tuple[int, list[list[Context]], int]]:
        """(its number, its passes, the number of its first context) of each shard."""
        first = 0
        for number, passes in enumerate(self.call.shards()):
            yield number, passes, first
            first += sum(map(len, passes))

    def _reserved(self, passes: list[list[Context]], first: int) -> np.ndarray:
        """Which contexts of a shard are reserved."""
        contexts = [c for group in passes for c in group]
        documents = [c.documents[0] for c in contexts] if self._by_document else range(first, first + len(contexts))
        return np.array([d % RESERVE_EVERY == RESERVE_EVERY - 1 for d in documents])


class Mixer:
    """The buffer: ``take`` serves training rows by their number in the order of training. starts: the place in the text
    of the first row of each half."""

    def __init__(self, source: Source):
        self.source, self.half = source, source.rows
        self.starts = {0: Place(0, 0, 0)}
        self._lock, self._resting = threading.Lock(), False
        self._thread: ThreadPoolExecutor | None = None
        self._reading: deque[Future[Part | Owed]] = deque()
        self._served: dict[tuple[int, int, int], Held] = {}  # the last two batches: views of one stream take turns
        self._at: int | None = None
        self._held: Held | None = None

    def take(self, first: int, size: int, seed: int) -> Held:
        """Rows ``first`` to ``first + size - 1``."""
        with self._lock:
            key = (first, size, seed)
            if key not in self._served:
                try:
                    self._served[key] = self._take(*key)
                except BaseException:
                    self._at = None  # begin anew
                    raise
                while len(self._served) > 2:
                    del self._served[next(iter(self._served))]
            return self._served[key]

    def rest(self) -> None:
        self._resting = True  # for a ``take`` that waits for the model
        with self._lock:
            self._forget()
            self._held, self._resting = None, False
            self._served.clear()
            if self._thread is not None:
                self._thread.shutdown(wait=False)
                self._thread = None

    def known(self, first: int) -> int:
        """The half from which the text must be read to serve row ``first``: the last one whose place is known."""
        oldest = max(self._round(first)[0] - 2, 0)
        return max(half for half in list(self.starts) if half <= oldest)  # a list: a thread may add to it meanwhile

    def _round(self, first: int) -> tuple[int, int]:
        """(the round in which a row is served, its number there). Round 0 has a quarter of a half's rows, round 1 has
        three quarters, the others have as many as a half."""
        if first < self.half // 4:
            return 0, first
        if first < self.half:
            return 1, first - self.half // 4
        return first // self.half + 1, first % self.half

    def _take(self, first: int, size: int, seed: int) -> Held:
        self._require(size)
        if self._held is None or (first, seed) != (self._at, self._seed):
            self._begin(first, seed)
        assert self._held is not None
        out, done = self._held.empty(size), 0
        while done < size:
            number, offset = self._round(first + done)
            slots = self._due(number)[offset : offset + size - done]
            out.put(np.arange(done, done + len(slots)), self._held, slots)
            self._free.extend(slots.tolist())
            done += len(slots)
        self._at = first + size
        self._fill(0)  # with what the model has read
        return out

    def _require(self, size: int) -> None:
        head = self.source.head
        if head.whole and (rows := int((~head.reserved).sum())) < size:
            raise ValueError(
                f"the text ends before a batch is full: it has {rows:,} training rows, batch_size is {size:,}: pass "
                f"more text, or batch_size={rows}"
            )
        if size > self.half:
            raise ValueError(
                f"a buffer must hold two batches, got {2 * self.half:,} rows for batch_size={size:,}: pass "
                f"sl.Stream(..., buffer={16 * size}), or smaller batches"
            )

    def _begin(self, first: int, seed: int) -> None:
        """Fill the buffer as it is before row ``first`` is served."""
        self._forget()
        self._held = self._held or self.source.head.held.empty(2 * self.half)
        self._seed, self._slots, self._free = seed, {}, list(range(2 * self.half))[::-1]
        start = self.known(first)
        self._placed, self._skip = start * self.half, self.starts[start].row
        self._parts = self.source.parts(self.starts[start])
        number, offset = self._round(first)
        for earlier in range(start, number):
            self._free.extend(self._due(earlier).tolist())
        self._free.extend(self._due(number)[:offset].tolist())

    def _forget(self) -> None:
        for future in self._reading:
            future.cancel()
        self._reading.clear()
        self._at = self._part = self._order = None

    def _due(self, number: int) -> np.ndarray:
        """The places in the buffer of the rows of a round, in the order in which they are served."""
        if self._order is None or self._order[0] != number:
            self._fill(number + 1)
            self._slots.pop(number - 3, None)
            rows = []
            for age in range(3):
                if (half := number - age) in self._slots:  # else it was served before ``_begin``, or is before the text
                    ranks = np.arange(SHARES[age] * self.half // 4, SHARES[age + 1] * self.half // 4)
                    rows.append(self._slots[half][permute(ranks, self.half, self._key(half, 0))])
            due = np.concatenate(rows)
            self._order = number, due[permute(np.arange(len(due)), len(due), self._key(number, 1))]
        return self._order[1]

    def _key(self, number: int, which: int) -> int:
        return self._seed * 1_000_003 + 2 * number + which

    def _fill(self, halves: int) -> None:
        """Put rows in until there are so many halves; and those that the model has read, where there is room."""
        assert self._held is not None
        while self._placed < halves * self.half or (self._free and (self._part or self._is_read())):
            part = self._part = self._part or self._read()
            assert self._free
            half, at = divmod(self._placed, self.half)
            if at == 0:
                self._slots[half] = np.empty(self.half, np.int64)
                self.starts[half] = part.place
            many = min(len(self._free), len(part.rows), self.half - at)
            slots = self._slots[half][at : at + many] = np.array(self._free[-many:])
            del self._free[-many:]
            self._held.put(slots, part.held, part.rows[:many])
            self._placed += many
            left = part._replace(place=part.place._replace(row=part.place.row + many), rows=part.rows[many:])
            self._part = left if len(left.rows) else None

    def _is_read(self) -> bool:
        if self.source.peers is not None:  # ranks exchange parts when they are needed: this is the same for all
            return False
        return bool(self._reading) and self._reading[0].done()

    def _read(self) -> Part:
        """The next part, while the model reads on."""
        self._thread = self._thread or ThreadPoolExecutor(1, "sae_lab streams")
        peers = self.source.peers
        while True:
            while len(self._reading) <= SHARDS_AHEAD * (1 if peers is None else peers.size):
                self._reading.append(self._thread.submit(next, self._parts))
            if self._resting and peers is None:  # several ranks end a batch together
                raise CancelledError
            part = self.source.settled(self._reading.popleft().result())
            skip, self._skip = self._skip, 0
            if skip < len(part.rows):
                return part._replace(place=part.place._replace(row=skip), rows=part.rows[skip:])
