"""What a newcomer waits for: import, harvest against a bare hook, a cached harvest, opening a feature.

Ratios are of interleaved repeats in one process, medians. Prints a table.
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
from sae_lab.lm.tokens import pad
from sae_lab.store import FORWARD_TOKENS

LAYER, TOKENS, CONTEXT, REPEATS = 8, 8192, 128, 3


class Stop(Exception):
    """Ends a forward pass from inside a hook."""


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def import_seconds() -> float:
    """`import sae_lab` beyond `import torch`, in fresh interpreters."""
    code = "import time, torch; t = time.perf_counter(); import sae_lab; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    return statistics.median(float(r.stdout) for r in runs)


def harvest_ratio(lm: sl.LM, text: sl.Text) -> tuple[float, float]:
    """(time of harvest / time of a bare truncated forward over the same tokens, tokens per second)."""
    contexts = islice(text.contexts(lm.tokenizer, lm.prefix_id, CONTEXT, shuffle=True), TOKENS // CONTEXT)
    rows = [c.ids for c in contexts]
    per_pass = FORWARD_TOKENS // CONTEXT
    batches = [pad(rows[i : i + per_pass]).ids for i in range(0, len(rows), per_pass)]
    tokens = sum(map(len, rows))
    model = lm._module

    def stop(*_: object) -> None:
        raise Stop

    def bare() -> None:
        hook = model.model.layers[LAYER].register_forward_hook(stop)
        with torch.no_grad():
            for ids in batches:
                with suppress(Stop):
                    model(ids, use_cache=False)
        hook.remove()

    ours, theirs = [], []
    for _ in range(REPEATS):
        theirs.append(seconds(bare) / tokens)
        with tempfile.TemporaryDirectory() as folder:
            made: list[sl.Store] = []
            path = Path(folder) / "store"
            site = sl.Site("resid_post", LAYER)
            spent = seconds(lambda p=path, m=made, s=site: m.append(sl.harvest(lm, s, text, TOKENS, path=p)))
            read = sum(s["rows"] + s["excluded"] for s in made[0].manifest["shards"])
            ours.append(spent / read)
    return statistics.median(ours) / statistics.median(theirs), 1 / statistics.median(ours)


def main() -> None:
    lm, text, site = sl.LM(), sl.load_text(), sl.Site("resid_post", LAYER)
    ratio, speed = harvest_ratio(lm, text)
    rows = [("import sae_lab, beyond torch", f"{import_seconds():.2f} s", "under 1 s")]
    rows += [("harvest / bare forward hook", f"{ratio:.3f}", "at most 1.05")]
    rows += [("harvest, layers 0 to 8", f"{speed:,.0f} tokens/s", "")]
    stores = sorted((sl.cache.root() / "stores").glob("resid_post-8-*"))
    indexes = sorted((sl.cache.root() / "indexes").glob("*/index.json"))
    if stores and indexes:  # what the quickstart left behind
        store = sl.harvest(lm, site, text, tokens=100_000)
        again = seconds(lambda: sl.harvest(lm, site, text, tokens=100_000))
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
