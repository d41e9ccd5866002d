"""FVU against wall time: TopK of this library and of its peers, on the same real activations in the same batches.

Each trains for the same number of seconds (its steps alone are timed, in turn with the others' so that a slow moment of
the machine hits all), with Adam at one learning rate that does not change; FVU is of tokens that no step saw, medians
over seeds. Writes benchmarks/results/race.json and docs/race.png.

    python benchmarks/race.py [--seconds 60] [--seeds 3]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import steps
import torch
from torch import Tensor

from sae_lab.saes import losses

CASE = steps.Case(4608, 32)
RUNNERS = {name: steps.TOPK[name] for name in steps.TOPK if "rescale" not in name}
EVERY = 1 / 20  # of the time, between measurements
ROOT = Path(__file__).parent.parent


def race(x: Tensor, unseen: Tensor, seconds: float, seed: int) -> dict[str, list[tuple[float, int, float]]]:
    """{name: [(seconds of training, steps, FVU)]}"""
    runners = {name: make(CASE, x, seed) for name, make in RUNNERS.items()}
    batches = x.view(-1, steps.BATCH, steps.D)
    spent, taken = dict.fromkeys(runners, 0.0), dict.fromkeys(runners, 0)
    curves: dict[str, list[tuple[float, int, float]]] = {name: [] for name in runners}
    while min(spent.values()) < seconds:
        name = min(spent, key=spent.__getitem__)  # whoever has had the least time is next
        batch = batches[taken[name] % len(batches)].contiguous()
        start = time.perf_counter()
        runners[name].step(batch)
        spent[name] += time.perf_counter() - start
        taken[name] += 1
        if spent[name] >= EVERY * seconds * (len(curves[name]) + 1):
            with torch.no_grad():
                fvu = float(losses.fvu(runners[name].x_hat(unseen), unseen))
            curves[name].append((spent[name], taken[name], fvu))
    return curves


def plot(curves: dict[str, list[tuple[float, float]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, lw=2.2 if name.startswith("sae_lab") else 1.3)
    axes.set(xlabel="seconds of training (two CPU cores)", ylabel="FVU, unseen tokens", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    x, unseen = steps.activations(batches=18)
    runs = [race(x, unseen, args.seconds, seed) for seed in range(args.seeds)]
    medians = {}
    for name in RUNNERS:
        points = zip(*(run[name] for run in runs), strict=False)
        medians[name] = [tuple(statistics.median(values) for values in zip(*at, strict=True)) for at in points]
    for name, points in medians.items():
        marks = "  ".join(f"{s:.0f} s {fvu:.3f}" for s, _, fvu in points[:: max(1, len(points) // 4)])
        print(f"{name:28} {points[-1][1]:5.0f} steps   {marks}")
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "race.json").write_text(json.dumps({"case": str(CASE), "lr": steps.LR, "runs": runs}))
    plot({name: [(s, fvu) for s, _, fvu in points] for name, points in medians.items()}, ROOT / "docs" / "race.png")


if __name__ == "__main__":
    main()
