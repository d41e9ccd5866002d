"""A feature's name stands wherever its number does: tables, edits, widgets. Names are a stranger's text."""

import json
import re
import shutil

import pytest

import sae_lab as sl
from sae_lab import circuits, noting
from sae_lab.noting import Names
from sae_lab.results import Name, escaped, visible
from sae_lab.widgets import FeatureInspector, FeatureMap, PatchingGrid, Session, SteeringSliders, TokenFeatures

PROMPT, SOURCE = "the cat sat on", "the dog sat on"
ATTACK = "<img src=x onerror=alert(1)>"
FAMILY = "👨‍👩‍👧‍👦"


def METRIC(logits, tokens):
    return logits[:, -1, 5]


def spelled(index, feature):
    return " ".join(visible(t).strip() or "·" for t in index.top_tokens(feature, 4))


@pytest.fixture(autouse=True)
def nothing_open(monkeypatch):
    """No index of another test names these features."""
    monkeypatch.setattr(noting, "INDEXES", type(noting.INDEXES)())


@pytest.fixture
def feature(lab):
    """One that fires on the prompt; its notes are taken away afterwards."""
    differs = circuits.attribution(lab.lm, lab.sae, [PROMPT], [SOURCE], METRIC).to_pandas()["feature"]
    active = sl.features(lab.lm, lab.sae, PROMPT).to_pandas()["feature"]
    feature = int(active[active.isin(differs)].iloc[0])
    yield feature
    sl.notes(lab.sae).write(feature, "", "")


def test_a_label_stands_in_tables_and_edits_and_changes_with_it(lab, feature):
    table = sl.features(lab.lm, lab.sae, PROMPT)
    found = circuits.attribution(lab.lm, lab.sae, [PROMPT], [SOURCE], METRIC)
    plain = repr(table), repr(found)
    assert "name" in table.to_pandas() and " name " not in plain[1]  # a column without a name is not printed
    sl.notes(lab.sae).write(feature, "pets")
    assert f"{feature} pets (" in repr(table) and set(table.to_pandas()["name"]) == {"pets", ""}
    assert set(found.to_pandas().query("feature == @feature")["name"]) == {"pets"}
    direct = circuits.direct_effects(lab.lm, lab.sae, PROMPT, 1)
    assert feature not in direct.features or "pets" in repr(direct)
    assert f"feature={feature} 'pets'," in repr(sl.Steer(lab.sae, feature, strength=2.0))
    assert f"feature=[{feature} 'pets', " in repr(sl.Ablate(lab.sae, [feature, (feature + 1) % 96]))
    graph = circuits.feature_circuit(lab.lm, [lab.sae], [PROMPT], [SOURCE], METRIC, steps=1, sizes=())
    assert set(graph.to_pandas().query("feature == @feature")["name"]) == {"pets"}
    sl.notes(lab.sae).write(feature, "")
    assert (repr(table), repr(found)) == plain


def test_a_label_comes_before_top_tokens_and_those_before_explanations(lab, feature, tmp_path):
    names, notes = Names(lab.sae), sl.notes(lab.sae)
    assert names[feature] == ""
    notes.explanations.write({feature: [noting.Said("small animals", "a model")]})
    assert names[feature] == "small animals"
    index = sl.index_features(lab.sae, lab.lm, lab.store, path=tmp_path / "index")
    tokens = spelled(index, feature)
    assert names[feature] == index.names[feature] == index[feature].names[str(feature)] == tokens
    notes.write(feature, "pets")
    assert names[feature] == index.names[feature] == "pets" and "(pets)" in repr(index[feature])
    notes.explanations.write({feature: []})


def test_a_name_is_never_another_coders(lab, feature, real_index):
    sl.notes(lab.sae).write(feature, "pets")
    other = sl.BatchTopK(48, 96, k=5, seed=9)
    other.reads = other.writes = lab.sae.reads
    assert Names(other)[feature] == "" and Names(lab.sae)[feature] == "pets"
    for widget in (SteeringSliders, TokenFeatures):
        with pytest.raises(ValueError, match="index is of another coder: pass what"):
            widget(lab.lm, other.eval(), index=real_index)


def test_without_notes_nothing_is_read_or_hashed(lab, monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_LAB_DATA", str(tmp_path))
    # Alone, without the notes that another test may have put beside it.
    shutil.copytree(lab.folder / "sae", tmp_path / "sae", ignore=shutil.ignore_patterns("notes-*"))
    fresh = sl.load(tmp_path / "sae")
    del fresh.meta["id"]  # as of a coder of another library
    monkeypatch.setattr(type(fresh), "id", property(lambda self: pytest.fail("a hash of all weights")))
    assert Names(fresh)[3] == "" and "feature=3)" in repr(sl.Ablate(fresh, 3))


def test_a_log_is_read_once_and_again_when_it_has_changed(lab, feature, monkeypatch):
    sl.notes(lab.sae).write(feature, "pets")
    names, opened = Names(lab.sae), []
    monkeypatch.setattr("builtins.open", lambda *a, _open=open, **k: opened.append(a) or _open(*a, **k))
    assert {names[feature] for _ in range(50)} == {"pets"} and not opened
    file = sl.notes(lab.sae).file
    with file.open("ab") as f:  # another process
        f.write(noting.line(feature, {"label": "cats"}, 1e12))
    assert names[feature] == "cats"
    file.write_bytes(b"".join(x + b"\n" for x in file.read_bytes().split(b"\n")[:-2]))


@pytest.mark.parametrize("label", [ATTACK, "שלום עולם", f"pets {FAMILY * 20}", "x" * 10_000, "a\u202eb"])
def test_names_are_a_strangers_text(lab, feature, label):
    sl.notes(lab.sae).write(feature, label)
    html = sl.features(lab.lm, lab.sae, PROMPT)._repr_html_()
    shown = re.search(r"<bdi[^>]*>(.*?)</bdi>", html)
    assert shown is not None and "<img" not in html and "\u202e" not in html
    assert len(shown[1]) < 80 and (visible(label) in html or "title=" in shown[0])
    assert sl.notes(lab.sae)[feature].label == label
    with pytest.raises(ValueError, match="a label has at most 10,000 characters, got 10,001: put more into its text"):
        sl.notes(lab.sae).write(feature, "x" * 10_001)


def test_a_cut_name_is_whole_in_its_title():
    cut = Name(f"pets {FAMILY * 20}")
    assert len(cut) <= 40 and cut.endswith(f"{FAMILY}…") and FAMILY * 20 in escaped(cut)
    assert escaped(Name("pets")) == "<bdi>pets</bdi>" and Name(" a\nb ") == "a b"


def test_all_widgets_show_a_label_as_soon_as_it_is_written(lab, feature, real_index):
    session = Session()
    inspector = FeatureInspector(real_index, feature, session=session)
    sliders = SteeringSliders(lab.lm, lab.sae, {feature: 2.0}, PROMPT, session=session, max_new_tokens=2)
    tokens = TokenFeatures(lab.lm, lab.sae, PROMPT, token=1, session=session)
    grid = PatchingGrid(lab.lm, PROMPT, SOURCE, coder=lab.sae, session=session)
    points = FeatureMap(lab.sae, [[i, i] for i in range(96)], session=session)
    tokens.feature = feature
    site = lab.sae.site
    grid.features = {f"{site.key}:2": {"features": [[feature, 0.5]], "others": 0.0, "active": 1, "error": 0.0}}
    before = sliders.names[str(feature)]
    assert before == spelled(real_index, feature)  # of the index that is open
    inspector.write_note("pets", "")
    assert sliders.names[str(feature)] == tokens.names[str(feature)] == "pets"
    assert grid.names == {f"{site.key} {feature}": "pets"}
    assert points.find("PET") == [feature] and points.legend == [{"group": 0, "name": "pets", "count": 1}]
    assert inspector.view["names"][str(feature)] == "pets"
    assert session.edits.rows[0]["name"] == "pets" and "<bdi>pets</bdi>" in session.edits._html()
    for panel in (inspector, sliders, tokens):
        assert "<bdi>pets</bdi>" in panel.snapshot()._repr_html_()
        json.dumps(panel.get_state(), default=str)
        panel.close()


def test_a_dose_is_measured_on_the_features_own_tokens(lab, feature, tmp_path):
    sliders = SteeringSliders(lab.lm, lab.sae, {feature: 2.0}, PROMPT, max_new_tokens=2)
    with pytest.raises(ValueError, match="no index of this coder tells which ones the feature fires on: type some"):
        sliders.measure()
    index = sl.index_features(lab.sae, lab.lm, lab.store, path=tmp_path / "index")
    with_index = SteeringSliders(lab.lm, lab.sae, {feature: 2.0}, PROMPT, max_new_tokens=2, index=index)
    with_index.measure()
    assert with_index.dose["target"] and set(with_index.dose["target"]) <= set(index.top_tokens(feature, 8))
