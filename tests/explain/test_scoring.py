"""Scores: by hand, of a perfect explanation, of a judge that guesses, of judges that answer in text."""

import json
import math
import re

import numpy as np
import pytest

from sae_lab.explain.asking import Asker
from sae_lab.explain.contexts import Corpus, Passage, Passages
from sae_lab.explain.explainers import Condition, Rule
from sae_lab.explain.scoring import NEGATIVES, Explanation, balanced, pearson, read_activations, read_flags, score


def passage(tokens, values, kind):
    return Passage(tokens, np.array(values, np.float32), kind, 0, 0, 0 if kind == "fires" else -1)


def by_hand():
    firing = [passage([" a", " b"], [2, 0], "fires"), passage([" c", " b"], [1, 0], "fires")]
    silent = [passage([" b", " b"], [0, 0], "random"), passage([" a", " b"], [math.nan, 0], "random")]
    return Passages(0, firing, silent, 2.0)


@pytest.mark.filterwarnings("error")  # NaN without both classes is a decision, not a mean over nothing
def test_balanced_accuracy_by_hand():
    truth = np.array([True, True, False, False, False, False])
    said = np.array([True, False, False, False, False, True])
    assert balanced(truth, said) == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert balanced(truth, ~truth) == 0 and balanced(truth, truth) == 1 and balanced(truth, np.ones(6, bool)) == 0.5
    assert math.isnan(balanced(truth[:2], said[:2])) and math.isnan(balanced(truth[:0], said[:0]))


def test_pearson_by_hand():
    a, b = np.array([0.0, 1.0, 2.0]), np.array([1.0, 0.0, 5.0])
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    small = np.array([0.1, 0.2, 0.3])  # one of them is the mean, and their spread is far under 1
    assert pearson(small, small) == pytest.approx(1) and pearson(small, -small) == pytest.approx(-1)
    assert pearson(np.ones(3), b) == 0 and math.isnan(pearson(a, np.ones(3)))


def test_a_score_by_hand():
    """The rule names " a": it finds one firing passage of two, and one silent one of two is taken for firing."""
    found = score(Explanation(Rule((Condition("token", (" a",), 1.0),)).text), by_hand())
    assert found.detection == 0.5 and found.by_kind == {"fires": 0.5, "fires, fifth 1": 0.5, "random": 0.5}
    # Of the two firing passages the first is marked at " a", the second at the silent " b": both answers are right.
    assert found.fuzzing == 1
    # Known tokens: predicted 1 at " a" of the first passage alone, true 2, 0, 1, 0, 0, 0, 0.
    true, said = np.array([2, 0, 1, 0, 0, 0, 0]), np.array([1, 0, 0, 0, 0, 0, 0])
    assert found.simulation == pytest.approx(np.corrcoef(true, said)[0, 1]) and found.unanswered == 0


def token(word):
    return Explanation(Rule((Condition("token", (word,), 1.0),)).text)


def test_the_truth_and_the_control(token_index, token_words):
    corpus = Corpus(token_index)
    for feature in range(4):
        passages = corpus.passages(feature, "judge", 12, 12)
        right = score(token(token_words[feature]), passages)
        assert (right.detection, right.fuzzing) == (1, 1) and right.simulation > 0.99
        other = score(token(" Azerbaijan"), passages)
        assert other.detection == 0.5 and other.fuzzing == 0.5 and abs(other.simulation) < 0.2


def scripted(word):
    """A judge that reads the prompt as a language model would, and knows the feature fires on one word."""

    def answer(prompt):
        listed = re.findall(r"^\d+\. (.*?)(?=^\d+\. |\n\nANSWER)", prompt.split("\n\n", 2)[2] + "\n", re.M | re.S)
        if "JSON list of its tokens" in prompt:
            return json.dumps([[10 * (t == word) for t in json.loads(text)] for text in listed])
        wanted = f"<<{word}>>" if "<<" in prompt else word
        return f"Sure: {[int(wanted in text) for text in listed]}"

    return answer


@pytest.fixture
def passages():
    words = [" red", " ship", " tea", " cup", " old"]
    random = np.random.default_rng(0)
    firing = [[*random.permutation(words[:1] + words[2:]), " ship"] for _ in range(12)]
    firing = [random.permutation(tokens).tolist() for tokens in firing]
    silent = [random.choice([w for w in words if w != " ship"], 5).tolist() for _ in range(11)]
    values = [[3.0 * (w == " ship") for w in tokens] for tokens in firing]
    return Passages(
        4,
        [passage(t, v, "fires") for t, v in zip(firing, values, strict=True)],
        [passage(t, [0.0] * 5, "random") for t in silent],
        3.0,
    )


def test_a_judge_that_answers_in_text(passages):
    asker = Asker(scripted(" ship"))
    found = score(Explanation("ships {n} {passages} %s"), passages, asker)  # braces are text
    assert (found.detection, found.fuzzing) == (1, 1) and found.simulation == pytest.approx(1)
    assert asker.answered == asker.asked == 3 + 2 + 5 and found.unanswered == 0
    wrong = score(Explanation("ships"), passages, Asker(scripted(" tea")))
    assert wrong.detection < 0.75 and wrong.fuzzing <= 0.5 and wrong.simulation < 0.1  # measured: .64, .33, -.17


def test_a_judge_that_always_says_yes_scores_chance(passages):
    def yes(prompt):
        n = int(re.search(r"list of (\d+) numbers", prompt)[1])
        return str([1] * n)

    found = score(Explanation("anything"), passages, Asker(yes), ["detection", "fuzzing"])
    assert (found.detection, found.fuzzing) == (0.5, 0.5) and math.isnan(found.simulation)


def test_fuzzing_with_silent_passages_as_delphi_does():
    """Firing passages are all marked where they fire, on 1 and on 2 tokens, so that 1.5, rounded up, are marked in each
    silent one: both of the first, and the one that is known of the second."""
    firing = [passage([" a", " b", " c"], [2, 0, 0], "fires"), passage([" c", " d", " b"], [1, 1, 0], "fires")]
    silent = [passage([" x", " y"], [0, 0], "random"), passage([" x", " y"], [math.nan, 0], "random")]
    shown = {}

    def judge(prompt):
        listed = prompt.split("FEATURE")[1].split("\n\n")[1].splitlines()
        shown.update({line.split(". ", 1)[1]: line for line in listed})
        return str([int("y" not in line) for line in listed])

    def asked(negatives):
        shown.clear()
        passages = Passages(0, firing, silent, 2.0)
        return score(Explanation("a"), passages, Asker(judge), ["fuzzing"], negatives=negatives).fuzzing

    assert asked("silent") == 1
    assert set(shown) == {"<< a>> b c", "<< c>><< d>> b", "<< x>><< y>>", " x<< y>>"}
    # The control: the second firing passage has one silent token, fewer than fire, and is left out.
    assert math.isnan(asked("firing")) and set(shown) == {"<< a>> b c"}


def test_fuzzing_marks_as_many_silent_tokens_or_leaves_the_passage_out():
    """Every second passage is marked where the feature is silent. Two tokens fire in each: the second passage has two
    silent ones, the fourth a single one, since what the mask leaves out is not known to be silent."""
    values = [[2, 1, 0, 0], [2, 0, 1, 0], [1, 1, 0, 0], [1, 0, math.nan, 1]]
    words = [[f" {letter}{i}" for i in range(4)] for letter in "abcd"]
    firing = [passage(tokens, v, "fires") for tokens, v in zip(words, values, strict=True)]
    shown = []

    def judge(prompt):
        listed = prompt.split("FEATURE")[1].split("\n\n")[1].splitlines()
        shown.extend(line.split(". ", 1)[1] for line in listed)
        return str([int(" b" not in line.replace("<<", "")) for line in listed])

    found = score(Explanation("a"), Passages(0, firing, [], 2.0), Asker(judge), ["fuzzing"])
    assert sorted(shown) == [" b0<< b1>> b2<< b3>>", "<< a0>><< a1>> a2 a3", "<< c0>><< c1>> c2 c3"]
    assert found.fuzzing == 1 and found.unanswered == 0
    rule = score(token(" a0"), Passages(0, firing, [], 2.0), measures=["fuzzing"])
    assert rule.fuzzing == 0.75  # of a's two marked tokens one is named, which is half: right; none of c's: wrong


def test_silent_passages_do_not_ask_for_the_mark(passages):
    """A judge that never looks at the mark, only whether the word is there: right on silent passages, chance on firing
    ones."""

    def blind(prompt):
        listed = re.findall(r"^\d+\. (.*?)$", prompt, re.M)
        return str([int("ship" in text) for text in listed])

    found = {n: score(Explanation("ships"), passages, Asker(blind), ["fuzzing"], negatives=n) for n in NEGATIVES}
    assert found["silent"].fuzzing == 1 and found["firing"].fuzzing == 0.5
    judge = scripted(" ship")
    looks = {n: score(Explanation("s"), passages, Asker(judge), ["fuzzing"], negatives=n) for n in NEGATIVES}
    assert looks["silent"].fuzzing == looks["firing"].fuzzing == 1
    with pytest.raises(ValueError, match="negatives are 'firing' or 'silent' passages, got 'hard'"):
        score(Explanation("ships"), passages, Asker(blind), ["fuzzing"], negatives="hard")


def test_what_is_not_answered_does_not_count(passages):
    """Every second question fails: its passages are left out, and counted."""
    count = iter(range(100))
    judge = scripted(" ship")
    asker = Asker(lambda prompt: judge(prompt) if next(count) % 2 else "I cannot say", retries=0)
    found = score(Explanation("ships"), passages, asker, ["detection"])
    assert found.detection == 1 and found.unanswered == 13  # 23 passages: questions of 10, 10, 3
    assert asker.tries == {"not readable": 2}


def test_simulations_that_are_not_answered_do_not_count(passages):
    """23 passages in questions of 5; the first and the third fail."""
    count = iter(range(100))
    judge = scripted(" ship")
    asker = Asker(lambda prompt: "I cannot say" if next(count) in (0, 2) else judge(prompt), retries=0)
    found = score(Explanation("ships"), passages, asker, ["simulation"])
    assert found.simulation == pytest.approx(1) and found.unanswered == 10
    silent = score(Explanation("ships"), passages, Asker(lambda _: "", retries=0), ["simulation"])
    assert math.isnan(silent.simulation) and silent.unanswered == 23


def test_how_many_passages_a_question_holds(passages):
    judge, sizes = scripted(" ship"), []

    def counting(prompt):
        sizes.append(len(re.findall(r"^\d+\. ", prompt, re.M)))
        return judge(prompt)

    score(Explanation("ships"), passages, Asker(counting))
    assert sizes == [10, 10, 3, 10, 2, 5, 5, 5, 5, 3]


@pytest.mark.parametrize(
    "answer",
    ["[1, 0, 1]", "```json\n[1,0,1]\n```", "[1] first\n so [1 0 1]", "[0,0,0] no: [1,0,1]",
     "[1, 0, 1]\nThe [2] is not, see [1, 1]."],
)  # fmt: skip
def test_flags_that_are_read(answer):
    assert read_flags(answer, 3) == [True, False, True]


@pytest.mark.parametrize("answer", ["", "yes", "[1, 0]", "[1, 0, 2]", "[1, 0, 1, 1]", "[true, 0, 1]", "[[[["])
def test_flags_that_are_refused(answer):
    with pytest.raises(ValueError, match="no list of 3 noughts and ones"):
        read_flags(answer, 3)


def test_activations_that_are_read():
    assert [v.tolist() for v in read_activations("here: [[0, 10], [5]] .", [2, 1])] == [[0, 1], [0.5]]
    assert [v.tolist() for v in read_activations("[0, 10]", [2])] == [[0, 1]]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("none", "not as long"), ("[[1, 2], [3, 4]]", "not as long"), ('[["x", 2], [3]]', "no list of lists"),
        ("[[1, 11], [3]]", "numbers from 0 to 10"), ("[[1, NaN], [3]]", "numbers from 0 to 10"), ("[[[1]]]", "as long"),
        ("[[1, 2], [[3]]]", "not as long"),
    ],
)  # fmt: skip
def test_activations_that_are_refused(answer, words):
    with pytest.raises(ValueError, match=words):
        read_activations(answer, [2, 1])


def test_what_is_refused(passages):
    with pytest.raises(ValueError, match="'about ships' is free text, which a rule cannot apply: pass judge="):
        score(Explanation("about ships"), passages)
    with pytest.raises(ValueError, match="measures are detection, fuzzing, simulation, got 'surprise'"):
        score(token(" ship"), passages, measures=["surprise"])
