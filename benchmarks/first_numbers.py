"""What a newcomer waits for: import, harvest against a bare hook, a cached harvest, opening a feature.

Ratios are of interleaved repeats in one process, medians; with --quick each is taken once. Prints a table.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import sae_lab as sl
from sae_lab.harvesting import FORWARD_TOKENS, SHARD_TOKENS
from sae_lab.lm.tokens import pad

LAYER, TOKENS, CONTEXT = 8, 100_000, 128
REPEATS = 1 if "--quick" in sys.argv else 4


class Stop(Exception):
    """Ends a forward pass from inside a hook."""


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def import_seconds() -> float:
    """`import sae_lab` beyond `import torch`, in fresh interpreters."""
    code = "import time, torch; t = time.perf_counter(); import sae_lab; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(min(REPEATS, 3))]
    return statistics.median(float(r.stdout) for r in runs)


def harvest_ratio(lm: sl.LM, text: sl.Text) -> tuple[float, float, float]:
    """Of a harvest of ``TOKENS`` tokens: (time / time of a bare truncated forward of as many, tokens/s, fixed seconds).

    A harvest of two shards beside the bare forward of the same contexts. What comes once (hashing the model's weights,
    tokenising the first hundred documents) is timed by itself and counted once for ``TOKENS`` tokens.
    """
    start = time.perf_counter()
    lm.fingerprint()
    contexts = text.contexts(lm.tokenizer, lm.prefix_id, CONTEXT, shuffle=True)
    rows = [c.ids for c in islice(contexts, 2 * SHARD_TOKENS // CONTEXT)]
    fixed = time.perf_counter() - start
    per_pass = FORWARD_TOKENS // CONTEXT
    batches = [pad(rows[i : i + per_pass]).ids for i in range(0, len(rows), per_pass)]
    model = lm._module

    def stop(*_: object) -> None:
        raise Stop

    def bare(passes: int | None = None) -> None:
        hook = model.model.layers[LAYER].register_forward_hook(stop)
        with torch.no_grad():
            for ids in batches[:passes]:
                with suppress(Stop):
                    model(ids, use_cache=False)
        hook.remove()

    read = []

    def harvest() -> None:
        with tempfile.TemporaryDirectory() as folder:
            site = sl.Site("resid_post", LAYER)
            store = sl.harvest(lm, site, text, SHARD_TOKENS + 1, path=Path(folder) / "store")
            read.append(sum(s["rows"] + s["excluded"] for s in store.manifest["shards"]))

    bare(passes=1)  # warms up
    times = [(seconds(bare), seconds(harvest)) for _ in range(REPEATS)]
    bare_each = statistics.median(t for t, _ in times) / sum(map(len, rows))
    each = (statistics.median(t for _, t in times) - fixed) / read[0]
    whole = fixed + each * TOKENS
    return whole / (bare_each * TOKENS), TOKENS / whole, fixed


def main() -> None:
    lm, text, site = sl.LM(), sl.load_text(), sl.Site("resid_post", LAYER)
    ratio, speed, fixed = harvest_ratio(lm, text)
    rows = [("import sae_lab, beyond torch", f"{import_seconds():.2f} s", "under 1 s")]
    rows += [("harvest of 100k / bare forward hook", f"{ratio:.3f}", "at most 1.05")]
    rows += [("harvest, layers 0 to 8", f"{speed:,.0f} tokens/s", f"{fixed:.1f} s of it once")]
    stores = sorted((sl.cache.root() / "stores").glob("resid_post-8-*"))
    indexes = sorted((sl.cache.root() / "indexes").glob("*/index.json"))
    if stores and indexes:  # what the quickstart left behind
        store = sl.harvest(lm, site, text, tokens=TOKENS)
        again = seconds(lambda: sl.harvest(lm, site, text, tokens=TOKENS))
        rows += [("second call of a cached harvest", f"{again:.2f} s", "under 3 s")]
        index = sl.FeatureIndex(indexes[-1].parent, store, lm)
        picks = np.random.default_rng(0).integers(0, index.d_sae, 200).tolist()
        times = [seconds(lambda i=i: index[i]) for i in picks]
        rows += [("opening a feature, median", f"{1e3 * statistics.median(times):.1f} ms", "")]
        rows += [("opening a feature, slowest of 200", f"{1e3 * max(times):.1f} ms", "under 50 ms")]
    for name, value, goal in rows:
        print(f"{name:36} {value:>16}   {goal}")


if __name__ == "__main__":
    main()
