"""match on dictionaries whose cosines are known by hand."""

import math

import pytest
import torch

import sae_lab as sl
from sae_lab.feature_index import matching
from sae_lab.worlds import planted

EYE = torch.eye(4)


def test_by_hand():
    a = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 3, 4]])  # unit rows: e1, e2, (0, .6, .8)
    b = torch.tensor([[0.0, 1, 0], [1, 0, 0]])
    found = sl.match(a, b)
    assert found.a_to_b == pytest.approx((1 + 1 + 0.6) / 3)
    assert found.b_to_a == pytest.approx(1)
    assert (found.mcc, found.recall, found.rows, found.left_out) == (pytest.approx(1), 1, (3, 2), (0, 0))
    assert found.permutation.tolist() == [1, 0] and found.cosines.tolist() == [1, 1]
    assert found.best.tolist() == [1, 1]
    assert found.orderedness == pytest.approx(-1)  # two pairs, crossed
    back = sl.match(b, a)
    assert (back.a_to_b, back.b_to_a) == (found.b_to_a, pytest.approx(found.a_to_b))
    assert back.permutation.tolist() == [1, 0, -1] and math.isnan(back.cosines[2])
    assert back.recall == pytest.approx(2 / 3)
    assert sl.match(b, a, threshold=0.5).recall == 1


def test_one_to_one_is_not_the_best_cosine():
    """Both rows of a are nearest to b's first; the pairs of largest sum give it to the one that loses least."""
    a = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    b = torch.tensor([[0.96, 0.28], [0.0, 1.0]])
    found = sl.match(a, b)
    assert found.a_to_b == pytest.approx((0.96 + 0.8 * 0.96 + 0.6 * 0.28) / 2)
    assert found.permutation.tolist() == [0, 1]
    assert found.mcc == pytest.approx((0.96 + 0.6) / 2)


def test_opposite_directions_do_not_match():
    found = sl.match(-EYE, EYE)
    assert (found.b_to_a, found.mcc, found.recall) == (0, 0, 0)  # best is any of the orthogonal ones


def test_one_feature_found_many_times():
    """a_to_b alone would call this perfect."""
    found = sl.match(EYE[[0, 0, 0, 0]], EYE)
    assert (found.a_to_b, found.b_to_a, found.mcc, found.recall) == (1, 0.25, 0.25, 0.25)


def test_orderedness_is_the_papers_formula():
    order = torch.tensor([2, 0, 1, 3, 5, 4])
    eye = torch.eye(6)
    d = torch.arange(6) - order.argsort()
    found = sl.match(eye[order], eye)
    assert found.orderedness == pytest.approx(1 - 6 * float((d**2).sum()) / (6 * 35))
    assert found.permutation.tolist() == order.argsort().tolist() and found.mcc == pytest.approx(1)
    assert sl.match(eye, eye).orderedness == pytest.approx(1)
    assert sl.match(eye.flip(0), eye).orderedness == pytest.approx(-1)


def test_rows_of_zeros_have_no_direction():
    a = torch.cat([torch.zeros(1, 4), EYE, torch.zeros(2, 4)])
    found = sl.match(a, EYE)
    assert (found.a_to_b, found.b_to_a, found.mcc, found.orderedness) == (1, 1, 1, pytest.approx(1))
    assert found.permutation.tolist() == [1, 2, 3, 4]  # numbered as in a
    assert (found.rows, found.left_out) == ((4, 4), (3, 0))
    back = sl.match(EYE, a)
    assert back.permutation.tolist() == [-1, 0, 1, 2, 3, -1, -1]
    assert back.best.isnan().tolist() == [True, *[False] * 4, True, True] and back.recall == 1


def test_features_that_never_fired():
    coder = sl.TopK(4, 6, k=1)
    with torch.no_grad():
        coder.W_dec[:4] = EYE
        coder.f_scale[:3] = 1
    everything, live = sl.match(coder, EYE), sl.match(coder, EYE, live=True)
    assert everything.rows == (6, 4) and everything.recall == 1 and everything.left_out == (0, 0)
    assert live.rows == (3, 4) and live.recall == 0.75 and live.left_out == (3, 0)
    assert live.permutation.tolist() == [0, 1, 2, -1]


def test_worlds_and_coders():
    world = planted(n=12, d=8, l0=2, samples=10)
    coder = sl.TopK(8, 12, k=2, seed=0)
    with torch.no_grad():
        coder.W_dec.copy_(3 * world.dictionary.flip(0))
    found = sl.match(coder, world)
    assert found.mcc == pytest.approx(1) and found.recall == 1 and found.orderedness == pytest.approx(-1)
    assert sl.match(world, world).orderedness == pytest.approx(1)


def test_the_control_is_chance():
    """Random rows in a's place: far below a match, and like an untrained coder. It is no coder's start itself."""
    world = planted(n=128, d=64, samples=10)
    control = sl.match(world, world).control
    assert control.rows == (128, 128) and control.control is None
    assert 0.2 < control.b_to_a < 0.4 and control.recall == 0 and abs(control.orderedness) < 0.3
    for seed in range(3):
        untrained = sl.match(sl.TopK(64, 128, k=4, seed=seed), world)
        assert untrained.b_to_a == pytest.approx(control.b_to_a, abs=0.02)
        assert untrained.mcc == pytest.approx(control.mcc, abs=0.02)
        assert sl.match(world, sl.TopK(64, 128, k=4, seed=seed)).control.b_to_a < 0.4
    assert sl.match(world, world).control.to_pandas().equals(control.to_pandas())  # the same rows every time


def test_chunks_change_nothing(monkeypatch):
    a, b = (planted(n=50, d=16, l0=2, samples=10, seed=s).dictionary for s in (0, 1))
    whole = sl.match(a, b)
    monkeypatch.setattr(matching, "_CHUNK", 7)
    parts = sl.match(a, b)
    assert parts.to_pandas().equals(whole.to_pandas()) and torch.equal(parts.permutation, whole.permutation)


def test_large_dictionaries_are_matched_one_to_one_only_when_asked(monkeypatch):
    monkeypatch.setattr(matching, "MOST_ROWS", 3)
    found = sl.match(EYE, EYE)
    assert (found.a_to_b, found.b_to_a, found.recall) == (1, 1, 1)
    assert math.isnan(found.mcc) and math.isnan(found.orderedness) and (found.permutation == -1).all()
    assert "no pairs above 3 rows: match(..., hungarian=True)" in repr(found)
    assert sl.match(EYE, EYE, hungarian=True).mcc == 1
    assert math.isnan(sl.match(EYE[:2], EYE[:2], hungarian=False).mcc)


def test_it_prints():
    found = sl.match(EYE, EYE)
    lines = repr(found).splitlines()
    assert lines[0].split() == ["value", "control"] and "random rows" in lines[1]
    assert lines[3].split()[:2] == ["MCC", "1.000"]
    assert lines[-1] == "a: 4 rows, b: 4 rows" and len(lines) == 7
    frame = found.to_pandas()
    assert list(frame.index) == ["match", "random rows"]
    assert list(frame.columns) == ["a_to_b", "b_to_a", "mcc", "recall", "orderedness"]
    assert "<table>" in found._repr_html_() and "1.000" in found._repr_html_()
    one = sl.match(EYE[:1], EYE[:1])
    assert math.isnan(one.orderedness) and "nan" not in repr(one)  # no order of one


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (EYE, torch.eye(3), "a and b must have rows of the same width, got 4 and 3: match dictionaries of the same"),
        (torch.zeros(2, 4), EYE, "a has no direction to match: all rows are zero"),
        (EYE, EYE * float("nan"), "b holds NaN or Inf"),
        (EYE[0], EYE, r"a must have float rows \(rows, width\), got \(4,\) torch.float32"),
        (EYE, EYE.long(), "b must have float rows"),
    ],
)
def test_bad_input(a, b, words):
    with pytest.raises(ValueError, match=words):
        sl.match(a, b)


def test_more_bad_input():
    with pytest.raises(ValueError, match=r"threshold is a cosine from -1 to below 1, got 1\.5"):
        sl.match(EYE, EYE, threshold=1.5)
    with pytest.raises(ValueError, match=r"a has no direction to match: no feature of it ever fired.*live=False"):
        sl.match(sl.TopK(4, 6, k=1), EYE, live=True)
