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


def test_two_are_enough_for_an_error():
    """Of two values a and b every formula gives |a − b|/2, in float32 too."""
    assert stats.with_error(of=[1.0, 4.0]) == pytest.approx({"of": 2.5, "of_se": 1.5})
    assert stats.jackknife([1.0, 4.0]) == pytest.approx(1.5)
    assert stats.clustered_error(torch.tensor([1.0, 4.0]), torch.tensor([0, 1])) == pytest.approx(1.5)


def test_errors_of_ratios_are_those_of_leaving_out_one_cluster():
    random = np.random.default_rng(3)
    clusters = torch.tensor(np.repeat(np.arange(200), random.integers(2, 8, 200)))
    n = len(clusters)
    bottom = torch.tensor(random.uniform(1, 3, n))
    top = bottom * torch.tensor(0.4 + 0.1 * random.normal(size=200)[clusters] + 0.1 * random.normal(size=n))
    one, other = (torch.tensor(random.random(n) < share) for share in (0.3, 0.6))
    other &= ~one

    def ratio(these):
        return float(top[these].sum() / bottom[these].sum())

    def difference(these):
        return ratio(these & one) - ratio(these & other)

    def without_each(estimate):
        return stats.jackknife(estimate(clusters != left_out) for left_out in range(200))

    found, error = stats.ratio_difference(top, bottom, one, other, clusters)
    # The formulas are linear in what a cluster adds, which of 200 clusters is a small share: measured, within 1 %.
    assert stats.ratio_error(top, bottom, clusters) == pytest.approx(without_each(ratio), rel=0.02)
    assert found == pytest.approx(difference(torch.ones(n, dtype=torch.bool)))
    assert error == pytest.approx(without_each(difference), rel=0.02)
    assert math.isnan(stats.ratio_error(top, 0 * bottom, clusters))


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    random = np.random.default_rng(1)
    scores, positive = random.integers(0, 5, (60, 3)).astype(float), random.random(60) < 0.4
    wanted = [roc_auc_score(positive, column) for column in scores.T]
    np.testing.assert_allclose(stats.auroc(scores, positive), wanted)
    with np.errstate(all="raise"):  # nothing is divided by 0
        for one_kind in (np.ones(60, bool), np.zeros(60, bool)):
            none = stats.auroc(scores, one_kind)
            assert none.shape == (3,) and np.isnan(none).all()


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
