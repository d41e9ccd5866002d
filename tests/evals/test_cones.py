"""cones: greedy non-negative least squares by hand, planted concepts, controls, and the held-out optimum."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import sae_lab as sl
from sae_lab.evals.concept_cones import cones, fit


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def knows(rows, b_enc=0.0):
    """An eval-mode ReLU coder that reads and writes these directions."""
    made = sl.L1(rows.shape[1], len(rows), sparsity=1.0).eval()
    with torch.no_grad():
        made.W_dec.copy_(rows)
        made.W_enc.copy_(rows.T)
        made.b_enc.fill_(b_enc)
    return made


@pytest.fixture(scope="module")
def world():
    return sl.worlds.planted(n=128, d=64, l0=4, samples=4000, seed=3)


@pytest.fixture(scope="module")
def planted(world):
    """Twenty concepts, each a positive combination of three true directions; and their activations."""
    parts = torch.stack([torch.randperm(128, generator=torch.Generator().manual_seed(i))[:3] for i in range(20)])
    weights = 0.5 + torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    return (weights[:, :, None] * world.dictionary[parts]).sum(1), (world.f[:, parts] * weights).sum(2)


def test_fit_by_hand():
    # 3·e0 + 2·e1 − e2: one row explains 9/14, two 13/14; the third would need a negative weight and stays out.
    r2, features, weights = fit(torch.eye(4), torch.tensor([[3.0, 2.0, -1.0, 0.0]]), (1, 2, 3))
    assert r2[0].tolist() == pytest.approx([9 / 14, 13 / 14, 13 / 14])
    assert features[0].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, -1]]
    assert weights[0, 2].tolist() == pytest.approx([3, 2, 0])
    # Rows that are not orthogonal: (1, 1)/√2 comes in first, with weight 4/√2 for (3, 1), of whose length it explains
    # 8/10; when (1, −1)/√2 joins, both weights are fitted anew: (3, 1) = 2·(1, 1) + 1·(1, −1).
    rows = normalize(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), dim=1)
    r2, features, weights = fit(rows, torch.tensor([[3.0, 1.0]]), (1, 2))
    assert r2[0].tolist() == pytest.approx([0.8, 1.0]) and features[0].tolist() == [[0, -1], [0, 1]]
    assert weights[0].flatten().tolist() == pytest.approx([8**0.5, 0, 8**0.5, 2**0.5])
    # The opposite of a row is not in its cone.
    assert fit(torch.eye(2), -torch.eye(2), (1,))[0].tolist() == [[0], [0]]


def test_planted_concepts_are_found_and_random_ones_are_not(world, planted):
    concepts, activity = planted
    result = cones(knows(world.dictionary, b_enc=-0.4), concepts, world.x, labels=activity, sizes=(1, 2, 3, 4))
    at = result.sizes.index(3)
    # Random directions reach something too: three of 128 rows are chosen to fit, in 64 dimensions.
    assert result.r2[at] > 0.9 and result.held_out[at] > 0.9 and result.r2_random[at] < 0.5
    assert result.held_out_random[at] < 0.2
    assert result.correlation[at] > 0.8 and abs(result.correlation_shuffled[at]) < 0.3
    # A dictionary that has nothing to do with the concepts treats them as the random directions.
    other = cones(sl.TopK(64, 128, k=4, seed=5).eval(), concepts, sizes=(1, 2, 3, 4))
    assert other.r2[at] < 0.5 and abs(other.r2[at] - other.r2_random[at]) < 0.1
    assert math.isnan(other.correlation[at])


def test_held_out_has_an_optimum_at_the_true_size(world, planted):
    noisy = normalize(planted[0], dim=1) + 0.3 * normalize(noise(20, 64, seed=8), dim=1)
    result = cones(knows(world.dictionary), noisy, sizes=(1, 2, 3, 4, 8, 16, 32))
    assert result.r2 == tuple(sorted(result.r2))  # in the fit more is always better
    assert result.best_size in (2, 3, 4) and result.interior
    assert result.held_out[-1] < result.held_out[result.best_index] - 0.05


def test_directions_from_labels(world):
    # A concept that is on where either of two features is: its mean difference lies in their cone.
    on = (world.f[:, [0, 1]] > 0).any(1) & (world.f[:, [2]] == 0).any(1)
    labels = torch.stack([on, world.f[:, 7] > 0], dim=1)
    result = cones(knows(world.dictionary, b_enc=-0.4), None, world.x, labels=labels, sizes=(1, 2, 4))
    assert set(result.features[1, :1].tolist()) == {7} and {0, 1} <= set(result.features[0].tolist())
    assert result.r2[-1] > 0.8 and result.correlation[-1] > 0.6
    # Without labels the concept's activation is what x has along it.
    assert cones(knows(world.dictionary), world.dictionary[:3], world.x).correlation[0] > 0.5


def test_a_mean_difference_by_hand():
    on, off = [[4.0, 0, 1, 0], [2.0, 2, 1, 0]], [[0.0, 0, 6, 0], [0.0, 0, 0, 0], [3.0, 0, 0, 0]]
    labels = torch.tensor([False, True, False, True, False])[:, None]
    x = torch.tensor([off[0], on[0], off[1], on[1], off[2]])
    # Means (3, 1, 1, 0) and (1, 0, 2, 0): the direction is (2, 1, -1, 0), of whose squared length, 6, rows give 4 + 1.
    result = cones(knows(torch.eye(4)), None, x, labels=labels, sizes=(1, 2))
    assert result.per_concept[0].tolist() == pytest.approx([4 / 6, 5 / 6])
    assert result.features.tolist() == [[0, 1]] and result.weights[0].tolist() == pytest.approx([2 / 6**0.5, 6**-0.5])


@pytest.mark.parametrize("tokens", [50, 200])
def test_labels_are_those_of_the_rows_that_are_used(tokens):
    """The coder's codes are relu(x), and so are the labels: correlations are 1, and those with the feature of the
    concept before can be read off x. With the labels of other rows none of this holds."""
    x = noise(200, 8)
    result = cones(knows(torch.eye(8)), torch.eye(8)[:3], x, labels=x[:, :3].relu(), sizes=(1, 2), tokens=tokens)
    assert result.rows == tokens and result.correlation == pytest.approx((1, 1), abs=1e-6)
    used = x[torch.linspace(0, 199, tokens, dtype=torch.float64).round().long()].relu()
    other = [torch.corrcoef(used[:, [(i - 1) % 3, i]].T)[0, 1].item() for i in range(3)]
    assert result.correlation_shuffled == pytest.approx([sum(other) / 3] * 2, abs=1e-5)
    # The direction, too, is that of the rows in use: only they are on, and their third coordinate is 9.
    x = torch.rand(200, 8)
    every = torch.linspace(0, 199, tokens, dtype=torch.float64).round().long()
    labels = torch.zeros(200, 1, dtype=torch.bool)
    labels[every[::2]] = True
    x[every[::2], 2] = 9.0
    assert cones(knows(torch.eye(8)), None, x, labels=labels, sizes=(1,), tokens=tokens).features.tolist() == [[2]]


def test_labels_of_a_store_are_those_of_its_unseen_rows(tiny_lm, small_text, tmp_path):
    store = sl.harvest(tiny_lm, sl.Site("resid_post", 1), small_text, tokens=1500, path=tmp_path, context=32)
    x = torch.cat([block for _, block in store.blocks()])
    coder = knows(torch.eye(x.shape[1]))
    result = cones(coder, torch.eye(x.shape[1])[:2], store, labels=x[:, :2].relu(), sizes=(1,), tokens=100)
    assert result.rows == 100 and result.correlation == pytest.approx((1,), abs=1e-6)


def test_rows_past_one_piece_count_once():
    """Activations are added up 8,192 rows at a time; here the rows around the seam are the large ones."""
    x = noise(8300, 4)
    x[8188:8197] += 30.0
    result = cones(knows(torch.eye(4)), torch.eye(4)[:1], x, labels=x[:, :1].relu(), sizes=(1,))
    assert result.rows == 8300 and result.correlation == pytest.approx((1,), abs=1e-9)


def test_the_table(world, planted):
    result = cones(knows(world.dictionary), planted[0])
    assert result.sizes == (1, 2, 4, 8, 16, 32)
    text = repr(result)
    assert "< most" in text and "no x given" in text and "20 concepts" in text
    assert len(result.to_pandas()) == 6 and result.figures()[0].value == result.best_size
    assert result.weights.shape == result.features.shape == (20, 32) and (result.weights >= 0).all()


GOOD = torch.eye(6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concepts": torch.ones(2, 5)}, "concepts must be directions of width 6, which the coder writes"),
        ({"concepts": torch.zeros(2, 6)}, r"none of them zero, got \(2, 6\) with 2 that are zero"),
        ({"concepts": torch.zeros(0, 6)}, r"one or more and none of them zero, got \(0, 6\)"),
        ({"concepts": None, "labels": torch.ones(40, 0) > 0}, r"one or more and none of them zero, got \(0, 6\)"),
        ({"concepts": torch.full((2, 6), math.nan)}, "concepts must be a Tensor of floats .* with NaN or Inf"),
        ({"sizes": (2, 1)}, "sizes must be ascending integers from 1 to 3"),
        ({"sizes": (1, 9)}, "sizes must be ascending integers from 1 to 3"),
        ({"sizes": ()}, "sizes must be ascending integers from 1 to 3"),
        ({"x": None}, "labels are of rows: give x"),
        ({"x": None, "labels": None, "concepts": None}, "labels are of rows: give x"),
        ({"labels": torch.ones(9, 2)}, r"labels must be \(rows, concepts\) for x's 40 rows"),
        ({"labels": torch.ones(40, 3)}, "labels must have one column for each of the 2 concepts, got 3"),
        ({"concepts": None}, "labels must be booleans"),
        ({"concepts": None, "labels": torch.ones(40, 2) > 0}, "every label needs rows with and without it"),
        ({"coder": sl.TopK(6, 8, k=2)}, "eval mode, got TopK.* in training"),
        ({"coder": sl.TopK(6, 8, k=2, d_out=6).eval()}, "cones needs coders that reconstruct what they read"),
    ],
)
def test_refusals(change, message):
    given = {"coder": knows(GOOD), "concepts": GOOD[:2], "x": noise(40, 6), "labels": noise(40, 2), "sizes": (1, 2)}
    given |= change
    with pytest.raises(ValueError, match=message):
        cones(given.pop("coder"), given.pop("concepts"), given.pop("x"), **given)
