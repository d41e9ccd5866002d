"""The indirect object: how few directions carry it, and how well gradients tell what a feature's patch does.

Two measurements on the bundled model, behind blocks 8 and 16. `circuits.patched_directions` on 48 pairs of prompts,
half of which rank and half are scored: areas of mean KL over log n, with bootstrap intervals. `circuits.attribution` on
six pairs, against true patches of the same features. Names, places and gifts are drawn once, with seed 0. Prints both
and writes benchmarks/results/ioi.json.
"""

import argparse
import json
import random
from pathlib import Path

import pandas as pd
from steps import processor

import sae_lab as sl

RESULTS = Path(__file__).parent / "results" / "ioi.json"
LAYERS = (8, 16)
PEOPLE = ["Mary", "John", "Alice", "Tom", "Anna", "Paul", "Sarah", "David", "James", "Emma", "Robert", "Laura"]
PLACES, GIFTS = ["store", "park", "school", "office"], ["book", "drink", "ring", "letter"]
FORM = "When {} and {} went to the {}, {} gave a {} to"
OTHERS = ("PCA", "neurons", "random", "differences")


def drawn(count: int) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """(names, prompts, sources): in a prompt the first of the two gives, in its source the second."""
    draw = random.Random(0)
    names = [(a, b) for a, b in (draw.sample(PEOPLE, 2) for _ in range(count))]
    what = [(draw.choice(PLACES), draw.choice(GIFTS)) for _ in names]
    prompts = [FORM.format(a, b, place, a, gift) for (a, b), (place, gift) in zip(names, what, strict=True)]
    sources = [FORM.format(a, b, place, b, gift) for (a, b), (place, gift) in zip(names, what, strict=True)]
    return names, prompts, sources


def metric_of(lm: sl.LM, names: list[tuple[str, str]]):
    return sl.circuits.logit_difference(lm, [f" {a}" for a, _ in names], [f" {b}" for _, b in names])


def directions(lm: sl.LM, layer: int, pairs: int) -> dict[str, object]:
    """Areas of the features' curve less another's, by number of directions and by size of edit."""
    names, prompts, sources = drawn(pairs)
    metric = metric_of(lm, names)
    right = float((metric(lm.logits(sources), lm.tokenize(sources)) > 0).float().mean())
    left = float((metric(lm.logits(prompts), lm.tokenize(prompts)) < 0).float().mean())
    sae = sl.load(f"smollm2-135m/resid_post-{layer}")
    text = lm.read([document[:700] for document in sl.load_text()[:60]], sae.site)
    assert sae.mask is not None
    plain = text[sae.site][sae.mask.keep(text.ids, text.batch.positions, text) & text.mask]
    numbers = [2**i for i in range(10)]
    bases = {"PCA": sl.circuits.principal_axes(plain)}
    curves = sl.circuits.patched_directions(lm, sae, prompts, sources, bases=bases, numbers=numbers, steps=8)
    print(f"layer {layer}: right answers {right:.0%} and {left:.0%}; PCA of {len(plain):,} tokens", flush=True)
    print(curves, flush=True)
    areas = {}
    for ours in ("features", "features and error"):
        for against in ("number", "edit"):
            for other in OTHERS:
                area = curves.area_difference(ours, other, against=against)
                areas[f"{ours} - {other}, by {against}"] = [area.value, area.low, area.high]
                print(f"  {ours} - {other}, by {against}: {area}", flush=True)
    return {"right": [right, left], "pca_tokens": len(plain), "areas": areas, "kl": curves.to_pandas().to_dict("list")}


def agreement(lm: sl.LM, layer: int) -> dict[str, dict[str, float]]:
    """Correlations of one gradient and of integrated gradients with true patches of the same active features."""
    names, prompts, sources = drawn(6)
    sae, metric = sl.load(f"smollm2-135m/resid_post-{layer}"), metric_of(lm, names)
    ten = sl.circuits.attribution(lm, sae, prompts, sources, metric, steps=10, check=60)
    one = sl.circuits.attribution(lm, sae, prompts, sources, metric)
    truth = pd.Series({node: effect for node, effect in ten.true_effects.items() if node[1] >= 0})
    found = {}
    for name, by in (("gradient", one), ("integrated, 10 steps", ten)):
        estimate = pd.Series({node: float(by.effects[node]) for node in truth.index})
        found[name] = {how: float(estimate.corr(truth, how)) for how in ("pearson", "spearman")}
        print(f"layer {layer}, {name}, {len(truth)} features: {found[name]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=48)
    args = parser.parse_args()
    lm, results = sl.LM(), {"machine": processor(), "pairs": args.pairs}
    for layer in LAYERS:
        results[f"agreement, layer {layer}"] = agreement(lm, layer)
    for layer in LAYERS:
        results[f"directions, layer {layer}"] = directions(lm, layer, args.pairs)
        RESULTS.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
