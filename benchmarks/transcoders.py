"""Train a transcoder for each layer of the bundled model, pack them into few bits, and measure what they are worth.

    python benchmarks/transcoders.py              # harvest, train, choose the bits, measure, write sae_lab/data
    python benchmarks/transcoders.py --only train # one step: harvest, train, pack, measure or ship
    python benchmarks/transcoders.py --docs       # only the table of docs/coders.md

One pass of the model serves all layers: what 30 MLPs read and write, 69 kB a token on disk (runs/transcoders; the store
may be deleted after the training). Each step goes on where it was interrupted. The card is of the weights shipped, on
held-out documents, each figure beside two controls: the weights in float32, and the MLP's own neurons, the k with the
largest writes in place of the features.
"""

import argparse
import contextlib
import hashlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pages import put
from torch import Tensor

import sae_lab as sl
from sae_lab.activations.contexts import spread_contexts
from sae_lab.lm.text import padded

ROOT = Path(__file__).resolve().parent.parent
WORK, PACKAGE = ROOT / "runs" / "transcoders", ROOT / "sae_lab" / "data" / "saes" / "smollm2-135m" / "transcoders"
RESULTS = ROOT / "benchmarks" / "results" / "transcoders.json"
K = 32
BUDGET = 24e6  # bytes for the whole set
# (every how many layers one, its width, the bits of its weights): each fits the budget.
SHAPES = {"narrow": (1, 1200, 4), "every second": (2, 2400, 4), "fine": (1, 624, 8)}
EVALUATED, CONTEXT, PROMPTS = 8_192, 128, 50


def name(shape: str) -> str:
    return shape.replace(" ", "-")


def harvested(lm: sl.LM, tokens: int) -> sl.Store:
    sites = [sl.Site(kind, layer) for layer in range(lm.n_layers) for kind in ("mlp_in", "mlp_out")]
    return sl.harvest(lm, sites, sl.load_text("mix"), tokens, path=WORK / "store")


def trained(store: sl.Store, layer: int, width: int, tokens: int) -> sl.SparseCoder:
    reads, writes = sl.Site("mlp_in", layer), sl.Site("mlp_out", layer)
    d = store.at(reads).width
    coder = sl.Transcoder(d, width, k=K, d_out=store.at(writes).width)
    coder.reads, coder.writes = (reads,), (writes,)
    config = sl.TrainConfig(tokens=tokens, batch_size=2048, log_every=50)
    sl.train(coder, store.view((reads,), (writes,)), config, path=WORK / f"{width}-{layer}")
    return coder


@contextlib.contextmanager
def neurons(lm: sl.LM, k: int) -> Iterator[None]:
    """Within, each MLP keeps k of its neurons on each token, those that write most, but at position 0."""

    def kept(module: torch.nn.Linear, args: tuple[Tensor]) -> tuple[Tensor]:
        (h,) = args
        size = h.abs() * module.weight.norm(dim=0)
        on = size >= size.topk(k, dim=-1).values[..., -1:]
        on[:, 0] = True
        return (h * on,)

    with lm.edited([]) as module:
        down = [m for at, m in module.named_modules() if at.endswith("mlp.down_proj")]
    handles = [m.register_forward_pre_hook(kept) for m in down]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def replaced(lm: sl.LM, coders: sl.TranscoderSet | None) -> dict[str, float]:
    """Loss, and how often the likeliest token stays the same, with all MLPs replaced: by a set, or by their neurons."""
    contexts = spread_contexts(lm, sl.load_text("mix").held_out, EVALUATED, CONTEXT)
    edits = [] if coders is None else [sl.Splice(coder) for coder in coders]
    losses, same, clean_losses = [], [], []
    for context in contexts:
        batch = padded([context])
        clean = lm.logits(batch)[0, :-1]
        with neurons(lm, K) if coders is None else contextlib.nullcontext():
            logits = lm.logits(batch, edits)[0, :-1]
        answers = batch.ids[0, 1:]
        clean_losses.append(torch.nn.functional.cross_entropy(clean, answers, reduction="none"))
        losses.append(torch.nn.functional.cross_entropy(logits, answers, reduction="none"))
        same.append(clean.argmax(-1) == logits.argmax(-1))
    added = [float((a - b).mean()) for a, b in zip(losses, clean_losses, strict=True)]
    return {
        "loss": round(float(torch.cat(losses).mean()), 3),
        "clean": round(float(torch.cat(clean_losses).mean()), 3),
        "added": round(statistics.fmean(added), 3),
        "added_se": round(statistics.stdev(added) / len(added) ** 0.5, 3),
        "same_top": round(float(torch.cat(same).float().mean()), 3),
    }


@torch.no_grad()
def layers_of(lm: sl.LM, coders: sl.TranscoderSet, alone: bool) -> list[dict[str, float]]:
    """Of each layer: FVU and L0 on tokens of the kind that it was trained on; with alone, the loss that this transcoder
    adds by itself."""
    batch = padded(spread_contexts(lm, sl.load_text("mix").held_out, 2_048, CONTEXT))
    clean = lm.loss(batch, per_token=True)[:, 1:] if alone else None
    rows = []
    for layer, coder in zip(coders.layers, coders, strict=True):
        acts = lm.read(batch, [*coder.reads, *coder.writes])
        x, y = (acts[site][coder.mask.of(batch, acts)] for site in (coder.reads[0], coder.writes[0]))
        codes = coder.encode(x)
        fvu = (y - coder.decode(codes)).square().sum() / (y - y.mean(0)).square().sum()
        l0 = (codes != 0).sum(1).float().mean()
        rows.append({"layer": layer, "fvu": round(float(fvu), 4), "l0": round(float(l0), 2)})
        if clean is not None:
            cost = (lm.loss(batch, [sl.Splice(coder)], per_token=True)[:, 1:] - clean).nanmean(1)
            added, error = float(cost.mean()), float(cost.std()) / len(cost) ** 0.5
            rows[-1] |= {"added": round(added, 4), "added_se": round(error, 4)}
    return rows


SCORES = ("replacement", "completeness", "completeness_inner", "visited")


def graphs(lm: sl.LM, coders: sl.TranscoderSet, done: list[list[float]]) -> Iterator[list[list[float]]]:
    """Scores of graphs of the next token of the first 20 of held-out documents, after each. done: those known."""
    for document in sl.load_text("mix").held_out[len(done) : PROMPTS]:
        graph = sl.circuits.trace(lm, coders, lm.tokenizer.decode(lm.tokenize(document).ids[0, 1:20]), features=1024)
        done.append([round(getattr(graph, score), 4) for score in SCORES])
        yield done


def measure(shape: str, lm: sl.LM) -> None:
    """All figures of a set, into the results after each of them. It goes on where it was interrupted, and begins anew
    where the set is another one."""
    every, width, _ = SHAPES[shape]
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    sets = {shape: sl.TranscoderSet.load(WORK / name(shape)), "float32": whole(shape, lm.n_layers)}
    weights = "".join(coder.fingerprint() for one in sets.values() for coder in one)
    of = hashlib.sha256(weights.encode()).hexdigest()[:16]
    if known.get(shape, {}).get("of") != of:
        known[shape] = {"of": of, "width": width, "every": every}

    def keep(into: dict[str, Any], what: str, found: Any) -> None:
        into[what] = found
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(what, flush=True)

    if "neurons" not in known:
        keep(known, "neurons", replaced(lm, None))
    for precision, coders in sets.items():
        found = known[shape].setdefault(precision, {})
        if "replaced" not in found:
            keep(found, "replaced", replaced(lm, coders))
        if "layers" not in found:
            keep(found, "layers", layers_of(lm, coders, alone=precision == shape))
    for rows in graphs(lm, sets[shape], known[shape].get("graphs", [])):
        keep(known[shape], "graphs", rows)


def whole(shape: str, layers: int) -> sl.TranscoderSet:
    """The set in float32, as it was trained."""
    every, width, _ = SHAPES[shape]
    return sl.TranscoderSet([sl.load(WORK / f"{width}-{layer}") for layer in range(0, layers, every)])


def packed(shape: str, layers: int) -> Path:
    _, _, bits = SHAPES[shape]
    coders = whole(shape, layers)
    folder = coders.save(WORK / name(shape), bits=bits)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < BUDGET, f"{shape}: {size / 1e6:.1f} MB are more than {BUDGET / 1e6:.0f}"
    return folder


def ship(shape: str) -> None:
    """Put a set into the package. Each transcoder's card has the figures of its layer."""
    _, _, bits = SHAPES[shape]
    coders = sl.TranscoderSet.load(WORK / name(shape))
    found = json.loads(RESULTS.read_text())[shape]
    for row in found[shape]["layers"]:
        coder = coders[row["layer"]]
        tokens = coder.meta["train_tokens"]
        figures = {"l0": row["l0"], "fvu": row["fvu"], "ce_delta": row["added"], "ce_delta_se": row["added_se"]}
        coder.meta["card"] = {
            "family": type(coder).__name__,
            "seeds": [0],
            "tokens": tokens,
            "held_out": {"mix": figures},
        }
    coders.save(PACKAGE, bits=bits)


def table(shape: str) -> str:
    """What docs/coders.md says of a set: by layer, and with all MLPs replaced."""
    known = json.loads(RESULTS.read_text())
    found, bits = known[shape], SHAPES[shape][2]
    whole = {row["layer"]: row for row in found["float32"]["layers"]}
    lines = ["| layer | L0 | FVU | FVU in float32 | ΔCE |", "|---|---|---|---|---|"]
    for row in found[shape]["layers"]:
        cost = f"{row['added']:.3f} ± {row['added_se']:.3f}"
        lines.append(
            f"| {row['layer']} | {row['l0']:.1f} | {row['fvu']:.3f} | {whole[row['layer']]['fvu']:.3f} | {cost} |"
        )
    lines += ["", "| all MLPs replaced by | loss | ΔCE | same likeliest token |", "|---|---|---|---|"]
    rows = {
        f"the set, {bits} bits": found[shape]["replaced"],
        "the set in float32": found["float32"]["replaced"],
        f"the {K} neurons that write most": known["neurons"],
    }
    for what, row in rows.items():
        added = f"{row['added']:.2f} ± {row['added_se']:.2f}"
        lines.append(f"| {what} | {row['loss']:.2f} (clean {row['clean']:.2f}) | {added} | {row['same_top']:.1%} |")
    lines += ["", f"| graphs of {PROMPTS} prompts | quartile | median | quartile |", "|---|---|---|---|"]
    named = ("replacement score", "completeness score", "completeness of features and logits", "features visited")
    for said, values in zip(named, zip(*found["graphs"], strict=True), strict=True):
        lines.append(f"| {said} | {' | '.join(f'{v:.2f}' for v in statistics.quantiles(values, n=4))} |")
    steps = {coder.meta["train_tokens"] for coder in sl.TranscoderSet.load(PACKAGE)}
    lines += ["", f"Each layer was trained for {max(steps):,} tokens, by `benchmarks/transcoders.py`."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=600_000, help="to harvest")
    parser.add_argument("--train", type=int, default=2_400_000, help="tokens of training of each layer")
    parser.add_argument("--only", choices=("harvest", "train", "pack", "measure", "ship"))
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--docs", action="store_true", help="only the table of docs/coders.md, of the first --shape")
    args = parser.parse_args()
    if args.docs:
        put("docs/coders.md", "transcoders", table((args.shape or list(SHAPES))[0]))
        return
    steps = [args.only] if args.only else ["harvest", "train", "pack", "measure"]
    lm = sl.LM()
    if "harvest" in steps or "train" in steps:
        store = harvested(lm, args.tokens)
    for shape in args.shape or SHAPES:
        every, width, _ = SHAPES[shape]
        if "train" in steps:
            for layer in range(0, lm.n_layers, every):
                trained(store, layer, width, args.train)
        if "pack" in steps:
            packed(shape, lm.n_layers)
        if "measure" in steps:
            measure(shape, lm)
        if args.only == "ship":
            ship(shape)


if __name__ == "__main__":
    main()
