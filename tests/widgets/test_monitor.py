"""TrainingMonitor without a browser: training on a thread and as a callback, changes, code, what it sends."""

import json
import threading
import time

import pytest
import torch
from torch.nn import functional as F

import sae_lab as sl
from sae_lab.widgets import TrainingMonitor

D_IN, D_SAE = 12, 24
VIEW = "application/vnd.jupyter.widget-view+json"


def config(**more):
    return sl.TrainConfig(**{"steps": 40, "batch_size": 64, "lr": 3e-3, "dead_after": 500, **more})


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    dictionary = F.normalize(torch.randn(20, D_IN, generator=g), dim=1)
    return torch.rand(2000, 20, generator=g).pow(8) @ dictionary


def coder(**more):
    return sl.BatchTopK(D_IN, D_SAE, **{"k": 3, **more})


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


class Slow(sl.BatchTopK):
    """Steps of a known least length, so that a test can act between them."""

    def project(self):
        super().project()
        time.sleep(0.01)


def from_screen(monitor, method, **args):
    """A click: what Python answers."""
    answers = []
    reply, monitor._reply = monitor._reply, lambda number, kind, value: answers.append((kind, value))
    try:
        monitor._on_message(None, {"call": 1, "method": method, "args": args}, None)
    finally:
        monitor._reply = reply
    return answers[-1]


# ---- on a thread


def test_it_trains_on_a_thread(data, tmp_path):
    monitor = TrainingMonitor(sae := coder(), data, config(), path=tmp_path / "run")
    assert monitor.state == "waiting" and monitor.can_start and monitor.run is None
    assert repr(monitor) == "TrainingMonitor(waiting, step 0 of 40)"
    monitor.start()
    run = monitor.wait(60)
    assert run is monitor.run and run.coder is sae and monitor.state == "done" and run.changes == []
    assert same(sae, sl.train(coder(), data, config()).coder), "as in a cell"
    assert repr(monitor) == "TrainingMonitor(done, step 40 of 40)"
    curve = monitor.curves["BatchTopK"]
    assert curve["step"] == list(range(1, 41)) and curve["l0"] == [3.0] * 40
    assert same(sl.load(tmp_path / "run"), sae)


def test_the_notebook_stays_free_and_the_hand_is_heard(data):
    monitor = TrainingMonitor(sae := Slow(D_IN, D_SAE, k=3), data, config(steps=300))
    monitor.start()
    with pytest.raises(ValueError, match="this training runs already"):
        monitor.start()
    with pytest.raises(TimeoutError, match=r"still training after 0\.01 s"):
        monitor.wait(0.01)
    wait_for(lambda: monitor.now()["status"]["step"] >= 3)
    assert from_screen(monitor, "pause") == ("done", None)
    wait_for(lambda: monitor.state == "paused")
    step = monitor.status["step"]
    time.sleep(0.1)
    assert monitor.now()["status"]["step"] == step and monitor.curves["Slow"]["step"][-1] == step
    assert from_screen(monitor, "change", lr=1e-3, sparsity=2, coder=None) == ("done", None)
    assert monitor.changes == [], "it is made with the next step"
    assert from_screen(monitor, "resume") == ("done", None)
    wait_for(lambda: monitor.now()["status"]["step"] > step + 3)
    expected = [{"step": step, "what": "lr", "old": 3e-3, "new": 1e-3}, {"step": step, "what": "k", "old": 3, "new": 2}]
    assert monitor.changes == [{"coder": "Slow", **c} for c in expected]
    assert monitor.lines[0]["sparsity"] == 2 and monitor.lines[0]["lr"] == 1e-3
    assert from_screen(monitor, "stop") == ("done", None)
    run = monitor.wait(60)
    assert monitor.state == "stopped" and run.stopped and run.changes[:2] == expected and sae.k == 2
    plain = sl.train(coder(), data, config(steps=300), changes=run.changes)
    assert same(plain.coder, sae), "and can be done again"


def test_what_the_screen_asks_wrongly_is_refused(data):
    monitor = TrainingMonitor(Slow(D_IN, D_SAE, k=3), data, config(steps=500))
    assert from_screen(monitor, "pause") == ("error", "no training runs now, so that nothing can be changed")
    monitor.start()
    wait_for(lambda: monitor.lines)
    kind, why = from_screen(monitor, "change", sparsity=99)
    assert kind == "error" and why == "k must be an integer from 1 to d_sae=24, got 99"
    assert from_screen(monitor, "change", lr=-1)[1].startswith("lr must be a positive number")
    kind, why = from_screen(monitor, "change", lr=1e-3, coder="other")
    assert why == "no training of other runs now, so that nothing can be changed"
    assert from_screen(monitor, "change", lr=1e-3, sparsity=99)[0] == "error"
    monitor.stop()
    assert monitor.wait(60).changes[0]["what"] == "stop", "what was refused in part was not done in part"
    assert from_screen(monitor, "stop")[0] == "error"


@pytest.mark.parametrize("given", [(1,), (1, 2), (0, 2)])
def test_all_three_or_none(given, data):
    things = (coder(), data, config())
    with pytest.raises(ValueError, match=r"coder, data and config, all three .* or none"):
        TrainingMonitor(*(things[i] if i in given else None for i in range(3)))
    with pytest.raises(ValueError, match="or none"):
        TrainingMonitor(path="x")


def test_without_a_task():
    monitor = TrainingMonitor()
    with pytest.raises(ValueError, match="there is nothing to start: make the monitor with"):
        monitor.start()
    with pytest.raises(ValueError, match="nothing was started"):
        monitor.wait()
    assert repr(monitor) == "TrainingMonitor(waiting)" and "nothing was trained yet" in monitor.code()
    assert "waiting" in monitor._html() and not monitor.can_start


def test_a_training_that_fails(data):
    bad = data.clone()
    bad[:] = float("nan")
    monitor = TrainingMonitor(coder(), bad, config())
    monitor.start()
    with pytest.raises(ValueError, match="the activations hold NaN"):
        monitor.wait(60)
    assert monitor.state == "failed" and "hold NaN or Inf" in monitor.status["why"] and monitor.run is None
    assert "hold NaN" in monitor._html()


def test_a_training_that_fails_half_way(data):
    monitor = TrainingMonitor(coder(), data, config(lr=1e29))
    monitor.start()
    with pytest.raises(ValueError, match="the weights ran away"):
        monitor.wait(60)
    assert monitor.state == "failed" and "ran away" in monitor.status["why"]


def test_started_again(data, tmp_path):
    """With a path the finished run is opened, without steps; its curves come from its files."""
    monitor = TrainingMonitor(coder(), data, config(), path=tmp_path / "run")
    for _ in range(2):
        monitor.start()
        run = monitor.wait(60)
    assert monitor.state == "done" and len(monitor.curves["BatchTopK"]["step"]) == 40
    assert monitor.curves["BatchTopK"]["fvu"][-1] == pytest.approx(run.history[-1]["fvu"], rel=1e-4)
    assert repr(monitor) == "TrainingMonitor(done, step 40 of 40)" and "sl.train(sae, x" in monitor.code()


def test_a_changed_run_is_refused_aloud(data, tmp_path):
    changes = [{"step": 5, "what": "lr", "new": 1e-3}]
    sl.train(coder(), data, config(), path=tmp_path / "run", changes=changes)
    monitor = TrainingMonitor(coder(), data, config(), path=tmp_path / "run")
    monitor.start()
    with pytest.raises(ValueError, match="changed while it ran"):
        monitor.wait(60)
    assert "open its coder with sl.load" in monitor.status["why"]


def test_closing_does_not_stop_it(data):
    monitor = TrainingMonitor(sae := Slow(D_IN, D_SAE, k=3), data, config())
    monitor.start()
    wait_for(lambda: monitor.now()["status"]["step"] >= 3)
    monitor.close()
    assert monitor.wait(60).history[-1]["step"] == 40 and same(sae, sl.train(coder(), data, config()).coder)


# ---- as a callback


def test_as_a_callback(data, capsys):
    monitor = TrainingMonitor()
    run = sl.train(coder(), data, config(), callbacks=[monitor])
    assert monitor.state == "done" and monitor.curves["BatchTopK"]["step"][-1] == 40
    assert monitor.status["tokens"] == run.history[-1]["tokens"] == 2560
    assert "it/s" not in capsys.readouterr().err, "one progress is enough"
    sl.train(sl.TopK(D_IN, D_SAE, k=3), data, config(steps=10), callbacks=[monitor])
    assert list(monitor.curves) == ["TopK"], "the next training begins anew"


def test_the_weights_are_those_of_an_unwatched_run(data):
    watched, plain = (sl.train(coder(), data, config(), callbacks=c) for c in ([TrainingMonitor()], []))
    assert same(watched.coder, plain.coder) and watched.history == plain.history


def test_a_sweep_shows_a_line_for_each_coder(data):
    monitor = TrainingMonitor()
    grid = {"TopK": {"k": [2, 3]}, "L1": {"sparsity": 0.3}}
    sl.sweep(grid, data, config(), d_sae=D_SAE, callbacks=[monitor])
    assert list(monitor.curves) == ["TopK k=2", "TopK k=3", "L1"] and monitor.state == "done"
    assert [line["sparsity_name"] for line in monitor.lines] == ["k", "k", "sparsity"]
    assert monitor.curves["TopK k=2"]["l0"][-1] == 2 and monitor._html().count("<tr>") == 4


def test_a_sweep_in_hand(data):
    monitor, asked = TrainingMonitor(), []

    def ask(event):
        if event.kind == "step" and event.step == 5 and not asked:
            asked.append(True)
            monitor.change(sparsity=4, coder="TopK k=2")
            monitor.change(lr=1e-3)
            monitor.stop(coder="TopK k=3")
            monitor.pause()
            threading.Timer(0.3, monitor.resume).start()

    swept = sl.sweep({"TopK": {"k": [2, 3]}}, data, config(), d_sae=D_SAE, callbacks=[monitor, ask])
    assert asked and swept.coders[0].k == 4 and swept.runs[1].stopped and not swept.runs[0].stopped
    assert {c["coder"] for c in monitor.changes} == {"TopK k=2", "TopK k=3"} and monitor.state == "done"
    assert [c["what"] for c in swept.runs[0].changes] == ["k", "lr"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_it_hears_of_the_end_of_a_failed_training(error, data):
    def fail(event):
        if event.kind == "step" and event.step == 5:
            raise error("mine")

    monitor = TrainingMonitor()
    with pytest.raises(error):
        sl.train(coder(), data, config(), callbacks=[monitor, fail])
    assert monitor.state == ("interrupted" if error is KeyboardInterrupt else "failed")
    assert monitor.status["why"] == ("" if error is KeyboardInterrupt else "RuntimeError: mine")


def test_it_never_breaks_training(data, monkeypatch, caplog):
    monitor = TrainingMonitor()
    monkeypatch.setattr(monitor, "_tell", lambda **_: 1 / 0)
    run = sl.train(coder(), data, config(), callbacks=[monitor])
    assert run.history[-1]["step"] == 40
    assert "training goes on" in monitor.error and "ZeroDivisionError" in monitor.error
    assert sum("the monitor failed" in record.message for record in caplog.records) == 1


# ---- what it says


def test_the_code_gives_the_same_run(data, tmp_path):
    """Executed in a fresh name space: the same weights and figures, changes and stop included."""

    def ask(event):
        if event.kind == "step" and event.step == 12:
            event.control.set(lr=1e-3, sparsity=2)
        if event.kind == "step" and event.step == 30:
            event.control.stop()

    monitor = TrainingMonitor()
    run = sl.train(sae := coder(seed=4), data, config(), callbacks=[monitor, ask])
    names = {"x": data}
    exec(monitor.code(), names)
    assert same(names["sae"], sae) and names["run"].history == run.history and names["run"].changes == run.changes
    assert "BatchTopK(d_in=12, d_sae=24, seed=4, k=3" in monitor.code() and "'what': 'stop'" in monitor.code()


def test_the_code_of_a_store(make_tiny, small_text, tmp_path):
    store = sl.harvest(make_tiny("llama"), ["layers.1", "embed"], small_text, 2000, context=32, path=tmp_path / "store")
    monitor = TrainingMonitor(sae := sl.TopK(48, 64, k=4), store.at("layers.1"), config(steps=10))
    before = monitor.code()
    monitor.start()
    run = monitor.wait(60)
    names = {}
    exec(monitor.code(), names)
    assert same(names["sae"], sae) and names["run"].history == run.history
    names = {}
    exec(before, names)  # what Start would do
    assert same(names["sae"], sae)


def test_the_code_of_a_sweep(data):
    monitor = TrainingMonitor()
    swept = sl.sweep({"TopK": {"k": [2, 3]}}, data, config(steps=10), d_sae=D_SAE, callbacks=[monitor])
    names = {"x": data}
    exec(monitor.code(), names)
    assert same(names["sae_0"], swept.coders[0]) and same(names["sae_1"], swept.coders[1])


def test_the_code_of_a_coder_that_was_trained_before(data):
    sl.train(sae := coder(), data, config(steps=5))
    monitor = TrainingMonitor(sae, data, config(steps=5))
    monitor.start()
    monitor.wait(60)
    assert "# sae: your BatchTopK as it was before training" in monitor.code()


def test_the_static_form(data, tmp_path):
    def ask(event):
        if event.kind == "step" and event.step == 12:
            event.control.set(sparsity=2)

    monitor = TrainingMonitor()
    sl.train(coder(), data, config(), callbacks=[monitor, ask])
    html = monitor._html()
    assert "<script" not in html and "decoder cosine" in html and '<td style="text-align:left">k</td>' in html
    bundle = monitor._repr_mimebundle_()[0]
    assert VIEW in bundle and bundle["text/html"] == html and bundle["text/plain"] == repr(monitor)
    page = monitor.to_html(tmp_path / "monitor.html").read_text()
    assert '"curves":{"BatchTopK"' in page and '"state":"done"' in page


def test_it_sends_little(data, monkeypatch):
    """A point is sent when it changes, not every curve at every step."""
    monitor = TrainingMonitor()
    sent = []
    monkeypatch.setattr(monitor, "send", lambda content: sent.append(len(json.dumps(content))))
    monkeypatch.setattr("sae_lab.widgets.monitor.PERIOD", 0.0)  # a message a step, far more than there will be
    sl.train(coder(), data, config(steps=900), callbacks=[monitor])
    assert 900 <= len(sent) <= 910 and max(sent) < 700
    assert len(monitor.curves["BatchTopK"]["step"]) == 300 and len(json.dumps(monitor.curves)) < 40_000


def test_messages_are_seldom(data, monkeypatch):
    monitor, sent = TrainingMonitor(), []
    monkeypatch.setattr(monitor, "send", lambda content: sent.append(time.monotonic()))
    slow = Slow(D_IN, D_SAE, k=3)
    sl.train(slow, data, config(steps=150), callbacks=[monitor])
    seconds = sent[-1] - sent[0]
    assert len(sent) <= seconds / 0.5 + 4 and seconds > 1.4


def test_what_grows_is_what_there_is(data, monkeypatch):
    """The messages put together are the curves."""
    monitor, sent = TrainingMonitor(), []
    monkeypatch.setattr(monitor, "send", lambda content: sent.append(json.loads(json.dumps(content))))
    monkeypatch.setattr("sae_lab.widgets.monitor.PERIOD", 0.0)
    sl.train(coder(), data, config(steps=700), callbacks=[monitor])
    points = []
    for message in sent:
        at, more = message["grown"]["BatchTopK"]
        points[at:] = more
    curve = monitor.curves["BatchTopK"]
    assert [list(column) for column in zip(*points, strict=True)] == [curve[name] for name in curve]
