"""What notebooks/papers/vision_features.ipynb loads: small vision transformers that read digits, and coders of their
activations.

    python benchmarks/papers/vision.py                 # all seeds, some minutes on one core
    python benchmarks/papers/vision.py --seeds 100 --folder build/trial

An image of 8 x 8 is 16 patches of 2 x 2 behind a class token. Of each seed: a network, and TopK coders of
what block 1 of 3 gives: of class tokens, of patches, and of the patches of the network before its training.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import sae_lab as sl
from sae_lab.types import MODULE

FOLDER = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "data" / "vision"
SEEDS = (1, 2, 3)
WIDTH, BLOCKS, HEADS, PATCHES = 32, 3, 4, 16
STEPS, BATCH, LR = 600, 48, 3e-3
SITE = "blocks.1"
D_SAE, K, CODER_STEPS = 128, 8, 800
VIEWS = {"class": 16, "patch": 4}  # noisy copies of each image that a coder sees
PARTS = {"class": slice(0, 1), "patch": slice(1, None)}  # places of a coder


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Float[Tensor, "batch places d"]) -> Float[Tensor, "batch places d"]:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class ViT(nn.Module):
    """A vision transformer: ``ViT(seed)(images)`` gives "batch digits". The class token is place 0."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + seed)
            self.embed = nn.Linear(4, WIDTH)
            self.place = nn.Parameter(0.3 * torch.randn(PATCHES + 1, WIDTH))
            self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Float[Tensor, "batch 8 8"]) -> Float[Tensor, "batch digits"]:
        patches = images.unflatten(2, (4, 2)).unflatten(1, (4, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        x = F.pad(self.embed(patches), (0, 0, 1, 0)) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def tail(model: ViT, x: Float[Tensor, "batch places d"]) -> Float[Tensor, "batch digits"]:
    """What the network makes of activations at SITE."""
    for block in model.blocks[1 + int(SITE.split(".")[1]) :]:
        x = block(x)
    return model.head(model.norm(x[:, 0]))


def focus(codes: Float[Tensor, "images places n"], least: int) -> Float[Tensor, " n"]:
    """Σa²/(Σa)² over an image's places, then the mean over images on which a feature fires: 1 where it fires at one
    place, 1/places where it fires alike at all. NaN for a feature that fires on fewer than ``least`` images."""
    total, fires = codes.sum(1), (codes > 0).any(1)
    share = codes.pow(2).sum(1) / total.pow(2).clamp_min(1e-12)
    many = fires.sum(0)
    return torch.where(many >= least, (share * fires).sum(0) / many.clamp_min(1), torch.nan)


def views(images: Float[Tensor, "n 8 8"], generator: torch.Generator) -> Float[Tensor, "n 8 8"]:
    """The images with stronger or weaker ink and some noise."""
    ink = 0.7 + 0.6 * torch.rand(len(images), 1, 1, generator=generator)
    return (images * ink + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1.3)


def train_vit(images: Float[Tensor, "n 8 8"], labels: Int[Tensor, " n"], seed: int, steps: int = STEPS) -> ViT:
    model, generator = ViT(seed), torch.Generator().manual_seed(2000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for _ in range(steps):
        some = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(views(images[some], generator)), labels[some], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False).eval()


def new_coder(seed: int, place: str) -> sl.TopK:
    return sl.TopK(WIDTH, D_SAE, k=K, seed=3000 + seed + 500 * (place == "patch"))


def placed(coder: sl.TopK, place: str) -> sl.TopK:
    """The coder, which knows its site and its places: edits of a ``sl.Net`` ask for both."""
    coder.reads = coder.writes = (sl.Site(MODULE + SITE),)
    kept = set(range(PATCHES + 1)[PARTS[place]])
    mask = sl.TokenMask(tuple(i for i in range(PATCHES + 1) if i not in kept), skip_first=False)
    coder.meta["mask"] = mask.to_dict()
    return coder.eval()


def train_coder(model: ViT, images: Float[Tensor, "n 8 8"], seed: int, place: str, steps: int = CODER_STEPS) -> sl.TopK:
    generator = torch.Generator().manual_seed(4000 + seed)
    seen = torch.cat([views(images, generator) for _ in range(VIEWS[place])])
    x = sl.Net(model).read(seen, SITE)[:, PARTS[place]].flatten(0, 1)
    config = sl.TrainConfig(steps=steps, batch_size=256, lr=2e-3, seed=seed, dead_after=50_000, log_every=steps)
    trained = new_coder(seed, place)
    print(place, sl.train(trained, x, config), flush=True)
    return trained


# ---- files


class Loaded(NamedTuple):
    """What belongs to a seed. parts: numbers of the images to train, to select and to measure on."""

    images: Tensor
    labels: Tensor
    parts: dict[str, Tensor]
    model: ViT
    coders: dict[str, sl.TopK]


def data(seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    world = sl.worlds.digits(seed=seed)
    parts = {part: torch.from_numpy(getattr(world, part)) for part in ("train", "select", "measure")}
    return torch.from_numpy(world.images), torch.from_numpy(world.labels), parts


def save(path: Path, model: ViT, coders: dict[str, sl.TopK]) -> None:
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"{name}.{key}": t for name, coder in coders.items() for key, t in coder.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().half().contiguous() for name, t in tensors.items()}, path)
    print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)


def make(seed: int, folder: Path) -> None:
    """Train the networks and coders of a seed, and write them."""
    started = time.perf_counter()
    images, labels, parts = data(seed)
    x, y = images[parts["train"]], labels[parts["train"]]
    model, blank = train_vit(x, y, seed), ViT(seed).requires_grad_(False).eval()
    coders = {place: train_coder(model, x, seed, place) for place in PARTS}
    save(folder / f"{seed}.safetensors", model, coders | {"random": train_coder(blank, x, seed, "patch")})
    held = parts["select"]
    right = (model(images[held]).argmax(1) == labels[held]).float().mean()
    print(f"seed {seed}: {time.perf_counter() - started:.0f} s, accuracy {right:.3f} on images to select", flush=True)


def load(seed: int, folder: Path = FOLDER) -> Loaded:
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, t in load_file(folder / f"{seed}.safetensors").items():
        owner, key = name.split(".", 1)
        tensors.setdefault(owner, {})[key] = t.float()
    model = ViT(seed)
    model.load_state_dict(tensors.pop("model"))
    coders = {}
    for name, state in tensors.items():
        place = "class" if name == "class" else "patch"
        coders[name] = placed(new_coder(seed, place), place)
        coders[name].load_state_dict(state)
        coders[name].requires_grad_(False).eval()
    return Loaded(*data(seed), model.requires_grad_(False).eval(), coders)


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
