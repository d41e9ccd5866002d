"""dose_response: every figure against the model run by hand, and the controls beside it."""

import math

import pytest
import torch

import sae_lab as sl
from sae_lab.edits.vector import text_means
from sae_lab.feature_index import dosing
from sae_lab.types import Site, TokenMask
from tests.edits.test_edit import LONGER, OTHER, PROMPT, firing, make

SITE = Site("resid_post", 1)
STRENGTHS = [0.0, 1.0, 3.0]


@pytest.fixture(scope="module")
def sae(make_tiny):
    return make(make_tiny("llama"))


@pytest.fixture(scope="module")
def result(make_tiny, sae):
    lm = make_tiny("llama")
    feature = firing(lm, sae)[0]
    return sl.dose_response(
        lm, sae, feature, [PROMPT, OTHER], [" the", " sea"], [LONGER, OTHER], strengths=STRENGTHS,
        examples=([PROMPT, OTHER], [LONGER]), ask="Speak of ships.",
    )  # fmt: skip


def log_odds(lm, prompt, edits, targets=(" the", " sea")):
    ids = [lm.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in targets]
    p = float(lm.logits(prompt, edits=edits)[0, -1].softmax(-1)[ids].sum())
    return math.log(p / (1 - p))


def test_the_features_rows_are_those_of_steering(tiny_lm, sae, result):
    table = result.to_pandas()
    mine = table[table.method == "feature"]
    assert mine.strength.tolist() == STRENGTHS
    for row in mine.itertuples():
        edits = [sl.Steer(sae, result.feature, row.strength)]
        by_hand = [log_odds(tiny_lm, p, edits) for p in (PROMPT, OTHER)]
        assert row.log_odds == pytest.approx(sum(by_hand) / 2, abs=1e-3)
        assert row.se == pytest.approx(float(torch.tensor(by_hand).std()) / 2**0.5, abs=1e-3)
        costs = [
            float((tiny_lm.loss(t, edits, per_token=True) - tiny_lm.loss(t, per_token=True))[0, 2:].mean())
            for t in (LONGER, OTHER)
        ]
        assert row.cost == pytest.approx(sum(costs) / 2, abs=1e-4)
        assert row.norm == pytest.approx(row.strength * float(sae.f_scale[result.feature]), rel=1e-4)
    assert mine.cost.iloc[0] == 0 and mine.cost.iloc[-1] != 0


def test_controls_have_the_same_norm(tiny_lm, sae, result):
    table = result.to_pandas()
    norms = table[table.method == "feature"].norm.tolist()
    for method in ("random direction", "difference in means"):
        assert table[table.method == method].norm.tolist() == pytest.approx(norms)
        assert table[table.method == method].log_odds.iloc[0] == table.log_odds.iloc[0]
    means = []
    for texts in ([PROMPT, OTHER], [LONGER]):
        means.append(torch.stack([tiny_lm.read(t, SITE)[SITE][0, 1:].mean(0) for t in texts]).mean(0))
    vector = means[0] - means[1]
    push = sl.Push(sl.Vector(vector, SITE, f_scale=norms[-1], mask=sae.mask))
    row = table[(table.method == "difference in means") & (table.strength == 3.0)].iloc[0]
    by_hand = [log_odds(tiny_lm, p, [push]) for p in (PROMPT, OTHER)]
    assert row.log_odds == pytest.approx(sum(by_hand) / 2, abs=1e-3)


def test_the_prompt_that_asks(tiny_lm, result):
    row = result.to_pandas().iloc[-1]
    assert row.method == "prompt" and math.isnan(row.strength)
    by_hand = [log_odds(tiny_lm, "Speak of ships." + p, []) for p in (PROMPT, OTHER)]
    assert row.log_odds == pytest.approx(sum(by_hand) / 2, abs=1e-4)
    costs = []
    for text in (LONGER, OTHER):
        asking, ids = (tiny_lm.tokenize(t).ids[0] for t in ("Speak of ships.", text))
        whole = torch.cat([asking, ids[1:]])
        logprob = tiny_lm.logits([whole.tolist()])[0].log_softmax(-1)
        after = -logprob[len(asking) : -1].gather(1, whole[len(asking) + 1 :, None]).mean()
        costs.append(float(after - tiny_lm.loss(text, per_token=True)[0, 2:].mean()))
    assert row.cost == pytest.approx(sum(costs) / 2, abs=1e-4)


def test_at_equal_cost():
    def row(method, cost, log_odds):
        return {"method": method, "strength": 0, "norm": 0, "log_odds": log_odds, "se": 0, "cost": cost, "cost_se": 0}

    rows = [row("feature", 0, -5), row("feature", 1, -3), row("feature", 0.5, -9), row("random direction", 0, -5)]
    rows += [row("random direction", 0.2, -4), row("prompt", 0.4, 0)]
    even = dosing.DoseResponse(rows, 3, (" x",))
    assert even.at_cost(0.5) == pytest.approx({"feature": -4, "random direction": math.nan, "prompt": 0}, nan_ok=True)
    cheap = {"feature": -4.8, "random direction": -4.5, "prompt": math.nan}
    assert even.at_cost(0.1) == pytest.approx(cheap, nan_ok=True)
    assert "feature 3, target ' x'; log-odds where each costs 0.500 nats/token: feature -4.00" in repr(even)
    assert "<table" in even._repr_html_()


def test_progress_tells_every_measurement_and_may_end_it(tiny_lm, sae):
    feature, heard = firing(tiny_lm, sae)[0], []

    def measure(progress):
        sl.dose_response(
            tiny_lm, sae, feature, [PROMPT], " the", [OTHER], strengths=STRENGTHS, seeds=2,
            examples=([PROMPT], [OTHER]), ask="Speak.", progress=progress,
        )  # fmt: skip

    measure(lambda done, total: heard.append((done, total)))
    assert heard == [(i, 10) for i in range(10)]  # clean, asking, and two doses of four directions

    def stop(done, total):
        heard.append((done, total))
        if done == 2:
            raise InterruptedError

    heard.clear()
    with pytest.raises(InterruptedError):
        measure(stop)
    assert len(heard) == 3


def test_own_tokens_are_the_indexs_and_single(tiny_lm):
    class Index:
        def top_tokens(self, feature, n):
            return [" the", "⟨E2⟩", " of", " and", " in"][:n] if feature == 7 else []

    assert dosing.own_tokens(tiny_lm, Index(), 7) == [" the", " of", " and"]
    assert dosing.own_tokens(tiny_lm, Index(), 8) == dosing.own_tokens(tiny_lm, None, 7) == []


def test_neutral_texts_are_held_out():
    held_out = list(sl.load_text().held_out)
    texts = dosing.neutral_texts(3, characters=100)
    assert texts == [document[:100] for document in held_out[:3]]


def test_its_picture(result):
    figure = sl.plot(result)
    left, right = figure.axes
    assert [text.get_text() for text in right.get_legend().get_texts()] == [
        "feature", "random direction", "difference in means", "prompt"
    ]  # fmt: skip
    table = result.to_pandas()
    drawn = left.containers[0].lines[0].get_ydata()
    assert drawn.tolist() == table[table.method == "feature"].log_odds.tolist()


def test_one_text_may_be_a_str(tiny_lm, sae):
    feature = firing(tiny_lm, sae)[0]
    one, several = (
        sl.dose_response(tiny_lm, sae, feature, prompts, " the", text, strengths=[0.0, 1.0], seeds=1, examples=examples)
        for prompts, text, examples in (
            (PROMPT, OTHER, (PROMPT, LONGER)), ([PROMPT], [OTHER], ([PROMPT], [LONGER])),
        )
    )  # fmt: skip
    assert one.to_pandas().equals(several.to_pandas()) and len(one.rows) == 6


def test_the_difference_in_means_leaves_out_what_the_mask_does(tiny_lm):
    """Tokens of a large norm too, at the site that is read as at the one that is written."""
    before, after = Site("resid_post", 0), Site("resid_pre", 1)  # the same activations
    x = tiny_lm.read(PROMPT, before)[before][0]
    limit = float(x.norm(dim=-1)[1:].median())
    kept = (x.norm(dim=-1) <= limit) & (torch.arange(len(x)) > 0)
    assert 1 <= int(kept.sum()) < len(x) - 1
    for site in (before, after):
        mask = TokenMask((), True, {site.key: limit})
        found = text_means(tiny_lm, [after, before], [PROMPT], mask)[0][0]
        assert torch.allclose(found, x[kept].mean(0), atol=1e-6) and not torch.allclose(found, x[1:].mean(0), atol=1e-3)
    with pytest.raises(ValueError, match=r"leaves out every token of 'The ship.*give a longer text"):
        text_means(tiny_lm, [before], [PROMPT], TokenMask((), True, {before.key: 0.0}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strengths": [0.0, math.nan]}, "strengths must be a list of numbers, got a list with nan"),
        ({"strengths": [0.0, 1.0, math.inf]}, "rise, all finite"),
        ({"strengths": [math.nan, 1.0]}, "strengths must be a list of numbers, got a list with nan"),
        ({"text": [OTHER, " a"]}, "another text needs at least two tokens, .* got ' a': give a longer one"),
        ({"target": " riverboats and"}, r"a target is one token, ' riverboats and' is \d+"),
        ({"strengths": [1.0, 2.0]}, r"strengths begin at 0.*got \[1.0, 2.0\]"),
        ({"strengths": [0.0, 2.0, 1.0]}, "strengths begin at 0"),
        ({"prompts": []}, "at least one prompt"),
        ({"text": []}, "at least one prompt, one target, one other text"),
        ({"examples": ([PROMPT], [PROMPT])}, "the difference in means has no length"),
        ({"examples": ([PROMPT], [])}, "at least one text of each kind, got none"),
        ({"feature": 999}, "feature must be an int from 0 to 63"),
    ],
)
def test_refused(change, words, tiny_lm, sae):
    feature = firing(tiny_lm, sae)[0]
    given = {"feature": feature, "prompts": [PROMPT], "target": " the", "text": [OTHER], "strengths": [0.0, 1.0]}
    with pytest.raises(ValueError, match=words):
        sl.dose_response(tiny_lm, sae, **given | change)
