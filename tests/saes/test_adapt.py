"""What can be done to any coder: start it from data, revive features, undo shrinkage, re-solve codes, realign."""

import pytest
import torch

import sae_lab as sl
from sae_lab.saes import inform, optimise_codes, realign, resample, unsuppress
from sae_lab.types import Batch
from tests.saes.conftest import D_SAE, batch_for, make, normal, tokens_for


@pytest.fixture(scope="module")
def world():
    return sl.worlds.planted(n=128, d=64, l0=4, samples=40_000)


@pytest.fixture(scope="module")
def trained(world):
    """A BatchTopK that knows its world well (FVU about .07)."""
    coder = sl.BatchTopK(64, 128, k=4, seed=1)
    sl.train(coder, world.x, sl.TrainConfig(steps=600, batch_size=512, lr=1e-2, dead_after=5000))
    return coder


@torch.no_grad()
def fvu(coder, x):
    return float((x - coder(x).x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


# ---- informed initialisation


def test_data_points_are_a_better_start_than_chance(world):
    """Published: an MMCS near .65 at step 0. Measured here: .65 and .62, and .32 for random directions."""
    informed, random = sl.TopK(64, 128, k=4, seed=1), sl.TopK(64, 128, k=4, seed=1)
    inform(informed, world.x[:20_000])
    match, control = sl.match(informed, world), sl.match(random, world)
    assert min(match.a_to_b, match.b_to_a) > 0.5 > max(control.a_to_b, control.b_to_a) + 0.1
    assert torch.allclose(informed.W_dec, informed.W_enc.T, atol=1e-6) and not informed.b_dec.any()


def test_every_family_can_start_from_data(family):
    coder, batch = make(family), None
    batch = batch_for(tokens_for(family, 200, seed=1), coder)
    inform(coder, batch, share=1.0)
    if family not in ("Crosscoder", "MatrixSAE"):  # masks and ranks change directions
        points = torch.nn.functional.normalize(batch.target - sl.saes.losses.geometric_median(batch.target), dim=1)
        assert ((coder.W_dec @ points.T).max(1).values > 1 - 1e-5).all()
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 2"):
        inform(coder, batch, share=2)


# ---- dead features


def test_revived_features_fire(family):
    coder = make(family).train()
    batch = batch_for(tokens_for(family, 400, seed=1), coder)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[3, 17, 39]] = True
    before = {n: t.clone() for n, t in coder.state_dict().items()}
    with torch.no_grad():
        if "b_enc" in before:
            coder.b_enc[dead] -= 50
    assert resample(coder, batch, dead, seed=2) == 3
    alive = ~dead
    assert torch.allclose(coder.W_dec[alive], make(family).W_dec[alive], atol=1e-6)
    assert not torch.isclose(coder.W_dec[dead], make(family).W_dec[dead]).all(1).any()
    if "b_enc" in before:
        assert (coder.b_enc[dead] > -1).all(), "as the live features' are"
    assert resample(coder, batch, torch.zeros(D_SAE, dtype=torch.bool)) == 0
    with pytest.raises(ValueError, match=r"dead must be a bool for each of d_sae=40 features, got \(3,\)"):
        resample(coder, batch, torch.ones(3, dtype=torch.bool))


def test_resampling_takes_badly_reconstructed_tokens():
    """One token in a hundred is far off: its direction is what a dead feature becomes."""
    coder = sl.TopK(8, 16, k=2)
    x = torch.cat([0.01 * normal(99, 8), 10 * torch.eye(8)[:1]])
    dead = torch.zeros(16, dtype=torch.bool)
    dead[5] = True
    resample(coder, x, dead)
    assert float(coder.W_dec[5, 0]) == pytest.approx(1.0, abs=1e-4)
    others = coder.W_enc[:, ~dead].norm(dim=0).mean()
    assert float(coder.W_enc[:, 5].norm()) == pytest.approx(0.2 * float(others), rel=1e-4)


# ---- shrinkage


def test_unsuppress_by_hand():
    """A decoder row of half the length it ought to have is doubled; selection and codes stay."""
    x = normal(200, 4).abs()
    coder = sl.L1(4, 4)
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(4))
        coder.W_dec.copy_(torch.diag(torch.tensor([1.0, 0.5, 0.8, 1.25])))
    coder.eval()
    better = unsuppress(coder, x)
    assert torch.allclose(better.W_dec, torch.eye(4), atol=2e-3)
    assert torch.equal(better.encode(x), coder.encode(x)) and coder.W_dec[1, 1] == 0.5, "the coder itself is as it was"


@pytest.mark.parametrize("name", ["Tied", "MatrixSAE", "VQ"])
def test_what_is_tied_is_not_rescaled(name):
    with pytest.raises(ValueError, match=f"{name} ties its decoder to other weights: it cannot be changed"):
        unsuppress(make(name), normal(8, 16))
    with pytest.raises(ValueError, match=f"{name} ties its decoder to other weights: it cannot be changed"):
        realign(make(name), normal(8, 16))


# ---- codes


def test_optimised_codes_solve_the_least_squares_problem():
    coder, x = make("TopK", k=4).eval(), normal(30, 16, seed=3)
    codes, ours = coder.sparse_codes(x), optimise_codes(coder, x)
    assert torch.equal(ours.features, codes.features) and torch.equal(ours.offsets, codes.offsets)
    f = ours.dense()
    gradient = ((x - f @ coder.W_dec - coder.b_dec) @ coder.W_dec.T).detach()
    on = codes.dense() > 0
    # Karush-Kuhn-Tucker: no pull where a code is positive, none upward where it is held at 0.
    assert (f >= 0).all() and gradient[on & (f > 0)].abs().max() < 1e-3 and gradient[on & (f == 0)].max() < 1e-3


def test_better_codes_than_the_encoders(world):
    """Published: at the same features, +.01 explained variance. Measured: FVU .152 to .131; with pursuit .116."""
    trained = sl.TopK(64, 128, k=4, seed=1)
    sl.train(trained, world.x, sl.TrainConfig(steps=400, batch_size=512, lr=1e-2, dead_after=5000))
    x = world.x[-4000:]

    def left(codes):
        error = x - (codes.dense() @ trained.W_dec + trained.b_dec).detach()
        return float(error.pow(2).sum() / (x - x.mean(0)).pow(2).sum())

    encoder, same = left(trained.sparse_codes(x)), left(optimise_codes(trained, x))
    pursued = left(optimise_codes(trained, x, k=4))
    assert same < encoder - 0.01 and pursued < same
    assert len(optimise_codes(trained, x[:10], k=4).values) == 40
    with pytest.raises(ValueError, match="k must be an integer from 1 to d_sae=128, got 0"):
        optimise_codes(trained, x, k=0)


def test_codes_of_every_family(family):
    coder = make(family)
    coder.calibrate([tokens_for(family, 512, seed=8)])
    batch = batch_for(tokens_for(family, 40, seed=5), coder)
    target = batch.target.flatten(1)

    def error(codes):
        rows = coder._rows(batch.x)[0]
        return float((target - coder._write(codes, rows, batch.tokens).detach()).pow(2).sum())

    assert error(optimise_codes(coder, batch)) < error(coder.sparse_codes(batch.x))


# ---- another distribution


@pytest.mark.parametrize("shift", ["rotation", "dictionary"])
def test_realignment_recovers_more_than_half_the_gap(world, trained, shift):
    """On tokens it was not fitted on. Measured: .57 of the gap where all directions turn, .92 where each feature's
    direction moves by itself and the mean with it."""
    generator = torch.Generator().manual_seed(5)
    if shift == "rotation":
        turn = torch.randn(64, 64, generator=generator)
        there = world.x @ torch.linalg.matrix_exp(0.5 * (turn - turn.T) / 16).T
    else:
        moved = torch.nn.functional.normalize(torch.randn(128, 64, generator=generator), dim=1)
        moved = torch.nn.functional.normalize(world.dictionary + 0.6 * moved, dim=1)
        there = world.f @ moved + 0.5 * torch.randn(64, generator=generator)
    before = trained.fingerprint()
    ours = realign(trained, there[:20_000])
    inside, outside, after = fvu(trained, world.x[-8000:]), fvu(trained, there[-8000:]), fvu(ours, there[-8000:])
    assert outside > inside + 0.1 and (outside - after) / (outside - inside) > 0.5
    assert trained.fingerprint() == before and torch.equal(ours.W_enc, trained.W_enc)
    x = there[:50]
    assert torch.equal(ours.encode(x) > 0, trained.encode(x) > 0), "the encoder is as it was"
    with pytest.raises(ValueError, match="rank must be an integer from 1 to d_out=64, got 65"):
        realign(trained, there[:1000], rank=65)


def test_a_transcoder_is_asked_for_its_target():
    coder = make("Transcoder")
    for call in (inform, unsuppress, optimise_codes, realign):
        with pytest.raises(ValueError, match=r"a transcoder needs a target: pass sl.Batch\(x, target\)"):
            call(coder, normal(8, 16))
    coder.calibrate([normal(512, 16, seed=8)])
    x = normal(400, 16, seed=1)
    batch = Batch(x, x @ normal(16, 12, seed=2))
    better = realign(coder, batch)
    assert (better(x).x_hat - batch.target).pow(2).sum() < 0.5 * (coder(x).x_hat - batch.target).pow(2).sum()
