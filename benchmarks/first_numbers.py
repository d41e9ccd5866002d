"""What a newcomer waits for: import, harvest against a bare hook, a cached harvest, opening a feature.

The ratio is of work interleaved shard by shard in one process; --quick takes fewer shards. Prints a table.
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
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import sae_lab as sl
from sae_lab.activations.sharding import SHARD_TOKENS, Harvest
from sae_lab.lm.text import Context
from sae_lab.lm.tokens import pad

LAYER, TOKENS, CONTEXT = 8, 100_000, 128
QUICK = "--quick" in sys.argv
READ = 4 * SHARD_TOKENS if QUICK else TOKENS


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
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(1 if QUICK else 3)]
    return statistics.median(float(r.stdout) for r in runs)


def harvest_ratio(lm: sl.LM, text: sl.Text, sites: list[sl.Site], read_tokens: int) -> tuple[float, float, float]:
    """(time of harvesting ``TOKENS`` tokens at these sites / time of a bare truncated forward of them, tokens/s, what
    comes once in seconds).

    One harvest, and before each of its shards the bare forward of the same contexts, so that a machine that slows down
    slows both. Only ``read_tokens`` are harvested; what comes once (hashing the model's weights, tokenising the first
    hundred documents) then still counts once for ``TOKENS`` tokens.
    """
    model, clock = lm._module, {"bare": 0.0, "fixed": 0.0, "waited": 0.0, "tokens": 0}

    def stop(*_: object) -> None:
        raise Stop

    def bare(passes: list[list[Context]]) -> None:
        batches = [pad([c.ids for c in contexts]).ids for contexts in passes]
        hook = model.model.layers[LAYER].register_forward_hook(stop)
        with torch.no_grad():
            for ids in batches:
                with suppress(Stop):
                    model(ids, use_cache=False)
        hook.remove()

    read_shard = Harvest.read

    def interleaved(harvest: Harvest, passes: list[list[Context]]) -> Any:
        clock["fixed"] = clock["fixed"] or time.perf_counter() - start
        clock["waited"] += seconds(lambda: time.sleep(0.1))  # the shard before is being written meanwhile
        clock["bare"] += seconds(lambda: bare(passes))
        clock["tokens"] += sum(len(c.ids) for contexts in passes for c in contexts)
        return read_shard(harvest, passes)

    bare(list(islice(text.passes(lm.tokenizer, lm.prefix_id, CONTEXT), 1)))  # warms up
    with tempfile.TemporaryDirectory() as folder, patch.object(Harvest, "read", interleaved):
        start = time.perf_counter()
        store = sl.harvest(lm, sites, text, read_tokens, path=Path(folder) / "store")
        harvesting = time.perf_counter() - start - clock["bare"] - clock["fixed"] - clock["waited"]
        each = harvesting / sum(s["rows"] + s["excluded"] for s in store.manifest["shards"])
    whole = clock["fixed"] + each * TOKENS
    return whole / (clock["bare"] / clock["tokens"] * TOKENS), TOKENS / whole, clock["fixed"]


def main() -> None:
    lm, text, site = sl.LM(), sl.load_text(), sl.Site("resid_post", LAYER)
    ratio, speed, fixed = harvest_ratio(lm, text, [site], READ)
    four = [sl.Site(kind, LAYER) for kind in ("resid_post", "attn_z", "mlp_in", "mlp_out")]
    several, _, _ = harvest_ratio(lm, text, four, 4 * SHARD_TOKENS)
    rows = [("import sae_lab, beyond torch", f"{import_seconds():.2f} s", "under 1 s")]
    rows += [("harvest of 100k / bare forward hook", f"{ratio:.3f}", "at most 1.05")]
    rows += [("the same of four sites", f"{several:.3f}", "")]
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
