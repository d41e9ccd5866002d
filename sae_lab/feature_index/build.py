"""Building a FeatureIndex: one streaming pass over a store; the language model's layers are never run.

Pass 1 writes each block's codes, sorted by feature, to a file of its own (so an interrupted build goes on where it
was). Pass 2 places them feature by feature into two memory-mapped arrays. Then come what each feature fires on most,
what fires with it, its logit lens and its nearest neighbours, all for some features at a time.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_lab import cache, files
from sae_lab.activations.store import Store
from sae_lab.arguments import as_annotated
from sae_lab.feature_index.cofiring import cofiring
from sae_lab.feature_index.directions import lens, neighbours
from sae_lab.feature_index.index import VERSION, FeatureIndex, read_facts
from sae_lab.feature_index.labels import Labels
from sae_lab.feature_index.summaries import readability, summarise
from sae_lab.lm.model import LM
from sae_lab.saes.base import SparseCoder

log = logging.getLogger(__name__)

CHECKED = ("rows.npy", "values.npy", "labels.json")  # their checksums stand in index.json
FILES = ("index.json", "stats.safetensors", *CHECKED)
BLOCK = 8192  # rows of a file
PRE_BYTES = 256 << 20  # pre-activations that are made together: a block of a wide coder comes in parts
READ_BYTES = 128 << 20  # a store's activations stay in memory as long as it is open: it is opened anew after so many


@as_annotated
def index_features(
    coder: SparseCoder, lm: LM, store: Store, path: str | Path | None = None, rebuild: bool = False
) -> FeatureIndex:
    """An index of all features of a coder over a store: density, mean and max, contexts, co-firing, lens, neighbours.

    Written to ``path`` (None: a folder in the cache named by coder and store); called again it opens what is there, and
    an interrupted build goes on. rebuild: make it again in any case, as when a file of it is damaged; labels and notes
    stay.

    Raises ValueError when the store comes from another model, site or width, ``path`` holds another index, or a file of
    the index is damaged.
    """
    _check(coder, lm, store)
    identity = {"coder": coder.fingerprint(), "store": store.fingerprint, "store_path": str(store.path.resolve())}
    folder = Path(path) if path is not None else cache.root() / "indexes" / f"{identity['coder']}-{identity['store']}"
    if _is_done(folder, identity, rebuild):
        _tidy(folder)
    else:
        was_training = coder.training
        coder.eval()
        kept = "the blocks that are done are kept: make room there and call index_features again to go on"
        try:
            with cache.sole_writer(folder), cache.told(folder, kept):
                if rebuild:
                    for name in (*FILES, "building.json", *(f.name for f in folder.glob("block-*.safetensors"))):
                        (folder / name).unlink(missing_ok=True)
                if not _is_done(folder, identity):  # else another process made it
                    _build(coder, lm, store, folder, identity)
        finally:
            coder.train(was_training)
    return FeatureIndex(folder, store, lm, coder)


def _check(coder: SparseCoder, lm: LM, store: Store) -> None:
    site = store.site
    if store.identity["model_fingerprint"] != lm.fingerprint():
        raise ValueError(
            f"the store was harvested from {store.identity['model']} (weights {store.identity['model_fingerprint']}), "
            f"and {lm} has other weights: index with the model the store comes from"
        )
    if coder.reads and coder.reads != (site,):
        raise ValueError(
            f"the coder was trained at {coder.reads[0]}, the store holds {site}: choose with store.at(...)"
        )
    if made_by := store.identity.get("coder"):
        if made_by != coder.fingerprint():
            raise ValueError(f"the store holds codes of coder {made_by}, this is {coder.fingerprint()}: harvest anew")
    elif store.width != coder.d_in:
        raise ValueError(f"the coder reads d_in={coder.d_in}, the store holds width {store.width}: wrong site or coder")


def _is_done(folder: Path, identity: dict[str, Any], rebuild: bool = False) -> bool:
    """Whether the folder holds this very index, and it is not to be made again. ValueError when it holds another."""
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
            raise ValueError(
                f"{folder} holds another index; it differs in {'; '.join(differences)}: pass another path="
            )
        return name == "index.json" and there.get("version") == VERSION and not rebuild
    return False


def _build(coder: SparseCoder, lm: LM, store: Store, folder: Path, identity: dict[str, Any]) -> None:
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
        labels = Labels.decode(lm)
        tables["readability"] = readability(lm, labels, tables["top_tokens"])
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
    with suppress(OSError):  # another user's
        for left in [*folder.glob("block-*.safetensors"), folder / "building.json"]:
            left.unlink(missing_ok=True)
    cache.tidy(folder)


def _encode(coder: SparseCoder, store: Store, folder: Path, done: Callable[[int], Any]) -> np.ndarray:
    """Makes all blocks: how many codes each feature has. ``done`` hears of rows."""
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
