"""Damaged files: a bit flipped, a block zeroed, a part cut off, a file deleted. What reads them gives what it gave
before, to the last bit, or refuses in a sentence that names the file."""

import contextlib
import gzip
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import sae_lab as sl
from sae_lab.feature_index.neuronpedia import read_labels
from sae_lab.lm import bundled

TITLE = "damaged files"
SITE = sl.Site("resid_post", 1)
CONFIG = sl.TrainConfig(steps=24, batch_size=64, checkpoint_every=6)


def _stop(event: Any) -> None:
    if event.step == 15:
        raise KeyboardInterrupt


def _lm() -> sl.LM:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled.folder())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    return sl.LM(transformers.LlamaForCausalLM(config).eval(), tokenizer=tokenizer)


def _coder_facts(coder: Any) -> str:
    meta = {key: value for key, value in coder.meta.items() if key != "source"}
    return f"{coder.fingerprint()} {coder.reads} {coder.writes} {json.dumps(meta, sort_keys=True)}"


def _subjects(root: Path, full: bool) -> dict[str, Callable[[Path], Any]]:
    """What is damaged, made below ``root``, and how it is read from a copy."""
    lm, x = _lm(), torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    store = sl.harvest(lm, SITE, sl.load_text([d[:600] for d in sl.load_text()[:12]]), 1500, path=root / "store")
    coder = sl.train(sl.BatchTopK(32, 48, k=4), store, CONFIG).coder
    coder.save(root / "coder")
    for format in ("saelens", "sparsify", "dictionary_learning"):
        sl.TopK(32, 48, k=4).eval().save(root / format, format=format)
    sl.train(sl.TopK(32, 48, k=4), x, CONFIG, path=root / "run")
    with contextlib.suppress(KeyboardInterrupt):
        sl.train(sl.TopK(32, 48, k=4), x, CONFIG, path=root / "checkpoint", callbacks=[_stop])
    (root / "labels").mkdir()
    lines = [json.dumps({"index": i, "description": f"label {i}", "layer": "1", "modelId": "m"}) for i in range(40)]
    (root / "labels" / "batch-0.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))

    def rows(path: Path) -> Any:
        there = sl.Store(path)
        keys = ("token", "document", "position", "context", SITE.key)
        every = [there.rows(np.arange(len(there)), key).numpy().tobytes() for key in keys]
        ids = [there.context_ids(i).tolist() for i in range(there.contexts(np.array([len(there) - 1]))[0] + 1)]
        return every, ids, there.mask, there.excluded

    def run(path: Path) -> Any:
        done = sl.train(sl.TopK(32, 48, k=4), x, CONFIG, path=path)
        return done.coder.fingerprint(), str(done.history)

    def load(path: Path) -> Any:
        return _coder_facts(sl.load(path))

    def labels(path: Path) -> Any:
        return read_labels(path, 48, "m", 1, None, None)

    found: dict[str, Callable[[Path], Any]] = {"store": rows, "coder": load, "run": run, "checkpoint": run}
    found |= {"labels": labels, "saelens": load, "sparsify": load, "dictionary_learning": load}
    if full:  # an index takes seconds to make
        sl.index_features(coder, lm, store, path=root / "index")
        found["index"] = lambda path: [one.to_dict() for one in sl.index_features(coder, lm, store, path=path)]
    return found


def _harm(file: Path, draw: random.Random) -> str:
    """One damage. Says what it was."""
    content = bytearray(file.read_bytes())
    kind = draw.choice(["flipped", "flipped", "flipped in front", "zeroed", "cut", "deleted"])
    at = draw.randrange(max(1, len(content) if kind != "flipped in front" else min(len(content), 400)))
    if kind == "deleted":
        file.unlink()
        return kind
    if kind == "cut":
        content = content[:at]
    elif kind == "zeroed":
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    else:
        content[at] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"{kind} at {at}"


# What other libraries' formats say in their own words has no place for a checksum.
_UNSEALED = {("saelens", "cfg.json"), ("sparsify", "cfg.json"), ("dictionary_learning", "config.json")}


def run(full: bool, seed: int = 0) -> dict[str, object]:
    draw, bad, counts = random.Random(seed), [], {"silent": 0, "unclear": 0}
    tries = 200 if full else 24
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        subjects = _subjects(root, full)
        before: dict[str, Any] = {}
        for name, read in subjects.items():
            shutil.copytree(root / name, root / "whole")
            before[name] = read(root / "whole")
            shutil.rmtree(root / "whole")
        for number in range(tries):
            name = list(subjects)[number % len(subjects)]
            copy = root / "copy" / name
            shutil.copytree(root / name, copy)
            there = [f for f in sorted(copy.rglob("*")) if f.is_file() and (name, f.name) not in _UNSEALED]
            file = draw.choice(there)
            what = f"{name}/{file.name} {_harm(file, draw)}"
            try:
                if subjects[name](copy) != before[name]:
                    counts["silent"] += 1
                    bad.append(f"{what}: another result, without a word")
            except Exception as err:
                if type(err) is not ValueError or (str(copy) not in str(err) and file.name not in str(err)):
                    counts["unclear"] += 1
                    bad.append(f"{what}: {type(err).__name__}: {str(err)[:200]}")
            shutil.rmtree(root / "copy")
    return {"tries": tries, **counts, "bad": bad}
