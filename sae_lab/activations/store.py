"""Activations for training and indexing: a ``Store`` on disk, or ``Rows`` of a plain tensor.

A store is a folder that ``harvest`` wrote: ``manifest.json`` and safetensors shards. Each row belongs to an item that
the network read at once, and to a place in the item; in text, the item is a context and the place a token's position. A
shard has for every row its activations at each site (float16 after a per-site power-of-two scale), "context" (the
item), "position" (the place) and "document" (a group of items that are not independent). A store of text also has token
ids: "token" for every row, and "ids" with "lengths" for whole contexts.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sae_lab import files
from sae_lab.arguments import Count, as_annotated
from sae_lab.results import counted, visible
from sae_lab.types import Batch, Codes, Site, TokenMask

H = TypeVar("H", bound="Harvested")
VERSION = 1
RESERVE_EVERY = 5  # one document in five is kept from training: thresholds are fitted there
WATCHED = 2048  # rows that a training is measured on while it runs
_MANIFEST = {"identity", "mask", "scales", "complete", "shards"}
_SHARD = {"file": str, "rows": int, "contexts": int, "excluded": int, "bytes": int, "crc32": int}
_REMEDY = "call sl.harvest again with the same path to remake it"


class Runs:
    """Rows of a store as runs of consecutive rows; ``runs[i]`` is the i-th row over all runs."""

    def __init__(self, starts: np.ndarray, lengths: np.ndarray):
        self._starts = starts
        self._ends = np.cumsum(lengths)
        self._before = self._ends - lengths

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        run = np.searchsorted(self._ends, index, side="right")
        return self._starts[run] + index - self._before[run]


def split_runs(starts: np.ndarray, lengths: np.ndarray, groups: np.ndarray) -> tuple[Runs, Runs]:
    """(training rows, reserved rows). Every fifth group is reserved; of fewer than five groups, none. Settings that
    must hold on new text, like BatchTopK's threshold, are fitted on reserved rows, which training never saw."""
    reserved = groups % RESERVE_EVERY == RESERVE_EVERY - 1
    return Runs(starts[~reserved], lengths[~reserved]), Runs(starts[reserved], lengths[reserved])


def shuffled(rows: Runs, step: int, batch_size: int, seed: int) -> np.ndarray:
    """Batch ``step`` of an endless stream of passes over these rows, each pass in a new random order."""
    n = len(rows)
    at = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    out = np.empty(batch_size, np.int64)
    for epoch in np.unique(at // n):
        here = at // n == epoch
        out[here] = permute(at[here] - epoch * n, n, seed * 1_000_003 + int(epoch))
    return rows[out]


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """A random-looking permutation of 0..n-1, evaluated only at ``index``.

    Four Feistel rounds permute 0..m-1, m a power of four ≥ n; a number ≥ n is permuted again until it is below n (Black
    & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = np.random.SeedSequence(key).generate_state(4, np.uint64)
    out = index.astype(np.uint64)
    todo = np.ones(len(out), bool)
    while todo.any():
        left, right = out[todo] >> shift, out[todo] & low
        for k in keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        out[todo] = (left << shift) | right
        todo[todo] = out[todo] >= n
    return out.astype(np.int64)


@as_annotated
class Shuffled:
    """Base of the classes that serve shuffled batches."""

    _split: Any  # (training rows, reserved rows)
    _x: Callable[[np.ndarray], Tensor]
    _batch: Callable[[np.ndarray], Batch]
    __len__: Callable[..., int]

    def batch(self, step: Count, batch_size: Count, seed: int = 0) -> Batch:
        """Batch number ``step`` of an endless shuffled stream: each pass has every training row once, in a new order.
        It costs O(batch_size), since the order is computed and not stored."""
        return self._batch(shuffled(self._split[0], step, batch_size, seed))

    def first(self, rows: Count, seed: int = 0) -> Batch:
        """About ``rows`` training rows, from which scales and biases start."""
        return self.batch(0, rows, seed)

    @property
    def training_rows(self) -> int | None:
        """How many rows training sees in a pass, None if that is not known; the others are reserved for fitting
        thresholds."""
        return len(self._split[0])

    def state(self, rows: Count) -> Any:
        """What a checkpoint keeps, so that training goes on after so many rows; None where their number says it all."""
        return None

    def resume(self, state: Any) -> None:
        """Go on from what ``state`` gave."""

    def rest(self) -> None:
        """Training is over."""

    def reserved(self, most: Count) -> Tensor | None:
        """At most ``most`` activations that no batch holds; None if the store is too small to reserve any."""
        rows = self._split[1]
        return self._x(rows[np.arange(min(most, len(rows)))]) if len(rows) else None

    def unseen(self, most: Count) -> Batch:
        """At most ``most`` rows that no batch holds; the last rows if the store is too small to reserve any."""
        reserved = self._split[1]
        last = np.arange(max(0, len(self) - most), len(self))
        return self._batch(reserved[np.arange(min(most, len(reserved)))] if len(reserved) else last)

    @cached_property
    def watched(self) -> Batch | None:
        """``WATCHED`` rows, evenly spread over those that no batch holds; None if there are none."""
        rows = self._split[1]
        spread = np.linspace(0, len(rows) - 1, min(WATCHED, len(rows))).astype(int)
        return self._batch(rows[spread]) if len(rows) else None

    def blocks(self, size: Count = 8192) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(rows, activations) in the order of the text, each row once."""
        for start in range(0, len(self), size):
            rows = np.arange(start, min(start + size, len(self)))
            yield rows, self._x(rows)


@as_annotated
class Harvested(Shuffled):
    """Base of ``Store`` and ``Stream``: activations at sites of a model, of which some are read and some written."""

    identity: dict[str, Any]
    manifest: Any  # of a store: a dict that is read once; of a stream: made when the text is
    fingerprint: Any
    excluded: Any
    sites: list[Site]
    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    rows: Callable[[np.ndarray, str], Tensor]
    _width: Callable[[Site], int]
    _viewed: Callable[[Sequence[Site], Sequence[Site]], Any]

    @property
    def site(self) -> Site:
        """The site whose activations are read. ValueError where there are several."""
        if len(self.reads) != 1:
            kind = type(self).__name__.lower()
            raise ValueError(
                f"this {kind} has several sites ({', '.join(map(repr, self.sites))}): choose with {kind}.at(site)"
            )
        return self.reads[0]

    @property
    def chosen(self) -> Sequence[Site]:
        """The site chosen with ``at``, else all sites."""
        return self.reads or self.sites

    @property
    def mask(self) -> TokenMask:
        return TokenMask.from_dict(self.manifest["mask"])

    def at(self: H, site: Site | str) -> H:
        """The same, reading one of its sites. ValueError, which lists the sites, for a site it does not have."""
        return self.view([Site.of(site)], [])

    def view(self: H, reads: Sequence[Site], writes: Sequence[Site]) -> H:
        """The same; batches have x from ``reads`` and target from ``writes`` (several sites: stacked as layers)."""
        for site in (*reads, *writes):
            if site not in self.sites:
                kind = type(self).__name__.lower()
                raise ValueError(f"this {kind} has no {site}; it has {', '.join(map(repr, self.sites))}")
        return self._viewed(reads, writes)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a row of x and of target."""
        return self._shape(self.reads), self._shape(self.writes)

    def _shape(self, sites: Sequence[Site]) -> tuple[int, ...]:
        widths = {s: self._width(s) for s in sites}
        if len(set(widths.values())) > 1:
            raise ValueError(f"sites that are stacked as layers must be equally wide, got {widths}")
        width = next(iter(widths.values()))
        return (width,) if len(sites) == 1 else (len(sites), width)

    @property
    def width(self) -> int:
        return self._width(self.site)

    def _x(self, rows: np.ndarray) -> Tensor:
        return _stacked(partial(self.rows, rows), self.reads or (self.site,))

    def _batch(self, rows: np.ndarray) -> Batch:
        return self._made(partial(self.rows, rows))

    def _made(self, read: Callable[[str], Tensor]) -> Batch:
        """A batch. read: the rows of one tensor, by its name in a shard."""
        x = _stacked(read, self.reads or (self.site,))
        target = x if self.writes == self.reads else _stacked(read, self.writes)
        return Batch(x, target, read("token"), read("position"))


def _stacked(read: Callable[[str], Tensor], sites: Sequence[Site]) -> Tensor:
    tensors = [read(s.key) for s in sites]
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors, 1)


@as_annotated
class Store(Harvested):
    """Activations on disk. ``Store(path)`` opens a store of ``harvest``; ``rows=1000`` limits it to the first 1,000.

    ``len(store)`` is the number of kept tokens; ``store.at(site)`` chooses one of several sites.
    """

    def __init__(
        self, path: str | Path, rows: int | None = None, site: Site | str | None = None,
        reads: Sequence[Site] = (), writes: Sequence[Site] = (),
    ):  # fmt: skip
        self.path = Path(path).expanduser()
        self.manifest = read_manifest(self.path)
        self.identity: dict[str, Any] = self.manifest["identity"]
        self.sites = [Site.of(key) for key in self.identity["sites"]]
        one = Site.of(site) if site is not None else (self.sites[0] if len(self.sites) == 1 else None)
        self.reads = tuple(reads) or ((one,) if one is not None else ())
        self.writes = tuple(writes) or self.reads
        self._starts = np.cumsum([0] + [s["rows"] for s in self.manifest["shards"]])
        self._rows = int(self._starts[-1]) if rows is None else min(rows, int(self._starts[-1]))
        if self._rows == 0 and self.manifest["shards"]:
            out = sum(s["excluded"] for s in self.manifest["shards"])
            raise ValueError(
                f"no token is left in the store {self.path}: its mask leaves out every one of {out:,} ({self.mask}): "
                "harvest longer documents, or give another mask="
            )
        if self._rows == 0:
            raise ValueError(f"the store {self.path} holds no whole shard yet: call harvest again with the same path")

    @property
    def excluded(self) -> float:
        """The share of tokens that the mask leaves out."""
        out = sum(s["excluded"] for s in self.manifest["shards"])
        return out / (out + int(self._starts[-1]))

    @property
    def fingerprint(self) -> str:
        """Changes with the harvest's settings, the sites read and the number of rows."""
        sites = [[s.key for s in self.reads], [s.key for s in self.writes]]
        content = json.dumps([self.identity, self.manifest["mask"], self._rows, sites])
        return f"{zlib.crc32(content.encode()):08x}-{self._rows}"

    def _viewed(self, reads: Sequence[Site], writes: Sequence[Site]) -> "Store":
        return Store(self.path, self._rows, reads=reads, writes=writes)

    def _width(self, site: Site) -> int:
        return self._tensor(0, site.key).shape[1]

    def __len__(self) -> int:
        return self._rows

    @property
    def row_bytes(self) -> int:
        """Bytes on disk of a token's activations at the sites that are read and written."""
        return sum(self._tensor(0, site.key)[:1].nbytes for site in {*self.reads, *self.writes})

    def __repr__(self) -> str:
        path = self.path.resolve()
        where = f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(self.path)
        return (
            f"Store({counted(len(self), 'token')} of {self.identity['text']!r}, {visible(self.identity['model'])}, "
            f"{', '.join(map(repr, self.sites))}, {self.excluded:.1%} left out, {where!r})"
        )

    def _tensor(self, shard: int, key: str) -> files.Table:
        """A tensor of a shard (bfloat16 as its raw bits). ValueError if the shard lacks it, or holds codes instead."""
        maps = self._maps[shard]
        if key in maps:
            return maps[key]
        if "coder" in self.identity and key in self.identity["sites"]:
            raise ValueError(
                f"{self.path} holds the codes of coder {self.identity['coder']}, not activations: index it with that "
                "coder, or harvest without coder="
            )
        file = self.path / self.manifest["shards"][shard]["file"]
        raise ValueError(f"{file} is no shard of this store (it has no {key!r}): {_REMEDY}")

    def codes(self, first: Count, last: Count, d_sae: Count) -> Codes:
        """Codes of rows ``first`` to ``last - 1``, from a store of codes."""
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for shard in range(*(np.searchsorted(self._starts, [first, last - 1], side="right") - [1, 0])):
            counts, begin = self._tensor(shard, "counts"), self._starts[shard]
            ends = np.cumsum(counts)
            lo, hi = max(first - begin, 0), min(last - begin, len(counts))
            span = slice(int(ends[lo] - counts[lo]), int(ends[hi - 1]))
            parts.append((self._tensor(shard, "values")[span], self._tensor(shard, "features")[span], counts[lo:hi]))
        values, features, counts = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.long().cumsum(0)])
        return Codes(values, features.long(), offsets, d_sae)

    @cached_property
    def _maps(self) -> list[dict[str, files.Table]]:
        return [map_shard(self.path / s["file"], s) for s in self.manifest["shards"]]

    def rows(self, rows: np.ndarray, key: str) -> Tensor:
        """Any rows of one tensor ("token", "document", "position", or a site's key), in the order asked for.

        Raises ValueError for rows that the store does not have.
        """
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(self):
            have = f"{rows.min()} to {rows.max()}" if len(rows) else "none"
            raise ValueError(f"this store has rows 0 to {len(self) - 1}, asked for {have}")
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(shards, kind="stable")
        bounds = np.searchsorted(shards[order], np.arange(len(self._starts)))
        table, scale = self._tensor(0, key), self.manifest["scales"].get(key)
        out = np.empty((len(rows), *table.shape[1:]), table.dtype if scale is None else np.float32)
        for shard, (first, last) in enumerate(pairwise(bounds)):
            if first < last:
                here = order[first:last]
                part = self._tensor(shard, key)[rows[here] - self._starts[shard]]
                bits = part.dtype == np.uint16
                out[here] = torch.from_numpy(part).view(torch.bfloat16).float().numpy() if bits else part
        if scale is None:
            return torch.from_numpy(out).long()
        out *= scale  # in numpy, so that a thread that reads ahead does not use torch's threads
        return torch.from_numpy(out)

    @cached_property
    def _split(self) -> tuple[Runs, Runs]:
        """(training rows, reserved rows): whole documents are reserved, or contexts if documents are few."""
        numbered = [m["context"] + first for m, first in zip(self._maps, self._context_starts, strict=False)]
        context = np.concatenate(numbered)[: len(self)]
        starts = np.flatnonzero(np.diff(context, prepend=-1))
        document = self.rows(starts, "document").numpy()
        names, groups = np.unique(document, return_inverse=True)
        if len(names) < 2 * RESERVE_EVERY:
            groups = np.arange(len(starts))
        return split_runs(starts, np.diff(np.append(starts, len(self))), groups)

    @cached_property
    def _context_starts(self) -> np.ndarray:
        return np.cumsum([0] + [s["contexts"] for s in self.manifest["shards"]])

    def contexts(self, rows: np.ndarray) -> np.ndarray:
        """The number of each row's context (its item)."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        return self.rows(rows, "context").numpy() + self._context_starts[shards]

    def context_ids(self, context: Count) -> np.ndarray:
        """A context's token ids, prefix included."""
        shard = int(np.searchsorted(self._context_starts, context, side="right") - 1)
        local = context - self._context_starts[shard]
        return self._tensor(shard, "ids")[local, : self._tensor(shard, "lengths")[local]]

    def context_rows(self, context: Count) -> tuple[np.ndarray, np.ndarray]:
        """(rows, positions) of a context's kept tokens."""
        shard = int(np.searchsorted(self._context_starts, context, side="right") - 1)
        local = context - self._context_starts[shard]
        first, last = np.searchsorted(self._tensor(shard, "context"), [local, local + 1])
        return self._starts[shard] + np.arange(first, last), self._tensor(shard, "position")[first:last]


class Rows(Shuffled):
    """A plain (tokens, d_in) or (tokens, layers, d_in) tensor that serves batches like a store; or a ``Batch`` of all
    tokens, which may bring another target and token ids."""

    mask = None
    sites: tuple[Site, ...] = ()

    def __init__(self, data: Tensor | Batch):
        self.x = data if isinstance(data, Tensor) else data.x
        self.has_target = isinstance(data, Batch) and data.target is not data.x
        self.target = data.target if isinstance(data, Batch) else self.x
        self.tokens = data.tokens if isinstance(data, Batch) else None
        for t in (self.x, self.target):
            if t.dim() not in (2, 3) or not t.is_floating_point() or len(t) == 0:
                raise ValueError(
                    f"activations must be a float tensor (tokens, d_in) or (tokens, layers, d_in), got "
                    f"{tuple(t.shape)} {t.dtype}"
                )
        for name, t in (("target", self.target), ("tokens", self.tokens)):
            if t is not None and len(t) != len(self.x):
                raise ValueError(f"x and {name} must have as many rows: got {len(self.x)} and {len(t)}")
        self.x, self.target = self.x.detach(), self.target.detach()

    @cached_property
    def fingerprint(self) -> str:
        tensors = [self.x] + [self.target] * self.has_target + [t for t in (self.tokens,) if t is not None]
        digest = 0
        for t in tensors:
            digest = zlib.crc32(t.contiguous().view(torch.uint8).cpu().numpy().tobytes(), digest)
        return f"{digest:08x}-{len(self.x)}"

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.x.shape[1:]), tuple(self.target.shape[1:])

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, step: int, batch_size: int, seed: int = 0) -> Batch:  # not checked, in each training step
        return self._batch(shuffled(self._split[0], step, batch_size, seed))

    def _x(self, rows: np.ndarray) -> Tensor:
        return self.x[torch.from_numpy(rows).to(self.x.device)].float()

    def _batch(self, index: np.ndarray) -> Batch:
        rows, x = torch.from_numpy(index).to(self.x.device), self._x(index)
        target = self.target[rows].float() if self.has_target else x
        return Batch(x, target, None if self.tokens is None else self.tokens[rows].long())

    def blocks(self, size: Count = 8192) -> Iterator[tuple[np.ndarray, Tensor]]:  # views, where the base would copy
        for start in range(0, len(self), size):
            x = self.x[start : start + size].float()
            yield np.arange(start, start + len(x)), x

    @cached_property
    def _split(self) -> tuple[Runs, Runs]:
        starts = np.arange(0, len(self), 128)
        return split_runs(starts, np.diff(np.append(starts, len(self))), np.arange(len(starts)))


class ReadAhead:
    """Batches by number, in any order. After each batch, a thread reads the next one ahead."""

    def __init__(self, read: Callable[[int], Batch], total: int):
        self._read, self._total = read, total
        self._next: tuple[int, Future[Batch]] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def __call__(self, step: int) -> Batch:
        number, waiting = self._next or (None, None)
        batch = waiting.result() if waiting is not None and number == step else self._read(step)
        if step + 1 < self._total:
            self._thread = self._thread or ThreadPoolExecutor(1, "sae_lab reads ahead")
            self._next = step + 1, self._thread.submit(self._read, step + 1)
        return batch

    def settle(self) -> None:
        """Until nothing is being read."""
        if self._next is not None:
            wait([self._next[1]])


def read_manifest(folder: Path) -> dict[str, Any]:
    """A store's manifest. ValueError for a folder without a manifest, or with one that no store has written."""
    file = Path(folder) / "manifest.json"
    if not file.exists():
        raise ValueError(
            f"{folder} is no store (no manifest.json): make one with sl.harvest(..., path={str(folder)!r})"
        )
    try:
        manifest = files.read_json(file, most="MOST_RUN")
        if manifest["format"] != "sae_lab store" or manifest["version"] > VERSION:
            raise ValueError(f"format {manifest['format']!r} version {manifest['version']}")
        if missing := _MANIFEST - manifest.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
        _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(
            f"{file} is not a manifest that this version can read ({err}): delete the folder and harvest again"
        ) from err
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """ValueError for an entry whose type is not the one that ``harvest`` writes."""
    for shard in manifest["shards"]:
        for key, kind in _SHARD.items():
            if type(shard[key]) is not kind or (kind is int and not 0 <= shard[key] < 1 << 40):
                raise ValueError(f"a shard's {key!r} is {shard[key]!r:.60}")
        if not re.fullmatch(r"[\w-]+\.safetensors", shard["file"]):  # it lies in this folder
            raise ValueError(f"a shard's file is {shard['file']!r:.60}, which is no name of a shard")
    if not isinstance(manifest["identity"]["sites"], list) or not manifest["identity"]["sites"]:
        raise ValueError("its identity names no sites")
    for key, scale in manifest["scales"].items():
        if type(scale) not in (int, float) or not 0 < scale < float("inf"):
            raise ValueError(f"the scale of {key} is {scale!r:.60}")
    if manifest["mask"] is not None:
        TokenMask.from_dict(manifest["mask"])


def map_shard(file: Path, shard: dict[str, Any]) -> dict[str, files.Table]:
    """A shard's tensors. ValueError if their numbers of rows are not those of the manifest."""
    tables = files.map_tensors(file, _REMEDY)
    if missing := sorted({"ids", "lengths", "token", "document", "position", "context"} - tables.keys()):
        raise ValueError(f"{file} is damaged (it has no {missing}): {_REMEDY}")
    for key, table in tables.items():
        many = {"ids": shard["contexts"], "lengths": shard["contexts"]}.get(key, shard["rows"])
        if key not in ("values", "features") and table.shape[:1] != (many,):
            raise ValueError(
                f"{file} is no shard of this store ({key!r} has shape {table.shape}, the manifest says {many}): "
                + _REMEDY
            )
    return tables
