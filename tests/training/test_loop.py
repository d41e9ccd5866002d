"""sl.train: it finds what is there, stops where it must, and goes on where it was, to the last bit."""

import inspect
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import sae_lab as sl
from sae_lab.activations.store import Rows, Store
from sae_lab.training import ranks
from sae_lab.training.adam import Adam
from sae_lab.training.checkpoint import CHECKPOINT

D_IN, D_SAE = 12, 24
SMALL = {"steps": 30, "batch_size": 64, "lr": 3e-3, "checkpoint_every": 10, "dead_after": 500}


def planted(rows, n=64, d=32, l0=3, seed=0):
    """(x, dictionary): sums of l0 of n unit directions with coefficients from 1 to 2."""
    g = torch.Generator().manual_seed(seed)
    dictionary = F.normalize(torch.randn(n, d, generator=g), dim=1)
    features = torch.rand(rows, n, generator=g).topk(l0).indices
    codes = torch.zeros(rows, n).scatter_(1, features, 1 + torch.rand(rows, l0, generator=g))
    return codes @ dictionary, dictionary


@pytest.fixture(scope="module")
def data():
    """Rows in raw units far from norm √d, off the origin."""
    return 7 * planted(2000, n=20, d=D_IN)[0] + 3


def config(**kwargs):
    return sl.TrainConfig(**{**SMALL, **kwargs})


def coder(name="BatchTopK", **kwargs):
    spec = {"L1": {"sparsity": 0.3}, "TopK": {"k": 3}, "BatchTopK": {"k": 3}}[name]
    return getattr(sl, name)(D_IN, D_SAE, **{**spec, **kwargs})


def state(sae):
    return {name: t.clone() for name, t in sae.state_dict().items()}


def same(a, b):
    a, b = (c if isinstance(c, dict) else c.state_dict() for c in (a, b))
    return a.keys() == b.keys() and all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a)


# ---- it learns


@pytest.mark.parametrize("name", ["TopK", "BatchTopK"])
def test_it_recovers_a_planted_dictionary(name):
    x, dictionary = planted(50_000)
    sae = getattr(sl, name)(32, 64, k=3)
    run = sl.train(sae, x, sl.TrainConfig(tokens=200_000, batch_size=512))
    cosines = F.normalize(sae.W_dec.detach(), dim=1) @ dictionary.T
    # Mean max cosine in both directions; random directions in 32 dimensions reach about .4.
    assert cosines.max(0).values.mean() >= 0.9 and cosines.max(1).values.mean() >= 0.9
    assert run.history[-1]["fvu"] < 0.1


@pytest.mark.parametrize("name", ["L1", "TopK", "BatchTopK"])
def test_the_coder_serves_raw_units_afterwards(name, data):
    """Training scales activations to norm √d_in; what comes back reads and writes the user's own units."""
    sae = coder(name)
    run = sl.train(sae, data, config(steps=200))
    assert run.coder is sae and not sae.training
    x_hat = sae(data).x_hat.detach()
    fvu = float((x_hat - data).pow(2).sum() / (data - data.mean(0)).pow(2).sum())
    assert fvu < 0.5 and abs(fvu - run.history[-1]["fvu"]) < 0.1  # the last batch is 64 rows of 2000
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)


def test_b_dec_starts_at_the_geometric_median(data):
    sae, seen = coder(), []
    sl.train(sae, data, config(steps=1, lr=1e-12), callbacks=[lambda e: seen.append(e.coder.b_dec.clone())])
    # Any row's distance to the median beats its distance to elsewhere: the gradient of Σ‖x-m‖ is near 0.
    pull = F.normalize(data - sae.b_dec.detach(), dim=1).mean(0).norm()
    assert pull < 0.03  # the first batch, not all rows, fixes it: 1/√1600 = .025 of noise at most
    assert seen[0].norm() < sae.b_dec.norm(), "while training it stands in scaled units"


def test_training_on(data):
    """A trained coder trains on from where it is, in whatever units: no jump at the start."""
    sae = coder("TopK")
    first = sl.train(sae, data, config(steps=200))
    before = state(sae)
    again = sl.train(sae, data, config(steps=1, lr=1e-12))
    assert abs(again.history[0]["fvu"] - first.history[-1]["fvu"]) < 0.1
    assert torch.allclose(sae.b_dec, before["b_dec"], rtol=1e-4) and torch.allclose(sae.W_enc, before["W_enc"])


def test_dead_features_are_revived():
    """A third of the features start so low that they are never among the k largest; AuxK still sees them."""
    x = planted(20_000)[0]
    runs = []
    for dead_after in (2000, 10**9):
        sae = sl.TopK(32, 64, k=3)
        with torch.no_grad():
            sae.b_enc[:24] -= 5.0
        runs.append(sl.train(sae, x, sl.TrainConfig(steps=200, batch_size=256, lr=3e-3, dead_after=dead_after)))
    revived, control = runs
    assert "auxk" not in revived.history[0] and any("auxk" in row for row in revived.history)
    assert not any("auxk" in row for row in control.history)
    dead, still = ((run.coder.f_scale[:24] == 0).float().mean() for run in runs)
    assert still > 0.1 and dead < still / 2  # measured: 92 % and 4 %
    assert revived.history[-1]["fvu"] < control.history[-1]["fvu"]  # measured: .16 and .27


def test_batchtopk_keeps_its_l0_where_it_never_trained(data):
    sae = coder()
    sl.train(sae, data, config(steps=100))
    reserved = Rows(data).reserved(10**6)
    assert len(reserved) > 300 and sae.threshold > 0
    l0 = float((sae.encode(reserved) > 0).sum(1).float().mean())
    assert abs(l0 - 3) < 0.05 * 3


# ---- the schedule


def test_the_learning_rate_is_a_trapezoid():
    c = sl.TrainConfig(steps=100, lr=2.0, warmup=0.1, decay=0.2)
    rates = [c.lr_at(step, 999) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:81] == pytest.approx([2.0] * 71)
    assert rates[81:] == pytest.approx([2.0 * (19 - i) / 20 for i in range(19)])
    flat = sl.TrainConfig(steps=7, lr=2.0, warmup=0.0, decay=0.0)
    assert [flat.lr_at(step, 999) for step in range(7)] == [2.0] * 7


def test_the_default_learning_rate_falls_with_width():
    c = sl.TrainConfig(steps=100)
    assert c.lr_at(50, 4608) == pytest.approx(2e-3) and c.lr_at(50, 4 * 4608) == pytest.approx(1e-3)


def test_the_schedule_reaches_the_optimiser(data):
    run = sl.train(coder(), data, config(steps=10, warmup=0.5, decay=0.5, lr=1e-3))
    assert [row["lr"] for row in run.history] == pytest.approx([1e-3 * min(i + 1, 10 - i) / 5 for i in range(10)])


def test_tokens_or_steps():
    assert sl.TrainConfig(tokens=1000, batch_size=64).total_steps == 16 and sl.TrainConfig(steps=9).total_steps == 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give tokens or steps, one of them: got tokens=None, steps=None"),
        ({"tokens": 5, "steps": 5}, "give tokens or steps, one of them: got tokens=5, steps=5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"tokens": -5}, "tokens must be at least 1, got -5"),
        ({"steps": 5, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 5, "dead_after": 0}, "dead_after must be at least 1"),
        ({"steps": 5, "log_every": 0}, "log_every must be at least 1"),
        ({"steps": 5, "checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"steps": 5, "seed": -1}, "seed must be a whole number of at least 0, got -1"),
        *(({"steps": 5, "lr": lr}, f"lr must be a positive number .*got {lr}; None chooses one by d_sae")
          for lr in (-1e-3, 0.0, float("inf"))),
        ({"steps": 5, "lr": float("nan")}, "lr must be a number or None, got nan"),
        ({"steps": 5, "warmup": float("nan")}, "warmup must be a number, got nan"),
        *(({"steps": 5, "warmup": w, "decay": d}, "are shares of training, together <= 1")
          for w, d in ((-0.1, 0.2), (0.9, 0.2), (0.0, 1.1))),
    ],
)  # fmt: skip
def test_configs_that_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        sl.TrainConfig(**arguments)


# ---- what it tells


def test_events(data, tmp_path):
    events = []
    run = sl.train(coder(), data, config(steps=25), path=tmp_path / "run", callbacks=[events.append])
    kinds = [e.kind for e in events]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("step") == 25
    assert [e.step for e in events if e.kind == "checkpoint"] == [10, 20]
    steps = [e.metrics for e in events if e.kind == "step"]
    assert steps == run.history and all(e.coder is run.coder for e in events)
    assert events[0].metrics == {} and events[-1].metrics == run.history[-1]


def test_history(data):
    run = sl.train(coder(), data, config())
    table = run.to_pandas()
    assert {"step", "tokens", "passes", "loss", "fvu", "l0", "dead", "lr", "mse"} <= set(table)
    assert table["step"].tolist() == list(range(1, 31)) and table["tokens"].tolist() == list(range(64, 1984, 64))
    n = Rows(data).training_rows
    assert table["passes"].iloc[-1] == pytest.approx(1920 / n) and n < 2000
    now_and_then = ["fvu_held_out", "l0_held_out", "auxk"]
    assert (table["l0"] <= 3).all() and np.isfinite(table.drop(columns=now_and_then, errors="ignore").to_numpy()).all()
    text = repr(run)
    assert "Run(BatchTopK, 1,920 tokens in 1." in text and "FVU" in text and "dead" in text and "history" not in text


@pytest.mark.parametrize(("every", "logged"), [(7, [7, 14, 21, 28, 30]), (100, [30])])
def test_log_every(data, every, logged):
    run = sl.train(coder(), data, config(log_every=every))
    assert [row["step"] for row in run.history] == logged


def test_the_progress_bar(data, capsys):
    sl.train(coder(), data, config())
    err = capsys.readouterr().err
    assert "train BatchTopK" in err and "30/30" in err
    assert all(word in err for word in ("pass 1.", "loss ", "FVU ", "L0 ", "dead "))


def test_without_path_nothing_is_written(data, tmp_path, monkeypatch, cache_folder):
    monkeypatch.chdir(tmp_path)
    before = {f for f in cache_folder.rglob("*") if f.is_file()}
    sl.train(coder(), data, config())
    assert not list(tmp_path.iterdir()) and {f for f in cache_folder.rglob("*") if f.is_file()} == before


def test_a_step_in_one_process_calls_nothing_of_the_ranks(data, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a function of ranks.py was called")

    def callback(event):
        if event.kind == "start":
            own = [thing for thing in vars(ranks).values() if getattr(thing, "__module__", "") == ranks.__name__]
            for owner in [ranks, *filter(inspect.isclass, own)]:
                for name, thing in list(vars(owner).items()):
                    if inspect.isfunction(thing) or isinstance(thing, property | staticmethod):
                        monkeypatch.setattr(owner, name, refuse)
            patched.extend([ranks.Ranks(0, 2).wait, ranks.joined])

    patched = []
    run = sl.train(coder(), data, config(), callbacks=[callback])
    assert run.history[-1]["step"] == 30
    for function in patched:
        with pytest.raises(AssertionError, match=r"ranks.py was called"):
            function()


def test_same_seed_same_weights(data):
    runs = [sl.train(coder(), data, config(seed=seed)) for seed in (1, 1, 2)]
    assert same(runs[0].coder, runs[1].coder) and runs[0].history == runs[1].history
    assert not same(runs[0].coder, runs[2].coder)


# ---- what the coder knows afterwards


@pytest.fixture(scope="module")
def store(make_tiny, small_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "store"
    return sl.harvest(make_tiny("llama"), ["layers.1", "embed"], small_text, 2000, context=32, path=folder)


def test_it_is_stamped(store, data, make_tiny, tmp_path):
    one = store.at("layers.1")
    sae = sl.BatchTopK(48, 64, k=4)
    sl.train(sae, one, config(steps=40), path=tmp_path / "run")
    assert sae.reads == sae.writes == (sl.Site("resid_post", 1),)
    assert sae.mask == store.mask and set(sae.mask.max_norm) == {"resid_post-1", "embed"}
    assert sae.meta["model"] == "LlamaForCausalLM" and sae.meta["context"] == 32
    assert sae.meta["model_fingerprint"] == make_tiny("llama").fingerprint() and sae.meta["prefix_id"] == 1
    assert sae.meta["excluded"] == store.excluded and sae.meta["train_tokens"] == 40 * 64
    assert sae.meta["train"]["lr"] == 3e-3 and sae.meta["text"] == "list"
    x = one.rows(np.arange(2000), "resid_post-1")
    f = sae.encode(x).detach().numpy()
    assert sae.meta["dead_tokens"] == 2000 and sae.meta["dead"] == pytest.approx((f == 0).all(0).mean())
    for i in range(64):
        fires = f[:, i][f[:, i] > 0]
        # numpy's own quantile, to the observation below as many rows are too few to interpolate the tail
        expected = np.quantile(fires, 0.999, method="lower") if len(fires) else 0.0
        assert float(sae.f_scale[i]) == pytest.approx(expected, rel=1e-4)
    loaded = sl.load(tmp_path / "run")
    assert loaded.mask == store.mask and loaded.site == one.site and same(loaded, sae)


def test_a_store_trains_like_the_tensor_it_holds(store):
    """Same rows, same steps: only the order of rows and what is reserved differ."""
    one = store.at("layers.1")
    x = one.rows(np.arange(2000), "resid_post-1")
    runs = [sl.train(sl.TopK(48, 64, k=8), rows, config(steps=150)) for rows in (one, x)]
    a, b = (run.to_pandas()["fvu"].tail(30).mean() for run in runs)
    assert abs(a - b) < 0.1 and a < 0.8
    assert runs[1].coder.reads == () and runs[1].coder.mask is None


def test_a_store_of_several_sites(store):
    with pytest.raises(ValueError, match=r"several sites .*choose with store.at\(site\)"):
        sl.train(sl.TopK(48, 64, k=4), store, config())


# ---- what stops it


def test_wrong_width(data, store):
    before = state(sae := sl.TopK(13, 24, k=3))
    for rows, width in ((data, 12), (store.at("layers.1"), 48)):
        with pytest.raises(ValueError, match=f"the coder reads d_in=13, the activations have width {width}: make them"):
            sl.train(sae, rows, config())
    assert same(sae, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_not_finite(value):
    rows = planted(9000, n=20, d=D_IN)[0]
    order = Rows(torch.arange(9000.0)[:, None])
    late = int(order.batch(75, 64, seed=0).x[5])  # the start looks at 4096 rows; step 75 is the first to see this one
    rows[late, 3] = value
    sae = coder()
    with pytest.raises(ValueError, match=r"step 75: the activations hold NaN or Inf \(row 5 of the batch\): drop such"):
        sl.train(sae, rows, config(steps=100))
    assert all(t.isfinite().all() for n, t in sae.state_dict().items() if n != "threshold")
    rows[:] = value
    with pytest.raises(ValueError, match=r"step 0: the activations hold NaN or Inf \(row 0 of the batch\)"):
        sl.train(coder(), rows, config())


def test_reserved_rows_that_are_not_finite(data):
    """No batch holds them, but threshold and scales are fitted on them."""
    rows = data.clone()
    reserved = Rows(torch.arange(2000.0)[:, None]).reserved(1)
    rows[int(reserved)] = float("nan")
    with pytest.raises(ValueError, match="step 30: the activations hold NaN or Inf"):
        sl.train(coder(), rows, config())


@pytest.mark.parametrize("name", ["L1", "TopK", "BatchTopK"])
@pytest.mark.parametrize("lr", [1e7, 1e9, 1e29])
def test_a_learning_rate_that_runs_away(name, lr, data):
    sae = coder(name)
    words = r"step \d+: (the loss is|the gradients are) not finite \(.*\) though the data is, so the weights ran away: "
    with pytest.raises(ValueError, match=words + r"lower lr \(now .*\) and train a fresh coder"):
        sl.train(sae, data, config(lr=lr, steps=200))
    assert all(p.isfinite().all() for p in sae.parameters())


# ---- going on


SCRIPT = """
import sys, time, torch
import sae_lab as sl
from sae_lab import checkpoint
torch.set_num_threads(1)
data, path = sys.argv[1:]
sl.train(
    sl.BatchTopK(12, 24, k=3), torch.load(data), sl.TrainConfig(steps=60, batch_size=64, lr=3e-3, checkpoint_every=4,
    dead_after=500), path=path, callbacks=[lambda event: time.sleep(0.03 * (event.kind == "step"))],
)
"""


def header(path):
    with safe_open(path / CHECKPOINT, framework="pt") as f:
        return json.loads(f.metadata()["run"])


def test_killed_and_called_again(data, tmp_path):
    path = tmp_path / "run"
    torch.save(data, tmp_path / "data.pt")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "data.pt"), str(path)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if (path / CHECKPOINT).exists() and header(path)["step"] >= 12:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must have been running"
    assert 12 <= header(path)["step"] < 60, "killed too late to mean anything"
    (path / f".{CHECKPOINT}.abc.tmp").mkdir()  # what a kill in mid-write leaves
    (path / f".{CHECKPOINT}.abc.tmp" / CHECKPOINT).write_bytes(b"half")
    settings = config(steps=60, checkpoint_every=4)
    resumed, unbroken = coder(), coder()
    steps = []
    run = sl.train(resumed, data, settings, path=path, callbacks=[lambda e: steps.append((e.kind, e.step))])
    whole = sl.train(unbroken, data, settings)
    assert steps[0] == ("start", steps[1][1] - 1) and 12 <= steps[0][1] < 60, "it went on, and did not begin again"
    assert same(resumed, unbroken) and run.history == whole.history
    assert resumed.meta == unbroken.meta
    assert sorted(f.name for f in path.iterdir()) == ["config.json", "run.json", "sae.safetensors"]


def stopper(kind, step):
    """A callback that interrupts once, as Ctrl-C does."""
    left = [1]

    def callback(event):
        if event.kind == kind and event.step >= step and left:
            left.clear()
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("name", ["L1", "TopK", "BatchTopK"])
@pytest.mark.parametrize(("kind", "step"), [("start", 0), ("step", 1), ("step", 17), ("checkpoint", 20), ("step", 30)])
def test_interrupted_in_a_notebook(name, kind, step, data, tmp_path):
    """The cell runs again with the same `sae` object, whose weights have changed meanwhile."""
    sae, unbroken = coder(name), coder(name)
    stop = stopper(kind, step)
    with pytest.raises(KeyboardInterrupt):
        sl.train(sae, data, config(), path=tmp_path / "run", callbacks=[stop])
    if step > 10:
        fvu = (sae.train()(data).x_hat - data).pow(2).sum() / (data - data.mean(0)).pow(2).sum()
        assert fvu < 1, "what it left serves raw units"
    run = sl.train(sae, data, config(), path=tmp_path / "run", callbacks=[stop])
    whole = sl.train(unbroken, data, config())
    assert same(sae, unbroken) and run.history == whole.history


def test_interrupted_twice_and_gone_on_with_a_new_object(data, tmp_path):
    sae = coder()
    for step in (7, 22):
        with pytest.raises(KeyboardInterrupt):
            sl.train(sae, data, config(), path=tmp_path / "run", callbacks=[stopper("step", step)])
    fresh = coder()
    sl.train(fresh, data, config(), path=tmp_path / "run")
    assert same(fresh, sl.train(coder(), data, config()).coder)


class InterruptedInside(sl.TopK):
    """Ctrl-C reaches the process in the middle of a step, when the weights are new and the count is old."""

    at = 17

    def project(self):
        super().project()
        self.at -= 1
        if self.at == 0:
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupted_in_the_middle_of_a_step(data, tmp_path):
    sae = InterruptedInside(D_IN, D_SAE, k=3)
    with pytest.raises(KeyboardInterrupt):
        sl.train(sae, data, config(), path=tmp_path / "run")
    assert header(tmp_path / "run")["step"] == 17
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    sl.train(sae, data, config(), path=tmp_path / "run")
    unbroken = InterruptedInside(D_IN, D_SAE, k=3)
    unbroken.at = -1
    assert same(sae, sl.train(unbroken, data, config()).coder)


def test_interrupted_while_calibrating(data, tmp_path, monkeypatch):
    sae = coder()
    calibrate = sae.calibrate

    def interrupted(*args):
        calibrate(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(sae, "calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sl.train(sae, data, config(), path=tmp_path / "run")
    monkeypatch.undo()
    steps = []
    sl.train(sae, data, config(), path=tmp_path / "run", callbacks=[lambda e: steps.append(e.kind)])
    assert steps == ["start", "end"], "training itself was done"
    assert same(sae, sl.train(coder(), data, config()).coder)


def test_interrupted_without_a_path(data):
    sae = coder("TopK")
    with pytest.raises(KeyboardInterrupt):
        sl.train(sae, data, config(steps=200), callbacks=[stopper("step", 150)])
    fvu = (sae(data).x_hat - data).pow(2).sum() / (data - data.mean(0)).pow(2).sum()
    assert fvu < 0.6, "it stays usable, in raw units"


@pytest.mark.parametrize("ends", [True, False])
def test_interrupted_on_the_way_to_raw_units(ends, data):
    """At the end, or after another Ctrl-C: the coder gets there."""

    class Interrupted(sl.TopK):
        def fold(self, *scales):
            os.kill(os.getpid(), signal.SIGINT)
            super().fold(*scales)

    sae, plain = Interrupted(D_IN, D_SAE, k=3), coder("TopK")
    with pytest.raises(KeyboardInterrupt):
        sl.train(sae, data, config(), callbacks=[] if ends else [stopper("step", 20)])
    with suppress(KeyboardInterrupt):
        sl.train(plain, data, config(), callbacks=[] if ends else [stopper("step", 20)])
    assert sae.in_raw_units and sae.scratch is None
    assert torch.equal(sae.W_dec, plain.W_dec) and torch.equal(sae.b_dec, plain.b_dec)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_coder_that_was_left_goes_on(error, saved, data, tmp_path):
    """Interrupted, or failed behind its last checkpoint; the object itself, or what was saved of it."""

    def stop(event):
        if event.kind == "step" and event.step == 17:
            raise error

    sae = coder()
    with pytest.raises(error):
        sl.train(sae, data, config(), path=tmp_path / "run", callbacks=[stop])
    if saved:
        sae = sl.load(sae.save(tmp_path / "left"))
    run = sl.train(sae, data, config(), path=tmp_path / "run")
    whole = sl.train(coder(), data, config())
    assert same(sae, whole.coder) and run.history == whole.history and sae.meta == whole.coder.meta


def test_only_the_coder_that_was_left_is_taken_for_it(data, tmp_path):
    def left(name, step, **settings):
        sae = coder()
        with pytest.raises(KeyboardInterrupt):
            sl.train(sae, data, config(**settings), path=tmp_path / name, callbacks=[stopper("step", step)])
        return sae

    left("run", 17)
    moved, other_k, trained = (sl.load(left(name, 17).save(tmp_path / f"{name} left")) for name in "abc")
    with torch.no_grad():
        moved.W_enc += 0.01
    other_k.set_sparsity(4)
    with pytest.raises(KeyboardInterrupt):
        sl.train(trained, data + 1, config(), callbacks=[stopper("step", 3)])
    for sae, name, words in [
        (left("same call", 17), "run", "initial_weights"), (left("longer", 17, steps=40), "run", "initial_weights"),
        (moved, "a", "initial_weights"), (other_k, "b", "coder k: 3 there, 4 now"), (trained, "c", "initial_weights"),
    ]:  # fmt: skip
        before = state(sae)
        with pytest.raises(ValueError, match=f"holds another run; it differs in {words}"):
            sl.train(sae, data, config(), path=tmp_path / name)
        assert same(sae, before)


# ---- the same path again


@pytest.fixture
def finished(data, tmp_path):
    """(path, weights, history) of a run that ended well."""
    run = sl.train(coder(), data, config(), path=tmp_path / "run")
    return run.path, state(run.coder), run.history


def test_a_finished_run_is_opened(finished, data):
    path, weights, history = finished
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    events = []
    for sae in (fresh := coder(), fresh):  # a fresh one, and the one that holds the weights already
        run = sl.train(sae, data, config(), path=path, callbacks=[events.append])
        assert same(sae, weights) and run.history == history and run.coder is sae and not sae.training
        assert sae.meta["train_tokens"] == 1920 and "Run(BatchTopK, 1,920 tokens" in repr(run)
        assert sae.path == str(path.resolve()), "as before the restart, so that its edits can be written down"
    assert not events and {f.name: f.read_bytes() for f in path.iterdir()} == before


@pytest.fixture(params=["finished", "interrupted"])
def somewhere(request, data, tmp_path):
    """A path that holds a run."""
    callbacks = [stopper("step", 15)] if request.param == "interrupted" else []
    try:
        sl.train(coder(), data, config(), path=tmp_path / "run", callbacks=callbacks)
    except KeyboardInterrupt:
        assert request.param == "interrupted"
    return tmp_path / "run"


def test_another_run_is_refused(somewhere, data):
    before = {f.name: f.read_bytes() for f in somewhere.iterdir()}
    with torch.no_grad():
        moved = coder()
        moved.W_enc += 0.01
    for sae, rows, settings, words in [
        (coder(), data, config(lr=1e-3), "config lr: 0.003 there, 0.001 now"),
        (coder(), data, config(seed=1), "config seed: 0 there, 1 now"),
        (coder(), data[:-1], config(), "data: '.*-2000' there, '.*-1999' now"),
        (coder(), data + 1, config(), "data: '.*-2000' there, '.*-2000' now"),
        (coder(k=4), data, config(), "coder k: 3 there, 4 now"),
        (coder("TopK"), data, config(), "coder family: 'BatchTopK' there, 'TopK' now"),
        (coder(seed=5), data, config(), "coder seed: 0 there, 5 now; initial_weights"),
        (moved, data, config(), "initial_weights: '.*' there, '.*' now"),
    ]:
        weights = state(sae)
        with pytest.raises(ValueError, match=f"holds another run; it differs in .*{words}.*Pass another path=, or del"):
            sl.train(sae, rows, settings, path=somewhere)
        assert same(sae, weights) or torch.equal(sae.W_enc, weights["W_enc"])
    assert {f.name: f.read_bytes() for f in somewhere.iterdir()} == before


def test_another_coder_saved_over_a_finished_run(finished, data):
    path, *_ = finished
    coder(seed=3).save(path)
    with pytest.raises(ValueError, match=r"holds another coder than the one its run.json tells of: pass another path="):
        sl.train(coder(), data, config(), path=path)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("content", [pickle.dumps(Bomb()), b"", b"half"])
def test_hostile_checkpoints(data, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run"
    path.mkdir()
    (path / CHECKPOINT).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"is no checkpoint of sae_lab .*not read as anything else. Delete it to start"
    ):
        sl.train(coder(), data, config(), path=path)
    (path / CHECKPOINT).unlink()
    (path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run.json is no run of sae_lab .*: delete it to start over"):
        sl.train(coder(), data, config(), path=path)
    assert not (tmp_path / "exploded").exists()
    assert (path / "run.json").read_bytes() == content, "what it does not know it leaves alone"


def test_checkpoints_that_are_not_whole(data, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        sl.train(coder(), data, config(), path=path, callbacks=[stopper("step", 15)])
    whole, run = load_file(path / CHECKPOINT), header(path)
    for tensors, meta, words in [
        (whole, "[]", "is no checkpoint of sae_lab"),
        (whole, "{}", "is no checkpoint of sae_lab"),
        ({n: t for n, t in whole.items() if n != "idle"}, json.dumps(run), "is damaged .*Delete it, and the same call"),
        ({n: t for n, t in whole.items() if n != "coder.W_enc"}, json.dumps(run), "is damaged .*W_enc"),
        (whole | {"coder.W_enc": torch.zeros(3)}, json.dumps(run), "is damaged .*W_enc"),
    ]:
        save_file(tensors, path / CHECKPOINT, {"run": meta})
        with pytest.raises(ValueError, match=f"(?s){words}"):
            sl.train(coder(), data, config(), path=path)
    (path / CHECKPOINT).unlink()
    assert same(sl.train(coder(), data, config(), path=path).coder, sl.train(coder(), data, config()).coder)


def test_a_path_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    sae = coder()
    before = state(sae)
    with pytest.raises(ValueError, match=r"cannot write to the folder .*: pass path= to a folder you own"):
        sl.train(sae, data, config(), path=tmp_path / "file" / "below")
    assert same(sae, before), "refused before anything is lost"


def test_resuming_from_a_store(store, tmp_path):
    sae = sl.BatchTopK(48, 64, k=4)
    one = store.at("layers.1")
    with pytest.raises(KeyboardInterrupt):
        sl.train(sae, one, config(), path=tmp_path / "run", callbacks=[stopper("step", 15)])
    sl.train(sae, Store(store.path, 2000, "layers.1"), config(), path=tmp_path / "run")
    assert same(sae, sl.train(sl.BatchTopK(48, 64, k=4), one, config()).coder)
    with pytest.raises(ValueError, match=r"it differs in .*data: "):
        sl.train(sl.BatchTopK(48, 64, k=4), store.at("embed"), config(), path=tmp_path / "run")


# ---- targets, layers, tokens


Y = 8  # the width of a target


@pytest.fixture(scope="module")
def mapped(data):
    """A target that follows from x, of another width, a hundred times as large and off the origin."""
    mix = torch.randn(D_IN, Y, generator=torch.Generator().manual_seed(1))
    return 100 * ((data - data.mean(0)) @ mix / 20).relu() + 50


@pytest.fixture(scope="module")
def ids(data):
    return torch.randint(7, (len(data),), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def layered(data):
    """The same features in two layers of very different norms and origins, the second turned about."""
    turn = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(3)))[0]
    return torch.stack([data, 100 * data @ turn - 700], 1)


def unexplained(x_hat, x):
    """FVU of each layer (or of the one there is)."""
    error, variance = (x_hat.detach() - x).pow(2), (x - x.mean(0)).pow(2)
    return (error.sum((0, -1)) / variance.sum((0, -1))).flatten().tolist()


WIRED = {
    "Transcoder": {"k": 3, "d_out": Y},
    "SkipTranscoder": {"k": 3, "d_out": Y},
    "TopK": {"k": 3, "d_out": Y},
    "L1": {"sparsity": 0.1, "d_out": Y, "skip": True},
    "JumpReLU": {"sparsity": 0.1, "d_out": Y},
}


@pytest.mark.parametrize("name", WIRED)
def test_a_target_of_its_own(name, data, mapped):
    """Both are scaled apart while training; afterwards raw x gives raw targets."""
    sae = getattr(sl, name)(D_IN, D_SAE, **WIRED[name])
    run = sl.train(sae, sl.Batch(data, mapped), config(steps=150, lr=1e-2, log_every=50))
    (fvu,) = unexplained(sae(data).x_hat, mapped)
    assert fvu < 0.5 and abs(fvu - run.history[-1]["fvu"]) < 0.15  # the last batch is 64 rows of 2000
    (shuffled,) = unexplained(sae(data.roll(1, 0)).x_hat, mapped)
    assert shuffled > 1, "the target of another row is not what it learnt"
    assert torch.equal(sae.f_scale > 0, (sae.encode(data) > 0).any(0)) and sae.reads == sae.writes == ()


def test_tokens_reach_the_coder(data, ids):
    """What follows from the token alone needs no feature, if each row has its own token."""
    means = 40 * torch.randn(7, D_IN, generator=torch.Generator().manual_seed(4))
    x = data + means[ids]
    tokenized = sl.Tokenized(D_IN, D_SAE, vocab=7, k=3)
    sl.train(tokenized, sl.Batch(x, x, ids), config(steps=100))
    without = sl.BatchTopK(D_IN, D_SAE, k=3)
    sl.train(without, x, config(steps=100))
    (fvu,), (wrong,) = (unexplained(tokenized(x, t).x_hat, x) for t in (ids, ids.roll(1)))
    assert fvu < 0.5 * unexplained(without(x).x_hat, x)[0] and wrong > 5 * fvu
    difference = tokenized.lookup.detach() - tokenized.lookup.detach().mean(0)
    assert torch.cosine_similarity(difference, means - means.mean(0)).min() > 0.9, "the table holds the tokens' means"


def test_layers_of_different_norms(layered):
    """Each layer is scaled by itself, so that the small one is learnt beside the large one."""
    sae = sl.Crosscoder(D_IN, D_SAE, layers=2, k=3)
    sl.train(sae, layered, config(steps=120, lr=1e-2, log_every=60))
    small, large = unexplained(sae(layered).x_hat, layered)
    assert small < 0.5 and large < 0.5
    # Without scales of their own a coder of both, side by side, gives all to the large layer.
    flat = sl.BatchTopK(2 * D_IN, D_SAE, k=3)
    sl.train(flat, layered.flatten(1), config(steps=120, lr=1e-2, log_every=60))
    control = unexplained(flat(layered.flatten(1)).x_hat.view_as(layered), layered)
    assert control[0] > 2 * small


# ---- stores of several sites


IN, OUT, POST = sl.Site("mlp_in", 1), sl.Site("mlp_out", 1), sl.Site("resid_post", 0)


@pytest.fixture(scope="module")
def three(make_tiny, small_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three") / "store"
    return sl.harvest(make_tiny("llama"), [IN, OUT, POST], small_text, 1200, context=32, path=folder)


@pytest.fixture(scope="module")
def two(make_tiny, small_text, tmp_path_factory):
    """Written before read in the alphabet and in the model: only the order that was asked for says which is which."""
    folder = tmp_path_factory.mktemp("two") / "store"
    return sl.harvest(make_tiny("llama"), [OUT, IN], small_text, 1200, context=32, path=folder)


def acts(store, *sites):
    x = [store.rows(np.arange(len(store)), s.key) for s in sites]
    return x[0] if len(x) == 1 else torch.stack(x, 1)


def test_a_transcoder_reads_the_first_site_and_writes_the_second(two, tmp_path):
    sae = sl.SkipTranscoder(48, 64, k=8)
    run = sl.train(sae, two, config(steps=60), path=tmp_path / "run")
    assert (sae.reads, sae.writes) == ((OUT,), (IN,)) and sae.mask == two.mask and sae.site == OUT
    assert sae.meta["model"] == "LlamaForCausalLM" and sae.meta["context"] == 32
    right = unexplained(sae(acts(two, OUT)).x_hat, acts(two, IN))[0]
    wrong = unexplained(sae(acts(two, IN)).x_hat, acts(two, OUT))[0]
    assert right < 0.9 < 1 < wrong and abs(right - run.history[-1]["fvu"]) < 0.15
    loaded = sl.load(tmp_path / "run")
    assert (loaded.reads, loaded.writes) == ((OUT,), (IN,)) and same(loaded, sae) and loaded.mask == two.mask


def test_sites_set_on_the_coder_win(two, three):
    """What a transcoder, a crosscoder and an SAE say of themselves goes before the order of a store's sites."""
    transcoder = sl.Transcoder(48, 64, k=4)
    transcoder.reads, transcoder.writes = (IN,), (OUT,)
    sl.train(transcoder, two, config())
    assert (transcoder.reads, transcoder.writes) == ((IN,), (OUT,))
    other = sl.train(sl.Transcoder(48, 64, k=4), two, config()).coder
    assert (other.reads, other.writes) == ((OUT,), (IN,)) and not same(transcoder, other)
    wide = sl.Transcoder(48, 64, k=4)
    wide.reads, wide.writes = (POST,), (IN,)
    sl.train(wide, three, config())
    assert (wide.reads, wide.writes) == ((POST,), (IN,))
    crosscoder = sl.Crosscoder(48, 64, layers=2, k=4)
    crosscoder.reads = (POST, IN)
    sl.train(crosscoder, three, config())
    assert crosscoder.reads == crosscoder.writes == (POST, IN)
    sae = sl.TopK(48, 64, k=4)
    sae.reads = sae.writes = (OUT,)
    sl.train(sae, three, config())
    assert sae.reads == (OUT,) and same(sae, sl.train(sl.TopK(48, 64, k=4), three.at(OUT), config()).coder)


def test_a_view_says_what_is_read_and_written(three):
    """A store that was told which site is the target needs no second telling."""
    sae = sl.Transcoder(48, 64, k=4)
    sl.train(sae, three.view([POST], [IN]), config())
    assert (sae.reads, sae.writes) == ((POST,), (IN,))


def test_a_crosscoder_takes_all_sites(two, three):
    for store, sites in ((two, (OUT, IN)), (three, (IN, OUT, POST))):
        sae = sl.Crosscoder(48, 96, layers=len(sites), k=16)
        sl.train(sae, store, config(steps=60))
        assert sae.reads == sae.writes == sites and sae.mask == store.mask
        x = acts(store, *sites)
        other = x.roll(1, 1)  # each layer in the place of its neighbour: some of it is read even so
        right, wrong = unexplained(sae(x).x_hat, x), unexplained(sae(other).x_hat, other)
        assert max(right) < 0.8 and all(a < 0.8 * b for a, b in zip(right, wrong[1:] + wrong[:1], strict=True))


def test_tokens_of_a_store(three, tokenizer):
    store = three.at(POST)
    sae = sl.Tokenized(48, 64, vocab=len(tokenizer), k=4)
    sl.train(sae, store, config(steps=10))
    x, tokens = acts(three, POST), three.rows(np.arange(len(three)), "token")
    seen = torch.zeros(len(tokenizer), dtype=torch.bool)
    seen[tokens] = True
    assert sae.lookup[~seen].eq(0).all() and sae.lookup[seen].ne(0).any(1).float().mean() > 0.7
    right, wrong = (unexplained(sae(x, t).x_hat, x)[0] for t in (tokens, tokens.roll(1)))
    assert right < wrong


# ---- what does not fit


@pytest.mark.parametrize(
    ("name", "shapes", "words"),
    [
        (
            "TopK",
            [(12, 12)],
            r"the coder reads \(12,\) and writes \(12,\), the data holds \(12, 12\) and .*make them eq",
        ),
        ("TopK", [(13,)], "the coder reads d_in=12, the activations have width 13: make them equal"),
        ("Transcoder", [(12,)], r"a transcoder needs a target: pass sl.Batch\(x, target\), or a store of two sites"),
        ("Transcoder", [(12,), (7,)], r"and writes \(8,\), the data holds \(12,\) and \(7,\): make them equal"),
        ("Transcoder", [(13,), (8,)], "the coder reads d_in=12, the activations have width 13: make them equal"),
        ("Transcoder", [(2, 12), (8,)], r"reads \(12,\) .* the data holds \(2, 12\) and \(8,\): make them equal"),
        ("Crosscoder", [(12,)], r"the coder reads \(2, 12\) .* the data holds \(12,\) and \(12,\): make them equal"),
        ("Crosscoder", [(24,)], r"the coder reads \(2, 12\) .* the data holds \(24,\) and \(24,\): make them equal"),
        ("Crosscoder", [(3, 12)], r"the coder reads \(2, 12\) .* the data holds \(3, 12\) and \(3, 12\): make them"),
        ("Crosscoder", [(2, 13)], r"the coder reads \(2, 12\) .* the data holds \(2, 13\) and \(2, 13\): make them"),
        ("Tokenized", [(12,)], "a Tokenized coder needs token ids: .* or train it on a store"),
    ],
)
def test_shapes_that_do_not_fit(name, shapes, words):
    arguments = {"TopK": {}, "Transcoder": {"d_out": Y}, "Crosscoder": {"layers": 2}, "Tokenized": {"vocab": 7}}[name]
    sae = getattr(sl, name)(D_IN, D_SAE, k=3, **arguments)
    before = state(sae)
    tensors = [torch.randn(500, *shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    with pytest.raises(ValueError, match=words):
        sl.train(sae, tensors[0] if len(tensors) == 1 else sl.Batch(*tensors), config())
    assert same(sae, before) or name == "Tokenized"


def test_batches_that_do_not_fit(data, mapped, ids):
    for name, tensor, words in (
        ("target", mapped[1:], "x and target must have as many rows: got 2000 and 1999"),
        ("tokens", ids[1:], "x and tokens must have as many rows: got 2000 and 1999"),
        ("target", mapped.long(), r"must be a float tensor \(tokens, d_in\) .*, got \(2000, 8\) torch.int64"),
    ):
        batch = sl.Batch(data, mapped, ids)
        setattr(batch, name, tensor)  # past the check of shapes that only these tests run under
        with pytest.raises(ValueError, match=words):
            sl.train(sl.Transcoder(D_IN, D_SAE, k=3, d_out=Y), batch, config())
    words = r"token ids must lie from 0 to vocab-1=6, got .*build the coder with vocab="
    for wrong in (ids + 1, ids - 1):
        with pytest.raises(ValueError, match=words):
            sl.train(sl.Tokenized(D_IN, D_SAE, vocab=7, k=3), sl.Batch(data, data, wrong), config())
    hole = mapped.clone()
    hole[int(Rows(torch.arange(2000.0)[:, None]).batch(0, 64).x[5]), 3] = float("nan")
    with pytest.raises(ValueError, match=r"step 0: the activations hold NaN or Inf \(row 5 of the batch\)"):
        sl.train(sl.Transcoder(D_IN, D_SAE, k=3, d_out=Y), sl.Batch(data, hole), config())


def test_sites_that_do_not_fit(two, three):
    cases = [
        (sl.Transcoder(48, 64, k=4), three, "a transcoder needs a target: a store of two sites, .* got 3"),
        (
            sl.Transcoder(48, 64, k=4),
            three.at(IN),
            r"a transcoder needs a target: .* got 1 \(Site\('mlp_in', layer=1\)",
        ),
        (sl.Transcoder(48, 64, k=4, d_out=20), two, r"writes \(20,\), the data holds \(48,\) and \(48,\)"),
        (sl.Crosscoder(48, 64, layers=2, k=4), three, "crosscoder has layers=2, the store has 3 sites .*set sae.reads"),
        (sl.Crosscoder(48, 64, layers=3, k=4), two, "crosscoder has layers=3, the store has 2 sites .*: harvest as"),
        (sl.Crosscoder(47, 64, layers=2, k=4), two, r"the coder reads \(2, 47\) .* the data holds \(2, 48\)"),
    ]
    elsewhere = sl.Transcoder(48, 64, k=4)
    elsewhere.reads, elsewhere.writes = (IN,), (sl.Site("mlp_out", 2),)
    cases.append((elsewhere, two, r"this store has no Site\('mlp_out', layer=2\); it has Site\('mlp_out', layer=1\)"))
    for sae, store, words in cases:
        with pytest.raises(ValueError, match=words):
            sl.train(sae, store, config())


# ---- going on with what has a target, layers or tokens


def wired(name, data, mapped, layered, ids):
    """(a fresh coder, its data)."""
    return {
        "Transcoder": (sl.Transcoder(D_IN, D_SAE, k=3, d_out=Y), sl.Batch(data, mapped)),
        "SkipTranscoder": (sl.SkipTranscoder(D_IN, D_SAE, k=3, d_out=Y), sl.Batch(data, mapped)),
        "Crosscoder": (sl.Crosscoder(D_IN, D_SAE, layers=2, k=3), layered),
        "causal": (sl.Crosscoder(D_IN, D_SAE, layers=2, k=3, causal=True), layered),
        "Tokenized": (sl.Tokenized(D_IN, D_SAE, vocab=7, k=3), sl.Batch(data, data, ids)),
        "JumpReLU": (sl.JumpReLU(D_IN, D_SAE, sparsity=0.1), data),
        "L1": (sl.L1(D_IN, D_SAE, sparsity=0.1, drop=0.05), data),
        "Gated": (sl.Gated(D_IN, D_SAE, sparsity=0.1), data),
        "LeakyTopK": (sl.LeakyTopK(D_IN, D_SAE, k=3), data),
        "Spline": (sl.Spline(D_IN, D_SAE, k=3), data),
        "ProLU": (sl.ProLU(D_IN, D_SAE, sparsity=0.1), data),
        "VQ": (sl.VQ(D_IN, D_SAE), data),
    }[name]


@pytest.mark.parametrize("name", ["Transcoder", "SkipTranscoder", "Crosscoder", "causal", "Tokenized", "JumpReLU"])
def test_interrupted_with_targets_layers_or_tokens(name, data, mapped, layered, ids, tmp_path):
    """Scales of x, of the target and of each layer are part of a checkpoint."""
    sae, rows = wired(name, data, mapped, layered, ids)
    for at in (7, 17):
        with pytest.raises(KeyboardInterrupt):
            sl.train(sae, rows, config(), path=tmp_path / "run", callbacks=[stopper("step", at)])
    fresh, rows = wired(name, data, mapped, layered, ids)
    steps = []
    run = sl.train(fresh, rows, config(), path=tmp_path / "run", callbacks=[lambda e: steps.append(e.step)])
    unbroken, _ = wired(name, data, mapped, layered, ids)
    whole = sl.train(unbroken, rows, config())
    assert steps[0] == 17 and same(fresh, unbroken) and run.history == whole.history and fresh.meta == unbroken.meta
    again, _ = wired(name, data, mapped, layered, ids)
    assert same(sl.train(again, rows, config(), path=tmp_path / "run").coder, unbroken), "and opened when it is done"


def test_another_target_is_another_run(data, mapped, ids, tmp_path):
    make = lambda: sl.Tokenized(D_IN, D_SAE, vocab=7, k=3, d_out=Y)  # noqa: E731
    sl.train(make(), sl.Batch(data, mapped, ids), config(), path=tmp_path / "run")
    for batch in (sl.Batch(data, mapped + 1, ids), sl.Batch(data, mapped, ids.roll(1))):
        with pytest.raises(ValueError, match=r"holds another run; it differs in data: '.*-2000' there, '.*-2000'"):
            sl.train(make(), batch, config(), path=tmp_path / "run")


def test_resuming_from_a_store_of_several_sites(two, tmp_path):
    for number, make in enumerate((lambda: sl.Transcoder(48, 64, k=4), lambda: sl.Crosscoder(48, 64, layers=2, k=4))):
        sae, path = make(), tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            sl.train(sae, two, config(), path=path, callbacks=[stopper("step", 15)])
        sl.train(sae, Store(two.path, len(two)), config(), path=path)
        assert same(sae, sl.train(make(), two, config()).coder)
        turned = make()
        turned.reads, turned.writes = (IN,), (OUT,)
        if turned.transcodes:
            with pytest.raises(ValueError, match=r"it differs in .*data: "):
                sl.train(turned, two, config(), path=path)


def first_fvu(sae, rows):
    """FVU of the first batch as training scales it, by a coder in raw units."""
    rows = Rows(rows)
    first, batch = rows.batch(0, 4096), rows.batch(0, 64)
    sae.progress = 0.0  # what anneals starts again with a training
    x_hat = sae.train()(batch.x, batch.tokens).x_hat.detach()
    scale = 1 / first.target.norm(dim=-1).mean(0).unsqueeze(-1)
    y, y_hat = (batch.target * scale).flatten(1), (x_hat * scale).flatten(1)
    return float((y - y_hat).pow(2).sum() / (y - y.mean(0)).pow(2).sum())


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize(
    "name",
    ["JumpReLU", "Crosscoder", "causal", "Transcoder", "SkipTranscoder", "Tokenized", "L1", "Gated", "LeakyTopK",
     "Spline", "ProLU", "VQ"],
)  # fmt: skip
def test_training_on_from_raw_units(name, reloaded, data, mapped, layered, ids, tmp_path):
    """What has a unit (thresholds, tables, skips, layers of different norms) is taken back into scaled units: the first
    batch finds the coder as the last training left it."""
    sae, rows = wired(name, data, mapped, layered, ids)
    fresh = first_fvu(sae, rows)
    sl.train(sae, rows, config(steps=80, lr=1e-2, log_every=80))
    if reloaded:
        sae = sl.load(sae.save(tmp_path / "coder"))
    before, expected = state(sae.eval()), first_fvu(sae, rows)
    again = sl.train(sae.eval(), rows, config(steps=1, lr=1e-12))
    assert again.history[0]["fvu"] == pytest.approx(expected, rel=1e-3) and expected < 0.8 * min(fresh, 1)
    for parameter, _ in sae.named_parameters():
        was = before[parameter]
        # The scale is undone and done again in float32; causal zeros stay zeros.
        assert (state(sae)[parameter] - was).abs().max() <= 1e-4 * was.abs().max(), parameter


def test_training_on_at_another_scale(data):
    """The threshold of a JumpReLU goes with its units to data that is scaled otherwise: codes stay the same."""
    sae = sl.JumpReLU(D_IN, D_SAE, sparsity=0.1)
    sl.train(sae, data, config(steps=80, lr=1e-2))
    f = sae.encode(data).detach()
    sl.train(sae, torch.cat([data, 3 * data]), config(steps=1, lr=1e-12))
    assert torch.allclose(sae.encode(data), f, atol=1e-3 * float(f.max()))


def test_adam_is_torchs_own_whatever_way_the_memory_lies():
    """Held as its transpose, W_enc takes the steps that plain Adam takes."""
    ours, plain = sl.TopK(6, 20, k=2), sl.TopK(6, 20, k=2)
    adam, reference = Adam(ours), torch.optim.Adam(plain.parameters(), lr=0.01, foreach=False)
    assert not ours.W_enc.is_contiguous() and all(p.is_contiguous() for p in adam.held.values())
    for step in range(3):
        x = torch.randn(50, 6, generator=torch.Generator().manual_seed(step))
        for coder in (ours, plain):
            coder.zero_grad()
            coder(x).x_hat.pow(2).sum().backward()
        adam.update(0.01)
        reference.step()
    before = sl.TopK(6, 20, k=2)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(dict(ours.named_parameters())[name], p)
        assert not torch.equal(p, dict(before.named_parameters())[name])
