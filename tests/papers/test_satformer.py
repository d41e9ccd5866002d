"""SATFormer's gate (Gunasekaran et al. 2026, arXiv:2605.03953) is a site: a module whose output is read and set.

Later layers add the first layer's values to their own, V' = V + α·V₁, where α = relu(W h) is one number for each token
and head (the ReLU is the default of the authors' code).
"""

import pytest
import torch
from torch import nn

WIDTH, HEADS, LAYERS = 12, 3, 3


class Gate(nn.Module):
    """α of the hidden state: batch, tokens, heads."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(WIDTH, HEADS, bias=False)

    def forward(self, h):
        return self.project(h).relu()


class Attention(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate = None if first else Gate()

    def forward(self, h, v1):
        q, k, v = (f(h).unflatten(2, (HEADS, -1)) for f in (self.q, self.k, self.v))
        if self.gate is not None:
            v = v + self.gate(h)[..., None] * v1
        mixed = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2)), v


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention(first=n == 0) for n in range(LAYERS))

    def forward(self, h):
        v1 = None
        for layer in self.layers:
            out, v = layer(h, v1)
            v1 = v if v1 is None else v1
            h = h + out
        return h


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def h():
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def traced(model):
    from nnsight import NNsight  # it gives every object a method, which beartype must not meet while it is imported

    return NNsight(model)


@torch.no_grad()
def test_the_gate_that_is_read_is_the_one_computed(model, traced, h):
    with traced.trace(h):
        before = traced.layers[0].output[0].save()
        alpha = traced.layers[1].gate.output.save()
    assert alpha.shape == (2, 5, HEADS)
    assert torch.allclose(alpha, (model.layers[1].gate.project.weight @ (h + before)[..., None])[..., 0].relu())
    assert 0 < (alpha > 0).float().mean() < 1 and not torch.allclose(alpha[:, 0], alpha[:, 1])  # each token its own


@torch.no_grad()
def test_values_are_mixed_by_it_token_by_token_and_head_by_head(traced, h):
    with traced.trace(h):
        v1 = traced.layers[0].v.output.save()
        v = traced.layers[1].v.output.save()
        alpha = traced.layers[1].gate.output.save()
        mixed = traced.layers[1].output[1].save()
    assert torch.allclose(mixed.flatten(2), v + alpha.repeat_interleave(WIDTH // HEADS, 2) * v1, atol=1e-6)


@torch.no_grad()
def test_a_gate_set_to_nought_leaves_a_plain_transformer(model, traced, h):
    with traced.trace(h):
        for layer in (1, 2):
            traced.layers[layer].gate.output[:] = 0
        closed = traced.output.save()
    plain = h
    for layer in model.layers:
        gate, layer.gate = layer.gate, None
        plain = plain + layer(plain, None)[0]
        layer.gate = gate
    assert torch.allclose(closed, plain, atol=1e-6)
    assert not torch.allclose(closed, model(h), atol=1e-3)  # the control: an open gate does something
