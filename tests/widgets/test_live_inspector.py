"""FeatureInspector on a real index: trying texts, notes, comparisons, conditions, edits, code, pages."""

import json
import shutil
import time

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab import noting
from sae_lab.noting import Said
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


def test_notes_follow_the_coder(panel, real_index, lab, screen):
    view = screen(panel)
    kind, note = view.call("write_note", label="  rivers ", text="<b>see</b> also 3")
    assert kind == "done" and panel.note == note == {"label": "rivers", "text": "<b>see</b> also 3"}
    again = sl.index_features(lab.sae, lab.lm, lab.store, path=real_index.path)
    assert again.notes[panel.feature].label == "rivers" == sl.notes(lab.sae)[panel.feature].label
    assert again.search("label:RIVER").features == [panel.feature]
    assert "<b>see</b>" not in panel.snapshot()._repr_html_()
    panel.query = "label:river"
    assert [row["feature"] for row in panel.results] == [panel.feature]
    other = int(again.order("density")[3])
    panel.write_note("", "", feature=panel.feature)
    assert len(sl.index_features(lab.sae, lab.lm, lab.store, path=real_index.path).notes) == 0
    panel.write_note("x", "", feature=other)  # not the open one
    assert panel.note["label"] == "" and real_index.notes[other].label == "x"


def test_more_tokens_and_a_cleared_cache_leave_the_notes(lab, real_index, small_text, tmp_path):
    real_index.annotate(3, "rivers")
    more = sl.harvest(lab.lm, lab.sae.site, small_text, 1800, context=48, path=tmp_path / "more")
    assert sl.index_features(lab.sae, lab.lm, more, path=tmp_path / "other").notes[3].label == "rivers"
    shutil.rmtree(real_index.path)
    again = sl.index_features(sl.load(lab.folder / "sae"), lab.lm, more, path=tmp_path / "other")
    assert again.notes[3].label == "rivers"


def test_what_python_and_others_write_is_shown_at_once(real_index, lab, screen):
    first, second = FeatureInspector(real_index), FeatureInspector(real_index)
    feature = first.feature
    real_index.annotate(feature, "from Python")
    for panel in (first, second):
        assert panel.note == {"label": "from Python", "text": ""}
        assert {r["feature"]: r["label"] for r in panel.results}[feature] == "from Python"
    screen(first).call("write_note", label="from Python", text="typed", was={"label": "from Python", "text": ""})
    assert second.note == {"label": "from Python", "text": "typed"}
    real_index.explanations.write({feature: [Said("rivers", "an explainer")]})
    assert [s["text"] for s in second.view["explanations"]] == ["rivers"]
    second.close()
    sl.notes(lab.sae).write(feature, "later")
    assert first.note["label"] == "later" and second.note["label"] == "from Python"


def test_an_older_value_of_the_screen_overwrites_nothing(panel, real_index, screen):
    """The page says what it showed and when it was typed: what was written in between stays, and is put on the page."""
    view, before = screen(panel), time.time()
    real_index.annotate(panel.feature, "from Python")
    was, typed = {"label": "", "text": ""}, {"label": before, "text": time.time() + 9}
    kind, note = view.call("write_note", label="typed before", text="", was=was, typed=typed)
    assert kind == "done" and note == panel.note == {"label": "from Python", "text": ""}
    assert "typed before" in real_index.notes.file.read_text()  # nor is that one lost
    view.call("write_note", label="", text="a text", was=was, typed=typed)
    assert panel.note == {"label": "from Python", "text": "a text"}
    was, typed = {"label": "from Python", "text": "a text"}, {"label": before, "text": before}
    view.call("write_note", label="typed after", text="a text", was=was, typed=typed)  # whatever the page's clock says
    assert panel.note["label"] == "typed after"
    kind, message = view.call("write_note", label="x", text="", was=7)
    assert kind == "error" and "seen must be" in message


def test_two_kernels_merge_by_field_and_time(panel, real_index, screen):
    """What another kernel wrote comes with what is done next; what was typed after it counts."""
    other, feature = noting.Log(real_index.notes.file), panel.feature
    shown, then = dict(panel.note), time.time()
    other.write({feature: {"label": "theirs", "text": "theirs"}})
    view = screen(panel)
    view.call("write_note", label="mine", text="", was=shown, typed={"label": time.time(), "text": then})
    assert panel.note == {"label": "mine", "text": "theirs"}
    other.write({feature: {"label": "theirs again"}})
    panel.query = "label:again"
    assert [row["feature"] for row in panel.results] == [feature]


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
    assert all(real_index.norm[i] < middle for i in real_index.search(f"norm<{middle}").features)
    panel.sort = "norm"
    values = [real_index.norm[row["feature"]] for row in panel.results]
    assert values == sorted(values, reverse=True)


def test_a_sentence_is_read_and_each_row_says_why(panel, real_index):
    panel.query = TEXT
    found = real_index.search(TEXT)
    assert [row["feature"] for row in panel.results] == found.features and f"sentence: {TEXT}" in panel.results_note
    assert f"× the usual, most on “{found.table['token'][0].strip()}”" in panel.results[0]["why"]
    assert f"index.search({TEXT!r})" in panel.code()
    panel.query = "the"
    assert "words: the (" in panel.results_note and "of its activation" in panel.results[0]["why"]
    panel.query = "density>0"
    assert panel.results[0]["why"] == "" and "density > 0; best first" in panel.results_note
    panel.query = "river " * 400
    assert "at most 256" in panel.error and panel.results[0]["why"] == ""
    panel.query = ""
    assert "live features" in panel.results_note and "why" not in panel.results[0]


def test_examples_against_others(panel, real_index, screen):
    ships, crows = ([f"{what} number {i}" for i in range(6)] for what in ("The ship", "A crow"))
    view = screen(panel)
    assert view.call("find_by_examples", examples="\n".join(ships) + "\n\n", against="\n".join(crows)) == ("done", True)
    found = real_index.search(ships, against=crows)
    assert [row["feature"] for row in panel.results] == found.features
    assert panel.results[0]["why"] == f"AUROC {found.table['held_out'][0]:.2f} held out"
    assert "6 positive and 6 negative texts" in panel.results_note and "against=['A crow number 0'" in panel.code()
    panel.sort = "density"
    assert "6 positive" in panel.results_note
    densities = [row["density"] for row in panel.results]
    assert densities == sorted(densities, reverse=True)
    view.call("find_by_examples", examples="\n".join(ships), against="one")
    assert "each class needs two examples" in panel.error and "6 positive" in panel.results_note
    view.call("find_by_examples", examples=" ", against="")
    assert "live features" in panel.results_note and panel.error == ""


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
    assert session.selection.feature is None, "nobody has chosen one"
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
