"""What a FeatureIndex costs: building it in multiples of one encoder product over the same tokens (M), its peak memory,
opening features, searching, and its size on disk; at 1M tokens with 16,384 and with 102,400 features.

The store is synthetic: to harvest a million tokens takes an hour. A real one of 100,000 (the bundled model's residual
stream) is repeated with noise of 2 % of its deviation, and in each repetition the plain words of the vocabulary change
places, so that no stretch of text comes twice. It lies in a temporary folder, which is deleted. The coder is a
BatchTopK of random directions with a fitted threshold: codes cost what a trained one's do. It reads activations at
equal length, since random directions answer to length alone: else one token in a hundred had thousands of features.

Each size runs in a process of its own. M is x·W_enc into a buffer that is there already, of as many rows as the build
encodes together, timed on every few of the build's own batches, so that both see the machine equally busy; that time
is taken off the build's. Memory is above what was held before the build, when the model, the coder and the store were
there: "peak" has the pages of mapped files in it (the store's activations and the index's own files), which the system
takes back when it needs them; "anonymous" has not, and is looked at every 10 ms. Opening and searching happen in the
index as it is opened again, files in the page cache; where others use the machine too, the processor's time tells more
than the time that passed.

--tokens N   --features N [N ...]   smaller ones for a try.   --docs: the table in docs/speed.md.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import put
from safetensors.torch import load_file, save_file
from steps import processor

import sae_lab as sl
from sae_lab.activations.sharding import _crc
from sae_lab.feature_index.labels import Labels

RESULTS = Path(__file__).parent / "results" / "index.json"
TOKENS, FEATURES = 1_000_000, [16_384, 102_400]
SITE = sl.Site("resid_post", 8)
NOISE = 0.02
QUERIES = ["Paris", "the", "e", "ing", "1", "music", " of", "zz"]
TABLE = {
    "build": "{build_s:,.0f} s", "M": "{M_s:,.0f} s", "in M": "{in_M:.2f}",
    "encoding alone, in M": "{encoding_in_M:.2f}",
    "peak memory": "{peak_MB:,.0f} MB", "anonymous": "{anonymous_MB:,.0f} MB",
    "opening, slowest": "{opening_slowest_ms:.1f} ms", "opening, median": "{opening_median_ms:.1f} ms",
    "slowest, processor's": "{opening_processor_ms:.1f} ms",
    "search, first": "{search_first_ms:.1f} ms", "search, slowest": "{search_slowest_ms:.1f} ms",
    "search, median": "{search_median_ms:.1f} ms", "on disk": "{disk_MB:,.0f} MB", "L0": "{L0:.1f}",
    "densest feature": "{densest:.1%} of tokens", "live": "{live:,}",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- the store


def make_store(lm: sl.LM, folder: Path, tokens: int) -> None:
    """A store of at least so many tokens, in the form that harvest writes."""
    real = sl.harvest(lm, SITE, sl.load_text(), tokens=100_000)
    manifest = json.loads(json.dumps(real.manifest))
    manifest["identity"]["text"] += ", repeated with noise"
    shards, manifest["shards"] = manifest["shards"], []
    labels = Labels.decode(lm).alone
    words = torch.tensor([i for i, t in enumerate(labels) if t[:1] == " " and t[1:].isascii() and t[1:].isalpha()])
    random = torch.Generator().manual_seed(0)
    written, turn = 0, 0
    while written < tokens:
        places = torch.arange(len(labels))
        if turn:
            places[words] = words[torch.randperm(len(words), generator=random)]
        for shard in shards:
            if written >= tokens:
                break
            tensors = load_file(real.path / shard["file"])
            for name in ("ids", "token"):
                tensors[name] = places[tensors[name].long()].int()
            tensors["document"] += 100_000 * turn
            x = tensors[SITE.key].float()
            noise = torch.randn(x.shape, generator=random) * (NOISE * x.std())
            tensors[SITE.key] = (x + noise).half()
            file = folder / f"{len(manifest['shards']):06d}.safetensors"
            save_file(tensors, file)
            entry = {"file": file.name, "crc32": _crc(file), "bytes": file.stat().st_size}
            manifest["shards"].append(shard | entry)
            written += shard["rows"]
        turn += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


def make_coder(store: sl.Store, d_sae: int) -> sl.BatchTopK:
    coder = sl.BatchTopK(store.width, d_sae, k=32)
    coder.input_norm = "length"
    x = store.rows(np.arange(0, len(store), max(1, len(store) // 4096)), SITE.key)
    coder.b_dec.data.copy_((x / x.norm(dim=1, keepdim=True)).mean(0) * store.width**0.5)
    coder.calibrate(x.split(512), x)
    return coder


# ---------------------------------------------------------------------------------------------- measuring


def memory(field: str) -> float:
    """MB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


class Anonymous(threading.Thread):
    """The most anonymous memory."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.01):
            self.most = max(self.most, memory("RssAnon"))


class Encoder:
    """Stands before ``coder.sparse_codes``: its seconds, and those of the plain product of some of its batches."""

    def __init__(self, coder: sl.BatchTopK, every: int):
        self.coder, self.real, self.every = coder, coder.sparse_codes, every
        self.calls, self.seconds, self.product_seconds, self.product_rows = 0, 0.0, 0.0, 0

    def __call__(self, x: torch.Tensor):
        if self.calls % self.every == self.every // 2:
            start = time.perf_counter()
            with torch.no_grad():
                torch.mm(x, self.coder.W_enc, out=self.coder.scratch.pre(len(x), self.coder.d_sae))
            self.product_seconds += time.perf_counter() - start
            self.product_rows += len(x)
        self.calls += 1
        start = time.perf_counter()
        codes = self.real(x)
        self.seconds += time.perf_counter() - start
        return codes


def milliseconds(call: Any, *args: Any) -> tuple[float, float]:
    """(passed, of the processor)."""
    start = time.perf_counter(), time.process_time()
    call(*args)
    return 1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1])


def measure(folder: Path, tokens: int, d_sae: int) -> dict[str, float]:
    lm, store = sl.LM(), sl.Store(folder, tokens)
    coder = make_coder(store, d_sae)
    lm.lens(coder.W_dec[:2], SITE)  # what is loaded when first used is not the index's
    store = sl.Store(folder, tokens)  # the pages that were read for the coder go
    ctypes.CDLL(None).malloc_trim(0)
    encoder = coder.sparse_codes = Encoder(coder, every=8 if tokens >= 200_000 else 3)  # type: ignore[method-assign]
    before, anonymous_before = memory("VmRSS"), memory("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    watcher = Anonymous()
    watcher.start()
    with tempfile.TemporaryDirectory(dir=folder.parent) as path:
        start = time.perf_counter()
        sl.index_features(coder, lm, store, path=path)
        build = time.perf_counter() - start - encoder.product_seconds
        peak = memory("VmHWM") - before
        watcher.done.set()
        index = sl.index_features(coder, lm, sl.Store(folder, tokens), path=path)
        unit = encoder.product_seconds / encoder.product_rows * tokens
        searches = [milliseconds(index.search, query)[0] for query in QUERIES]
        dense = index.order("density")
        some = np.random.default_rng(0).choice(dense, min(200, len(dense)), replace=False)
        openings = np.array([milliseconds(index.__getitem__, int(feature)) for feature in [*dense[:20], *some]])
        return {
            "build_s": build, "in_M": build / unit, "encoding_in_M": encoder.seconds / unit, "M_s": unit,
            "peak_MB": peak, "anonymous_MB": watcher.most - anonymous_before,
            "opening_slowest_ms": openings[:, 0].max(), "opening_median_ms": float(np.median(openings[:, 0])),
            "opening_processor_ms": openings[:, 1].max(),
            "search_first_ms": searches[0], "search_slowest_ms": max(searches),
            "search_median_ms": float(np.median(searches)), "disk_MB": index.bytes / 1e6,
            "L0": float(index.counts.sum()) / tokens, "densest": float(index.density.max()), "live": len(dense),
        }  # fmt: skip


def measure_elsewhere(folder: Path, tokens: int, d_sae: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(folder), "--tokens", str(tokens), "--features", str(d_sae)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--features", type=int, nargs="+", default=FEATURES)
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--docs", action="store_true")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.tokens, args.features[0])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "store"
        folder.mkdir()
        make_store(sl.LM(), folder, args.tokens)
        rows = {}
        for d_sae in args.features:
            found = measure_elsewhere(folder, args.tokens, d_sae)
            rows[f"{args.tokens:,} tokens, {d_sae:,} features"] = {n: form.format(**found) for n, form in TABLE.items()}
            print(f"\n{args.tokens:,} tokens, {d_sae:,} features ({torch.get_num_threads()} threads)")
            for name, shown in rows[f"{args.tokens:,} tokens, {d_sae:,} features"].items():
                print(f"  {name:22} {shown:>16}", flush=True)
    report(rows, args.docs)


def report(rows: dict[str, dict[str, str]], docs: bool) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": processor(), "rows": rows}, indent=1))
    if docs:
        names = [n for n in TABLE if n not in ("build", "M", "slowest, processor's", "densest feature", "live", "L0")]
        lines = ["| | " + " | ".join(rows) + " |", "|---|" + "---|" * len(rows)]
        lines += [f"| {name} | " + " | ".join(row[name] for row in rows.values()) + " |" for name in names]
        put("docs/speed.md", "index", "\n".join(lines))


if __name__ == "__main__":
    main()
