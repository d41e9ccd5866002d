"""What notebooks/papers/adversaries.ipynb loads: a model learns to hide one feature from a coder.

    python benchmarks/papers/adversaries.py                    # all seeds, two minutes on one core
    python benchmarks/papers/adversaries.py --seeds 100 --out build/trial.json

The world has 40 planted features, each active or not. The model squeezes them into 20 numbers, adds noise, and must
tell all of them again. A coder is trained on the 20 numbers. The model is then trained on, once as before and once with
a term that leaves the coder's codes the same whether one feature is active or not. A fresh coder is trained on either.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sae_lab as sl

OUT = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "data" / "adversaries" / "hidden.json"
SEEDS, WEIGHT, SEEN = (0, 1, 2, 3, 4), 0.1, 0.8  # models and coders; of the hiding term; least recall of what is hidden
FEATURES, WIDTH, HIDDEN, OFTEN, NOISE = 40, 20, 96, 0.08, 0.1
STEPS, MORE, BATCH, RATE = 1500, 1500, 512, 3e-3
LATENTS, K = 80, 5
FALSE = 0.01  # false positives at which recall is measured
WORLDS = 520_000  # seeds of worlds begin here, seeds of models at 0


def draw(count: int, random: torch.Generator) -> Tensor:
    return (torch.rand(count, FEATURES, generator=random) < OFTEN).float()


class Squeeze(nn.Module):
    """Features to WIDTH numbers and back."""

    def __init__(self) -> None:
        super().__init__()
        self.write = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
        self.read = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, FEATURES))

    def state(self, active: Tensor) -> Tensor:
        """The numbers, at norm √WIDTH: a feature cannot hide by being faint beside the noise everywhere."""
        x = self.write(active)
        return F.normalize(x, dim=-1) * WIDTH**0.5


def codes(coder: sl.TopK, x: Tensor) -> Tensor:
    pre = (x @ coder.W_enc + coder.read_bias()).relu()
    top = pre.topk(K, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


def with_and_without(active: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """The same samples with the feature active, and without it."""
    on, off = active.clone(), active.clone()
    on[:, hidden], off[:, hidden] = 1, 0
    return on, off


def learn(model: Squeeze, steps: int, seed: int, coder: sl.TopK | None = None, hidden: int = 0, weight: float = 0.0):
    """Train in place to tell the features. With a ``coder``, add weight x the squared change of its codes when feature
    ``hidden`` is switched on, per mean squared code."""
    random = torch.Generator().manual_seed(WORLDS + seed)
    adam = torch.optim.Adam(model.parameters(), RATE)
    for _ in range(steps):
        active = draw(BATCH, random)
        x = model.state(active)
        noise = NOISE * torch.randn(x.shape, generator=random)
        loss = F.binary_cross_entropy_with_logits(model.read(x + noise), active)
        if coder is not None and weight:
            on, off = (codes(coder, model.state(one)) for one in with_and_without(active[:128], hidden))
            loss = loss + weight * (on - off).square().sum(-1).mean() / off.square().sum(-1).mean().detach()
        adam.zero_grad()
        loss.backward()
        adam.step()


def fit(model: Squeeze, seed: int) -> sl.TopK:
    random = torch.Generator().manual_seed(WORLDS + 1000 + seed)
    coder = sl.TopK(WIDTH, LATENTS, k=K, seed=900 + seed)
    with torch.no_grad():
        x = model.state(draw(65_536, random))
    sl.train(coder, x, sl.TrainConfig(tokens=600_000, batch_size=1024, lr=3e-3, seed=seed))
    return coder.requires_grad_(False)


@torch.no_grad()
def recall(model: Squeeze, coder: sl.TopK, feature: int, seed: int) -> float:
    """Of held-out samples with the feature, the share in which its latent says so. Latent and threshold (at most FALSE
    of the samples without it are above) are chosen on one half of the samples and measured on the other."""
    active = draw(16_384, torch.Generator().manual_seed(WORLDS + 2000 + seed))
    has, z = active[:, feature] > 0, codes(coder, model.state(active))
    choose = torch.arange(len(active)) % 2 == 0
    limit = z[choose & ~has].quantile(1 - FALSE, dim=0).clamp(min=1e-6)
    best = int((z[choose & has] > limit).float().mean(0).argmax())
    return float((z[~choose & has][:, best] > limit[best]).float().mean())


@torch.no_grad()
def told(model: Squeeze, feature: int, seed: int) -> float:
    """How well the model itself still tells the feature: the mean of hits and correct rejections, with its noise."""
    random = torch.Generator().manual_seed(WORLDS + 3000 + seed)
    active = draw(16_384, random)
    x = model.state(active)
    said = model.read(x + NOISE * torch.randn(x.shape, generator=random))[:, feature] > 0
    has = active[:, feature] > 0
    return float(said[has].float().mean() + (~said[~has]).float().mean()) / 2


def measured(seed: int) -> list[dict]:
    """One seed: what each coder sees of the feature after training with the term, and without it."""
    torch.manual_seed(seed)
    model = Squeeze()
    learn(model, STEPS, seed)
    given, sibling = fit(model, seed), fit(model, 500 + seed)
    hide = next(f for f in range(FEATURES) if recall(model, given, f, 600 + seed) >= SEEN)
    others, rows = [f for f in range(FEATURES) if f != hide], []
    for name, weight in (("control", 0.0), ("hiding", WEIGHT)):
        own = copy.deepcopy(model)
        learn(own, MORE, 50 + seed, given, hide, weight)
        coders = {"given": given, "another of before": sibling, "fresh": fit(own, 700 + seed)}
        row = {coder: recall(own, of, hide, seed) for coder, of in coders.items()}
        row["others, given"] = sum(recall(own, given, f, seed) for f in others) / len(others)
        rows.append({"model": name, "seed": seed, **row, "the model itself": told(own, hide, seed)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for seed in args.seeds:
        rows += measured(seed)
        args.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
