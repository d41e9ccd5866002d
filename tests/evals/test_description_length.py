"""description_length: the bits by hand, its controls, and whether it finds the true L0 of a planted world."""

import math

import numpy as np
import pytest
import torch

import sae_lab as sl

# The sums that one pass keeps, against sums over dense codes.
from sae_lab.evals.codelength import _Sums, bits_at, description_length, gaussian_bits
from sae_lab.evals.sampling import encoded, nonzero, sample
from sae_lab.stats import jackknife


def coder(W_dec, W_enc=None, b_enc=0.0):
    """An eval-mode ReLU coder with these weights."""
    made = sl.L1(W_dec.shape[1], W_dec.shape[0], sparsity=1.0).eval()
    with torch.no_grad():
        made.W_dec.copy_(W_dec)
        made.W_enc.copy_(W_dec.T if W_enc is None else W_enc)
        made.b_enc.fill_(b_enc)
    return made


def gaussian(rows, scales, seed=0):
    return torch.randn(rows, len(scales), generator=torch.Generator().manual_seed(seed)) * torch.tensor(scales)


def identity(d):
    return coder(torch.cat([torch.eye(d), -torch.eye(d)]))


def test_gaussian_bits_by_hand():
    # Level 1 for both: ½·log₂ 16 + ½·log₂ 4 = 3. Total distortion 1 + 1.
    assert gaussian_bits(torch.tensor([16.0, 4.0]), 2.0) == pytest.approx(3)
    # The third is under the level 1 and costs nothing: it leaves its own .5 as error.
    assert gaussian_bits(torch.tensor([0.5, 16.0, 4.0]), 2.5) == pytest.approx(3)
    assert gaussian_bits(torch.tensor([16.0, 4.0]), 20.0) == 0
    assert gaussian_bits(torch.zeros(3), 0.1) == 0


def test_bits_by_hand():
    # Two features on orthogonal directions. The first fires in half the rows, with values of variance 4, the second in
    # all of them, with variance 1. v = 1: ½·½·log₂ 4 + 0 bits; errors ½·1 and 1.
    counts = torch.tensor([50.0, 100.0]).double()
    sums = torch.tensor([50 * 3.0, 100 * 2.0]).double()
    squares = torch.tensor([50 * (4 + 9.0), 100 * (1 + 4.0)]).double()
    zero = torch.zeros(2).double()
    stats = _Sums(torch.tensor(100.0), counts, sums, squares, zero, torch.diag(zero))
    bits = bits_at(stats, torch.eye(2), distortion=0.5, v=1.0)
    assert bits.which == pytest.approx(1)
    assert bits.values == pytest.approx(0.5)
    assert bits.residual == pytest.approx(0.5 * math.log2(0.5 / 0.25) + 0.5 * math.log2(1 / 0.25))
    assert bits.total == bits.which + bits.values + bits.residual


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.tensor([1.0, 4.0, 2.0, 9.0]).double()
    without = [(values.sum() - v) / 3 for v in values]
    assert jackknife(map(float, without)) == pytest.approx(float(values.std() / 2))
    assert math.isnan(jackknife([1.0]))


def test_codes_that_are_zero_are_left_out():
    codes = sl.types.Codes(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 1, 1]), torch.tensor([0, 2, 2, 3]), 3)
    kept = nonzero(codes)
    assert kept.features.tolist() == [0, 1] and kept.offsets.tolist() == [0, 1, 1, 2]
    assert torch.equal(kept.dense(), codes.dense()) and torch.equal(nonzero(codes.dense()).dense(), codes.dense())


def test_all_zeros_cost_the_whole_residual_and_the_identity_pays_for_dense_codes():
    x = gaussian(4000, [4.0, 2.0, 1.0, 0.5])
    silent = coder(torch.eye(4), b_enc=-1000.0)
    result = description_length([silent, identity(4)], x, rho=0.1)
    assert result.l0[0] == 0 and result.which[0] == result.values[0] == 0
    assert result.bits[0] == pytest.approx(result.dense)
    assert result.fvu[0] == pytest.approx(1, abs=0.01) and result.fvu[1] == pytest.approx(0, abs=1e-8)
    # Each coordinate has two features of which one fires in every other row: two bits a coordinate, and values beside.
    assert result.which[1] == pytest.approx(8, abs=0.02) and result.values[1] > 0
    assert result.bits[1] > 2 * result.dense
    assert result.best is silent and "no coder is shorter than the dense code" in repr(result)


def test_pca_of_any_rank_costs_what_the_dense_code_does():
    x = gaussian(4000, [4.0, 2.0, 1.0, 0.5])
    centred = (x - x.mean(0)).double()
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(x))
    dense = gaussian_bits(variances, 0.1 * float(variances.sum()))
    assert description_length(identity(4), x, rho=0.1).dense == pytest.approx(dense, rel=1e-5)
    level = (0.1 * float(variances.sum()) - float(variances[0])) / 3  # the last is left out whole
    assert float(variances[0]) < level < float(variances[1])
    for rank in (1, 2, 4):  # signed dense codes: they always fire, so that which of them costs nothing
        f, rows = centred @ axes[:, -rank:], axes[:, -rank:].T
        error = centred - f @ rows
        stats = _Sums(
            torch.tensor(float(len(x))), torch.full((rank,), float(len(x))).double(), f.sum(0), (f**2).sum(0),
            error.sum(0), error.T @ error,
        )  # fmt: skip
        bits = bits_at(stats, rows.float(), 0.1 * float(variances.sum()), level)
        assert bits.which == 0 and bits.total == pytest.approx(dense, rel=1e-4)


@pytest.fixture(scope="module")
def trained():
    """(world, BatchTopK coders of several k)."""
    world = sl.worlds.planted(n=32, d=16, l0=2, noise=0.1, samples=10_000, seed=1)
    coders = []
    for k in (1, 2, 3, 4):
        made = sl.BatchTopK(16, 32, k=k)
        sl.train(made, world.x, sl.TrainConfig(steps=250, batch_size=512))
        coders.append(made)
    return world, coders


def test_the_least_is_at_the_true_l0(trained):
    world, coders = trained
    result = description_length(coders, world.x, rho=0.1)
    i = result.best_index
    assert abs(result.l0[i] - world.l0) < 0.25 * world.l0  # measured: 2.00 for 2.01
    assert not result.at_edge and result.bits[i] < 0.8 * result.dense  # measured: 16.5 bits, dense 23.1
    assert all(b > 3 * se for j, (b, se) in enumerate(zip(result.behind, result.behind_se, strict=True)) if j != i)
    # The control in which there is nothing to find: an untrained coder of the same L0.
    random = sl.TopK(16, 32, k=2, seed=9).eval()
    assert description_length(random, world.x, rho=0.1).bits[0] > 1.5 * result.bits[i]
    # A larger distortion than the true coder leaves is bought with fewer features.
    assert description_length(coders, world.x, rho=0.5).best.config["k"] == 1


def test_the_table(trained):
    world, coders = trained
    result = description_length(coders[:2], world.x, tokens=2000)
    assert result.rows == result.documents == 2000 and result.behind[result.best_index] == 0
    text = repr(result)
    assert "< least" in text and "dense code of x" in text and "an end of the L0s tried" in text
    assert len(result.to_pandas()) == 2 and result.figures()[0].control == result.dense
    assert all(se > 0 for se in result.bits_se)


def test_a_store_is_measured_on_documents_that_training_did_not_see(tiny_lm, small_text, tmp_path):
    site = sl.Site("resid_post", layer=1)
    store = sl.harvest(tiny_lm, site, small_text, tokens=1500, path=tmp_path, context=32)
    made = sl.TopK(tiny_lm.width(site), 96, k=8).eval()
    rows, reserved = sample(store, 100, made), store._split[1]
    assert len(rows.x) == 100 and set(rows.number.tolist()) <= set(reserved[np.arange(len(reserved))])
    assert rows.tokens is not None and torch.equal(rows.tokens, store.rows(rows.number.numpy(), "token"))
    codes, x_hat = encoded(made, rows)
    assert torch.allclose(codes.dense(), made.encode(rows.x)) and torch.allclose(x_hat, made(rows.x).x_hat, atol=1e-6)
    result = description_length(made, store)
    assert result.documents < result.rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": 0.0}, "rho, the distortion over the variance, must be above 0 and below 1, got 0.0"),
        ({"tokens": 1}, "tokens must be at least 2, got 1"),
        ({"coders": []}, "no coder given: pass at least one"),
        ({"coders": sl.TopK(4, 8, k=2)}, "eval mode, got TopK.* in training: call sae.eval()"),
        ({"coders": sl.TopK(4, 8, k=2, d_out=4).eval()}, "needs coders that reconstruct what they read"),
        ({"coders": [sl.TopK(4, 8, k=2).eval(), sl.TopK(5, 8, k=2).eval()]}, "coders must read one width"),
        ({"x": torch.ones(9, 4)}, "x has no variance: all its rows are equal"),
        ({"x": torch.full((9, 4), math.nan)}, "x holds NaN or Inf"),
        ({"x": gaussian(9, [1.0] * 5)}, "x's last axis must be d_in=4"),
        ({"x": torch.ones(9, 4, dtype=torch.long)}, "activations must be a float tensor"),
    ],
)
def test_refusals(change, message):
    given = {"coders": identity(4), "x": gaussian(50, [1.0] * 4)} | change
    with pytest.raises(ValueError, match=message):
        description_length(given.pop("coders"), given.pop("x"), **given)
