"""Steering a training that runs: what is asked for is done at the right step, written down, and can be done again."""

import inspect
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.training.checkpoint import CHECKPOINT
from tests.training.test_loop import D_IN, D_SAE, coder, config, header, planted, same, state, stopper


@pytest.fixture(scope="module")
def data():
    return 7 * planted(2000, n=20, d=D_IN)[0] + 3


def at(step, **what):
    """A callback that changes something after a step."""
    return lambda event: event.kind == "step" and event.step == step and event.control.set(**what)


def stop_at(step):
    return lambda event: event.kind == "step" and event.step == step and event.control.stop()


FAMILIES = {
    "TopK": ({"k": 3}, 2), "BatchTopK": ({"k": 3}, 2), "Matryoshka": ({"k": 3}, 2), "Ordered": ({"k": 3}, 2),
    "Switch": ({"k": 3, "experts": 2}, 2), "LeakyTopK": ({"k": 3}, 2), "Spline": ({"k": 3}, 2),
    "L1": ({"sparsity": 0.3}, 3.0), "JumpReLU": ({"sparsity": 0.3}, 3.0), "Gated": ({"sparsity": 0.3}, 3.0),
    "PAnneal": ({"sparsity": 0.3}, 3.0), "Tied": ({"sparsity": 0.3}, 3.0),
}  # fmt: skip


# ---- what changes


def test_the_learning_rate_changes_between_two_steps(data):
    run = sl.train(coder(), data, config(warmup=0.0, decay=0.0), callbacks=[at(10, lr=1e-3)])
    assert [row["lr"] for row in run.history] == [3e-3] * 10 + [1e-3] * 20
    assert run.changes == [{"step": 10, "what": "lr", "old": 3e-3, "new": 1e-3}] and not run.stopped
    assert "lr 0.003 to 0.001 at step 10" in repr(run) and run.coder.meta["changes"] == run.changes


def test_the_schedule_keeps_its_shape(data):
    plain = sl.train(coder(), data, config())
    run = sl.train(coder(), data, config(), callbacks=[at(10, lr=6e-3)])
    assert [row["lr"] for row in run.history[10:]] == pytest.approx([2 * row["lr"] for row in plain.history[10:]])
    assert run.history[:10] == plain.history[:10] and run.history[10]["loss"] == plain.history[10]["loss"]
    assert run.history[11]["loss"] != plain.history[11]["loss"]


@pytest.mark.parametrize("name", FAMILIES)
def test_sparsity_changes(name, data, tmp_path):
    """L0 or the penalty at the very next step, and the config of what is saved; then the same again as planned."""
    arguments, new = FAMILIES[name]
    make = lambda: getattr(sl, name)(D_IN, D_SAE, **arguments)  # noqa: E731
    what, old = next(iter(arguments.items()))
    run = sl.train(make(), data, config(), path=tmp_path / "run", callbacks=[at(20, sparsity=new)])
    plain = sl.train(make(), data, config())
    assert run.changes == [{"step": 20, "what": what, "old": old, "new": new}]
    assert run.history[:20] == plain.history[:20]
    before, after = plain.history[20], run.history[20]
    if what == "k" and name != "LeakyTopK":
        assert after["l0"] < before["l0"]
    elif what == "sparsity":
        assert after["sparsity"] == pytest.approx(10 * before["sparsity"], rel=1e-4)
    loaded = sl.load(tmp_path / "run")
    assert loaded.config[what] == new and getattr(loaded, what) == new and same(loaded, run.coder)
    again = sl.train(make(), data, config(), changes=run.changes)
    assert same(again.coder, run.coder) and again.history == run.history and again.changes == run.changes


@pytest.mark.parametrize("name", sl.saes.FAMILIES)
def test_every_family_says_what_sets_its_sparsity(name):
    arguments = inspect.signature(sl.saes.FAMILIES[name]).parameters
    expected = next((what for what in ("k", "sparsity") if what in arguments), None)
    assert sl.saes.FAMILIES[name].sparsity_name == expected and (expected is None) == (name == "VQ")


def test_ordered_keeps_its_own_start_of_k(data):
    free, fixed = sl.Ordered(D_IN, D_SAE, k=3), sl.Ordered(D_IN, D_SAE, k=3, k_start=5)
    free.set_sparsity(4)
    assert (free.k, free.k_start) == (4, sl.Ordered(D_IN, D_SAE, k=4).k_start)
    with pytest.raises(ValueError, match="k must be at most k_start=5, got 6: k_start=None makes it follow k"):
        fixed.set_sparsity(6)


@pytest.mark.parametrize(
    ("name", "what", "words"),
    [
        ("TopK", {"sparsity": 0}, f"k must be an integer from 1 to d_sae={D_SAE}, got 0"),
        ("TopK", {"sparsity": 2.5}, "k must be an integer from 1 to d_sae=24, got 2.5"),
        ("L1", {"sparsity": -1}, "sparsity must be a number of at least 0, got -1"),
        ("L1", {"sparsity": float("nan")}, "sparsity must be a number of at least 0, got nan"),
        ("TopK", {"lr": 0}, "lr must be a positive number below 1e.30, got 0"),
        ("TopK", {"lr": float("inf")}, "lr must be a positive number"),
    ],
)
def test_what_is_refused(name, what, words, data):
    """The call itself raises, and nothing changes."""
    said = []

    def ask(event):
        if event.kind == "step" and event.step == 5:
            with pytest.raises(ValueError, match=words):
                event.control.set(**what)
            said.append(True)

    run = sl.train(coder(name), data, config(steps=10), callbacks=[ask])
    assert said and run.changes == [] and run.history == sl.train(coder(name), data, config(steps=10)).history


def test_a_family_without_sparsity(data):
    said = []

    def ask(event):
        if event.kind == "start":
            assert event.control.sparsity is None
            with pytest.raises(ValueError, match="a VQ has no argument that sets the sparsity of its codes"):
                event.control.set(sparsity=3)
            said.append(True)

    sl.train(sl.VQ(D_IN, D_SAE), data, config(steps=3), callbacks=[ask])
    assert said


def test_the_same_value_is_no_change(data):
    assert sl.train(coder(), data, config(), callbacks=[at(10, lr=3e-3, sparsity=3)]).changes == []


# ---- pause


def test_a_pause_changes_nothing(data):
    """Bit-equal weights, and no step while it lasts."""
    heard, steps, controls = [], [], []

    def callback(event):
        heard.append(event.kind)
        controls.append(event.control)
        steps.append(event.step)
        if event.kind == "step" and event.step == 7:
            event.control.pause()

    sae = coder()
    thread = threading.Thread(target=lambda: sl.train(sae, data, config(), callbacks=[callback]))
    thread.start()
    wait_for(lambda: heard[-1:] == ["pause"])
    time.sleep(0.2)
    assert steps[-1] == 7 and controls[0].paused and thread.is_alive()
    controls[0].resume()
    thread.join(20)
    assert not thread.is_alive() and heard[-1] == "end" and heard.count("resume") == 1
    assert same(sae, sl.train(coder(), data, config()).coder)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@pytest.mark.parametrize("ask", ["stop", "resume"])
def test_a_pause_before_the_first_step(ask, data):
    def callback(event):
        if event.kind == "start":
            event.control.pause()
        if event.kind == "pause":  # from the loop's own thread, too
            getattr(event.control, ask)()

    run = sl.train(coder(), data, config(), callbacks=[callback])
    assert len(run.history) == (1 if ask == "stop" else 30)


SCRIPT = """
import sys, torch
import sae_lab as sl
def callback(event):
    if event.kind == "step" and event.step == 7:
        event.control.pause()
    if event.kind == "pause":
        print("paused", flush=True)
try:
    data, path = torch.load(sys.argv[1]), sys.argv[2]
    sl.train(sl.BatchTopK(12, 24, k=3), data, sl.TrainConfig(steps=30, batch_size=64), path=path, callbacks=[callback])
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_ends_a_pause(data, tmp_path):
    torch.save(data, tmp_path / "data.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "data.pt"), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "paused\n"
    os.kill(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n" and process.wait(20) == 0
    assert header(tmp_path / "run")["step"] == 7


# ---- stop and save


@pytest.mark.parametrize(("every", "steps"), [(1, 12), (100, 12), (5, 13)])
def test_stop_and_save(every, steps, data, tmp_path):
    """At once where the last step's figures are known; else one step later, whose figures are then kept."""
    seen = []

    def callback(event):
        seen.append(event.kind)
        if every == 1 and event.kind == "step" and event.step == steps:
            event.control.stop()
        if every != 1 and event.kind == "checkpoint":  # the only other moment
            event.control.stop()

    settings = config(log_every=every, checkpoint_every=steps - (every != 1))
    run = sl.train(coder(), data, settings, path=tmp_path / "run", callbacks=[callback])
    assert run.stopped and run.history[-1]["step"] == steps and run.coder.meta["train_tokens"] == steps * 64
    assert f"stopped after {steps} of 30 steps" in repr(run) and seen[-1] == "end"
    assert not run.coder.training and not (tmp_path / "run" / CHECKPOINT).exists()
    loaded = sl.load(tmp_path / "run")
    assert same(loaded, run.coder) and not loaded.threshold.isnan() and (loaded.f_scale > 0).any()
    assert loaded.meta["changes"][0]["what"] == "stop"
    fvu = (loaded(data).x_hat - data).pow(2).sum() / (data - data.mean(0)).pow(2).sum()
    assert abs(fvu - run.history[-1]["fvu"]) < 0.15, "it serves raw units"
    again = sl.train(coder(), data, settings, changes=run.changes)
    assert same(again.coder, run.coder) and again.history == run.history


def test_nothing_can_be_changed_afterwards(data):
    controls = []
    sl.train(coder(), data, config(steps=3), callbacks=[lambda e: controls.append(e.control)])
    for ask in (controls[0].pause, controls[0].stop, lambda: controls[0].set(lr=1.0)):
        with pytest.raises(ValueError, match="this training is over"):
            ask()
    assert controls[0].over and not controls[0].paused


# ---- on disk


@pytest.mark.parametrize("reused", [True, False])
@pytest.mark.parametrize(("name", "new"), [("TopK", 2), ("BatchTopK", 2), ("L1", 3.0)])
def test_interrupted_and_gone_on_with_changes(name, new, reused, data, tmp_path):
    """The same call, with the object that was left or a fresh one: the weights of an unbroken run, changed alike."""
    changing = [at(8, lr=1e-3), at(12, sparsity=new)]
    sae = coder(name)
    with pytest.raises(KeyboardInterrupt):
        sl.train(sae, data, config(), path=tmp_path / "run", callbacks=[*changing, stopper("step", 17)])
    assert [c["step"] for c in header(tmp_path / "run")["changes"]] == [8, 12]
    going_on = sae if reused else coder(name)
    run = sl.train(going_on, data, config(), path=tmp_path / "run", callbacks=[at(20, lr=5e-4)])
    whole = sl.train(coder(name), data, config(), callbacks=[*changing, at(20, lr=5e-4)])
    assert same(run.coder, whole.coder) and run.history == whole.history and run.changes == whole.changes
    assert [c["step"] for c in run.changes] == [8, 12, 20] and run.coder.config == whole.coder.config


@pytest.mark.parametrize("at_step", [5, 17])
def test_interrupted_with_planned_changes(at_step, data, tmp_path):
    """Those that lie ahead are made, those that were made are not made twice."""
    plan = [{"step": 8, "what": "lr", "new": 1e-3}, {"step": 17, "what": "k", "new": 2}]
    with pytest.raises(KeyboardInterrupt):
        sl.train(coder(), data, config(), path=tmp_path / "r", changes=plan, callbacks=[stopper("step", at_step)])
    run = sl.train(coder(), data, config(), path=tmp_path / "r", changes=plan)
    whole = sl.train(coder(), data, config(), changes=plan)
    assert same(run.coder, whole.coder) and run.changes == whole.changes and len(run.changes) == 2


def test_a_change_planned_too_late(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sl.train(coder(), data, config(), path=tmp_path / "run", callbacks=[stopper("step", 17)])
    plan = [{"step": 8, "what": "lr", "new": 1e-3}]
    with pytest.raises(ValueError, match=r"step 8: lr 0.001 was not made when that step was taken: plan .* 17"):
        sl.train(coder(), data, config(), path=tmp_path / "run", changes=plan)


@pytest.mark.parametrize("callback", [at(12, sparsity=2), stop_at(12)])
def test_a_changed_run_is_not_taken_for_the_plain_one(callback, data, tmp_path):
    path = tmp_path / "run"
    run = sl.train(coder(), data, config(), path=path, callbacks=[callback])
    weights = state(run.coder)
    for sae in (coder(), run.coder):
        with pytest.raises(ValueError, match=r"holds this run, but changed while it ran \(step 12: .*here: nothing"):
            sl.train(sae, data, config(), path=path)
    for sae in (coder(), run.coder):
        opened = sl.train(sae, data, config(), path=path, changes=run.changes)
        assert same(opened.coder, weights) and opened.changes == run.changes and opened.stopped == run.stopped
        assert opened.coder.config == run.coder.config and opened.history == run.history
    with pytest.raises(ValueError, match="planned here: step 5: lr 1"):
        sl.train(coder(), data, config(), path=path, changes=[{"step": 5, "what": "lr", "new": 1.0}])


def test_a_plain_run_is_not_taken_for_a_changed_one(data, tmp_path):
    sl.train(coder(), data, config(), path=tmp_path / "run")
    with pytest.raises(ValueError, match=r"changed while it ran \(nothing; planned here: step 5: lr 1"):
        sl.train(coder(), data, config(), path=tmp_path / "run", changes=[{"step": 5, "what": "lr", "new": 1.0}])


def test_stopped_and_interrupted_while_calibrating(data, tmp_path, monkeypatch):
    """It was to end there: the same call ends it, and takes no more steps."""
    sae = coder()
    monkeypatch.setattr(sae, "calibrate", stopper_of_calibration)
    heard = []
    with pytest.raises(KeyboardInterrupt):
        sl.train(sae, data, config(), path=tmp_path / "run", callbacks=[stop_at(12), lambda e: heard.append(e.kind)])
    assert heard[-1] == "left"
    monkeypatch.undo()
    run = sl.train(coder(), data, config(), path=tmp_path / "run")
    assert run.stopped and len(run.history) == 12
    assert same(run.coder, sl.train(coder(), data, config(), changes=run.changes).coder)


def stopper_of_calibration(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 1}, "a change is a dict of step, what and new"),
        ({"step": 99, "what": "lr", "new": 1.0}, "a change's step must be an integer from 0 to 30, got 99"),
        ({"step": 1, "what": "lr", "new": -1.0}, "lr must be a positive number"),
        ({"step": 1, "what": "k", "new": 99}, "k must be an integer from 1 to d_sae=24, got 99"),
        ({"step": 1, "what": "sparsity", "new": 9}, "what changes in a BatchTopK while it trains is lr, stop, k, got"),
        ({"step": 9, "what": "stop", "new": 4}, "a stop's new must be a step from 9 to 30, got 4"),
    ],
)
def test_plans_that_are_refused(change, words, data):
    with pytest.raises(ValueError, match=words):
        sl.train(coder(), data, config(), changes=[change])


def test_several_processes_are_refused(data):
    from sae_lab.activations.store import Rows
    from sae_lab.training.loop import Training
    from sae_lab.training.ranks import Ranks

    training = Training(coder(), Rows(data), config(), None, (), Ranks(0, 2))
    for ask in (training.control.pause, training.control.stop, lambda: training.control.set(lr=1.0)):
        with pytest.raises(ValueError, match="2 processes train this coder: only one alone can be changed"):
            ask()
    plan = [{"step": 1, "what": "lr", "new": 1.0}]
    with pytest.raises(ValueError, match="2 processes"):
        Training(coder(), Rows(data), config(), None, (), Ranks(0, 2), changes=plan)


# ---- what callbacks hear


def test_left(data):
    heard = []

    def callback(event):
        heard.append((event.kind, event.error))
        if event.kind == "step" and event.step == 4:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        sl.train(coder(), data, config(), callbacks=[callback])
    assert heard[-1][0] == "left" and str(heard[-1][1]) == "mine"


def test_an_event_tells_all_of_its_training(data):
    seen = []

    def callback(event):
        if event.kind == "step":
            codes = event.control.output.codes
            seen.append((event.label, len(event.history), len(codes.values) / 64 == pytest.approx(event.metrics["l0"])))
            assert event.data.training_rows < 2000 and event.control.lr == 3e-3 and event.control.last == 30

    sl.train(coder(), data, config(), callbacks=[callback])
    assert seen == [("BatchTopK", n, True) for n in range(1, 31)]


# ---- a sweep


def test_a_sweep_calls_back_for_each_coder(data):
    heard = []
    grid = {"TopK": {"k": [2, 3]}, "L1": {"sparsity": 0.3}}
    sl.sweep(grid, data, config(steps=5), d_sae=D_SAE, callbacks=[lambda e: heard.append((e.label, e.kind))])
    labels = ["TopK k=2", "TopK k=3", "L1"]
    assert heard[:3] == [(label, "start") for label in labels] and heard[-3:] == [(label, "end") for label in labels]
    assert heard[3:6] == [(label, "step") for label in labels] and len(heard) == 3 * 7


def test_a_sweep_of_seeds_names_them(data):
    labels = []
    hear = [lambda event: labels.append(event.label)]
    sl.sweep({"TopK": {"k": 2}}, data, config(steps=2), d_sae=D_SAE, seeds=(0, 1), callbacks=hear)
    assert set(labels) == {"TopK seed=0", "TopK seed=1"}


def test_one_coder_of_a_sweep_is_changed_and_one_stopped(data):
    """The others are as if nothing had been."""

    def callback(event):
        if event.kind == "step" and event.step == 10 and event.label != "TopK k=3":
            event.control.set(sparsity=5) if event.label == "TopK k=2" else event.control.stop()

    grid = {"TopK": {"k": [2, 3, 4]}}
    swept = sl.sweep(grid, data, config(), d_sae=D_SAE, callbacks=[callback])
    plain = sl.sweep(grid, data, config(), d_sae=D_SAE)
    assert [len(run.history) for run in swept.runs] == [30, 30, 10] and swept.runs[2].stopped
    assert swept.coders[0].k == 5 and same(swept.coders[1], plain.coders[1])
    assert swept.to_pandas()["changed"].fillna(False).tolist() == [True, False, True]
    assert "changed" not in plain.to_pandas()
    alone = sl.train(sl.TopK(D_IN, D_SAE, k=2), data, config(), changes=swept.runs[0].changes)
    assert same(alone.coder, swept.coders[0])


def test_a_sweep_that_is_stopped_ends(data):
    swept = sl.sweep({"TopK": {"k": [2, 3]}}, data, config(), d_sae=D_SAE, callbacks=[stop_at(6)])
    assert [len(run.history) for run in swept.runs] == [6, 6] and np.isfinite(swept.to_pandas()["fvu"]).all()


def test_an_interrupted_sweep_tells_every_coder(data):
    left = []

    def callback(event):
        if event.kind == "step" and event.step == 5 and event.label == "TopK k=3":
            raise KeyboardInterrupt
        if event.kind == "left":
            left.append(event.label)

    with pytest.raises(KeyboardInterrupt):
        sl.sweep({"TopK": {"k": [2, 3]}}, data, config(), d_sae=D_SAE, callbacks=[callback])
    assert left == ["TopK k=2", "TopK k=3"]
