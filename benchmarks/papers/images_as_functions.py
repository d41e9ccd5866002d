"""Networks that are images: SIREN and Fourier features, their sparse coders, and which layers carry over to new images
(notebooks/papers/images_as_functions.ipynb).

    python benchmarks/papers/images_as_functions.py     # all seeds, into notebooks/papers/data/images_as_functions/

One network is eight images at once: it maps a coordinate to the eight grey values there. The notebook takes its
functions from here.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sae_lab as sl
from sae_lab.saes.base import SparseCoder

DATA = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "data" / "images_as_functions"
SEEDS = (1, 2, 3)
KINDS = ("SIREN", "FFMLP")
SIDE, IMAGES, WIDTH, DEPTH = 48, 8, 64, 4
OMEGA, SCALE = 30.0, 5.0  # of SIREN; standard deviation of the Fourier features' frequencies
STEPS, FINE = 1000, 200  # to fit the images, and new ones
RATES = {"SIREN": 3e-4, "FFMLP": 2e-3}
FEATURES, K = 120, 6
READ = (1, 2)  # the layers whose coders are kept: the second and the third


class Layer(nn.Module):
    """A linear map and a sine or a ReLU."""

    def __init__(self, wide: int, width: int, kind: str, first: bool) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(wide, width), kind
        if kind == "SIREN":  # the bounds of Sitzmann et al. 2020 (arXiv:2006.09661)
            bound = 1 / wide if first else (6 / wide) ** 0.5 / OMEGA
            nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return torch.sin(OMEGA * x) if self.kind == "SIREN" else x.relu()


class Images(nn.Module):
    """From coordinates in [-1, 1]² to one grey value for each image."""

    frequencies: Tensor

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(1000 * (kind == "FFMLP") + seed)
        self.kind = kind
        self.register_buffer("frequencies", torch.randn(2, WIDTH // 2) * SCALE)
        wide = [2 if kind == "SIREN" else WIDTH] + [WIDTH] * (DEPTH - 1)
        self.layers = nn.ModuleList(Layer(w, WIDTH, kind, i == 0) for i, w in enumerate(wide))
        self.head = nn.Linear(WIDTH, IMAGES)

    def forward(self, at: Tensor) -> Tensor:
        if self.kind == "FFMLP":
            turned = torch.pi * at @ self.frequencies
            at = torch.cat([turned.sin(), turned.cos()], -1)
        for layer in self.layers:
            at = layer(at)
        return self.head(at)


def grid(side: int = SIDE) -> Tensor:
    """(1, side², 2): the coordinates of pixels, row by row."""
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(1, -1, 2)


def images(seed: int, new: bool = False) -> Tensor:
    """(side², IMAGES): grey pieces of scikit-learn's two photographs, each reduced four times, of values in [-1, 1].
    ``new``: of their lower halves in place of the upper ones."""
    from sklearn.datasets import load_sample_images

    random, found = np.random.default_rng(50_000 + 2 * seed + new), []
    for i in range(IMAGES):
        grey = load_sample_images().images[i % 2].mean(-1)
        grey = grey[: 424 // 4 * 4, : 640 // 4 * 4].reshape(106, 4, 160, 4).mean((1, 3)) / 127.5 - 1
        top = random.integers(0, 53 - SIDE + 1) + 53 * new
        left = random.integers(0, 160 - SIDE + 1)
        found.append(grey[top : top + SIDE, left : left + SIDE].reshape(-1))
    return torch.tensor(np.stack(found, 1), dtype=torch.float32)


def psnr(told: Tensor, true: Tensor) -> Tensor:
    """dB of each image, of values in [-1, 1]."""
    return 10 * torch.log10(4 / (told.reshape(true.shape) - true).square().mean(0))


def fit(model: Images, true: Tensor, steps: int, frozen: int = 0) -> Images:
    """Fit all images at all pixels by Adam; the first ``frozen`` layers stay as they are."""
    at = grid()[0]
    model.requires_grad_(True)
    model.layers[:frozen].requires_grad_(False)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], RATES[model.kind])
    slow = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        loss = (model(at) - true).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        slow.step()
    return model.requires_grad_(False).eval()


def stable_rank(weight: Tensor) -> float:
    """‖W‖_F² / ‖W‖²: how many directions a matrix stretches about as much as the one it stretches most."""
    s = torch.linalg.svdvals(weight)
    return float(s.square().sum() / s[0].square())


def moved(model: Images, seed: int) -> Tensor:
    """(DEPTH + 1): PSNR of new images when the first 0, 1, ... layers are kept from the old ones and the rest, which
    starts from the old ones too, and a new head are fitted for FINE steps."""
    found = []
    for frozen in range(DEPTH + 1):
        other = Images(model.kind, 7000 + seed)
        other.load_state_dict({n: t for n, t in model.state_dict().items() if "head" not in n}, strict=False)
        found.append(psnr(fit(other, images(seed, new=True), FINE, frozen)(grid()), images(seed, new=True)).mean())
    return torch.stack(found)


def fit_coder(model: Images, layer: int, seed: int) -> SparseCoder:
    """A TopK coder of a layer's activations on a grid four times as fine."""
    rows = list(grid(2 * SIDE)[0].split(2 * SIDE))
    store = sl.harvest(sl.Net(model), f"layers.{layer}", rows)
    coder = sl.TopK(WIDTH, FEATURES, k=K, seed=3000 + seed)
    return sl.train(coder, store, sl.TrainConfig(tokens=300_000, batch_size=512, seed=3000 + seed)).coder.eval()


def areas(z: Tensor, side: int = SIDE) -> Tensor:
    """(feature): how far the places where a feature fires lie apart, 1 for all of the image: the variance of the place,
    weighted by the code, over that of a uniform place. NaN for a feature that never fires."""
    at = grid(side)[0]
    weight = z / z.sum(0)
    mean = weight.T @ at
    return (weight.T @ at.square() - mean.square()).sum(-1) / at.var(0, correction=0).sum()


def turned(coder: SparseCoder, seed: int) -> SparseCoder:
    """The same coder with decoder rows of the same norms in random directions."""
    other = copy.deepcopy(coder)
    random = torch.randn(coder.W_dec.shape, generator=torch.Generator().manual_seed(8000 + seed))
    other.W_dec.data = random / random.norm(dim=1, keepdim=True) * coder.W_dec.norm(dim=1, keepdim=True)
    return other


def small(x: Tensor) -> dict[str, Tensor]:
    """A matrix in 8 bits, with the scale of each row."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
    return {"": (x / scale).round().to(torch.int8), ".scale": scale.half()}


def save(path: Path, models: dict[str, Images], coders: dict[str, SparseCoder], told: dict[str, Tensor]) -> None:
    tensors = dict(told)
    for name, model in models.items():
        tensors |= {f"{name}/{key}": t.half() for key, t in model.state_dict().items()}
    for name, coder in coders.items():
        for key, t in coder.state_dict().items():
            own = small(t) if t.dim() == 2 else {"": t.half()}
            tensors |= {f"{name}/{key}{end}": part for end, part in own.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    path.chmod(0o644)


def load(seed: int) -> tuple[dict[str, Images], dict[tuple[str, int], SparseCoder], dict[str, Tensor]]:
    """(network of each kind; coder of each kind and layer; what the script measured) of a seed."""
    kept = load_file(DATA / f"{seed}.safetensors")

    def part(name: str) -> dict[str, Tensor]:
        own = {key.removeprefix(f"{name}/"): t for key, t in kept.items() if key.startswith(f"{name}/")}
        scale = {key: own.get(f"{key}.scale", torch.ones(())).float() for key in own}
        return {key: t.float() * scale[key] for key, t in own.items() if not key.endswith(".scale")}

    models, coders = {}, {}
    for kind in KINDS:
        models[kind] = Images(kind, 0)
        models[kind].load_state_dict(part(kind))
        models[kind].requires_grad_(False).eval()
        for layer in READ:
            coder = coders[kind, layer] = sl.TopK(WIDTH, FEATURES, k=K)
            coder.load_state_dict(part(f"{kind}-{layer}"))
            coder.reads = coder.writes = (sl.Net(models[kind]).site(f"layers.{layer}"),)
            coder.requires_grad_(False).eval()
    return models, coders, {key: t for key, t in kept.items() if "/" not in key}


def median_area(model: Images, coder: SparseCoder, layer: int) -> Tensor:
    """The median area of the features that fire at five pixels or more."""
    z = coder.codes_of(sl.Net(model).read(grid(), f"layers.{layer}")[0]).dense()
    return areas(z)[(z > 0).sum(0) >= 5].median()


def made(seed: int) -> tuple[dict[str, Images], dict[str, SparseCoder], dict[str, Tensor]]:
    """Networks, coders, and what is measured while they are there: PSNR of new images by depth of freezing, and the
    areas of an untrained network's features."""
    models, coders, told = {}, {}, {}
    for kind in KINDS:
        plain = Images(kind, 9000 + seed).requires_grad_(False).eval()
        models[kind] = fit(Images(kind, seed), images(seed), STEPS)
        told[f"moved {kind}"] = moved(models[kind], seed)
        for layer in READ:
            coders[f"{kind}-{layer}"] = fit_coder(models[kind], layer, seed)
            area = median_area(plain, fit_coder(plain, layer, seed).requires_grad_(False), layer)
            told[f"untrained area {kind} {layer}"] = area[None]
    return models, coders, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    DATA.mkdir(parents=True, exist_ok=True)
    for seed in parser.parse_args().seeds:
        save(DATA / f"{seed}.safetensors", *made(seed))


if __name__ == "__main__":
    main()
