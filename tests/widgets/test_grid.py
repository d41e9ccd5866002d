"""PatchingGrid without a browser: estimates, patches, features, refusals, code, the static form."""

import json
import subprocess
import sys
import threading
import time
from copy import deepcopy

import numpy as np
import pytest
import torch
import traitlets

import sae_lab as sl
from sae_lab import circuits
from sae_lab.types import Site
from sae_lab.widgets.panel import STATIC

# The rule alone, of prompts that no grid could be made of.
from tests.conftest import LAYERS
from tests.edits.test_edit import OTHER, PROMPT, make

from .test_inspector import Tags

ANSWERS = (" the", " sea")
ATTACK = "The <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


@pytest.fixture(scope="module")
def sae(lm):
    return make(lm).eval()


@pytest.fixture
def grid(lm):
    return sl.PatchingGrid(lm, PROMPT, OTHER, answers=ANSWERS)


class Wire:
    """The front end's side of a panel: what it calls, and what comes back."""

    def __init__(self, panel, monkeypatch):
        self.panel, self.replies, self.number = panel, [], 0
        monkeypatch.setattr(panel, "send", lambda content, buffers=None: self.replies.append(content))

    def start(self, method, **args):
        self.number += 1
        self.panel._on_message(None, {"call": self.number, "method": method, "args": args}, [])
        return self.number

    def call(self, method, **args):
        """The end of a call: (kind, value)."""
        return self.end(self.start(method, **args))

    def end(self, number, seconds=20):
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            ends = [r for r in list(self.replies) if r["reply"] == number and r["kind"] != "partial"]
            if ends:
                return ends[0]["kind"], ends[0]["value"]
            time.sleep(0.005)
        raise AssertionError("no answer")


@pytest.fixture
def wire(grid, monkeypatch):
    return Wire(grid, monkeypatch)


def test_estimates_are_there_at_once(grid, lm):
    metric = circuits.logit_difference(lm, *ANSWERS)
    estimate = circuits.patching_estimate(lm, [PROMPT], [OTHER], metric)
    assert torch.allclose(torch.tensor(grid.view["estimate"]), estimate.values, atol=1e-5)
    assert grid.view["tokens"][1] == [" ship", lm.tokens(OTHER)[2].label]
    assert grid.view["kinds"] == ["resid_post", "attn_out", "mlp_out"] and grid.view["layers"] == list(range(LAYERS))
    assert grid.view["sides"]["lengths"] == [10, 10] and grid.view["sides"]["right"] == [" the"]
    assert (
        repr(grid)
        == f"PatchingGrid(logit difference ' the' − ' sea', 3 kinds × {LAYERS} layers × 9 positions, 0 patched)"
    )
    json.dumps(grid.get_state(), allow_nan=False)


def test_a_click_patches_in_truth(grid, wire, lm):
    kind, _ = wire.call("patch_cells", cells=[["mlp_out", 1, 3]])
    true = circuits.patching(lm, [PROMPT], [OTHER], circuits.logit_difference(lm, *ANSWERS))
    assert kind == "done" and grid.truth[0][:3] == ["mlp_out", 1, 3] and grid.progress == []
    assert grid.truth[0][3] == pytest.approx(float(true.values[2, 1, 2]), abs=1e-4)
    grid.patch()  # the whole of the kind on show
    table = grid.to_pandas()
    assert list(table) == ["layer", "kind", "position", "token", "source_token", "estimate", "true"]
    resid = table[table.kind == "resid_post"]
    assert np.allclose(resid.true, true.values[0].flatten(), atol=1e-4) and "28 patched" in repr(grid)
    assert table.true.notna().sum() == 28 and (resid.token[resid.position == 2] == " ship").all()


def test_progress_and_cancel(grid, wire, monkeypatch):
    """A block runs beside; its progress counts up; cancelled, what was found stays and the rest is not made."""
    seen, gate = [], threading.Event()
    grid.observe(lambda change: seen.append(change["new"]), "progress")
    run = grid.lm.run

    def slow(*args, **kwargs):
        if len(grid.truth) >= 32:  # after the first of three passes
            gate.wait(10)
        return run(*args, **kwargs)

    monkeypatch.setattr(grid.lm, "run", slow)
    cells = [[kind, layer, p] for kind in grid.view["kinds"] for layer in range(3) for p in range(1, 10)]
    number = wire.start("patch_cells", cells=cells)
    while len(grid.truth) < 32:
        time.sleep(0.005)
    assert grid.progress == [32, 81]
    assert wire.call("align", prompt=PROMPT, source=OTHER, right="", wrong="")[0] == "done"  # the kernel is free
    assert wire.call("stop") == ("done", None)
    gate.set()
    assert wire.end(number)[0] == "cancelled"
    assert grid.progress == [] and seen[0] == [0, 81] and 32 <= len(grid.truth) < 81


def test_another_run_ends_the_patches_of_the_one_before(grid, wire, monkeypatch):
    gate, run = threading.Event(), grid.lm.run

    def slow(*args, **kwargs):
        if threading.current_thread().name == "slow":
            gate.wait(10)
        return run(*args, **kwargs)

    monkeypatch.setattr(grid.lm, "run", slow)
    worker = threading.Thread(target=lambda: grid.patch(layers=[1]), name="slow")
    worker.start()
    grid.run(prompt=OTHER, source=PROMPT)
    gate.set()
    worker.join()
    assert grid.truth == [] and grid.view["prompt"] == OTHER and grid.progress == []  # it was of the other texts


def test_features_of_a_cell_add_up_to_its_estimate(lm, sae, monkeypatch):
    grid = sl.PatchingGrid(lm, PROMPT, OTHER, answers=ANSWERS, coder=sae)
    wire = Wire(grid, monkeypatch)
    assert grid.view["coders"] == ["resid_post-1"]
    grid.cell = [1, 2]
    assert wire.call("open_features", kind="resid_post", layer=1, position=2)[0] == "done"
    found = grid.features["resid_post-1:2"]
    sizes = [abs(share) for _, share in found["features"]]
    assert sizes == sorted(sizes, reverse=True) and 0 < len(sizes) <= 12
    together = sum(share for _, share in found["features"]) + found["others"] + found["error"]
    assert together == pytest.approx(grid.view["estimate"][0][1][1], abs=1e-4)
    effects = circuits.attribution(lm, sae, [PROMPT], [OTHER], circuits.logit_difference(lm, *ANSWERS))
    feature, share = found["features"][0]
    change = grid.view["goal"] - grid.view["base"]
    assert share == pytest.approx(float(effects.effects[2, feature]) / change, abs=1e-4)
    grid.set_state({"feature": feature})
    chosen = grid.session.selection
    assert (chosen.prompt, chosen.token, chosen.site, chosen.feature) == (PROMPT, 2, "resid_post-1", feature)
    listed = Tags(grid.snapshot().html).text.partition("feature of resid_post-1, token 2")[2]
    assert all(str(feature) in listed for feature, _ in found["features"])
    wire.call("open_features", kind="mlp_out", layer=1, position=2)  # no coder there
    assert len(grid.features) == 1
    assert "effects_0 = sl.circuits.attribution(lm, sae," in grid.code()


def test_the_selection_goes_both_ways(lm, sae):
    session = sl.Session()
    grid = sl.PatchingGrid(lm, PROMPT, OTHER, answers=ANSWERS, session=session)
    grid.set_state({"kind": "mlp_out", "cell": [2, 5]})
    assert (session.selection.token, session.selection.site) == (5, "mlp_out-2")
    session.selection.pick(token=7, site="attn_out-0")
    assert (grid.kind, grid.cell) == ("attn_out", [0, 7])
    session.selection.token = 3
    assert grid.cell == [0, 3]
    session.selection.pick(token=4, site="embed")  # no site of the grid: the token alone
    assert (grid.kind, grid.cell, session.selection.site) == ("attn_out", [0, 4], "embed")
    session.selection.token = 99  # beyond this prompt
    session.selection.pick(prompt="Another text", token=6, site="mlp_out-1")
    assert (grid.kind, grid.cell) == ("attn_out", [0, 4])
    grid.close()
    session.selection.pick(prompt="", token=2, site="mlp_out-1")
    assert grid.cell == [0, 4]


@pytest.mark.parametrize("cell", [[9, 2], [0, 0], [1], [0, 1, 2]])
def test_a_cell_that_is_not_there(grid, cell):
    with pytest.raises(
        traitlets.TraitError, match=r"cell must be \[layer, position\], layers 0 to 2, positions 1 to 9"
    ):
        grid.cell = cell
    with pytest.raises(traitlets.TraitError, match="kind must be one of resid_post, attn_out, mlp_out, got 'z'"):
        grid.kind = "z"


def last_logit(logits, tokens):
    return logits[torch.arange(len(logits)), tokens.mask.sum(1) - 1, 260]


def test_metrics_chosen_and_written(lm, monkeypatch):
    assert sl.PatchingGrid(lm, PROMPT, OTHER).view["metric"] == "KL from the source"
    grid = sl.PatchingGrid(lm, PROMPT, OTHER, last_logit, answers=ANSWERS)
    assert grid.view["metric"] == "last_logit" and grid.view["measures"][-1] == ["function", "last_logit"]
    assert grid.view["base"] == pytest.approx(float(lm.logits(PROMPT)[0, -1, 260]), abs=1e-3)
    wire = Wire(grid, monkeypatch)
    texts = {"prompt": PROMPT, "source": OTHER}
    assert wire.call("rerun", **texts, measure="log-probability", right=" sea", wrong="")[0] == "done"
    assert grid.view["metric"] == "log-probability ' sea'" and grid.view["measures"][-1][0] == "function"
    sea = lm.tokenizer(" sea")["input_ids"][-1]
    assert grid.view["base"] == pytest.approx(float(lm.logits(PROMPT)[0, -1].log_softmax(-1)[sea]), abs=1e-3)
    assert wire.call("rerun", **texts, measure="KL from the source", right="", wrong="")[0] == "done"
    assert grid.view["goal"] == pytest.approx(0, abs=1e-5)
    assert wire.call("rerun", **texts, measure="function", right="", wrong="")[0] == "done"
    assert grid.view["metric"] == "last_logit"
    grid.run(answers=(" sea", " the"))
    assert grid.view["metric"] == "logit difference ' sea' − ' the'"
    grid.run(metric="log-probability")
    assert grid.view["metric"] == "log-probability ' sea'"


@pytest.mark.parametrize(
    ("args", "more", "words"),
    [
        (("The ship went", "The big ship went home"), {}, "has 4, the source 6; one has a token more at token 2"),
        (("", OTHER), {}, "the prompt is empty: type some text"),
        ((PROMPT, ""), {}, "the source is empty"),
        (("x " * 150, OTHER), {}, "shows up to 128 tokens, the prompt has"),
        (("x" * 100_000, OTHER), {}, "tokens"),
        ((PROMPT, PROMPT), {}, "there is no difference to patch"),
        ((PROMPT, OTHER), {"answers": (" the old", " sea")}, "an answer is one token, ' the old' is 2"),
        ((PROMPT, OTHER), {"answers": (" the", "")}, "needs the wrong answer, one token such as ' Mary': it is empty"),
        ((PROMPT, OTHER), {"answers": " the"}, "answers are two"),
        ((PROMPT, OTHER, "loss"), {}, "metric must be one of 'logit difference', 'log-probability'"),
        ((PROMPT, OTHER, lambda logits, tokens: logits), {}, "one number for each row"),
        ((PROMPT, OTHER), {"kinds": ["resid"]}, "unknown site"),
    ],
)  # fmt: skip
def test_refused(lm, args, more, words):
    with pytest.raises(ValueError, match=words):
        sl.PatchingGrid(lm, *args, **more)


def test_lengths_that_differ_are_shown_side_by_side(lm):
    with pytest.raises(ValueError) as caught:
        sl.PatchingGrid(lm, "The ship went", "The big ship went home", answers=ANSWERS)
    ours, theirs = str(caught.value).splitlines()[1:]
    assert ours.index("|·ship|") == theirs.index("|·ship|") and "|·big|" in theirs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda sae: sae.train(), "in training mode: call sae.eval"),
        (
            lambda sae: setattr(sae, "reads", (Site("resid_pre", 1),)),
            "this coder is at Site.'resid_pre', layer=1.: add",
        ),
        (lambda sae: setattr(sae, "reads", (Site("resid_post", 9),)), "9"),
    ],
)
def test_coders_refused(lm, change, words):
    sae = make(lm).eval()
    sae.writes = ()
    change(sae)
    with pytest.raises(ValueError, match=words):
        sl.PatchingGrid(lm, PROMPT, OTHER, answers=ANSWERS, coder=[sae])


def test_a_refusal_from_the_screen_leaves_all_as_it_was(grid, wire):
    before = grid.view
    for args, words in [
        ({"prompt": "The", "source": OTHER}, "same number of tokens"),
        ({"prompt": "", "source": OTHER}, "empty"),
        ({"prompt": PROMPT, "source": OTHER, "right": " the old"}, "one token"),
        ({"prompt": PROMPT, "source": OTHER, "measure": "function"}, "metric must be one of"),
    ]:
        kind, value = wire.call("rerun", **{"measure": "logit difference", "right": " the", "wrong": " sea"} | args)
        assert kind == "error" and words in value
    kind, value = wire.call("patch_cells", cells=[["resid_post", 1, 77]])
    assert kind == "error" and "no cell ('resid_post', 1, 77)" in value
    assert grid.view is before and grid.progress == []
    assert wire.call("align", prompt="A", source="The <b>", right="", wrong=" the old")[1]["wrong"] == [" the", " old"]


def test_code_gives_the_same_numbers(lm, tmp_path):
    """In a fresh interpreter, on the model from its folder."""
    lm._module.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    own = sl.LM(str(tmp_path))
    grid = sl.PatchingGrid(own, PROMPT, OTHER, last_logit, kinds=["attn_out", "mlp_out"])
    grid.patch(layers=[0, 2], positions=[2, 5])
    told = "\nprint(estimate.values.flatten().tolist())\nprint([[*c, v] for c, v in sorted(true.items())])\n"
    ran = subprocess.run([sys.executable, "-c", grid.code() + told], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    estimate, true = (json.loads(line.replace("'", '"')) for line in ran.stdout.splitlines()[-2:])
    assert np.allclose(estimate, np.array(grid.view["estimate"]).flatten(), atol=1e-4)
    for theirs, ours in zip(true, sorted(grid.truth), strict=True):
        assert theirs[:3] == ours[:3] and theirs[3] == pytest.approx(ours[3], abs=1e-4)


@pytest.mark.parametrize("metric", [None, "log-probability", "KL from the source"])
def test_code_of_each_metric(lm, metric):
    grid = sl.PatchingGrid(lm, PROMPT, OTHER, metric, answers=ANSWERS)
    lines = [line for line in grid.code().splitlines() if not line.startswith("lm = ")]
    names = {"lm": lm}
    exec("\n".join(lines), names)
    assert np.allclose(names["estimate"].values, np.array(grid.view["estimate"]), atol=1e-5)


def test_static_form(lm, tmp_path):
    grid = sl.PatchingGrid(lm, ATTACK, ATTACK.replace("The", "A"), answers=ANSWERS)
    grid.patch(layers=[2], positions=[1])
    page = Tags(grid.snapshot().html)
    assert page.tags == {"div", "p", "b", "table", "tr", "th", "td"}
    value = grid.truth[0][3]
    assert f"{round(value, 2) + 0.0:.2f}" in page.text and "~" in page.text and ATTACK in page.text
    data, _ = grid._repr_mimebundle_()
    assert data["text/plain"] == repr(grid) and "<img" not in data["text/html"]
    written = grid.to_html(tmp_path / "grid.html").read_text(encoding="utf-8")
    assert "<img src" not in written and "resid_post" in written


def test_attention_is_circuitsvis_without_the_network(grid, wire, lm, monkeypatch):
    import urllib.request

    def refused(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr(urllib.request, "urlopen", refused)
    shown = grid.attention(1)
    html = shown._repr_html_()
    assert "CircuitsVis.render(" in html and "unpkg" not in html
    assert repr(shown) == "attention of layer 1, 4 heads, 10 tokens"
    props = json.loads(html.rpartition("CircuitsVis.AttentionHeads,")[2].rpartition(")")[0])
    pattern = circuits.attention(lm, PROMPT, 1).pattern[0]
    assert np.allclose(props["attention"], pattern, atol=1e-4) and props["tokens"][2] == " ship"
    kind, page = wire.call("attention_page", layer=0, source=True)
    assert kind == "done" and json.dumps(lm.tokens(OTHER)[2].label) in page["page"]
    kind, value = wire.call("attention_page", layer=9, source=False)
    assert kind == "done" and "9" in value["why"] and "page" not in value


def test_attention_of_markup(lm):
    closing = "The </script><img src=x>"
    grid = sl.PatchingGrid(lm, closing, closing.replace("The", "A"), answers=ANSWERS)
    call = grid.attention(0)._repr_html_().rpartition("CircuitsVis.render(")[2]
    assert call.count("<") == 2 and "".join(call.split()).endswith("</script></div>")


def test_a_model_without_a_prefix_has_position_0(make_tiny):
    lm = make_tiny("gpt2", prefix=None)
    grid = sl.PatchingGrid(lm, PROMPT, OTHER, answers=ANSWERS)
    assert grid.view["positions"][0] == 0 and "positions=range(len(lm.tokens(prompt)))" in grid.code()


def test_closing_while_patches_run_says_nothing(grid, wire, caplog):
    wire.start("patch_cells", cells=[["resid_post", layer, p] for layer in range(3) for p in range(1, 10)])
    grid.close()
    grid.close()
    for thread in threading.enumerate():
        if thread.daemon and "_answer" in thread.name:
            thread.join(10)
    assert not caplog.records


@pytest.mark.parametrize("name", ["patching.js", "patching.css"])
def test_built_files_are_small_and_self_contained(name):
    built = (STATIC / name).read_text(encoding="utf-8")
    assert 0 < len(built.encode()) < 60_000 and "innerHTML" not in built and "https://" not in built


def test_lines_are_patched_together_and_alone(grid, wire, lm):
    """A column from the screen, a row from Python: one number for all, beside those of the cells."""
    metric, column = circuits.logit_difference(lm, *ANSWERS), [("attn_out", layer, 9) for layer in range(LAYERS)]
    assert wire.call("patch_line", kind="attn_out", layers=[0, 1, 2], positions=[9]) == ("done", None)
    [(kind, layers, positions, value)] = grid.joint
    assert (kind, layers, positions) == ("attn_out", [0, 1, 2], [9]) and grid.progress == []
    assert value == pytest.approx(circuits.patched_together(lm, [PROMPT], [OTHER], metric, column), abs=1e-4)
    alone = {tuple(cell): share for *cell, share in grid.truth}
    assert list(alone) == column and value != pytest.approx(sum(alone.values()), abs=1e-2)
    row = grid.patch_together(layers=[1])  # of the kind that is shown
    assert row == pytest.approx(1.0, abs=1e-3) and grid.joint[1][:3] == ["resid_post", [1], list(range(1, 10))]
    assert grid.patch_together(layers=[1]) == row and len(grid.joint) == 2 and len(grid.truth) == 3
    html = grid.snapshot().html
    assert ">together</th>" in html and f"<b>{row:.2f}</b>" in html
    grid.kind = "attn_out"
    grid.patch_together(layers=[2])
    assert grid.snapshot().html.count(">together</t") == 2
    assert ">together</td>" in grid.snapshot().html and f"<b>{value:.2f}".replace("-", "−") in grid.snapshot().html
    space = {"lm": lm}
    exec("\n".join(line for line in grid.code().splitlines() if not line.startswith("lm = ")), space)
    assert (space["together_0"], space["together_1"]) == pytest.approx((value, row), abs=1e-4)
    with pytest.raises(ValueError, match=r"this grid has no cell \('mlp_out', 9, 1\)"):
        grid.patch_together("mlp_out", layers=[9])
    grid.run(prompt=OTHER, source=PROMPT)
    assert grid.joint == [] and "together_0" not in grid.code()


CHATS = [[{"role": "user", "content": f"The {what} went to sea, the"}] for what in ("ship", "fox")]


def test_chats(lm, monkeypatch, tmp_path):
    grid = sl.PatchingGrid(lm, *CHATS, answers=ANSWERS)
    wire, view = Wire(grid, monkeypatch), grid.view
    asked = lm.tokenize(CHATS[0])
    assert view["positions"] == list(range(1, asked.ids.shape[1])) and view["roles"] == asked.roles[0][1:]
    assert view["prompt"] == CHATS[0] and [" ship", " fox"] in view["tokens"] and ["<|im_end|>"] * 2 in view["tokens"]
    at = view["positions"][view["tokens"].index([" ship", " fox"])]
    assert wire.call("patch_cells", cells=[["mlp_out", 1, at]])[0] == "done"
    estimate = circuits.patching_estimate(lm, [CHATS[0]], [CHATS[1]], circuits.logit_difference(lm, *ANSWERS))
    assert np.allclose(view["estimate"], estimate.values, atol=1e-5)
    grid.cell = [1, at]
    assert (grid.session.selection.prompt, grid.session.selection.token) == (CHATS[0], at)
    assert "user: The ship went" in grid.snapshot().html
    space = {"lm": lm}
    exec("\n".join(line for line in grid.code().splitlines() if not line.startswith("lm = ")), space)
    assert space["prompt"] == CHATS[0] and space["true"] == {("mlp_out", 1, at): pytest.approx(grid.truth[0][3])}
    texts = {"prompt": CHATS[1], "source": CHATS[0], "measure": "KL from the source", "right": "", "wrong": ""}
    assert wire.call("rerun", **texts)[0] == "done" and grid.view["prompt"] == CHATS[1] and grid.truth == []
    assert grid.attention(1)._repr_html_()
    json.dumps(grid.get_state(), allow_nan=False)
    longer = [{"role": "system", "content": "Be brief."}, *CHATS[1]]
    kind, value = wire.call("rerun", **texts | {"source": longer})
    assert kind == "error" and "prompt and source need the same number of tokens" in value
    assert grid.view["source"] == CHATS[0]
    with pytest.raises(ValueError, match=r"both texts or both chats, since .*, got a chat and a text: give both as"):
        sl.PatchingGrid(lm, CHATS[0], OTHER)
    grid.run(PROMPT, OTHER)  # from Python a chat becomes a text
    assert grid.view["prompt"] == PROMPT and grid.view["roles"] == []


def test_a_chat_without_a_template(make_tiny, tokenizer):
    lm = make_tiny("llama", seed=3)
    lm.tokenizer = deepcopy(tokenizer)
    lm.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template: pass plain text instead of messages"):
        sl.PatchingGrid(lm, *CHATS, answers=ANSWERS)


def test_a_prompt_that_is_no_text(lm):
    with pytest.raises(ValueError, match=r"prompt must be a text or chat messages .*, got 3"):
        sl.PatchingGrid(lm, 3, OTHER)
