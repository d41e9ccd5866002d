"""FeatureInspector without a browser: traits, errors, the static form, and the built files."""

import json
import pathlib
import re
import threading
from html.parser import HTMLParser

import numpy as np
import pytest
import traitlets

import sae_lab.widgets
from sae_lab.widgets import FeatureInspector

from .standin import StandIn

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
STATIC = pathlib.Path(sae_lab.widgets.__file__).parent / "static"


@pytest.fixture
def index():
    return StandIn()


@pytest.fixture
def panel(index):
    return FeatureInspector(index)


class Tags(HTMLParser):
    """Collects the tags and the text of HTML."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_opens_on_the_best_feature_or_the_one_asked_for(index):
    assert FeatureInspector(index).feature == index.best() == 812
    assert FeatureInspector(index, feature=17).view["feature"] == 17
    dead = FeatureInspector(index, 0)
    assert dead.view["count"] == 0
    assert "fires on none" in dead.snapshot()._repr_html_()


def test_repr_is_stable(panel):
    assert repr(panel) == "FeatureInspector(feature=812, d_sae=4608)"


def test_setting_the_feature_changes_the_view(panel, index):
    panel.feature = 405
    assert panel.view == index[405].to_dict()
    panel.feature = np.int64(17)  # as index.order() gives them
    assert panel.feature == 17 and type(panel.feature) is int
    assert panel.view["feature"] == 17


@pytest.mark.parametrize("wrong", [9999, 4608, -1, "812", 1.5, None, True])
def test_a_feature_out_of_range_names_rule_value_and_remedy(panel, wrong):
    with pytest.raises(ValueError) as caught:
        panel.feature = wrong
    message = str(caught.value)
    assert "feature must be an int from 0 to 4607" in message
    assert f"got {wrong!r}" in message
    assert "index.best()" in message
    assert panel.feature == panel.view["feature"] == 812


def test_the_constructor_checks_too(index):
    with pytest.raises(ValueError, match="got 4608"):
        FeatureInspector(index, feature=4608)


def test_the_front_end_opens_a_feature(panel):
    panel.set_state({"feature": 1999})
    assert panel.feature == panel.view["feature"] == 1999


def test_a_refused_value_from_the_front_end_is_shown_and_undone(panel, monkeypatch):
    sent = []
    monkeypatch.setattr(panel, "send_state", lambda key=None: sent.append(key))
    panel.set_state({"feature": 9999})
    assert "feature must be an int from 0 to 4607, got 9999" in panel.error
    assert ["feature"] in sent  # the panel gets the old number back
    assert panel.feature == panel.view["feature"] == 812
    panel.set_state({"feature": 17})
    assert panel.error == ""


def test_an_error_while_reading_is_raised_and_shown(panel, index, monkeypatch):
    def broken(self, feature):
        raise OSError("the index file is gone")

    monkeypatch.setattr(StandIn, "__getitem__", broken)
    with pytest.raises(OSError, match="gone"):
        panel.feature = 17
    assert panel.error == "OSError: the index file is gone"


def test_search_and_sort(panel, index):
    assert [row["feature"] for row in panel.results] == list(index.order("best"))
    assert panel.results[0].keys() == {"feature", "density", "max", "tokens", "label"}
    assert "7 of 7 live features" in panel.results_note
    panel.sort = "density"
    assert [row["feature"] for row in panel.results] == list(index.order("density"))
    panel.query = "Ju"
    assert [row["feature"] for row in panel.results] == [812]
    panel.query = "zebra"
    assert panel.results == [] and "no feature for words: zebra" in panel.results_note
    panel.query = "e"
    densities = [row["density"] for row in panel.results]
    assert len(densities) > 2 and densities == sorted(densities, reverse=True)
    with pytest.raises(traitlets.TraitError):
        panel.sort = "colour"


def test_all_that_is_sent_is_json(panel):
    state = panel.get_state(["feature", "query", "sort", "results", "results_note", "view", "error"])
    json.dumps(state, allow_nan=False)


def test_two_threads_end_on_one_feature(panel):
    features = [812, 17, 405, 1999]

    def click(start):
        for i in range(40):
            panel.set_state({"feature": features[(start + i) % 4]})

    threads = [threading.Thread(target=click, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert panel.view["feature"] == panel.feature


def test_mimebundle_has_widget_html_and_text(panel):
    data, _ = panel._repr_mimebundle_()
    assert set(data) == {WIDGET_VIEW, "text/html", "text/plain"}
    assert data["text/plain"] == repr(panel)
    assert data[WIDGET_VIEW]["model_id"] == panel.model_id


def test_static_html_escapes_and_needs_no_script(index):
    page = Tags(FeatureInspector(index, 4607).snapshot()._repr_html_())
    assert page.tags <= {"div", "p", "b", "table", "tr", "th", "td", "mark", "i", "code"}
    assert "<script>" in page.text.replace(" ", "")
    assert "mark" in page.tags


def test_static_html_escapes_every_text(index):
    attack = "<img src=x onerror=alert(1)>"
    view = index[812].to_dict()
    view["groups"][0]["label"] = view["lens_note"] = attack
    view["groups"][0]["contexts"][0]["tokens"][0] = attack
    view["promoted"] = view["suppressed"] = [[attack, 1.0]]
    html = sae_lab.widgets.static_html.feature_html(view)
    assert "<div>↵" not in html and "</p>↵" not in html  # the mark of a new line is for texts, not between elements
    assert "<img" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") >= 5


def test_a_snapshot_stays_as_it_was(panel):
    snapshot = panel.snapshot()
    before = snapshot._repr_html_()
    panel.feature = 17
    assert snapshot._repr_html_() == before
    assert repr(snapshot) == "Snapshot(FeatureInspector(feature=812, d_sae=4608))"
    assert "<details><summary>Logit lens: the final norm" in panel.snapshot()._repr_html_()  # 17 has a lens note


def test_white_space_is_visible_in_the_static_form():
    dotted = sae_lab.widgets.static_html.dotted
    assert (dotted("\n"), dotted("  "), dotted(" cat")) == ("↵", "··", " cat")


@pytest.mark.parametrize("name", ["inspector.js", "inspector.css"])
def test_built_files_are_small_and_self_contained(name):
    built = (STATIC / name).read_text(encoding="utf-8")
    assert 0 < len(built.encode()) < 60_000
    # The name of the SVG namespace is no address that anything fetches.
    urls = set(re.findall(r"https?://[^\"'`\s)]*", built)) - {"http://www.w3.org/2000/svg"}
    assert not urls
    assert "innerHTML" not in built
    assert "@import" not in built
