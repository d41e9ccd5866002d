"""composition: one direction or the sum of two, by hand, and whether coders compose where features go together."""

import math

import pytest
import torch

import sae_lab as sl
from sae_lab.evals.composing import composition, explained


def test_explained_by_hand():
    rows = torch.tensor([[3.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, -1], [1, 0.2, 0, 0], [0, 0, 0, -2]])
    one, two, pair = explained(rows, torch.eye(4))
    assert one.tolist() == pytest.approx([1, 0.5, 1 / 3, 0.5, 1 / 1.04, 0])
    # Of the third a plane holds 2/3; a negative part, or one of a fifth, is none.
    assert two.tolist() == pytest.approx([0, 1, 2 / 3, 0, 0, 0], abs=1e-6)
    assert pair[1].tolist() == [0, 1]
    # Directions at 60 degrees: their sum is explained whole, and each explains cos² 30° of it.
    slanted = torch.tensor([[1.0, 0], [0.5, 0.75**0.5]])
    one, two, _ = explained(slanted.sum(0, keepdim=True), slanted)
    assert float(one) == pytest.approx(0.75) and float(two) == pytest.approx(1)


def with_rows(rows):
    coder = sl.L1(rows.shape[1], len(rows)).eval()
    with torch.no_grad():
        coder.W_dec.copy_(rows)
    return coder


def test_known_coders():
    world = sl.worlds.planted(n=16, d=16, l0=2, correlation=0.9, samples=1000)
    true = composition(with_rows(world.dictionary), world)
    assert (true.single, true.composed, true.neither) == (1, 0, 0) and math.isnan(true.grouped)
    group = world.labels["group"]
    sums = torch.stack([world.dictionary[group == g].sum(0) for g in group.unique()])
    composed = composition(with_rows(sums), world)
    # Two directions of 16 dimensions overlap by chance, and the sum of such a pair is near both.
    assert composed.composed > 0.7 and composed.grouped == 1 and composed.grouped_chance == pytest.approx(8 / 120)
    assert composed.composed + composed.single == 1
    random = composition(with_rows(torch.randn(64, 16, generator=torch.Generator().manual_seed(0))), world)
    assert random.neither > 0.9 and abs(random.composed - random.composed_random) < 0.1
    assert "composed" in repr(true) and true.rows == 16 and len(true.to_pandas()) == 1


def test_what_goes_together_in_a_product_world():
    """Values of different attributes do: 12 of 21 pairs of a world of three and four values."""
    world = sl.worlds.product((3, 4), 16, samples=1000)
    sums = (world.dictionary[:3, None] + world.dictionary[None, 3:]).flatten(0, 1)
    found = composition(with_rows(sums), world)
    assert found.composed > 0.7 and found.grouped == 1 and found.grouped_chance == pytest.approx(12 / 21)


def test_composed_rows_rise_with_correlation():
    shares = []
    for correlation in (0.0, 0.99):
        world = sl.worlds.planted(n=16, d=16, l0=2, correlation=correlation, samples=10_000)
        coder = sl.TopK(16, 16, k=2)
        sl.train(coder, world.x, sl.TrainConfig(steps=300, batch_size=256))
        shares.append(composition(coder, world))
    # Measured: .125 and .667.
    assert shares[1].composed > shares[0].composed + 0.1, shares


def test_refuses():
    world = sl.worlds.planted(n=8, d=8, l0=1, samples=100)
    with pytest.raises(ValueError, match="the coder writes d_out=4, the world has width 8"):
        composition(sl.L1(4, 8), world)
    with pytest.raises(ValueError, match="needs a world of two features at least, got one"):
        composition(sl.L1(8, 8), sl.worlds.planted(n=1, d=8, l0=1, samples=100))
