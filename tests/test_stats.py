"""Statistics against other ways of computing them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import sem
from sklearn.metrics import roc_auc_score

from sae_lab import stats


def test_errors_of_a_mean():
    values = np.random.default_rng(0).normal(size=40)
    mean, error = stats.mean_and_error(values)
    assert mean == pytest.approx(values.mean()) and error == pytest.approx(sem(values))
    # Leaving out one value at a time, or calling each a cluster of its own, gives the same.
    assert stats.jackknife((values.sum() - v) / 39 for v in values) == pytest.approx(error)
    assert stats.clustered_error(torch.tensor(values), torch.arange(40)) == pytest.approx(error)
    assert math.isnan(stats.jackknife([1.0])) and math.isnan(stats.clustered_error(torch.ones(3), torch.zeros(3)))
    assert stats.mean_and_error([2.0])[0] == 2 and math.isnan(stats.mean_and_error([])[0])


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    random = np.random.default_rng(1)
    scores, positive = random.integers(0, 5, (60, 3)).astype(float), random.random(60) < 0.4
    wanted = [roc_auc_score(positive, column) for column in scores.T]
    np.testing.assert_allclose(stats.auroc(scores, positive), wanted)
    assert np.isnan(stats.auroc(scores, np.ones(60, bool))).all()


def test_a_permutation_p_counts_what_was_found():
    assert stats.permutation_p(3.0, np.array([1.0, 3.0, 4.0])) == 3 / 4
    assert stats.permutation_p(9.0, np.zeros(99)) == 1 / 100


def test_ranks_of_sparse_scores_are_those_of_the_dense_ones():
    """Ties, features that never fire and features that always do among them."""
    random = np.random.default_rng(2)
    dense = random.integers(1, 5, (60, 4)) * (random.random((60, 4)) < [0, 0.3, 0.7, 1])
    labels = random.random((60, 3)) < 0.4
    rows, features = dense.nonzero()
    ranks = stats.sparse_ranks(features, dense[rows, features], 4, 60)
    sums = np.zeros((4, 3))
    np.add.at(sums, ranks.features, ranks.above[:, None] * labels[rows[ranks.order]])
    areas = stats.area(sums, ranks.silent[:, None], labels.sum(0), (~labels).sum(0))
    np.testing.assert_allclose(areas.T, [stats.auroc(dense, label) for label in labels.T])


def test_f1_by_hand():
    """Three said, four true, two of them both: 2·2/(3 + 4)."""
    assert stats.f1(np.array([2, 0]), np.array([3, 0]), np.array([4, 0])).tolist() == [4 / 7, 0]
