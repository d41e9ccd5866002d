"""Widgets on a model of a real server show what they show on the same model here."""

import numpy as np
import pytest

import sae_lab as sl
from sae_lab.widgets.panel import Job
from tests.remote.conftest import PROMPTS, SITE, same

pytestmark = pytest.mark.remote
PROMPT = PROMPTS[2]


def numbers(values):
    """What a screen is sent, where None stands for no value."""
    return np.array(values, dtype=float)


def test_steering_sliders(far, near, coders, server):
    there, here = (
        sl.SteeringSliders(lm, coders["topk"], {3: 2.0}, prompt=PROMPT, max_new_tokens=5) for lm in (far, near)
    )
    for widget in (there, here):
        widget.run()
    assert (there.baseline, there.steered) == (here.baseline, here.steered)
    assert there.steered != there.baseline
    for far_one, near_one in zip(there.comparison["measures"], here.comparison["measures"], strict=True):
        assert far_one["name"] == near_one["name"]
        same(numbers(far_one["values"]), numbers(near_one["values"]), 1e-4)  # of small differences
    assert f"remote={server.url!r}" in there.code()  # the server it has, not the hosted one


def test_token_features(far, near, coders):
    """Features come from the server, direct effects do not, and the widget says so."""
    there, here = (sl.TokenFeatures(lm, coders["topk"], PROMPT, token=3) for lm in (far, near))
    assert [row["feature"] for row in there.detail["rows"]] == [row["feature"] for row in here.detail["rows"]]
    assert here.detail["effects"] and not there.detail["effects"]
    assert "needs the model on this machine" in there.detail["note"]
    there.strip = here.strip = "loss"
    assert there.losses[1:] == pytest.approx(here.losses[1:], rel=1e-3)


def test_inspector(far, near, coders, small_text, tmp_path):
    """A typed text is read on the server."""
    coder, indices = coders["topk"], []
    for lm, name in ((far, "far"), (near, "near")):
        store = sl.harvest(lm, SITE, small_text, 1000, path=tmp_path / name, context=64, coder=coder)
        indices.append(sl.index_features(coder, lm, store, path=tmp_path / f"{name}-index"))
    feature = indices[1].best()
    scored = []
    for index in indices:
        panel, replies = sl.FeatureInspector(index, feature), []
        panel._reply = lambda number, kind, value, replies=replies: replies.append((kind, value))
        panel._answer(1, lambda panel=panel: panel.score(Job(panel, 1), PROMPT))
        assert replies[0][0] == "done", replies
        scored.append(replies[0][1])
    same(*(numbers(one["values"]) for one in scored))


def test_patching_grid(far):
    with pytest.raises(ValueError, match="needs the model on this machine"):
        sl.PatchingGrid(far, "The fox ran over", "The dog ran over", answers=(" the", " a"))
