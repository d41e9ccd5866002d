"""Loss terms against the same formulas on dense codes in float64, their gradients by autograd."""

import pytest
import torch

from sae_lab.saes import kernels, losses
from sae_lab.types import Codes
from tests.saes.conftest import normal

ROWS, D, D_SAE = 6, 5, 24


def codes_of_unequal_rows() -> Codes:
    """Rows of 3 to 10 codes, then one without any; features of a row stand in no order."""
    dense = normal(ROWS, D_SAE, seed=1).double().relu() * (normal(ROWS, D_SAE, seed=2) > 0.2)
    dense[-1] = 0
    codes = kernels.positive(dense)
    order = (codes.rows + torch.rand(len(codes.rows), generator=torch.Generator().manual_seed(3))).argsort()
    return codes._replace(values=codes.values[order], features=codes.features[order])


FEW = torch.zeros(D_SAE).index_fill(0, torch.tensor([3, 10, 20]), 0.5)  # features behind the last prefix have no part
ALL = torch.linspace(0.1, 1, D_SAE)


@pytest.mark.parametrize("chunk", [1 << 22, 3 * 8 * D])  # all rows in one piece; a few rows at a time
@pytest.mark.parametrize("weights", [FEW, ALL])
def test_every_prefix_is_a_reconstruction_of_its_own(weights, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    codes, weights = codes_of_unequal_rows(), weights.double()
    ours, theirs = (
        [
            t.clone().requires_grad_()
            for t in (codes.values, normal(D_SAE, D).double(), normal(ROWS, D, seed=4).double())
        ]
        for _ in range(2)
    )
    found = losses.prefix(codes._replace(values=ours[0]), ours[1], ours[2], weights)
    values, W_dec, target = theirs
    dense = codes._replace(values=values).dense()
    wanted = sum(weights[n - 1] * (target - dense[:, :n] @ W_dec[:n]).pow(2).sum(1).mean() for n in range(1, D_SAE + 1))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    (3 * found).backward()
    (3 * wanted).backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("of", "by_hand"),
    [
        (losses.l1, lambda f: f.sum(1)),
        (lambda f: losses.lp(f, 0.5), lambda f: f.sqrt().sum(1)),
        (lambda f: losses.lp(f, 1), lambda f: f.sum(1)),
        (losses.hoyer, lambda f: f.sum(1).square() / f.square().sum(1).clamp_min(1e-9)),
        (lambda f: losses.smooth_l0(f, 0.5), lambda f: (1 - (-f.square() / 0.5).exp()).sum(1)),
    ],
    ids=["l1", "lp", "lp of 1", "hoyer", "smooth_l0"],
)
def test_penalties_of_sparse_codes_are_those_of_dense_ones(of, by_hand):
    codes = codes_of_unequal_rows()
    dense = codes.dense()
    dense = torch.where(dense > 0, dense + 0.01, 0.0)  # away from the least code of a root
    codes = codes._replace(values=codes.values + 0.01)
    assert of(codes).item() == pytest.approx(by_hand(dense).mean().item())
    assert of(dense).item() == pytest.approx(by_hand(dense).mean().item())


def test_errors_of_activations_of_several_axes():
    """Of a crosscoder's layers, all are summed; the mean that FVU compares with is of the rows."""
    x, x_hat = normal(7, 2, 3, seed=5), normal(7, 2, 3, seed=6)
    assert losses.mse(x_hat, x).item() == pytest.approx(float((x - x_hat).flatten(1).square().sum(1).mean()))
    variance = x.flatten(1).var(0, unbiased=False).sum() * 7
    assert losses.fvu(x_hat, x).item() == pytest.approx(float((x - x_hat).square().sum() / variance))
    assert losses.fvu(x.mean(0).expand_as(x), x).item() == pytest.approx(1.0) and losses.fvu(x, x).item() == 0.0
