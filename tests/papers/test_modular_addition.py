"""What holds by construction in notebooks/papers/modular_addition.ipynb."""

import pytest
import torch

from .scripts import script


@pytest.fixture(scope="module")
def toy():
    return script("modular_addition")


def of_waves(toy, residues, frequencies, seed=0):
    mixed = torch.randn(2 * len(frequencies), toy.STATE, generator=torch.Generator().manual_seed(seed))
    return toy.waves(residues, frequencies) @ mixed


def test_pairs_are_known_or_held_out(toy):
    a, b, known, held = toy.pairs(0)
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) == toy.P**2
    assert sorted(known.tolist() + held.tolist()) == list(range(toy.P**2))


def test_the_flow_ends_at_the_code_that_is_predicted(toy):
    a, b, _, _ = toy.pairs(0)
    codes = torch.eye(toy.P) * toy.P**0.5
    assert torch.equal(toy.answers(lambda a, b, x, t: codes[(a + b) % toy.P], a, b), (a + b) % toy.P)


def test_five_waves_hold_all_power_of_themselves_and_little_of_shuffled_residues(toy):
    rows = of_waves(toy, torch.arange(toy.P), [3, 7, 8, 20, 29])
    share, found = toy.embedding_share(rows)
    assert share == pytest.approx(1, abs=1e-5) and sorted(found) == [3, 7, 8, 20, 29]
    assert toy.embedding_share(rows[torch.randperm(toy.P, generator=torch.Generator().manual_seed(0))])[0] < 0.5


def test_a_state_of_the_sum_is_explained_and_one_of_the_operands_apart_is_not(toy):
    a, b, known, held = toy.pairs(0)
    sums, five = (a + b) % toy.P, [3, 7, 8, 20, 29]
    assert toy.state_share(of_waves(toy, sums, five), sums, known, held) > 0.998  # their mean over some pairs is not 0
    apart = of_waves(toy, a, five) + of_waves(toy, b, five, seed=1)
    assert toy.state_share(apart, sums, known, held) < 0.1


def test_frequencies_kept_and_removed_make_the_embedding(toy):
    torch.manual_seed(0)
    net = toy.Adder()
    rows = net.embed.weight.detach()
    kept, rest = toy.only(net, [1, 2, 3], True), toy.only(net, [1, 2, 3], False)
    assert torch.allclose(kept + rest - rows.mean(0), rows, atol=1e-5)
    assert torch.allclose(kept.mean(0), rows.mean(0), atol=1e-6)
    assert float(toy.power(kept)[3:].max()) < 1e-6
