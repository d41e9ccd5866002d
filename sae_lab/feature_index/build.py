"""Building a FeatureIndex: one streaming pass over a store; the language model's layers are never run.

Pass 1 writes each block's codes, sorted by feature, to a file of its own (so an interrupted build goes on where it
was). Pass 2 places them feature by feature into two memory-mapped arrays. Then come what each feature fires on most,
its logit lens and its nearest neighbours.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sae_lab import cache
from sae_lab.feature_index.index import TOP_TOKENS, VERSION, FeatureIndex
from sae_lab.lm.model import LM
from sae_lab.saes.base import SparseCoder
from sae_lab.store import Store

log = logging.getLogger(__name__)

BLOCK = 8192
LENS_TOKENS = 10
NEIGHBOURS = 8
STRONGEST = 64  # activations whose tokens name a feature
CHUNK = 256  # directions at a time through the unembedding: 50 MB at a vocabulary of 49152


def index_features(coder: SparseCoder, lm: LM, store: Store, path: str | Path | None = None) -> FeatureIndex:
    """An index of all features of a coder over a store: density, mean and max, contexts, logit lens, neighbours.

    Written to ``path`` (None: a folder in the cache named by coder and store); called again it opens what is there, and
    an interrupted build goes on.

    Raises ValueError when the store comes from another model, site or width, or ``path`` holds another index.
    """
    _check(coder, lm, store)
    identity = {"coder": coder.fingerprint(), "store": store.fingerprint, "store_path": str(store.path.resolve())}
    folder = Path(path) if path is not None else cache.root() / "indexes" / f"{identity['coder']}-{identity['store']}"
    cache.make_folder(folder)
    if not _is_done(folder, identity):
        was_training = coder.training
        coder.eval()
        try:
            _build(coder, lm, store, folder, identity)
        finally:
            coder.train(was_training)
    return FeatureIndex(folder, store, lm)


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
    if store.width != coder.d_in:
        raise ValueError(f"the coder reads d_in={coder.d_in}, the store holds width {store.width}: wrong site or coder")


def _is_done(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds this very index. ValueError when it holds another."""
    for name in ("index.json", "building.json"):
        file = folder / name
        if not file.exists():
            continue
        try:
            there = json.loads(file.read_bytes())
            if not {"coder", "store"} <= set(there):
                raise KeyError("it names no coder and store")
        except (ValueError, KeyError, TypeError) as err:
            raise ValueError(f"{file} is no index of sae_lab ({err}): delete the folder and index again") from err
        differences = [f"{k}: {there.get(k)} there, {v} now" for k, v in identity.items() if there.get(k) != v]
        if {d.split(":")[0] for d in differences} - {"store_path"}:  # a store may be moved
            raise ValueError(
                f"{folder} holds another index; it differs in {'; '.join(differences)}: pass another path="
            )
        return name == "index.json" and there.get("version") == VERSION
    return False


def _build(coder: SparseCoder, lm: LM, store: Store, folder: Path, identity: dict[str, Any]) -> None:
    from tqdm.auto import tqdm

    for leftover in folder.glob(".*.tmp"):  # of a build that was killed
        leftover.unlink(missing_ok=True)
    with cache.atomic(folder / "building.json") as temporary:
        temporary.write_text(json.dumps(identity))
    blocks = -(-len(store) // BLOCK)
    with tqdm(total=len(store), unit="tok", desc="index", dynamic_ncols=True) as bar:
        counts = np.zeros(coder.d_sae, np.int64)
        for number in range(blocks):
            codes = _block(coder, store, folder, number)
            counts += np.bincount(codes["features"], minlength=coder.d_sae)
            bar.update(min(BLOCK, len(store) - number * BLOCK))
        offsets = np.concatenate([[0], counts.cumsum()])
        rows, values = _place(folder, blocks, offsets)
        stats = {"offsets": offsets, **_statistics(store, offsets, rows, values)}
        stats["readability"] = _readability(lm, stats["top_tokens"])
        stats["f_scale"] = coder.f_scale.cpu().numpy()
        bar.set_description("index: lens and neighbours")
        stats |= _lens(coder, lm, store) | _neighbours(coder)
    with cache.atomic(folder / "stats.safetensors") as temporary:
        save_file({name: np.ascontiguousarray(a) for name, a in stats.items()}, temporary)
    facts = identity | {"version": VERSION, "d_sae": coder.d_sae, "site": store.site.key, "rows": len(store)}
    with cache.atomic(folder / "index.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1))
    for left in [*folder.glob("block-*.safetensors"), folder / "building.json"]:
        left.unlink()


def _block(coder: SparseCoder, store: Store, folder: Path, number: int) -> dict[str, np.ndarray]:
    """Codes of one block of rows, sorted by feature, then row; from its file if that is whole."""
    file = folder / f"block-{number:06d}.safetensors"
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError):
        pass
    rows = np.arange(number * BLOCK, min((number + 1) * BLOCK, len(store)))
    codes = coder.sparse_codes(store.rows(rows, store.site.key).to(coder.W_dec.device))
    features, order = codes.features.cpu().sort(stable=True)
    block = {
        "features": features.int().numpy(),
        "rows": rows[codes.rows.cpu()[order].numpy()].astype(np.int32),
        "values": codes.values.cpu()[order].numpy(),
    }
    with cache.atomic(file) as temporary:
        save_file(block, temporary)
    return block


def _place(folder: Path, blocks: int, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All codes by feature: ``rows.npy`` and ``values.npy``, each feature's part in the order of rows."""
    total = int(offsets[-1])
    rows = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.int32, (max(total, 1),))
    values = np.lib.format.open_memmap(folder / "values.npy", "w+", np.float32, (max(total, 1),))
    cursor = offsets[:-1].copy()
    for number in range(blocks):
        block = load_file(folder / f"block-{number:06d}.safetensors")
        features = block["features"].astype(np.int64)
        counts = np.bincount(features, minlength=len(cursor))
        within = np.arange(len(features)) - np.repeat(counts.cumsum() - counts, counts)
        at = cursor[features] + within
        rows[at], values[at] = block["rows"], block["values"]
        cursor += counts
    rows.flush()
    values.flush()
    return rows, values


def _statistics(store: Store, offsets: np.ndarray, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """Per feature: mean and max where it fires, and the tokens it fires on most."""
    d_sae = len(offsets) - 1
    mean, biggest = np.zeros(d_sae, np.float32), np.zeros(d_sae, np.float32)
    top_tokens = np.full((d_sae, TOP_TOKENS), -1, np.int32)
    every_token = store.rows(np.arange(len(store)), "token").numpy()
    for feature in np.flatnonzero(np.diff(offsets)):
        part = slice(offsets[feature], offsets[feature + 1])
        v = values[part]
        mean[feature], biggest[feature] = v.mean(), v.max()
        strongest = np.argpartition(v, -STRONGEST)[-STRONGEST:] if len(v) > STRONGEST else np.arange(len(v))
        ids, where = np.unique(every_token[rows[part][strongest]], return_inverse=True)
        weight = np.bincount(where, v[strongest])
        order = weight.argsort()[::-1][:TOP_TOKENS]
        top_tokens[feature, : len(order)] = ids[order]
    return {"mean": mean, "max": biggest, "top_tokens": top_tokens}


def _readability(lm: LM, top_tokens: np.ndarray) -> np.ndarray:
    """How alike a feature's top tokens are, times the share of them that are words: mean pairwise cosine of their
    (centred) embeddings. A rule of thumb for which feature to look at first, 0 to 1; it is no measure of truth."""
    ids, where = np.unique(np.maximum(top_tokens, 0), return_inverse=True)
    unit = torch.nn.functional.normalize(lm.embedding(torch.from_numpy(ids)), dim=1)
    labels = [lm.token_strings([int(i)])[0].label for i in ids]
    is_word = torch.tensor([t.startswith(" ") and len(t) > 3 and t.strip().isalpha() for t in labels])
    where = torch.from_numpy(where.reshape(top_tokens.shape))
    valid = torch.from_numpy(top_tokens >= 0)
    n = valid.sum(1)
    total = (unit[where] * valid.unsqueeze(-1)).sum(1)
    alike = (total.pow(2).sum(1) - n) / (n * (n - 1)).clamp_min(1)
    words = (is_word[where] & valid).sum(1) / n.clamp_min(1)
    return (alike.clamp(0, 1) * words * (n == top_tokens.shape[1])).numpy()


@torch.no_grad()
def _lens(coder: SparseCoder, lm: LM, store: Store) -> dict[str, np.ndarray]:
    """Promoted and suppressed tokens of every direction, and its sharpness: the logits' kurtosis, with that of random
    directions beside it. Empty where the site is not written to the residual stream."""
    site = coder.writes[0] if coder.writes else store.site  # a transcoder's directions live where it writes
    if lm.lens(coder.W_dec[:1], site) is None:
        return {}
    found: dict[str, list[torch.Tensor]] = {"up": [], "up_ids": [], "down": [], "down_ids": [], "kurtosis": []}
    for chunk in coder.W_dec.split(CHUNK):
        logits = lm.lens(chunk, site)
        assert logits is not None
        for name, largest in (("up", True), ("down", False)):
            top = logits.topk(LENS_TOKENS, largest=largest)
            found[name].append(top.values)
            found[f"{name}_ids"].append(top.indices.int())
        found["kurtosis"].append(_kurtosis(logits))
    random = torch.randn(CHUNK, coder.W_dec.shape[1], generator=torch.Generator().manual_seed(0))
    control = lm.lens(random.to(coder.W_dec), site)
    assert control is not None
    lens = {f"lens_{name}": torch.cat(parts).numpy() for name, parts in found.items()}
    return lens | {"lens_random": _kurtosis(control).numpy()}


def _kurtosis(logits: torch.Tensor) -> torch.Tensor:
    """Excess kurtosis over the vocabulary: near 0 for noise, large where a few tokens stand out."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred.pow(4).mean(-1) / centred.pow(2).mean(-1).pow(2) - 3


@torch.no_grad()
def _neighbours(coder: SparseCoder) -> dict[str, np.ndarray]:
    """The nearest decoder rows by cosine."""
    rows = torch.nn.functional.normalize(coder.W_dec, dim=1)
    n = min(NEIGHBOURS, coder.d_sae - 1)
    cosines, ids = [], []
    for start in range(0, coder.d_sae, 1024):
        part = rows[start : start + 1024] @ rows.T
        part[torch.arange(len(part)), torch.arange(start, start + len(part))] = -2.0  # not itself
        top = part.topk(n)
        cosines.append(top.values.cpu())
        ids.append(top.indices.int().cpu())
    return {"neighbours": torch.cat(ids).numpy(), "cosines": torch.cat(cosines).numpy()}
