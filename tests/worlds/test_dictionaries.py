"""Worlds: what is planted is what was asked for, and nothing of it is in a coder before training."""

import math
import time

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.worlds import LAWS, MAX_PROBABILITY, World, planted

SMALL = {"n": 24, "d": 16, "l0": 3, "samples": 40_000}


def rates(world):
    """How often each feature fires."""
    return (world.f > 0).float().mean(0)


def error(p, samples):
    """Five standard deviations of a frequency measured on so many rows."""
    return 5 * (p * (1 - p) / samples).sqrt()


def test_x_is_codes_times_dictionary():
    world = planted(**SMALL)
    x, codes, dictionary, labels = world
    assert (x.shape, dictionary.shape, codes.d_sae, len(world)) == ((40_000, 16), (24, 16), 24, 40_000)
    torch.testing.assert_close(x, codes.dense() @ dictionary)
    torch.testing.assert_close(dictionary.norm(dim=1), torch.ones(24))
    assert torch.equal(world.f, codes.dense())
    assert set(labels) == {"probability", "parent", "group"} and all(len(v) == 24 for v in labels.values())
    assert (labels["parent"] == -1).all() and (labels["group"] == -1).all()
    assert world.l0 == pytest.approx(float((world.f > 0).sum(1).float().mean()))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("correlation", [0.0, 0.7])
@pytest.mark.parametrize("hierarchy", [0, 2])
def test_marginals_are_what_the_labels_say(law, correlation, hierarchy):
    world = planted(**SMALL, law=law, correlation=correlation, hierarchy=hierarchy)
    p = world.labels["probability"]
    assert float(p.sum()) == pytest.approx(3, rel=1e-5)
    assert bool(((rates(world) - p).abs() <= error(p, 40_000)).all())
    assert world.l0 == pytest.approx(3, rel=0.05)
    assert bool((p.diff() <= 0).all()), "rows stand in order of frequency"


def test_the_count_per_row_is_binomial():
    counts = (planted(**SMALL).f > 0).sum(1).float()
    p = 3 / 24
    assert float(counts.var()) == pytest.approx(24 * p * (1 - p), rel=0.05)
    assert counts.min() == 0 and counts.max() > 6


def test_magnitudes_are_uniform():
    values = planted(**SMALL).codes.values
    assert 0.5 <= float(values.min()) < 0.51 and 1.49 < float(values.max()) <= 1.5
    assert float(values.mean()) == pytest.approx(1, abs=0.01)
    assert float(values.var()) == pytest.approx(1 / 12, rel=0.03)


def test_zipf_by_hand():
    world = planted(n=4, d=3, l0=0.75, law="zipf", exponent=1.0, samples=10)
    shares = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4])
    torch.testing.assert_close(world.labels["probability"], 0.75 * shares / shares.sum())


def test_zipf_is_capped_and_what_is_cut_goes_to_the_rest():
    p = planted(n=4, d=3, l0=1.2, law="zipf", exponent=2.0, samples=10).labels["probability"]
    # Uncapped .843, .211, .094, .053: the first is cut to .5, and the others share the .7 left as 1/4 : 1/9 : 1/16.
    rest = torch.tensor([1 / 4, 1 / 9, 1 / 16])
    torch.testing.assert_close(p, torch.cat([torch.tensor([MAX_PROBABILITY]), 0.7 * rest / rest.sum()]))
    full = planted(n=4, d=3, l0=2, law="zipf", samples=10).labels["probability"]
    torch.testing.assert_close(full, torch.full((4,), MAX_PROBABILITY))


def test_correlated_groups_fire_together():
    """For p = 1/2 a Gaussian copula has P(both) = 1/4 + arcsin(ρ)/2π."""
    world = planted(n=9, d=8, l0=4.5, correlation=0.6, group=4, samples=100_000)
    assert world.labels["group"].tolist() == [0] * 4 + [1] * 4 + [-1]
    fires = (world.f > 0).float()
    together = fires.T @ fires / len(fires)
    inside = 1 / 4 + math.asin(0.6) / (2 * math.pi)
    group = world.labels["group"]
    for i in range(9):
        for j in range(i):
            same = group[i] == group[j] and group[i] >= 0
            assert float(together[i, j]) == pytest.approx(inside if same else 1 / 4, abs=0.008), (i, j)


def test_children_fire_only_with_their_parent():
    world = planted(n=11, d=8, l0=2, hierarchy=3, samples=50_000)
    p, parent = world.labels["probability"], world.labels["parent"]
    children = (parent >= 0).nonzero().flatten()
    assert torch.bincount(parent[children], minlength=11)[parent[children].unique()].tolist() == [3, 3]
    assert len(children) == 6 and (parent[parent[children]] == -1).all()  # 2 families of 4, and 3 features alone
    fires = world.f > 0
    for child in children:
        mother = int(parent[child])
        assert not bool((fires[:, child] & ~fires[:, mother]).any())
        assert float(p[child]) == pytest.approx(float(p[mother]) / 4)
        given = float(fires[fires[:, mother], child].float().mean())
        assert given == pytest.approx(1 / 4, abs=0.02)
    # Siblings are independent given their parent; without a hierarchy nothing is ever implied (the control).
    one, two = (parent == parent[children[0]]).nonzero().flatten()[:2]
    with_parent = fires[fires[:, parent[children[0]]]].float()
    assert float((with_parent[:, one] * with_parent[:, two]).mean()) == pytest.approx(1 / 16, abs=0.02)
    flat = planted(n=11, d=8, l0=2, samples=50_000).f > 0
    assert not any(bool((~flat[:, i] | flat[:, j]).all()) for i in range(11) for j in range(11) if i != j)


def test_noise_is_relative_to_the_signal_and_changes_nothing_else():
    clean, noisy = planted(**SMALL), planted(**SMALL, noise=0.5)
    assert torch.equal(clean.dictionary, noisy.dictionary) and torch.equal(clean.f, noisy.f)
    noise = noisy.x - clean.x
    assert float(noise.pow(2).mean() / clean.x.pow(2).mean()) == pytest.approx(0.25, rel=0.01)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(torch.corrcoef(noise.T).fill_diagonal_(0).abs().max()) < 0.05


def test_seeds():
    one, again, other = planted(**SMALL, seed=1), planted(**SMALL, seed=1), planted(**SMALL, seed=2)
    assert torch.equal(one.x, again.x) and torch.equal(one.f, again.f)
    assert not torch.equal(one.dictionary, other.dictionary) and not torch.equal(one.f, other.f)
    more = planted(**SMALL | {"samples": 50_000}, seed=1)
    assert torch.equal(one.dictionary, more.dictionary)


@pytest.mark.parametrize("seed", range(4))
def test_no_coder_starts_at_its_world(seed):
    """The best cosine per direction is that of unrelated random rows, for the coder and for bare torch and numpy."""
    dictionary = planted(n=128, d=64, samples=10, seed=seed).dictionary
    chance = [_best(dictionary, _random(1000 + s)) for s in range(20)]
    low, high = min(chance) - 0.01, max(chance) + 0.01
    bare = torch.randn(128, 64, generator=torch.Generator().manual_seed(seed))
    legacy = torch.from_numpy(np.random.RandomState(seed).randn(128, 64)).float()
    new = torch.from_numpy(np.random.default_rng(seed).standard_normal((128, 64), dtype=np.float32))
    for rows in (sl.TopK(64, 128, k=4, seed=seed).W_dec, bare, legacy, new):
        assert low < _best(dictionary, rows.detach()) < high
    assert _best(dictionary, dictionary) > high  # the control: the test sees a coder that does start there


def _random(seed):
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(seed))


def _best(dictionary, rows):
    return float((torch.nn.functional.normalize(rows, dim=1) @ dictionary.T).amax(1).mean())


def test_it_is_fast_and_prints():
    start = time.process_time()
    world = planted(n=128, d=64, l0=4)
    assert time.process_time() - start < 5  # CPU seconds; half of one is usual
    settings = "128 features in 64 dimensions, uniform law"
    assert repr(world) == f"World({settings}; 200,000 samples, L0 {world.l0:.2f}, seed 0)"
    text = repr(planted(**SMALL, law="zipf", correlation=0.5, group=3, hierarchy=1, noise=0.1, seed=5))
    for part in ("zipf law", "exponent 1.2", "groups of 3 at correlation 0.5", "1 children per parent", "noise 0.1"):
        assert part in text
    assert isinstance(world, World) and sl.worlds.planted is planted


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"l0": 25}, "l0 must be above 0 and at most n=24, the number of features, got 25"),
        ({"l0": 0}, "l0 must be above 0"),
        ({"l0": float("nan")}, "l0 must be a number, got nan"),
        ({"law": "pareto"}, "unknown law 'pareto'; known: uniform, zipf"),
        ({"law": "zipf", "l0": 13}, "l0 must be at most 12 here .* 50% of rows .* got 13: lower l0 or raise n"),
        ({"hierarchy": 1, "l0": 19}, "l0 must be at most 18 here .*a child in 1 of 2 of its parent's"),
        ({"noise": -0.1}, "noise must be at least 0, got -0.1"),
        ({"noise": float("nan")}, "noise must be a number"),
        ({"exponent": -1.0}, "exponent must be at least 0"),
        ({"correlation": 1.0}, "correlation must be from 0 to below 1, got 1.0"),
        ({"correlation": -0.1}, "correlation must be from 0 to below 1"),
        ({"correlation": 0.5, "group": 25}, "group must be at most 24, how many features have no parent, got 25"),
        ({"group": 1}, "group must be at least 2, got 1"),
        ({"hierarchy": 24}, "hierarchy=24 children need a parent: n must be at least 25, got 24"),
        ({"hierarchy": -1}, "hierarchy must be at least 0"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
    ],
)
def test_worlds_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        planted(**SMALL | settings)


def test_extremes():
    assert bool((planted(n=3, d=2, l0=3, samples=50).f > 0).all())  # always on
    one = planted(n=1, d=1, l0=0.5, samples=1)
    assert one.x.shape == (1, 1)
    rare = planted(n=5, d=4, l0=0.001, samples=100)
    assert rare.x.shape == (100, 4) and rare.l0 <= 0.1


def test_a_product_world_has_one_value_of_every_attribute():
    world = sl.worlds.product((3, 5), 16, samples=20_000, seed=2)
    on = world.f > 0
    torch.testing.assert_close(world.x, world.f @ world.dictionary)
    assert (on[:, :3].sum(1) == 1).all() and (on[:, 3:].sum(1) == 1).all() and world.l0 == 2
    assert (abs(rates(world) - world.labels["probability"]) < error(world.labels["probability"], 20_000)).all()
    # Independent: a combination is as frequent as its two values say.
    assert abs(float((on[:, 0] & on[:, 3]).float().mean()) - 1 / 15) < float(error(torch.tensor(1 / 15), 20_000))
    assert world.labels["attribute"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1] and "3 × 5" in repr(world)
    for values in ((8,), (8, 1)):
        with pytest.raises(ValueError, match="values must be two numbers or more"):
            sl.worlds.product(values)
