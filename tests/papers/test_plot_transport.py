"""What notebooks/papers/plot_transport.ipynb takes for granted, on an untrained network."""

import pytest
import torch

from .scripts import script

made = script("plot_transport")


@pytest.fixture
def net():
    return made.Net(seed=70).requires_grad_(False)


@pytest.fixture
def pairs():
    return made.draw(40, torch.Generator().manual_seed(71))


def test_a_coupling_has_equal_masses_and_prefers_what_costs_less():
    cost = torch.tensor([[0.0, 1.0, 1.0, 0.5], [1.0, 0.0, 1.0, 0.5]])
    coupling = made.sinkhorn(cost, epsilon=0.1)
    assert torch.allclose(coupling.sum(1), torch.full((2,), 1 / 2)) and torch.allclose(
        coupling.sum(0), torch.full((4,), 1 / 4)
    )
    assert coupling[0].argmax() == 0 and coupling[1].argmax() == 1
    assert float(coupling[0, 3]) == pytest.approx(float(coupling[1, 3]))  # the control: a site that fits both alike


def test_a_rotation_changes_no_answer_but_the_units(net, pairs):
    before, acts = net(pairs.base), net.acts(pairs.base)[1]
    made.rotated(net, seed=72)
    assert torch.allclose(net(pairs.base), before, atol=1e-5)
    assert not torch.allclose(net.acts(pairs.base)[1], acts, atol=0.1)


def test_taking_a_whole_layer_from_the_source_gives_its_answers_and_taking_nothing_none(net, pairs):
    for layer in range(made.LAYERS):
        whole = made.taken(net, pairs, layer, list(range(made.WIDTH)))
        assert torch.allclose(net(pairs.base, whole), net(pairs.source), atol=1e-5)
        assert made.effect(net, pairs, made.taken(net, pairs, layer, [])).abs().max() == 0


def test_the_answers_are_those_of_the_task(pairs):
    a, b = made.variables(pairs.base)
    c, d = made.variables(pairs.source)
    assert torch.equal(pairs.label, (a == b).long())
    assert torch.equal(pairs.swapped, torch.stack([c == b, a == d]).long())
    assert made.abstract(pairs).view(2, 40, 2).sum(-1).abs().max() == 0
