"""Eight coders in one sweep, beside their bare steps, and beside eight runs that each harvest and train for themselves.

All in one process: a harvest (timed, into a fresh folder), the sweep, then the same eight trained one by one on that
store. A run by itself needs the harvest too, so eight of them take eight harvests and eight trainings. Bare steps are
the coders' own steps on batches in memory, in turn. Prints a table and writes benchmarks/results/sweep.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from steps import processor, write_readme

import sae_lab as sl
from sae_lab.store import Rows, Store
from sae_lab.training import Training

KS = (8, 16, 24, 32, 48, 64, 96, 128)
WIDTH = 4608
RESULTS = Path(__file__).parent / "results" / "sweep.json"


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bare_steps(store: Store, config: sl.TrainConfig, rounds: int = 5) -> float:
    """Seconds of one step of each coder, summed."""
    x = torch.cat([store.batch(i, config.batch_size).x for i in range(2)])
    trainings = [Training(sl.BatchTopK(store.width, WIDTH, k=k), Rows(x), config, None, ()) for k in KS]
    for t in trainings:
        t.begin()
    batches = [sl.Batch(part, part) for part in x.split(config.batch_size)]
    times: list[list[float]] = [[] for _ in trainings]
    for round_ in range(rounds + 1):
        for t, seconds in zip(trainings, times, strict=True):
            took = timed(lambda t=t, batch=batches[round_ % 2]: t.one_step(batch))
            if round_:  # the first warms up
                seconds.append(took)
    return sum(map(statistics.median, times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000, help="to harvest")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--passes", type=int, default=3, help="of training")
    args = parser.parse_args()
    lm, site, text = sl.LM(), sl.Site("resid_post", 8), sl.load_text()
    config = sl.TrainConfig(tokens=args.passes * args.tokens)
    reads: list[int] = []
    read = Store.batch

    def counted(store: Store, step: int, size: int, seed: int = 0) -> sl.Batch:
        reads.append(step)
        return read(store, step, size, seed)

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = sl.harvest(lm, site, text, args.tokens, path=folder)
        harvest = time.perf_counter() - start
        coders = [sl.BatchTopK(store.width, WIDTH, k=k) for k in KS]
        with patch.object(Store, "batch", counted):
            sweep = timed(lambda: sl.sweep(coders, store, config))
        alone = sum(timed(lambda k=k: sl.train(sl.BatchTopK(store.width, WIDTH, k=k), store, config)) for k in KS)
        steps = bare_steps(store, config) * config.total_steps
    rows = {
        "harvest": harvest,
        "sweep of 8": sweep,
        "8 trainings": alone,
        "8 bare steps x steps": steps,
        "sweep / bare steps": sweep / steps,
        "(harvest + sweep) / (8 harvests + 8 trainings)": (harvest + sweep) / (8 * harvest + alone),
        "batches read in the sweep": len(reads),
        "steps": config.total_steps,
    }
    for name, value in rows.items():
        print(f"{name:48} {value:10.2f}")
    RESULTS.parent.mkdir(exist_ok=True)
    facts = {"machine": processor(), "coders": f"BatchTopK, d_sae {WIDTH}, k {KS}"}
    RESULTS.write_text(json.dumps(facts | rows, indent=1))
    if args.readme:
        write_readme(
            f"A sweep of eight BatchTopK of {WIDTH} features took {sweep / steps:.2f} of the sum of their bare steps, "
            f"everything else it does included (reading, thresholds, figures), and with its harvest "
            f"{(harvest + sweep) / (8 * harvest + alone):.2f} of eight separate harvests and trainings "
            f"({args.tokens:,} tokens harvested, {args.passes} passes).",
            "sweep", "end of sweep",
        )  # fmt: skip


if __name__ == "__main__":
    main()
