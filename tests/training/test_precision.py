"""TrainConfig(precision=): what is rounded, what stays float32, and what a device that lacks it says."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import sae_lab as sl
from sae_lab.saes import kernels
from sae_lab.training import config as configs
from sae_lab.training import loop
from sae_lab.training.checkpoint import CHECKPOINT

D, D_SAE = 16, 64
X = sl.worlds.planted(n=40, d=D, l0=3, samples=2000).x
HALF_STEP = 2.0**-8  # bfloat16 keeps 8 bits: the largest share by which rounding changes a number


def config(**more):
    return sl.TrainConfig(**{"steps": 20, "batch_size": 64, "dead_after": 300, "checkpoint_every": 5, **more})


@pytest.fixture
def bf16(monkeypatch):
    """Any device may multiply bfloat16: a CPU without the instructions does so slowly, with the same numbers."""
    monkeypatch.setattr(configs, "_multiplies_bfloat16", lambda device: True)


def test_only_the_numbers_of_a_product_are_rounded():
    a, b = (torch.randn(30, 30, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    exact = a.bfloat16().double() @ b.bfloat16().double()
    found = kernels.product(a, b, "bf16")
    assert found.dtype == torch.float32
    # The sum is that of the rounded numbers, and is rounded once more; a small sum of large parts has their error.
    allowed = HALF_STEP * exact.abs() + 1e-5 * (a.abs() @ b.abs()).double()
    assert bool(((found - exact).abs() <= allowed).all())
    assert not torch.equal(found, a @ b)  # the control: float32 differs
    assert torch.equal(kernels.product(a, b, "float32"), a @ b)


@pytest.mark.parametrize("family", ["TopK", "L1", "Gated"])  # sparse codes; dense ones; a product in its own terms
def test_a_training_in_bf16(family, bf16, tmp_path):
    made, seen = {}, []
    for precision in ("float32", "bf16"):
        coder = getattr(sl, family)(D, D_SAE, **({"k": 4} if family == "TopK" else {"sparsity": 0.3}))

        def look(event):
            training_dtypes = {p.dtype for p in event.coder.parameters()}
            seen.append((training_dtypes, event.coder.precision))

        made[precision] = sl.train(coder, X, config(precision=precision), callbacks=[look])
    fvu = {name: run.history[-1]["fvu"] for name, run in made.items()}
    assert fvu["bf16"] != fvu["float32"] and abs(fvu["bf16"] / fvu["float32"] - 1) < 0.05  # of 64 sums rounded to 2^-8
    assert all(dtypes == {torch.float32} and precision == "float32" for dtypes, precision in seen)  # between steps
    coder = made["bf16"].coder
    assert coder.precision == "float32" and coder.meta["train"]["precision"] == "bf16"
    assert sl.load(coder.save(tmp_path / "coder")).W_dec.dtype == torch.float32


def test_a_checkpoint_holds_float32_and_goes_on_in_its_own_precision(bf16, tmp_path):
    def stop(event):
        if event.kind == "checkpoint":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sl.train(sl.TopK(D, D_SAE, k=4), X, config(precision="bf16"), path=tmp_path, callbacks=[stop])
    tensors = load_file(tmp_path / CHECKPOINT)
    assert {t.dtype for name, t in tensors.items() if t.is_floating_point()} == {torch.float32}
    assert any(name.startswith("adam.exp_avg") for name in tensors)
    with pytest.raises(ValueError, match="precision: 'bf16' there, 'float32' now"):
        sl.train(sl.TopK(D, D_SAE, k=4), X, config(), path=tmp_path)
    resumed = sl.train(sl.TopK(D, D_SAE, k=4), X, config(precision="bf16"), path=tmp_path)
    unbroken = sl.train(sl.TopK(D, D_SAE, k=4), X, config(precision="bf16"))
    assert torch.equal(resumed.coder.W_dec, unbroken.coder.W_dec)


def test_a_run_of_before_there_was_a_choice_was_float32(tmp_path):
    import json

    run = sl.train(sl.TopK(D, D_SAE, k=4), X, config(), path=tmp_path)
    file = tmp_path / "run.json"
    header = json.loads(file.read_text())
    del header["config"]["precision"], header["checksum"]
    file.write_text(json.dumps(header))
    again = sl.train(sl.TopK(D, D_SAE, k=4), X, config(), path=tmp_path)
    assert torch.equal(again.coder.W_dec, run.coder.W_dec)


def test_a_precision_that_the_device_lacks(monkeypatch):
    with pytest.raises(ValueError, match="precision must be one of float32, tf32, bf16, got 'fp16'"):
        config(precision="fp16")
    with pytest.raises(ValueError, match="'tf32' needs an NVIDIA GPU from 2020 on, and the coder lies on cpu"):
        sl.train(sl.TopK(D, D_SAE, k=4), X, config(precision="tf32"))
    monkeypatch.setattr(configs, "_multiplies_bfloat16", lambda device: False)
    for call in (sl.train, lambda *args: sl.estimate(sl.train, *args)):
        with pytest.raises(ValueError, match="needs a device that multiplies bfloat16, and this CPU does not"):
            call(sl.TopK(D, D_SAE, k=4), X, config(precision="bf16"))


def test_an_estimate_tries_the_steps_in_their_precision(bf16, monkeypatch):
    asked = []
    real = sl.SparseCoder.multiplying
    monkeypatch.setattr(sl.SparseCoder, "multiplying", lambda self, p: asked.append(p) or real(self, p))
    sl.estimate(sl.train, sl.TopK(D, D_SAE, k=4), X, config(precision="bf16"))
    assert set(asked) == {"bf16"}


def test_a_step_that_fails_leaves_products_in_float32(bf16):
    coder = sl.TopK(D, D_SAE, k=4)
    with pytest.raises(ZeroDivisionError), coder.multiplying("bf16"):
        assert coder.precision == "bf16"
        raise ZeroDivisionError
    assert coder.precision == "float32"


def test_what_the_loop_knows_of_dead_features():
    """Whether a feature is dead is known from the last step's figures, unless somebody changed the counts since."""
    coder = sl.TopK(D, D_SAE, k=4)
    with torch.no_grad():
        coder.b_enc[:10] = -100.0  # they never fire
    training = loop.Training(coder, loop.Rows(X), config(dead_after=10**6), None, ())
    training.begin()
    training.one_step()
    assert training._any_dead() is False and "auxk" not in training.history[-1]  # no other figure says what is known
    training.idle[:10] = 10**7
    assert training._any_dead() is None
    training.one_step()
    assert training._any_dead() is True and training.history[-1]["auxk"] > 0
    assert training.history[-1]["dead"] == int((training.idle > 10**6).sum()) / D_SAE > 0


# ---- coders that were cast


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_coder_that_was_cast_computes_in_float32(cast, tmp_path):
    coder = sl.BatchTopK(D, D_SAE, k=4)
    sl.train(coder, X, config())
    made = getattr(copy.deepcopy(coder), cast)()
    assert torch.equal(made.W_enc, getattr(coder.W_enc, cast)().float())
    for x in (X[:50], getattr(X[:50], cast)()):
        assert made(x).x_hat.dtype == torch.float32
    loaded = sl.load(made.save(tmp_path / cast))
    assert torch.equal(loaded.W_enc, made.W_enc) and loaded.W_enc.dtype == torch.float32
    sl.train(made, X, config(steps=2))  # trained on, it is as any other
    assert made.W_enc.dtype == torch.float32


def test_weights_put_in_another_dtype_are_refused_in_a_sentence():
    coder = sl.TopK(D, D_SAE, k=4).eval()
    for p in coder.parameters():
        p.data = p.data.bfloat16()
    coder.reads = coder.writes = (sl.Site("resid_post", 0),)
    for call in (lambda: coder(X), lambda: coder.encode(X), lambda: coder.codes_of(X), lambda: coder.portable()):
        with pytest.raises(ValueError, match=r"in float32, and this one's weights are torch.bfloat16: sae.float"):
            call()
    with pytest.raises(ValueError, match="computes in float32"):
        sl.train(coder, X, config())
    assert coder.float()(X).x_hat.dtype == torch.float32


# ---- a model in bfloat16


def test_a_model_in_bfloat16(make_module, tokenizer, small_text, tmp_path):
    """Activations are float32 copies, edits are rounded as the model's own stream is, and the figures are near those of
    the same model in float32."""
    module = make_module("llama", len(tokenizer))
    full = sl.LM(copy.deepcopy(module), tokenizer=tokenizer)
    half = sl.LM(module.bfloat16(), tokenizer=tokenizer)
    site, text = sl.Site("resid_post", 1), [t[:200] for t in small_text[:6]]
    x, y = (lm.read(text[0], site)[site] for lm in (half, full))
    assert x.dtype == torch.float32 and torch.equal(x, x.bfloat16().float())  # no digits are made up
    assert float((x - y).norm() / y.norm()) < 0.05  # a dozen roundings of 2^-9 each, in three layers
    store = sl.harvest(half, site, text, tokens=200, path=tmp_path / "store", context=32)
    coder = sl.TopK(48, 64, k=8)
    sl.train(coder, store, config())
    feature = int(coder.f_scale.argmax())
    for edit in (
        sl.Steer(coder, feature, 0.0),
        sl.Clamp(coder, feature, 1.0),
        sl.Ablate(coder, feature),
        sl.Splice(coder),
    ):
        assert bool(half.logits(text[0], edits=[edit]).isfinite().all())
    base = half.logits(text[0])
    assert torch.equal(half.logits(text[0], edits=[sl.Steer(coder, feature, 0.0)]), base)
    found, known = (sl.evals.reconstruction(coder, lm, text, tokens=150) for lm in (half, full))
    assert abs(found.fvu / known.fvu - 1) < 0.1  # of the same coder on activations that differ by 1 in 50
