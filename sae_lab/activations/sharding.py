"""The work of a harvest: it finds the shards that are missing, reads them through the model and writes them."""

import json
import logging
import platform
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lab import cache, files, processes
from sae_lab.activations import dealing
from sae_lab.activations.reading import read_real, read_there
from sae_lab.activations.store import VERSION, Store, map_shard, read_manifest
from sae_lab.lm import forms
from sae_lab.lm.passes import packed
from sae_lab.lm.text import padded
from sae_lab.lm.tokens import pad
from sae_lab.results import counted
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch, TokenMask

log = logging.getLogger(__name__)

MAX_NORM = 4.0  # in medians: attention sinks and massive activations lie above (the bundled model's at 6 medians)
FORWARD_TOKENS = 1408  # per forward pass at most: eleven contexts of 128, and a shard is three such passes
SHARD_TOKENS = 4096
Kept = tuple[Tensor, dict[str, Tensor]]  # which tokens of a shard count, what the store keeps of them
ORDER = 3  # version of the rule that puts contexts into shards


@dataclass
class Harvest:
    """One call of ``harvest``: it finds the missing shards, and makes them."""

    lm: Any  # LM or Net
    sites: list[Site]
    text: Any  # Text or Inputs
    folder: Path
    identity: dict[str, Any]
    mask: TokenMask | None
    roles: tuple[str, ...] = ()
    coder: SparseCoder | None = None
    most: float | None = None  # tokens in a pass, where it is not the text's passes that are read

    def run(self, tokens: int) -> Store:
        """The store, its missing shards made first, while no other process writes there."""
        self.manifest = self._open()
        if (store := self._made(tokens)) is not None:
            cache.tidy(self.folder)
            return store
        with cache.sole_writer(self.folder):
            before, self.manifest = self.manifest, self._open()
            if self.manifest != before and (store := self._made(tokens)) is not None:  # another process made it
                return store
            return self._make(tokens)

    def run_with(self, peers: processes.Peers, tokens: int) -> Store:
        """The same by several processes."""
        peers.require_same(self.identity | {"folder": str(self.folder), "tokens": tokens}, "harvest")

        def begin() -> dict[str, Any]:
            self.manifest = self._open()
            made = self._made(tokens) is not None
            return {"made": made, "manifest": self.manifest, "good": self.good}

        if not peers.by_first(begin)["made"]:
            with cache.sole_writer(self.folder) if peers.first else nullcontext():
                found = peers.by_first(begin)  # another process may have made it
                self.manifest, self.good = found["manifest"], found["good"]
                if not found["made"]:
                    dealing.require_seen(self.folder, peers, self.save_manifest)
                    dealing.harvest(self, peers, tokens)
                peers.wait()  # nobody opens the store before it is whole
        return self._result(tokens)

    def open(self, on_disk: bool) -> None:
        """Get ready for ``shard``."""
        self.manifest = self._open() if on_disk else self._fresh()
        self.good = self._judged()

    def shard(self, number: int, passes: list[list[Any]], on_disk: bool) -> tuple[dict[str, np.ndarray], int]:
        """(the tensors of a shard, as a store has them, bfloat16 as raw bits; how many tokens the mask leaves out).
        on_disk: it is read from the folder, or written there."""
        if on_disk and self.has(number):
            entry = self.manifest["shards"][number]
            tables = map_shard(self.folder / entry["file"], entry)
            return {key: table[:] for key, table in tables.items()}, entry["excluded"]
        tensors, excluded = self.read(passes)
        if on_disk:
            with cache.sole_writer(self.folder):
                if (self.folder / "manifest.json").exists():  # another process may have written there
                    self.manifest["shards"] = self._open()["shards"]
                self._write(number, tensors, excluded)
            self.good[number : number + 1] = [True]
        return in_numpy(tensors), excluded

    def has(self, number: int) -> bool:
        """Whether a shard lies whole in the folder."""
        return number < len(self.good) and self.good[number]

    def finish(self) -> None:
        """The text has been read to its end into the folder."""
        if not self.manifest["complete"]:
            with cache.sole_writer(self.folder):
                self.manifest = self._open()
                self.manifest["complete"] = True
                self.save_manifest()

    def _judged(self) -> list[bool]:
        """Which shards of the manifest are whole."""
        files_of = [(self.folder / shard["file"], shard) for shard in self.manifest["shards"]]
        return [f.exists() and (f.stat().st_size, _crc(f)) == (s["bytes"], s["crc32"]) for f, s in files_of]

    def _made(self, tokens: int) -> Store | None:
        self.good = self._judged()
        have = sum(s["rows"] for s in self.manifest["shards"])
        return self._result(tokens) if all(self.good) and (have >= tokens or self.manifest["complete"]) else None

    def _make(self, tokens: int) -> Store:
        good, last_bad, done = self.good, self.last_damaged(), 0
        with self.bar(tokens) as bar, ThreadPoolExecutor(1, "sae_lab writes") as writer:
            writing: Future[None] | None = None
            for number, passes in enumerate(dealing.ahead(self.shards())):
                if number >= len(good) or not good[number]:
                    tensors, excluded = self.read(passes)
                    if writing is not None:
                        writing.result()  # raises its error here
                    writing = writer.submit(self._write, number, tensors, excluded)
                    rows = len(tensors["token"])
                else:
                    rows = self.manifest["shards"][number]["rows"]
                bar.update(max(0, min(rows, tokens - done)))
                done += rows
                if done >= tokens and number >= last_bad:
                    break
            else:
                self.manifest["complete"] = True
            if writing is not None:
                writing.result()
            self.save_manifest()
        return self._result(tokens)

    def last_damaged(self) -> int:
        """The number of the last shard that must be made again, or -1. Each is logged."""
        for shard, ok in zip(self.manifest["shards"], self.good, strict=True):
            if not ok:
                log.warning("shard %s of %s is damaged and is harvested again", shard["file"], self.folder)
        return max((i for i, ok in enumerate(self.good) if not ok), default=-1)

    def bar(self, tokens: int, quiet: bool = False) -> Any:
        """What shows progress."""
        from tqdm.auto import tqdm

        name = "harvest " + "+".join(s.key for s in self.sites)
        return tqdm(total=tokens, unit="tok", desc=name, dynamic_ncols=True, disable=quiet)

    def _open(self) -> dict[str, Any]:
        if not (self.folder / "manifest.json").exists():
            cache.make_folder(self.folder)
            return self._fresh()
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

    def _fresh(self) -> dict[str, Any]:
        import transformers

        from sae_lab import __version__

        versions = {
            "sae_lab": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(), "threads": torch.get_num_threads(),
        }  # fmt: skip
        return {
            "format": "sae_lab store", "version": VERSION, "identity": self.identity, "mask": None, "scales": {},
            "complete": False, "shards": [], "made_with": versions,
        }  # fmt: skip

    def rows_there(self) -> float:
        """Rows of the whole shards, judged by file size alone; infinite if the text was read to its end."""
        if not (self.folder / "manifest.json").exists():
            return 0
        manifest = self._open()
        sizes = {file.name: file.stat().st_size for file in self.folder.iterdir()}
        whole = [shard["rows"] for shard in manifest["shards"] if sizes.get(shard["file"]) == shard["bytes"]]
        return float("inf") if manifest["complete"] and len(whole) == len(manifest["shards"]) else sum(whole)

    def shards(self) -> Iterator[list[list[Any]]]:
        """Passes of contexts in groups of about SHARD_TOKENS tokens: the same groups on every run."""
        length, group, count, seen = self.identity["context"], [], 0, 0
        tokenizer, prefix, pack = self.lm.tokenizer, self.lm.prefix_id, self.identity["pack"]
        for contexts in self.text.passes(tokenizer, prefix, length, pack, FORWARD_TOKENS):
            group.append(contexts)
            tokens = sum(len(c.ids) for c in contexts)
            count += tokens
            seen += tokens
            if count >= max(SHARD_TOKENS, length):
                yield group
                group, count = [], 0
        if seen < length:
            if seen == 0:
                raise ValueError(f"the text {self.text.name!r} is empty: pass at least one document with a word in it")
            raise ValueError(
                f"the text holds {counted(seen, 'token')}, less than one context of {length}: "
                f"pass more text, or context={max(seen, 2)}"
            )
        if group:
            yield group

    def _write(self, number: int, tensors: dict[str, Tensor], excluded: int) -> None:
        """Write a shard to disk, then into the manifest; in a thread, while the model reads the next shard."""
        with cache.told(self.folder / f"{number:06d}.safetensors", self._kept(number)):
            self.enter(number, self.write_shard(number, tensors, excluded))
            self.save_manifest()

    def write_shard(self, number: int, tensors: dict[str, Tensor], excluded: int) -> dict[str, Any]:
        """Write a shard's file; returns its entry in the manifest."""
        name = f"{number:06d}.safetensors"
        with cache.atomic(self.folder / name, self._kept(number)) as temporary:
            files.write_tensors(tensors, temporary)
            crc, size = _crc(temporary), temporary.stat().st_size
        return {
            "file": name, "rows": len(tensors["token"]), "contexts": len(tensors["lengths"]), "excluded": excluded,
            "crc32": crc, "bytes": size,
        }  # fmt: skip

    def enter(self, number: int, entry: dict[str, Any]) -> None:
        """Put a shard's entry into the manifest."""
        self.manifest["shards"][number : number + 1] = [entry]

    def _kept(self, number: int) -> str:
        """What a full disk leaves, for the error."""
        rows = sum(s["rows"] for s in self.manifest["shards"][:number])
        opened = f", or open it with sl.Store({str(self.folder)!r})" if rows else ""
        whole = counted(rows, "whole token")
        return f"the store there holds {whole}: make room and call harvest again to go on{opened}"

    def read(self, passes: list[list[Any]]) -> tuple[dict[str, Tensor], int]:
        """The tensors of one shard, in the contexts' order, and how many of its tokens the mask leaves out."""
        contexts = [c for group in passes for c in group]
        lengths = torch.tensor([len(c.ids) for c in contexts])
        ids = torch.tensor([i for c in contexts for i in c.ids])
        positions = torch.cat([torch.arange(int(n)) for n in lengths])
        documents = torch.tensor([d for c in contexts for d in c.documents])
        if self.manifest["mask"] is None:
            self._require_roles(contexts)
        kept, found = self._fitting(passes, partial(self._read_batches, ids=ids, positions=positions))
        context = torch.repeat_interleave(torch.arange(len(contexts)), lengths)
        tensors = {
            "ids": pad([c.ids for c in contexts]).ids.int(),
            "lengths": lengths.int(),
            "token": ids[kept].int(),
            "document": documents[kept].int(),
            "position": positions[kept].int(),
            "context": context[kept].int(),
        }
        return tensors | found, int((~kept).sum())

    def padded(self, group: list[Any]) -> TokenBatch:
        """Contexts as one batch of the model."""
        return padded(group)

    def _read_batches(self, batches: list[TokenBatch], ids: Tensor, positions: Tensor) -> Kept:
        """(which tokens count, what the store keeps of them)."""
        if self.coder is not None:
            return self._read_codes(batches, self.coder)
        if self.lm.remote and self.manifest["mask"] is not None:
            return self._read_packed(batches)
        return self._read_whole(batches, ids, positions)

    def _fitting(self, passes: list[list[Any]], read: Callable[[list[TokenBatch]], Kept]) -> Kept:
        """What ``read`` gives for the contexts of a shard, in passes that fit into memory: where it runs out, in passes
        of half as many tokens, and so in all later shards."""
        if self.most is None and self.lm.device.type != "cpu":
            self.most = float("inf")  # the whole shard: an accelerator gains from rows that no CPU's cache has room for
        while True:
            groups = passes if self.most is None else in_groups([c for group in passes for c in group], self.most)
            try:
                return read([self.padded(group) for group in groups])
            except RuntimeError as err:
                if not _out_of_memory(err):
                    raise
                if all(len(group) == 1 for group in groups):
                    raise ValueError(
                        f"one context of {max(map(_longest, groups))} tokens does not fit into the memory of "
                        f"{self.lm.device}: pass a smaller context=, or free memory there"
                    ) from err
                self.most = max(len(group) * _longest(group) for group in groups) // 2
            # Here the error, and with it the tensors of the pass that failed, is gone.
            log.warning("memory ran out: passes of the model have at most %d tokens from now on", self.most)
            if self.lm.device.type == "cuda":
                torch.cuda.empty_cache()

    def _read_whole(
        self, batches: list[TokenBatch], ids: Tensor, positions: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(which tokens count, their activations)."""
        acts = read_real(self.lm, self.sites, batches)
        mask = self._fix_mask(acts, ids, positions)
        kept = mask.keep(ids, positions, acts) & _counted(mask, batches)
        return kept, {s.key: self._pack(s, x[kept]) for s, x in acts.items()}

    def _read_packed(self, batches: list[TokenBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """``_read_whole``, with the tokens chosen and packed where the model runs."""
        mask, scales = TokenMask.from_dict(self.manifest["mask"]), self.manifest["scales"]
        common = {"special": list(mask.special_ids), "skip_first": mask.skip_first}
        after = {
            s: partial(packed, limit=mask.max_norm.get(s.key, float("inf")), scale=scales[s.key], **common)
            for s in self.sites
        }
        found = [
            self.lm.run(batch, self.sites, logits=False, after=after, form=self._packed_form(batch))[0]
            for batch in batches
        ]
        keeps = {s: torch.cat([part[s]["keep"] for part in found]) for s in self.sites}
        # A token left out at one site is left out at every site.
        kept = torch.stack(list(keeps.values())).all(0) & _counted(mask, batches)
        tensors = {}
        for s in self.sites:
            parts = [part[s]["x"] for part in found]
            halves = all(part.dtype == torch.half for part in parts)
            if not halves:
                parts = [part.float() * scales[s.key] if part.dtype == torch.half else part for part in parts]
            x = torch.cat(parts)[kept[keeps[s]]]
            self._require_finite(s, x)
            tensors[s.key] = x if halves else self._pack(s, x)
        return kept, tensors

    def _packed_form(self, batch: TokenBatch) -> dict[Site, Any]:
        """The form of what ``packed`` returns at each site."""
        keep = Bool[Tensor, f"{int(batch.mask.sum())}"]

        def rows(found: Any, width: int) -> bool:
            return forms.has(found, {"keep": keep, "x": Float[Tensor, f"kept {width}"]}) and len(found["x"]) == int(
                found["keep"].sum()
            )

        return {s: partial(rows, width=self.lm.width(s)) for s in self.sites}

    def _read_codes(self, batches: list[TokenBatch], coder: SparseCoder) -> tuple[Tensor, dict[str, Tensor]]:
        """(which tokens count, their codes), made where the model is."""
        self.manifest["mask"] = (coder.mask or self.lm.mask()).to_dict()
        found = read_there(self.lm, coder, batches)
        names = ("values", "features", "counts")
        codes = {name: torch.cat([part[name] for part in found]).contiguous() for name in names}
        return torch.cat([part["keep"] for part in found]), codes

    def _require_roles(self, contexts: list[Any]) -> None:
        """ValueError if the mask keeps tokens of some roles, and the first contexts have none of them."""
        wanted = self.mask.roles if self.mask is not None else self.roles
        found = {role for c in contexts for role in c.roles or ()}
        if wanted and not found:
            raise ValueError(
                f"roles={wanted} keeps tokens of a chat's roles, and this text holds plain documents: pass chats "
                "(lists of {'role', 'content'}), or leave roles out"
            )
        if wanted and not found & set(wanted):
            raise ValueError(
                f"no token of the first {counted(len(contexts), 'context')} is of roles={wanted}: their roles are "
                f"{', '.join(sorted(found))}"
            )

    def _fix_mask(self, acts: dict[Site, Tensor], ids: Tensor, positions: Tensor) -> TokenMask:
        """The store's mask; it and the scales are fixed on the first shard."""
        for site, x in acts.items():
            self._require_finite(site, x, ids, positions)
        if self.manifest["mask"] is None:
            base = self.mask or self.lm.mask()
            usual = base.keep(ids, positions)
            usual = usual if bool(usual.any()) else torch.ones_like(usual)  # no token of this shard counts: take all
            norms = {s: x[usual].norm(dim=-1) for s, x in acts.items()}
            medians = {s: float(n.median()) or float(n.mean()) for s, n in norms.items()}  # half of them may be 0
            limits = {s.key: MAX_NORM * m for s, m in medians.items()}
            mask = self.mask or TokenMask(base.special_ids, base.skip_first, limits, self.roles)
            self.manifest["mask"] = mask.to_dict()
            # Division by a power of two is exact, and brings values near 1, far from float16's limits.
            self.manifest["scales"] = {
                s.key: 2.0 ** round(np.log2(max(m, 1e-30) / self.lm.width(s) ** 0.5)) for s, m in medians.items()
            }
        return TokenMask.from_dict(self.manifest["mask"])

    @staticmethod
    def _require_finite(site: Site, x: Tensor, ids: Any = None, positions: Any = None) -> None:
        bad = ~x.isfinite().all(-1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            where = "" if ids is None else f" (token id {int(ids[row])} at position {int(positions[row])})"
            raise ValueError(
                f"activations at {site} are not finite{where}: load the model in float32, or check its weights"
            )

    def _pack(self, site: Site, x: Tensor) -> Tensor:
        scaled = x / self.manifest["scales"][site.key]
        if len(x) and float(scaled.abs().max()) > 6e4:  # float16 ends at 65504
            log.warning("activations at %s overflow float16: this shard is kept in bfloat16 (3 digits)", site)
            return scaled.bfloat16()
        return scaled.half()

    def save_manifest(self) -> None:
        with cache.atomic(self.folder / "manifest.json") as temporary:
            files.write_json(temporary, self.manifest, indent=1)

    def _result(self, tokens: int) -> Store:
        store = Store(self.folder, rows=tokens)
        if len(store) < tokens:
            log.warning("asked for %d tokens, the text has %d", tokens, len(store))
        return store


def in_numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The same, bfloat16 as raw bits."""
    raw = {k: t.view(torch.int16).numpy().view(np.uint16) for k, t in tensors.items() if t.dtype == torch.bfloat16}
    return {key: t.numpy() for key, t in tensors.items() if key not in raw} | raw


def _counted(mask: TokenMask, batches: list[TokenBatch]) -> Bool[Tensor, " tokens"]:
    """Which real tokens of the batches the mask keeps by id, position and role."""
    return torch.cat([mask.of(batch)[batch.mask] for batch in batches])


def in_groups(contexts: list[Any], most: float) -> list[list[Any]]:
    """The contexts, in their order, in groups that have at most so many tokens once they are padded."""
    groups: list[list[Any]] = []
    for context in contexts:
        if groups and (len(groups[-1]) + 1) * max(_longest(groups[-1]), len(context.ids)) <= most:
            groups[-1].append(context)
        else:
            groups.append([context])
    return groups


def _longest(contexts: list[Any]) -> int:
    return max(len(c.ids) for c in contexts)


def _out_of_memory(err: RuntimeError) -> bool:
    """Whether memory ran out: by torch's error for it, or, where there is none, by its words."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(err, torch.cuda.OutOfMemoryError) or any(word in str(err) for word in words)


def tokens_of(contexts: list[Any]) -> int:
    """The number of tokens in contexts."""
    return sum(len(c.ids) for c in contexts)


def _crc(file: Path) -> int:
    value = 0
    with open(file, "rb") as f:
        while part := f.read(1 << 24):
            value = zlib.crc32(part, value)
    return value


def folder_of(path: str | Path | None, identity: Mapping[str, Any]) -> Path:
    """Where a harvest goes."""
    if path is not None:
        return Path(path).expanduser()
    digest = zlib.crc32(json.dumps(identity, sort_keys=True).encode())
    name = f"{'+'.join(identity['sites'])[:60]}-{digest:08x}-{identity['text_fingerprint'][:8]}"
    return cache.root() / "stores" / name
