"""FeatureMap without a browser: points and groups, the session, labels, refusals, the static forms."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from sae_lab import geometry
from sae_lab.widgets import FeatureInspector, Session

# The bytes that the view reads.
from sae_lab.widgets.feature_map import FeatureMap, _packed

from .standin import StandIn
from .test_inspector import WIDGET_VIEW, Tags
from .test_names import spelled


def array(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


@pytest.fixture
def places():
    """Of 96 features all but the last have a point."""
    points = np.random.default_rng(0).standard_normal((96, 2))
    points[95] = np.nan
    return points


@pytest.fixture
def groups():
    return np.where(np.arange(96) < 30, np.arange(96) // 10, -1)


@pytest.fixture
def shown(real_index, places, groups):
    return FeatureMap(real_index, places, groups)


def test_points_fill_a_square_from_the_top_left():
    packed = array(_packed(np.array([[-3.0, 10.0], [5.0, 10.0], [1.0, 30.0]])), "<u2").reshape(3, 2)
    assert packed.tolist() == [[0, 65535], [65535, 65535], [32768, 0]]
    assert array(_packed(np.array([[2.0, 2.0]])), "<u2").tolist() == [0, 65535]  # one point has no width
    assert _packed(np.zeros((0, 2))) == ""


def test_features_without_a_point_are_left_out(shown):
    assert array(shown.features, "<u4").tolist() == list(range(95))
    assert array(shown.groups, "<i2").tolist()[:31] == [i // 10 for i in range(30)] + [-1]
    assert len(array(shown.points, "<u2")) == 190
    assert shown.note == "30 in 3 groups, the others grey"
    assert repr(shown) == "FeatureMap(95 of 96 features, feature=None)"


def test_a_click_opens_the_feature_in_the_inspector(real_index, places):
    session = Session()
    inspector = FeatureInspector(real_index, session=session)
    shown = FeatureMap(real_index, places, session=session)
    assert shown.feature is session.selection.feature is None, "a new widget chooses nothing for the others"
    shown.set_state({"feature": 40})  # as the screen does
    assert inspector.feature == session.selection.feature == 40
    inspector.feature = 41
    assert shown.feature == 41
    session.selection.pick(feature=3, site="resid_post-7")  # another coder's feature 3
    assert shown.feature == 41


def test_a_closed_map_leaves_the_session(real_index, places):
    session = Session()
    shown = FeatureMap(real_index, places, session=session)
    shown.close()
    session.selection.pick(feature=5, site=real_index.site.key)
    assert shown.feature is None
    shown.close()


def test_a_result_brings_points_and_groups(lab):
    found = geometry.clusters(lab.sae, min_cluster_size=3)
    shown = FeatureMap(lab.sae, found)
    assert array(shown.groups, "<i2").tolist() == found.labels.tolist()
    plain = FeatureMap(lab.sae, found.points)
    assert plain.points == shown.points and plain.note == ""
    assert FeatureMap(lab.sae, found, torch.zeros(96, dtype=torch.long)).note == "96 in 1 group, the others grey"


def test_labels(shown, real_index, lab, places, screen):
    feature = int(real_index.best())
    kind, label = screen(shown).call("label", feature=feature)
    assert (kind, label) == ("done", spelled(real_index, feature))
    assert feature in shown.find(label) and shown.find(f" {feature} ") == [feature] and shown.find(" ") == []
    real_index.annotate(feature, label="mine")
    assert shown.label(feature) == FeatureMap(lab.sae, places).label(feature) == "mine"
    shown.colour = "labels"
    assert shown.legend == [{"group": 0, "name": "mine", "count": 1}] and shown.note.startswith("1 in 1 label,")
    real_index.annotate(feature, label="")
    assert shown.legend == [] and max(array(shown.groups, "<i2")) == -1
    shown.colour = "groups"
    assert [row["count"] for row in shown.legend] == [10, 10, 10]
    assert screen(shown).call("label", feature=96) == ("error", "feature must be an int from 0 to 95, got 96")


@pytest.mark.parametrize("feature", [-1, 96])
def test_a_feature_that_is_none(shown, feature):
    with pytest.raises(ValueError, match="feature must be an int from 0 to 95"):
        shown.feature = feature
    shown.set_state({"feature": feature})
    assert shown.feature is None and "from 0 to 95" in shown.error


def test_what_is_refused(lab, places, monkeypatch):
    with pytest.raises(
        ValueError, match=r"points must be of shape \(96, 2\), one a feature, NaN for none; got \(95, 2\)"
    ):
        FeatureMap(lab.sae, places[:95])
    for wrong in (np.zeros(3, int), np.zeros(96), np.full(96, -2), np.full(96, 40_000)):
        with pytest.raises(ValueError, match="groups must be 96 integers from -1 to 32767"):
            FeatureMap(lab.sae, places, wrong)
    monkeypatch.setattr("sae_lab.widgets.feature_map.MOST", 90)
    with pytest.raises(ValueError, match="at most 90 points, got 95: set others to NaN"):
        FeatureMap(lab.sae, places)


def test_the_static_form_has_no_script(shown, monkeypatch):
    # A name that could not be written here without a coder's notes.
    monkeypatch.setattr(shown._names, "of", lambda features: dict.fromkeys(features, "<script>alert(1)</script>"))
    html = shown.snapshot()._repr_html_()
    tags = Tags(html)
    assert tags.tags <= {"div", "p", "table", "tr", "th", "td", "bdi"} and "<script>alert(1)</script>" in tags.text
    assert "Map of 95 features; 30 in 3 groups" in tags.text and "Selected" not in tags.text
    shown.feature = 7
    assert "Selected: feature 7" in Tags(shown.snapshot()._repr_html_()).text
    data, _ = shown._repr_mimebundle_() or ({}, {})
    assert WIDGET_VIEW in data


def test_a_page_without_a_kernel(shown, tmp_path):
    text = shown.to_html(tmp_path / "map.html").read_text()
    found = re.search(r'<script type="application/json" id="state">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    state = json.loads(found[1])
    assert len(state["labels"]) == 95 and state["points"] == shown.points and state["feature"] is None


def test_the_code_gives_the_feature(shown, lab, places):
    assert shown.code().endswith("# nothing is selected")
    shown.feature = 7
    assert "index = sl.index_features(sae, lm, store, " in shown.code() and shown.code().endswith("\nindex[7]")
    plain = FeatureMap(lab.sae, places)
    plain.feature = 7
    scope = {}
    exec(plain.code().replace("sae.W_dec[7]", "row = sae.W_dec[7]"), scope)
    assert torch.equal(scope["row"], lab.sae.W_dec[7])


def test_a_hundred_thousand_points_are_a_megabyte():
    class Wide:
        d_sae = 100_000

    points = np.random.default_rng(0).standard_normal((100_000, 2))
    shown = FeatureMap(Wide(), points, np.zeros(100_000, int))
    assert len(shown.points) + len(shown.features) + len(shown.groups) < 1_400_000


def test_a_stand_in_without_a_site(places):
    points = np.zeros((StandIn().d_sae, 2))
    shown = FeatureMap(StandIn(), points)
    shown.feature = 812
    assert shown.session.selection.feature == 812
