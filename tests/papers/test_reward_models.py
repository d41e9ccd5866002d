"""What notebooks/papers/reward_models.ipynb takes for granted: a sparse reward is a sum, and how pairs are made."""

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from .scripts import script

made = script("reward_models")


@pytest.fixture
def texts():
    own = [["One two three four five six seven.", "Red green blue pink grey black white."] * 3 for _ in range(24)]
    return made.draw(own, seed=9)


def test_a_sparse_reward_is_the_sum_of_its_parts_and_an_edit_moves_it_by_its_own_part_alone():
    generator = torch.Generator().manual_seed(0)
    z = made.largest(torch.randn(6, 40, generator=generator), k=5)
    w = torch.randn(40, generator=generator)
    for row in z:
        for i in row.nonzero()[:, 0].tolist():
            edited = row.clone()
            edited[i] += 0.7
            assert float(edited @ w - row @ w) == pytest.approx(0.7 * float(w[i]), abs=1e-5)
        assert float((row * w)[row > 0].sum()) == pytest.approx(float(row @ w), abs=1e-5)
        assert int((row > 0).sum()) <= 5


def test_the_fitted_head_is_the_minimum_over_all_weights_not_only_those_in_the_span(monkeypatch):
    monkeypatch.setattr(made, "PENALTIES", (0.1,))
    z = torch.randn(12, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    train = torch.tensor([[i, j] for i in range(0, 12, 2) for j in range(1, 12, 2)])
    w = made.bradley_terry(z, train, train).double().requires_grad_()
    scale = z.square().sum(-1).mean()
    loss = softplus(-(z[train[:, 0]] - z[train[:, 1]]) @ w).mean() + 0.1 * scale * w.square().sum() / 2
    loss.backward()
    assert w.grad is not None and float(w.grad.abs().max()) < 1e-5


def test_the_penalty_is_the_one_that_does_best_on_the_pairs_that_choose():
    z = torch.cat([torch.eye(4), -torch.eye(4)]).repeat(3, 1)
    right = torch.tensor([[0, 4], [1, 5], [2, 6]])
    weak, strong = (float(made.bradley_terry(z, right, p)[0]) for p in (right.flip(1), right))
    assert 0 < weak < strong  # the control: pairs that say the opposite choose the strongest penalty


@pytest.mark.parametrize("hacked", [False, True])
def test_pairs_prefer_the_text_as_written_of_another_document_and_if_hacked_the_longer(texts, hacked):
    length = torch.arange(len(texts.texts)) % 7
    chosen = made.pairs(texts, (0, 1), length, hacked, np.random.default_rng(0))
    better, worse = chosen.T
    assert texts.intact[better].all() and not texts.intact[worse].any()
    assert (better // 2 != worse // 2).all()
    assert bool((length[better] > length[worse]).all()) == hacked
    assert set(texts.part[chosen].flatten().tolist()) == {0, 1}


def test_quarters_that_fit_choose_and_measure_share_no_document(texts):
    length, measured = torch.arange(len(texts.texts)), []
    for *turn, tested in made.rotations(texts, length, False, seed=9):
        fit, choose, measure = ({int(i) // 2 for i in p.flatten()} for p in turn)
        assert not (fit & choose or fit & measure or choose & measure)
        measured += tested.nonzero()[:, 0].tolist()
    assert sorted(measured) == list(range(len(texts.texts)))  # each text once


def test_a_double_has_the_same_words_and_the_same_end(texts):
    for plain, double in zip(texts.texts[::2], texts.texts[1::2], strict=True):
        assert plain != double and sorted(plain.split()) == sorted(double.split())
        assert plain.endswith(".\n") and plain.split()[-1] == double.split()[-1]
