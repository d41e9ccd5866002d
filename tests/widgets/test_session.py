"""Selection, edit stack and session: linked, iterable where edits go, whole on disk."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import traitlets

import sae_lab as sl
from sae_lab.widgets import EditStack, Selection, Session

TEXT = "The river rose in March."


def test_a_selection_is_picked_at_once():
    selection, heard = Selection(), []
    selection.observe(lambda change: heard.append(selection.to_dict()))
    selection.pick(feature=7, site="resid_post-1", token=2)
    assert all(h == {"prompt": "", "token": 2, "feature": 7, "site": "resid_post-1"} for h in heard) and heard
    assert repr(selection) == "Selection(token=2, feature=7, site='resid_post-1')"
    selection.prompt = "another"
    assert selection.token is None and selection.feature == 7  # a position of another text means nothing
    selection.pick(token=3, prompt="a third")
    assert selection.token == 3
    selection.pick(prompt="a third", feature=1)
    assert selection.token == 3
    selection.pick(token=None, prompt="")
    selection.pick(token=2)
    with pytest.raises(ValueError, match="no layer"):
        selection.pick(layer=3)
    with pytest.raises(traitlets.TraitError):
        selection.token = -1


def test_a_stack_gives_the_edits_that_are_on(lab):
    stack = EditStack([sl.Ablate(lab.sae, 1)])
    key = stack.add(sl.Steer(lab.sae, 2, strength=3.0), on=False)
    assert [type(e).__name__ for e in stack] == ["Ablate"] and len(stack) == 1
    stack.switch(key, True)
    assert len(list(stack)) == 2 and repr(stack) == "EditStack(2 of 2 on)"
    stack.replace(key, sl.Steer(lab.sae, 2, strength=-1.0))
    assert [row["code"] for row in stack.rows] == ["sl.Ablate(sae, 1)", "sl.Steer(sae, 2, strength=-1.0)"]
    assert torch.equal(lab.lm.logits(TEXT, edits=stack), lab.lm.logits(TEXT, edits=list(stack)))
    stack.remove(key)
    with pytest.raises(ValueError, match="has no edit"):
        stack.remove(key)
    with pytest.raises(ValueError, match="holds edits"):
        stack.add("Steer")
    stack.clear()
    assert list(stack) == [] and "No edits" in stack._html()


def test_the_stack_answers_the_screen(lab, screen):
    stack = EditStack([sl.Ablate(lab.sae, 1), sl.Ablate(lab.sae, 2)])
    view = screen(stack)
    assert view.call("switch", key=0, on=False)[0] == "done"
    assert [row["on"] for row in stack.rows] == [False, True]
    assert view.call("remove", key=1)[0] == "done"
    assert view.call("remove", key=1)[0] == "error"


def test_the_stack_as_code_gives_the_same_edits(lab):
    stack = EditStack([sl.Ablate(lab.sae, 1), sl.Steer(lab.sae, [2, 3], strength=0.5, positions=slice(1, 4))])
    scope = {}
    exec(stack.code(), scope)
    here, there = lab.lm.logits(TEXT, edits=stack), lab.lm.logits(TEXT, edits=scope["edits"])
    assert torch.equal(here, there)


def test_a_session_survives_its_file(lab, tmp_path):
    session = Session(notes="<b>rivers</b> 👩‍🚀")
    session.selection.pick(prompt=TEXT, token=3, feature=2, site=lab.sae.site.key)
    session.edits.add(sl.Steer(lab.sae, 2, strength=1.5, positions=[1, 2]))
    session.edits.add(sl.Ablate(lab.sae, 4), on=False)
    path = session.save(tmp_path / "session.json")
    for coders in ([], [lab.sae]):
        again = Session.load(path, coders)
        assert again.selection.to_dict() == session.selection.to_dict() and again.notes == session.notes
        assert [(repr(e), on) for _, e, on in again.edits.entries()] == [
            (repr(e), on) for _, e, on in session.edits.entries()
        ]
        assert (next(iter(again.edits)).coder is lab.sae) == bool(coders)
        assert torch.equal(lab.lm.logits(TEXT, edits=again.edits), lab.lm.logits(TEXT, edits=session.edits))
    assert repr(again).startswith("Session(Selection(prompt='The river")


def test_what_cannot_be_kept_is_refused_and_the_file_stays(lab, tmp_path):
    session = Session()
    path = session.save(tmp_path / "session.json")
    before = path.read_bytes()
    session.edits.add(sl.Ablate(lab.sae, 1, positions=lambda tokens: tokens.mask))
    with pytest.raises(ValueError, match="a function of tokens cannot be written down"):
        session.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_coders_that_are_not_saved_go_with_the_session(lab, tmp_path):
    session, fresh, changed = Session(share="prompt"), sl.TopK(48, 96, 5).eval(), sl.TopK(48, 96, 6).eval()
    changed.save(tmp_path / "changed")
    with torch.no_grad():
        changed.b_enc += 1
    coders = (fresh, changed, lab.sae)
    for coder in coders:
        session.edits.add(sl.Ablate(coder, 1))
    (tmp_path / "here").mkdir()
    path = session.save(tmp_path / "here" / "session.json")
    assert len(list((path.parent / "session.coders").iterdir())) == 2, "one is saved already"
    moved = path.parent.rename(tmp_path / "there") / path.name
    again = Session.load(moved)
    assert [e.coder.fingerprint() for e in again.edits] == [coder.fingerprint() for coder in coders]
    assert again.share == "prompt"
    with pytest.raises(ValueError, match="share"):
        Session(share="tokens")


def test_a_new_widget_changes_nothing_that_stands(real_index, lab):
    """Neither the selection, nor other widgets' prompts, nor edits but those it is given."""
    session, live = Session(), [int(f) for f in real_index.order("max")[:2]]
    tokens = sl.TokenFeatures(lab.lm, lab.sae, TEXT, session=session)
    sliders = sl.SteeringSliders(lab.lm, lab.sae, {live[0]: 3.0}, "One", session=session)
    session.selection.pick(feature=live[1], site=lab.sae.site.key)
    sliders.shown = sliders.version  # as after a run
    before = (session.selection.to_dict(), list(map(repr, session.edits)), tokens.detail, tokens.strip)
    sl.FeatureInspector(real_index, feature=3, session=session)
    sl.FeatureMap(lab.sae, torch.zeros(96, 2), session=session)
    sl.PatchingGrid(lab.lm, "One two", "One ten", session=session)
    sl.SteeringSliders(lab.lm, lab.sae, session=session)
    sl.SteeringSliders(lab.lm, lab.sae, live[0], "Another", session=session)
    assert (session.selection.to_dict(), list(map(repr, session.edits)), tokens.detail, tokens.strip) == before
    assert (tokens.prompt, sliders.prompt) == (TEXT, "One") and sliders.shown == sliders.version
    sl.SteeringSliders(lab.lm, lab.sae, {live[0]: 1.0}, session=session)  # this one says so
    assert [edit.strength for edit in session.edits] == [1.0]


LATER = '{"sae_lab session": 99, "selection": {}, "edits": [], "notes": ""}'


@pytest.mark.parametrize("content", ["", "{}", "[]", LATER])
def test_what_is_no_session_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="session"):
        Session.load(tmp_path / "x.json")


def test_two_panels_clicked_on_two_threads_do_not_wait_for_each_other(real_index):
    """Each tells the other what was chosen: with a lock of its own for each panel, both would wait for ever."""
    session = Session()
    panels = [sl.FeatureInspector(real_index, session=session) for _ in range(2)]
    features = [int(f) for f in real_index.order("density")[:3]]

    def click(panel, step):
        for i in range(25):
            panel.set_state({"feature": features[i * step % 3]})

    threads = [threading.Thread(target=click, args=(p, s), daemon=True) for p, s in zip(panels, (1, 2), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert panels[0].feature == panels[1].feature == session.selection.feature


def test_a_feature_of_another_coder_at_the_same_site_moves_no_panel(real_index, lab):
    session = Session()
    inspector = sl.FeatureInspector(real_index, session=session)
    maps = sl.FeatureMap(lab.sae, torch.zeros(96, 2), session=session)
    before = maps.feature = inspector.feature
    session.selection.pick(feature=4000, site=lab.sae.site.key)  # of a wider coder, say
    assert inspector.feature == maps.feature == before
    assert session.selection.feature == 4000, "nor is it put right: nothing echoes"


def test_copied_code_runs_as_pasted(lab, real_index, tmp_path, monkeypatch):
    """All of it in a fresh interpreter, a scope each; the weights of ``sae`` are in no file."""
    monkeypatch.setenv("SAE_LAB_CACHE", str(tmp_path / "cache"))
    lab.lm._module.save_pretrained(tmp_path)  # a model from a folder: one that was handed over has no name
    lab.lm.tokenizer.save_pretrained(tmp_path)
    lm, sae = sl.LM(str(tmp_path)), sl.load(lab.folder / "sae")
    index = sl.index_features(lab.sae, lm, lab.store, real_index.path)
    alone = sl.FeatureIndex(index.path, lab.store, lm)
    with torch.no_grad():
        sae.b_dec += 0.01
    session, feature = Session(), index.best()
    session.edits.add(sl.Steer(sae, feature))
    drawn = sl.FeatureMap(alone, torch.zeros(96, 2))
    drawn.feature = 3
    panels = [
        session.edits, drawn, sl.FeatureMap(sae, torch.zeros(96, 2)), sl.FeatureInspector(alone),
        sl.FeatureInspector(index),
        sl.TokenFeatures(lm, sae, TEXT, session=session), sl.SteeringSliders(lm, sae, prompt="One", session=session),
        sl.PatchingGrid(lm, "One two", "One ten", coder=sae),
        sl.TrainingMonitor(sl.TopK(48, 64, 3), lab.store, sl.TrainConfig(steps=2, batch_size=64)),
    ]  # fmt: skip
    told = "\n".join(f"exec({panel.code()!r}, {{}})" for panel in panels)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=False, env=env)
    assert ran.returncode == 0, ran.stderr
