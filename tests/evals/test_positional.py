"""evals.positional on features that we made of positions, and on features that know nothing of them."""

import math

import numpy as np
import pytest
import torch

import sae_lab as sl

# The sums of a pass, against dense codes.
from sae_lab.evals.position_features import _Tally, positional, rotated, variance_by_bin
from sae_lab.saes import kernels
from sae_lab.types import Codes, Site

SITE = Site("resid_pre", layer=0)


def codes_of(dense):
    return kernels.above(dense, 0.0)


def r2_of(f, positions, bins, seed=0):
    """(R², R² of rotated positions) of dense codes."""
    edges = np.unique(np.linspace(0, positions.max() + 1, bins + 1).astype(int))[:-1]
    tally = _Tally(len(edges), f.shape[1], seed)
    for rows in torch.arange(len(f)).split(100):
        tally.add(codes_of(f[rows]), positions[rows.numpy()], edges)
    return [variance_by_bin(tally.sums[i], tally.counts[i], tally.squares) for i in (0, 1)]


def test_r2_by_hand():
    positions = np.array([0, 1, 0, 1])
    f = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 1.0, 0.0], [3.0, 0.0, 2.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    # feature 0: means 2 and 0 about 1, variance 1+1+4+1=... Σ(f-1)² = 0+1+4+1 = 6, between 2·1+2·1 = 4
    # feature 2: all of it; feature 3: means 0 and .5 about .25: between 4·.0625 = .25 of .75; feature 1 never fires
    found, _ = r2_of(f, positions, 2)
    assert found[[0, 2, 3]].tolist() == pytest.approx([4 / 6, 1.0, 1 / 3]) and math.isnan(float(found[1]))


def test_r2_is_that_of_a_regression_on_bins():
    random = np.random.default_rng(0)
    positions = np.tile(np.arange(40), 30)
    f = np.maximum(random.normal(0, 1, (1200, 5)) + np.sin(positions / 6)[:, None] * np.arange(5), 0)
    dummies = np.eye(8)[positions // 5]
    residual = f - dummies @ np.linalg.lstsq(dummies, f, rcond=None)[0]
    by_hand = 1 - residual.var(0) / f.var(0)
    found, _ = r2_of(torch.tensor(f, dtype=torch.float32), positions, 8)
    assert found.numpy() == pytest.approx(by_hand, abs=1e-5)
    assert by_hand[4] > 0.3, "there was something to find"


def test_the_control_is_at_chance_and_keeps_bursts():
    random = np.random.default_rng(0)
    positions = np.tile(np.arange(1, 65), 200)
    f = torch.tensor(random.random((len(positions), 40)) < 0.1).float()
    own, control = r2_of(f, positions, 16)
    chance = 15 / (len(positions) - 1)
    assert float(own.mean()) == pytest.approx(chance, rel=0.25) and float(control.mean()) == pytest.approx(
        chance, rel=0.25
    )
    # A feature of positions: all of it by its own positions, none by rotated ones.
    f = torch.tensor((positions < 8) * 1.0)[:, None].float()
    own, control = r2_of(f, positions, 8)
    assert float(own[0]) == pytest.approx(1.0) and float(control[0]) < 0.1, "measured: 7/200"
    # In bursts over few contexts chance is higher, and the control says so. Measured, ten rotations: 2.4 times as high.
    f = torch.zeros(200, 64)
    f[:4, 20:40] = 1
    controls = [float(r2_of(f.reshape(-1, 1), positions, 16, seed)[1][0]) for seed in range(10)]
    assert np.mean(controls) > 1.7 * chance


def test_rotation_stays_within_a_context():
    positions = np.array([1, 2, 3, 1, 2, 1, 5, 9])
    moved = rotated(positions, np.random.default_rng(0))
    assert sorted(moved[:3]) == [1, 2, 3] and sorted(moved[3:5]) == [1, 2] and sorted(moved[5:]) == [1, 5, 9]
    ones = rotated(np.array([1, 1, 1]), np.random.default_rng(0))
    assert ones.tolist() == [1, 1, 1], "contexts of one kept token each"
    many = [rotated(positions, np.random.default_rng(s))[0] for s in range(50)]
    assert set(many) == {1, 2, 3}


def gpt2_that_counts(make_tiny):
    """A GPT-2 whose first coordinate at the first layer is the position over 32, and nothing else."""
    lm = make_tiny("gpt2", seed=3)
    with torch.no_grad():
        lm._module.transformer.wpe.weight[:, 0] = torch.arange(len(lm._module.transformer.wpe.weight)) / 32
        lm._module.transformer.wte.weight[:, 0] = 0
    return lm


def counting_coder(lm):
    """Feature 0: the position. 1: early ones. 2: another coordinate, which tokens make. 3: never."""
    coder = sl.L1(lm.width(SITE), 4)
    with torch.no_grad():
        coder.W_enc.zero_()
        coder.W_enc[0, 0], coder.W_enc[0, 1], coder.W_enc[5, 2] = 1.0, -8.0, 1.0
        coder.b_enc.copy_(torch.tensor([0.0, 2.0, 0.0, -1.0]))
    coder.reads = coder.writes = (SITE,)
    coder.meta = {"context": 32}
    return coder.eval()


def test_layer_0_of_a_model_with_position_embeddings(make_tiny, small_text, tmp_path):
    lm = gpt2_that_counts(make_tiny)
    coder = counting_coder(lm)
    r = positional(coder, lm, small_text, tokens=2000, bins=16, min_firings=10)
    assert r.strong == 2 and r.strong_shuffled == 0 and set(r.best[:2]) == {0, 1} and r.features == 3
    assert float(r.r2[0]) > 0.99 and float(r.r2[1]) > 0.8 and float(r.r2[2]) < 0.1 and math.isnan(float(r.r2[3]))
    assert r.largest_shuffled < 0.1
    profile = r.profile[:, 0]
    assert bool((profile.diff() > 0).all()), "further on, stronger"

    store = sl.harvest(lm, SITE, small_text, tokens=2600, path=tmp_path / "store", context=32)
    of_store = positional(coder, lm, store, bins=16, min_firings=10)
    assert of_store.strong == 2 and of_store.tokens == len(store)
    for tokens in (500, 2000):  # it is read 2,048 rows at a time
        assert positional(coder, lm, store, tokens=tokens, bins=16, min_firings=10).tokens == tokens
    assert of_store.to_pandas()["feature"].tolist()[-1] == 2 and "positions rotated" in repr(of_store)


def test_random_directions_and_degenerate_coders(tiny_lm, small_text):
    coder = sl.TopK(48, 96, k=4)
    coder.reads = coder.writes = (Site("resid_post", layer=1),)
    r = positional(coder.eval(), tiny_lm, small_text, tokens=1000, context=32, min_firings=5)
    assert r.strong == 0 and r.mean_shuffled < 0.2
    assert isinstance(codes_of(torch.ones(2, 3)), Codes)
    with torch.no_grad():
        coder.W_enc.zero_()
    with pytest.raises(ValueError, match="no feature fires on min_firings=5 of"):
        positional(coder, tiny_lm, small_text, tokens=500, context=32, min_firings=5)


def test_what_positional_refuses(make_tiny, tiny_lm, small_text, tmp_path):
    coder = sl.TopK(48, 96, k=4).eval()
    coder.reads = coder.writes = (Site("resid_post", layer=1),)
    with pytest.raises(ValueError, match="bins must be at least 2, got 1"):
        positional(coder, tiny_lm, small_text, bins=1)
    with pytest.raises(ValueError, match="tokens must be at least 2, got 1"):
        positional(coder, tiny_lm, small_text, tokens=1)
    with pytest.raises(ValueError, match="the text is empty"):
        positional(coder, tiny_lm, [""], context=32)
    store = sl.harvest(tiny_lm, Site("resid_post", layer=1), small_text, tokens=300, path=tmp_path / "s", context=32)
    with pytest.raises(ValueError, match="reads d_in=40, the store holds width 48"):
        positional(sl.TopK(40, 80, k=4).eval(), tiny_lm, store)
