"""Small coders of every family, and their data."""

import inspect
from typing import Any

import pytest
import torch

from sae_lab.saes import FAMILIES
from sae_lab.types import Batch

# What a small coder is built with: by the name of the argument, and by family where that does not fit.
SMALL = {"k": 4, "sparsity": 0.3, "experts": 4, "vocab": 7, "layers": 2, "rows": 4}
OWN = {
    "Hoyer": {"sparsity": 0.1},
    "SmoothL0": {"sparsity": 0.1},
    "JumpReLU": {"sparsity": 0.1},
    "TopK": {"multi": 2},
    "Matryoshka": {"prefixes": (5, 20, 40)},
    "Transcoder": {"d_out": 12},
    "SkipTranscoder": {"d_out": 12},
}
SPECS: dict[str, dict[str, Any]] = {
    name: {a: SMALL[a] for a in inspect.signature(cls).parameters if a in SMALL} | OWN.get(name, {})
    for name, cls in FAMILIES.items()
}
D_IN, D_SAE = 16, 40


# A crosscoder's 16 columns are two layers of 8.
WIDTHS = {"Crosscoder": 8}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(name, d_in=D_IN, d_sae=D_SAE, jitter=0.2, **config):
    """A coder with weights off their symmetric start, so that every part of it matters."""
    coder = FAMILIES[name](WIDTHS.get(name, d_in), d_sae, **{**SPECS[name], **config})
    with torch.no_grad():
        for i, p in enumerate(coder.parameters()):
            p += jitter * normal(*p.shape, seed=i + 1) * (1 if p.dim() == 1 else d_in**-0.5)
        coder.project()
    return coder


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def x(family):
    """24 tokens as the family takes them."""
    return tokens_for(family, 24, seed=9)


def tokens_for(family, rows, seed):
    x = normal(rows, D_IN, seed=seed)
    return x.view(rows, 2, 8) if family == "Crosscoder" else x


def ids_for(x, coder):
    """A token id for every token of x."""
    lead = x.shape[: x.dim() - len(coder.in_shape)]
    return torch.arange(int(torch.tensor(lead).prod()) if lead else 1).view(lead) % 7


def batch_for(x, coder):
    """A batch of x, with a target of its own where the family asks for one."""
    target = normal(len(x), 12, seed=21) if coder.transcodes else x
    return Batch(x, target, ids_for(x, coder))


@pytest.fixture
def coder(family):
    """A coder in train mode."""
    return make(family).train()


@pytest.fixture
def fitted(coder, family):
    """The same coder as training leaves it: calibrated, in eval mode."""
    coder.calibrate([tokens_for(family, 512, seed=8)])
    return coder
