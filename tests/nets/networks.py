"""Small networks of other kinds than language models, each with inputs and the sites that are read in it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Case(NamedTuple):
    module: nn.Module
    x: Any
    sites: list[str]
    axes: dict[str, str] | None = None


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3)
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.mid = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.out = nn.Conv2d(5, 1, 1)

    def forward(self, x):
        return self.out(torch.cat([self.up(F.relu(self.mid(F.relu(self.down(x))))), x], 1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Looped(nn.Module):
    """A cell that runs once for each step, a policy or a diffusion sampler."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        state = x.new_zeros(len(x), 6)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state)


class ViTBlock(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = nn.MultiheadAttention(d, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.cls = nn.Conv2d(1, 12, 2, 2), nn.Parameter(torch.randn(1, 1, 12))
        self.pos = nn.Parameter(torch.randn(1, 17, 12))
        self.blocks, self.head = nn.ModuleList(ViTBlock(12) for _ in range(2)), nn.Linear(12, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, nodes, edges):
        for layer in (self.conv1, self.conv2):
            nodes = F.relu(layer(nodes.index_add(0, edges[1], nodes[edges[0]])))
        return nodes


class Denoiser(nn.Module):
    """One step of a diffusion model: a noisy image, its time and its class."""

    def __init__(self):
        super().__init__()
        self.time, self.label = nn.Linear(1, 16), nn.Embedding(10, 16)
        self.inner, self.out = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x, t, y):
        return self.out(F.silu(self.inner(x) + (self.time(t[:, None]) + self.label(y))[:, :, None, None]))


class Policy(nn.Module):
    """A policy that gives a mapping."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
        self.heads = Heads()

    def forward(self, obs):
        return self.heads(self.body(obs))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.pi, self.v = nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x):
        return {"logits": self.pi(x), "value": self.v(x)}


class Gated(nn.Module):
    """SATFormer's gate: each head's output times a sigmoid of the token."""

    def __init__(self):
        super().__init__()
        self.mix, self.gate, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.mix(x.cumsum(1)) * torch.sigmoid(self.gate(x)))


class Siren(nn.Module):
    """An image as a function of coordinates."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 16), nn.Linear(16, 16)])
        self.out = nn.Linear(16, 1)

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(3 * layer(x))
        return self.out(x)


def cases() -> dict[str, Case]:
    """Twelve networks, with inputs, drawn by a seed."""
    g = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    torch.manual_seed(3)
    edges = torch.randint(0, 9, (2, 20), generator=g)
    return {
        "conv net": Case(ConvNet(), draw(4, 1, 12, 12), ["features.0", "features.2", "features.3@input", "features.4"]),
        "U-Net": Case(UNet(), draw(3, 1, 8, 8), ["down", "mid", "up", "out@input"]),
        "LSTM": Case(Recurrent(), draw(4, 6, 5), ["lstm", "head"]),
        "LSTM, steps first": Case(
            nn.Sequential(nn.LSTM(5, 7)), draw(6, 4, 5), ["0"], {"0": "step batch channel"}
        ),
        "loop": Case(Looped(), draw(4, 3, 5), ["cell@0", "cell@2", "head"]),
        "ViT": Case(
            ViT(), draw(5, 1, 8, 8), ["patch", "blocks.0", "blocks.1.mlp.1", "blocks.1.attn", "blocks.0@input"]
        ),
        "graph net": Case(
            GraphNet(), (draw(9, 3), edges), ["conv1", "conv2"],
            {"conv1": "position channel", "conv2": "position channel"},
        ),
        "MLP": Case(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), draw(6, 4), ["0", "1", "2@input"]),
        "diffusion step": Case(
            Denoiser(), (draw(3, 1, 8, 8), torch.rand(3, generator=g), torch.tensor([1, 5, 9])),
            ["inner", "label", "out"],
        ),
        "policy": Case(Policy(), draw(7, 4), ["body.1", "heads@logits", "heads@value"]),
        "SATFormer's gate": Case(Gated(), draw(3, 6, 8), ["gate", "mix", "out@input"]),
        "image as a function": Case(Siren(), draw(11, 2), ["layers.0", "layers.1", "out"]),
    }  # fmt: skip
