"""What notebooks/papers/unlearning.ipynb loads: small diffusion models that draw a digit that is asked for, and coders.

    python benchmarks/papers/unlearning.py             # all seeds, some minutes on one core
    python benchmarks/papers/unlearning.py --seeds 100 --folder build/trial

Of each seed: a denoiser of 8 x 8 digits, and two TopK coders of what its second layer gives at all steps of sampling:
one trained on reconstruction alone, one with a contrastive loss on classes (SupCon) as well.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import sae_lab as sl
from sae_lab.types import MODULE

FOLDER = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "data" / "unlearning"
SEEDS = (1, 2, 3)
WIDTH, TIMES, SITE = 96, 32, "layers.1"
NOISES, STEPS = 200, 20  # levels of noise; steps of sampling
TRAINED, BATCH, LR = 12000, 128, 2e-3
D_SAE, K = 192, 12
CODER_STEPS, ITEMS, CODER_LR = 800, 64, 2e-3  # steps; images in a batch, each with the rows of all steps of sampling
TEMPERATURE, WEIGHT = 0.07, 0.1  # of the contrastive loss
ASKED = 40  # images of each digit that coders are trained on, and as many to find features in
KEPT = torch.cos(torch.linspace(0, 1.5, NOISES + 1)) ** 2  # of an image's variance at each level of noise


class Denoiser(nn.Module):
    """``Denoiser(seed)(x, level, digit)``: the noise in images "batch 64". Only the first layer is told the digit."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + seed)
            self.time, self.digit = nn.Linear(TIMES, WIDTH), nn.Embedding(10, WIDTH)
            self.into = nn.Linear(64, WIDTH)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(3))
            self.out = nn.Linear(WIDTH, 64)

    def forward(self, x: Tensor, level: Tensor, digit: Tensor) -> Tensor:
        wave = (level[:, None] / NOISES) * 2.0 ** torch.arange(TIMES // 2)
        time = self.time(torch.cat([wave.sin(), wave.cos()], 1))
        x = F.silu(self.into(x) + time + self.digit(digit))
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)


def data(seed: int, part: str) -> tuple[Float[Tensor, "n 64"], Int[Tensor, " n"]]:
    """Images from -1 to 1, and their digits."""
    world = sl.worlds.digits(seed=seed)
    rows = getattr(world, part)
    return torch.from_numpy(2 * world.images[rows].reshape(-1, 64) - 1), torch.from_numpy(world.labels[rows])


def train_denoiser(seed: int) -> Denoiser:
    x, digit = data(seed, "train")
    model, draw = Denoiser(seed), torch.Generator().manual_seed(2000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=TRAINED)
    for _ in range(TRAINED):
        some = torch.randint(len(x), (BATCH,), generator=draw)
        level = torch.randint(1, NOISES + 1, (BATCH,), generator=draw)
        noise, kept = torch.randn(BATCH, 64, generator=draw), KEPT[level][:, None]
        loss = F.mse_loss(model(kept.sqrt() * x[some] + (1 - kept).sqrt() * noise, level, digit[some]), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False).eval()


Predict = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (images, levels, digits, step) -> the noise


def sample(predict: Predict, digit: Int[Tensor, " n"], seed: int) -> Float[Tensor, "n 64"]:
    """Draw images in STEPS steps (DDIM, Song et al. 2020, arXiv:2010.02502, without noise between steps)."""
    x = torch.randn(len(digit), 64, generator=torch.Generator().manual_seed(seed))
    levels = torch.linspace(NOISES, 0, STEPS + 1).round().long()
    for step, (now, then) in enumerate(pairwise(levels)):
        noise = predict(x, now.expand(len(digit)), digit, step)
        image = ((x - (1 - KEPT[now]).sqrt() * noise) / KEPT[now].sqrt()).clamp(-1, 1)
        x = KEPT[then].sqrt() * image + (1 - KEPT[then]).sqrt() * noise
    return x


def told(digits: Sequence[int] | range, each: int) -> Int[Tensor, " n"]:
    """The digits, each several times."""
    return torch.tensor(list(digits)).repeat_interleave(each)


def seen(net: sl.Net, digit: Int[Tensor, " n"], seed: int) -> Float[Tensor, "n steps d"]:
    """What SITE gives at each step of sampling."""
    rows: list[Tensor] = []

    def predict(x: Tensor, level: Tensor, asked: Tensor, step: int) -> Tensor:
        rows.append(net.read((x, level, asked), SITE).flatten(1))
        return net.output((x, level, asked), step=step)

    sample(predict, digit, seed)
    return torch.stack(rows, 1)


def contrast(pre: Float[Tensor, "n d"], digit: Int[Tensor, " n"]) -> Tensor:
    """SupCon (Khosla et al. 2020, arXiv:2004.11362) on each image's mean pre-activations: images of a digit are drawn
    together, others apart."""
    unit = F.normalize(pre, dim=1)
    alike = unit @ unit.T / TEMPERATURE
    own = torch.eye(len(pre), dtype=torch.bool)
    same = (digit[:, None] == digit[None]) & ~own
    log = alike - alike.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    many = same.sum(1)
    return -((log * same).sum(1) / many.clamp(min=1))[many > 0].mean()


def train_coder(x: Float[Tensor, "n steps d"], digit: Int[Tensor, " n"], seed: int, weight: float) -> sl.TopK:
    coder = placed(sl.TopK(WIDTH, D_SAE, k=K, seed=3000 + seed))
    size, draw = float(x.var()), torch.Generator().manual_seed(4000 + seed)
    with torch.no_grad():
        coder.b_dec.copy_(x.flatten(0, 1).mean(0))
    optimizer = torch.optim.Adam(coder.parameters(), lr=CODER_LR)
    for _ in range(CODER_STEPS):
        some = torch.randint(len(x), (ITEMS,), generator=draw)
        rows = x[some]
        pre = (rows - coder.b_dec) @ coder.W_enc + coder.b_enc
        top = pre.relu().topk(K, dim=-1)
        z = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        loss = F.mse_loss(z @ coder.W_dec + coder.b_dec, rows) / size
        if weight:
            loss = loss + weight * contrast(pre.mean(1), digit[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            coder.W_dec.div_(coder.W_dec.norm(dim=1, keepdim=True))
    return coder.requires_grad_(False).eval()


def placed(coder: sl.TopK) -> sl.TopK:
    """The coder, which knows its site and reads all places: edits of a ``sl.Net`` ask for both."""
    coder.reads = coder.writes = (sl.Site(MODULE + SITE),)
    coder.meta["mask"] = sl.TokenMask((), skip_first=False).to_dict()
    return coder


# ---- files


def make(seed: int, folder: Path) -> None:
    started = time.perf_counter()
    model = train_denoiser(seed)
    digit = told(range(10), ASKED)
    x = seen(sl.Net(model), digit, 5000 + seed)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name, weight in (("plain", 0.0), ("contrastive", WEIGHT)):
        coder = train_coder(x, digit, seed, weight)
        error = (coder(x.flatten(0, 1)).x_hat - x.flatten(0, 1)).square().mean() / x.var()
        print(f"seed {seed}, {name}: FVU {float(error):.3f}", flush=True)
        tensors |= {f"{name}.{key}": t for key, t in coder.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().half().contiguous() for name, t in tensors.items()}, folder / f"{seed}.safetensors")
    print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)


def load(seed: int, folder: Path = FOLDER) -> tuple[sl.Net, dict[str, sl.TopK]]:
    """The denoiser, and the coders by name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, t in load_file(folder / f"{seed}.safetensors").items():
        owner, key = name.split(".", 1)
        parts.setdefault(owner, {})[key] = t.float()
    model = Denoiser(seed)
    model.load_state_dict(parts.pop("model"))
    coders = {name: placed(sl.TopK(WIDTH, D_SAE, k=K)) for name in parts}
    for name, state in parts.items():
        coders[name].load_state_dict(state)
        coders[name].requires_grad_(False).eval()
    return sl.Net(model.requires_grad_(False).eval()), coders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        make(seed, args.folder)


if __name__ == "__main__":
    main()
