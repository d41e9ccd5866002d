"""FeatureInspector on a real index: trying texts, notes, comparisons, conditions, edits, code, pages."""

import json

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.widgets import FeatureInspector, Session


@pytest.fixture
def panel(real_index):
    return FeatureInspector(real_index)


TEXT = "The river rose in March, and by April the town had a new bridge."


def test_a_tried_text_has_the_codes_of_a_reading(panel, lab, screen):
    kind, scored = screen(panel).call("score", text=TEXT)
    assert kind == "done" and scored["feature"] == panel.feature
    reading = lab.lm.read(TEXT, [lab.sae.site])
    with torch.no_grad():
        codes = lab.sae.encode(reading[lab.sae.site][0])[:, panel.feature]
    assert scored["values"][0] is None  # the prefix is left out
    found = torch.tensor([v or 0.0 for v in scored["values"]])
    assert torch.allclose(found[1:], codes[1:], atol=2e-4 * max(1.0, float(codes.max())))
    assert "".join(scored["tokens"][1:]) == TEXT
    assert panel.session.selection.prompt == ""  # a text that is tried moves no other widget


@pytest.mark.parametrize("text, says", [("", "type some text"), ("river " * 2000, "at most 256")])
def test_a_text_that_cannot_be_scored_says_why(panel, screen, text, says):
    kind, message = screen(panel).call("score", text=text)
    assert kind == "error" and says in message


def test_emoji_and_markup_are_text(panel, screen):
    kind, scored = screen(panel).call("score", text="👩‍🚀 <b>x</b>")
    assert kind == "done" and len(scored["values"]) == len(scored["tokens"])
    json.dumps(scored, allow_nan=False)


def test_the_weakest_contexts(panel, real_index, screen):
    kind, found = screen(panel).call("weakest")
    values = [c["values"][c["peak"]] for c in found]
    _, all_values = real_index.activations(panel.feature)
    assert kind == "done"
    assert np.allclose(values, np.sort(all_values)[: len(values)], atol=1e-4)


def test_notes_are_kept_beside_the_index(panel, real_index, lab, screen):
    view = screen(panel)
    assert view.call("write_note", label="  rivers ", text="<b>see</b> also 3")[0] == "done"
    assert panel.note == {"label": "rivers", "text": "<b>see</b> also 3"}
    again = sl.index_features(lab.sae, lab.lm, lab.store, path=real_index.path)
    assert again.notes[panel.feature].label == "rivers"
    assert again.find("label:RIVER") == [panel.feature]
    assert "<b>see</b>" not in panel.snapshot()._repr_html_()
    panel.query = "label:river"
    assert [row["feature"] for row in panel.results] == [panel.feature]
    other = int(again.order("density")[3])
    panel.write_note("", "", feature=panel.feature)
    assert len(sl.index_features(lab.sae, lab.lm, lab.store, path=real_index.path).notes) == 0
    panel.write_note("x", "", feature=other)  # not the open one
    assert panel.note["label"] == "" and real_index.notes[other].label == "x"


def test_damaged_notes_are_refused_and_stay(real_index, lab):
    (real_index.path / "notes.json").write_text("not json")
    with pytest.raises(ValueError, match="move it away"):
        sl.index_features(lab.sae, lab.lm, lab.store, path=real_index.path)
    assert (real_index.path / "notes.json").read_text() == "not json"


def test_conditions(panel, real_index):
    panel.query = "density>5% max>0.1"
    live = real_index.density > 0.05
    assert {row["feature"] for row in panel.results} == set(np.flatnonzero(live & (real_index.max > 0.1)).tolist())
    panel.query = "norm<"
    before = panel.results
    panel.query = "norm<x"
    assert "compared with a number, got 'x'" in panel.error and panel.results == before
    panel.query = "norm>0"
    assert panel.error == "" and len(panel.results) > 0
    middle = float(np.median(real_index.norm))
    assert all(real_index.norm[i] < middle for i in real_index.find(f"norm<{middle}"))
    panel.sort = "norm"
    values = [real_index.norm[row["feature"]] for row in panel.results]
    assert values == sorted(values, reverse=True)


def test_a_pinned_feature_is_compared(panel, real_index, lab):
    a, b = (int(i) for i in real_index.order("density")[:2])
    panel.feature, panel.pinned = a, b
    rows = [set(real_index.activations(i)[0].tolist()) for i in (a, b)]
    w = lab.sae.W_dec.detach()
    assert panel.pair["cosine"] == pytest.approx(float(torch.cosine_similarity(w[a], w[b], dim=0)), abs=1e-5)
    assert panel.pair["both"] == len(rows[0] & rows[1])
    assert panel.pair["jaccard"] == pytest.approx(len(rows[0] & rows[1]) / len(rows[0] | rows[1]))
    assert panel.pair["only"] == (len(rows[0] - rows[1]), len(rows[1] - rows[0]))
    panel.feature = b
    assert panel.pair == {}
    with pytest.raises(ValueError, match="from 0 to 95"):
        panel.pinned = 96


def test_edits_go_on_the_session(panel, lab, screen):
    view = screen(panel)
    assert view.call("add_edit", kind="steer")[0] == "done"
    assert view.call("add_edit", kind="ablate")[0] == "done"
    edits = list(panel.session.edits)
    assert [type(e).__name__ for e in edits] == ["Steer", "Ablate"] and edits[0].features == [panel.feature]
    assert not torch.equal(lab.lm.logits(TEXT, edits=panel.session.edits), lab.lm.logits(TEXT))


def test_two_widgets_follow_one_selection(real_index):
    session = Session()
    first = FeatureInspector(real_index, session=session)
    second = FeatureInspector(real_index, session=session)
    assert session.selection.feature == first.feature and session.selection.site == real_index.site.key
    other = int(real_index.order("density")[0])
    first.feature = other
    assert second.feature == other == second.view["feature"]
    session.selection.pick(feature=3, site="resid_post-7")  # another coder's
    assert first.feature == other
    second.close()
    session.selection.pick(feature=5, site=real_index.site.key)
    assert first.feature == 5 and second.feature == other


def test_the_code_gives_the_same_feature(panel, lab, screen, capsys):
    panel.pinned = int(panel._index.order("density")[0])
    view = screen(panel)
    view.call("score", text=TEXT)
    kind, code = view.call("copy_code")
    assert kind == "done"
    lines = code.splitlines()
    at = next(i for i, line in enumerate(lines) if "sl.LM(" in line)
    lines[at] = "lm = model"  # a tiny model has no name to load it by
    scope = {"model": lab.lm}
    exec("\n".join(lines), scope)
    printed = capsys.readouterr().out
    assert str(panel._index[panel.feature]) in printed
    assert str(panel._index.score(panel.feature, TEXT)) in printed
    assert scope["index"][panel.feature].to_dict() == panel._index[panel.feature].to_dict()


def kept_in(path):
    page = path.read_text(encoding="utf-8")
    state = page.split('id="state">')[1].split("</script>")[0]
    return page, json.loads(state)["kept"]


def test_a_page_holds_fifty_features_in_a_megabyte(panel, tmp_path):
    path = panel.to_html(tmp_path / "panel.html")
    page, kept = kept_in(path)
    assert len(kept) == 50 and path.stat().st_size < 1_000_000
    assert "src=" not in page and "href=" not in page and "@import" not in page  # it fetches nothing
    assert set(kept_in(panel.to_html(tmp_path / "few.html", features=[1, 2]))[1]) == {"1", "2", str(panel.feature)}


def test_no_text_ends_the_script_of_a_page(panel, tmp_path):
    panel.write_note("</script><script>alert(1)</script>", "")
    page, kept = kept_in(panel.to_html(tmp_path / "panel.html"))
    assert page.count("<script") == 2 and "alert(1)" in kept[str(panel.feature)]["note"]["label"]


def test_an_unknown_call_is_refused(panel, screen):
    for method in ("close", "nothing", "__init__"):
        kind, message = screen(panel).call(method)
        assert kind == "error" and "has no call" in message


def test_a_cancelled_job_says_so_and_no_more(panel, screen, monkeypatch):
    import threading

    begun, go_on = threading.Event(), threading.Event()

    def slow(feature, text):
        begun.set()
        go_on.wait(10)
        return panel._index[feature]  # checked for the cancel before it is looked at

    monkeypatch.setattr(panel._index, "score", slow)
    view = screen(panel)
    number = view.start("score", text="x")
    assert begun.wait(5)
    view.cancel(number)
    go_on.set()
    assert view.wait(number) == ("cancelled", None)
    assert panel._jobs == {}
