"""evals.by_position on coders whose numbers are known, and evals.hill on a curve that we drew."""

import importlib
import math

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.activations.contexts import spread_contexts
from sae_lab.activations.reconstructing import read_and_reconstruct, reconstruction
from sae_lab.evals.positions import by_position, hill
from sae_lab.stats import clustered_error, ratio_difference, ratio_error
from sae_lab.types import Site

SITE = Site("resid_post", layer=1)
SMALL = {"tokens": 600, "context": 48}


def wired(coder, context=24, site=SITE):
    coder.reads = coder.writes = (site,)
    coder.meta = {"context": context}
    return coder.eval()


def identity(d=48, **kwargs):
    """relu(x) - relu(-x)."""
    coder = sl.L1(d, 2 * d)
    with torch.no_grad():
        coder.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)], dim=1))
        coder.W_dec.copy_(coder.W_enc.T)
    return wired(coder, **kwargs)


def only_bias(mean):
    coder = sl.L1(48, 96)
    with torch.no_grad():
        coder.W_enc.zero_()
        coder.W_dec.zero_()
        coder.b_dec.copy_(mean)
    return wired(coder)


def whole(lm, text, tokens, context):
    return [c for c in spread_contexts(lm, text, tokens, context) if len(c.ids) == context]


# ---- errors of ratios and differences


def test_errors_by_hand():
    top, bottom = torch.tensor([1.0, 3.0, 2.0, 4.0]), torch.tensor([2.0, 2.0, 4.0, 4.0])
    clusters = torch.tensor([0, 0, 1, 1])
    # ratio 10/12; residuals 1-5/3, 3-5/3, 2-10/3, 4-10/3 sum to 2/3 and -2/3: √(2·2·(2/3)²)/4/3
    assert ratio_error(top, bottom, clusters) == pytest.approx(math.sqrt(2 * 2 * (2 / 3) ** 2) / 12)
    assert ratio_error(top, torch.ones(4), clusters) == pytest.approx(clustered_error(top, clusters))
    one = torch.tensor([True, False, True, False])
    # means 1.5 and 3.5; influences -.25, .25, .25, -.25 sum to nothing in each cluster
    ones = torch.ones(4)
    assert ratio_difference(top, ones, one, ~one, clusters) == pytest.approx((-2.0, 0.0), abs=1e-12)
    # with each token its own cluster: √(4/3·4·.25²)
    assert ratio_difference(top, ones, one, ~one, torch.arange(4))[1] == pytest.approx(math.sqrt(4 / 3 * 4 * 0.25**2))
    assert all(map(math.isnan, ratio_difference(top, ones, one, one & ~one, clusters)))


def test_the_error_of_a_ratio_is_that_of_many_draws():
    random = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(300):
        document = np.repeat(random.normal(0, 0.3, 30), 10)
        bottom = np.exp(document + random.normal(0, 0.2, 300))
        top = 0.5 * bottom * np.exp(np.repeat(random.normal(0, 0.2, 30), 10))
        clusters = torch.arange(30).repeat_interleave(10)
        ratios.append(top.sum() / bottom.sum())
        errors.append(ratio_error(torch.tensor(top), torch.tensor(bottom), clusters))
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.15)  # measured: within 6 %


# ---- by position


def test_the_identity_recovers_all_and_the_mean_nothing(repeater, repeated):
    r = by_position(identity(), repeater, repeated, **SMALL)
    assert r.edges == (0, 2, 3, 6, 12, 24, 36, 48) and r.trained == 24
    assert math.isnan(r.ce_recovered[0]), "token 1 is predicted from token 0 alone, which is left out"
    assert math.isnan(r.ce_recovered[1]), "of 13 tokens at position 2, what ablation costs is within its error"
    assert r.ce_recovered[2:] == (1.0,) * 5 and r.ce_delta == (0.0,) * 7 and r.fvu == (0.0,) * 7 and r.rise == 0.0

    contexts = whole(repeater, repeated, 600, 48)
    read = read_and_reconstruct(identity(), repeater, contexts)
    coder = only_bias(read.y[read.kept].double().mean(0).float())
    r = by_position(coder, repeater, repeated, **SMALL)
    # As in tests/evals/test_evals.py: the two means differ in their last bits.
    assert r.ce_recovered[2:] == pytest.approx((0.0,) * 5, abs=1e-3)
    assert r.fvu == pytest.approx((1.0,) * 7, abs=1e-5)
    assert max(abs(v) for v in r.ce_delta) > 0.01, "the mean does change the loss"


def test_bins_add_up_to_the_whole(tiny_lm, small_text):
    """Weighted by their tokens, bins give what reconstruction finds on the same contexts."""
    coder = wired(sl.TopK(48, 96, k=4))
    contexts = whole(tiny_lm, small_text, 600, 48)
    texts = [tiny_lm.tokenizer.decode(c.ids[1:]) for c in contexts]
    r = by_position(coder, tiny_lm, small_text, edges=(0, 10, 30, 48), **SMALL)
    one = by_position(coder, tiny_lm, small_text, edges=(0, 48), **SMALL)
    counts = np.array([9, 20, 18])  # predicted tokens a context in each bin: not the first
    assert np.dot(counts, r.ce_delta) / 47 == pytest.approx(one.ce_delta[0], rel=1e-5)
    assert np.dot(counts, r.ce_clean) / 47 == pytest.approx(one.ce_clean[0], rel=1e-5)
    assert len(texts) * 48 == r.tokens == one.tokens
    assert min(r.fvu) < one.fvu[0] < max(r.fvu)
    assert one.ce_delta_se[0] > 0 and one.documents == len({c.documents[0] for c in contexts})


def test_one_bin_is_reconstruction(tiny_lm):
    """Documents that are whole contexts: both evals then read the same tokens."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(words, 60)) for _ in range(4)]
    coder = wired(sl.TopK(48, 96, k=4))
    contexts = whole(tiny_lm, texts, 10_000, 20)
    assert contexts
    r = by_position(coder, tiny_lm, texts, tokens=10_000, context=20, edges=(0, 20))
    full = read_and_reconstruct(coder, tiny_lm, contexts)
    kept, y = full.kept, full.y[full.kept].double()
    fvu = (y - full.y_hat[kept]).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    assert r.fvu[0] == pytest.approx(float(fvu), rel=1e-5)
    whole_text = reconstruction(coder, tiny_lm, texts, tokens=10_000, context=20)
    assert r.ce_delta[0] == pytest.approx(whole_text.ce_delta, abs=3 * whole_text.ce_delta_se + 0.05)


def test_a_coder_that_fails_late_rises(tiny_lm, small_text, monkeypatch):
    """The identity up to the training context, zero beyond: all of the rise is there."""
    module = importlib.import_module("sae_lab.evals.positions")

    real = module.read_and_reconstruct

    def late(coder, lm, contexts, site=None):
        read = real(coder, lm, contexts, site)
        return read._replace(y_hat=torch.where((read.positions < 24)[:, None], read.y, torch.zeros(())))

    monkeypatch.setattr(module, "read_and_reconstruct", late)
    r = by_position(identity(), tiny_lm, small_text, **SMALL)
    inside = [i for i, edge in enumerate(r.edges[1:]) if edge <= 24]
    assert all(r.fvu[i] == 0 and abs(r.ce_delta[i]) < 1e-5 for i in inside)
    assert r.fvu[-1] > 0.5 and r.fvu_rise > 0.5 and r.fvu_rise_se < 0.2 * r.fvu_rise
    assert abs(r.rise) > 0.01, "a random model need not be worse for it"


def test_nothing_beyond_is_undefined(tiny_lm, small_text):
    r = by_position(wired(sl.TopK(48, 96, k=4), context=48), tiny_lm, small_text, tokens=300, context=48)
    assert math.isnan(r.rise) and math.isnan(r.fvu_rise)
    assert "undefined" in repr(r) and "whole contexts of 48 only" in repr(r)
    assert len(r.to_pandas()) == len(r.edges) - 1 and len(r.figures()) == 2 * (len(r.edges) - 1) + 2


def test_what_by_position_refuses(tiny_lm, small_text):
    coder = identity()
    with pytest.raises(ValueError, match=r"edges must be two or more increasing positions from 0 to context=48, got"):
        by_position(coder, tiny_lm, small_text, edges=(0, 30, 20), **SMALL)
    with pytest.raises(ValueError, match="edges must be"):
        by_position(coder, tiny_lm, small_text, edges=(0, 64), **SMALL)
    with pytest.raises(ValueError, match=r"needs two documents of at least context=200 tokens, got 0"):
        by_position(coder, tiny_lm, ["too short", "as well"], context=200)
    with pytest.raises(ValueError, match="context must lie between 2 and the 256"):
        by_position(coder, tiny_lm, small_text, context=300)
    with pytest.raises(ValueError, match="tokens must be positive, got 0"):
        by_position(coder, tiny_lm, small_text, tokens=0)


# ---- Hill


def curve(l0, half, n):
    s, h = 1 / np.asarray(l0, float), 1 / half
    return s**n / (s**n + h**n)


def test_hill_finds_the_curve_that_was_drawn():
    l0 = np.array([4, 8, 16, 32, 64, 128])
    r = hill(list(zip(l0, 1 - curve(l0, 5.0, 1.3), strict=True)))
    assert (r.half_l0, r.slope) == pytest.approx((5.0, 1.3), rel=1e-6) and r.rmse < 1e-8 < r.line_rmse
    assert r.lost_at(5.0) == pytest.approx(0.5) and r.lost_at(32) == pytest.approx(curve(32, 5.0, 1.3))
    assert "straight line" in repr(r) and "6 coders of L0 4.0 to 128.0" in repr(r)


def test_hills_errors_are_those_of_many_draws():
    random = np.random.default_rng(0)
    l0 = np.array([4, 8, 16, 32, 64, 128])
    fits = [hill(list(zip(l0, 1 - curve(l0, 5.0, 1.3) + random.normal(0, 0.01, 6), strict=True))) for _ in range(200)]
    # From 4 residual degrees of freedom a standard error comes out some 6 % small on average.
    assert np.mean([f.slope_se for f in fits]) == pytest.approx(np.std([f.slope for f in fits]), rel=0.2)
    assert np.mean([f.half_l0_se for f in fits]) == pytest.approx(np.std([f.half_l0 for f in fits]), rel=0.2)


def test_hill_is_no_better_than_a_line_on_a_line():
    l0 = np.array([4.0, 8, 16, 32, 64])
    r = hill([(k, 1 - 0.8 / k) for k in l0])
    assert r.line_rmse < 1e-9 < r.rmse


def test_no_share_is_given_in_bins_where_ablation_costs_nothing(tiny_lm, small_text):
    r = by_position(identity(), tiny_lm, small_text, **SMALL)  # a model with random weights
    assert all(math.isnan(share) for share in r.ce_recovered) and "recovered undefined" in repr(r)


def test_hill_of_reconstructions(repeater, repeated):
    """Coders that keep more and more: the identity scaled towards the mean would, and L0 is what we say it is."""
    results = [
        reconstruction(wired(sl.TopK(48, 96, k=k)), repeater, repeated, tokens=200, context=24) for k in (2, 8, 32)
    ]
    r = hill(results)
    assert r.l0 == tuple(x.l0 for x in results) and r.lost == pytest.approx([1 - x.ce_recovered for x in results])


def test_what_hill_refuses():
    with pytest.raises(ValueError, match="three different L0 at least, got 0"):
        hill([])
    with pytest.raises(ValueError, match="three different L0 at least, got 2"):
        hill([(1.0, 0.5), (2.0, 0.6), (2.0, 0.7)])
    with pytest.raises(ValueError, match="L0 above 0"):
        hill([(0.0, 0.0), (2.0, 0.6), (3.0, 0.7)])
