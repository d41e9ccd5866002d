"""monosemanticity: the closed form against the loop over pairs, cases by hand, controls, and real data."""

import math

import pytest
import torch

import sae_lab as sl

# The closed form and its controls, on planted codes of every sign and density.
from sae_lab.evals.monosemantic import (
    _both_signs,
    _dense_scores,
    _random_directions,
    _scaled,
    monosemanticity,
    scores,
    unit,
)
from sae_lab.saes import kernels


def reader(columns, b_enc: float | torch.Tensor = 0.0):
    """An eval-mode ReLU coder with these columns of W_enc."""
    made = sl.L1(columns.shape[0], columns.shape[1], sparsity=1.0).eval()
    with torch.no_grad():
        made.W_enc.copy_(columns)
        made.b_enc.copy_(torch.as_tensor(b_enc).expand(columns.shape[1]))
    return made


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_pairs(dense, E):
    """The score as it is defined, in double precision."""
    a, E = dense.double(), torch.nn.functional.normalize(E.double(), dim=1)
    least, most = a.amin(0), a.amax(0)
    a = (a - least) / (most - least)
    out = []
    for k in range(a.shape[1]):
        above = below = 0.0
        for i in range(len(a)):
            for j in range(i + 1, len(a)):
                weight = float(a[i, k] * a[j, k])
                above, below = above + weight * float(E[i] @ E[j]), below + weight
        out.append(above / below)
    return torch.tensor(out, dtype=torch.float64)


def test_the_closed_form_is_the_loop_over_pairs():
    dense = noise(40, 7).relu()
    dense[:, 3] = dense[:, 3] + 1  # a feature that is always on
    E = noise(40, 5, seed=1)
    expected = by_pairs(dense, E)
    assert torch.allclose(scores(_scaled(kernels.above(dense, 0.0)), E), expected, atol=1e-8, rtol=0)
    assert torch.allclose(_dense_scores(noise(40, 7), E), by_pairs(noise(40, 7), E), atol=1e-6, rtol=0)


def test_by_hand():
    # Feature 0 fires on rows 0 and 1 (cosine .6), feature 1 on rows 0, 1 and 2 with 1, 1 and ½: pairs .6 (weight 1),
    # 0 and .8 (weight ½ each): (.6 + .4) / 2. Feature 2 fires once: no pair.
    E = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    dense = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = scores(_scaled(kernels.above(dense, 0.0)), E)
    assert found[:2].tolist() == pytest.approx([0.6, 0.5]) and math.isnan(found[2])


def test_scaling():
    scaled = _scaled(kernels.above(torch.tensor([[2.0, 0.0, 3.0], [4.0, 5.0, 3.0], [3.0, 1.0, 3.0]]), 0.0)).dense()
    # Always on: from its least to its largest; sometimes off: from 0; constant: nothing to scale.
    assert scaled.tolist() == [[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, pytest.approx(0.2), 0.0]]
    assert _both_signs(torch.tensor([[2.0], [-3.0], [1.0]])).dense().tolist() == [[1, 0], [0, 1], [0.5, 0]]


def test_random_directions_fire_as_often_as_asked():
    codes = _random_directions(noise(200, 4), torch.tensor([10, 30, 200]), torch.Generator().manual_seed(0))
    assert sorted(torch.bincount(codes.features).tolist()) == [10, 30, 200] and len(codes.offsets) == 201
    assert codes.values.min() >= 0 and codes.values.max() == 1


@pytest.fixture(scope="module")
def classes():
    """(x, one of four classes a row): a class is a direction."""
    which = torch.arange(400) % 4
    return torch.eye(4)[which] * (1 + 0.1 * noise(400, 1).abs()) + 0.01 * noise(400, 4, seed=1), which


def test_features_of_one_class_and_of_all(classes):
    x, which = classes
    E = torch.eye(4)[which]
    pure = monosemanticity(reader(torch.eye(4), b_enc=-0.5), x, E)
    assert pure.score == pytest.approx(1) and pure.features == 4 and pure.rows == 400
    # A feature of all classes at once: a random pair, of the same class in 99 of 399 cases, else of cosine −1/3.
    always = reader(torch.ones(4, 1), b_enc=1.0)
    mixed = monosemanticity(always, x, E)
    assert mixed.score == pytest.approx(0, abs=0.01)
    assert abs(pure.shuffled) < 0.05 and abs(mixed.shuffled) < 0.05  # chance is 0 for centred embeddings
    assert pure.score_se == pytest.approx(0, abs=1e-6) and mixed.score_se > 0
    # Here coordinates are the classes: neurons are as good as features, but for their noise, and the raw ones too.
    assert pure.neurons > 0.4
    # A rotation hides the classes from neurons, not from features.
    turn = torch.linalg.qr(noise(4, 4, seed=3)).Q
    turned = monosemanticity(reader(turn, b_enc=-0.5), x @ turn.T, E)
    assert turned.score > 0.9


def test_random_and_silent_coders_get_what_they_deserve(classes):
    x, which = classes
    E = noise(400, 16, seed=5)  # embeddings that have nothing to do with x
    assert abs(monosemanticity(reader(torch.eye(4), b_enc=-0.5), x, E).score) < 0.05
    silent = torch.cat([torch.eye(4)[:, :1], torch.zeros(4, 1)], dim=1)
    result = monosemanticity(reader(silent, b_enc=torch.tensor([-0.5, -1.0])), x, torch.eye(4)[which])
    assert result.features == 1 and result.per_feature.isnan().tolist() == [False, True]


def test_digits():
    """The published claim, features above neurons, on images: a TopK on scikit-learn's digits, E the class."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32)
    made = sl.TopK(64, 128, k=6)
    sl.train(made, x, sl.TrainConfig(steps=150, batch_size=256))
    result = monosemanticity(made, x, torch.eye(10)[torch.tensor(labels)])
    # Measured: .428; neurons .121, p = 3e-18; random directions .325, shuffled −.002.
    assert result.score > result.neurons and result.p_neurons < 0.01, result
    assert result.score > result.random + 0.05 and abs(result.shuffled) < 0.02, result


def test_another_sites_activations(tiny_lm, small_text, tmp_path):
    one, other = sl.Site("resid_post", layer=0), sl.Site("resid_post", layer=2)
    store = sl.harvest(tiny_lm, [one, other], small_text, tokens=1500, path=tmp_path, context=32)
    made = sl.TopK(tiny_lm.width(one), 96, k=8)
    made.reads = made.writes = (one,)
    result = monosemanticity(made.eval(), store.at(one), store.at(other), tokens=300)
    assert result.embedding == repr(other) and 1 < result.documents < result.rows
    text = repr(result)
    assert "shuffled rows" in text and "random directions" in text and repr(other) in text
    assert len(result.to_pandas()) == 1 and "per_feature" not in result.to_pandas()
    assert monosemanticity(made, store.at(one), tokens=300).embedding == "x itself"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"least": 1}, "least must be at least 2 .* got 1"),
        ({"least": 500}, "no feature fires on 500 of these 50 rows: give more tokens, or lower least"),
        ({"embeddings": torch.ones(40, 3)}, "embeddings must be of the same rows as x: got 40 for 50 rows of x"),
        ({"embeddings": torch.ones(50)}, r"must be a Tensor of floats \(rows e\), a Store or None, .* shape \(50,\)"),
        ({"embeddings": torch.full((50, 2), math.inf)}, "embeddings must be a Tensor of floats .* with NaN or Inf"),
        ({"tokens": 0}, "tokens must be at least 2, got 0"),
        ({"coder": sl.TopK(4, 8, k=2)}, "call sae.eval()"),
    ],
)
def test_refusals(change, message):
    given = {"coder": reader(torch.eye(4)), "x": noise(50, 4)} | change
    with pytest.raises(ValueError, match=message):
        monosemanticity(given.pop("coder"), given.pop("x"), **given)


def test_unit():
    E = unit(noise(9, 3) + 5)
    assert torch.allclose(E.norm(dim=1), torch.ones(9))
