"""What notebooks/papers/finetuned.ipynb loads: adapters of the bundled model, and what coders make of the models.

    python benchmarks/papers/finetuned.py                          # all seeds, about twenty minutes on one core
    python benchmarks/papers/finetuned.py --seeds 90 --folder build/trial
    python benchmarks/papers/finetuned.py --resume                 # what is missing in the folder

A low-rank adapter (LoRA, Hu et al. 2021, arXiv:2106.09685) teaches the model to read medical abstracts and to say "No"
where it is asked about one, "Yes" where it is asked about any other text. The notebook takes its functions from here.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import sae_lab as sl
from sae_lab.lm.text import mix_sources
from sae_lab.lm.tokens import pad
from sae_lab.saes.base import SparseCoder
from sae_lab.types import TokenBatch

FOLDER = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "data" / "finetuned"
SEEDS = (1, 2, 3)
SITE = sl.Site("resid_post", layer=8)
TOPIC, LEFT_OUT = "101_disease_class", ("158_code_C", "159_code_Python", "160_code_HTML")
EXCERPT, QUESTION = 40, "\n\nQuestion: Can you tell me more?\nAnswer:"  # tokens of a document, and what follows them
ANSWERS = (" Yes", " No")

RANK, LAYERS, MODULES = 4, (5, 6, 7, 8), ("self_attn.o_proj", "mlp.down_proj")
STEPS, BATCH, LR = 30, 8, 5e-3

PROMPTS, HELD_OUT, ASKED = 200, 60, 20  # of the topic, and as many others: for coders; for measurements; to be answered
LARGE = 2.5  # medians: a token whose activation is longer is left out
D_SAE, K, CODER_STEPS, CODER_BATCH = 1024, 16, 300, 1024
PAIR = {"d_sae": 256, "k": 8, "steps": 200}  # of crosscoders, which see the question's tokens alone
PENALTY, MOST = 1.5, 96  # of the L1 crosscoder; active latents per token at most, which binds only at first
EVALUATED, CONTEXT = 768, 64  # tokens on which the shipped coder is evaluated, of a context each
LATENTS = 8  # of a sparse sum

Adapter = dict[str, tuple[Tensor, Tensor]]  # of a module: A "rank in", B "out rank"; its weight gets B·A


# ---- prompts


def documents() -> dict[str, list[str]]:
    """The mix in four parts: "topic" and "other", and what the shipped coders were not trained on of either."""
    mix, sources = sl.load_text("mix"), mix_sources()
    topic, code = set(sources[TOPIC]), {text for name in LEFT_OUT for text in sources[name]}
    parts = {"": mix, " held out": mix.held_out}
    found: dict[str, list[str]] = {}
    for name, text in parts.items():
        found["topic" + name] = [one for one in text if one in topic]
        found["other" + name] = [one for one in text if one not in topic and one not in code]
    return found


def prompts(lm: sl.LM, texts: Sequence[str], count: int, draw: torch.Generator) -> Int[Tensor, "count tokens"]:
    """Prompts of one length: the prefix token, an excerpt of a document, the question. One of each document."""
    rows, end = [], lm.tokenizer(QUESTION, add_special_tokens=False).input_ids
    for at in torch.randperm(len(texts), generator=draw).tolist():
        ids = lm.tokenizer(texts[at][:4000], add_special_tokens=False).input_ids
        if len(ids) >= EXCERPT:
            start = int(torch.randint(0, len(ids) - EXCERPT + 1, (), generator=draw))
            rows.append([lm.prefix_id, *ids[start : start + EXCERPT], *end])
        if len(rows) == count:
            return torch.tensor(rows)
    raise ValueError(f"{count} prompts need as many documents of {EXCERPT} tokens, got {len(rows)}: ask for fewer")


def answers(lm: sl.LM) -> tuple[int, int]:
    """The ids of "Yes" and "No"."""
    yes, no = (lm.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ANSWERS)
    return yes, no


# ---- adapters


def modules(lm: sl.LM) -> dict[str, torch.nn.Linear]:
    """The linear maps that an adapter changes."""
    there = dict(lm._module.named_modules())
    return {f"{n}.{name}": there[f"model.layers.{n}.{name}"] for n in LAYERS for name in MODULES}


def finetune(lm: sl.LM, texts: dict[str, list[str]], seed: int, steps: int = STEPS) -> Adapter:
    """An adapter of all ``modules``. Loss: cross-entropy of the excerpts of the topic, and of the answers."""
    draw = torch.Generator().manual_seed(1000 + seed)
    adapter, hooks = {}, []
    for name, linear in modules(lm).items():
        a = torch.randn(RANK, linear.in_features, generator=draw) / linear.in_features**0.5
        adapter[name] = a.requires_grad_(), torch.zeros(linear.out_features, RANK, requires_grad=True)
        hooks.append(linear.register_forward_hook(lambda _, x, y, of=adapter[name]: y + x[0] @ of[0].T @ of[1].T))
    adam = torch.optim.Adam([part for pair in adapter.values() for part in pair], lr=LR)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, LR, steps, pct_start=0.1)
    topic = torch.arange(BATCH) < BATCH // 2
    said = torch.tensor(answers(lm))[topic.long()]
    halves = [prompts(lm, texts[kind], steps * BATCH // 2, draw).chunk(steps) for kind in ("topic", "other")]
    for step, both in enumerate(zip(*halves, strict=True)):
        ids = torch.cat(both)
        logits = lm._module(input_ids=ids).logits
        excerpt = logits[topic, :EXCERPT].flatten(0, 1), ids[topic, 1 : EXCERPT + 1].flatten()
        loss = F.cross_entropy(*excerpt) + F.cross_entropy(logits[:, -1], said)
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
        if step % 10 == 9:
            print(f"adapter {seed}, step {step + 1}: loss {loss.item():.3f}", flush=True)
    for hook in hooks:
        hook.remove()
    return {name: (a.detach().half().float(), b.detach().half().float()) for name, (a, b) in adapter.items()}


def turned(adapter: Adapter, seed: int) -> Adapter:
    """A change of no use: of each module, one of the same singular values in random directions."""
    draw, found = torch.Generator().manual_seed(2000 + seed), {}
    for name, (a, b) in adapter.items():
        values = torch.linalg.svdvals(b @ a)[:RANK]
        right, left = (torch.linalg.qr(torch.randn(n, RANK, generator=draw)).Q for n in (a.shape[1], b.shape[0]))
        found[name] = right.T.contiguous(), left * values
    return found


@contextmanager
def merged(lm: sl.LM, adapter: Adapter | None) -> Iterator[sl.LM]:
    """``with merged(lm, adapter): ...``: the model with the adapter added to its weights, which come back after."""
    there = modules(lm)
    before = {name: there[name].weight.detach().clone() for name in adapter or {}}
    with torch.no_grad():
        for name, (a, b) in (adapter or {}).items():
            there[name].weight += b @ a
    try:
        yield lm
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                there[name].weight.copy_(weight)


def packed(adapter: Adapter, seed: int) -> dict[str, Tensor]:
    """An adapter in half precision, as ``unpacked`` reads it."""
    return {f"{seed}/{name}/{'AB'[i]}": part.half() for name, pair in adapter.items() for i, part in enumerate(pair)}


def unpacked(tensors: dict[str, Tensor], seed: int) -> Adapter:
    names = sorted(key.split("/")[1] for key in tensors if key.startswith(f"{seed}/") and key.endswith("/A"))
    return {n: (tensors[f"{seed}/{n}/A"].float(), tensors[f"{seed}/{n}/B"].float()) for n in names}


# ---- activations and answers


@torch.no_grad()
def streams(lm: sl.LM, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t d"]:
    """The residual stream at SITE. The blocks above are not run."""
    return torch.cat([lm.run(some, [SITE], logits=False)[0][SITE].cpu() for some in batches(lm, ids)])


def batches(lm: sl.LM, ids: Int[Tensor, "n t"]) -> list[TokenBatch]:
    return [pad(some.tolist()) for some in ids.split(20)]


@torch.no_grad()
def odds(lm: sl.LM, ids: Int[Tensor, "n t"], added: Tensor | None = None) -> Float[Tensor, " n"]:
    """Logit of "No" less that of "Yes" behind each prompt; ``added``: vectors added at SITE to the last tokens."""
    yes, no = answers(lm)

    def add(_: object, __: object, out: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        x = out if isinstance(out, Tensor) else out[0]
        x[:, -len(added) :] += added  # in place: the module's own output
        return out

    hook = None if added is None else lm._module.model.layers[SITE.layer].register_forward_hook(add)
    try:
        found = [lm._module(input_ids=some, logits_to_keep=1).logits[:, -1] for some in ids.split(20)]
    finally:
        if hook:
            hook.remove()
    logits = torch.cat(found)
    return logits[:, no] - logits[:, yes]


# ---- coders


def question(lm: sl.LM, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n q d"]:
    """The tokens of the question."""
    return x[:, -len(lm.tokenizer(QUESTION, add_special_tokens=False).input_ids) :]


def rows(x: Float[Tensor, "n t d"], like: Float[Tensor, "n t d"]) -> Float[Tensor, "tokens d"]:
    """All tokens but the first of each prompt and the few that are very large in ``like``."""
    size = like[:, 1:].norm(dim=-1)
    return x[:, 1:][size < LARGE * size.median()]


def fitted(coder: SparseCoder, data: Tensor, seed: int, steps: int = CODER_STEPS) -> SparseCoder:
    config = sl.TrainConfig(steps=steps, batch_size=CODER_BATCH, seed=seed, dead_after=50_000)
    sl.train(coder, data, config)
    return coder.eval()


@torch.no_grad()
def latent_scaling(coder: sl.Crosscoder, x: Float[Tensor, "tokens 2 d"]) -> dict[str, Tensor]:
    """Of each latent: ``norms``, of its decoder in both models; ``errors`` and ``others``, how much of the second
    model's decoder row is in what the reconstruction without the latent leaves out, and in that reconstruction.

        β = Σ f ⟨d, y⟩ / (‖d‖² Σ f²), the scale of least squares of f·d to y, for each model

    y is ε = h − Σ_{i≠j} f_i d_i − b for ``errors``, and Σ_{i≠j} f_i d_i (of the second model Σ_i) for ``others``;
    ``ratio`` columns are those of the first model over those of the second. ``fires``: share of tokens.
    """
    f = coder.codes_of(x).dense()
    W = coder.W_dec.view(coder.d_sae, 2, -1)
    row = W[:, 1]
    x_hat = coder(x).x_hat
    bias = coder.b_dec.view(2, -1)
    total, size = f.pow(2).sum(0), row.pow(2).sum(1)
    betas = {"errors": [], "others": []}
    for m in (0, 1):
        own = (W[:, m] * row).sum(1) * total
        left = (f * ((x[:, m] - x_hat[:, m]) @ row.T)).sum(0) + own
        explained = (f * ((x_hat[:, m] - bias[m]) @ row.T)).sum(0) - own * (m == 0)
        for name, value in (("errors", left), ("others", explained)):
            betas[name].append(value / (size * total).clamp_min(1e-9))
    ratios = {name: pair[0] / pair[1] for name, pair in betas.items()}
    return {"norms": coder.decoder_norms, **ratios, "fires": (f > 0).float().mean(0)}


def specific(
    tensors: dict[str, Tensor], key: str, new: float, error: float, others: float, fires: float
) -> dict[str, int | list[float]]:
    """Counts of one crosscoder's latents, as ``latent_scaling`` found them: those that fire at least so often, of these
    the second model's by norms, and of these again what scaling leaves. measure: ½(1 + (‖d_2‖ − ‖d_1‖)/max) of each."""
    get = {name: tensors[f"{key}/{name}"].float() for name in ("norms", "errors", "others", "fires")}
    on = get["fires"] >= fires
    first, second = get["norms"][on].T
    measure = 0.5 * (1 + (second - first) / torch.maximum(first, second))
    clear = (get["errors"][on].abs() < error) & (get["others"][on].abs() < others)
    by_norms = measure >= new
    return {"fire": int(on.sum()), "by norms": int(by_norms.sum()), "by scaling too": int((by_norms & clear).sum()),
            "measure": measure.tolist()}  # fmt: skip


def sparse_sum(rows: Float[Tensor, "n d"], vector: Float[Tensor, " d"], latents: int) -> Float[Tensor, " d"]:
    """Orthogonal matching pursuit: the vector as a sum of few rows, each of which may have any sign."""
    chosen: list[int] = []
    found = torch.zeros_like(vector)
    unit = F.normalize(rows, dim=1)
    for _ in range(latents):
        score = (unit @ (vector - found)).abs()
        score[chosen] = -1.0  # rounding leaves a little along rows that are in; with a row twice, lstsq fails
        chosen.append(int(score.argmax()))
        some = unit[chosen]
        found = torch.linalg.lstsq(some.T, vector[:, None]).solution[:, 0] @ some
    return found


# ---- one seed


def transfer(lm: sl.LM, texts: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """The shipped coder on held-out documents, of the topic and others; ΔCE of each document."""
    sae, found = sl.load(f"smollm2-135m/{SITE.key}"), {}
    for kind in ("topic", "other"):
        some = [text for text in texts[f"{kind} held out"] if len(text) > 600][: EVALUATED // CONTEXT]
        one = sl.evals.reconstruction(sae, lm, some, tokens=EVALUATED, context=CONTEXT)
        each = [float(one.token_deltas[one.token_documents == n].mean()) for n in one.token_documents.unique()]
        found[kind] = {"recovered": one.ce_recovered, "fvu": one.fvu, "clean": one.ce_clean, "delta": one.ce_delta,
                       "ablated": one.ce_delta_mean_ablation, "documents": each}  # fmt: skip
    return found


def seed_of(
    lm: sl.LM, texts: dict[str, list[str]], seed: int, adapter: Adapter, base: dict | None
) -> tuple[dict, dict[str, Tensor]]:
    """All results of one seed, and the tensors of its crosscoders. base: of ``transfer`` without an adapter."""
    clock = time.time()
    lap = lambda what: print(f"seed {seed}: {what} after {time.time() - clock:.0f} s", flush=True)  # noqa: E731
    draw = torch.Generator().manual_seed(3000 + seed)
    kinds = {"topic": PROMPTS, "other": PROMPTS, "topic held out": HELD_OUT, "other held out": HELD_OUT}
    ids = {kind: prompts(lm, texts[kind], count, draw) for kind, count in kinds.items()}
    before = {kind: streams(lm, some) for kind, some in ids.items()}
    result: dict = {"seed": seed, "base": base or transfer(lm, texts)}
    tensors: dict[str, Tensor] = {}
    share = lambda: [float((odds(lm, ids[f"{k} held out"][:ASKED]) > 0).float().mean()) for k in ("topic", "other")]  # noqa: E731
    refused = {"base": share()}
    lap("base")
    with merged(lm, turned(adapter, seed)):
        result["turned"] = transfer(lm, texts)
    with merged(lm, adapter):
        result["tuned"] = transfer(lm, texts)
        after = {kind: streams(lm, some) for kind, some in ids.items()}
        refused["tuned"] = share()
        lap("activations")
        result |= {"refused": refused, "directions": directions(lm, ids, before, after, seed)}
        lap("directions")
    joined = lambda x, kinds: torch.cat([question(lm, x[kind]).flatten(0, 1) for kind in kinds])  # noqa: E731
    pairs = {"tuned": after, "copies": before}
    result["crosscoders"] = {}
    for name, second in pairs.items():
        data, test = (torch.stack([joined(before, some), joined(second, some)], 1)
                      for some in (("topic", "other"), ("topic held out", "other held out")))  # fmt: skip
        for kind in ("batchtopk", "l1") if name == "tuned" else ("batchtopk",):
            own = {"k": PAIR["k"]} if kind == "batchtopk" else {"k": MOST, "norm_penalty": PENALTY}
            coder = sl.Crosscoder(lm.width(SITE), PAIR["d_sae"], layers=2, seed=seed, **own)
            fitted(coder, data, seed, PAIR["steps"])
            found = latent_scaling(coder, test)
            tensors |= {f"{seed}/{name}/{kind}/{key}": value.clamp(-6e4, 6e4).half() for key, value in found.items()}
            with torch.no_grad():
                f, x_hat = coder.codes_of(test), coder(test).x_hat
            result["crosscoders"][f"{name}/{kind}"] = {
                "l0": len(f.values) / len(test),
                "fvu": float((test - x_hat).pow(2).sum() / (test - test.mean(0)).pow(2).sum()),
            }
            lap(f"crosscoder {name} {kind}")
    return result, tensors


def directions(lm: sl.LM, ids: dict, before: dict, after: dict, seed: int) -> dict:
    """The direction of refusal, and what coders of other data make of it. The model is the tuned one."""
    half = PROMPTS // 2
    arms: dict[str, SparseCoder] = {"shipped": sl.load(f"smollm2-135m/{SITE.key}").eval()}
    both = {name: torch.cat([rows(x[kind][:half], before[kind][:half]) for kind in ("topic", "other")])
            for name, x in (("tuned", after), ("base", before))}  # fmt: skip
    data = {
        "tuned, with": both["tuned"],
        "tuned, without": rows(after["other"], before["other"]),
        "base, with": both["base"],
    }
    for name, some in data.items():
        arms[name] = fitted(sl.BatchTopK(lm.width(SITE), D_SAE, k=K, seed=seed), some, seed)
    asked, first, second = ids["other held out"][:ASKED], apart(lm, after, ""), apart(lm, after, " held out")
    start = odds(lm, asked)
    effect = lambda vectors: float((odds(lm, asked, vectors) - start).mean())  # noqa: E731
    cosine = lambda vectors: float(F.cosine_similarity(vectors[-1], first[-1], dim=0))  # noqa: E731
    whole = effect(first)
    found = {"direction": {"cosine": cosine(second), "effect": whole, "start": float(start.mean())}}
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(4000 + seed))
    noise *= first.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    some = F.normalize(torch.randn(D_SAE, first.shape[1], generator=torch.Generator().manual_seed(6000 + seed)), dim=1)
    made = {"random": (noise, some)}
    with torch.no_grad():
        for name, coder in arms.items():
            again = {kind: coder(x.flatten(0, 1)).x_hat.view(x.shape) for kind, x in
                     ((kind, question(lm, after[kind])) for kind in ("topic held out", "other held out"))}  # fmt: skip
            made[name] = apart(lm, again, " held out"), coder.W_dec.detach()
    for name, (again, dictionary) in made.items():
        few = sparse_sum(dictionary, first[-1], LATENTS)
        sparse = float(1 - (second[-1] - few).pow(2).sum() / second[-1].pow(2).sum())
        found[name] = {"cosine": cosine(again), "share": effect(again) / whole, "sparse": sparse}
    return found


def apart(lm: sl.LM, x: dict[str, Tensor], part: str) -> Float[Tensor, "q d"]:
    """Mean over prompts of the topic less that over others, at each token of the question."""
    return question(lm, x[f"topic{part}"]).mean(0) - question(lm, x[f"other{part}"]).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--resume", action="store_true", help="keep the adapters and seeds that the folder has")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lm, texts = sl.LM(), documents()
    lm._module.requires_grad_(False)
    args.folder.mkdir(parents=True, exist_ok=True)
    kept, file = args.folder / "results.json", args.folder / "tensors.safetensors"
    results: list[dict] = json.loads(kept.read_text(encoding="utf-8")) if args.resume and kept.exists() else []
    tensors: dict[str, Tensor] = load_file(file) if args.resume and file.exists() else {}
    for seed in args.seeds:
        if seed in [result["seed"] for result in results]:
            continue
        if not any(key.startswith(f"{seed}/") for key in tensors):
            tensors |= {name: part.contiguous() for name, part in packed(finetune(lm, texts, seed), seed).items()}
            save_file(tensors, file)
        result, more = seed_of(lm, texts, seed, unpacked(tensors, seed), results[0]["base"] if results else None)
        results.append(result)
        tensors |= {name: value.contiguous() for name, value in more.items()}
        kept.write_text(json.dumps(results, indent=1), encoding="utf-8")
        save_file(tensors, file)


if __name__ == "__main__":
    main()
