"""What holds by construction of sparse sums of codes and of their splits."""

import pytest
import torch

from .scripts import script


@pytest.fixture(scope="module")
def cn():
    return script("connections")


@pytest.fixture(scope="module")
def planted():
    """Sparse early codes, and two late ones: 2·x₃ − x₁₁ + ½·x₂₀, and noise. Both standardised."""
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(2000, 40, generator=draw) * (torch.rand(2000, 40, generator=draw) < 0.2)
    x = (x - x.mean(0)) / x.std(0)
    y = torch.stack([2 * x[:, 3] - x[:, 11] + 0.5 * x[:, 20], torch.randn(2000, generator=draw)], 1)
    return x, (y - y.mean(0)) / y.std(0)


def test_a_pursuit_finds_a_planted_sum_in_order(cn, planted):
    x, y = planted
    found = cn.moments(x, y)
    assert cn.pursuit(found, 0, 3) == [3, 11, 20]
    weights = torch.stack([cn.least_squares(found, [3, 11, 20], 0), torch.zeros(40)], 1)
    fit = cn.r2(x, y, weights)
    assert fit[0] > 0.999 and fit[1] == 0  # the control: no weights, no variance
    assert cn.r2(x, y, torch.stack([cn.least_squares(found, [0, 1, 2], t) for t in (0, 1)], 1)).max() < 0.1


def test_a_pursuit_takes_an_edge_once(cn, planted):
    edges = cn.pursuit(cn.moments(*planted), 1, 40)
    assert sorted(edges) == list(range(40))


def test_ridge_without_a_penalty_is_least_squares(cn, planted):
    x, y = planted
    solved = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(cn.ridge(cn.moments(x, y), 0.0), solved, rtol=1e-3, atol=1e-4)
    assert cn.ridge(cn.moments(x, y), 1e4).norm() < 0.5 * solved.norm()


def test_a_split_keeps_documents_whole(cn):
    documents = torch.arange(30).repeat_interleave(7)
    test = cn.held_out(documents, 1 / 3, torch.Generator().manual_seed(2))
    assert test.view(30, 7).float().mean(1).unique().tolist() == [0.0, 1.0]
    assert test.sum() == 70
    other = cn.held_out(documents, 1 / 3, torch.Generator().manual_seed(3))
    assert not torch.equal(test, other)
