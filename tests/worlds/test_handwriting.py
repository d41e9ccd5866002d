"""Digits: the parts divide the images, and only the seed moves them."""

import numpy as np
from sklearn.datasets import load_digits

import sae_lab as sl

PARTS = ("train", "select", "measure")


def test_parts_divide_the_images():
    world = sl.worlds.digits(seed=3)
    together = np.concatenate([getattr(world, part) for part in PARTS])
    assert np.array_equal(np.sort(together), np.arange(len(world)))
    counts = np.stack([np.bincount(world.labels[getattr(world, part)], minlength=10) for part in PARTS])
    shares = counts / counts.sum(0)
    assert np.allclose(shares, [[0.5], [0.25], [0.25]], atol=0.01)  # of every digit
    assert repr(world) == "Digits(1,797 images of 8 x 8: 898 to train, 449 to select, 450 to measure, seed 3)"


def test_images_are_scikit_learns():
    world, found = sl.worlds.digits(), load_digits()
    assert np.array_equal(world.images * 16, found.images) and np.array_equal(world.labels, found.target)
    assert world.images.min() == 0 and world.images.max() == 1


def test_a_seed_draws_the_parts():
    one, again, other = (sl.worlds.digits(seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(getattr(one, part), getattr(again, part)) for part in PARTS)
    common = np.intersect1d(one.measure, other.measure)
    assert 80 < len(common) < 150  # a quarter of a quarter, but for chance
