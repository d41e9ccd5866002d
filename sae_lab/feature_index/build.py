"""Building a FeatureIndex: one streaming pass over a store; the language model's layers are never run.

Pass 1 writes each block's codes, sorted by feature, to a file of its own (so an interrupted build goes on where it
was). Pass 2 places them feature by feature into two memory-mapped arrays. Then come what each feature fires on most,
what fires with it, its logit lens and its nearest neighbours, all for some features at a time.
"""

import copy
import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_lab import cache, costs, files
from sae_lab.activations.store import Store
from sae_lab.arguments import as_annotated
from sae_lab.costs import Cost, timed
from sae_lab.feature_index.chunks import CHUNK_BYTES
from sae_lab.feature_index.cofiring import DENSE_BYTES, cofiring
from sae_lab.feature_index.directions import RANDOM, lens, neighbours
from sae_lab.feature_index.index import CHECKED, VERSION, FeatureIndex, read_facts
from sae_lab.feature_index.labels import Labels
from sae_lab.feature_index.summaries import readability, selectivity, strongest_first, summarise
from sae_lab.lm.model import LM
from sae_lab.lm.network import Network
from sae_lab.results import counted
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.families.topk import TopK

log = logging.getLogger(__name__)

FILES = ("index.json", "stats.safetensors", *CHECKED)
BLOCK = 8192  # rows of a file
PRE_BYTES = 256 << 20  # pre-activations that are made together: a block of a wide coder comes in parts
READ_BYTES = 128 << 20  # a store is opened anew after this many: what was read stays in memory until then

TRIED_PAIRS = 1 << 26  # pairs of features whose co-firing is timed for an estimate
PAIR_SECONDS = 16e-9  # measured time of the sparse product, for each pair of features that fire on one token


@as_annotated
def index_features(
    coder: SparseCoder, lm: Network, store: Store, path: str | Path | None = None, rebuild: bool = False
) -> FeatureIndex:
    """An index of all features of a coder over a store: density, mean and max, contexts, co-firing, lens, neighbours.

    Written to ``path`` (None: a folder in the cache named by coder and store); called again it opens what is there, and
    an interrupted build goes on. rebuild: make it again in any case, as when a file of it is damaged; labels and notes
    stay. Of a ``sl.Net`` a context is an item, its tokens are its places, and there is no lens; ``index.draw`` says how
    items look.

    Raises ValueError when the store comes from another model, site or width, ``path`` holds another index, or a file of
    the index is damaged.
    """
    _check(coder, lm, store)
    identity, folder = _place_of(coder, store, path)
    if _is_done(folder, identity, rebuild):
        _tidy(folder)
    else:
        kept = "the blocks that are done are kept: make room there and call index_features again to go on"
        with coder.evaluating(), cache.sole_writer(folder), cache.told(folder, kept):
            if rebuild:
                for name in (*FILES, "building.json", *(f.name for f in folder.glob("block-*.safetensors"))):
                    (folder / name).unlink(missing_ok=True)
            if not _is_done(folder, identity):  # else another process made it
                _build(coder, lm, store, folder, identity)
    return FeatureIndex(folder, store, lm, coder)


def _place_of(coder: SparseCoder, store: Store, path: str | Path | None) -> tuple[dict[str, Any], Path]:
    """(what the index is of, its folder)."""
    identity = {"coder": coder.fingerprint(), "store": store.fingerprint, "store_path": str(store.path.resolve())}
    named = cache.root() / "indexes" / f"{identity['coder']}-{identity['store']}"
    return identity, Path(path) if path is not None else named


def _check(coder: SparseCoder, lm: Network, store: Store) -> None:
    site = store.site
    if store.identity["model_fingerprint"] != lm.fingerprint():
        raise ValueError(
            f"the store was harvested from {store.identity['model']} (weights {store.identity['model_fingerprint']}), "
            f"and {lm} has other weights: index with the model the store comes from"
        )
    if coder.reads and coder.reads != (site,):
        raise ValueError(f"the coder was trained at {coder.reads[0]}, the store holds {site}: pass store.at(...)")
    if made_by := store.identity.get("coder"):
        if made_by != coder.fingerprint():
            raise ValueError(f"the store holds codes of coder {made_by}, this is {coder.fingerprint()}: harvest anew")
    elif store.width != coder.d_in:
        raise ValueError(f"the coder reads d_in={coder.d_in}, the store holds width {store.width}: wrong site or coder")


def _is_done(folder: Path, identity: dict[str, Any], rebuild: bool = False) -> bool:
    """Whether the folder holds this index, whole, and ``rebuild`` is off. ValueError when it holds another."""
    for name in ("index.json", "building.json"):
        file = folder / name
        if not file.exists():
            continue
        try:
            there = read_facts(file)
        except ValueError:
            if rebuild:
                continue
            raise
        differences = [f"{k}: {there.get(k)} there, {v} now" for k, v in identity.items() if there.get(k) != v]
        if {d.split(":")[0] for d in differences} - {"store_path"}:  # a store may be moved
            differ = "; ".join(differences)
            raise ValueError(f"{folder} holds another index; it differs in {differ}: pass another path=")
        return name == "index.json" and there.get("version") == VERSION and not rebuild
    return False


def _build(coder: SparseCoder, lm: Network, store: Store, folder: Path, identity: dict[str, Any]) -> None:
    from tqdm.auto import tqdm

    with cache.atomic(folder / "building.json") as temporary:
        files.write_json(temporary, identity)
    with tqdm(total=len(store), unit="tok", desc="index", dynamic_ncols=True) as bar:
        counts = _encode(coder, store, folder, bar.update)
        bar.set_description("index: contexts")
        offsets = np.concatenate([[0], counts.cumsum()])
        rows, values = _place(folder, -(-len(store) // BLOCK), offsets)
        tables = {"offsets": offsets, "f_scale": coder.f_scale.cpu().numpy()}
        tables |= summarise(store, offsets, rows, values)
        tables["per_row"] = _by_row(folder, len(store), tables["max"])
        labels = Labels.decode(lm, store)
        if isinstance(lm, LM):
            tables["readability"] = readability(lm, labels, tables["top_tokens"])
        else:
            tables["readability"] = selectivity(store, offsets, rows)
        bar.set_description("index: co-firing")
        tables |= cofiring(offsets, rows, len(store))
        bar.set_description("index: lens and neighbours")
        tables |= lens(coder, lm, coder.writes[0] if coder.writes else store.site)  # a transcoder's, where it writes
        tables |= neighbours(coder)
    with cache.atomic(folder / "labels.json") as temporary:
        labels.write(temporary)
    with cache.atomic(folder / "stats.safetensors") as temporary:
        files.write_tensors({n: torch.from_numpy(np.ascontiguousarray(t)) for n, t in tables.items()}, temporary)
    facts = identity | {"version": VERSION, "d_sae": coder.d_sae, "site": store.site.key, "rows": len(store)}
    facts |= {"notes": coder.id, "blocks": {name: files.blocks_of(folder / name) for name in CHECKED}}
    with cache.atomic(folder / "index.json") as temporary:
        files.write_json(temporary, facts, indent=1)
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove what a whole index no longer needs, also after a kill just before."""
    with suppress(OSError):  # they may belong to another user
        for left in [*folder.glob("block-*.safetensors"), folder / "building.json"]:
            left.unlink(missing_ok=True)
    cache.tidy(folder)


def _encode(coder: SparseCoder, store: Store, folder: Path, done: Callable[[int], Any]) -> np.ndarray:
    """Make all blocks of codes. Returns each feature's number of codes. ``done`` gets each block's number of rows."""
    counts = np.zeros(coder.d_sae, np.int64)
    with coder.reusing(_rows_at_once(coder)):
        for number in range(-(-len(store) // BLOCK)):
            if number % max(1, READ_BYTES // (2 * coder.d_in * BLOCK)) == 0:
                store = Store(store.path, len(store), store.site)
            codes = _block(coder, store, folder, number)
            counts += np.bincount(codes["features"], minlength=coder.d_sae)
            done(min(BLOCK, len(store) - number * BLOCK))
    return counts


def _rows_at_once(coder: SparseCoder) -> int:
    return min(BLOCK, max(1, PRE_BYTES // (4 * coder.d_sae)))


def _block(coder: SparseCoder, store: Store, folder: Path, number: int) -> dict[str, np.ndarray]:
    """Codes of one block of rows, sorted by feature, then row; from its file if that is whole."""
    file = folder / f"block-{number:06d}.safetensors"
    with suppress(FileNotFoundError, ValueError, KeyError):  # a damaged one is made again
        found, _ = files.read_tensors(file)
        return {name: found[name].numpy() for name in ("features", "rows", "values")}
    features, rows, values = [], [], []
    last, size = min((number + 1) * BLOCK, len(store)), _rows_at_once(coder)
    for start in range(number * BLOCK, last, size):
        part = np.arange(start, min(start + size, last))
        if "coder" in store.identity:
            codes = store.codes(start, int(part[-1]) + 1, coder.d_sae)
        else:
            codes = coder.sparse_codes(store.rows(part, store.site.key).to(coder.W_dec.device))
        features.append(codes.features.int().cpu())
        rows.append(codes.rows.int().cpu() + start)
        values.append(codes.values.cpu())
    by_feature, order = torch.cat(features).sort(stable=True)
    block = {"features": by_feature, "rows": torch.cat(rows)[order], "values": torch.cat(values)[order]}
    with cache.atomic(file) as temporary:
        files.write_tensors(block, temporary)
    return {name: t.numpy() for name, t in block.items()}


def _place(folder: Path, blocks: int, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All codes by feature: ``rows.npy`` and ``values.npy``, each feature's part in the order of rows."""
    total = max(int(offsets[-1]), 1)
    cursor = offsets[:-1].copy()
    with cache.atomic(folder / "rows.npy") as row_file, cache.atomic(folder / "values.npy") as value_file:
        rows, values = cache.mapped(row_file, np.int32, total), cache.mapped(value_file, np.float32, total)
        for number in range(blocks):
            block, _ = files.read_tensors(folder / f"block-{number:06d}.safetensors")
            features = block["features"].numpy().astype(np.int64)
            counts = np.bincount(features, minlength=len(cursor))
            within = np.arange(len(features)) - np.repeat(counts.cumsum() - counts, counts)
            at = cursor[features] + within
            rows[at], values[at] = block["rows"].numpy(), block["values"].numpy()
            cursor += counts
        rows.flush()
        values.flush()
    return rows, values


def _by_row(folder: Path, many: int, largest: np.ndarray) -> np.ndarray:
    """All codes by row of the store: ``row_features.npy`` and ``row_values.npy``, in parts of the feature's largest
    activation, which half precision holds. Returns each row's number of codes."""
    per_row, at = np.zeros(many, np.int32), 0
    small = np.uint16 if len(largest) <= 1 << 16 else np.int32
    total = np.load(folder / "rows.npy", mmap_mode="r").shape[0]
    with cache.atomic(folder / "row_features.npy") as of_features, cache.atomic(folder / "row_values.npy") as of_values:
        features, values = cache.mapped(of_features, small, total), cache.mapped(of_values, np.float16, total)
        for first in range(0, many, BLOCK):
            block, _ = files.read_tensors(folder / f"block-{first // BLOCK:06d}.safetensors")
            found, rows, size = (block[name].numpy() for name in ("features", "rows", "values"))
            order, part = np.argsort(rows, kind="stable"), slice(at, at + len(rows))
            features[part], values[part] = found[order], (size / largest[found])[order]
            per_row[first : first + BLOCK] = np.bincount(rows - first, minlength=min(BLOCK, many - first))
            at += len(rows)
        features.flush()
        values.flush()
    return per_row


def cost(coder: SparseCoder, lm: Network, store: Store, path: str | Path | None, rebuild: bool) -> Cost:
    """What ``index_features`` will take with these arguments. Tried: every stage on the first block of rows, and those
    that compare features on some of the features."""
    if not isinstance(lm, LM):
        raise ValueError("what an index costs is told for language models alone: index fewer rows, and time it")
    _, once = timed(_check, coder, lm, store)
    identity, folder = _place_of(coder, store, path)
    if _is_done(folder, identity, rebuild):
        return Cost(f"{folder} holds it")
    coder = copy.deepcopy(coder).eval()
    first = Store(store.path, min(len(store), BLOCK), store.site)
    coder.sparse_codes(first.rows(np.arange(min(len(first), 256)), store.site.key).to(coder.W_dec.device))  # warm
    few, more = _first_features(coder, 2 * RANDOM), _first_features(coder, 2048)
    tried = min(coder.d_sae, max(1, TRIED_PAIRS // coder.d_sae))
    with tempfile.TemporaryDirectory() as name, costs.peak() as peak:
        scratch = Path(name)
        with coder.reusing(_rows_at_once(coder)):
            block, coding = timed(_block, coder, first, scratch, 0)
        counts = np.bincount(block["features"], minlength=coder.d_sae)
        offsets = np.concatenate([[0], counts.cumsum()])
        (rows, values), placing = timed(_place, scratch, 1, offsets)
        stats, counting = timed(summarise, first, offsets, rows, values)
        _, turning = timed(_by_row, scratch, len(first), stats["max"])
        _, sorting = timed(strongest_first, counts, block["values"])
        labels, decoding = timed(Labels.decode, lm, store)
        labels.write(scratch / "labels.json")
        busiest = stats["top_tokens"][np.argsort(-counts)[: few.d_sae]]
        _, judging = timed(readability, lm, labels, busiest)
        together, meeting = timed(cofiring, offsets, rows, len(first), tried)
        logits, looking = timed(lens, few, lm, coder.writes[0] if coder.writes else store.site)
        near, comparing = timed(neighbours, more)
        words = (scratch / "labels.json").stat().st_size

    d_sae, blocks = coder.d_sae, len(store) / len(first)
    done = 0 if rebuild else len(list(folder.glob("block-*.safetensors")))
    left = max(0.0, blocks - done)
    live = int((counts > 0).sum())
    alive = live if blocks == 1 else d_sae  # more text wakes more of them
    pairs = float((np.bincount(block["rows"]).astype(float) ** 2).sum()) * blocks
    seconds = (
        once + left * coding + blocks * (placing + turning + sorting) + decoding
        + counting * alive / max(1, live) + judging * alive / len(busiest)
        + meeting * d_sae / tried + PAIR_SECONDS * pairs
        + looking * (d_sae + RANDOM) / (few.d_sae + RANDOM)
        + comparing * (d_sae / more.d_sae) ** 2
    )  # fmt: skip
    codes = int(len(block["values"]) * blocks)
    tables = stats | together | near | {name: table for name, table in logits.items() if name != "lens_random"}
    by_row = (4 if d_sae <= 1 << 16 else 6) * codes + 4 * len(store)
    per_feature = 16 + sum(table[0].nbytes for table in tables.values())  # 16: _build's own
    kept = 8 * codes + by_row + words + d_sae * per_feature
    cosines = d_sae * coder.W_dec.shape[1] * 4 + CHUNK_BYTES
    met = 9 * codes + min(DENSE_BYTES, 4 * d_sae**2) + min(CHUNK_BYTES, 20 * d_sae**2)
    on_gpu = coder.W_dec.is_cuda
    at_once = max(peak.ram, met, cosines * (not on_gpu), 65 * len(store))  # 65: finding the token of every row
    return Cost(
        f"{len(first):,} of {counted(len(store), 'token')} coded in {coding:.1f} s",
        seconds=seconds,
        disk=kept + int(12 * codes * left / blocks),  # the blocks are there until the end
        ram=min(len(store) * store.row_bytes, READ_BYTES) + 8 * codes + at_once,
        vram=max(peak.vram, cosines * on_gpu),
        parts={"tokens per second": len(first) / coding, "L0": codes / len(store), "MB that stay on disk": kept / 1e6},
    )


def _first_features(coder: SparseCoder, most: int) -> SparseCoder:
    """A coder of the first features, for stages that read W_dec alone."""
    directions = coder.W_dec.detach()[:most]
    few = TopK(coder.d_in, len(directions), k=1, d_out=directions.shape[1]).to(directions.device)
    few.W_dec.data.copy_(directions)
    few.writes = coder.writes
    return few
