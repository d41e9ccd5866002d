"""What holds by construction in notebooks/papers/correcting_influence.ipynb, with the notebook's own functions."""

import json
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "correcting_influence.ipynb"
RIDGE = 0.2


@pytest.fixture(scope="module")
def own():
    """The functions of the cells that need no model."""
    space = {"torch": torch, "RIDGE": RIDGE}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith(("def scaled", "def fit", "def influences")):
            exec(source, space)
    return space


@pytest.fixture(scope="module")
def data(own):
    """Thirty phrases of three tokens with forty features, their labels, and what is fitted to them."""
    torch.manual_seed(0)
    rows = [torch.randn(3, 40).relu() for _ in range(31)]
    z, test, shares = own["scaled"](rows[:30], rows[30:])
    labels = (torch.rand(30) < 0.5).double()
    a, p = own["fit"](z @ z.T, labels)
    return z, test[0], shares, labels, a, p


def loss(z, labels, w):
    return torch.nn.functional.binary_cross_entropy_with_logits(z @ w, labels, reduction="sum") + RIDGE / 2 * w @ w


def test_features_are_of_mean_square_one_and_tokens_share_them(data):
    z, _, shares, *_ = data
    assert abs(float(z.pow(2).sum(1).mean()) - 29 / 30) < 1e-5
    sums = torch.stack([share.sum(0) for share in shares])
    assert torch.allclose(sums - sums.mean(0), z, atol=1e-6)  # all but the mean of all phrases


def test_newton_finds_the_minimum(data):
    z, _, _, labels, a, p = data
    w = (z.T @ a).requires_grad_()
    assert torch.autograd.grad(loss(z, labels, w), w)[0].abs().max() < 1e-9
    assert torch.allclose(p, torch.sigmoid(z @ w))


def test_the_inverse_hessian(own, data):
    z, test, _, labels, a, p = data
    hessian = torch.autograd.functional.hessian(lambda w: loss(z, labels, w), z.T @ a)
    assert torch.allclose(own["over_hessian"](z, z @ z.T, p, test), torch.linalg.solve(hessian, test), atol=1e-9)


def test_influence_is_the_slope_of_training_with_a_phrase_counted_more(own, data):
    z, test, shares, labels, a, p = data
    v = own["over_hessian"](z, z @ z.T, p, test)
    influence, tokens = own["influences"](z, labels, shares, z.T @ a, v)
    w = (z.T @ a).clone()
    for i in (0, 7):
        weights, moved = torch.ones(30).double(), w.clone()
        weights[i] += 1e-4
        for _ in range(5):
            p = torch.sigmoid(z @ moved)
            slope = z.T @ (weights * (p - labels)) + RIDGE * moved
            curve = z.T @ ((weights * p * (1 - p))[:, None] * z) + RIDGE * torch.eye(40).double()
            moved = moved - torch.linalg.solve(curve, slope)
        assert float(test @ (moved - w)) / 1e-4 == pytest.approx(float(influence[i]), rel=1e-2, abs=1e-5)
    assert [len(t) for t in tokens] == [3] * 30
