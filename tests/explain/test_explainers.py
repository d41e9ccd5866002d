"""Rules: what they say is what they do, and they find what was planted."""

import numpy as np
import pytest

from sae_lab.explain.contexts import Passage, Passages
from sae_lab.explain.explainers import Condition, Rule, RuleExplainer, explainer_prompt, read_explanation

WORDS = [" red", " blue", " old", " ship", " sails", " home", " walking", " talk", " tea", " cup", " in", " the"]


def passage(tokens, fires, document=0, kind=None):
    values = np.array([float(f) for f in fires], np.float32)
    return Passage(tokens, values, kind or ("fires" if values.any() else "random"), 0, document)


def planted(fires, n=60, seed=0):
    """Random sentences; ``fires(tokens, i)`` says on which of their tokens the feature fires."""
    random = np.random.default_rng(seed)
    firing, silent = [], []
    while len(firing) < n or len(silent) < n:
        tokens = [WORDS[i] for i in random.integers(0, len(WORDS), 8)]
        p = passage(tokens, [fires(tokens, i) for i in range(8)], document=int(random.integers(5)))
        group = firing if p.fires.any() else silent
        if len(group) < n:
            group.append(p)
    return Passages(0, firing, silent, 1.0)


def test_a_rule_by_hand():
    rule = Rule((
        Condition("token", (" ship",), 0.9),
        Condition("after", (" red",), 0.5),
        Condition("pair", (" in", " the"), 0.4),
        Condition("starts", ("walk",), 0.3),
        Condition("ends", ("ing",), 0.2),
        Condition("near", (" tea",), 0.1),
    ))  # fmt: skip
    said = rule.predict([" red", " ship", " in", " the", " walking", " tea", " old", " home"])
    assert said.tolist() == [0, 0.9, 0, 0.4, 0.3, 0, 0.1, 0.1]
    assert rule.predict([" old"] * 3).tolist() == [0, 0, 0]
    assert rule.text.startswith('fires on the tokens " ship" (90 %); on what comes right after " red" (50 %);')
    assert Rule.read(rule.text) == rule


@pytest.mark.parametrize(
    "token", ['"', "; on the tokens", "\n", " (50 %)", "\\", '" (7 %), "', "⟨E2 80⟩", "ف", " a, b"]
)
def test_a_rule_is_read_back_from_its_text(token):
    rule = Rule((Condition("token", (token, ), 0.5), Condition("pair", (token, " x"), 0.25)))  # fmt: skip
    assert Rule.read(rule.text) == rule


@pytest.mark.parametrize("text", ["a feature about ships", "fires when ships sail", "", "fires on the tokens ships"])
def test_free_text_is_no_rule(text):
    assert Rule.read(text) is None or not Rule.read(text).conditions


def test_nothing_in_particular():
    assert Rule.read(Rule(()).text) == Rule(()) and Rule(()).predict([" a"]).tolist() == [0]


PLANTED = {
    ("token", (" ship",)): lambda t, i: t[i] == " ship",
    ("pair", (" the", " old")): lambda t, i: i > 0 and t[i - 1] == " the" and t[i] == " old",
    ("after", (" red",)): lambda t, i: i > 0 and t[i - 1] == " red",
    ("near", (" tea",)): lambda t, i: " tea" in t[max(0, i - 8) : i],
}


@pytest.mark.parametrize("fact", PLANTED, ids=str)
def test_the_planted_rule_is_found(fact):
    passages = planted(PLANTED[fact])
    rule = RuleExplainer().rule(passages)
    assert [c[:2] for c in rule.conditions] == [fact]
    assert rule.conditions[0].strength == 1
    others = planted(PLANTED[fact], seed=1)
    assert all(np.array_equal(rule.predict(p.tokens) > 0, p.fires) for p in others.all)


def test_two_tokens_and_an_ending():
    ending = lambda t, i: t[i].endswith("ing") or t[i] == " cup"  # noqa: E731
    rule = RuleExplainer().rule(planted(ending))
    assert {c.what[0] for c in rule.conditions} <= {" walking", "ing", "king", "lking", " cup"}
    assert len(rule.conditions) == 2


def test_chance_makes_no_good_rule():
    """Tokens that fire at random: what is found does not hold on other passages."""
    random = np.random.default_rng(0)
    noise = lambda t, i: random.random() < 0.06  # noqa: E731
    rule = RuleExplainer().rule(planted(noise))
    hits = [(rule.predict(p.tokens) > 0).any() for p in planted(noise, n=200, seed=1).all]
    assert abs(np.mean(hits[:200]) - np.mean(hits[200:])) < 0.15  # measured: .03


def test_tokens_of_one_document_alone_are_no_rule():
    firing = [passage([" ship"], [1], document=i) for i in range(4)]
    firing += [passage([" name"], [1], document=9) for _ in range(4)]
    rule = RuleExplainer().rule(Passages(0, firing, [passage([" odd"], [0])], 1.0))
    assert rule.text == 'fires on the tokens " ship" (100 %)'


def test_a_feature_that_fires_nowhere():
    assert RuleExplainer().rule(Passages(0, [], [passage([" a"], [0])], 0.0)) == Rule(())


def test_the_prompt_shows_tokens_and_strengths():
    passages = Passages(0, [passage([" red", " ship"], [0, 4.0])], [passage([" tea"], [0])], 8.0)
    prompt = explainer_prompt(passages)
    assert "1.  red<< ship>>\n   fires: ' ship' 5" in prompt and "1.  tea" in prompt
    assert prompt.endswith("EXPLANATION:")


def test_reading_an_explanation():
    assert read_explanation("Let me think.\nEXPLANATION:  words\n about ships ") == "words about ships"
    assert read_explanation("words about ships") == "words about ships"
    with pytest.raises(ValueError, match="no explanation in the answer '--- 12'"):
        read_explanation("--- 12")
