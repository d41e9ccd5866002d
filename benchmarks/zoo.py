"""make zoo: every family on a planted world, one row each, into benchmarks/results/zoo.json; --docs: also into
docs/zoo.md.

The world has 128 features in 64 dimensions, 4 active on average. Families that need more than activations get it made
of the same features: a transcoder's target and a crosscoder's second layer are written with dictionaries of their own,
a Tokenized coder's tokens bring vectors of their own, matrices have atoms of rank one, and a code book has one word a
token. Settings were chosen by hand to come near 4 active features; one seed. Takes about four minutes.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from pages import put
from torch.nn.functional import normalize

import sae_lab as sl
from sae_lab.saes import losses

RESULTS = Path(__file__).parent / "results" / "zoo.json"
CONFIG = sl.TrainConfig(steps=600, batch_size=512, lr=1.5e-2, dead_after=5000)
SEEDS = (1,)
N, D = 128, 64
COLUMNS = ("l0", "fvu", "mmcs")
PLAIN = {
    "L1": ("relu", {"sparsity": 1.5}), "Tied": ("relu, W_enc = W_decᵀ", {"sparsity": 1.5}),
    "SqrtL1": ("relu, penalty Σ√f", {"sparsity": 1.0}),
    "PAnneal": ("relu, penalty Σf^p, p from 1 to .2", {"sparsity": 1.0}),
    "Hoyer": ("relu, penalty (Σf)²/Σf²", {"sparsity": 2.0}), "SmoothL0": ("relu, smooth count", {"sparsity": 1.0}),
    "ProLU": ("bias only switches", {"sparsity": 1.5}), "Gated": ("gate and magnitude apart", {"sparsity": 2.0}),
    "JumpReLU": ("a threshold per feature", {"sparsity": 1.0}), "TopK": ("k largest", {"k": 4}),
    "LeakyTopK": ("k largest, others leak at first", {"k": 4}), "BatchTopK": ("k largest on average", {"k": 4}),
    "Matryoshka": ("nested prefixes", {"k": 4}), "Ordered": ("all prefixes", {"k": 4}),
    "Spline": ("k largest of a spline", {"k": 4}), "Switch": ("one of 4 experts", {"k": 4, "experts": 4}),
}  # fmt: skip
PAPERS = {
    "L1": "Bricken 2023", "Tied": "2309.08600", "SqrtL1": "Riggs 2024", "PAnneal": "2408.00113",
    "Hoyer": "Quaisley 2024",
    "SmoothL0": "0809.2508", "ProLU": "Taggart 2024", "Gated": "2404.16014", "JumpReLU": "2407.14435",
    "TopK": "2406.04093", "LeakyTopK": "Quaisley 2024", "BatchTopK": "2412.06410", "Matryoshka": "2503.17547",
    "Ordered": "2512.02194", "Spline": "2404.19756", "Switch": "2410.08201", "Tokenized": "Dooms 2024",
    "Transcoder": "2406.11944", "SkipTranscoder": "2501.18823", "Crosscoder": "Lindsey 2024", "MatrixSAE": "WriteSAE",
    "VQ": "1711.00937",
}  # fmt: skip


def special(world: sl.worlds.World) -> dict[str, tuple[str, dict, sl.Batch, torch.Tensor]]:
    """name -> (rule, arguments, data, true dictionary) of the families that need more than activations."""
    generator = torch.Generator().manual_seed(77)

    def directions(rows: int, width: int) -> torch.Tensor:
        return normalize(torch.randn(rows, width, generator=generator), dim=1)

    codes, x = world.codes, world.x
    second = directions(N, D)
    y = sl.saes.kernels.decode(codes, second)
    through = torch.randn(D, D, generator=generator) / D**0.5
    words = 2 * directions(50, D)
    tokens = torch.randint(50, (len(x),), generator=generator)
    atoms = (directions(N, 8)[:, :, None] * directions(N, 8)[:, None, :]).flatten(1)
    matrices = sl.saes.kernels.decode(codes, atoms)
    book = directions(N, D)
    spoken = book[torch.randint(N, (len(x),), generator=generator)] + 0.05 * torch.randn(len(x), D, generator=generator)
    said, layers = x + words[tokens], torch.stack([x, y], 1)
    return {
        "Tokenized": ("+ a vector per token", {"k": 4, "vocab": 50}, sl.Batch(said, said, tokens), world.dictionary),
        "Transcoder": ("x to another activation", {"k": 4}, sl.Batch(x, y), second),
        "SkipTranscoder": ("the same, + x·W_skip", {"k": 4}, sl.Batch(x, y + x @ through), second),
        "Crosscoder": ("several layers or models", {"k": 4, "layers": 2}, sl.Batch(layers, layers),
                       torch.cat([world.dictionary, second], 1)),
        "MatrixSAE": ("atoms of rank one", {"k": 4, "rows": 8}, sl.Batch(matrices, matrices), atoms),
        "VQ": ("the nearest code word", {}, sl.Batch(spoken, spoken), book),
    }  # fmt: skip


def row(name: str, rule: str, l0: float, fvu: float, mmcs: float) -> str:
    paper = PAPERS[name]
    link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:4].isdigit() and "." in paper else paper
    return f"| `{name}` | {rule} | {link} | {l0:.1f} | {fvu:.3f} | {mmcs:.2f} |"


def measure() -> dict[str, dict[str, float]]:
    """L0, FVU and MMCS of every family, medians over seeds; last, the MMCS of random directions."""
    world = sl.worlds.planted(n=N, d=D, l0=4, samples=200_000)
    sweep = sl.sweep({name: arguments for name, (_, arguments) in PLAIN.items()}, world, CONFIG, d_sae=N, seeds=SEEDS)
    found = {}
    for name in PLAIN:
        rows = [r for r in sweep.rows if r["family"] == name]
        found[name] = {column: statistics.median(r[column] for r in rows) for column in COLUMNS}
    for name, (_, arguments, data, truth) in special(world).items():
        results = []
        for seed in SEEDS:
            coder = sl.saes.FAMILIES[name](data.x.shape[-1], N, seed=seed, **arguments)
            sl.train(coder, data, CONFIG)
            last = slice(len(world.x) - 16_384, None)
            with torch.no_grad():
                out = coder(data.x[last], None if data.tokens is None else data.tokens[last])
                fvu = float(losses.fvu(out.x_hat, data.target[last]))
            mmcs = sl.match(coder.W_dec.detach(), normalize(truth, dim=1)).b_to_a
            results.append((float((out.f > 0).sum(-1).float().mean()), fvu, mmcs))
        found[name] = {column: statistics.median(r[i] for r in results) for i, column in enumerate(COLUMNS)}
    found["random directions"] = {"mmcs": sl.match(sl.TopK(D, N, k=4), world).b_to_a}
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    rules = {name: rule for name, (rule, _) in PLAIN.items()}
    rules |= {name: rule for name, (rule, *_) in special(sl.worlds.planted(n=N, d=D, l0=4, samples=64)).items()}
    lines = ["| Family | Rule | Source | L0 | FVU | MMCS |", "|---|---|---|---|---|---|"]
    lines += [row(name, rule, **found[name]) for name, rule in rules.items()]
    return "\n".join([*lines, f"| random directions | | | | | {found['random directions']['mmcs']:.2f} |"])


def main() -> None:
    found = measure()
    text = table(found)
    print(text)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if "--docs" in sys.argv:
        put("docs/zoo.md", "zoo", text)


if __name__ == "__main__":
    main()
