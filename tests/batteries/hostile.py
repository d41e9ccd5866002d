"""Hostile files: pickles under every ending, configs that ask for huge coders, archives that unpack to gigabytes, deep
JSON, values of wrong types, paths that lead elsewhere. None runs, none takes memory, each is refused in a sentence."""

import gzip
import inspect
import io
import json
import logging
import os
import pickle
import random
import resource
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import sae_lab as sl
from sae_lab.feature_index.neuronpedia import read_labels
from sae_lab.saes import FAMILIES

TITLE = "hostile files"
MOST = 1 << 30  # bytes of memory beyond the file's size
ODD = [None, True, -1, 0, 10**7, 10**12, 10**30, 1.5, "64", "<img src=x onerror=alert(1)>", [], [[]], {}, {"a": 1}]
Case = tuple[str, Callable[[Path], Any]]  # what it is; how the file's folder is loaded


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.canary),))


def _coder(folder: Path) -> None:
    coder = sl.TopK(16, 64, k=4).eval()
    mask = {"special_ids": [0], "skip_first": True, "max_norm": {"resid_post-1": 3.0}}
    coder.meta = {"model": "m", "mask": mask, "context": 64, "dead": 0.0, "prefix_id": 0, "train": {}}
    coder.save(folder)


def _rewrite(folder: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None) -> None:
    weights = load_file(folder / "sae.safetensors") if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config))
    weights = {n: t.contiguous() for n, t in weights.items()}
    save_file(weights, folder / "sae.safetensors", {"config": json.dumps(config)})


def _pickled(folder: Path, draw: random.Random, canary: Path) -> Case:
    name = draw.choice(["ae.pt", "layer1.sae.pt", "x.pth", "params.npz", "sae.safetensors", "config.json", "cfg.json",
                        "sae_weights.safetensors", "a.jsonl", "a.jsonl.gz", "manifest.json"])  # fmt: skip
    kind = draw.choice(["pickle", "torch", "npz"])
    if name in ("sae.safetensors", "config.json"):
        _coder(folder)
    with open(folder / name, "wb") as f:
        if kind == "pickle":
            pickle.dump(draw.choice([Bomb(canary), {"W_enc": Bomb(canary)}, [Bomb(canary)]]), f, draw.choice([0, 2, 4]))
        elif kind == "torch":
            torch.save({"W_enc": torch.zeros(3), "b": Bomb(canary)}, f)
        else:
            np.savez(f, W_enc=np.array([Bomb(canary)], object))
    return f"{kind} as {name}", _load(name)


def _load(name: str) -> Callable[[Path], Any]:
    if ".jsonl" in name:
        return lambda folder: read_labels(folder, 64, "m", 1, None, None)
    if name == "manifest.json":
        return sl.Store
    return sl.load


def _config(folder: Path, draw: random.Random, canary: Path) -> Case:
    """A family's argument, or an entry of meta, mask or the config itself, of another type or size."""
    _coder(folder)
    config = json.loads((folder / "config.json").read_text())
    family = draw.choice([*FAMILIES])
    if draw.random() < 0.6:
        config["family"] = family
        names = [n for n in inspect.signature(FAMILIES[family]).parameters if n != "wiring"]
        where = config["config"] | {n: 4 for n in names if n not in config["config"]}
        config["config"] = {n: v for n, v in where.items() if n in names}
        where, name = config["config"], draw.choice(names)
    else:
        where = draw.choice([config, config["meta"], config["meta"]["mask"]])
        name = draw.choice([*where])
    where[name] = draw.choice(ODD)
    kept = load_file(folder / "sae.safetensors")
    if draw.random() < 0.3:
        kept.pop(draw.choice([*kept]))
    _rewrite(folder, config, kept)
    return f"{config['family']} with {name}={where[name]!r}", sl.load


def _tensor(folder: Path, draw: random.Random, canary: Path) -> Case:
    _coder(folder)
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "sae.safetensors")
    name = draw.choice([*weights])
    made = {
        "ints": lambda t: t.int(), "bools": lambda t: t > 0, "turned": lambda t: t.T if t.dim() > 1 else t[None],
        "NaN": lambda t: t * float("nan"), "inf": lambda t: t + float("inf"), "none": lambda t: t[:0],
    }  # fmt: skip
    kind = draw.choice([*made])
    weights[name] = made[kind](weights[name])
    _rewrite(folder, config, weights)
    return f"{name} of {kind}", sl.load


def _archive(folder: Path, draw: random.Random, canary: Path) -> Case:
    """Few bytes that unpack to gigabytes, or say so."""
    kind = draw.choice(["npz", "npz shape", "pt", "pt strides", "labels", "members", "header", "bytearray"])
    huge = bytes(1 << 24)
    if kind == "npz":
        with zipfile.ZipFile(folder / "params.npz", "w", zipfile.ZIP_DEFLATED) as z, z.open("W_enc.npy", "w") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": (20 << 22,)})
            for _ in range(20):
                f.write(huge)
    elif kind == "npz shape":
        with zipfile.ZipFile(folder / "params.npz", "w") as z, z.open("W_enc.npy", "w") as f:
            shape = (draw.choice([1 << 30, 1 << 40, 1 << 62]),)
            np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": shape})
    elif kind == "pt":
        torch.save({"W_enc": torch.zeros(4)}, content := io.BytesIO())
        with zipfile.ZipFile(content) as old, zipfile.ZipFile(folder / "ae.pt", "w", zipfile.ZIP_DEFLATED) as new:
            for part in old.namelist():
                with new.open(part, "w") as f:
                    f.write(old.read(part))
                    for _ in range(20 if "/data/" in part else 0):
                        f.write(huge)
    elif kind == "pt strides":
        torch.save({"encoder.weight": torch.zeros(1).expand(1 << draw.choice([31, 40]))}, folder / "ae.pt")
    elif kind == "bytearray":
        size = (2**31 - 1).to_bytes(4, "little")
        (folder / "ae.pt").write_bytes(b"\x80\x02cbuiltins\nbytearray\n(J" + size + b"tR.")
    elif kind == "header":
        _coder(folder)
        (folder / "sae.safetensors").write_bytes((1 << draw.choice([26, 40, 62])).to_bytes(8, "little") + b"{" * 99)
    elif kind == "labels":
        line = b'{"index": 1, "description": "' + (b"a" * draw.choice([3, 1 << 21])) + b'"}\n'
        with gzip.open(folder / "a.jsonl.gz", "wb", 1) as f:
            for _ in range((600 << 20) // (len(line) * 20000) + 1 if len(line) < 100 else 1):
                f.write(line * (20000 if len(line) < 100 else 1))
    else:
        line = gzip.compress(b'{"index": 99999, "description": "a"}\n')
        (folder / "a.jsonl.gz").write_bytes(line * 3000)
    return f"archive: {kind}", _load("a.jsonl" if kind in ("labels", "members") else "x")


def _json(folder: Path, draw: random.Random, canary: Path) -> Case:
    name = draw.choice(["config.json", "cfg.json", "manifest.json", "a.jsonl"])
    text = draw.choice(["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, '{"a": ' + "9" * 5000 + "}", "[]",
                        '{"a": NaN}', '"x"', "null", '{"a": "\\ud800"}', "\x00", '{"a": {}}'])  # fmt: skip
    if name in ("config.json", "cfg.json"):
        _coder(folder)
    (folder / name).write_text(text)
    if name == "cfg.json":
        (folder / "config.json").unlink()
    return f"{name}: {text[:20]!r}", _load(name)


def _path(folder: Path, draw: random.Random, canary: Path) -> Case:
    """A store whose shard lies elsewhere, a coder behind a link to a device, a pipe."""
    kind = draw.choice(["../x", "/etc/passwd", "a/../../x", "device", "pipe", "folder"])
    if kind in ("device", "pipe", "folder"):
        _coder(folder)
        file = folder / draw.choice(["config.json", "sae.safetensors"])
        file.unlink()
        make = {"device": lambda: file.symlink_to("/dev/zero"), "pipe": lambda: os.mkfifo(file), "folder": file.mkdir}
        make[kind]()
        return f"{file.name} is a {kind}", sl.load
    shard = {"file": kind, "rows": 3, "contexts": 1, "excluded": 0, "crc32": 0, "bytes": 9}
    manifest = {
        "format": "sae_lab store", "version": 1, "mask": None, "scales": {}, "complete": True, "shards": [shard],
        "identity": {"sites": ["resid_post-1"], "model": "m", "text": "t"},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return f"a shard at {kind}", lambda f: sl.Store(f).rows(np.arange(3), "token")


KINDS = (_pickled, _config, _config, _tensor, _archive, _json, _path)


def _tried(load: Callable[[Path], Any], folder: Path) -> tuple[str, int]:
    """(how it ended, bytes of memory it took) of loading in a forked child."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            logging.disable()
            load(folder)
            said = "loaded"
        except BaseException as err:
            ours = type(err) is ValueError and (str(folder) in str(err) or ".jsonl" in str(err))
            said = "refused" if ours else f"{type(err).__name__}: {str(err)[:200]}"
        os.write(into, said.encode(errors="replace")[:60_000])
        os._exit(0)
    os.close(into)
    with open(out, "rb") as f:
        said = f.read().decode()
    _, _, used = os.wait4(pid, 0)
    return said or "killed", used.ru_maxrss * 1024


def run(full: bool, seed: int = 0) -> dict[str, object]:
    draw, bad, tries = random.Random(seed), [], 300 if full else 28
    counts = {"executions": 0, "too much memory": 0, "unclear": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory() as top:
        _coder(Path(top) / "whole")
        sl.load(Path(top) / "whole")  # what children need is imported before they are forked
        for number in range(tries):
            folder, canary = Path(top) / f"case{number}", Path(top) / "canary"
            folder.mkdir()
            what, load = KINDS[number % len(KINDS)](folder, draw, canary)
            size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
            said, most = _tried(load, folder)
            if canary.exists():
                counts["executions"] += 1
                bad.append(f"{what}: it ran")
                canary.rmdir()
            if most > before + size + MOST:
                counts["too much memory"] += 1
                bad.append(f"{what}: {(most - before) >> 20:,} MB for {size:,} bytes")
            if said not in ("loaded", "refused"):
                counts["unclear"] += 1
                bad.append(f"{what}: {said}")
            shutil.rmtree(folder)
    return {"tries": tries, **counts, "bad": bad}
