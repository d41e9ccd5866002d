"""What notebooks/papers/proteins.ipynb loads: small language models of sequences with motifs, and coders of them.

    python benchmarks/papers/proteins.py               # all seeds, two minutes on one core
    python benchmarks/papers/proteins.py --seeds 100 --folder build/trial

Of each seed: a recurrent model that predicts the next letter, and a TopK and an Ordered coder of its state.
"""

import argparse
import time
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import sae_lab as sl
from sae_lab.saes.base import SparseCoder
from sae_lab.types import MODULE

FOLDER = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "data" / "proteins"
SEEDS = (1, 2, 3)
LETTERS, WIDTH, SITE = 20, 64, "cell"
TRAINED, BATCH, LR = 1500, 64, 4e-3
D_SAE, K, CODER_STEPS = 192, 6, 1500
PARTS = {"train": slice(0, 3000), "select": slice(3000, 3500), "measure": slice(3500, 4000)}


class Reader(nn.Module):
    """``Reader(seed)(letters)``: scores of the next letter at each place. ``cell`` runs once a letter."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + seed)
            self.letters, self.cell = nn.Embedding(LETTERS, WIDTH), nn.GRUCell(WIDTH, WIDTH)
            self.out = nn.Linear(WIDTH, LETTERS)

    def forward(self, letters: Int[Tensor, "n length"]) -> Float[Tensor, "n length letters"]:
        state, states = torch.zeros(len(letters), WIDTH), []
        for x in self.letters(letters).unbind(1):
            state = self.cell(x, state)
            states.append(state)
        return self.out(torch.stack(states, 1))


class Writer(nn.Module):
    """``Writer(reader)(noise)``: letters that the reader's model draws, "n length". noise: of Gumbel's law, one
    number for each letter at each place."""

    def __init__(self, reader: Reader):
        super().__init__()
        self.letters, self.cell, self.out = reader.letters, reader.cell, reader.out

    def forward(self, noise: Float[Tensor, "n length letters"]) -> Int[Tensor, "n length"]:
        letter, state, said = noise[:, 0].argmax(-1), torch.zeros(len(noise), WIDTH), []
        for draw in noise.unbind(1)[1:]:
            said.append(letter)
            state = self.cell(self.letters(letter), state)
            letter = (self.out(state) + draw).argmax(-1)
        return torch.stack([*said, letter], 1)


def train_reader(letters: Int[Tensor, "n length"], seed: int) -> Reader:
    model, draw = Reader(seed), torch.Generator().manual_seed(2000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=TRAINED)
    for _ in range(TRAINED):
        some = letters[torch.randint(len(letters), (BATCH,), generator=draw)]
        loss = F.cross_entropy(model(some)[:, :-1].flatten(0, 1), some[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False).eval()


def new_coder(name: str, seed: int) -> SparseCoder:
    family = sl.TopK if name == "TopK" else sl.saes.Ordered
    coder = family(WIDTH, D_SAE, k=K, seed=3000 + seed)
    coder.reads = coder.writes = (sl.Site(MODULE + SITE),)
    coder.meta["mask"] = sl.TokenMask((), skip_first=False).to_dict()
    return coder


def train_coder(name: str, x: Float[Tensor, "rows d"], seed: int) -> SparseCoder:
    coder = new_coder(name, seed)
    config = sl.TrainConfig(steps=CODER_STEPS, batch_size=1024, lr=2e-3, seed=seed, dead_after=100_000)
    print(f"seed {seed}", sl.train(coder, x, config), flush=True)
    return coder.eval()


def make(seed: int, folder: Path) -> None:
    started = time.perf_counter()
    letters = torch.from_numpy(sl.worlds.motifs(4000, seed=seed).letters)[PARTS["train"]]
    model = train_reader(letters, seed)
    x = sl.Net(model).read(letters, SITE).flatten(0, 1)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name in ("TopK", "Ordered"):
        coder = train_coder(name, x, seed)
        tensors |= {f"{name}.{key}": t for key, t in coder.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().half().contiguous() for name, t in tensors.items()}, folder / f"{seed}.safetensors")
    print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)


def load(seed: int, folder: Path = FOLDER) -> tuple[Reader, dict[str, SparseCoder]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, t in load_file(folder / f"{seed}.safetensors").items():
        owner, key = name.split(".", 1)
        parts.setdefault(owner, {})[key] = t.float()
    model = Reader(seed)
    model.load_state_dict(parts.pop("model"))
    coders = {name: new_coder(name, seed) for name in parts}
    for name, state in parts.items():
        coders[name].load_state_dict(state)
        coders[name].requires_grad_(False).eval()
    return model.requires_grad_(False).eval(), coders


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
