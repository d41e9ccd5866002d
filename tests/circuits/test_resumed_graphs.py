"""``trace(path=...)``: a call that was ended goes on to the same graph; another graph's rows are refused."""

import signal
import subprocess
import sys
import time

import pytest
import torch

import sae_lab as sl
from sae_lab.circuits import trace
from sae_lab.circuits.tracing import Tracer
from tests.circuits.test_attribution_graphs import PROMPT, made, transcoders  # noqa: F401
from tests.circuits.test_cross_layer_graphs import random_clt


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Rounds of 16 features, of which eight are visited together."""
    monkeypatch.setattr("sae_lab.circuits.tracing.RANKED", 16)
    monkeypatch.setattr("sae_lab.circuits.tracing.SWEEP_BYTES", 8 * 4 * 6 * 48)


def same(a, b):
    assert a.nodes == b.nodes
    for name in ("effects", "rest", "rest_size", "influence", "values"):
        assert torch.equal(getattr(a, name).nan_to_num(), getattr(b, name).nan_to_num()), name
    assert repr(a) == repr(b)


def broken_off(monkeypatch, after):
    """Ctrl-C in the visit after so many."""
    visit, done = Tracer._visit, []

    def once(self, part):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(part)
        return visit(self, part)

    monkeypatch.setattr(Tracer, "_visit", once)  # private: where the time of a trace goes


@pytest.mark.parametrize(("features", "after"), [(40, 1), (40, 3), (4096, 2), (40, 0)])
def test_ended_by_ctrl_c_and_called_again(made, tmp_path, monkeypatch, features, after):  # noqa: F811
    """Also in the middle of a round, whose features were chosen by fewer rows than there are now."""
    lm, coders, _ = made
    whole = trace(lm, coders, PROMPT, features=features)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        broken_off(patched, after)
        trace(lm, coders, PROMPT, features=features, path=tmp_path / "rows")
    assert len(list((tmp_path / "rows").glob("rows-*"))) == after
    visits, visit = [], Tracer._visit
    monkeypatch.setattr(Tracer, "_visit", lambda self, part: (visits.append(part), visit(self, part))[1])
    same(trace(lm, coders, PROMPT, features=features, path=tmp_path / "rows"), whole)
    assert sum(map(len, visits)) == whole.counts[0] - 8 * after, "what was written is not computed again"
    visits.clear()
    same(trace(lm, coders, PROMPT, features=features, path=tmp_path / "rows"), whole)
    assert not visits, "a finished graph is read"


def test_damaged_rows_are_computed_anew(made, tmp_path, caplog):  # noqa: F811
    lm, coders, _ = made
    whole = trace(lm, coders, PROMPT, features=40, path=tmp_path)
    files = sorted(tmp_path.glob("rows-*"))
    content = bytearray(files[2].read_bytes())
    content[-5] ^= 1
    files[2].write_bytes(content)
    same(trace(lm, coders, PROMPT, features=40, path=tmp_path), whole)
    assert f"{files[2]} is damaged" in caplog.text and len(sorted(tmp_path.glob("rows-*"))) == len(files)


def test_another_graph_is_refused(made, tmp_path, make_tiny):  # noqa: F811
    lm, coders, _ = made
    trace(lm, coders, PROMPT, features=20, path=tmp_path / "rows")
    for call, words in [
        (lambda path: trace(lm, coders, PROMPT + ".", features=20, path=path), "prompt: "),
        (lambda path: trace(lm, coders, PROMPT, " a", features=20, path=path), "targets: None there"),
        (lambda path: trace(lm, coders, PROMPT, features=21, path=path), "features: 20 there, 21 now"),
        (lambda path: trace(lm, coders, PROMPT, features=20, first="drop", path=path), "first: keep there, drop now"),
        (lambda path: trace(lm, transcoders(lm, seed=5), PROMPT, features=20, path=path), "coders: "),
        (lambda path: trace(make_tiny("gpt2"), coders, PROMPT, features=20, path=path), "model"),
    ]:
        with pytest.raises(ValueError, match=words):
            call(tmp_path / "rows")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="has files of something else"):
        trace(lm, coders, PROMPT, features=20, path=tmp_path / "other")
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_a_cross_layer_transcoder(make_tiny, tmp_path):
    lm = make_tiny("llama")
    clt = random_clt(lm)
    whole = trace(lm, clt, PROMPT, features=30, path=tmp_path)
    same(trace(lm, clt, PROMPT, features=30, path=tmp_path), whole)
    with torch.no_grad():
        clt.W_dec[-1] += 0.1
    with pytest.raises(ValueError, match="coders: "):
        trace(lm, clt, PROMPT, features=30, path=tmp_path)


KILLED = """
import sys, time, torch
import sae_lab as sl
from sae_lab.circuits import tracing
torch.set_num_threads(1)
tracing.RANKED, tracing.SWEEP_BYTES = 16, 8 * 4 * 6 * 48
visit = tracing.Tracer._visit
tracing.Tracer._visit = lambda self, part: (time.sleep(0.3), visit(self, part))[1]  # time to be killed in
model, coders, path = sys.argv[1:4]
tracing.trace(sl.LM(model), sl.TranscoderSet.load(coders), sys.argv[4], features=60, path=path)
"""


def test_killed_and_called_again(made, tmp_path):  # noqa: F811
    lm, coders, _ = made
    lm._module.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    coders.save(tmp_path / "coders")
    path = tmp_path / "rows"
    arguments = [str(tmp_path / "model"), str(tmp_path / "coders"), str(path), PROMPT]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(list(path.glob("rows-*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must have been running"
    loaded, read = sl.LM(str(tmp_path / "model")), sl.TranscoderSet.load(tmp_path / "coders")
    whole = trace(loaded, read, PROMPT, features=60)
    same(trace(loaded, read, PROMPT, features=60, path=path), whole)
    assert not [file for file in path.iterdir() if file.name.startswith(".")], "nothing is left of the killed process"
