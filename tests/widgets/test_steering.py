"""SteeringSliders without a browser: its edits are the session's, its numbers those of the functions below it."""

import json
import math
import re
import threading
import time
from copy import deepcopy

import pytest
import torch

import sae_lab as sl
from sae_lab.widgets import Session, SteeringSliders
from tests.edits.test_edit import OTHER, PROMPT, firing, make

ATTACK = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def sae(make_tiny):
    return make(make_tiny("llama"))


@pytest.fixture(scope="module")
def live(make_tiny, sae):
    return firing(make_tiny("llama"), sae)


@pytest.fixture(scope="module")
def silent(sae):
    return int((sae.f_scale == 0).nonzero()[0])


@pytest.fixture
def widget(tiny_lm, sae, live):
    made = SteeringSliders(tiny_lm, sae, {live[0]: 3.0}, PROMPT, max_new_tokens=8)
    yield made
    made.close()


class Screen:
    """Calls a widget as its view does, and keeps what comes back."""

    def __init__(self, widget, monkeypatch):
        self.widget, self.got, self.number = widget, [], 0
        self.arrived = threading.Condition()
        monkeypatch.setattr(widget, "send", self.hear)

    def hear(self, message):
        with self.arrived:
            self.got.append(message)
            self.arrived.notify_all()

    def call(self, method, **args):
        self.number += 1
        self.widget._on_message(None, {"call": self.number, "method": method, "args": args}, None)
        return self.number

    def replies(self, number, *kinds):
        return [m["value"] for m in self.got if m["reply"] == number and m["kind"] in kinds]

    def wait(self, number, *kinds, seconds=30):
        """The first reply of one of these kinds: (kind, value)."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: self.replies(number, *kinds), seconds), self.got
            return next((m["kind"], m["value"]) for m in self.got if m["reply"] == number and m["kind"] in kinds)

    def end(self, number, seconds=30):
        return self.wait(number, "done", "error", "cancelled", seconds=seconds)


@pytest.fixture
def screen(widget, monkeypatch):
    return Screen(widget, monkeypatch)


# ---- what it shows is what the library says


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}])
def test_its_texts_are_those_of_the_sessions_edits(settings, widget, tiny_lm, sae, live):
    for name, value in settings.items():
        setattr(widget, name, value)
    assert widget.shown != widget.version
    widget.run()
    assert widget.shown == widget.version
    given = {"max_new_tokens": 8, "temperature": 0.0, "seed": 0} | settings
    assert widget.baseline == tiny_lm.generate(PROMPT, **given)
    assert widget.steered == tiny_lm.generate(PROMPT, edits=widget.session.edits, **given)
    assert widget.steered == tiny_lm.generate(PROMPT, edits=[sl.Steer(sae, live[0], 3.0)], **given)
    assert widget.steered != widget.baseline, "the control: at strength 3 this feature changes the text"


def test_the_comparison_is_that_of_compare(widget, tiny_lm, sae, live):
    widget.run()
    seen, result = widget.comparison, tiny_lm.compare(widget.steered, [sl.Steer(sae, live[0], 3.0)])
    assert [m["name"] for m in seen["measures"]] == list(result.measures())
    for measure in seen["measures"]:
        wanted = result.measures()[measure["name"]]
        assert measure["values"] == [None if math.isnan(v) else pytest.approx(v, abs=1e-6) for v in wanted.tolist()]
    assert seen["perplexity"] == pytest.approx([result.perplexity, result.perplexity_edited])
    assert seen["mean_kl"] == pytest.approx(float(result.kl.mean())) and seen["mean_kl"] > 0
    groups = [m["group"] for m in seen["measures"] if "#" in m["name"]]
    assert groups == [f"{sae.site.key} #{live[0]}"] * 2, "the two activations of a feature share a scale"
    marks = [t["mark"] for t in seen["steered"]]
    assert marks[: len(tiny_lm.tokens(PROMPT))] == ["prompt"] * len(tiny_lm.tokens(PROMPT))
    assert "new" in marks and "prompt" not in marks[len(tiny_lm.tokens(PROMPT)) :]
    json.dumps([widget.comparison], allow_nan=False)


def test_an_edit_of_all_features_does_not_flood_the_screen(widget, sae, live):
    widget.session.edits.add(sl.Patch(sae, OTHER, positions=[3]))
    widget.add(live[1])
    widget.run()
    groups = list(dict.fromkeys(m["group"] for m in widget.comparison["measures"] if "#" in m["group"]))
    assert len(groups) == 12 and groups[:2] == [f"{sae.site.key} #{f}" for f in live[:2]], "the sliders' come first"


def test_without_edits_nothing_differs(tiny_lm, sae):
    widget = SteeringSliders(tiny_lm, sae, prompt=PROMPT, max_new_tokens=6)
    widget.run()
    assert widget.steered == widget.baseline == tiny_lm.generate(PROMPT, max_new_tokens=6)
    assert widget.comparison["mean_kl"] == 0
    assert {t["mark"] for t in widget.comparison["steered"]} == {"prompt", ""}


def test_the_baseline_is_generated_once(widget, live, monkeypatch):
    asked = []
    stream = widget._lm.stream

    def counted(prompt, edits=(), **settings):
        asked.append(len(list(edits)))
        return stream(prompt, edits, **settings)

    monkeypatch.setattr(widget._lm, "stream", counted)
    widget.run()
    widget.set_strength(widget.sliders[0]["key"], -2.0)
    widget.run()
    assert asked == [1, 0, 1]
    widget.seed = 5
    widget.temperature = 1.0
    widget.run()
    assert asked == [1, 0, 1, 1, 0], "another temperature is another baseline"


def test_code_gives_the_same(widget, tiny_lm, sae, live):
    widget.session.edits.add(sl.Scale(sae, live[1], factor=0.5))
    widget.temperature, widget.seed = 0.7, 11
    widget.run()
    source = widget.code()
    assert "sae = sl.load(" in source and f"sl.Steer(sae, {live[0]}, strength=3.0)" in source
    here = re.sub(r"^lm = .*$", "", source, flags=re.M)  # a model made in a test has no name to load it by
    space = {"lm": tiny_lm, "sae": sae}
    exec(here, space)
    assert (space["baseline"], space["steered"]) == (widget.baseline, widget.steered)
    assert space["comparison"].perplexity_edited == pytest.approx(widget.comparison["perplexity"][1])


def test_a_special_token_in_the_prompt_is_read_but_not_shown(tiny_lm, sae, live):
    prompt = "One<|im_end|> two"
    widget = SteeringSliders(tiny_lm, sae, live[0], prompt, max_new_tokens=4)
    widget.run()
    assert widget.steered == tiny_lm.generate(prompt, edits=widget.session.edits, max_new_tokens=4)
    assert "<|im_end|>" in [t["text"] for t in widget.comparison["steered"]]
    space = {"lm": tiny_lm, "sae": sae}
    exec(re.sub(r"^lm = .*$", "", widget.code(), flags=re.M), space)
    assert space["comparison"].perplexity == pytest.approx(widget.comparison["perplexity"][0])


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where did the <b>ship</b> go?"}]


def test_a_chat_goes_through_the_template(tiny_lm, sae, live, tmp_path):
    widget = SteeringSliders(tiny_lm, sae, {live[0]: 3.0}, CHAT, max_new_tokens=5)
    widget.run()
    assert widget.steered == tiny_lm.generate(CHAT, widget.session.edits, max_new_tokens=5)
    assert widget.baseline == tiny_lm.generate(CHAT, max_new_tokens=5) != widget.steered
    start = widget.steered.index("assistant\n") + len("assistant\n")
    compared = tiny_lm.compare(CHAT, widget.session.edits, widget.steered[start:])
    assert widget.comparison["measures"][0]["values"] == pytest.approx(compared.kl.tolist(), abs=1e-6)
    asked, shown = tiny_lm.tokenize(CHAT), widget.comparison["steered"]
    prompt, said = shown[: asked.ids.shape[1]], shown[asked.ids.shape[1] :]
    assert [t["role"] for t in prompt] == asked.roles[0] and {t["mark"] for t in prompt} == {"prompt"}
    assert prompt[0] == {"text": "<|im_start|>", "mark": "prompt", "role": "template"}
    assert len(said) == len(tiny_lm.tokens(CHAT, widget.steered[start:])) - len(prompt)
    assert said and not any("role" in t or t["mark"] == "prompt" for t in said)
    html = widget._html()
    assert "&lt;|im_start|&gt;" in html and "<b>ship" not in html and "the <b" not in html
    space = {"lm": tiny_lm, "sae": sae}
    exec(re.sub(r"^lm = .*$", "", widget.code(), flags=re.M), space)
    assert (space["prompt"], space["steered"]) == (CHAT, widget.steered)
    assert space["comparison"].perplexity_edited == pytest.approx(widget.comparison["perplexity"][1])
    # Each way in which it is kept holds the messages.
    another = SteeringSliders(tiny_lm, sae)
    another.load(widget.save(tmp_path / "chat.json"))
    assert another.prompt == CHAT
    widget.select(token=3)
    widget.session.save(tmp_path / "session.json")
    session = Session.load(tmp_path / "session.json", [sae])
    assert session.selection.prompt == CHAT and SteeringSliders(tiny_lm, sae, session=session).prompt == CHAT
    widget.target = [" the"]
    widget.measure()
    assert widget.dose["prompt"] == "system: Be brief.\nuser: Where did the <b>ship</b> go?"
    # What is typed in a box, and a change to plain text from Python; the widget's messages are its own.
    typed = [CHAT[0], {"role": "user", "content": "Bye"}]
    widget.set_state({"prompt": typed})
    typed[1]["content"] = "changed"
    assert widget.error == "" and widget.prompt[1]["content"] == "Bye" and widget.shown < widget.version
    widget.prompt = PROMPT
    widget.run()
    assert widget.steered.startswith(PROMPT) and "role" not in widget.comparison["steered"][0]


def test_a_chat_that_cannot_be(make_module, tokenizer, tiny_lm, sae, live):
    plain = deepcopy(tokenizer)
    plain.chat_template = None
    lm = sl.LM(make_module("llama", len(tokenizer)), tokenizer=plain)
    words = "this model's tokenizer has no chat template: pass plain text instead of messages"
    with pytest.raises(ValueError, match=words):
        SteeringSliders(lm, make(lm), prompt=CHAT)
    session = Session(share="prompt")
    follows, leads = SteeringSliders(lm, make(lm), prompt=PROMPT, session=session), SteeringSliders(
        tiny_lm, sae, live[0], session=session
    )
    leads.prompt = CHAT
    assert (follows.prompt, follows.error, session.selection.prompt) == (PROMPT, words, CHAT)
    for wrong, said in [(7, "prompt must be a text or a list"), ([{"role": "user"}], "a chat message is"),
                        (["a"], "prompt must be a text or a list")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            leads.prompt = wrong
        assert leads.prompt == CHAT
    with pytest.raises(ValueError, match="prompt must be a text or a list"):
        session.selection.prompt = 7


# ---- sliders and the session


def test_sliders_are_the_edits_of_the_session(widget, sae, live):
    edits = widget.session.edits
    [row] = widget.sliders
    assert row == {
        "key": 0, "on": True, "features": [live[0]], "vector": "", "strength": 3.0,
        "scales": [float(sae.f_scale[live[0]])], "more": "",
    }  # fmt: skip
    widget.set_strength(row["key"], -1.5)
    assert [e.strength for e in edits] == [-1.5] and widget.sliders[0]["strength"] == -1.5
    edits.replace(row["key"], sl.Steer(sae, live[0], 2.5))  # as another widget would
    assert widget.sliders[0]["strength"] == 2.5
    widget.switch(row["key"], False)
    assert list(edits) == [] and not widget.sliders[0]["on"]
    other = edits.add(sl.Ablate(sae, live[1]))
    assert [r["key"] for r in widget.others] == [other] and len(widget.sliders) == 1
    placed = edits.add(sl.Steer(sae, live[1], 1.0, positions=slice(2, None)))
    assert "positions=slice(2" in widget.sliders[1]["more"]
    widget.set_strength(placed, 4.0)
    assert list(edits)[-1].positions == slice(2, None), "its other settings stay"
    widget.remove(row["key"])
    assert [r["key"] for r in widget.sliders] == [placed]
    widget.set_strength(row["key"], 1.0)  # a late message of a slider that is gone
    assert [r["key"] for r in widget.sliders] == [placed]


def test_an_edit_of_another_coder_is_no_slider(widget, tiny_lm):
    another = make(tiny_lm, seed=1)
    widget.session.edits.add(sl.Steer(another, firing(tiny_lm, another)[0]))
    assert len(widget.sliders) == 1 and len(widget.others) == 1
    widget.run()
    assert len([m for m in widget.comparison["measures"] if "#" in m["name"]]) >= 2


def test_adding(widget, live, sae):
    key = widget.add(live[1])
    assert [r["strength"] for r in widget.sliders] == [3.0, 1.0]
    assert widget.add(live[1], 2.0) == key and [r["strength"] for r in widget.sliders] == [3.0, 2.0]
    widget.add_feature(live[1])  # from the screen: it is there, and stays as it is
    assert [r["strength"] for r in widget.sliders] == [3.0, 2.0]


def test_features_in_every_form(tiny_lm, sae, live):
    def strengths(features):
        widget = SteeringSliders(tiny_lm, sae, features)
        return {r["features"][0]: r["strength"] for r in widget.sliders}

    assert strengths(live[0]) == {live[0]: 1.0}
    assert strengths(live[:2]) == {live[0]: 1.0, live[1]: 1.0}
    assert strengths({live[0]: -2}) == {live[0]: -2.0}
    assert strengths(None) == {}


def test_vectors_have_sliders_too(tiny_lm, sae, live, monkeypatch):
    direction = torch.randn(48, generator=torch.Generator().manual_seed(0))
    vector = sl.Vector(direction, sae.site, ATTACK, f_scale=3.0)
    widget = SteeringSliders(tiny_lm, sae, {live[0]: 3.0, vector: 2.0}, PROMPT, max_new_tokens=4)
    assert [(r["features"], r["vector"], r["strength"], r["scales"]) for r in widget.sliders][1] == (
        [], ATTACK, 2.0, [3.0]
    )
    [key] = [r["key"] for r in widget.sliders if r["vector"]]
    widget.run()
    edits = [sl.Steer(sae, live[0], 3.0), sl.Push(vector, 2.0)]
    assert widget.steered == tiny_lm.generate(PROMPT, edits, max_new_tokens=4)
    assert any(ATTACK in m["name"] for m in widget.comparison["measures"])
    Screen(widget, monkeypatch).call("set_strength", key=key, strength=0.5)
    assert [r["strength"] for r in widget.sliders] == [3.0, 0.5] and widget.add(vector, 1.0) == key
    assert f"{ATTACK}: 1" in repr(widget) and ATTACK not in widget._html()
    condition = sl.Push(vector, 1.0, when=((sae, live[1]), 0.5, "prompt"))
    widget.session.edits.add(condition)
    assert "0.5, 'prompt'" in widget.sliders[-1]["more"]
    with pytest.raises(ValueError, match=r"a preset keeps sliders of one feature.*use session.save\(path\)"):
        widget.preset()
    scope = {}
    source = [line for line in widget.session.edits.code().split("\n") if not line.startswith("# sae")]
    exec("\n".join(source), scope | {"sae": sae}, scope)
    assert [repr(e) for e in scope["edits"]] == [repr(e) for e in widget.session.edits]
    widget.session.edits.clear()
    widget.add(vector)
    with pytest.raises(ValueError, match="a dose response needs a slider of a feature"):
        widget.measure()
    rows = widget.sliders
    for wrong, words in ((sl.Vector(torch.ones(40), sae.site, f_scale=1.0), "has width 40 and"),
                         (sl.Vector(direction, sae.site, model="another", f_scale=1.0), "was made on another, this"),
                         (sl.Vector(direction, "resid_post-9", f_scale=1.0), "layer")):  # fmt: skip
        for take in (widget.add, lambda one: SteeringSliders(tiny_lm, sae, {one: 2.0}, PROMPT)):
            with pytest.raises(ValueError, match=words):
                take(wrong)
    assert widget.sliders == rows, "what stood there stays"


def test_it_opens_on_the_selection_and_follows_it(tiny_lm, sae, live):
    session = Session(share="prompt")
    session.selection.pick(feature=live[0], site=sae.site.key, prompt=OTHER)
    widget = SteeringSliders(tiny_lm, sae, session=session)
    assert widget.prompt == OTHER and [r["features"] for r in widget.sliders] == [[live[0]]]
    session.selection.pick(feature=live[1], prompt=PROMPT)
    assert widget.selected == live[1] and widget.prompt == PROMPT and len(widget.sliders) == 1
    session.selection.pick(site="resid_post.2")
    assert widget.selected is None, "a feature of another site is none of this coder's"
    widget.prompt = OTHER
    widget.select(feature=live[2])
    assert (session.selection.prompt, session.selection.feature) == (OTHER, live[2])
    assert session.selection.site == sae.site.key and widget.selected == live[2]
    given = SteeringSliders(tiny_lm, sae, live[0], PROMPT, session=session)
    assert session.selection.prompt == widget.prompt == OTHER and given.prompt == PROMPT
    given.close()
    session.selection.prompt = "A third"
    assert widget.prompt == "A third" and given.prompt == PROMPT, "a closed one follows nothing"
    assert SteeringSliders(tiny_lm, sae).prompt == "I went to the"


def test_the_version_rises_with_what_is_generated_and_with_nothing_else(widget, sae, live):
    before = widget.version
    key = widget.session.edits.add(sl.Ablate(sae, live[1]), on=False)
    widget.seed = 9  # greedy text has no seed
    widget.target = [" the"]
    widget.select(feature=live[1])
    assert widget.version == before
    seen = [widget.version]
    for change in (
        lambda: widget.switch(key, True), lambda: setattr(widget, "temperature", 0.5),
        lambda: setattr(widget, "seed", 2), lambda: setattr(widget, "prompt", OTHER),
        lambda: setattr(widget, "max_new_tokens", 3),
        lambda: widget.set_strength(0, 1.0),
    ):  # fmt: skip
        change()
        seen.append(widget.version)
    assert seen == sorted(set(seen)) and len(seen) == 7


# ---- refused


def test_a_feature_that_never_fires_is_named(tiny_lm, sae, live, silent):
    words = f"feature {silent} never fired on training text"
    with pytest.raises(ValueError, match=words):
        SteeringSliders(tiny_lm, sae, silent)
    widget = SteeringSliders(tiny_lm, sae, live[0])
    with pytest.raises(ValueError, match=words):
        widget.add(silent)
    with pytest.raises(ValueError, match="feature must be an int from 0 to 63"):
        widget.add(64)
    assert len(widget.sliders) == 1


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", -1.0, r"temperature must be 0 \(greedy\) or a positive number, got -1.0"),
        ("temperature", float("nan"), "temperature must be 0"),
        ("temperature", float("inf"), "temperature must be 0"),
        ("seed", -1, "seed must be an int from 0"),
        ("max_new_tokens", 0, "max_new_tokens must be an int from 1 to 255"),
        ("max_new_tokens", 10**6, "max_new_tokens must be an int from 1 to 255"),
    ],
)
def test_settings_out_of_range(name, value, words, widget):
    before = getattr(widget, name)
    with pytest.raises(ValueError, match=words):
        setattr(widget, name, value)
    assert getattr(widget, name) == before
    widget.set_state({name: value})  # from the screen: said there, and undone
    assert re.search(words, widget.error) and getattr(widget, name) == before
    said = []
    widget.observe(lambda change: said.append(change["new"]), "error")
    widget.set_state({name: value})
    assert said[0] == "" and re.search(words, said[-1]), "the same mistake is told again"


@pytest.mark.parametrize(("prompt", "words"), [("", "the prompt is empty"), ("word " * 20_000, "reads at most 256")])
def test_prompts_that_cannot_be(prompt, words, widget, screen):
    widget.prompt = prompt
    with pytest.raises(ValueError, match=words):
        widget.run()
    kind, value = screen.end(screen.call("stream"))
    assert kind == "error" and words in value and not widget.running
    assert "not generated yet" in widget._html()


# ---- from the screen


def test_pieces_come_and_make_the_text(widget, screen):
    number = screen.call("stream")
    assert screen.end(number) == ("done", None)
    pieces = screen.replies(number, "partial")
    for side in ("baseline", "steered"):
        assert PROMPT + "".join(p["text"] for p in pieces if p["side"] == side) == getattr(widget, side)
    sides = [p["side"] for p in pieces]
    assert sides[:4] == ["steered", "baseline", "steered", "baseline"], "in turn"
    assert not widget.running and widget.shown == widget.version


def test_stop(widget, screen):
    widget.max_new_tokens = 200
    number = screen.call("stream")
    screen.wait(number, "partial")
    assert widget.running
    screen.call("stop")
    assert screen.end(number, seconds=5) == ("cancelled", None)
    assert not widget.running and widget.shown == -1
    assert len(screen.replies(number, "partial")) < 100
    widget.max_new_tokens = 4
    assert screen.end(screen.call("stream")) == ("done", None), "the model is free again"


def test_the_newest_wins(widget, screen, tiny_lm):
    widget.max_new_tokens = 120
    first = screen.call("stream")
    screen.wait(first, "partial")
    screen.call("set_strength", key=widget.sliders[0]["key"], strength=-3.0)
    second = screen.call("stream")
    assert screen.end(first) == ("cancelled", None)
    assert screen.end(second) == ("done", None)
    assert not widget.running and widget.shown == widget.version
    assert widget.steered == tiny_lm.generate(PROMPT, edits=widget.session.edits, max_new_tokens=120)


def test_a_change_meanwhile_leaves_the_texts_marked_as_old(widget, screen):
    number = screen.call("stream")
    screen.wait(number, "partial")
    widget.set_strength(widget.sliders[0]["key"], 1.0)
    screen.end(number)
    assert widget.shown < widget.version and "settings changed since" in widget._html()


def test_closing_while_it_generates(tiny_lm, sae, live, caplog):
    widget = SteeringSliders(tiny_lm, sae, live[0], PROMPT, max_new_tokens=200)
    widget.target = [" the"]
    before = threading.active_count()
    widget._on_message(None, {"call": 1, "method": "stream"}, None)
    widget._on_message(None, {"call": 2, "method": "measure_dose"}, None)
    time.sleep(0.2)
    widget.close()
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert threading.active_count() <= before, "its threads have ended"
    assert not widget.running and caplog.records == []
    assert tiny_lm.generate(PROMPT, max_new_tokens=2)


def test_a_refusal_is_said(widget, screen, silent):
    kind, value = screen.end(screen.call("add_feature", feature=silent))
    assert kind == "error" and f"feature {silent} never fired" in value


# ---- dose and response


def test_the_dose_response_is_that_of_the_function(widget, screen, tiny_lm, sae, live):
    widget.target = [" the", " sea"]
    widget.add(live[1])
    widget.select(feature=live[1])
    number = screen.call("measure_dose")
    assert screen.end(number, seconds=120)[0] == "done"
    steps = screen.replies(number, "partial")
    assert [s["done"] for s in steps] == list(range(steps[0]["total"]))
    dose = widget.dose
    assert (dose["feature"], dose["target"], dose["prompt"]) == (live[1], [" the", " sea"], PROMPT)
    names = [s["name"] for s in dose["series"]]
    assert names == ["feature", "random direction"], "its control stands beside it"
    strengths = dose["series"][0]["strength"]
    for strength, found in zip(strengths, dose["series"][0]["log_odds"], strict=True):
        ids = [tiny_lm.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in (" the", " sea")]
        p = float(tiny_lm.logits(PROMPT, edits=[sl.Steer(sae, live[1], strength)])[0, -1].softmax(-1)[ids].sum())
        assert found == pytest.approx(math.log(p / (1 - p)), abs=1e-3)


def test_a_dose_response_can_be_stopped_and_gives_way(widget, screen):
    widget.target = [" the"]
    number = screen.call("measure_dose")
    screen.wait(number, "partial", seconds=60)
    assert widget.measuring
    widget._on_message(None, {"cancel": number}, None)
    assert screen.end(number) == ("cancelled", None) and widget.dose == {} and not widget.measuring
    widget._idle.clear()  # as while it generates
    waits = screen.call("measure_dose")
    time.sleep(0.5)
    assert screen.replies(waits, "partial") == []
    widget._idle.set()
    screen.wait(waits, "partial")
    widget._on_message(None, {"cancel": waits}, None)


def test_a_dose_without_a_target_or_a_slider(widget):
    with pytest.raises(ValueError, match="no index of this coder tells which ones the feature fires on: type some"):
        widget.measure()
    widget.target = [" riverboats and"]
    with pytest.raises(ValueError, match="a target is one token"):
        widget.measure()
    widget.remove(widget.sliders[0]["key"])
    with pytest.raises(ValueError, match="needs a slider"):
        widget.measure()


# ---- presets


def test_presets(widget, tiny_lm, sae, live, tmp_path):
    widget.add(live[1], -0.5)
    widget.switch(widget.sliders[0]["key"], False)
    widget.temperature, widget.seed, widget.target = 0.5, 7, [" sea"]
    path = widget.save(tmp_path / "war.json")
    kept = widget.session.edits.add(sl.Ablate(sae, live[2]))
    another = SteeringSliders(tiny_lm, sae, live[3], OTHER, session=widget.session)
    another.load(path)
    assert another.preset() == widget.preset() == json.loads(path.read_text())
    assert [(r["features"], r["strength"], r["on"]) for r in another.sliders] == [
        ([live[0]], 3.0, False), ([live[1]], -0.5, True)
    ]  # fmt: skip
    assert [r["key"] for r in another.others] == [kept], "other edits stay"
    assert (another.prompt, another.temperature, another.seed) == (PROMPT, 0.5, 7)


def test_presets_that_are_refused(widget, tiny_lm, sae, live, silent, tmp_path):
    path = widget.save(tmp_path / "mine.json")
    before = widget.preset()
    another = SteeringSliders(tiny_lm, make(tiny_lm, seed=1))
    with pytest.raises(ValueError, match="was made with another coder"):
        another.load(path)
    good = json.loads(path.read_text())
    for change, words in [
        ({"sae_lab steering": 99}, "version 99"),
        ({"sliders": [{"feature": silent, "strength": 1, "on": True}]}, f"feature {silent} never fired"),
        ({"sliders": [{"strength": 1}]}, "no steering file"),
        ({"max_new_tokens": 0, "prompt": "other"}, "max_new_tokens must be"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=words):
            widget.load(path)
        assert widget.preset() == before, "nothing has changed"
    path.write_text("no json")
    with pytest.raises(ValueError, match="no steering file"):
        widget.load(path)
    widget.session.edits.add(sl.Steer(sae, live[1], positions=3))
    with pytest.raises(ValueError, match=r"not positions=3: use session.save"):
        widget.preset()


def test_presets_from_the_screen(widget, screen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.json").write_text("mine")
    assert screen.end(screen.call("save_preset", name="war")) == ("done", "saved as war.json")
    widget.set_strength(widget.sliders[0]["key"], 1.0)
    assert screen.end(screen.call("save_preset", name="war.json"))[0] == "done", "its own file it may write again"
    kind, value = screen.end(screen.call("save_preset", name="notes"))
    assert kind == "error" and "notes.json exists already" in value and (tmp_path / "notes.json").read_text() == "mine"
    for name in ("", "../up", "/tmp/x", "a\\b", ".hidden"):
        kind, value = screen.end(screen.call("save_preset", name=name))
        assert kind == "error" and "a preset's name is a plain file name" in value
    widget.set_strength(widget.sliders[0]["key"], -4.0)
    assert screen.end(screen.call("load_preset", name="war")) == ("done", "loaded war.json")
    assert widget.sliders[0]["strength"] == 1.0
    assert screen.end(screen.call("load_preset", name="nowhere"))[0] == "error"


# ---- without scripts


def test_static_form(tiny_lm, sae, live, tmp_path):
    widget = SteeringSliders(tiny_lm, sae, {live[0]: 3.0}, ATTACK, max_new_tokens=5)
    assert repr(widget) == f"SteeringSliders({{{live[0]}: 3}}, prompt={ATTACK!r})"
    assert "not generated yet" in widget._html()
    widget.run()
    widget.session.edits.add(sl.Ablate(sae, live[1]), on=False)
    html = widget._html()
    assert "<img" not in html and "&lt;img" in html and "<script" not in html
    assert "<mark>" in html and "perplexity" in html and f"{3 * float(sae.f_scale[live[0]]):.3g}" in html
    assert "sl.Ablate" in html and "greedy, at most 5 new tokens" in html
    page = widget.to_html(tmp_path / "steering.html").read_text()
    assert "<img" not in page and '"steered"' in page
    assert set(widget._repr_mimebundle_()[0]) >= {"text/html", "text/plain"}


def test_infinite_pushes_are_told_and_not_sent_as_nan(widget, live):
    widget.set_strength(widget.sliders[0]["key"], 1e38)
    widget.run()
    json.dumps([widget.comparison, widget.steered], allow_nan=False)


def test_long_texts_are_not_compared(widget, monkeypatch):
    monkeypatch.setattr("sae_lab.widgets.steering.LONGEST", 12)
    widget.run()
    assert widget.comparison == {"note": "a text of more than 12 tokens is not compared"}
    assert "is not compared" in widget._html() and widget.steered.startswith(PROMPT)


def test_gradients_stay_off(widget, monkeypatch):
    seen = []
    stream = widget._lm.stream
    monkeypatch.setattr(widget._lm, "stream", lambda *a, **k: seen.append(torch.is_grad_enabled()) or stream(*a, **k))
    widget.run()
    assert seen and not any(seen)
