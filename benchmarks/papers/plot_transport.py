"""A small network with two planted sites, for notebooks/papers/plot_transport.ipynb.

    python benchmarks/papers/plot_transport.py

The task is hierarchical equality of bits: with a, b, c, d the signs of the first four of eight inputs, the answer is
(a = b) = (c = d). Its causal variables are A = (a = b) and B = (c = d). Training plants each in one unit: with that
unit taken from another input, the network must answer as if the variable had been taken from there (interchange
intervention training, Geiger et al. 2022, arXiv:2112.00826). For each seed, network and SAE go to
notebooks/papers/data/plot_transport/.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, one_hot

import sae_lab as sl

SEEDS, GATE = range(10, 16), 0.9  # three of them that pass: planted sites must carry their variables this accurately
INPUTS, WIDTH, LAYERS, STEPS, BATCH = 8, 96, 3, 1500, 256
FEATURES, K, ROWS = 192, 8, 20_000  # of the SAE of the rotated middle layer
DATA = Path(__file__).parents[2] / "notebooks" / "papers" / "data" / "plot_transport"
Edit = tuple[int, Tensor]  # layer, and what is added to its activations


class Pairs(NamedTuple):
    """Inputs to change and inputs to take from, with the answers that the task gives."""

    base: Tensor
    source: Tensor
    label: Tensor  # of base
    swapped: Tensor  # (variable, pair): the answer with variable A, or B, taken from source


class Net(nn.Module):
    """Three layers of GELU units and a readout. ``rotation``: of the middle layer's activations, undone by what reads
    them: the same function, in which no unit of that layer is the planted one."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(nn.Linear(INPUTS if i == 0 else WIDTH, WIDTH) for i in range(LAYERS))
            self.readout = nn.Linear(WIDTH, 2)
            self.planted = torch.randperm(WIDTH)[:2].tolist()  # units of the middle layer that carry A and B
        self.rotation = torch.eye(WIDTH)  # no buffer: it follows from a seed

    def acts(self, x: Tensor, edit: Edit | None = None) -> list[Tensor]:
        """Activations of every layer; an edit changes what later layers read."""
        found = []
        for i, layer in enumerate(self.layers):
            x = gelu(layer(x @ self.rotation.T if i == 2 else x))
            x = x @ self.rotation if i == 1 else x
            found.append(x := x + edit[1] if edit and edit[0] == i else x)
        return found

    def forward(self, x: Tensor, edit: Edit | None = None) -> Tensor:
        return self.readout(self.acts(x, edit)[-1])


def variables(x: Tensor) -> Tensor:
    bits = x[:, :4] > 0
    return torch.stack([bits[:, 0] == bits[:, 1], bits[:, 2] == bits[:, 3]])


def draw(many: int, generator: torch.Generator) -> Pairs:
    """Pairs of normal inputs. In half of them A of the source differs, in half (independently) B does."""
    base, source = torch.randn(2, many, INPUTS, generator=generator)
    own, other = variables(base), variables(source)
    swapped = torch.stack([other[0] == own[1], own[0] == other[1]])
    return Pairs(base, source, (own[0] == own[1]).long(), swapped.long())


def train(seed: int) -> Net:
    net, generator = Net(seed), torch.Generator().manual_seed(670_000 + seed)
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.05, STEPS)
    for step in range(STEPS):
        pairs = draw(BATCH, generator)
        own, other, unit = net.acts(pairs.base)[1], net.acts(pairs.source)[1], net.planted[step % 2]
        change = torch.zeros_like(own).index_add(1, torch.tensor([unit]), (other - own)[:, [unit]])
        loss = cross_entropy(net(pairs.base), pairs.label)
        loss = loss + cross_entropy(net(pairs.base, (1, change)), pairs.swapped[step % 2])
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    return net.requires_grad_(False)


def sinkhorn(cost: Tensor, epsilon: float, steps: int = 500) -> Tensor:
    """The coupling of rows and columns, each of equal mass, that minimises cost - epsilon·entropy."""
    kernel = torch.exp(-(cost - cost.min()) / epsilon)
    rows, columns = (torch.full((n,), 1 / n) for n in cost.shape)
    u, v = torch.ones_like(rows), torch.ones_like(columns)
    for _ in range(steps):
        u = rows / (kernel @ v)
        v = columns / (kernel.T @ u)
    return u[:, None] * kernel * v


def abstract(pairs: Pairs) -> Tensor:
    """(variable, pair·answer): what taking a variable from the source does to the answer."""
    return (one_hot(pairs.swapped, 2) - one_hot(pairs.label, 2)).flatten(1).float()


def effect(net: Net, pairs: Pairs, edit: Edit) -> Tensor:
    """(pair·answer): what an edit does to the probabilities of the answers."""
    return (net(pairs.base, edit).softmax(-1) - net(pairs.base).softmax(-1)).flatten()


def agrees(net: Net, pairs: Pairs, variable: int, edit: Edit) -> float:
    """Interchange intervention accuracy."""
    return float((net(pairs.base, edit).argmax(-1) == pairs.swapped[variable]).float().mean())


def swaps(net: Net, pairs: Pairs, layer: int, coder: sl.SparseCoder | None = None) -> tuple[Tensor, Tensor]:
    """(by how much each site's value differs between source and base: pair, site; what each site writes: site, width).
    Sites are the units of a layer, or the features of a coder of it."""
    own, other = (net.acts(x)[layer] for x in (pairs.base, pairs.source))
    if coder is None:
        return other - own, torch.eye(WIDTH)
    with torch.no_grad(), coder.evaluating():
        return coder.encode(other) - coder.encode(own), coder.W_dec.detach()


def taken(net: Net, pairs: Pairs, layer: int, sites: list[int], coder: sl.SparseCoder | None = None) -> Edit:
    """The edit that takes some sites' values from the source."""
    change, writes = swaps(net, pairs, layer, coder)
    return layer, change[:, sites] @ writes[sites]


def rotated(net: Net, seed: int) -> Net:
    generator = torch.Generator().manual_seed(671_000 + seed)
    net.rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    return net


def load(seed: int) -> tuple[Net, sl.SparseCoder]:
    """The network of a seed, not rotated, and the SAE of its rotated middle layer."""
    kept = {name: values.float() for name, values in load_file(DATA / f"seed-{seed}.safetensors").items()}
    net, coder = Net(seed), sl.TopK(WIDTH, FEATURES, k=K)
    net.load_state_dict({name[4:]: values for name, values in kept.items() if name.startswith("net.")})
    state = coder.state_dict()
    coder.load_state_dict(state | {name[4:]: values for name, values in kept.items() if name.startswith("sae.")})
    return net.requires_grad_(False), coder.requires_grad_(False).eval()


def main() -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        if (path := DATA / f"seed-{seed}.safetensors").exists():
            continue
        if len(list(DATA.glob("*.safetensors"))) == 3:
            break
        net, tried = train(seed), draw(500, torch.Generator().manual_seed(677_000 + seed))
        carried = [agrees(net, tried, v, taken(net, tried, 1, [net.planted[v]])) for v in (0, 1)]
        print(seed, carried, flush=True)
        if min(carried) < GATE:
            continue
        net = rotated(net, seed)
        x = net.acts(torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(672_000 + seed)))[1]
        coder = sl.TopK(WIDTH, FEATURES, k=K, seed=673 + seed)
        sl.train(coder, x, sl.TrainConfig(steps=800, batch_size=1024))
        out = {f"net.{name}": values for name, values in net.state_dict().items()}
        out |= {f"sae.{name}": getattr(coder, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        save_file({name: values.detach().half().contiguous() for name, values in out.items()}, path)


if __name__ == "__main__":
    main()
