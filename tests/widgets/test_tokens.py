"""TokenFeatures without a browser: what it shows against the numbers themselves, what it refuses, the session."""

import json
import re
import threading
import time

import numpy as np
import pytest
import traitlets

import sae_lab as sl
from sae_lab.circuits import PromptReading, direct_effects
from sae_lab.widgets import TokenFeatures
from tests.circuits.test_direct_effects import coder_at
from tests.widgets.test_inspector import STATIC, Tags

SITE = sl.Site("resid_post", layer=1)
PROMPT = "The river froze in January, and ships lay by the shore"


@pytest.fixture
def sae(tiny_lm):
    return coder_at(tiny_lm, SITE)


@pytest.fixture
def panel(tiny_lm, sae):
    made = TokenFeatures(tiny_lm, sae, PROMPT)
    yield made
    made.close()


def call(panel, method, timeout=20.0, **args):
    """A call as the screen makes it: (kind, value) of its end."""
    answers, done = [], threading.Event()

    def reply(number, kind, value):
        answers.append((kind, value))
        if kind != "partial":
            done.set()

    panel._reply = reply
    panel._on_message(panel, {"call": 7, "method": method, "args": args}, None)
    assert done.wait(timeout)
    return answers[-1]


def settle(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


# ---- what it shows


def test_it_opens_on_the_last_token_that_counts(panel, tiny_lm, sae):
    tokens = tiny_lm.tokens(PROMPT)
    assert panel.token == len(tokens) - 1 == panel.detail["position"]
    assert panel.text["labels"] == [t.label for t in tokens] and panel.text["strongest"][0] is None
    said = f"{len(tokens)} tokens, token={panel.token}, feature=None"
    assert repr(panel) == f"TokenFeatures(Site('resid_post', layer=1), {said})"


def test_the_strip_shows_the_codes(panel, tiny_lm, sae):
    f = sae.encode(tiny_lm.read(PROMPT, SITE)[SITE])[0]
    kept = slice(1, None)
    assert panel.text["strongest"][kept] == pytest.approx(f.max(-1).values[kept].tolist(), rel=1e-4)
    assert panel.text["active"][kept] == (f > 0).sum(-1)[kept].tolist()
    feature = int(f[3].argmax())
    panel.feature = feature
    assert panel.strip == "feature" and panel.fires[kept] == pytest.approx(f[kept, feature].tolist(), rel=1e-4)
    assert panel.losses == []
    panel.strip = "loss"
    truth = tiny_lm.loss(PROMPT, per_token=True)[0]
    assert panel.losses[0] is None and panel.losses[kept] == pytest.approx(truth[kept].tolist(), rel=1e-3)
    panel.feature = None
    assert panel.fires == []


def test_a_token_lists_its_features_and_their_effects(panel, tiny_lm, sae):
    panel.token = 3
    found = direct_effects(tiny_lm, sae, PROMPT, 3, n=20, promoted=4)
    rows = panel.detail["rows"]
    assert [r["feature"] for r in rows] == found.features.tolist()
    assert [r["value"] for r in rows] == pytest.approx(found.values.tolist(), rel=1e-4)
    assert [r["scaled"] for r in rows] == pytest.approx((found.values / 2).tolist(), rel=1e-4)
    assert [r["effect"] for r in rows] == pytest.approx(found.effects[:, 0].tolist(), rel=1e-3, abs=1e-4)
    assert [[t for t, _ in r["promoted"]] for r in rows] == [[t for t, _ in p] for p in found.promoted]
    parts = panel.detail["parts"]
    assert parts["features"] + parts["error"] + parts["bias"] + parts["rest"] == pytest.approx(parts["logit"], abs=1e-2)
    assert panel.detail["target_is"] == "next" and panel.detail["target"] == panel.text["labels"][4]
    panel.sort = "effect"
    sizes = [abs(r["effect"]) for r in panel.detail["rows"]]
    assert sizes == sorted(sizes, reverse=True) and sizes != [abs(r["effect"]) for r in rows]
    panel.target = " the"
    assert panel.detail["target"] == " the" and panel.detail["target_is"] == "chosen"
    panel.token = len(panel.text["labels"]) - 1
    panel.target = ""
    assert panel.detail["target_is"] == "likeliest"


def test_n_features_are_listed(tiny_lm, sae):
    panel = TokenFeatures(tiny_lm, sae, PROMPT, token=2, n=3)
    assert len(panel.detail["rows"]) == 3 and panel.detail["active"] == 8


def test_a_token_that_is_left_out(panel):
    panel.token = 0
    assert panel.detail["active"] is None and "leaves this token out" in panel.detail["note"]
    assert "<table>" not in panel._html()


def test_several_coders(tiny_lm, sae):
    other = coder_at(tiny_lm, sl.Site("mlp_out", layer=0), d_sae=64, seed=4)
    panel = TokenFeatures(tiny_lm, {"stream": sae, "mlp": other}, PROMPT, token=2)
    panel.feature = 90
    panel.coder = "mlp"
    panel.token = 3
    assert panel.coder == "mlp", "though the session still has the other's feature"
    assert panel.feature is None and panel.text["site"] == "mlp_out-0"
    assert {r["feature"] for r in panel.detail["rows"]} <= set(range(64))
    with pytest.raises(traitlets.TraitError, match="one of 'stream', 'mlp', got 'other'"):
        panel.coder = "other"
    names = [c["name"] for c in TokenFeatures(tiny_lm, [sae, coder_at(tiny_lm, SITE, seed=2)], PROMPT).coders]
    assert len(set(names)) == 2


def test_a_chat(lm):
    coder = coder_at(lm, sl.Site("resid_post", layer=2))
    chat = [{"role": "user", "content": "Hi, who are you?"}]
    panel = TokenFeatures(lm, coder, chat)
    assert panel.text["labels"] == [t.label for t in lm.tokens(chat)]
    panel.prompt = [{"role": "user", "content": "And now?"}]
    assert panel.text["labels"] == [t.label for t in lm.tokens(panel.prompt)]
    panel.token = 2
    assert panel.session.selection.prompt == panel.prompt
    other = TokenFeatures(lm, coder, session=panel.session)
    assert (other.prompt, other.token) == (panel.prompt, 2)


def test_without_direct_effects(tiny_lm):
    coder = coder_at(tiny_lm, sl.Site("mlp_in", layer=1))
    panel = TokenFeatures(tiny_lm, coder, PROMPT, token=2)
    assert panel.detail["rows"] and not panel.detail["effects"]
    assert "No direct effects: this coder writes at" in panel.detail["note"]
    assert "direct_effects" not in panel.code() and "No direct effects" in panel._html()
    z = TokenFeatures(tiny_lm, coder_at(tiny_lm, sl.Site("attn_z", layer=1)), PROMPT, token=2)
    assert z.detail["effects"], "through W_O"


def test_text_of_every_kind(tiny_lm, sae):
    panel = TokenFeatures(tiny_lm, sae)
    texts = ["שלום עולם", "مرحبا بالعالم", "日本語のテキスト", "👩‍🚀 e\u0301 🚀", "<script>alert(1)</script>", " \n\t"]
    for prompt in texts:
        panel.prompt = prompt
        assert len(panel.text["labels"]) == len(tiny_lm.tokens(prompt))
        assert "".join(tiny_lm.tokens(prompt)) == prompt
        json.dumps(panel.get_state(), allow_nan=False, default=str)
        page = Tags(panel._html())
        assert page.tags <= {"div", "p", "b", "i", "mark", "table", "tr", "th", "td", "code"}
    with pytest.raises(ValueError, match="half a surrogate pair at character 5"):
        panel.prompt = "half \ud83d"
    assert panel.prompt == texts[-1]
    panel.prompt = "👩‍🚀"
    assert any(label.startswith("⟨") for label in panel.text["labels"]), "half characters show their bytes"


# ---- what is refused


def test_no_text(tiny_lm, sae):
    panel = TokenFeatures(tiny_lm, sae)
    assert panel.text == panel.detail == {} and panel.token is None and "No text yet" in panel._html()
    assert "No text yet" in panel.snapshot()._repr_html_() and "prompt = ''" in panel.code()
    panel.prompt = PROMPT
    assert panel.text and panel.token
    panel.prompt = ""
    assert panel.text == {} and panel.token is None


def test_a_text_that_is_too_long_is_refused_in_words(panel):
    before = panel.text
    kind, value = call(panel, "read", prompt="word " * 20_000)
    assert kind == "error" and re.search(r"has 2\d{4} tokens and this model reads at most 256: split or shorten", value)
    assert panel.prompt == PROMPT and panel.text == before
    with pytest.raises(ValueError, match="at most 256"):
        panel.prompt = "word " * 20_000
    assert panel.prompt == PROMPT


def test_a_text_near_the_limit(tiny_lm, sae):
    prompt = " a" * 250
    assert 200 < len(tiny_lm.tokens(prompt)) <= 256
    panel = TokenFeatures(tiny_lm, sae, prompt, token=3)
    assert panel.detail["effects"] and len(panel._html()) < 60_000


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("token", 999, "a position from 0 to"),
        ("token", -1, "got -1"),
        ("feature", 96, "feature must be an int from 0 to 95, got 96"),
        ("target", "two words", "a target is one token"),
        ("prompt", 7, "prompt must be a text or a list of"),
        ("prompt", ["a", "b"], "prompt must be a text or a list of"),
        ("sort", "name", "sort"),
    ],
)
def test_a_value_that_does_not_fit(panel, name, value, words):
    before = getattr(panel, name)
    with pytest.raises(traitlets.TraitError, match=words):
        setattr(panel, name, value)
    assert getattr(panel, name) == before
    panel.set_state({name: value})
    assert re.search(words, panel.error) and getattr(panel, name) == before and panel.detail["rows"]


def test_coders_that_do_not_fit(tiny_lm):
    wide = sl.TopK(64, 96, k=8).eval()
    wide.reads = wide.writes = (SITE,)
    with pytest.raises(ValueError, match="reads width 64 and LM"):
        TokenFeatures(tiny_lm, wide, PROMPT)
    with pytest.raises(ValueError, match="does not know its site"):
        TokenFeatures(tiny_lm, sl.TopK(48, 96, k=8).eval(), PROMPT)
    crosscoder = sl.Crosscoder(48, 96, layers=2, k=8).eval()
    crosscoder.reads = (SITE, sl.Site("resid_post", layer=2))
    with pytest.raises(ValueError, match="coders of one site"):
        TokenFeatures(tiny_lm, crosscoder, PROMPT)
    for nothing in ([], {}):
        with pytest.raises(ValueError, match=r"sl\.SparseCoder"):
            TokenFeatures(tiny_lm, nothing, PROMPT)


# ---- the screen


def test_the_screen_reads_and_chooses(panel):
    assert call(panel, "read", prompt="Another text")[0] == "done"
    assert panel.prompt == "Another text" and panel.detail["effects"] and panel.token == len(panel.text["labels"]) - 1
    panel.set_state({"token": 1})
    assert panel.detail["position"] == 1 and panel.session.selection.token == 1
    feature = panel.detail["rows"][0]["feature"]
    panel.set_state({"feature": feature})
    assert panel.strip == "feature" and panel.session.selection.to_dict() == {
        "prompt": "Another text", "token": 1, "feature": feature, "site": "resid_post-1",
    }  # fmt: skip


def test_codes_come_before_direct_effects(panel):
    seen = []
    panel.observe(lambda change: seen.append(change["new"]), "detail")
    call(panel, "read", prompt="Another text")
    notes = [d["note"] for d in seen if d]
    assert "when the model is through" in notes[0] and notes[-1] == "" and seen[-1]["effects"]


def test_a_click_does_not_wait_for_the_whole_model(panel, monkeypatch):
    """Codes are there long before the model has been read to its end."""
    go_on, way_out = threading.Event(), PromptReading.way_out

    def slow(reading):
        assert go_on.wait(20)
        return way_out(reading)

    monkeypatch.setattr(PromptReading, "way_out", slow)
    ends = {}
    panel._reply = lambda number, kind, value: ends.update({number: kind})
    panel._on_message(panel, {"call": 1, "method": "read", "args": {"prompt": "Ships lay by the shore"}}, None)
    settle(lambda: panel.prompt == "Ships lay by the shore")
    panel.set_state({"token": 2, "strip": "loss"})
    assert panel.detail["position"] == 2 and panel.detail["rows"] and not panel.detail["effects"] and not ends
    assert panel.losses == [], "they need the whole model"
    go_on.set()
    settle(lambda: ends)
    assert ends == {1: "done"} and panel.detail["effects"] and panel.detail["position"] == 2 and panel.losses


def test_a_new_widget_leaves_the_session_as_it_is(tiny_lm, sae):
    session = sl.Session(share="prompt")
    first = TokenFeatures(tiny_lm, sae, PROMPT, token=2, session=session)
    TokenFeatures(tiny_lm, sae, "Another text", session=session)
    assert first.prompt == PROMPT and session.selection.to_dict()["prompt"] == ""
    with pytest.raises(ValueError, match="a position from 0 to"):
        TokenFeatures(tiny_lm, sae, PROMPT, token=99)
    session.selection.pick(prompt="Two", token=50)
    settle(lambda: first.prompt == "Two" and first.detail.get("effects"))
    assert first.token == len(first.text["labels"]) - 1, "there is no token 50"


def test_a_prompt_is_a_widgets_own(tiny_lm, sae):
    session = sl.Session()
    first = TokenFeatures(tiny_lm, sae, PROMPT, token=2, session=session)
    second = TokenFeatures(tiny_lm, sae, "Another text", token=1, session=session)
    sliders = sl.SteeringSliders(tiny_lm, sae, prompt="Mine", session=session)
    second.prompt = "A third text"
    second.token = 2
    second.feature = second.detail["rows"][0]["feature"]
    assert session.selection.to_dict() == {"prompt": "A third text", "token": 2, "feature": second.feature,
                                           "site": sae.site.key}  # fmt: skip
    assert (first.prompt, first.token, first.feature) == (PROMPT, 2, second.feature)
    assert (sliders.prompt, sliders.selected) == ("Mine", second.feature)
    session.selection.pick(prompt=PROMPT, token=3)
    assert first.token == 3 and second.prompt == "A third text"
    assert TokenFeatures(tiny_lm, sae, session=session).prompt == PROMPT, "without one it begins with the session's"


def test_edits_from_the_screen(panel, tiny_lm, sae):
    assert call(panel, "steer") == ("error", "no feature is chosen: choose one in the list first")
    panel.feature = panel.detail["rows"][0]["feature"]
    kind, said = call(panel, "steer")
    assert kind == "done" and said == f"sl.Steer(sae, {panel.feature}) is in session.edits, 1 on"
    call(panel, "ablate")
    assert [type(e) for e in panel.session.edits] == [sl.Steer, sl.Ablate]
    assert len(tiny_lm.generate(PROMPT, edits=panel.session.edits, max_new_tokens=2)) > len(PROMPT)
    sae.f_scale[panel.feature] = 0
    kind, said = call(panel, "steer")
    assert kind == "error" and "never fired on training text" in said and len(panel.session.edits) == 2


def test_the_session_is_followed(tiny_lm, sae):
    session = sl.Session(share="prompt")
    panel, twin = (TokenFeatures(tiny_lm, sae, PROMPT, session=session) for _ in range(2))
    panel.token = 4
    assert twin.token == 4 and twin.detail["position"] == 4
    panel.feature = panel.detail["rows"][1]["feature"]
    assert twin.feature == panel.feature and twin.strip == "feature"
    session.selection.pick(feature=5, site="resid_post-2")
    assert panel.feature != 5, "another site's"
    session.selection.pick(prompt="A new text", token=2)
    settle(lambda: all(p.prompt == "A new text" and p.detail.get("effects") for p in (panel, twin)))
    assert panel.token == twin.token == 2
    twin.close()
    panel.token = 1
    assert twin.token == 2
    third = TokenFeatures(tiny_lm, sae, session=session)
    assert third.prompt == "A new text"


def test_a_reading_that_is_cancelled(panel, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    run = type(panel._lm).run

    def slow(lm, *args, **kwargs):
        begun.set()
        go_on.wait(10)
        return run(lm, *args, **kwargs)

    monkeypatch.setattr(type(panel._lm), "run", slow)
    ends = []
    panel._reply = lambda number, kind, value: ends.append(kind)
    panel._on_message(panel, {"call": 1, "method": "read", "args": {"prompt": "Never mind"}}, None)
    assert begun.wait(10)
    panel._on_message(panel, {"cancel": 1}, None)
    go_on.set()
    settle(lambda: ends)
    assert ends == ["cancelled"] and panel.prompt == PROMPT


def test_closing_while_it_reads(panel):
    panel._on_message(panel, {"call": 1, "method": "read", "args": {"prompt": "x " * 200}}, None)
    panel.close()
    settle(lambda: not panel._jobs)


# ---- without a kernel


def test_the_code_gives_the_same_numbers(tiny_lm, sae, tmp_path):
    sae.save(tmp_path / "sae")
    panel = TokenFeatures(tiny_lm, sae, PROMPT, token=3, n=5)
    panel.sort, panel.target = "effect", " the"
    code = panel.code()
    assert f"sae = sl.load({str(tmp_path / 'sae')!r})" in code
    lines = [line for line in code.splitlines() if not line.startswith("lm = ")]  # a tiny model has no name
    scope = {"lm": tiny_lm}
    exec("\n".join(lines), scope)
    table = scope["effects"].to_pandas()
    assert table["feature"].tolist() == [r["feature"] for r in panel.detail["rows"]]
    assert np.allclose(table["effect on ' the'"], [r["effect"] for r in panel.detail["rows"]], rtol=1e-3, atol=1e-4)


def test_the_static_form(panel, sae):
    panel.token = 3
    html = panel._html()
    assert str(panel.detail["rows"][0]["feature"]) in html and "<b>[" in html and "logits" in html
    panel.feature = panel.detail["rows"][0]["feature"]
    assert f"activation of feature {panel.feature}" in panel._html()
    assert panel.snapshot()._repr_html_() == panel._html()


def test_a_page_keeps_every_token_s_features(panel, tiny_lm, tmp_path):
    panel.token = 3
    page = panel.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    state = json.loads(re.search(r'<script type="application/json" id="state">(.*?)</script>', page, re.S)[1])
    assert set(state["pages"]) == {str(p) for p in range(len(tiny_lm.tokens(PROMPT)))}
    assert state["pages"]["3"]["rows"] == panel.detail["rows"] and state["pages"]["0"]["active"] is None
    feature = panel.detail["rows"][0]["feature"]
    panel.feature = feature
    along = [state["firing"][str(feature)].get(str(p), 0.0) for p in range(1, len(panel.fires))]
    assert along == panel.fires[1:] and len(state["losses"]) == len(panel.fires)
    assert len(page) < 1_500_000


def test_built_files_are_small_and_self_contained():
    for name in ("tokens.js", "tokens.css"):
        built = (STATIC / name).read_text(encoding="utf-8")
        assert 0 < len(built.encode()) < 60_000 and "innerHTML" not in built and "@import" not in built
        assert not set(re.findall(r"https?://[^\"'`\s)]*", built)) - {"http://www.w3.org/2000/svg"}
