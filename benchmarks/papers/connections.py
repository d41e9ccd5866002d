"""What notebooks/papers/connections.ipynb loads: how well a late feature is a sum of few early ones.

    python benchmarks/papers/connections.py                        # all seeds, about ten minutes on one core
    python benchmarks/papers/connections.py --seeds 90 --tokens 6000 --folder build/trial

Both coders read the same tokens of held-out documents. The code of a late feature is predicted from the early codes at
the same token: by all of them (ridge), by ten that a sparse regression chooses, by the ten whose decoder rows are
nearest, and by ten at random. Edges are chosen and fitted on training documents, R² is taken on others.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

import sae_lab as sl

FOLDER = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "data" / "connections"
SEEDS = (1, 2, 3)  # of splits of the documents, of target features and of random edges
EARLY, LATE = "resid_post-8", "resid_post-16"
TOKENS, CONTEXT = 48_000, 128
TEST, INNER = 1 / 3, 1 / 4  # of the documents; of the training documents, on which the ridge penalty is chosen
EDGES, SIZES = 10, (1, 2, 5, 10, 20, 50)
TARGETS, FIRES = 100, 0.01  # late features; least share of training tokens on which one fires
LEAST = 30  # training tokens on which an early feature fires, to be had as an edge
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # times the tokens, of standardised codes
DRAWS = 5  # of random edges


@torch.no_grad()
def codes(lm: sl.LM, tokens: int) -> tuple[Float[Tensor, "n early"], Float[Tensor, "n late"], Int[Tensor, " n"]]:
    """Codes of both coders at the tokens that both keep, and each token's document. One context of a document."""
    coders = [sl.load(f"smollm2-135m/{name}").eval() for name in (EARLY, LATE)]
    found, documents, number = ([], []), [], 0
    assert lm.prefix_id is not None
    for text in sl.load_text("mix").held_out:
        ids = lm.tokenizer(text[:4000], add_special_tokens=False).input_ids[: CONTEXT - 1]
        if len(ids) < CONTEXT - 1:
            continue
        reading = lm.read([[lm.prefix_id, *ids]], [coder.site for coder in coders])
        streams = [reading[coder.site][0, 1:] for coder in coders]
        limits = [coder.meta["mask"]["max_norm"][coder.site.key] for coder in coders]
        keep = torch.stack([x.norm(dim=1) <= most for x, most in zip(streams, limits, strict=True)]).all(0)
        for some, coder, x in zip(found, coders, streams, strict=True):
            some.append(coder.encode(x[keep]).half())
        documents.append(torch.full((int(keep.sum()),), number))
        number += 1
        if number * (CONTEXT - 1) >= tokens:
            break
    return torch.cat(found[0]), torch.cat(found[1]), torch.cat(documents)


class Moments(NamedTuple):
    """Sums over tokens of standardised codes: all that a linear fit needs."""

    xx: Float[Tensor, "early early"]
    xy: Float[Tensor, "early targets"]


def moments(x: Float[Tensor, "n early"], y: Float[Tensor, "n targets"]) -> Moments:
    return Moments(x.T @ x, x.T @ y)


def ridge(found: Moments, penalty: float) -> Float[Tensor, "early targets"]:
    """Weights of all early features. penalty: added to the diagonal."""
    scale = torch.eye(len(found.xx)) * penalty
    return torch.cholesky_solve(found.xy, torch.linalg.cholesky(found.xx + scale))


def least_squares(found: Moments, edges: list[int], target: int) -> Float[Tensor, " early"]:
    """Weights of the edges alone, the others 0."""
    weights = torch.zeros(len(found.xx))
    some = found.xx[edges][:, edges]
    slight = 1e-4 * some.diagonal().mean() * torch.eye(len(edges))  # two edges may be copies of each other
    weights[edges] = torch.linalg.solve(some + slight, found.xy[edges, target])
    return weights


def pursuit(found: Moments, target: int, most: int) -> list[int]:
    """Orthogonal matching pursuit: edges in the order in which each explains most of what those before it left."""
    edges: list[int] = []
    size = found.xx.diagonal().sqrt()
    left = found.xy[:, target]
    for _ in range(most):
        score = left.abs() / size
        score[edges] = -1
        edges.append(int(score.argmax()))
        left = found.xy[:, target] - found.xx[:, edges] @ least_squares(found, edges, target)[edges]
    return edges


def r2(x: Float[Tensor, "n early"], y: Float[Tensor, "n targets"], weights: Tensor) -> Float[Tensor, " targets"]:
    """Of each target, against the training mean, which is 0 in standardised codes."""
    return 1 - (y - x @ weights).pow(2).sum(0) / y.pow(2).sum(0)


def held_out(documents: Int[Tensor, " n"], share: float, draw: torch.Generator) -> Bool[Tensor, " n"]:
    """Tokens of a share of the documents, drawn at random."""
    numbers = documents.unique()
    some = numbers[torch.randperm(len(numbers), generator=draw)[: round(share * len(numbers))]]
    return torch.isin(documents, some)


def one_seed(early: Tensor, late: Tensor, documents: Tensor, rows: tuple[Tensor, Tensor], seed: int) -> dict:
    """All numbers of one split. rows: the decoder rows of both coders."""
    draw = torch.Generator().manual_seed(7000 + seed)
    test = held_out(documents, TEST, draw)
    inner = torch.zeros_like(test)
    inner[~test] = held_out(documents[~test], INNER, draw)
    sources = ((early[~test] > 0).sum(0) >= LEAST).nonzero().flatten()
    often = ((late[~test] > 0).float().mean(0) >= FIRES).nonzero().flatten()
    targets = often[torch.randperm(len(often), generator=draw)[:TARGETS]]
    x, y = early[:, sources].float(), late[:, targets].float()
    for z in (x, y):
        z -= z[~test].mean(0)
        z /= z[~test].std(0)
    fit, rest = (moments(x[part], y[part]) for part in (~test & ~inner, inner))
    n = int((~test & ~inner).sum())
    score = {p: float(r2(x[inner], y[inner], ridge(fit, p * n)).mean()) for p in PENALTIES}
    penalty = max(score, key=score.__getitem__)
    both = Moments(fit.xx + rest.xx, fit.xy + rest.xy)
    dense = r2(x[test], y[test], ridge(both, penalty * int((~test).sum())))
    chosen = [pursuit(both, t, max(SIZES)) for t in range(len(targets))]
    cosines = F.normalize(rows[1][targets], dim=1) @ F.normalize(rows[0][sources], dim=1).T
    near = cosines.topk(EDGES).indices.tolist()

    def of(edges: list[list[int]]) -> Tensor:
        weights = torch.stack([least_squares(both, some, t) for t, some in enumerate(edges)], 1)
        return r2(x[test], y[test], weights)

    random = [of([torch.randperm(len(sources), generator=draw)[:EDGES].tolist() for _ in chosen]) for _ in range(DRAWS)]
    sizes = {k: of([edges[:k] for edges in chosen]) for k in SIZES}
    rounded = lambda values: [round(float(v), 4) for v in values]  # noqa: E731
    return {
        "seed": seed, "tokens": [int((~test).sum()), int(test.sum())], "penalty": penalty, "inner": score,
        "sources": len(sources), "candidates": len(often), "targets": targets.tolist(), "dense": rounded(dense),
        "chosen": {str(k): rounded(values) for k, values in sizes.items()}, "near": rounded(of(near)),
        "random": rounded(torch.stack(random).mean(0)),
        "shared": [len({*edges[:EDGES]} & {*some}) for edges, some in zip(chosen, near, strict=True)],
        "edges": [sources[edges[:EDGES]].tolist() for edges in chosen],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    early, late, documents = codes(sl.LM(), args.tokens)
    print(f"{len(documents)} tokens of {int(documents.max()) + 1} documents", flush=True)
    before, after = (sl.load(f"smollm2-135m/{name}").W_dec.detach() for name in (EARLY, LATE))
    args.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in args.seeds:
        results.append(one_seed(early, late, documents, (before, after), seed))
        mean = lambda values: sum(values) / len(values)  # noqa: E731
        print(seed, {key: round(mean(results[-1][key]), 3) for key in ("dense", "near", "random")}, flush=True)
        (args.folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
