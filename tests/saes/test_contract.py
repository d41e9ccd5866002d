"""What every family must do. One spec per family stands in tests/saes/conftest.py."""

import logging
import re

import pytest
import torch

import sae_lab as sl
from sae_lab.saes import FAMILIES, base
from sae_lab.types import Codes, Output, Site, TokenMask
from tests.saes import reference
from tests.saes.conftest import D_IN, D_SAE, SPECS, WIDTHS, batch_for, ids_for, make, normal, tokens_for

NONE_DEAD = torch.zeros(D_SAE, dtype=torch.bool)
# Float32 sums of some hundred terms: 1e-5 of the largest value leaves room for their order, none for a wrong formula.
ROUNDING = 1e-5


def near(a, b, tolerance=ROUNDING):
    assert a.shape == b.shape
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-6))


def test_every_family_is_at_the_door():
    """A class that a file of this room defines for others is a family, and ``sl`` hands it out."""
    assert all(getattr(sl, name) is cls for name, cls in FAMILIES.items())


# ---- running


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
def test_forward_is_decode_of_encode(fitted, x, mode, sparse_below, monkeypatch):
    """And both are the plain formulas."""
    monkeypatch.setattr(base, "SPARSE_BELOW", sparse_below)
    fitted.train(mode == "train")
    ids = ids_for(x, fitted)
    out = fitted(x, ids)
    assert not fitted.elementwise or isinstance(out.codes, Codes) == bool(sparse_below)
    assert isinstance(out, Output) and out.x_hat.dtype == torch.float32
    assert torch.equal(out.f, fitted.encode(x, ids))
    active = out.f > 0
    dense = reference.Dense(fitted, batch_for(x, fitted))
    assert near(out.f.double(), dense.codes(active))
    assert near(out.x_hat.double().flatten(1), dense.write(out.f.double()))
    if fitted.W_skip is None:
        assert near(out.x_hat, fitted.decode(out.f, ids))
    assert (out.f >= 0).all() and 0 < active.float().mean() < 1
    known = out.pre != 0  # Switch knows pre at a token's expert only
    assert near(out.pre[known].double(), dense.pre[known]) and (known | ~active).all()


def test_leading_axes(fitted, x):
    shape, ids = fitted.in_shape, ids_for(x, fitted)
    flat, folded = fitted(x, ids), fitted(x.view(2, 3, 4, *shape), ids.view(2, 3, 4))
    assert folded.x_hat.shape == (2, 3, 4, *fitted.out_shape) and folded.f.shape == (2, 3, 4, D_SAE)
    assert torch.equal(folded.x_hat.flatten(0, 2), flat.x_hat) and torch.equal(folded.f.flatten(0, 2), flat.f)
    assert fitted.encode(x[0]).shape == (D_SAE,)
    assert fitted(x[0], ids[0]).x_hat.shape == fitted.out_shape and fitted(x[0], ids[0]).f.shape == (D_SAE,)
    assert fitted.decode(folded.f, ids.view(2, 3, 4)).shape == (2, 3, 4, *fitted.out_shape)


def test_sparse_codes_are_the_dense_ones(fitted, x):
    codes = fitted.sparse_codes(x)
    assert isinstance(codes, Codes) and (codes.values > 0).all() and not codes.values.requires_grad
    with torch.no_grad():
        assert torch.equal(codes.dense(), fitted.encode(x))


def test_codes_of_many_rows_come_in_blocks_and_in_eval_mode(fitted, x, monkeypatch):
    monkeypatch.setattr(base, "CALIBRATION_ROWS", 5)
    with torch.no_grad():
        dense = torch.cat([fitted.encode(part) for part in x.split(5)])
        lengths = fitted.strengths(dense, x)
    fitted.train()
    for given in (x, x.split(7), iter(x.split(9))):
        codes = fitted.codes_of(given)
        assert near(codes.dense(), dense) and torch.equal(codes.dense() > 0, dense > 0)
        assert codes.offsets.dtype == codes.features.dtype == torch.long and not codes.values.requires_grad
    assert near(fitted.codes_of(x, strengths=True).dense(), lengths)
    assert fitted.training and fitted.codes_of(x[:0]).dense().shape == fitted.codes_of([x[:0]]).dense().shape == (0, 40)
    with pytest.raises(RuntimeError, match="half-way"), fitted.evaluating():
        assert not fitted.training
        raise RuntimeError("half-way")
    assert fitted.training


def test_rows_do_not_depend_on_their_mates_in_eval(fitted, x):
    whole = fitted.encode(x)
    for i in (0, 7):
        alone = fitted.encode(x[i : i + 1])
        assert torch.equal(alone > 0, whole[i : i + 1] > 0) and near(alone, whole[i : i + 1])
    loud = torch.cat([x, 100 * x])
    assert near(fitted.encode(loud)[:24], whole)


def test_bfloat16_input(fitted, x):
    half, ids = x.bfloat16(), ids_for(x, fitted)
    out = fitted(half, ids)
    assert out.x_hat.dtype == out.f.dtype == torch.float32
    assert torch.equal(out.x_hat, fitted(half.float(), ids).x_hat)


def test_same_seed_same_weights(family):
    a, b, c = (FAMILIES[family](WIDTHS.get(family, D_IN), D_SAE, seed=seed, **SPECS[family]) for seed in (3, 3, 4))
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    assert near(a.W_dec.norm(dim=1), torch.ones(D_SAE))
    if not a.transcodes:
        assert torch.equal(a.W_dec, a.W_enc.T)


# ---- training


def loss_of(coder, x, progress=1.0):
    coder.progress = progress
    return coder.loss(batch_for(x, coder), progress=progress, dead=NONE_DEAD)


def test_the_loss_is_a_dict_of_scalars(coder, x):
    terms = loss_of(coder, x, progress=0.5)
    assert "mse" in terms and all(t.shape == () and t.requires_grad for t in terms.values())


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])  # elementwise families choose their path by how many are on
def test_loss_and_gradients_equal_a_dense_float64_reference(coder, x, sparse_below, monkeypatch):
    """Autograd through the plain formulas of reference.py, with the features that were on."""
    monkeypatch.setattr(base, "SPARSE_BELOW", sparse_below)
    loss = sum(loss_of(coder, x).values())
    loss.backward()
    active = coder(x, ids_for(x, coder)).f > 0
    dense = reference.Dense(coder, batch_for(x, coder))
    expected = dense.objective(active)
    expected.backward()
    assert near(loss.detach().double(), expected.detach())
    for name, parameter in coder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert near(parameter.grad.double(), dense.p[name].grad), name


def low_rank(family, rows=256, seed=1):
    """Six directions: easy to learn."""
    data = normal(rows, 6, seed=seed) @ normal(6, D_IN, seed=2)
    return data.view(rows, 2, 8) if family == "Crosscoder" else data


def test_the_loss_falls(coder, family):
    data = low_rank(family)
    batch = batch_for(data, coder)
    if coder.transcodes:
        batch.target = data @ normal(D_IN, 12, seed=3) / 4
    coder.begin(batch)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-2)
    losses = []
    for step in range(50):
        loss = sum(coder.loss(batch, progress=step / 50, dead=NONE_DEAD).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        coder.project()
        losses.append(float(loss.detach()))
    # The penalties warm up and anneal, so the loss is compared at the end of the warm-up and after it.
    assert losses[-1] < FALL.get(family, 0.7) * losses[3], (losses[3], losses[-1])
    if family != "VQ":
        assert near(coder.W_dec.norm(dim=1), torch.ones(D_SAE))


# A code book that starts as data has little to learn; the rest measured .02 to .6.
FALL = {"VQ": 0.95}


def test_fold(coder, family):
    """Weights that serve s·x, folded, serve x: the same features, codes and reconstructions in units of x."""
    scale, x = 3.7, tokens_for(family, 64, seed=11)
    ids = ids_for(x, coder)
    coder.calibrate([scale * tokens_for(family, 512, seed=8)])
    before = coder(scale * x, ids)
    coder.fold(scale)
    after = coder(x, ids)
    assert near(scale * after.x_hat, before.x_hat)
    assert near(after.f if family == "VQ" else scale * after.f, before.f)  # words of a book have no unit
    assert torch.equal(after.f > 0, before.f > 0)


def test_l0_in_eval_is_that_of_training(family):
    """Within 5 %: 4096 tokens of four features each give it to about .7 %."""
    coder = make(family)
    coder.calibrate([tokens_for(family, 4096, seed=1)])
    new = tokens_for(family, 4096, seed=2)
    with torch.no_grad():
        l0 = {mode: float((coder.train(mode).encode(new) > 0).sum(1).float().mean()) for mode in (True, False)}
    assert l0[False] == pytest.approx(l0[True], rel=0.05)


def test_calibrate(coder, family):
    blocks = [tokens_for(family, 300, seed=8), tokens_for(family, 100, seed=7)]
    facts = coder.calibrate(blocks)
    assert not coder.training
    f = coder.encode(torch.cat(blocks)).detach()
    assert facts["tokens"] == 400 and facts["l0"] == pytest.approx(float((f > 0).sum()) / 400)
    assert facts["dead"] == pytest.approx(float((f == 0).all(0).float().mean()))
    for i in range(D_SAE):
        fires = f[:, i][f[:, i] > 0]
        # .999·(n-1) < n-1: of fewer than 1000 firings it is the strongest but one
        expected = fires.sort().values[int(0.999 * (len(fires) - 1))] if len(fires) else torch.tensor(0.0)
        assert coder.f_scale[i] == pytest.approx(float(expected), rel=1e-5)


def test_calibrate_where_nothing_fires(family):
    coder = make(family)
    if family == "VQ":  # one word is always the nearest
        assert coder.calibrate([tokens_for(family, 50, seed=0)])["l0"] == 1
        return
    with torch.no_grad():
        coder.b_enc -= 1e6
    facts = coder.calibrate([tokens_for(family, 50, seed=0)])
    assert facts == {"dead": 1.0, "tokens": 50, "l0": 0.0} and not coder.f_scale.any()


# ---- disk


def test_save_and_load(fitted, x, tmp_path, caplog):
    fitted.reads = fitted.writes = (Site("attn_z", 3, head=1),)
    mask = TokenMask((1, 2), True, {"attn_z-3-head1": 12.5})
    fitted.meta = {"mask": mask.to_dict(), "dead": 0.25, "dead_tokens": 1000, "model": "some/model"}
    assert fitted.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    with caplog.at_level(logging.WARNING):
        loaded = sl.load(tmp_path / "a" / "b")
    assert not caplog.records
    assert type(loaded) is type(fitted) and loaded.config == fitted.config and not loaded.training
    assert loaded.state_dict().keys() == fitted.state_dict().keys() >= {"b_dec", "f_scale"}
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.reads == loaded.writes == fitted.reads and loaded.site == Site("attn_z", 3, head=1)
    assert loaded.mask == mask and loaded.meta == fitted.meta
    assert loaded.fingerprint() == fitted.fingerprint()
    assert torch.equal(loaded(x, ids_for(x, fitted)).x_hat, fitted(x, ids_for(x, fitted)).x_hat)


def test_an_unfitted_coder_survives_the_disk(coder, tmp_path):
    coder.save(tmp_path)
    assert sl.load(tmp_path).fingerprint() == coder.fingerprint()


def test_it_prints_what_it_is(family):
    coder = make(family)
    coder.reads = (Site("resid_post", 8),)
    text = repr(coder)
    assert text.startswith(f"{family}(d_in={WIDTHS.get(family, D_IN)}, d_sae={D_SAE}")
    assert "at Site('resid_post', layer=8)" in text


# ---- refused


def test_wrong_width(fitted):
    x = normal(24, 15)
    expected = "x must end in (2, 8)" if len(fitted.in_shape) == 2 else "x's last axis must be d_in=16"
    for call in (fitted, fitted.encode, fitted.sparse_codes):
        with pytest.raises(ValueError, match=re.escape(expected + ", got shape (24, 15)")):
            call(x)
    with pytest.raises(ValueError, match=r"f's last axis must be d_sae=40, got shape \(24, 15\)"):
        fitted.decode(x)
    fitted.reads = (Site("resid_post", 8),)
    with pytest.raises(ValueError, match=re.escape(f"{expected} (trained at Site('resid_post', layer=8)), got")):
        fitted(x)


@pytest.mark.parametrize(("d_in", "d_sae"), [(0, 40), (16, -1)])
def test_widths_that_are_none(family, d_in, d_sae):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        FAMILIES[family](d_in, d_sae, **SPECS[family])


@pytest.mark.parametrize("feature", [-1, D_SAE, True, 1.5, "3", None, float("nan")])
def test_feature_out_of_range(coder, feature):
    with pytest.raises(ValueError, match="feature must be an int from 0 to 39, got "):
        coder.feature(feature)


def test_feature_in_range(coder):
    assert coder.feature(0) == 0 and coder.feature(39) == 39 and coder.feature(torch.tensor(7)) == 7


def test_no_site_yet(coder):
    assert coder.mask is None
    with pytest.raises(ValueError, match=r"does not know its site: train it on a store, or set sae.reads = "):
        _ = coder.site


@pytest.mark.parametrize("name", ["TopK", "BatchTopK"])
def test_bad_k(name):
    for k in (0, -3, 41):
        with pytest.raises(ValueError, match=f"k must be an integer from 1 to d_sae=40, got {k}"):
            FAMILIES[name](D_IN, D_SAE, k=k)
    for k_aux in (0, -1):
        with pytest.raises(ValueError, match=f"k_aux must be a positive integer, or None for d_in/2, got {k_aux}"):
            FAMILIES[name](D_IN, D_SAE, k=4, k_aux=k_aux)


@pytest.mark.parametrize("sparsity", [-1.0, float("nan")])
def test_bad_sparsity(sparsity):
    with pytest.raises(ValueError, match=f"sparsity must be a number.*, got {sparsity}"):
        sl.L1(D_IN, D_SAE, sparsity=sparsity)


def test_unfitted_batchtopk():
    x = normal(24, D_IN)
    coder = make("BatchTopK").eval()
    with pytest.raises(ValueError, match=r"no inference threshold yet: train it with sl.train, call sae.calibrate"):
        coder(x)
    assert (coder.train().encode(x) > 0).sum() <= 4 * 24
