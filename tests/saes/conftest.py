"""Coders and their data. One small spec per family: a new family is one line in SPECS."""

import pytest
import torch

from sae_lab.saes import FAMILIES

SPECS = {
    "L1": {"sparsity": 0.3},
    "TopK": {"k": 4},
    "BatchTopK": {"k": 4},
}
D_IN, D_SAE = 16, 40


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(name, d_in=D_IN, d_sae=D_SAE, jitter=0.2, **config):
    """A coder with weights off their symmetric start, so that every part of it matters."""
    coder = FAMILIES[name](d_in, d_sae, **{**SPECS[name], **config})
    with torch.no_grad():
        for i, p in enumerate(coder.parameters()):
            p += jitter * normal(*p.shape, seed=i + 1) * (1 if p.dim() == 1 else d_in**-0.5)
        coder.project()
    return coder


@pytest.fixture(autouse=True)
def one_thread():
    """This work is too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FAMILIES)
def family(request):
    assert request.param in SPECS, f"add a line for {request.param} to SPECS in tests/saes/conftest.py"
    return request.param


@pytest.fixture
def x():
    return normal(24, D_IN, seed=9)


@pytest.fixture
def coder(family):
    """A coder in train mode."""
    return make(family).train()


@pytest.fixture
def fitted(coder):
    """The same coder as training leaves it: calibrated, in eval mode."""
    coder.calibrate([normal(512, D_IN, seed=8)])
    return coder
