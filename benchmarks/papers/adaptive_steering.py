"""Train the models and coders of notebooks/papers/adaptive_steering.ipynb on strings with three planted attributes.

    OMP_NUM_THREADS=1 python benchmarks/papers/adaptive_steering.py --seeds 0 1 2

A symbol has three bits. The first says in which half of the alphabet it is, the middle one whether it is low or high in
its half (its height), the last its parity. Each string has three attributes: which half, height and parity are
frequent. Two transformers learn these strings, one by filling masked places in random order, one from left to
right. Writes into ``notebooks/papers/data/adaptive_steering`` their weights and those of their coders in half
precision. Two minutes of one core a seed.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import sae_lab as sl

OUT = Path(__file__).parents[2] / "notebooks" / "papers" / "data" / "adaptive_steering"
NAMES = ("half", "height", "parity")
PURE = (0.95, 0.85, 0.7)  # how often a place follows its string's attribute
LENGTH, SYMBOLS, WIDTH, HEADS = 20, 8, 32, 4
EMPTY = SYMBOLS  # a masked place, and the start of a string that is written from left to right
FEATURES, K = 96, 8
STEPS, BATCH, RATE = 2000, 128, 4e-3
CODER_STEPS, TEMPERATURE, GATE_COST = 1000, 0.1, 0.002
TOP = 3  # features that a steering direction is made of
WORLDS = 510_000  # seeds of strings begin here, seeds of models at 0


def strings(attributes: Tensor, seed: int) -> Tensor:
    """(string, LENGTH): a string for each row of three attributes, each 0 or 1."""
    random = torch.Generator().manual_seed(WORLDS + seed)
    follows = torch.rand(3, len(attributes), LENGTH, generator=random) < torch.tensor(PURE)[:, None, None]
    half, height, parity = (
        torch.where(f, a[:, None], 1 - a[:, None]) for f, a in zip(follows, attributes.T, strict=True)
    )
    return 4 * half + 2 * height + parity


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(attributes, strings)."""
    attributes = torch.randint(2, (count, 3), generator=torch.Generator().manual_seed(WORLDS + 100_000 + seed))
    return attributes, strings(attributes, seed)


def scores(symbols: Tensor, first: int = 0) -> Tensor:
    """(string, 3): how often each attribute is followed from place ``first`` on, less how often not, in -1 … 1. The
    sign is the attribute that a string shows."""
    bits = (symbols // 4, symbols // 2 % 2, symbols % 2)
    return torch.stack([2.0 * bit[:, first:].float().mean(1) - 1 for bit in bits], 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(self.one(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.two(x))))


class Writer(nn.Module):
    """Two blocks. ``causal``: it reads from left to right."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.embed, self.place = nn.Embedding(SYMBOLS + 1, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS)

    def hidden(self, symbols: Tensor) -> Tensor:
        """After the first block, where coders read and edits are added."""
        return self.blocks[0](self.embed(symbols) + self.place[: symbols.shape[1]], self.causal)

    def forward(self, symbols: Tensor, edit: Tensor | float = 0.0) -> Tensor:
        return self.head(self.norm(self.blocks[1](self.hidden(symbols) + edit, self.causal)))


def shifted(symbols: Tensor) -> Tensor:
    """What a writer from left to right has read before it writes each place."""
    return torch.cat([torch.full_like(symbols[:, :1], EMPTY), symbols[:, :-1]], 1)


def masked(symbols: Tensor, random: torch.Generator) -> Tensor:
    """Some places of each string, a share drawn evenly, are EMPTY."""
    share = torch.rand(len(symbols), 1, generator=random)
    return symbols.masked_fill(torch.rand(symbols.shape, generator=random) < share, EMPTY)


def train(causal: bool, seed: int) -> Writer:
    torch.manual_seed(2 * seed + causal)
    model, random = Writer(causal), torch.Generator().manual_seed(20_000 + seed)
    adam = torch.optim.Adam(model.parameters(), RATE)
    slow = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    for step in range(STEPS):
        _, own = draw(BATCH, 1000 * (seed + 1) + 7_000_000 * causal + 100_000_000 + step * 1_000_003)
        read = shifted(own) if causal else masked(own, random)
        asked = torch.ones_like(own, dtype=torch.bool) if causal else read == EMPTY
        loss = F.cross_entropy(model(read)[asked], own[asked])
        adam.zero_grad()
        loss.backward()
        adam.step()
        slow.step()
    return model.requires_grad_(False).eval()


class Slim(nn.Module):
    """A TopK coder with a gate for each property and feature, and a head on the gated codes, averaged over a string."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.coder = sl.TopK(WIDTH, FEATURES, k=K, seed=seed)
        self.gates = nn.Parameter(torch.ones(3, FEATURES))
        self.heads, self.bias = nn.Parameter(torch.zeros(3, FEATURES)), nn.Parameter(torch.zeros(3))

    def codes(self, x: Tensor) -> Tensor:
        pre = (x @ self.coder.W_enc + self.coder.read_bias()).relu()
        top = pre.topk(K, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    def gated(self, z: Tensor) -> Tensor:
        """(string, property, feature) of codes (string, place, feature)."""
        return z.mean(1)[:, None] * self.gates.sigmoid()

    def predict(self, z: Tensor) -> Tensor:
        return (self.gated(z) * self.heads).sum(-1) + self.bias


def contrast(gated: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrastive loss, averaged over properties: strings with the same property are near each other."""
    unit = F.normalize(gated.transpose(0, 1), dim=-1)
    near = (unit @ unit.transpose(1, 2) / TEMPERATURE).masked_fill(torch.eye(len(labels), dtype=torch.bool), -1e9)
    same = (labels.T[:, :, None] == labels.T[:, None]) & ~torch.eye(len(labels), dtype=torch.bool)
    return -(near.log_softmax(-1) * same).sum(-1).div(same.sum(-1).clamp(min=1)).mean()


def fit_coder(model: Writer, seed: int, guided: bool) -> Slim:
    """``guided``: reconstruction, contrast, prediction of the properties and few open gates, as SLIM; else only
    reconstruction, and then a head on frozen codes."""
    torch.manual_seed(3000 + seed)
    own, random = Slim(4000 + seed), torch.Generator().manual_seed(5000 + seed)
    own.requires_grad_(True)
    adam = torch.optim.Adam(own.parameters(), 3e-3)
    labels, symbols = draw(8192, 300_000_000 + seed)
    for _ in range(CODER_STEPS):
        some = torch.randint(len(symbols), (128,), generator=random)
        read = shifted(symbols[some]) if model.causal else masked(symbols[some], random)
        with torch.no_grad():
            x = model.hidden(read)
        z = own.codes(x)
        loss = (x - z @ own.coder.W_dec - own.coder.b_dec).square().sum(-1).mean() / x.var(dim=(0, 1)).sum().detach()
        said = own.predict(z if guided else z.detach())
        loss = loss + F.binary_cross_entropy_with_logits(said, labels[some].float())
        if guided:
            loss = loss + 0.1 * contrast(own.gated(z), labels[some]) + GATE_COST * own.gates.sigmoid().sum(-1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            own.coder.W_dec.div_(own.coder.W_dec.norm(dim=1, keepdim=True))
    return own.requires_grad_(False).eval()


def differences(model: Writer, coder: Slim, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(difference of mean codes by attribute, its size in standard deviations, difference of mean activations)."""
    labels, symbols = draw(4096, 400_000_000 + seed)
    read = shifted(symbols) if model.causal else masked(symbols, torch.Generator().manual_seed(6000 + seed))
    x = model.hidden(read)
    z = coder.codes(x).mean(1)
    split = [[y[labels[:, p] == 1].mean(0) - y[labels[:, p] == 0].mean(0) for p in range(3)] for y in (z, x.mean(1))]
    change = torch.stack(split[0])
    return change, change / (z.std(0) + 1e-3), torch.stack(split[1])


def strongest(weights: Tensor, count: int) -> Tensor:
    """Of each row the ``count`` largest absolute values; the others 0."""
    top = weights.abs().topk(count, dim=-1).indices
    return torch.zeros_like(weights).scatter(-1, top, weights.gather(-1, top))


def directions(model: Writer, coder: Slim, seed: int) -> Tensor:
    """(attribute, WIDTH): unit vectors, the decoder rows of the TOP features by difference of mean codes."""
    return F.normalize(strongest(differences(model, coder, seed)[0], TOP) @ coder.coder.W_dec, dim=-1)


def size(model: Writer, seed: int) -> float:
    """The mean norm of the activations less their mean: the unit of edits."""
    _, symbols = draw(1024, 450_000_000 + seed)
    read = shifted(symbols) if model.causal else masked(symbols, torch.Generator().manual_seed(seed))
    x = model.hidden(read).flatten(0, 1)
    return float((x - x.mean(0)).norm(dim=-1).mean())


@torch.no_grad()
def fill(model: Writer, symbols: Tensor, edits: Tensor | None, random: torch.Generator, steps: int = LENGTH) -> Tensor:
    """Fill ``steps`` EMPTY places of each string, one a step, in random order. edits: (step, string, WIDTH), counted
    from an empty string, added at all places."""
    symbols, rows = symbols.clone(), torch.arange(len(symbols))
    order = (torch.rand(symbols.shape, generator=random) + 2 * (symbols != EMPTY)).argsort(1)
    done = int((symbols[0] != EMPTY).sum())
    for step in range(min(steps, LENGTH - done)):
        logits = model(symbols, 0.0 if edits is None else edits[done + step][:, None])
        at = order[:, step]
        symbols[rows, at] = torch.multinomial(logits[rows, at].softmax(-1), 1, generator=random)[:, 0]
    return symbols


def commitment(model: Writer, count: int, seed: int) -> Tensor:
    """(LENGTH + 1, 3): how far two independent ends of the same half-filled string agree on the attribute shown, as a
    correlation, by the number of places that are filled. 0: the attribute is open, 1: it is settled."""
    random = torch.Generator().manual_seed(seed)
    own, found = torch.full((count, LENGTH), EMPTY), []
    for _ in range(LENGTH):
        a, b = (scores(fill(model, own, None, random)).sign() for _ in range(2))
        a, b = a - a.mean(0), b - b.mean(0)
        found.append((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0) + 1e-9))
        own = fill(model, own, None, random, steps=1)
    return torch.stack([*found, torch.ones(3)])


def schedule(settled: Tensor) -> Tensor:
    """(LENGTH, 3): the share of the edit in each step, as the attribute settles in it; columns sum to 1."""
    rise = (settled[1:] - settled[:-1]).clamp(min=0)
    return rise / rise.sum(0)


def steer(model: Writer, toward: Tensor, along: Tensor, shares: Tensor, total: float, seed: int) -> Tensor:
    """Strings steered to the attributes ``toward`` (string, 3), each by ``total`` in all, split over steps by shares:
    (LENGTH, 3), columns that sum to 1."""
    edits = torch.einsum("ta,na,ad->tnd", shares * total, 2.0 * toward - 1, along)
    empty = torch.full((len(toward), LENGTH), EMPTY)
    return fill(model, empty, edits, torch.Generator().manual_seed(seed))


def strength(symbols: Tensor, toward: Tensor) -> float:
    """The share of strings that show all three attributes."""
    return float((scores(symbols).sign() == 2 * toward - 1).all(1).float().mean())


def distance(symbols: Tensor, real: Tensor, toward: Tensor) -> float:
    """Total variation between the scores of steered strings and of real ones with the same attributes, averaged over
    the attributes. 0: alike. Steering too weak and steering too strong both raise it."""
    found = []
    for p in range(3):
        sides = ((scores(s)[:, p] * (2 * toward[:, p] - 1) + 1) / 2 * LENGTH for s in (symbols, real))
        a, b = (torch.bincount(s.round().long(), minlength=LENGTH + 1) / len(symbols) for s in sides)
        found.append(0.5 * (a - b).abs().sum())
    return float(sum(found) / 3)


def steering_vectors(model: Writer, plain: Slim, slim: Slim, seed: int) -> dict[str, Tensor]:
    """Unit vectors (property, WIDTH) of the writer from left to right, by method."""
    change, effect, dense = differences(model, plain, seed)
    best = effect.abs().argmax(1)
    slopes = {name: coder.gates.sigmoid() * coder.heads for name, coder in (("SLIM", slim), ("plain coder", plain))}
    found = {
        "SLIM": strongest(slopes["SLIM"], K) @ slim.coder.W_dec,  # the gradient of the property's head, gated
        "other gates": strongest(slopes["SLIM"].roll(1, 0), K) @ slim.coder.W_dec,
        "decoder row": plain.coder.W_dec[best] * change.gather(1, best[:, None]).sign(),
        "gradient, plain coder": strongest(slopes["plain coder"], K) @ plain.coder.W_dec,
        "difference of means": dense,
    }
    return {name: F.normalize(v, dim=-1) for name, v in found.items()}


@torch.no_grad()
def turned(model: Writer, vectors: Tensor, total: float, count: int, prompt: int, seed: int) -> Tensor:
    """(property,): the share of strings, begun by ``prompt`` symbols of the opposite attribute, whose rest shows the
    attribute that is steered to. The edit has norm ``total`` at every place."""
    random, found = torch.Generator().manual_seed(seed), []
    for p in range(3):
        labels, symbols = draw(count, 500_000_000 + 10 * seed + p)
        sign = 1.0 - 2 * labels[:, p]
        own = torch.cat([symbols[:, :prompt], torch.full((count, LENGTH - prompt), EMPTY)], 1)
        for at in range(prompt, LENGTH):
            read = shifted(own)[:, : at + 1]
            logits = model(read, total * sign[:, None, None] * vectors[p])[:, at]
            own[:, at] = torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]
        found.append((scores(own, prompt)[:, p].sign() == sign).float().mean())
    return torch.stack(found)


PARTS = ("filler", "reader", "filler_coder", "plain", "slim")


def load(seed: int, folder: Path = OUT) -> tuple[Writer, Writer, Slim, Slim, Slim, Tensor]:
    """The writer by filling, the writer from left to right, the first one's coder, the second one's two coders, and how
    the first one's attributes settle."""
    kept = load_file(folder / f"seed{seed}.safetensors")
    parts = (Writer(False), Writer(True), Slim(0), Slim(0), Slim(0))
    for name, part in zip(PARTS, parts, strict=True):
        inside = {key.split(".", 1)[1]: value.float() for key, value in kept.items() if key.split(".", 1)[0] == name}
        part.load_state_dict({**part.state_dict(), **inside})
        part.requires_grad_(False).eval()
    return (*parts, kept["settled"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        start = time.process_time()
        filler, reader = train(False, seed), train(True, seed)
        coders = fit_coder(filler, seed, False), fit_coder(reader, seed, False), fit_coder(reader, seed, True)
        settled = commitment(filler, 1024, 8000 + seed)
        kept = {"settled": settled} | {
            f"{name}.{key}": value.half().contiguous()
            for name, part in zip(PARTS, (filler, reader, *coders), strict=True)
            for key, value in part.state_dict().items()
            if value.is_floating_point() and value.numel() > 1
        }
        save_file(kept, args.out / f"seed{seed}.safetensors")
        print(seed, f"{time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
