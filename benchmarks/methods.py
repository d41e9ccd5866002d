"""The published methods of CHANGELOG's last section, each measured again on what comes with the library.

    python benchmarks/methods.py                # all of them, about forty minutes on two cores
    python benchmarks/methods.py 31 36          # these rows alone

Each row's figures, with their errors and controls, go into benchmarks/results/methods.json as soon as they are there.
Row 29 is benchmarks/othello.py; probing (35) and the exact ends of "recovered" stand in sl.evals.report (make report).
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

import sae_lab as sl
from sae_lab.lm.text import mix_sources
from sae_lab.saes import kernels

RESULTS = Path(__file__).parent / "results" / "methods.json"
ROWS: dict[str, Callable[[], dict[str, Any]]] = {}
LAYER_8, LAYER_16 = "smollm2-135m/resid_post-8", "smollm2-135m/resid_post-16"


def row(name: str) -> Callable:
    """Put a function among the rows; its dict holds results of sae_lab and plain numbers."""

    def register(measure: Callable[[], dict[str, Any]]) -> Callable:
        ROWS[name] = measure
        return measure

    return register


# ---- what several rows are measured on


@cache
def lm() -> sl.LM:
    return sl.LM()


@cache
def text() -> Any:
    return sl.load_text()


@cache
def store(tokens: int = 100_000) -> sl.Store:
    """Layers 8 and 16 of the same tokens."""
    return sl.harvest(lm(), ["resid_post-8", "resid_post-16"], text(), tokens)


@cache
def index() -> Any:
    alone = sl.harvest(lm(), "resid_post-8", text(), 100_000)
    return sl.index_features(sl.load(LAYER_8), lm(), alone)


@cache
def words() -> dict[int, str]:
    """Features of layer 8 whose top contexts peak on one word, which has three letters or more."""
    found = sl.explain.token_features(sl.load(LAYER_8), lm(), index())
    return {feature: word for feature, word in found.items() if len(word) > 2}


def trained(coder: sl.SparseCoder, data: Any, **settings: Any) -> sl.SparseCoder:
    return sl.train(coder, data, sl.TrainConfig(**settings)).coder.eval()


# ---- rows


@row("12 38 73 consistency")
def consistency() -> dict[str, Any]:
    sae, deeper = sl.load(LAYER_8), sl.load(LAYER_16)
    sites = [store().at("resid_post-8"), store().at("resid_post-16")]
    config = {"steps": 150, "batch_size": 1024}
    seeds = [trained(sl.BatchTopK(576, 1536, k=32, seed=s), sites[0], **config) for s in (0, 1)]
    sources = mix_sources()
    texts = {name: documents for name, documents in sources.items() if sum(map(len, documents)) > 100_000}
    one = next(name for name in texts if name != "wikipedia")
    return {
        "layers 8 and 16": sl.evals.consistency(sae, deeper, x=sites, names=["8", "16"]),
        "two seeds": sl.evals.consistency(*seeds, x=sites[0], names=["seed 0", "seed 1"]),
        f"wikipedia, then {one}": sl.evals.transfer(
            sae, lm(), text().held_out, other_text=sl.load_text(texts[one]).held_out, tokens=4096
        ),
    }


@row("16 description length")
def description_length() -> dict[str, Any]:
    found: dict[str, Any] = {
        f"layer 8, rho {rho}": sl.evals.description_length(sl.load(LAYER_8), store().at("resid_post-8"), rho=rho)
        for rho in (0.05, 0.1, 0.2, 0.3, 0.4)
    }
    for seed in (0, 1, 2):
        world = sl.worlds.planted(128, 64, 8, samples=100_000, seed=seed)
        for family in (sl.BatchTopK, sl.TopK):
            coders = [
                trained(family(64, 128, k=k), world.x, steps=600, batch_size=1024, lr=3e-3) for k in (4, 6, 8, 10, 12)
            ]
            for rho in (0.05, 0.1):
                best = sl.evals.description_length(coders, world.x, rho=rho).best_index
                found[f"k preferred, {family.__name__}, world {seed}, rho {rho}, of {world.l0:.1f}"] = coders[best].k
    return found


@row("27 position and Hill")
def position() -> dict[str, Any]:
    ks = (8, 16, 32, 64, 128)
    site = store().at("resid_post-8")
    coders = [trained(sl.BatchTopK(576, 2304, k=k), site, steps=300, batch_size=1024) for k in ks]
    results = [sl.evals.reconstruction(c, lm(), text().held_out, 2048) for c in coders]
    return {
        "by position": sl.evals.by_position(sl.load(LAYER_8), lm(), text().held_out, 8192),
        "Hill": sl.evals.hill(results),
        "recovered": {f"{r.l0:.1f}": r.ce_recovered for r in results},
    }


@row("30 absorption")
def absorption() -> dict[str, Any]:
    sae, found = sl.load(LAYER_8), {}
    for convention in ("sae_lab", "saebench"):
        found[convention] = sl.evals.absorption(sae, lm(), convention=convention)
    families = {
        "L1, sparsity .5": lambda: sl.L1(40, 40, sparsity=0.5), "L1, sparsity 2": lambda: sl.L1(40, 40, sparsity=2.0),
        "TopK": lambda: sl.TopK(40, 40, k=2), "BatchTopK": lambda: sl.BatchTopK(40, 40, k=2),
        "Matryoshka": lambda: sl.Matryoshka(40, 40, k=2),
    }  # fmt: skip
    for seed in (0, 1):
        world = sl.worlds.planted(40, 40, 2, hierarchy=1, samples=50_000, seed=seed)
        codes = world.codes._replace(values=torch.ones_like(world.codes.values))
        equal = dataclasses.replace(world, codes=codes, x=kernels.decode(codes, world.dictionary))
        for sizes, data in {"sizes .5 to 1.5": world, "equal sizes": equal}.items():
            for name, make in families.items():
                coder = trained(make(), data.x, steps=1500, batch_size=1024, lr=3e-3)
                found[f"{sizes}, {name}, world {seed}"] = sl.evals.planted_absorption(coder, data)
    return found


class Apart(sl.TopK):
    """A TopK whose loss grows with the largest cosine that each decoder row has with another."""

    weight = 1.0

    def terms(self, batch: Any, out: Any, *, progress: float, dead: torch.Tensor) -> dict[str, torch.Tensor]:
        W = torch.nn.functional.normalize(self.W_dec, dim=1)
        cosines = (W @ W.T).fill_diagonal_(0)
        apart = self.weight * cosines.amax(1).relu().square().mean()
        return super().terms(batch, out, progress=progress, dead=dead) | {"apart": apart}


@row("31 composed features")
def composition() -> dict[str, Any]:
    found: dict[str, Any] = {}
    config = {"steps": 1200, "batch_size": 1024, "lr": 3e-3}
    for correlation in (0.0, 0.5, 0.9, 0.99):
        world = sl.worlds.planted(64, 64, 4, correlation=correlation, samples=100_000)
        for name, coder in (("TopK", sl.TopK(64, 64, k=4)), ("L1", sl.L1(64, 64, sparsity=0.5))):
            found[f"{name}, correlation {correlation}"] = sl.evals.composition(trained(coder, world.x, **config), world)
    found["TopK with a penalty on cosines, correlation 0.99"] = sl.evals.composition(
        trained(Apart(64, 64, k=4), world.x, **config), world
    )
    world = sl.worlds.product((8, 8), 64, samples=100_000)
    for name, coder in {
        "16 features, k 2": sl.TopK(64, 16, k=2), "64 features, k 2": sl.TopK(64, 64, k=2),
        "64 features, k 1": sl.TopK(64, 64, k=1),
        "64 features, k 1, penalty": Apart(64, 64, k=1),
    }.items():  # fmt: skip
        found[f"product world, {name}"] = sl.evals.composition(trained(coder, world.x, **config), world)
    return found


@row("32 stitching")
def stitching() -> dict[str, Any]:
    site = store().at("resid_post-8")
    config = {"steps": 300, "batch_size": 1024}
    small, other, large = (
        trained(sl.BatchTopK(576, width, k=32, seed=seed), site, **config)
        for width, seed in ((768, 0), (768, 1), (3072, 0))
    )
    world = sl.worlds.planted(128, 64, 4, samples=100_000)
    few, many = (
        trained(sl.BatchTopK(64, width, k=k), world.x, steps=800, batch_size=1024, lr=3e-3)
        for width, k in ((48, 2), (128, 4))
    )
    return {
        "768 into 3,072": sl.evals.stitching(small, large, site),
        "two seeds of 768": sl.evals.stitching(small, other, site),
        "planted, 48 into 128": sl.evals.stitching(few, many, world.x),
    }


@row("33 pathological errors")
def errors() -> dict[str, Any]:
    return {
        name: sl.evals.pathological_errors(sl.load(name), lm(), text().held_out, 4096) for name in (LAYER_8, LAYER_16)
    }


@row("36 monosemanticity")
def monosemanticity() -> dict[str, Any]:
    pixels, digits = load_digits(return_X_y=True)
    x = torch.from_numpy(np.asarray(pixels)).float()
    classes = torch.nn.functional.one_hot(torch.from_numpy(np.asarray(digits))).float()
    coder = trained(sl.BatchTopK(64, 128, k=6), x, steps=1500, batch_size=256, lr=3e-3)
    eight, sixteen = store().at("resid_post-8"), store().at("resid_post-16")
    return {
        "layer 8": sl.evals.monosemanticity(sl.load(LAYER_8), eight),
        "layer 16": sl.evals.monosemanticity(sl.load(LAYER_16), sixteen),
        "layer 8, alike at 16": sl.evals.monosemanticity(sl.load(LAYER_8), eight, sixteen),
        "layer 16, alike at 8": sl.evals.monosemanticity(sl.load(LAYER_16), sixteen, eight),
        "digits, alike by class": sl.evals.monosemanticity(coder, x, classes),
    }


@row("37 concept cones")
def cones() -> dict[str, Any]:
    """Concepts: the thirty most frequent tokens."""
    read = store().at("resid_post-8").batch(0, 40_000)
    assert read.tokens is not None
    frequent = read.tokens.bincount().topk(30).indices
    return {"thirty tokens": sl.evals.cones(sl.load(LAYER_8), x=read.x, labels=read.tokens[:, None] == frequent)}


@row("39 injected tokens")
def injection() -> dict[str, Any]:
    cues = ["because", "therefore", "thus", "if", "however", "although", "so", "hence", "since", "then"]
    found = {f: w for f, w in words_of(cues).items()}
    random = np.random.default_rng(0).choice(np.flatnonzero(index().density > 1e-3), 10, replace=False).tolist()
    sae, held_out = sl.load(LAYER_8), text().held_out
    return {
        f"cue words ({', '.join(sorted(set(found.values())))})": sl.evals.token_injection(
            sae, lm(), index(), list(found), held_out
        ),
        "ten random features": sl.evals.token_injection(sae, lm(), index(), random, held_out),
    }


def words_of(wanted: list[str]) -> dict[int, str]:
    """Features whose top token is one of these, at most ten."""
    found: dict[int, str] = {}
    for word in wanted:
        for feature in index().search(word, limit=3):
            if index().top_tokens(feature, 1)[0].strip().lower() == word and len(found) < 10:
                found[int(feature)] = word
    return found


@row("42 uncertainty")
def uncertainty() -> dict[str, Any]:
    prompts, answers, kinds = zip(*sl.evals.synthetic_qa(n=160), strict=True)
    return {"160 questions": sl.evals.uncertainty(sl.load(LAYER_16), lm(), prompts, answers, groups=kinds)}


@row("57 lens and token lists")
def lens() -> dict[str, Any]:
    sae, features = sl.load(LAYER_8), list(words())
    return {
        "lens": sl.explain.lens_shape(sae, lm(), features, words()),
        "token lists": sl.explain.token_list(sae, lm(), features, words()),
    }


@row("58 rule explanations")
def explanations() -> dict[str, Any]:
    more = sl.harvest(lm(), "resid_post-8", text(), 400_000)
    indices = {"100,000 tokens": index(), "400,000 tokens": sl.index_features(sl.load(LAYER_8), lm(), more)}
    return {
        f"{size}, seed {seed}": sl.explain.explain(indices[size], 60, seed=seed, resume=False)
        for size in indices
        for seed in (0, 1)
    }


@row("59 to 61 SAGE, self-explanation, evolved prompts")
def agents() -> dict[str, Any]:
    """Features of middling density: the densest fire on words such as "the", which any text holds. A planted feature
    that fires on one word behind another is in tests/explain/test_sage.py."""
    sae, by_density = sl.load(LAYER_8), list(words().items())
    some = dict(by_density[len(by_density) // 2 :][:12])
    few = list(some)[:4]
    found: dict[str, Any] = {
        f"SAGE, {some[f]!r}": sl.explain.sage_explain(sae, lm(), index(), f, sl.explain.ScriptedAgent()) for f in few
    }
    return found | {
        "self-explanation": sl.explain.self_explain(sae, lm(), list(some), some),
        "prompts from the top": sl.explain.evolve_prompts(sae, lm(), index(), few),
        "prompts from nothing": sl.explain.evolve_prompts(sae, lm(), index(), few[:2], start="random"),
    }


@row("70 71 geometry")
def geometry() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (LAYER_8, LAYER_16):
        for kind in ("WEEKDAYS", "MONTHS"):
            found[f"{kind.lower()}, {name}"] = sl.geometry.circular(
                sl.load(name), lm(), getattr(sl.geometry, kind), draws=10
            )
    rows = np.arange(20_000)
    with torch.no_grad():
        codes = sl.load(LAYER_8).sparse_codes(store().rows(rows, "resid_post-8"))
    contexts = torch.from_numpy(store().contexts(rows))
    return found | {
        "decoder rows": sl.geometry.clusters(sl.load(LAYER_8)),
        "patterns": sl.geometry.patterns(codes, contexts, looked=80),
    }


@row("72 positional features")
def positional() -> dict[str, Any]:
    first = sl.harvest(lm(), "resid_post-0", text(), 100_000)
    coder = trained(sl.BatchTopK(576, 2304, k=32), first, steps=400, batch_size=1024)
    return {
        "layer 0, trained here": sl.evals.positional(coder, lm(), first),
        "layer 8": sl.evals.positional(sl.load(LAYER_8), lm(), store().at("resid_post-8")),
    }


# ---- running


def plain(value: Any) -> Any:
    """What json takes: a result becomes its figures, each (value, error, control, what the control is)."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "figures"):
        return {f.measure: [*map(short, f[1:4]), f.control_name] for f in value.figures()}
    return short(value)


def short(number: float) -> float | None:
    return None if math.isnan(number) else float(f"{number:.5g}")


def main() -> None:
    chosen = [name for name in ROWS if not sys.argv[1:] or set(sys.argv[1:]) & set(name.split())]
    if not chosen:
        raise SystemExit(f"no row {' '.join(sys.argv[1:])}; there are: {'; '.join(ROWS)}")
    for name in chosen:
        print(f"\n== {name}", flush=True)
        begin = time.perf_counter()
        found = ROWS[name]()
        for title, result in found.items():
            print(f"{title}\n{result!r}" if hasattr(result, "figures") else f"{title}: {result}", flush=True)
        print(f"({time.perf_counter() - begin:.0f} s)", flush=True)
        kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        kept[name] = plain(found)
        RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
