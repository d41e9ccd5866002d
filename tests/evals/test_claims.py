"""Verdicts go by the interval, not by the point."""

import json
import math

import pytest
from scipy import stats

import sae_lab as sl
from sae_lab.evals.claims import MIME
from sae_lab.results import Html


def test_the_interval_over_seeds_is_students():
    values = [0.91, 0.88, 0.93, 0.79]
    found = sl.evals.claim("A", values, least=0.7)
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high)) and found.value == pytest.approx(sum(values) / 4)


@pytest.mark.parametrize(
    ("interval", "bounds", "verdict"),
    [
        ((0.4, 0.6), {"least": 0.3}, "holds"),
        ((0.4, 0.6), {"least": 0.4}, "holds"),
        ((0.4, 0.6), {"least": 0.45}, "open"),
        ((0.4, 0.6), {"least": 0.7}, "does not hold"),
        ((0.4, 0.6), {"most": 0.7}, "holds"),
        ((0.4, 0.6), {"most": 0.55}, "open"),
        ((0.4, 0.6), {"most": 0.3}, "does not hold"),
        ((0.4, 0.6), {"least": 0.3, "most": 0.55}, "open"),
        ((0.4, 0.6), {"least": 0.3, "most": 0.7}, "holds"),
        ((0.4, 0.6), {"least": 0.65, "most": 0.7}, "does not hold"),
        ((math.nan, math.nan), {"least": 0.3}, "open"),
    ],
)
def test_the_verdict_goes_by_the_interval(interval, bounds, verdict):
    assert sl.evals.claim("A", 0.5, interval=interval, **bounds).verdict == verdict


def test_a_point_beyond_the_threshold_is_not_enough():
    """All three seeds are above zero; their interval is not."""
    assert sl.evals.claim("A beats B", [0.01, 0.2, 0.4], least=0).verdict == "open"


def test_claims_make_a_table_and_data():
    one = sl.evals.claim("<b>A</b>", [0.8, 0.9, 0.85], least=0.7, published="92.4 %", control=[0.1, 0.3],
                         control_name="random")  # fmt: skip
    two = sl.evals.claim("B", 0.5, interval=(math.nan, math.nan), most=0.5, digits=".1%")
    found = sl.evals.verdicts("Someone 2026, [1](https://arxiv.org/abs/1)", one, two, setting="3 seeds")
    for part in ("Someone 2026", "at least 0.700", "0.850 [0.726, 0.974]", "0.200 random", "holds", "at most 50.0%",
                 "undefined", "open", "3 seeds"):  # fmt: skip
        assert part in repr(found), part
    bundle = found._repr_mimebundle_()
    assert "<b>" not in bundle["text/html"] and not isinstance(bundle["text/html"], Html)
    data = json.loads(json.dumps(bundle[MIME], allow_nan=False))
    assert [claim["verdict"] for claim in data["claims"]] == ["holds", "open"] and data["claims"][1]["low"] is None
    assert list(found.to_pandas().verdict) == ["holds", "open"]


@pytest.mark.parametrize(
    ("values", "settings", "said"),
    [
        ([0.1, 0.2], {"least": 0}, "three seeds at least, got 2"),
        (0.5, {"least": 0}, "three seeds at least, got 1"),
        ([0.1, 0.2, 0.3], {}, "needs a threshold"),
        (0.5, {"least": 0, "interval": (0.6, 0.7)}, "must hold the value"),
        (0.5, {"least": 0, "interval": (0.6, 0.4)}, "must hold the value"),
        ([], {"least": 0}, "three seeds at least, got 0"),
    ],
)
def test_what_is_refused(values, settings, said):
    with pytest.raises(ValueError, match=said):
        sl.evals.claim("A", values, **settings)


def test_verdicts_need_a_claim():
    with pytest.raises(ValueError, match="needs a claim"):
        sl.evals.verdicts("Someone 2026")
