"""FVU against wall time: TopK of this library and of its peers, on the same real activations in the same batches.

Each trains for the same number of seconds (its steps alone are timed, in turn with the others' so that a slow moment of
the machine hits all), with Adam at one learning rate that does not change; FVU is of tokens that no step saw, medians
over seeds. Writes benchmarks/results/race.json and docs/race.png.

    python benchmarks/race.py [--seconds 40] [--seeds 3]
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


def plot(runs: list[dict[str, list[tuple[float, int, float]]]], file: Path) -> None:
    """Medians over runs, and their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    for name in RUNNERS:
        points = list(zip(*(run[name] for run in runs), strict=False))
        seconds = [statistics.median(s for s, _, _ in at) for at in points]
        fvus = [sorted(fvu for _, _, fvu in at) for at in points]
        [line] = axes.plot(
            seconds, [statistics.median(f) for f in fvus], label=name, lw=2.2 if name.startswith("sae_lab") else 1.3
        )
        axes.fill_between(seconds, [f[0] for f in fvus], [f[-1] for f in fvus], color=line.get_color(), alpha=0.2, lw=0)
    axes.set(xlabel="seconds of training (two CPU cores)", ylabel="FVU, unseen tokens", yscale="log")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(file, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    x, unseen = steps.activations(batches=18)
    runs = [race(x, unseen, args.seconds, seed) for seed in range(args.seeds)]
    medians = {}
    for name in RUNNERS:
        points = zip(*(run[name] for run in runs), strict=False)
        medians[name] = [tuple(statistics.median(values) for values in zip(*at, strict=True)) for at in points]
    for name, points in medians.items():
        if name != "sae_lab TopK":  # at every point after the first twentieth of the time
            ours = [fvu for _, _, fvu in medians["sae_lab TopK"]]
            theirs = [fvu for _, _, fvu in points]
            ahead = all(a < b for a, b in zip(ours, theirs, strict=False))
            print(f"{name}: {'above' if ahead else 'NOT above'} ours at every one of {len(points)} points")
        marks = "  ".join(f"{s:.0f} s {fvu:.3f}" for s, _, fvu in points[:: max(1, len(points) // 4)])
        print(f"{name:28} {points[-1][1]:5.0f} steps   {marks}")
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "race.json").write_text(json.dumps({"case": str(CASE), "lr": steps.LR, "runs": runs}))
    plot(runs, ROOT / "docs" / "race.png")


if __name__ == "__main__":
    main()
