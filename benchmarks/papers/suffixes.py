"""What notebooks/papers/adversaries.ipynb loads: a suffix is sought that makes the bundled model say a harmless word,
while the stream behind block 8 passes through a bottleneck.

    python benchmarks/papers/suffixes.py                       # all seeds, about half an hour on one core
    python benchmarks/papers/suffixes.py --seeds 100 --out build/trial.json

A bottleneck is a coder that keeps the k largest latents of a token, a projection on principal components, or added
noise; the last two are set so that they cost as much cross-entropy as the coder with K_MATCHED latents. The search is
a greedy one by gradients (GCG, Zou et al. 2023, arXiv:2307.15043), and the gradient goes through the bottleneck.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

import sae_lab as sl

OUT = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "data" / "adversaries" / "suffixes.json"
SEEDS = (1, 2, 3)
LAYER, KS, K_MATCHED = 8, (2, 4, 8, 16, 32), 8
WORDS = (" piano", " window", " garden", " yellow", " river", " train", " music", " paper", " winter", " coffee")
PAIRS, PROMPT, SUFFIX = 3, 12, 6  # (document, word) of a seed; tokens
STEPS, TRIED, BEST = 15, 24, 64  # of the search: steps; suffixes tried in each; tokens of a place that they come from
CALIBRATED = 768  # tokens on which costs are matched
Bottleneck = Callable[[Float[Tensor, "batch places d"]], Float[Tensor, "batch places d"]]


def sparse(coder: sl.SparseCoder, k: int) -> Bottleneck:
    """Keep a token's k largest latents. The first place, where the model parks its attention, stays as it is."""

    def through(x: Tensor) -> Tensor:
        pre = ((x - coder.b_dec) @ coder.W_enc + coder.b_enc).relu()
        top = pre.topk(k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values) @ coder.W_dec + coder.b_dec

    return after_first(through)


def projected(mean: Tensor, components: Float[Tensor, "r d"]) -> Bottleneck:
    return after_first(lambda x: (x - mean) @ components.T @ components + mean)


def noisy(size: float, seed: int) -> Bottleneck:
    """Noise of this size in each number, anew for each pass, which nobody who searches can know."""
    generator = torch.Generator().manual_seed(seed)
    return after_first(lambda x: x + size * torch.randn(x.shape, generator=generator))


def after_first(change: Bottleneck) -> Bottleneck:
    return lambda x: torch.cat([x[:, :1], change(x[:, 1:])], 1)


@contextmanager
def passing(module: torch.nn.Module, bottleneck: Bottleneck | None):
    """Within it, the stream behind block LAYER passes through the bottleneck."""
    if bottleneck is None:
        yield
        return
    block = module.model.layers[LAYER]
    handle = block.register_forward_hook(lambda _, __, out: bottleneck(out))
    try:
        yield
    finally:
        handle.remove()


# ---- equal cost


@torch.no_grad()
def cost(module: torch.nn.Module, ids: Int[Tensor, "n places"], bottleneck: Bottleneck | None) -> float:
    """Cross-entropy of the next token, in nats."""
    with passing(module, bottleneck):
        logits = module(ids).logits
    return float(F.cross_entropy(logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten()))


def matched(price: Callable[[float], float], wanted: float, low: float, high: float, rounds: int = 9) -> float:
    """The setting between low and high at which a price that rises from low to high is the wanted one."""
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if price(middle) < wanted else (low, middle)
    return (low + high) / 2


def bottlenecks(lm: sl.LM, seed: int, texts: list[str]) -> tuple[dict[str, Bottleneck | None], dict[str, float]]:
    """By name, and the cross-entropy under each."""
    module, coder = lm._module, sl.load(f"smollm2-135m/resid_post-{LAYER}").eval()
    ids = contexts(lm, texts, CALIBRATED // 64, 64, seed)
    site = sl.Site("resid_post", LAYER)
    x = lm.read(ids.tolist(), site)[site][:, 1:].flatten(0, 1)
    mean, rows = x.mean(0), torch.linalg.svd(x - x.mean(0), full_matrices=False)[2]
    found: dict[str, Bottleneck | None] = {"none": None} | {f"k = {k}": sparse(coder, k) for k in KS}
    costs = {name: cost(module, ids, one) for name, one in found.items()}
    wanted = costs[f"k = {K_MATCHED}"]
    fewer = matched(lambda less: cost(module, ids, projected(mean, rows[: round(-less)])), wanted, -len(rows), -1)
    size = matched(lambda size: cost(module, ids, noisy(size, seed)), wanted, 0.0, 3 * float(x.std()))
    found |= {"principal components": projected(mean, rows[: round(-fewer)]), "noise": noisy(size, 1000 + seed)}
    for name in ("principal components", "noise"):
        costs[name] = cost(module, ids, found[name])
    return found, costs | {"components": round(-fewer), "noise size": size}


def contexts(lm: sl.LM, texts: list[str], count: int, length: int, seed: int) -> Int[Tensor, "count length"]:
    """The prefix token and the beginning of a document each."""
    rows, draw = [], torch.Generator().manual_seed(seed)
    for at in torch.randperm(len(texts), generator=draw).tolist():
        ids = lm.tokenizer(texts[at][:2000], add_special_tokens=False).input_ids
        if len(ids) >= length - 1 and len(rows) < count:
            rows.append([lm.prefix_id, *ids[: length - 1]])
    return torch.tensor(rows)


# ---- the search


def searched(
    module: torch.nn.Module, prompt: Int[Tensor, " p"], word: int, bottleneck: Bottleneck | None, seed: int,
    allowed: Int[Tensor, " v"],
) -> dict[str, float]:  # fmt: skip
    """The log probability of the word behind prompt and suffix, at first and after the search, and whether it came to
    be the likeliest."""
    draw = torch.Generator().manual_seed(seed)
    embedding = module.get_input_embeddings().weight
    suffix = allowed[torch.randint(len(allowed), (SUFFIX,), generator=draw)]
    with passing(module, bottleneck):
        start = best = float(said(module, prompt, suffix[None])[0, word])
        for _ in range(STEPS):
            one_hot = F.one_hot(suffix, len(embedding)).float().requires_grad_()
            rows = torch.cat([embedding[prompt], one_hot @ embedding])
            loss = -module(inputs_embeds=rows[None]).logits[0, -1].log_softmax(-1)[word]
            (gradient,) = torch.autograd.grad(loss, one_hot)
            better = allowed[(-gradient[:, allowed]).topk(BEST).indices]
            tried = suffix.repeat(TRIED, 1)
            place = torch.randint(SUFFIX, (TRIED,), generator=draw)
            tried[range(TRIED), place] = better[place, torch.randint(BEST, (TRIED,), generator=draw)]
            scores = said(module, prompt, tried)[:, word]
            if float(scores.max()) > best:
                best, suffix = float(scores.max()), tried[int(scores.argmax())]
        end = said(module, prompt, suffix[None])[0]
    return {"start": start, "end": float(end[word]), "said": int(end.argmax()) == word}


@torch.no_grad()
def said(module: torch.nn.Module, prompt: Int[Tensor, " p"], suffixes: Int[Tensor, "n s"]) -> Float[Tensor, "n vocab"]:
    """Log probabilities of what comes next."""
    ids = torch.cat([prompt.expand(len(suffixes), -1), suffixes], 1)
    return module(ids, logits_to_keep=1).logits[:, -1].log_softmax(-1)


def measured(lm: sl.LM, seed: int, texts: list[str]) -> dict:
    """All searches of a seed."""
    started, half = time.perf_counter(), len(texts) // 2
    module = lm._module.requires_grad_(False).eval()
    ways, costs = bottlenecks(lm, seed, texts[:half])
    prompts = contexts(lm, texts[half:], PAIRS, PROMPT + 1, 100 + seed)
    order = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(200 + seed))
    words = [WORDS[i] for i in order[:PAIRS].tolist()]
    special = set(lm.tokenizer.all_special_ids)
    allowed = torch.tensor([i for i in range(len(lm.tokenizer)) if i not in special])
    runs = []
    for name, way in ways.items():
        for pair, (prompt, word) in enumerate(zip(prompts, words, strict=True)):
            (token,) = lm.tokenizer(word, add_special_tokens=False).input_ids
            found = searched(module, prompt, token, way, 1000 * seed + pair, allowed[allowed != token])
            runs.append({"bottleneck": name, "word": word, **found})
        print(f"{seed}: {name} ({time.perf_counter() - started:.0f} s)", flush=True)
    return {"seed": seed, "costs": costs, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lm, texts = sl.LM(), list(sl.load_text("mix").held_out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done: list[dict] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    for seed in args.seeds:
        if seed not in [one["seed"] for one in done]:
            done.append(measured(lm, seed, texts))
            args.out.write_text(json.dumps(done, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
