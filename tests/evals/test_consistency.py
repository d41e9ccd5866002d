"""consistency and transfer: measures by hand, drift that was planted, controls at chance, a coder carried elsewhere."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import sae_lab as sl

# The derangement of the control: the result shows only its mean.
from sae_lab.evals.agreement import _derange, consistency, correlation, paired_sums, transfer
from sae_lab.saes import kernels
from tests.evals.test_cones import knows


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def world():
    return sl.worlds.planted(n=48, d=64, l0=3, samples=4000, seed=2)


def test_correlations_are_those_of_dense_codes():
    f, g = (noise(50, 6, seed=s).relu() for s in (0, 1))
    g[:, 2] = 2 * f[:, 4]
    f[:, 5] = 0  # never fires: undefined
    at_a, at_b, folds = torch.tensor([4, 0, 5]), torch.tensor([2, 3, 1]), torch.arange(50) % 7
    sums = paired_sums(kernels.above(f, 0.0), kernels.above(g, 0.0), at_a, at_b, folds)
    found = correlation(sums.sum(0))
    expected = torch.corrcoef(torch.stack([f[:, 0], g[:, 3]]))[0, 1]
    assert found[:2].tolist() == pytest.approx([1, float(expected)], abs=1e-6) and math.isnan(found[2])
    rest = folds != 3
    without = correlation(sums.sum(0) - sums[3])
    expected = torch.corrcoef(torch.stack([f[rest, 0], g[rest, 3]]))[0, 1]
    assert float(without[1]) == pytest.approx(float(expected), abs=1e-6)


def test_nothing_stays_in_a_derangement():
    for n in (2, 3, 100):
        moved = _derange(n, seed=0)
        assert not bool((moved == torch.arange(n)).any()) and sorted(moved.tolist()) == list(range(n))


def test_a_permuted_copy_is_consistent_and_random_rows_are_not(world):
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    a, b = knows(world.dictionary, -0.4), knows(world.dictionary[order], -0.4)
    [pair] = consistency(a, b, x=world.x).pairs
    assert pair.stability == pytest.approx(1) and pair.shared == 1 and pair.agreement == pytest.approx(1, abs=1e-5)
    assert pair.agreement_se < 1e-4 and pair.compared == pair.pairs == 48
    assert pair.orderedness == pytest.approx(
        float(torch.corrcoef(torch.stack([order.double(), torch.arange(48)]))[0, 1])
    )
    # Controls at chance: random rows in 64 dimensions, and pairs that do not belong together.
    assert pair.stability_random < 0.4 and pair.shared_random == 0 and abs(pair.orderedness_random) < 0.4
    assert abs(pair.agreement_shuffled) < 0.05 and abs(pair.stability_shuffled) < 0.1
    same = consistency(a, a).pairs[0]
    assert same.orderedness == pytest.approx(1) and math.isnan(same.agreement)
    # A coder that nobody trained agrees no better than the control.
    [pair] = consistency(a, sl.TopK(64, 48, k=3, seed=7).eval(), x=world.x).pairs
    assert abs(pair.stability - pair.stability_random) < 0.05 and pair.agreement < 0.4 and pair.shared == 0


def test_equal_decoders_with_other_encoders_disagree(world):
    a, b = knows(world.dictionary, -0.4), knows(world.dictionary, -0.4)
    with torch.no_grad():
        b.W_enc.copy_(b.W_enc[:, torch.arange(48).roll(1)])
    [pair] = consistency(a, b, x=world.x).pairs
    assert pair.stability == pytest.approx(1) and abs(pair.agreement) < 0.05


def test_two_seeds_find_a_planted_dictionary(world):
    made = []
    for seed in (1, 2):
        coder = sl.TopK(64, 48, k=3, seed=seed)
        sl.train(coder, world.x, sl.TrainConfig(steps=250, batch_size=512, seed=seed))
        made.append(coder)
    [pair] = consistency(*made, x=world.x).pairs
    assert pair.stability > 0.8 and pair.shared > 0.7 and pair.agreement > 0.7, pair
    assert abs(pair.agreement_shuffled) < 0.1, pair
    assert consistency(made[0], world).pairs[0].stability > 0.8


def test_planted_drift_is_recovered(world):
    """Checkpoints of a dictionary that turns: the cosine of two is that of the angle between them."""
    aside = noise(48, 64, seed=5)
    aside = normalize(aside - (aside * world.dictionary).sum(1, keepdim=True) * world.dictionary, dim=1)
    angles = [0.0, 0.2, 0.4, 0.6]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    turned = [math.cos(t) * world.dictionary + math.sin(t) * aside for t in angles]
    turned[2] = turned[2][order]  # a checkpoint that numbers its features otherwise
    result = consistency(*map(knows, turned), x=world.x, names=["0", "1", "2", "3"], threshold=0.95)
    for pair in result.pairs:
        expected = math.cos(angles[int(pair.a)] - angles[int(pair.b)])
        assert pair.stability == pytest.approx(expected, abs=1e-5)
        assert pair.shared == (1 if expected >= 0.95 else 0)
        if pair.b == "2":
            assert torch.equal(pair.match.permutation, order)
    agreement = {(p.a, p.b): p.agreement for p in result.pairs}
    assert agreement["0", "1"] > agreement["0", "2"] > agreement["0", "3"] > 0.3
    assert result.neighbours == pytest.approx(math.cos(0.2), abs=1e-5) and result.neighbours > result.mean["stability"]


def test_layers_of_one_store(tiny_lm, small_text, tmp_path):
    sites = [sl.Site("resid_post", layer=layer) for layer in (0, 1, 2)]
    store = sl.harvest(tiny_lm, sites, small_text, tokens=2000, path=tmp_path, context=32)
    made = []
    for site in sites:
        coder = sl.TopK(tiny_lm.width(site), 96, k=8)
        sl.train(coder, store.at(site), sl.TrainConfig(steps=60, batch_size=256))
        made.append(coder)
    result = consistency(*made, x=[store.at(site) for site in sites], tokens=300, names=["0", "1", "2"])
    assert len(result.pairs) == 3 and 1 < result.documents < result.rows
    for pair in result.pairs:  # adjacent or not, matched features fire together more than shuffled ones
        assert pair.agreement > pair.agreement_shuffled + 0.05, pair
    text = repr(result)
    assert "0 | 2" in text and "pairs matched by decoder" in text and "documents" in text
    assert len(result.to_pandas()) == 3 and len(result.figures()) == 4
    with pytest.raises(ValueError, match="x must hold the same tokens for every coder"):
        consistency(*made[:2], x=[noise(40, 48), noise(50, 48)])


@pytest.mark.parametrize(
    ("coders", "change", "message"),
    [
        (1, {}, "consistency compares coders: give at least two, got 1"),
        (2, {"names": ["a", "a"]}, "names must be 2 different ones"),
        (2, {"threshold": 1.5}, "threshold is a cosine from -1 to 1, got 1.5"),
        (2, {"x": [torch.ones(9, 4)]}, "x must be one for all 2 coders, or one for each, got 1"),
        (2, {"x": torch.ones(9, 5)}, "x's last axis must be d_in=4"),
        (2, {"x": torch.ones(9, 4), "tokens": 1}, "tokens must be at least 2"),
    ],
)
def test_refusals(coders, change, message):
    with pytest.raises(ValueError, match=message):
        consistency(*[knows(torch.eye(4))] * coders, **change)
    with pytest.raises(ValueError, match="x needs coders that read it, got a Tensor: omit x"):
        consistency(knows(torch.eye(4)), torch.eye(4), x=torch.ones(9, 4))
    with pytest.raises(ValueError, match="rows of the same width"):
        consistency(torch.eye(4), torch.eye(5))


def test_transfer(tiny_lm, make_tiny, small_text, tmp_path):
    site = sl.Site("resid_post", layer=1)
    store = sl.harvest(tiny_lm, site, small_text, tokens=2000, path=tmp_path, context=32)
    coder = sl.TopK(tiny_lm.width(site), 128, k=8)
    sl.train(coder, store, sl.TrainConfig(steps=100, batch_size=256))
    text = small_text[:4]
    itself = transfer(coder, tiny_lm, text, other_lm=tiny_lm, tokens=200)
    assert itself.paired and itself.ce_difference == 0 and itself.ce_difference_se == 0
    other = transfer(coder, tiny_lm, text, other_lm=make_tiny("llama", seed=1), tokens=200)
    assert other.paired and other.elsewhere.fvu > other.at_home.fvu + 0.2  # another random model's directions
    words = transfer(coder, tiny_lm, text, other_text=["One two three four five six seven. " * 20], tokens=100)
    assert not words.paired and math.isnan(words.ce_difference_se)  # one document
    assert "elsewhere - at home" in repr(other) and "PCA" in repr(other) and len(other.to_pandas()) == 2
    with pytest.raises(ValueError, match="transfer compares two: give other_lm, other_text, or both"):
        transfer(coder, tiny_lm, text)
