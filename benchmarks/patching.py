"""Patching by one gradient against patches in truth: how well they agree, and what each takes.

The indirect object (Wang et al. 2022, arXiv:2211.00593) on the bundled model: in the prompt the first of two names
gives, in its source the second. All kinds, every third layer, the tokens from where the two part (before, a patch
changes nothing). Prints correlations by kind and seconds, and writes benchmarks/results/patching.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from ioi import drawn
from steps import processor

import sae_lab as sl

RESULTS = Path(__file__).parent / "results" / "patching.json"


def measured(lm: sl.LM, names: tuple[str, str], prompt: str, source: str) -> dict[str, float]:
    """Of one pair of prompts: correlations of all cells together and by kind, and seconds."""
    metric = sl.circuits.logit_difference(lm, f" {names[0]}", f" {names[1]}")
    pairs = enumerate(sl.circuits.aligned_tokens(lm, prompt, source))
    first = next(i for i, (ours, theirs) in pairs if ours != theirs)
    axes = {"layers": range(1, lm.n_layers, 3), "positions": range(first, len(lm.tokens(prompt)))}
    calls = sl.circuits.patching_estimate, sl.circuits.patching
    grids, seconds = [], []
    for call in calls:
        start = time.perf_counter()
        grids.append(call(lm, [prompt], [source], metric, **axes))
        seconds.append(time.perf_counter() - start)
    estimate, true = (grid.values.flatten(1).numpy() for grid in grids)
    found = {
        "cells": true.size, "all": correlation(estimate, true), "all, estimates shuffled": shuffled(estimate, true),
        **{kind: correlation(e, t) for kind, e, t in zip(grids[0].kinds, estimate, true, strict=True)},
        "seconds, estimate": seconds[0], "seconds, patches": seconds[1],
    }  # fmt: skip
    return {name: float(value) for name, value in found.items()}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.flatten(), b.flatten())[0, 1])


def shuffled(a: np.ndarray, b: np.ndarray) -> float:
    return correlation(np.random.default_rng(0).permutation(a.flatten()), b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=4)
    count = parser.parse_args().pairs
    lm, rows = sl.LM(), []
    names, prompts, sources = drawn(count + 1)
    for number, pair in enumerate(zip(names, prompts, sources, strict=True)):
        row = measured(lm, *pair)
        if number:  # the first warms up
            print(row, flush=True)
            rows.append(row)
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    ratio = means["seconds, patches"] / means["seconds, estimate"]
    print(f"means of {count} pairs: {means}\npatches take {ratio:.0f} times as long", flush=True)
    RESULTS.write_text(json.dumps({"machine": processor(), "pairs": rows, "means": means, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
