"""sl.estimate beside what follows: minutes, disk and memory of a harvest, two trainings and an index, on this machine.

Each is estimated and then run, in a process of its own so that memory of the one before is not taken again. Prints a
table of estimate / truth, and writes benchmarks/results/estimates.json. The goal is a factor of 1.5 either way.

    python benchmarks/estimates.py [--tokens 100000]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sae_lab as sl
from sae_lab.costs import peak

RESULTS = Path(__file__).parent / "results" / "estimates.json"
SITE = sl.Site("resid_post", 8)
JOBS = ("harvest", "BatchTopK", "L1", "index_features")


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(job: str, tokens: int, folder: Path) -> dict[str, float]:
    """{figure: estimate / truth}, of a job into ``folder``."""
    lm, text, path = sl.LM(), sl.load_text(), folder / job
    lm.fingerprint()
    if job == "harvest":
        what, args, kwargs = sl.harvest, (lm, SITE, text, tokens), {"path": path}
    else:
        store = sl.harvest(lm, SITE, text, tokens, path=folder / "harvest")
        if job == "index_features":
            coder = sl.load(folder / "BatchTopK")
            what, args, kwargs = sl.index_features, (coder, lm, store), {"path": path}
        else:
            d = store.width
            coder = sl.BatchTopK(d, 8 * d, k=32) if job == "BatchTopK" else sl.L1(d, 2 * d, sparsity=5.0)
            what, args, kwargs = sl.train, (coder, store, sl.TrainConfig(tokens=5 * tokens)), {"path": path}
    said = sl.estimate(what, *args, **kwargs)
    start = time.perf_counter()
    with peak() as most:
        what(*args, **kwargs)
    minutes = (time.perf_counter() - start) / 60
    kept = said.parts.get("MB that stay on disk", said.disk / 1e6) * 1e6
    return {
        "minutes": minutes, "time": said.minutes / minutes, "disk": kept / size(path), "RAM": said.ram / most.ram,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--job", nargs=2)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(args.job[0], args.tokens, Path(args.job[1]))))
        return
    results = {}
    print(f"{'estimate / truth':16} {'minutes':>9} {'time':>7} {'disk':>7} {'RAM':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for job in JOBS:
            command = [sys.executable, __file__, "--tokens", str(args.tokens), "--job", job, folder]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[job] = row = json.loads(out.splitlines()[-1])
            print(f"{job:16} {row['minutes']:9.2f} {row['time']:7.2f} {row['disk']:7.2f} {row['RAM']:7.2f}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
