"""Train the coders that come with the library, measure them on held-out text, and put them into the package.

    python benchmarks/train_shipped.py                 # harvest, train, measure, write sae_lab/data/saes
    python benchmarks/train_shipped.py --only mlp_out-8
    python benchmarks/train_shipped.py --pack          # the coders in the package, in 8 bits, measured again

One pass of the bundled model over the mix serves all sites; each coder then makes several passes over that store. The
same call goes on where it was interrupted (runs/shipped holds the store and the checkpoints). The card of each coder is
what ``sl.evals.reconstruction`` measures, of the 8-bit weights shipped, on held-out documents of three kinds.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from pages import put

import sae_lab as sl
from sae_lab.activations.contexts import spread_contexts
from sae_lab.activations.reconstructing import AT_STAKE, SURE, too_little
from sae_lab.lm.text import mix_sources, padded
from sae_lab.saes.io.ours import shipped

ROOT = Path(__file__).resolve().parent.parent
WORK, PACKAGE = ROOT / "runs" / "shipped", ROOT / "sae_lab" / "data" / "saes"
COLLECTION, WIDTH, K = "smollm2-135m", 4608, 32
# Three kinds of text and the part of the mix they are; the held-out documents of each were never harvested.
DOMAINS = {"encyclopedia": "wikipedia", "news": "100_news_fake", "reviews": "112_amzn_rev"}

EVALUATED = 4_096  # tokens of each: all five variants of all 30 layers for each of them
FIGURES = (
    "l0", "fvu", "ce_delta", "ce_delta_se", "ce_recovered", "ce_delta_mean_ablation", "ce_delta_mean_ablation_se",
    "pca_fvu", "pca_ce_delta", "tokens", "documents",
)  # fmt: skip


class Recipe(NamedTuple):
    reads: sl.Site
    writes: sl.Site
    make: Callable[[int, int], sl.SparseCoder]  # (width read, width written)
    shipped: bool = True


def sae(d_in: int, _: int) -> sl.SparseCoder:
    return sl.BatchTopK(d_in, WIDTH, k=K)


def transcoder(d_in: int, d_out: int) -> sl.SparseCoder:
    return sl.Transcoder(d_in, WIDTH, k=K, d_out=d_out)


RECIPES = {
    name: Recipe(sl.Site(reads, layer), sl.Site(writes, layer), make, shipped)
    for name, reads, writes, layer, make, shipped in [
        ("resid_post-8", "resid_post", "resid_post", 8, sae, True),
        ("resid_post-16", "resid_post", "resid_post", 16, sae, True),
        ("attn_z-8", "attn_z", "attn_z", 8, sae, True),
        ("transcoder-8", "mlp_in", "mlp_out", 8, transcoder, True),
        ("mlp_out-8", "mlp_out", "mlp_out", 8, sae, False),  # what the transcoder is compared with
    ]
}


def harvested(lm: sl.LM, text: sl.Text, tokens: int) -> sl.Store:
    sites = list(dict.fromkeys(site for recipe in RECIPES.values() for site in (recipe.reads, recipe.writes)))
    return sl.harvest(lm, sites, text, tokens, path=WORK / "store")


def trained(name: str, lm: sl.LM, store: sl.Store, tokens: int) -> sl.SparseCoder:
    recipe = RECIPES[name]
    coder = recipe.make(lm.width(recipe.reads), lm.width(recipe.writes))
    coder.reads, coder.writes = (recipe.reads,), (recipe.writes,)
    config = sl.TrainConfig(tokens=tokens, log_every=10)
    sl.train(coder, store, config, path=WORK / name)
    return coder


def held_out(text: sl.Text) -> dict[str, list[str]]:
    """The held-out documents of each domain."""
    unseen = set(text.held_out)
    sources = mix_sources()
    return {domain: [d for d in sources[source] if d in unseen] for domain, source in DOMAINS.items()}


def figures(coder: sl.SparseCoder, lm: sl.LM, domains: dict[str, list[str]]) -> dict[str, dict]:
    """What sl.evals.reconstruction measures on each domain."""
    rows = {}
    for domain, text in domains.items():
        result = sl.evals.reconstruction(coder, lm, text, tokens=EVALUATED)
        found = {name: round(getattr(result, name), 4) for name in FIGURES}
        rows[domain] = {name: None if math.isnan(value) else value for name, value in found.items()}
    return rows


def card(coder: sl.SparseCoder, lm: sl.LM, store: sl.Store, domains: dict[str, list[str]]) -> dict:
    """What a user should know of a coder before trusting it: every figure measured."""
    return {
        "family": type(coder).__name__,
        "seeds": [coder.config["seed"]],
        "tokens": coder.meta["train_tokens"],
        "distinct_tokens": store.training_rows,
        "dead": coder.meta["dead"],
        "dead_tokens": coder.meta["dead_tokens"],
        "held_out": figures(coder, lm, domains),
    }


def pack_again(names: list[str], lm: sl.LM, domains: dict[str, list[str]]) -> None:
    """Write the coders of the package in 8 bits, measure them again, and print what the packing costs."""
    batch = padded(spread_contexts(lm, [d for texts in domains.values() for d in texts], EVALUATED, 128))
    for name in names:
        folder = PACKAGE / COLLECTION / name
        whole = sl.load(folder).eval()
        whole.save(folder, bits=8)
        coder = sl.load(folder).eval()
        read = lm.read(batch, (*coder.reads, *coder.writes))
        x, y = (read[sites[0]][:, 1:].flatten(0, 1) for sites in (coder.reads, coder.writes))
        for what, one in (("float16", whole), ("8 bits", coder)):
            codes = one.encode(x)
            l0 = (codes != 0).sum(1).float().mean()
            fvu = (y - one.decode(codes)).square().sum() / (y - y.mean(0)).square().sum()
            print(name, what, f"L0 {float(l0):.3f}, FVU {float(fvu):.5f}", flush=True)
        coder.meta["card"]["held_out"] = figures(coder, lm, domains)
        coder.save(folder, bits=8)
        assert torch.equal(coder.W_enc, sl.load(folder).W_enc), "packing a second time changes nothing"


def table() -> str:
    """The cards, a row for each coder and domain, as docs/coders.md has them."""
    lines = ["| `sl.load` | reads | text | L0 | FVU | ΔCE | CE recovered | dead |", "|---|---|---|---|---|---|---|---|"]
    for name in shipped():
        coder = sl.load(name)
        made = coder.meta["card"]
        first = [f"`{name}`", f"{coder.reads[0].key}" + (f" → {coder.writes[0].key}" if coder.transcodes else "")]
        for domain, row in made["held_out"].items():
            figures = [f"{row['l0']:.1f}", f"{row['fvu']:.3f} ({row['pca_fvu']:.3f})"]
            figures += [f"{row['ce_delta']:.3f} ± {row['ce_delta_se']:.3f} ({row['pca_ce_delta']:.2f})"]
            cost, error = row["ce_delta_mean_ablation"], row.get("ce_delta_mean_ablation_se") or math.nan
            figures += [f"– of {cost:.2f}" if too_little(cost, error) else f"{row['ce_recovered']:.3f} of {cost:.2f}"]
            figures += [f"{made['dead']:.2%}" if first[0] else ""]
            lines.append(f"| {' | '.join([*first, domain, *figures])} |")
            first = ["", ""]
    said = (
        f"BatchTopK (the transcoder's codes too), {WIDTH} features, k = {K}, seed 0, {made['tokens']:,} tokens of "
        f"training on {made['distinct_tokens']:,} different ones of the mix; dead: fire on none of "
        f"{made['dead_tokens']:,} training tokens. CE recovered: of what mean ablation costs, in nats; – where that is "
        f"less than {AT_STAKE}, or than {SURE} of its standard errors: too little for a share of it to mean something."
    )
    return "\n".join([*lines, "", said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2_050_000, help="to harvest")
    parser.add_argument("--train", type=int, default=6_000_000, help="tokens of training, in passes over the store")
    parser.add_argument("--only", choices=RECIPES, action="append")
    parser.add_argument("--docs", action="store_true", help="only put the cards into docs/coders.md")
    parser.add_argument("--pack", action="store_true", help="only pack and measure the coders of the package again")
    args = parser.parse_args()
    if args.docs:
        put("docs/coders.md", "shipped", table())
        return
    lm, text = sl.LM(), sl.load_text("mix")
    domains = held_out(text)
    if args.pack:
        return pack_again([name for name in args.only or RECIPES if RECIPES[name].shipped], lm, domains)
    store = harvested(lm, text, args.tokens)
    for name in args.only or RECIPES:
        recipe = RECIPES[name]
        coder = trained(name, lm, store, args.train)
        folder = PACKAGE / COLLECTION / name if recipe.shipped else WORK / f"{name}-packed"
        coder.save(folder, bits=8)
        coder = sl.load(folder)
        coder.meta["card"] = card(coder, lm, store, domains)
        coder.save(folder, bits=8)
        print(name, json.dumps(coder.meta["card"], indent=1), flush=True)


if __name__ == "__main__":
    main()
