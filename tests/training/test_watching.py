"""Curves of trainings that run, and the figures beside those of the loop."""

import math
import time

import pytest
import torch
from torch.nn import functional as F

import sae_lab as sl
from sae_lab.training import watching
from sae_lab.training.watching import Curves, decoder_cosine
from sae_lab.types import Codes
from tests.training.test_loop import D_IN, D_SAE, coder, config, planted


@pytest.fixture(scope="module")
def data():
    return 7 * planted(2000, n=20, d=D_IN)[0] + 3


def test_decoder_cosine_by_hand():
    sae = sl.TopK(2, 3, k=1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [-0.6, 0.8], [0.0, 1.0]]))
    assert decoder_cosine(sae) == pytest.approx((0.6 + 0.8 + 0.8) / 3)  # signs do not count, a row's own cosine neither
    with torch.no_grad():
        sae.W_dec.mul_(torch.tensor([[3.0], [0.1], [2.0]]))
    assert decoder_cosine(sae) == pytest.approx(2.2 / 3), "lengths do not count"
    assert math.isnan(decoder_cosine(sl.TopK(2, 1, k=1)))


def test_decoder_cosine_of_a_sample():
    """A twin for each row gives 1; random rows give what the whole matrix gives, nearly."""
    sae = sl.TopK(32, 2000, k=1)
    W = F.normalize(sae.W_dec.detach(), dim=1)
    cosines = (W @ W.T).abs().fill_diagonal_(0)
    assert decoder_cosine(sae) == pytest.approx(float(cosines.amax(1).mean()), abs=0.02)
    assert decoder_cosine(sae) == decoder_cosine(sae) and decoder_cosine(sae, rows=2000) != decoder_cosine(sae, rows=20)
    with torch.no_grad():
        sae.W_dec[1000:] = sae.W_dec[:1000]
    assert decoder_cosine(sae) == pytest.approx(1, abs=1e-6)


def test_thresholds_of_families():
    codes = Codes(torch.tensor([3.0, 0.0, 0.5, 2.0]), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 4]), 3)
    assert sl.BatchTopK(4, 3, k=2).training_threshold(codes) == 0.5
    assert sl.BatchTopK(4, 3, k=2).training_threshold(codes._replace(values=torch.zeros(4))) is None
    assert sl.JumpReLU(4, 3, start=0.25).training_threshold(codes) == 0.25
    assert sl.TopK(4, 3, k=2).training_threshold(codes) is None and sl.L1(4, 3).training_threshold(codes) is None


def test_curves_of_a_short_training_are_its_history(data):
    curves = Curves()
    run = sl.train(coder(), data, config(), callbacks=[curves])
    (line,) = curves.lines.values()
    assert line["step"] == list(range(1, 31)) and list(curves.lines) == ["BatchTopK"]
    for name in ("loss", "fvu", "l0", "dead", "lr"):
        assert line[name] == pytest.approx([row[name] for row in run.history], rel=1e-4)
    assert all(value > 0 for value in line["threshold"]) and 0.3 < line["cosine"][0] < 1


@pytest.mark.parametrize(("steps", "every"), [(299, 1), (300, 1), (301, 1), (1000, 1), (100_000, 7)])
def test_a_curve_has_few_points_and_they_are_means(steps, every):
    curves = Curves()
    curves.lines["a"] = curves.empty()
    rows = [{"step": step, "fvu": step / steps} for step in range(every, steps + 1, every)]
    for row in rows:
        curves.add("a", row, steps)
    line = curves.lines["a"]
    stride = math.ceil(steps / watching.POINTS)
    assert len(line["step"]) <= watching.POINTS and line["step"][-1] == rows[-1]["step"]
    for at in (0, len(line["step"]) // 2, -1):
        mine = [row for row in rows if (row["step"] - 1) // stride == (line["step"][at] - 1) // stride]
        assert line["fvu"][at] == pytest.approx(sum(row["fvu"] for row in mine) / len(mine), rel=1e-4)
    assert line["loss"] == [None] * len(line["step"])
    assert curves.last("a", 2)[1][:3] == [line["step"][-1], None, line["fvu"][-1]]


def test_a_run_that_goes_on_keeps_its_curves(data, tmp_path):
    def stop(event):
        if event.kind == "step" and event.step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sl.train(coder(), data, config(), path=tmp_path / "run", callbacks=[stop])
    curves = Curves()
    sl.train(coder(), data, config(), path=tmp_path / "run", callbacks=[curves])
    assert curves.lines["BatchTopK"]["step"] == list(range(1, 31))


def test_cosines_cost_a_small_share_of_the_time(monkeypatch):
    """Each is taken as long after the one before as it cost, over ``SHARE``."""
    monkeypatch.setattr(watching, "decoder_cosine", lambda coder: time.sleep(0.002) or 0.5)
    curves, taken = Curves(), 0
    events = []
    sl.train(coder(), planted(2000, n=20, d=D_IN)[0], config(steps=1), callbacks=[events.append])
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < 1.5:
        taken += "cosine" in curves.more(events[1])
        time.sleep(0.001)
    assert 2 <= taken <= passed / (0.002 / watching.SHARE) + 1


def test_a_sweep_has_a_line_for_each_coder(data):
    curves = Curves()
    sl.sweep({"TopK": {"k": [2, 3]}, "JumpReLU": {"sparsity": 0.3}}, data, config(), d_sae=D_SAE, callbacks=[curves])
    assert set(curves.lines) == {"TopK k=2", "TopK k=3", "JumpReLU"}
    assert curves.lines["TopK k=2"]["threshold"] == [None] * 30 and curves.lines["JumpReLU"]["threshold"][0] > 0
