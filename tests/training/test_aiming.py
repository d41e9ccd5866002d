"""Training seen rightly: figures of held-out tokens beside the batch's, and an L0 that is reached because it was asked
for."""

import logging
import math

import pytest
import torch
from torch.nn import functional as F

import sae_lab as sl
from sae_lab.activations.store import Rows
from sae_lab.saes import losses
from sae_lab.training import watching
from sae_lab.training.aiming import Aim
from tests.training.test_loop import same

D, N = 16, 64


@pytest.fixture(scope="module")
def x():
    """Sums of 3 of 32 unit directions, with a little noise."""
    g = torch.Generator().manual_seed(0)
    dictionary = F.normalize(torch.randn(32, D, generator=g), dim=1)
    codes = torch.zeros(6_000, 32).scatter_(1, torch.rand(6_000, 32, generator=g).topk(3).indices, 1.0)
    return (codes * (1 + torch.rand(codes.shape, generator=g))) @ dictionary + 0.1 * torch.randn(6_000, D, generator=g)


def config(target=None, steps=300, **more):
    given = {"steps": steps, "batch_size": 128, "lr": 5e-3, "target_l0": target, "log_every": 5}
    return sl.TrainConfig(**given | more)


def unseen(rows):
    return Rows(rows).reserved(10**6)


def l0_of(coder, rows):
    return float((coder.encode(rows) > 0).sum(1).float().mean())


# ---- held-out figures


@pytest.mark.parametrize("family", ["TopK", "L1", "BatchTopK"])
def test_held_out_figures_stand_beside_the_batch(x, family):
    """At the last step they are those of the finished coder on the tokens that no batch held."""
    coder = getattr(sl, family)(D, N)
    run = sl.train(coder, x, config(steps=40, batch_size=4096, log_every=1))
    table = run.to_pandas()
    held = table.dropna(subset="fvu_held_out")
    assert held["step"].tolist() == [16, 32, 40], "once in 65,536 tokens, and at the end"
    batch = Rows(x).watched
    assert len(batch.x) == len(unseen(x)) < 2048
    seen = {tuple(row) for row in Rows(x).batch(0, Rows(x).training_rows).x.tolist()}
    assert not any(tuple(row) in seen for row in batch.x.tolist())
    fvu = float(losses.fvu(coder(batch.x).x_hat.detach(), batch.x))
    assert held["fvu_held_out"].iloc[-1] == pytest.approx(fvu, rel=0.02)  # BatchTopK's threshold is another's
    assert held["l0_held_out"].iloc[-1] == pytest.approx(l0_of(coder, batch.x), rel=0.02)
    assert f"held-out FVU {fvu:.2f}"[:-1] in repr(run)


def test_a_coder_that_learns_by_heart_shows_it():
    """Noise can only be learnt by heart: the batch's FVU falls, that of held-out tokens does not."""
    noise = torch.randn(1200, D, generator=torch.Generator().manual_seed(0))
    row = sl.train(sl.TopK(D, 512, k=2), noise, config(steps=200, lr=2e-2)).history[-1]
    assert row["fvu_held_out"] > row["fvu"] + 0.05


def test_data_too_small_to_hold_any_out(x):
    run = sl.train(sl.TopK(D, N, k=3), x[:300], config(steps=3, log_every=1))
    assert "fvu_held_out" not in run.to_pandas() and "held-out" not in repr(run)


# ---- the target


@pytest.mark.parametrize(
    ("family", "arguments", "share"),
    [("JumpReLU", {}, 0.05), ("L1", {}, 0.1), ("L1", {"drop": 0.1}, 0.1), ("Gated", {}, 0.1),
     ("PAnneal", {}, 0.1)],
)  # fmt: skip
def test_the_target_is_reached_in_eval_mode_on_held_out_tokens(x, family, arguments, share):
    coder = getattr(sl, family)(D, N, **arguments)
    run = sl.train(coder, x, config(6.0))
    held = unseen(x)
    assert run.reached.l0 == pytest.approx(l0_of(coder, held)) and run.reached.tokens == len(held)
    assert (run.reached.target, run.reached.tolerance) == (6.0, share) and run.reached.within
    assert coder.meta["reached"] == run.reached._asdict()
    path = run.to_pandas().set_index("step")["coefficient"]
    if family == "JumpReLU":
        assert coder.sparsity == coder.config["sparsity"] == 1.0 and path.nunique() == 1
    else:
        assert path.loc[240:].nunique() == 1, "it rests for the last fifth"
        assert path.loc[:235].nunique() > 20 and path.iloc[-1] == coder.sparsity == coder.config["sparsity"]
    assert coder.target_l0 is None


def test_without_a_target_l0_is_another(x):
    """The control: the same coder with its own sparsity."""
    coder = sl.L1(D, N, sparsity=0.1)
    assert sl.train(coder, x, config()).reached is None
    assert l0_of(coder, unseen(x)) > 9 and "reached" not in coder.meta


def test_a_target_that_is_missed_is_said(x, caplog):
    with caplog.at_level(logging.WARNING):
        run = sl.train(sl.L1(D, N, sparsity=1e-4), x, config(2.0, steps=10))
    assert not run.reached.within and run.reached.l0 > 4
    assert "not within 10 % of target_l0=2: train for more steps" in caplog.text
    assert f"measured on {len(unseen(x))} held-out tokens, fewer than 50000" in caplog.text


def test_data_of_which_nothing_is_held_out_says_so(x):
    run = sl.train(sl.L1(D, N), x[:300], config(6.0, steps=20, batch_size=64))
    assert run.reached.tokens == 0 and run.reached.l0 == pytest.approx(l0_of(run.coder, x[:300]))


@pytest.mark.parametrize("family", ["JumpReLU", "L1"])
@pytest.mark.parametrize("at", [5, 50])
def test_a_resumed_run_is_an_unbroken_one(x, family, at, tmp_path):
    def stop(event):
        if event.kind == "step" and event.step == at:
            raise KeyboardInterrupt

    def fresh():
        return getattr(sl, family)(D, N, sparsity=0.5)

    whole = sl.train(fresh(), x, config(6.0, steps=60))
    left = fresh()
    with pytest.raises(KeyboardInterrupt):
        sl.train(left, x, config(6.0, steps=60), path=tmp_path, callbacks=[stop])
    assert left.sparsity == left.config["sparsity"] == 0.5 and left.target_l0 is None
    run = sl.train(fresh(), x, config(6.0, steps=60), path=tmp_path)
    assert same(run.coder, whole.coder)
    assert run.history == whole.history and run.reached == whole.reached and run.coder.sparsity == whole.coder.sparsity
    opened = sl.train(fresh(), x, config(6.0, steps=60), path=tmp_path)
    assert opened.reached == run.reached and opened.history == run.history
    with pytest.raises(ValueError, match=r"config target_l0: 6.0 there, 7.0 now"):
        sl.train(fresh(), x, config(7.0, steps=60), path=tmp_path)


@pytest.mark.parametrize(
    ("coder", "target", "words"),
    [
        (sl.TopK(D, N, k=3), 6, "target_l0=6 needs a penalty, and a TopK has none: leave it out and set k=6"),
        (sl.Matryoshka(D, N, k=3), 6.0, "a Matryoshka has none: leave it out and set k=6"),
        (sl.VQ(D, N), 6, "target_l0=6 needs a penalty, and a VQ has none: train a JumpReLU, L1 or Gated"),
        (sl.L1(D, N), 64, "target_l0 must be below d_sae=64, got 64"),
        (sl.L1(D, N, sparsity=0), 6, "with target_l0 the coder's sparsity must be above 0, got 0"),
    ],
)
def test_targets_that_are_refused(x, coder, target, words):
    with pytest.raises(ValueError, match=words):
        sl.train(coder, x, config(target))
    with pytest.raises(ValueError, match=words):
        sl.sweep([coder], x, config(target))


@pytest.mark.parametrize("target", [0, -3, math.inf])
def test_numbers_that_are_no_target(target):
    with pytest.raises(ValueError, match="target_l0 must be a positive number"):
        config(target)


def test_nobody_else_sets_the_sparsity(x):
    found = []

    def change(event):
        if event.kind == "step" and not found:
            with pytest.raises(ValueError, match="target_l0 sets sparsity in this training, got sparsity=2"):
                event.control.set(sparsity=2)
            event.control.set(lr=1e-4)
            found.append(event)

    run = sl.train(sl.L1(D, N), x, config(6.0, steps=20), callbacks=[change])
    assert [c["what"] for c in run.changes] == ["lr"]
    with pytest.raises(ValueError, match="target_l0 sets sparsity in this training"):
        sl.train(sl.L1(D, N), x, config(6.0), changes=[{"step": 3, "what": "sparsity", "new": 2}])


def test_the_quadratic_penalty_of_a_jumprelu(x):
    """By hand: the loss term and its slope in L0, near the target and far from it."""
    for target, slope in ((10.0, 50 * (12 / 10 - 1)), (14.0, 50 * (12 / 14 - 1)), (4.0, 50 * 0.25)):
        coder = sl.JumpReLU(4, 12, sparsity=2.0).train()
        coder.target_l0 = target
        with torch.no_grad():
            coder.W_enc.zero_()
            coder.b_enc.fill_(0.2)  # all 12 are on, within the kernel around the threshold of .1
        batch = sl.Batch(torch.zeros(8, 4), torch.zeros(8, 4))
        term = coder.loss(batch, progress=1.0, dead=torch.zeros(12, dtype=torch.bool))["sparsity"]
        held = max(target, 12 / 1.25)
        assert term.item() == pytest.approx(2 * 25 * held * (12 / held - 1) ** 2)
        (gradient,) = torch.autograd.grad(term, coder.threshold)
        assert gradient == pytest.approx(torch.full((12,), -2 * slope / 0.5))  # ∂L0/∂θ is -1/ε


def test_a_jumprelu_with_a_target_starts_near_it(x):
    first = sl.train(sl.JumpReLU(D, N), x, config(3.0, steps=1, log_every=1, lr=1e-12)).history[0]["l0"]
    plain = sl.train(sl.JumpReLU(D, N), x, config(steps=1, log_every=1, lr=1e-12)).history[0]["l0"]
    assert first == pytest.approx(12, rel=0.1) and plain > 24


def test_the_controller_follows_what_held_out_tokens_say():
    """Held-out tokens have 1.5 times the batch's L0: the batch's is brought to two thirds of the target."""
    coder = sl.L1(D, N, sparsity=1.0)
    aim = Aim(coder, 6.0)
    for step in range(4000):
        l0 = 20 * coder.sparsity**-0.7
        aim.follow(l0, 4000, step / 4000)
        if step % 100 == 0:
            aim.correct(1.5 * l0, l0)
    assert 1.5 * l0 == pytest.approx(6, rel=0.06)  # measured: 4.4 %


# ---- watch


@pytest.fixture(scope="module")
def store(make_tiny, small_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aiming") / "store"
    return sl.harvest(make_tiny("llama"), "layers.1", small_text, 2000, context=32, path=folder)


def test_watch(store, make_tiny, small_text, monkeypatch):
    lm, text = make_tiny("llama"), small_text
    settings = {"steps": 8, "batch_size": 64, "log_every": 4}
    plain = sl.train(sl.BatchTopK(48, 64, k=4), store, sl.TrainConfig(**settings))
    short = sl.train(sl.BatchTopK(48, 64, k=4), store, sl.TrainConfig(**settings), watch=(lm, text))
    assert "ce_delta" not in short.to_pandas(), "two hundredths of so short a training are too little for it"
    monkeypatch.setattr(watching, "CE_SHARE", 1e9)
    run = sl.train(sl.BatchTopK(48, 64, k=4), store, sl.TrainConfig(**settings), watch=(lm, text))
    assert same(run.coder, plain.coder)
    assert run.to_pandas()["ce_delta"].notna().all()
    wide = sl.train(sl.TopK(48, 64, k=64), store, sl.TrainConfig(steps=150, batch_size=64, log_every=150, lr=1e-2),
                    watch=(lm, text))  # fmt: skip
    exact = sl.evals.reconstruction(wide.coder, lm, text, tokens=1024)
    assert wide.history[-1]["ce_delta"] == pytest.approx(exact.ce_delta, abs=1e-4)


def test_what_cannot_be_watched(store, make_tiny, small_text, x):
    train, settings = sl.train, sl.TrainConfig(steps=2, batch_size=64)
    with pytest.raises(ValueError, match=r"watch is a model and held-out text, watch=\(lm, text.held_out\), got"):
        train(sl.TopK(48, 64, k=4), store, settings, watch=(small_text, make_tiny("llama")))
    with pytest.raises(ValueError, match="its site, which only a store or a stream knows: train on one of them"):
        train(sl.TopK(D, N, k=4), x, settings, watch=(make_tiny("llama"), small_text))
    with pytest.raises(ValueError, match="watch needs the model of the store, LlamaForCausalLM, got"):
        train(sl.TopK(48, 64, k=4), store, settings, watch=(make_tiny("gpt2"), small_text))
