"""What notebooks/papers/adaptive_steering.ipynb takes for granted: how strings are made, filled, steered and scored."""

import pytest
import torch

from .scripts import script

made = script("adaptive_steering")


@pytest.fixture
def filler():
    torch.manual_seed(0)
    return made.Writer(False).requires_grad_(False)


def test_strings_follow_their_attributes_as_often_as_planted():
    attributes, strings = made.draw(4000, seed=9)
    assert strings.shape == (4000, made.LENGTH) and set(strings.unique().tolist()) == set(range(made.SYMBOLS))
    follows = ((made.scores(strings) * (2 * attributes - 1)).mean(0) + 1) / 2
    assert follows.tolist() == pytest.approx(made.PURE, abs=0.01)
    assert torch.corrcoef(attributes.T.float()).triu(1).abs().max() < 0.06  # apart from each other


def test_filling_fills_every_place_and_leaves_what_is_given(filler):
    start = torch.full((5, made.LENGTH), made.EMPTY)
    some = made.fill(filler, start, None, torch.Generator().manual_seed(1), steps=6)
    assert ((some != made.EMPTY).sum(1) == 6).all()
    whole = made.fill(filler, some, None, torch.Generator().manual_seed(2))
    assert (whole != made.EMPTY).all() and torch.equal(whole[some != made.EMPTY], some[some != made.EMPTY])


def test_a_schedule_follows_what_settles_and_sums_to_one():
    settled = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.1], [0.4, 0.0, 0.2], [1.0, 1.0, 1.0]])
    shares = made.schedule(settled)
    assert torch.allclose(shares.sum(0), torch.ones(3)) and (shares >= 0).all()
    assert shares[:, 1].tolist() == [0, 0, 1] and float(shares[1, 0]) == 0  # a fall gets nothing


def test_steering_by_nothing_changes_nothing_and_each_schedule_spends_the_same(filler):
    toward, along = torch.ones(4, 3), torch.eye(3, made.WIDTH)
    even = torch.full((made.LENGTH, 3), 1 / made.LENGTH)
    own = made.fill(filler, torch.full((4, made.LENGTH), made.EMPTY), None, torch.Generator().manual_seed(3))
    assert torch.equal(made.steer(filler, toward, along, even, 0.0, seed=3), own)
    assert not torch.equal(made.steer(filler, toward, along, even, 500.0, seed=3), own)
    late = torch.zeros_like(even).index_fill(0, torch.tensor(made.LENGTH - 1), 1.0)
    assert float(late.sum()) == pytest.approx(float(even.sum()))


def test_strength_and_distance_of_real_strings():
    attributes, strings = made.draw(3000, seed=1)
    assert made.strength(strings, attributes) > 0.9 and made.strength(strings, 1 - attributes) < 0.05
    assert made.distance(strings, strings, attributes) == 0
    assert made.distance(made.strings(attributes, seed=2), strings, attributes) < 0.05
    assert made.distance(made.strings(1 - attributes, seed=2), strings, attributes) > 0.5


def test_the_writer_from_left_to_right_reads_nothing_that_comes_later():
    torch.manual_seed(1)
    writer = made.Writer(True)
    a = made.draw(2, seed=3)[1]
    b = a.clone()
    b[:, 12:] = 0
    one, two = (writer(made.shifted(s)) for s in (a, b))
    assert torch.allclose(one[:, :13], two[:, :13], atol=1e-5) and not torch.allclose(one[:, 13:], two[:, 13:])


def test_gate_times_head_is_the_gradient_of_the_prediction():
    slim = made.Slim(0).requires_grad_(False)
    torch.nn.init.normal_(slim.heads)
    torch.nn.init.normal_(slim.gates)
    z = slim.codes(torch.randn(2, 5, made.WIDTH)).requires_grad_()
    assert int((z > 0).sum(-1).max()) <= made.K
    for p in range(3):
        (slope,) = torch.autograd.grad(slim.predict(z)[0, p], z)
        assert torch.allclose(5 * slope[0, 0], slim.gates[p].sigmoid() * slim.heads[p], atol=1e-6)


def test_the_contrastive_loss_falls_where_strings_of_one_property_are_alike():
    labels = torch.randint(2, (64, 3), generator=torch.Generator().manual_seed(0))
    alike = torch.nn.functional.one_hot(labels, 4).float()
    assert made.contrast(alike, labels) < made.contrast(alike[torch.randperm(64)], labels)
