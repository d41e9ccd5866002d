"""Eight coders in one sweep, beside their bare steps, and beside eight runs that each harvest and train for themselves.

All in one process: a harvest (timed, into a fresh folder), the sweep, then the same eight trained one by one on that
store. A run by itself needs the harvest too, so eight of them take eight harvests and eight trainings. Bare steps are
the same steps of each coder on batches in memory, and nothing else. Prints a table and writes
benchmarks/results/sweep.json.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from pages import put
from steps import processor

import sae_lab as sl
from sae_lab.activations.store import Store
from sae_lab.training.loop import Training

KS = (8, 16, 24, 32, 48, 64, 96, 128)
WIDTH = 4608
RESULTS = Path(__file__).parent / "results" / "sweep.json"


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bare_steps(store: Store, config: sl.TrainConfig) -> float:
    """Seconds of all steps of each coder on batches in memory, and of nothing else, summed."""
    batches = [store.batch(i, config.batch_size) for i in range(config.total_steps)]
    seconds = 0.0
    for k in KS:
        training = Training(sl.BatchTopK(store.width, WIDTH, k=k), store, config, None, ())
        training.begin()
        seconds += sum(timed(lambda t=training, b=batch: t.one_step(b)) for batch in batches)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000, help="to harvest")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--passes", type=int, default=3, help="of training")
    args = parser.parse_args()
    lm, site, text = sl.LM(), sl.Site("resid_post", 8), sl.load_text()
    config = sl.TrainConfig(tokens=args.passes * args.tokens)
    reads: list[int] = []
    read = Store.batch

    def counted(store: Store, step: int, size: int, seed: int = 0) -> sl.Batch:
        reads.append(step)
        return read(store, step, size, seed)

    stepping: list[float] = []
    one_step = Training.one_step

    def stepped(training: Training, batch: sl.Batch) -> None:
        stepping.append(timed(lambda: one_step(training, batch)))

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = sl.harvest(lm, site, text, args.tokens, path=folder)
        harvest = time.perf_counter() - start
        coders = [sl.BatchTopK(store.width, WIDTH, k=k) for k in KS]
        with patch.object(Store, "batch", counted), patch.object(Training, "one_step", stepped):
            sweep = timed(lambda: sl.sweep(coders, store, config))
        alone = sum(timed(lambda k=k: sl.train(sl.BatchTopK(store.width, WIDTH, k=k), store, config)) for k in KS)
        steps = bare_steps(store, config)
    rows = {
        "harvest": harvest,
        "sweep of 8": sweep,
        "8 trainings": alone,
        "their bare steps": steps,
        "steps in the sweep": sum(stepping),
        "steps in the sweep / bare steps": sum(stepping) / steps,
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
    if args.docs:
        put(
            "docs/speed.md", "sweep",
            f"In a sweep of eight BatchTopK of {WIDTH} features steps took {sum(stepping) / steps:.2f} of bare ones, "
            f"everything (reading, thresholds, dead features, figures) {sweep / steps:.2f}, and with its harvest "
            f"{(harvest + sweep) / (8 * harvest + alone):.2f} of eight separate harvests and trainings "
            f"({args.tokens:,} tokens harvested, {args.passes} passes).",
        )  # fmt: skip


if __name__ == "__main__":
    main()
