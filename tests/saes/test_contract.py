"""What every family must do. One spec per family stands in tests/saes/conftest.py."""

import logging

import pytest
import torch

import sae_lab as sl
from sae_lab.saes import FAMILIES
from sae_lab.types import Batch, Codes, Output, Site, TokenMask
from tests.saes.conftest import D_IN, D_SAE, SPECS, make, normal

NONE_DEAD = torch.zeros(D_SAE, dtype=torch.bool)
# Float32 sums of some hundred terms: 1e-5 of the largest value leaves room for their order, none for a wrong formula.
ROUNDING = 1e-5


def near(a, b, tolerance=ROUNDING):
    assert a.shape == b.shape
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-6))


def test_every_family_has_a_spec_and_is_exported():
    assert SPECS.keys() == FAMILIES.keys()
    assert all(getattr(sl, name) is cls for name, cls in FAMILIES.items())


# ---- running


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_is_decode_of_encode(fitted, x, mode):
    fitted.train(mode == "train")
    out = fitted(x)
    assert isinstance(out, Output) and out.x_hat.dtype == torch.float32
    assert torch.equal(out.f, fitted.encode(x))
    assert near(out.x_hat, fitted.decode(out.f))
    assert (out.f >= 0).all() and 0 < (out.f > 0).float().mean() < 1
    assert near(out.pre, (x - fitted.b_dec) @ fitted.W_enc + fitted.b_enc)
    active = out.f > 0
    assert near(out.f[active], out.pre[active])


def test_leading_axes(fitted, x):
    flat, folded = fitted(x), fitted(x.view(2, 3, 4, D_IN))
    assert folded.x_hat.shape == (2, 3, 4, D_IN) and folded.f.shape == (2, 3, 4, D_SAE)
    assert torch.equal(folded.x_hat.reshape(24, -1), flat.x_hat) and torch.equal(folded.f.reshape(24, -1), flat.f)
    assert fitted.encode(x[0]).shape == (D_SAE,) and fitted(x[0]).x_hat.shape == (D_IN,)
    assert fitted.decode(folded.f).shape == (2, 3, 4, D_IN)


def test_sparse_codes_are_the_dense_ones(fitted, x):
    codes = fitted.sparse_codes(x)
    assert isinstance(codes, Codes) and (codes.values > 0).all() and not codes.values.requires_grad
    with torch.no_grad():
        assert torch.equal(codes.dense(), fitted.encode(x))


def test_rows_do_not_depend_on_their_mates_in_eval(fitted, x):
    whole = fitted.encode(x)
    for i in (0, 7):
        alone = fitted.encode(x[i : i + 1])
        assert torch.equal(alone > 0, whole[i : i + 1] > 0) and near(alone, whole[i : i + 1])
    loud = torch.cat([x, 100 * x])
    assert near(fitted.encode(loud)[:24], whole)


def test_bfloat16_input(fitted, x):
    half = x.bfloat16()
    out = fitted(half)
    assert out.x_hat.dtype == out.f.dtype == torch.float32
    assert torch.equal(out.x_hat, fitted(half.float()).x_hat)


def test_same_seed_same_weights(family):
    a, b, c = (FAMILIES[family](D_IN, D_SAE, seed=seed, **SPECS[family]) for seed in (3, 3, 4))
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    assert torch.equal(a.W_dec, a.W_enc.T) and near(a.W_dec.norm(dim=1), torch.ones(D_SAE))


# ---- training


def test_the_loss_is_a_dict_of_scalars(coder, x):
    terms = coder.loss(Batch(x, x), progress=0.5, dead=NONE_DEAD)
    assert "mse" in terms and all(t.shape == () and t.requires_grad for t in terms.values())
    mse = (coder(x).x_hat - x).pow(2).sum(1).mean()
    assert near(terms["mse"], mse)


def test_gradients_equal_a_dense_float64_reference(coder, x):
    """Autograd through the plain formula, with the codes that were chosen."""
    sum(coder.loss(Batch(x, x), progress=1.0, dead=NONE_DEAD).values()).backward()
    active = coder(x).f > 0
    p = {n: t.detach().double().requires_grad_() for n, t in coder.named_parameters()}
    x64 = x.double()
    pre = (x64 - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    f = torch.where(active, pre, 0.0)
    out = Output(f @ p["W_dec"] + p["b_dec"], f, pre)
    sum(coder.terms(Batch(x64, x64), out, progress=1.0, dead=NONE_DEAD).values()).backward()
    for name, parameter in coder.named_parameters():
        assert parameter.grad.abs().max() > 0
        assert near(parameter.grad.double(), p[name].grad), name


def test_the_loss_falls(coder):
    data = normal(256, 6, seed=1) @ normal(6, D_IN, seed=2)  # six directions: easy to learn
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-2)
    losses = []
    for step in range(50):
        loss = sum(coder.loss(Batch(data, data), progress=step / 50, dead=NONE_DEAD).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        coder.project()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]  # .02 to .5 measured over the families
    assert near(coder.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_fold(coder):
    """Weights that serve s·x, folded, serve x: the same features, codes and reconstructions in units of x."""
    scale, x = 3.7, normal(64, D_IN, seed=11)
    coder.calibrate([scale * normal(512, D_IN, seed=8)])
    before = coder(scale * x)
    coder.fold(scale)
    after = coder(x)
    assert near(scale * after.x_hat, before.x_hat) and near(scale * after.f, before.f)
    assert torch.equal(after.f > 0, before.f > 0)


def test_calibrate(coder):
    blocks = [normal(300, D_IN, seed=8), normal(100, D_IN, seed=7)]
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
    with torch.no_grad():
        coder.b_enc -= 1e6
    facts = coder.calibrate([normal(50, D_IN)])
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
    assert loaded.state_dict().keys() == fitted.state_dict().keys() >= {"W_enc", "W_dec", "b_enc", "b_dec", "f_scale"}
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.reads == loaded.writes == fitted.reads and loaded.site == Site("attn_z", 3, head=1)
    assert loaded.mask == mask and loaded.meta == fitted.meta
    assert loaded.fingerprint() == fitted.fingerprint() and torch.equal(loaded(x).x_hat, fitted(x).x_hat)


def test_an_unfitted_coder_survives_the_disk(coder, tmp_path):
    coder.save(tmp_path)
    assert sl.load(tmp_path).fingerprint() == coder.fingerprint()


def test_it_prints_what_it_is(family):
    coder = make(family)
    coder.reads = (Site("resid_post", 8),)
    text = repr(coder)
    assert text.startswith(f"{family}(d_in={D_IN}, d_sae={D_SAE}") and "at Site('resid_post', layer=8)" in text


# ---- refused


def test_wrong_width(fitted, x):
    for call in (fitted, fitted.encode, fitted.sparse_codes):
        with pytest.raises(ValueError, match=r"x's last axis must be d_in=16, got shape \(24, 15\)"):
            call(x[:, :15])
    with pytest.raises(ValueError, match=r"f's last axis must be d_sae=40, got shape \(24, 16\)"):
        fitted.decode(x)
    fitted.reads = (Site("resid_post", 8),)
    with pytest.raises(ValueError, match=r"d_in=16 \(trained at Site\('resid_post', layer=8\)\), got"):
        fitted(x[:, :15])


@pytest.mark.parametrize(("d_in", "d_sae"), [(0, 40), (16, -1)])
def test_widths_that_are_none(family, d_in, d_sae):
    with pytest.raises(ValueError, match="must be a positive integer, got"):
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
    with pytest.raises(ValueError, match=f"sparsity must be a number of at least 0, got {sparsity}"):
        sl.L1(D_IN, D_SAE, sparsity=sparsity)


def test_unfitted_batchtopk(x):
    coder = make("BatchTopK").eval()
    with pytest.raises(ValueError, match=r"no inference threshold yet: train it with sl.train, call sae.calibrate"):
        coder(x)
    assert (coder.train().encode(x) > 0).sum() <= 4 * 24
