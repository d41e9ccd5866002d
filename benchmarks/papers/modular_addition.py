"""Train the flow-matching models of notebooks/papers/modular_addition.ipynb: each learns a + b mod 59 from a quarter of
the pairs.

    OMP_NUM_THREADS=1 python benchmarks/papers/modular_addition.py --seeds 0 1 2 3 4

After "Grokking of Diffusion Models" (arXiv:2604.17673): a model that removes noise from the code of the sum, given two
operands. Writes into ``notebooks/papers/data/modular_addition`` the trained weights in half precision, those of the
operands' side when the training pairs were known, and the history of accuracies and of Fourier shares. Half a minute of
one core a seed.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

OUT = Path(__file__).parents[2] / "notebooks" / "papers" / "data" / "modular_addition"
P, WIDTH, HIDDEN, STATE = 59, 32, 128, 16
KNOWN = 0.25  # share of the pairs that are trained on
STEPS, EVERY, RATE, DECAY = 4000, 50, 1e-2, 1.0
MEMORISED = 0.99  # accuracy on training pairs
FREQUENCIES = 5
EULER = 8  # steps from noise to an answer
SIDE = ("embed.weight", "add.weight", "add.bias", "sum.weight", "sum.bias")  # what the state of two operands needs


class Adder(nn.Module):
    """Operands to a state of 16 numbers; state, noisy code and time to the code without noise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(P, WIDTH)
        nn.init.normal_(self.embed.weight, std=WIDTH**-0.5)
        self.add, self.sum = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, STATE)
        self.read, self.see, self.mix = nn.Linear(STATE, HIDDEN), nn.Linear(P + 1, HIDDEN), nn.Linear(HIDDEN, P)

    def hidden(self, a: Tensor, b: Tensor) -> Tensor:
        return self.add(self.embed(a) + self.embed(b)).relu()

    def state(self, a: Tensor, b: Tensor) -> Tensor:
        return self.sum(self.hidden(a, b))

    def forward(self, a: Tensor, b: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.mix((self.read(self.state(a, b)) + self.see(torch.cat([x, t], 1))).relu())


def pairs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of operands, and which of them are trained on and held out."""
    a, b = (grid.flatten() for grid in torch.meshgrid(torch.arange(P), torch.arange(P), indexing="ij"))
    order = torch.randperm(P * P, generator=torch.Generator().manual_seed(10_000 + seed))
    known = int(KNOWN * P * P)
    return a, b, order[:known], order[known:]


@torch.no_grad()
def answers(net: Adder, a: Tensor, b: Tensor, seed: int = 0) -> Tensor:
    """Start from noise, follow the flow, take the residue whose (one-hot) code is nearest: the largest entry."""
    x = torch.randn(len(a), P, generator=torch.Generator().manual_seed(seed))
    for step in range(EULER):
        t = torch.full((len(a), 1), step / EULER)
        x = x + (net(a, b, x, t) - x) / (1 - t) / EULER
    return x.argmax(1)


def power(rows: Tensor) -> Tensor:
    """Of vectors by residue: the power of each frequency, 1 to 29, summed over dimensions."""
    return torch.fft.rfft(rows - rows.mean(0), dim=0).abs().square().sum(1)[1:]


def embedding_share(rows: Tensor) -> tuple[float, list[int]]:
    """The share of power of five frequencies, chosen on the even dimensions and measured on the odd ones."""
    best = power(rows[:, ::2]).topk(FREQUENCIES).indices
    measured = power(rows[:, 1::2])
    return float(measured[best].sum() / measured.sum()), (best + 1).tolist()


def waves(sums: Tensor, frequencies: list[int]) -> Tensor:
    angle = 2 * math.pi / P * sums[:, None] * torch.tensor(frequencies)
    return torch.cat([angle.cos(), angle.sin()], 1)


def state_share(state: Tensor, sums: Tensor, known: Tensor, held: Tensor) -> float:
    """The share of the state's variance over held-out pairs that five frequencies of the sum explain; frequencies and
    coefficients come from the training pairs."""
    middle = state[known].mean(0)
    count = sums[known].bincount(minlength=P).clamp(min=1)[:, None]
    means = torch.zeros(P, state.shape[1]).index_add(0, sums[known], state[known] - middle) / count
    chosen = (power(means).topk(FREQUENCIES).indices + 1).tolist()
    fit = torch.linalg.lstsq(waves(sums[known], chosen), state[known] - middle).solution
    left = state[held] - middle - waves(sums[held], chosen) @ fit
    return 1 - float(left.square().sum() / (state[held] - middle).square().sum())


def only(net: Adder, frequencies: list[int], keep: bool = True) -> Tensor:
    """The embedding with these frequencies alone (and its mean), or without them."""
    rows = net.embed.weight.detach()
    spectrum = torch.fft.rfft(rows, dim=0)
    chosen = torch.zeros(len(spectrum), dtype=torch.bool)
    chosen[frequencies] = True
    if not keep:
        chosen = ~chosen
    chosen[0] = True
    return torch.fft.irfft(spectrum * chosen[:, None], n=P, dim=0)


def train(seed: int) -> tuple[Adder, dict[str, Tensor], Tensor]:
    """The trained model, the weights of SIDE when it had memorised, and (step, accuracy on training pairs, on held-out
    pairs, embedding_share, state_share) as it went."""
    torch.manual_seed(seed)
    net, (a, b, known, held), codes = Adder(), pairs(seed), torch.eye(P) * P**0.5
    sums, noise = (a + b) % P, torch.Generator().manual_seed(20_000 + seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY, betas=(0.9, 0.98))
    history, side = [], {}
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            right = [float((answers(net, a[i], b[i]) == sums[i]).float().mean()) for i in (known[:600], held[:600])]
            with torch.no_grad():
                shares = embedding_share(net.embed.weight)[0], state_share(net.state(a, b), sums, known, held)
            history.append((step, *right, *shares))
            if right[0] >= MEMORISED and not side:
                side = {name: value.clone() for name, value in net.state_dict().items() if name in SIDE}
        x1 = codes[sums[known]]
        t = torch.rand(len(known), 1, generator=noise).square()  # more of the early times, where the operands decide
        x = (1 - t) * torch.randn(x1.shape, generator=noise) + t * x1
        loss = (net(a[known], b[known], x, t) - x1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net, side, torch.tensor(history)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        start = time.process_time()
        net, side, history = train(seed)
        kept = {f"trained.{name}": value for name, value in net.state_dict().items()}
        kept |= {f"memorised.{name}": value for name, value in side.items()}
        kept = {name: value.half().contiguous() for name, value in kept.items()}
        save_file(kept | {"history": history}, args.out / f"seed{seed}.safetensors")
        step, *last = history[-1].tolist()
        print(f"seed {seed}: step {step:.0f}, accuracies and shares {[round(v, 3) for v in last]}; "
              f"{time.process_time() - start:.0f} s of one core", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
