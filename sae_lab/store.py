"""harvest(): activations of a language model on disk, written shard by shard, read shuffled.

A store is a folder: ``manifest.json`` and safetensors shards. A shard holds some contexts' token ids and, for every
kept token, its activations at each site (float16 after a per-site power-of-two scale), id, document and position.
"""

import json
import logging
import os
import platform
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sae_lab import cache
from sae_lab.lm.model import LM
from sae_lab.lm.text import Context, Text, from_documents
from sae_lab.lm.tokens import pad
from sae_lab.types import Batch, Site, TokenBatch, TokenMask, as_sites

log = logging.getLogger(__name__)

VERSION = 1
MAX_NORM = 4.0  # in medians: attention sinks and massive activations lie above (the bundled model's at 6 medians)
FORWARD_TOKENS = 1024  # per forward pass; more brings nothing on a CPU
SHARD_TOKENS = 4096
RESERVE_EVERY = 5
_MANIFEST = {"identity", "mask", "scales", "complete", "shards"}
_NUMPY = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "I64": np.int64, "I32": np.int32}


def harvest(
    lm: LM,
    sites: Site | str | Iterable[Site | str],
    text: Text | Sequence[str],
    tokens: int = 100_000,
    *,
    path: str | Path | None = None,
    context: int = 128,
    pack: bool = False,
    mask: TokenMask | None = None,
) -> "Store":
    """Read ``tokens`` kept activations at the sites into a store on disk, or open the one that is there.

    One pass serves all sites and stops at the deepest. Killed at any moment and called again, it goes on from the last
    whole shard; asked for more tokens, it adds to what is there; a damaged shard is made again.

    Args:
        path: a folder; None is one in the cache, named by model, sites, text and settings.
        context: tokens the model sees at once, prefix included.
        pack: let contexts span documents.
        mask: which tokens count; None is ``lm.mask()`` and a norm of at most 4 medians of the first shard.

    Raises ValueError when the folder holds a store of another model, site or text (the difference is named), the text
    is empty or shorter than a context, or activations are not finite.
    """
    if tokens < 1 or context < 2:
        raise ValueError(f"harvest needs tokens >= 1 and context >= 2, got tokens={tokens}, context={context}")
    text = text if isinstance(text, Text) else from_documents([text] if isinstance(text, str) else text)
    wanted = as_sites(sites)
    for site in wanted:
        lm.width(site)  # an unknown site is refused before anything is written
    if context > lm.max_length:
        raise ValueError(f"context={context} is longer than the {lm.max_length} tokens this model reads")
    identity = {
        "model": lm.id,
        "model_fingerprint": lm.fingerprint(),
        "prefix_id": lm.prefix_id,
        "sites": [s.key for s in wanted],
        "text": text.name,
        "text_fingerprint": text.fingerprint,
        "context": context,
        "pack": pack,
        "mask": "default" if mask is None else mask.to_dict(),
    }
    folder = Path(path).expanduser() if path is not None else _default_path(identity)
    return _Harvest(lm, wanted, text, folder, identity, mask).run(tokens)


def _default_path(identity: dict[str, Any]) -> Path:
    digest = f"{zlib.crc32(json.dumps(identity, sort_keys=True).encode()):08x}-{identity['text_fingerprint'][:8]}"
    return cache.root() / "stores" / f"{'+'.join(identity['sites'])[:60]}-{digest}"


@dataclass
class _Harvest:
    """One call of harvest(): what is there, what is missing, and the loop that makes it."""

    lm: LM
    sites: list[Site]
    text: Text
    folder: Path
    identity: dict[str, Any]
    mask: TokenMask | None

    def run(self, tokens: int) -> "Store":
        from tqdm.auto import tqdm

        self.manifest = self._open()
        good = [_is_whole(self.folder, shard) for shard in self.manifest["shards"]]
        for shard, ok in zip(self.manifest["shards"], good, strict=True):
            if not ok:
                log.warning("shard %s of %s is damaged and is harvested again", shard["file"], self.folder)
        last_bad = max((i for i, ok in enumerate(good) if not ok), default=-1)
        have = sum(s["rows"] for s in self.manifest["shards"])
        if all(good) and (have >= tokens or self.manifest["complete"]):
            return self._result(tokens)
        for leftover in self.folder.glob(".*.tmp"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        done = 0
        bar = tqdm(total=tokens, unit="tok", desc="harvest " + "+".join(s.key for s in self.sites), dynamic_ncols=True)
        with bar:
            for number, contexts in enumerate(self._shards()):
                if number >= len(good) or not good[number]:
                    self._write(number, contexts)
                rows = self.manifest["shards"][number]["rows"]
                bar.update(max(0, min(rows, tokens - done)))
                done += rows
                if done >= tokens and number >= last_bad:
                    break
            else:
                self.manifest["complete"] = True
                self._save_manifest()
        return self._result(tokens)

    def _open(self) -> dict[str, Any]:
        file = self.folder / "manifest.json"
        if not file.exists():
            cache.make_folder(self.folder)
            return {
                "format": "sae_lab store", "version": VERSION, "identity": self.identity, "mask": None, "scales": {},
                "complete": False, "shards": [], "made_with": _versions(),
            }  # fmt: skip
        manifest = read_manifest(self.folder)
        differences = [
            f"{key}: {manifest['identity'].get(key)!r} there, {value!r} now"
            for key, value in self.identity.items()
            if manifest["identity"].get(key) != value
        ]
        if differences:
            raise ValueError(
                f"{self.folder} holds another harvest; it differs in {'; '.join(differences)}. "
                f"Pass another path=, or delete that folder"
            )
        return manifest

    def _shards(self) -> Iterator[list[Context]]:
        """Contexts in groups of about SHARD_TOKENS tokens: the same groups on every run."""
        length, group, count, seen = self.identity["context"], [], 0, 0
        tokenizer, prefix, pack = self.lm.tokenizer, self.lm.prefix_id, self.identity["pack"]
        for c in self.text.contexts(tokenizer, prefix, length, pack, shuffle=True):
            group.append(c)
            count += len(c.ids)
            seen += len(c.ids)
            if count >= max(SHARD_TOKENS, length):
                yield group
                group, count = [], 0
        if seen < length:
            if seen == 0:
                raise ValueError(f"the text {self.text.name!r} is empty: pass at least one document with a word in it")
            raise ValueError(
                f"the text holds {seen} tokens, less than one context of {length}: "
                f"pass more text, or context={max(seen, 2)}"
            )
        if group:
            yield group

    def _write(self, number: int, contexts: list[Context]) -> None:
        tensors, excluded = self._read(contexts)
        name = f"{number:06d}.safetensors"
        try:
            with cache.atomic(self.folder / name) as temporary:
                save_file(tensors, temporary)
                crc, size = _crc(temporary), temporary.stat().st_size
            entry = {
                "file": name, "rows": len(tensors["token"]), "contexts": len(contexts), "excluded": excluded,
                "crc32": crc, "bytes": size,
            }  # fmt: skip
            self.manifest["shards"][number : number + 1] = [entry]
            self._save_manifest()
        except (OSError, SafetensorError) as err:
            rows = sum(s["rows"] for s in self.manifest["shards"][:number])
            raise OSError(
                f"could not write shard {name} ({getattr(err, 'strerror', None) or err}). "
                f"The store {self.folder} holds {rows} whole tokens: make room "
                f"and call harvest again to go on, or open it with sl.Store({str(self.folder)!r})"
            ) from err

    def _read(self, contexts: list[Context]) -> tuple[dict[str, Tensor], int]:
        """The tensors of one shard, in the contexts' order, and how many of its tokens the mask leaves out."""
        # Contexts of like length go through the model together; the order of rows stays the text's.
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i].ids))
        per_context: list[dict[Site, Tensor]] = [{} for _ in contexts]
        while order:
            longest = len(contexts[order[-1]].ids)
            part = order[-max(1, FORWARD_TOKENS // longest) :]
            del order[-len(part) :]
            batch = pad([contexts[i].ids for i in part])
            acts, _ = self.lm.run(batch, self.sites, logits=False)
            for row, i in enumerate(part):
                per_context[i] = {s: x[row, : len(contexts[i].ids)].cpu() for s, x in acts.items()}
        acts = {s: torch.cat([c[s] for c in per_context]) for s in self.sites}
        lengths = torch.tensor([len(c.ids) for c in contexts])
        ids = torch.tensor([i for c in contexts for i in c.ids])
        positions = torch.cat([torch.arange(int(n)) for n in lengths])
        documents = torch.tensor([d for c in contexts for d in c.documents])
        kept = self._fix_mask(acts, ids, positions).keep(ids, positions, acts)
        context = torch.repeat_interleave(torch.arange(len(contexts)), lengths)
        tensors = {
            "ids": pad([c.ids for c in contexts]).ids.int(),
            "lengths": lengths.int(),
            "token": ids[kept].int(),
            "document": documents[kept].int(),
            "position": positions[kept].int(),
            "context": context[kept].int(),
        }
        for site, x in acts.items():
            tensors[site.key] = self._pack(site, x[kept])
        return tensors, int((~kept).sum())

    def _fix_mask(self, acts: dict[Site, Tensor], ids: Tensor, positions: Tensor) -> TokenMask:
        """The store's mask and scales: decided on the first shard, then kept."""
        for site, x in acts.items():
            if not bool(x.isfinite().all()):
                row = int((~x.isfinite().all(-1)).nonzero()[0])
                raise ValueError(
                    f"activations at {site} are not finite (token id {int(ids[row])} at position "
                    f"{int(positions[row])}): load the model in float32, or check its weights"
                )
        if self.manifest["mask"] is None:
            base = self.mask or self.lm.mask()
            usual = base.keep(ids, positions)
            medians = {s: float(x[usual].norm(dim=-1).median()) if usual.any() else 1.0 for s, x in acts.items()}
            limits = {s.key: MAX_NORM * m for s, m in medians.items()}
            mask = self.mask or TokenMask(base.special_ids, base.skip_first, limits)
            self.manifest["mask"] = mask.to_dict()
            # A power of two changes no digit; values come out near 1, far from float16's limits.
            self.manifest["scales"] = {
                s.key: 2.0 ** round(np.log2(max(m, 1e-30) / self.lm.width(s) ** 0.5)) for s, m in medians.items()
            }
        return TokenMask.from_dict(self.manifest["mask"])

    def _pack(self, site: Site, x: Tensor) -> Tensor:
        scaled = x / self.manifest["scales"][site.key]
        if len(x) and float(scaled.abs().max()) > 6e4:  # float16 ends at 65504
            log.warning("activations at %s overflow float16: this shard is kept in bfloat16 (3 digits)", site)
            return scaled.bfloat16()
        return scaled.half()

    def _save_manifest(self) -> None:
        with cache.atomic(self.folder / "manifest.json") as temporary:
            temporary.write_text(json.dumps(self.manifest, indent=1))

    def _result(self, tokens: int) -> "Store":
        store = Store(self.folder, rows=tokens)
        if len(store) < tokens:
            log.warning("asked for %d tokens, the text has %d", tokens, len(store))
        return store


class Runs:
    """Some of a store's rows as runs of consecutive ones: the i-th row without a list of them all."""

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
    """(training rows, reserved rows). Every fifth group is reserved: what must hold on new text, like BatchTopK's
    threshold, is fitted there, since a coder's own training tokens (and their documents) flatter it. Of fewer than five
    groups none is reserved."""
    reserved = groups % RESERVE_EVERY == RESERVE_EVERY - 1
    return Runs(starts[~reserved], lengths[~reserved]), Runs(starts[reserved], lengths[reserved])


def shuffled(rows: Runs, step: int, batch_size: int, seed: int) -> np.ndarray:
    """Batch ``step`` of an endless stream of passes over these rows, each pass in its own random order."""
    n = len(rows)
    at = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    out = np.empty(batch_size, np.int64)
    for epoch in np.unique(at // n):
        here = at // n == epoch
        out[here] = permute(at[here] - epoch * n, n, seed * 1_000_003 + int(epoch))
    return rows[out]


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """A random-looking permutation of 0..n-1, evaluated only at ``index``.

    Four Feistel rounds permute a power of four at least n; what lands outside is permuted again until it lands inside
    (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
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


class Store:
    """Activations on disk. ``Store(path)`` opens what ``harvest`` made; ``rows`` limits it to the first so many.

    ``len(store)`` is the number of kept tokens; ``store.at(site)`` chooses one of several sites.
    """

    def __init__(self, path: str | Path, rows: int | None = None, site: Site | str | None = None):
        self.path = Path(path).expanduser()
        self.manifest = read_manifest(self.path)
        self.identity: dict[str, Any] = self.manifest["identity"]
        self.sites = [Site.of(key) for key in self.identity["sites"]]
        self._site = Site.of(site) if site is not None else (self.sites[0] if len(self.sites) == 1 else None)
        self._starts = np.cumsum([0] + [s["rows"] for s in self.manifest["shards"]])
        self._rows = int(self._starts[-1]) if rows is None else min(rows, int(self._starts[-1]))
        if self._rows == 0:
            raise ValueError(f"the store {self.path} holds no whole shard yet: call harvest again with the same path")

    # ---- what it is

    @property
    def site(self) -> Site:
        """The site whose activations are read. ValueError while several could be meant."""
        if self._site is None:
            raise ValueError(
                f"this store has several sites ({', '.join(map(repr, self.sites))}): choose with store.at(site)"
            )
        return self._site

    @property
    def mask(self) -> TokenMask:
        return TokenMask.from_dict(self.manifest["mask"])

    @property
    def excluded(self) -> float:
        """The share of tokens that the mask leaves out."""
        out = sum(s["excluded"] for s in self.manifest["shards"])
        return out / (out + int(self._starts[-1]))

    @property
    def fingerprint(self) -> str:
        """Changes with what was harvested and how many rows are seen."""
        content = json.dumps([self.identity, self.manifest["mask"], self._rows, self._site and self._site.key])
        return f"{zlib.crc32(content.encode()):08x}-{self._rows}"

    def at(self, site: Site | str) -> "Store":
        """This store, reading one of its sites. ValueError names the sites there are."""
        site = Site.of(site)
        if site not in self.sites:
            raise ValueError(f"this store has no {site}; it has {', '.join(map(repr, self.sites))}")
        return Store(self.path, self._rows, site)

    def __len__(self) -> int:
        return self._rows

    @property
    def width(self) -> int:
        return self._tensor(0, self.site.key).shape[1]

    def __repr__(self) -> str:
        path = self.path.resolve()
        where = f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(self.path)
        return (
            f"Store({len(self):,} tokens of {self.identity['text']!r}, {self.identity['model']}, "
            f"{', '.join(map(repr, self.sites))}, {self.excluded:.1%} left out, {where!r})"
        )

    # ---- rows

    def _tensor(self, shard: int, key: str) -> np.ndarray:
        """A memory-mapped tensor of a shard (bfloat16 as its raw bits)."""
        return self._maps[shard][key]

    @cached_property
    def _maps(self) -> list[dict[str, np.ndarray]]:
        return [memory_map(self.path / s["file"]) for s in self.manifest["shards"]]

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
        out: np.ndarray | None = None
        for shard in range(len(self._starts) - 1):
            here = order[bounds[shard] : bounds[shard + 1]]
            if not len(here):
                continue
            part = self._tensor(shard, key)[rows[here] - self._starts[shard]]
            bits = part.dtype == np.uint16
            part = torch.from_numpy(part).view(torch.bfloat16).float().numpy() if bits else part
            if out is None:
                out = np.empty(
                    (len(rows), *part.shape[1:]), np.float32 if key in self.manifest["scales"] else part.dtype
                )
            out[here] = part
        assert out is not None
        tensor = torch.from_numpy(out)
        return tensor.mul_(self.manifest["scales"][key]) if key in self.manifest["scales"] else tensor.long()

    def batch(self, step: int, batch_size: int, seed: int = 0) -> Batch:
        """Batch number ``step`` of an endless shuffled stream: every pass sees each training row once, in an order of
        its own (about one row in five is reserved, see ``split_runs``).

        Costs O(batch_size): the order is a keyed permutation that is computed, not stored.
        """
        rows = shuffled(self._split[0], step, batch_size, seed)
        x = self.rows(rows, self.site.key)
        return Batch(x, x, self.rows(rows, "token"), self.rows(rows, "position"))

    @cached_property
    def _split(self) -> tuple[Runs, Runs]:
        """(training rows, reserved rows): whole documents are reserved, or contexts where documents are few."""
        numbered = [m["context"] + first for m, first in zip(self._maps, self._context_starts, strict=False)]
        context = np.concatenate(numbered)[: len(self)]
        starts = np.flatnonzero(np.diff(context, prepend=-1))
        document = self.rows(starts, "document").numpy()
        names, groups = np.unique(document, return_inverse=True)
        if len(names) < 2 * RESERVE_EVERY:
            groups = np.arange(len(starts))
        return split_runs(starts, np.diff(np.append(starts, len(self))), groups)

    @property
    def training_rows(self) -> int:
        """How many rows training sees in a pass; the others are reserved for fitting thresholds."""
        return len(self._split[0])

    def reserved(self, most: int) -> Tensor | None:
        """Activations that no batch holds, at most so many; None where the store is too small to reserve any."""
        rows = self._split[1]
        return self.rows(rows[np.arange(min(most, len(rows)))], self.site.key) if len(rows) else None

    def blocks(self, size: int = 8192) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(rows, activations) in the order of the text, each row once."""
        for start in range(0, len(self), size):
            rows = np.arange(start, min(start + size, len(self)))
            yield rows, self.rows(rows, self.site.key)

    # ---- contexts

    @cached_property
    def _context_starts(self) -> np.ndarray:
        return np.cumsum([0] + [s["contexts"] for s in self.manifest["shards"]])

    def contexts(self, rows: np.ndarray) -> np.ndarray:
        """The number of the context each row stands in."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        return self.rows(rows, "context").numpy() + self._context_starts[shards]

    def context_ids(self, context: int) -> np.ndarray:
        """A context's token ids, prefix included."""
        shard = int(np.searchsorted(self._context_starts, context, side="right") - 1)
        local = context - self._context_starts[shard]
        return self._tensor(shard, "ids")[local, : self._tensor(shard, "lengths")[local]]

    def context_rows(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, positions) of a context's kept tokens."""
        shard = int(np.searchsorted(self._context_starts, context, side="right") - 1)
        local = context - self._context_starts[shard]
        first, last = np.searchsorted(self._tensor(shard, "context"), [local, local + 1])
        return self._starts[shard] + np.arange(first, last), self._tensor(shard, "position")[first:last]


class Rows:
    """A plain (tokens, d_in) tensor that serves batches like a store."""

    mask = None
    sites: tuple[Site, ...] = ()

    def __init__(self, x: Tensor):
        if x.dim() != 2 or not x.is_floating_point() or len(x) == 0:
            raise ValueError(f"activations must be a float tensor (tokens, d_in), got {tuple(x.shape)} {x.dtype}")
        self.x = x.detach()

    @cached_property
    def fingerprint(self) -> str:
        return f"{zlib.crc32(self.x.contiguous().view(torch.uint8).cpu().numpy().tobytes()):08x}-{len(self.x)}"

    @property
    def width(self) -> int:
        return self.x.shape[1]

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, step: int, batch_size: int, seed: int = 0) -> Batch:
        rows = torch.from_numpy(shuffled(self._split[0], step, batch_size, seed))
        x = self.x[rows.to(self.x.device)].float()
        return Batch(x, x)

    @cached_property
    def _split(self) -> tuple[Runs, Runs]:
        starts = np.arange(0, len(self), 128)
        return split_runs(starts, np.diff(np.append(starts, len(self))), np.arange(len(starts)))

    @property
    def training_rows(self) -> int:
        return len(self._split[0])

    def reserved(self, most: int) -> Tensor | None:
        rows = torch.from_numpy(self._split[1][np.arange(min(most, len(self._split[1])))])
        return self.x[rows.to(self.x.device)].float() if len(rows) else None

    def blocks(self, size: int = 8192) -> Iterator[tuple[np.ndarray, Tensor]]:
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self))), self.x[start : start + size].float()


# ---------------------------------------------------------------------------------------------- files


def read_manifest(folder: Path) -> dict[str, Any]:
    """A store's manifest. ValueError where there is none, or one that is no store's."""
    file = Path(folder) / "manifest.json"
    if not file.exists():
        raise ValueError(
            f"{folder} is no store (no manifest.json): make one with sl.harvest(..., path={str(folder)!r})"
        )
    try:
        manifest = json.loads(file.read_text())
        if manifest["format"] != "sae_lab store" or manifest["version"] > VERSION:
            raise ValueError(f"format {manifest['format']!r} version {manifest['version']}")
        if missing := _MANIFEST - manifest.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(
            f"{file} is no manifest this version reads ({err}): delete the folder and harvest again"
        ) from err
    return manifest


def _is_whole(folder: Path, shard: dict[str, Any]) -> bool:
    file = folder / shard["file"]
    return file.exists() and file.stat().st_size == shard["bytes"] and _crc(file) == shard["crc32"]


def _crc(file: Path) -> int:
    value = 0
    with open(file, "rb") as f:
        while part := f.read(1 << 24):
            value = zlib.crc32(part, value)
    return value


def memory_map(file: Path) -> dict[str, np.ndarray]:
    """A safetensors file's tensors without reading them (an 8-byte length, a JSON header, then the bytes)."""
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length)) if 0 < length < size else {}
        maps = {}
        for name, info in header.items():
            if name == "__metadata__":
                continue
            start, end = info["data_offsets"]
            dtype = np.dtype(_NUMPY[info["dtype"]])
            shape = tuple(info["shape"])
            if 8 + length + end > size or end - start != dtype.itemsize * int(np.prod(shape)):
                raise ValueError("tensor runs past the end of the file")
            empty = 0 in shape  # a memory map cannot be empty
            maps[name] = np.zeros(shape, dtype) if empty else np.memmap(file, dtype, "r", 8 + length + start, shape)
        if not maps:
            raise ValueError("no tensors")
        return maps
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(
            f"shard {file} is damaged ({err}): call sl.harvest again with the same path to remake it"
        ) from err


def _versions() -> dict[str, Any]:
    import transformers

    from sae_lab import __version__

    return {
        "sae_lab": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "threads": torch.get_num_threads(),
    }  # fmt: skip


__all__ = ["Rows", "Store", "TokenBatch", "harvest"]
