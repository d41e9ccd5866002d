"""A harvest by several processes (ranks): each makes whole shards, and the first writes the manifest.

The missing shards are dealt in rounds, one to each rank. After a round all ranks know how many rows each shard of it
has, and go on or stop where one process would. So a shard that one process would not have made is never written, and
the store is the same, bit for bit.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sae_lab.processes import Peers, failed, raise_for

T = TypeVar("T")
SEEN = 60.0  # seconds after which a file that one rank has written must show at the others
FAILURES = (ValueError, OSError, RuntimeError)  # of a model, of data, of a disk: told to the others


class Due(NamedTuple):
    """A shard that is next. rows: None of one that is to be made from ``passes``."""

    number: int
    rows: int | None
    passes: Any


def harvest(call: Any, peers: Peers, tokens: int) -> None:
    """Make the missing shards of a ``Harvest`` that is open, the first rank holding the lock of its folder."""
    with call.bar(tokens, quiet=not peers.first) as bar, ThreadPoolExecutor(1, "sae_lab writes") as writer:
        rounds = Rounds(call, peers, tokens, writer, bar)
        queue: list[Due] = []
        for number, passes in enumerate(ahead(call.shards())):
            queue.append(Due(number, None, passes) if not call.has(number) else rounds.there(number))
            if rounds.due(queue):
                if rounds.take(queue):
                    break
                queue = []
        else:
            if not (queue and rounds.take(queue)):
                call.manifest["complete"] = True
        rounds.finish()


class Rounds:
    """The rounds of one harvest. done: rows of all shards so far."""

    def __init__(self, call: Any, peers: Peers, tokens: int, writer: ThreadPoolExecutor, bar: Any):
        self.call, self.peers, self.tokens, self.bar = call, peers, tokens, bar
        self.last_damaged, self.done = call.last_damaged(), 0
        self._writer = writer
        self._writing: Future[dict[str, Any]] | None = None
        self._numbers: list[int] = []  # of the shards that are being written, each by the rank of its place here

    def there(self, number: int) -> Due:
        """A shard that lies whole in the folder."""
        return Due(number, self.call.manifest["shards"][number]["rows"], None)

    def due(self, queue: list[Due]) -> bool:
        """Whether each rank has a shard to make, or the rows that are there will do. The very first shard, which fixes
        the mask and the scales, is a round of its own."""
        missing = sum(shard.rows is None for shard in queue)
        full = missing >= (1 if self.call.manifest["mask"] is None else self.peers.size)
        return full or self._enough(self.done + sum(shard.rows or 0 for shard in queue), queue[-1].number)

    def _enough(self, rows: int, number: int) -> bool:
        return rows >= self.tokens and number >= self.last_damaged

    def take(self, queue: list[Due]) -> bool:
        """Make the missing shards of the queue, one on each rank. Returns whether the harvest ends with them."""
        missing = [shard for shard in queue if shard.rows is None]
        mine = missing[self.peers.rank] if self.peers.rank < len(missing) else None
        said: dict[str, Any] = {}
        made = failure = None
        try:
            if mine is not None:
                fixes = self.call.manifest["mask"] is None
                made = self.call.read(mine.passes)
                said["rows"] = len(made[0]["token"])
                if fixes:
                    said["fixed"] = {key: self.call.manifest[key] for key in ("mask", "scales")}
        except FAILURES as err:
            said["error"], failure = str(err), err
        everyone = self._told(said)
        if "fixed" in everyone[0]:
            self.call.manifest |= everyone[0]["fixed"]
        owners = {shard.number: rank for rank, shard in enumerate(missing)}
        last, broken = self._walk(queue, owners, everyone)
        self._numbers = [shard.number for shard in missing if shard.number <= last]
        if mine is not None and made is not None and mine.number in self._numbers:
            self._writing = self._writer.submit(self.call.write_shard, mine.number, *made)
        if broken is not None:
            self.finish()
            raise failure if failure and broken == self.peers.rank else failed(broken, everyone[broken]["error"])
        return self._enough(self.done, last)

    def _walk(self, queue: list[Due], owners: dict[int, int], everyone: list[dict[str, Any]]) -> tuple[int, int | None]:
        """(the number of the last shard of the queue that one process would make; the rank whose error would end it
        there). Errors in shards behind it are nobody's."""
        last = -1
        for shard in queue:
            rank = owners.get(shard.number)
            if rank is not None and "error" in everyone[rank]:
                return last, rank
            rows = (shard.rows or 0) if rank is None else everyone[rank]["rows"]
            last = shard.number
            self.bar.update(max(0, min(rows, self.tokens - self.done)))
            self.done += rows
            if self._enough(self.done, last):
                break
        return last, None

    def _told(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        """What each rank says; what they wrote in the round before goes into the manifest."""
        failure = None
        if self._writing is not None:
            try:
                said["written"] = self._writing.result()
            except FAILURES as err:
                said["not written"], failure = str(err), err
            self._writing = None
        everyone = self.peers.tell(said)
        for number, rank in zip(self._numbers, everyone, strict=False):
            if "written" not in rank:  # shards follow each other in the manifest
                break
            self.call.enter(number, rank["written"])
        if self._numbers and self.peers.first:
            self.call.save_manifest()
        self._numbers = []
        raise_for([{"error": rank["not written"]} if "not written" in rank else {} for rank in everyone], failure)
        return everyone

    def finish(self) -> None:
        """All that was made is written, and is in the manifest."""
        self._told({})
        if self.peers.first:
            self.call.save_manifest()


def require_seen(folder: Path, peers: Peers, write_manifest: Callable[[], None]) -> None:
    """ValueError on every rank unless all of them see the manifest that the first one writes."""
    if peers.first:
        write_manifest()
    peers.wait()
    end = time.monotonic() + SEEN
    while not (seen := "manifest.json" in (file.name for file in folder.glob("*"))) and time.monotonic() < end:
        time.sleep(0.2)
    if blind := [rank for rank, said in enumerate(peers.tell({"seen": seen})) if not said["seen"]]:
        raise ValueError(
            f"rank {blind[0]} does not see the files that rank 0 writes to {folder}: pass path= on a file system that "
            "all ranks share"
        )


def ahead(items: Iterable[T], many: int = 1) -> Iterator[T]:
    """The same items; a thread makes the next one, or the next few, while the caller works on this one."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "sae_lab reads ahead") as thread:
        waiting: deque[Future[Any]] = deque(thread.submit(next, iterator, end) for _ in range(many))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, iterator, end))
                yield item
        finally:
            for future in waiting:
                future.cancel()


def attempt(work: Callable[[], T]) -> T | Exception:
    """What ``work`` gives, or the error that all ranks are to hear of."""
    try:
        return work()
    except FAILURES as err:
        return err
