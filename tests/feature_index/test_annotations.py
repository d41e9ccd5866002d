"""Notes follow the coder, outlive the cache and a kill, and are merged by field and time."""

import json
import logging
import multiprocessing
import os
import signal
import time

import pytest
import torch

import sae_lab as sl
from sae_lab import noting
from sae_lab.feature_index.annotations import Note, Notes
from sae_lab.noting import Said

FORMATS = ("sae_lab", "saelens", "sparsify", "dictionary_learning")


@pytest.fixture
def sae():
    """In eval mode, with what inference needs, as ``sl.load`` gives it."""
    coder = sl.TopK(8, 16, k=2)
    coder.calibrate([torch.randn(200, 8, generator=torch.Generator().manual_seed(0))])
    return coder


def reopened(notes):
    """The same notes as another process reads them."""
    noting._LOGS.clear()
    return Notes(noting.Log(notes.file), notes.d_sae)


# ---- they follow the coder


def test_an_id_is_made_once_and_kept(sae, tmp_path):
    id = sae.id
    twin = sl.TopK(8, 16, k=2)
    assert twin.id == id and sl.TopK(8, 16, k=2, seed=1).id != id  # without one: shape and encoder
    sae.calibrate([torch.randn(100, 8)])
    sae.half()
    with torch.no_grad():
        sae.W_enc.mul_(2)
    assert sae.id == id == sl.load(sae.save(tmp_path / "ours", dtype=torch.float16)).id
    for name in FORMATS[1:]:
        assert sl.load(sae.save(tmp_path / name, format=name)).id == id


def test_float16_does_not_change_an_id(sae, tmp_path):
    rounded = sl.load(sae.save(tmp_path / "half", dtype=torch.float16))
    del rounded.meta["id"]
    assert rounded.id == sae.id and not torch.equal(rounded.W_enc, sae.W_enc)


@pytest.mark.parametrize("wrong", ["../../escape", "", 7, None, "g" * 16, "a" * 15, ["a" * 16], "a" * 16 + "\n"])
def test_an_id_that_names_no_file_is_made_anew(sae, wrong):
    right = sae.id
    sae.meta["id"] = wrong
    assert sae.id == right


def test_training_on_begins_with_the_notes(sae):
    sl.notes(sae).write(3, "months")
    data, config = torch.randn(256, 8), sl.TrainConfig(steps=2, batch_size=64)
    before, id = sl.notes(sae), sae.id
    sl.train(sae, data, config)
    assert sae.id != id and sl.notes(sae)[3].label == "months"
    sl.notes(sae).write(3, "days")
    assert before[3].label == "months"
    fresh = sl.TopK(8, 16, k=2)
    sl.train(fresh, data, config)
    assert "trained_from" not in fresh.meta


def test_saved_beside_the_coder_and_brought_in(sae, tmp_path, monkeypatch):
    sl.notes(sae).write(3, "months", "a\nb")
    for name in FORMATS:
        sae.save(tmp_path / name, format=name)
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("SAE_LAB_DATA", str(tmp_path / f"machine {name}"))
            assert sl.notes(sl.load(tmp_path / name))[3] == ("months", "a\nb")


def test_what_is_newer_here_stays(sae, tmp_path, monkeypatch):
    here = sl.notes(sae)
    here.write(3, "old")
    here.write(4, "only there")
    sae.save(tmp_path / "sae")
    here.write(3, "new", "text")
    here.write(5, "only here")
    assert {i: n.label for i, n in here._all().items()} == {3: "new", 4: "only there", 5: "only here"}
    sl.load(tmp_path / "sae")
    assert here[3] == ("new", "text") and here[5].label == "only here"
    size = here.file.stat().st_size
    sl.load(tmp_path / "sae")
    assert here.file.stat().st_size == size  # nothing twice
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("SAE_LAB_DATA", str(tmp_path / "another machine"))
        there = sl.notes(sl.load(tmp_path / "sae"))
        assert there[3].label == "old"
        there.write(6, "from there")
        sl.load(tmp_path / "sae").save(tmp_path / "sae")  # the copy has what both said
    sae.save(tmp_path / "sae")
    sl.load(tmp_path / "sae")
    assert here[3] == ("new", "text") and here[6].label == "from there"


def test_another_coder_in_the_folder_gets_no_notes_of_the_first(sae, tmp_path):
    sl.notes(sae).write(3, "months")
    sae.save(tmp_path)
    other = sl.TopK(8, 16, k=2, seed=1)
    other.save(tmp_path)
    assert len(sl.notes(sl.load(tmp_path))) == 0
    assert any("months" in f.read_text() for f in tmp_path.glob("notes-*.jsonl"))  # and the first one's stay


def test_a_data_folder_that_cannot_be_used(sae, tmp_path, monkeypatch, caplog):
    sl.notes(sae).write(3, "months")
    sae.save(tmp_path / "sae")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAE_LAB_DATA", str(tmp_path / "file"))
    coder = sl.load(tmp_path / "sae")  # it loads all the same, and says so
    assert "did not go into" in caplog.text and "SAE_LAB_DATA" in caplog.text
    with pytest.raises(ValueError, match=r"cannot (read|write) .*set SAE_LAB_DATA to a folder of yours"):
        sl.notes(coder).write(3, "x")


def test_where_they_lie(sae, data_folder, monkeypatch):
    assert sl.notes(sae).file == data_folder / "notes" / f"{sae.id}.jsonl"
    sl.notes(sae).write(1, "x")
    sl.cache.clear()
    assert sl.notes(sae)[1].label == "x"
    monkeypatch.setenv("SAE_LAB_CACHE", str(data_folder))
    sl.cache.clear()
    assert reopened(sl.notes(sae))[1].label == "x"
    monkeypatch.delenv("SAE_LAB_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert str(noting.root()) == "/xdg/sae_lab"


# ---- writing


def test_refusals(sae):
    notes = sl.notes(sae)
    for feature, label, words in [
        (16, "x", "from 0 to 15, got 16"), (-1, "x", "got -1"), (True, "x", "got True"), (3, 7, "label must be"),
        (3, "\ud800", "half a surrogate pair"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            notes.write(feature, label)
    assert len(notes) == 0 and not notes.file.exists()


def test_fields_are_apart_and_empty_ones_go(sae):
    notes = sl.notes(sae)
    assert notes.write(3, "  months ") == ("months", "") == notes[3]
    notes.write(3, text="see 4")
    assert notes[3] == reopened(notes)[3] == ("months", "see 4") and notes[4] == Note()
    assert notes.find("MONTH") == notes.find("see") == list(notes) == [3]
    notes.write(3, "", "")
    assert len(notes) == len(reopened(notes)) == 0 and notes.to_pandas().empty
    notes.write(3, "again")
    assert notes.to_pandas().values.tolist() == [[3, "again", ""]]


def test_clocks_may_tie_and_go_back(sae, monkeypatch):
    notes = sl.notes(sae)
    for now in (100.0, 100.0, 50.0, 0.0):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        notes.write(3, f"at {now}", f"{now} {os.urandom(4).hex()}")
        assert notes[3].label == reopened(notes)[3].label == f"at {now}"


def test_logs_are_merged_in_any_order(tmp_path):
    lines = [noting.line(i % 2, {"label": f"{i}"}, 5.0 + i // 3) for i in range(6)]  # three of one time each
    found = set()
    for number, order in enumerate((lines, lines[::-1], lines[3:] + lines[:3])):
        log = noting.Log(tmp_path / f"{number}.jsonl")
        for one in order:
            log.add(one)
        found.add(json.dumps(log.all()))
    assert found == {json.dumps({0: {"label": "4"}, 1: {"label": "5"}})}


def test_a_screen_that_showed_an_older_value_overwrites_nothing(sae):
    notes = sl.notes(sae)
    before = time.time()
    notes.write(3, "from Python")
    shown, early = {"label": "", "text": ""}, {"label": before}
    assert notes.write(3, "typed before", "", seen=shown, typed=early) == ("from Python", "")
    assert "typed before" in notes.file.read_text()  # it is not lost
    assert notes.write(3, "", "typed", seen=shown, typed=early) == ("from Python", "typed")
    assert notes.write(3, "typed after", seen=shown, typed={"label": time.time()})[0] == "typed after"
    shown = {"label": "typed after", "text": "typed"}
    for typed in (early, {"label": before + 1e9}, None):  # it showed what is there: whatever its clock says
        shown["label"] = notes.write(3, f"{typed}", seen=shown, typed=typed)[0]
        assert shown["label"] == f"{typed}" == reopened(notes)[3].label
    assert notes.write(3, "x")[0] == "x"  # and no time of a screen's lies ahead


# ---- several processes, and kills

fork = multiprocessing.get_context("fork")


def _write_many(file, name, n):
    log = noting.Log(file)
    for i in range(n):
        log.write({i: {"label": f"{name} {i}"}, 10_000: {f"said:{name}": [{"text": str(i), "scores": {}}]}})


def test_two_processes_write_at_once(tmp_path):
    file = tmp_path / "a.jsonl"
    both = [fork.Process(target=_write_many, args=(file, name, 60)) for name in ("a", "b")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    found = noting.Log(file).all()
    assert found.pop(10_000) == {f"said:{name}": [{"text": "59", "scores": {}}] for name in ("a", "b")}
    assert all(found[i]["label"] in (f"a {i}", f"b {i}") for i in range(60))
    changes, damaged = noting.parsed(file.read_bytes())
    assert len(changes) == 240 and not damaged
    for i in range(60):  # one after the other, whoever it was
        times = [c.time for c in changes if c.feature == i]
        assert len(set(times)) == 2 and sorted(times) == times


def test_one_process_sees_what_another_writes(tmp_path):
    here, there = noting.Log(tmp_path / "a.jsonl"), noting.Log(tmp_path / "a.jsonl")
    here.write({1: {"label": "x"}})
    assert there.fields(1) == {"label": "x"}
    there.write({1: {"text": "y"}})
    here.write({1: {"label": "z"}})
    assert here.fields(1) == there.fields(1) == {"label": "z", "text": "y"}


def _acknowledge(file, out):
    log = noting.Log(file)
    for i in range(100_000):
        log.write({i % 50: {"label": f"{i}", "text": "x" * 3000}})
        os.write(out, b"%d\n" % i)


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path):
    file = tmp_path / "a.jsonl"
    for wait in (0.03, 0.05, 0.08, 0.11):
        file.unlink(missing_ok=True)
        readable, writable = os.pipe()
        child = fork.Process(target=_acknowledge, args=(file, writable))
        child.start()
        os.close(writable)
        heard = os.read(readable, 10)
        time.sleep(wait)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        while part := os.read(readable, 1 << 16):
            heard += part
        os.close(readable)
        last = int(heard.split()[-1])
        log = noting.Log(file)
        for i in range(max(0, last - 49), last + 1):
            assert int(log.fields(i % 50)["label"]) >= i
        log.write({0: {"label": "after"}})  # and the next one goes on
        assert noting.Log(file).fields(0)["label"] == "after" and noting.parsed(file.read_bytes())[1] == []


def test_half_a_line_is_said_and_goes(tmp_path, caplog):
    log = noting.Log(tmp_path / "a.jsonl")
    log.write({1: {"label": "x"}})
    with open(log.file, "ab") as f:
        f.write(noting.line(2, {"label": "half"}, 5.0)[:-20])
    assert noting.Log(log.file).all() == log.all() == {1: {"label": "x"}}
    log.write({3: {"label": "y"}})
    assert noting.Log(log.file).all() == {1: {"label": "x"}, 3: {"label": "y"}}
    assert "half a last line is left out" in caplog.text and "damaged" not in caplog.text
    with open(log.file, "ab") as f:
        f.write(b'{"feature": 4, "label": "typed by hand", "time": 9}')
    assert noting.Log(log.file).fields(4) == {"label": "typed by hand"}
    log.write({3: {"label": "z"}})
    assert noting.Log(log.file).fields(4) == {"label": "typed by hand"}


DAMAGES = {
    "flipped": lambda data: data.replace(b"months", b"mouths", 1),
    "time": lambda data: data.replace(b'"time": 1', b'"time": 9', 1),
    "zeroed": lambda data: data[:30] + bytes(40) + data[70:],
    "first line cut": lambda data: data[20:],
    "garbage": lambda data: b"not json",
    "another file": lambda data: b"[1, 2]\n" + data[-50:],
    "deep": lambda data: data + b"[" * 100_000 + b"\n",
    "types": lambda data: data + b'{"feature": 3, "label": ["x"], "time": 1}\n',
    "no number": lambda data: data + b'{"feature": 3, "label": "x", "time": NaN}\n',
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_said_and_kept_aside(tmp_path, caplog, kind):
    log = noting.Log(tmp_path / "a.jsonl")
    for i, label in enumerate(["months", "years", "days"]):
        log.write({i: {"label": label}})
    damaged = DAMAGES[kind](log.file.read_bytes())
    log.file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        found = noting.Log(log.file).all()
    [aside] = tmp_path.glob("a.jsonl.damaged-*")
    assert aside.read_bytes() == damaged and str(aside) in caplog.text and "damaged lines are left out" in caplog.text
    whole = {0: {"label": "months"}, 1: {"label": "years"}, 2: {"label": "days"}}
    assert found.items() <= whole.items() and (kind == "garbage" or found or kind == "another file")
    caplog.clear()
    log.write({7: {"label": "goes on"}})
    assert noting.Log(log.file).all() == found | {7: {"label": "goes on"}} and caplog.text == ""


# ---- in other files


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize("format", ["lines", "neuronpedia"])
def test_a_round_trip(sae, tmp_path, monkeypatch, name, format):
    sae.meta["model"], sae.reads = "owner/tiny", (sl.Site("resid_post", 1),)
    notes = sl.notes(sae)
    notes.write(3, "months", "in several\nlines; \u202e <b>")
    notes.write(4, text="only a text")
    notes.write(5, "gone")
    notes.write(5, "")
    notes.explanations.write({
        3: [Said("a", "neuronpedia, gpt-4o, auto"), Said("b", "neuronpedia, gpt-4o, auto")], 6: [Said("c", "Words")],
    })  # fmt: skip
    file = notes.save(tmp_path / "made" / name, format=format)
    monkeypatch.setenv("SAE_LAB_DATA", str(tmp_path / "elsewhere"))
    other = sl.notes(sae)
    assert len(other) == 0 and other.load(file) == (4 if format == "lines" else 3)
    assert {i: other[i] for i in other} == {3: ("months", "in several\nlines; \u202e <b>"), 4: ("", "only a text")}
    assert [s[:2] for s in other.explanations[3]] == [(t, "neuronpedia, gpt-4o, auto") for t in "ab"]
    assert [s[:2] for s in other.explanations[6]] == [("c", "Words")]
    before = other.file.read_bytes()
    other.load(file)
    assert other.file.read_bytes() == before  # nothing twice


def test_lines_of_neuronpedia(sae, tmp_path):
    notes = sl.notes(sae)
    notes.write(3, "months")
    [record] = map(json.loads, notes.save(tmp_path / "x.jsonl", "neuronpedia", "gpt2-small", "8-res-jb").open())
    assert record.pop("id").startswith("c") and record.pop("authorId")
    assert record == {
        "modelId": "gpt2-small", "layer": "8-res-jb", "index": "3", "description": "months",
        "explanationModelName": None, "typeName": None, "notes": "sae_lab: label",
    }  # fmt: skip


def test_what_is_brought_in_overwrites_nothing(sae, tmp_path):
    notes = sl.notes(sae)
    notes.write(3, "mine")
    notes.write(4, "deleted")
    notes.write(4, "")
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"feature": i, "label": "theirs"}) + "\n" for i in (3, 4, 5)))
    assert notes.load(file) == 3 and {i: notes[i].label for i in notes} == {3: "mine", 5: "theirs"}
    file.write_text(json.dumps({"feature": 3, "label": "newer", "time": time.time() + 1e6}) + "\n")
    notes.load(file)
    assert notes[3].label == "newer"
    notes.write(3, "mine again")  # whatever clock they have
    assert notes[3].label == "mine again"


@pytest.mark.parametrize("line", ['{"feature": 16, "label": "x"}', '{"feature": 3, "label": 7}', '{"feature": "3"'])
def test_a_line_that_does_not_fit_is_refused_and_nothing_kept(sae, tmp_path, line):
    (tmp_path / "x.jsonl").write_text('{"feature": 3, "label": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match="holds a line that is no note on a feature from 0 to 15"):
        sl.notes(sae).load(tmp_path / "x.jsonl")
    assert len(sl.notes(sae)) == 0
