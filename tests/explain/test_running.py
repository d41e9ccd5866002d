"""explain(): scores beside their controls, going on where it stopped, failures kept, what the inspector shows."""

import json
import math
import re
import threading

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.explain import RuleExplainer, explain, explainers, local_chat, running
from sae_lab.feature_index import FeatureIndex, index_features
from sae_lab.widgets import FeatureInspector


def knows(words):
    """An explainer that names the token most often marked; a judge that looks for the named word."""

    def explainer(prompt):
        marked = re.findall(r"<<(.+?)>>", prompt)
        return f"EXPLANATION: the word {json.dumps(max(set(marked), key=marked.count))}"

    def judge(prompt):
        word = json.loads(re.search(r'the word ("(?:[^"\\]|\\.)*")', prompt)[1])
        listed = re.split(r"^\d+\. ", prompt.split("\n\n", 2)[2].rsplit("\n\nANSWER", 1)[0], flags=re.M)[1:]
        if "JSON list of its tokens" in prompt:
            return json.dumps([[10 * (t == word) for t in json.loads(text)] for text in listed])
        wanted = f"<<{word}>>" if "<<" in prompt else word
        return json.dumps([int(wanted in text) for text in listed])

    explainer.name, judge.name = "knows", "looks"
    return explainer, judge


def test_rules_beat_the_explanations_of_others(token_index):
    result = explain(token_index, list(range(12)))
    assert len(result.rows) == 12 and not result.failed
    for measure in ("detection", "fuzzing"):
        own, other = result.values(measure)
        assert own.mean() == 1 and 0.4 < other.mean() < 0.6  # features fire on a token each: measured 1 and .50
    own, other = result.values("simulation")
    assert own.mean() > 0.98 and abs(other.mean()) < 0.1
    value, error = result.minus_control("detection")
    assert value > 0.35 and error < 0.1


def test_random_directions_are_explained_worse(token_store, token_index, tmp_path):
    """A coder of random directions over the same tokens: what it fires on is no token's, and harder to say."""
    lm, store = token_store
    coder = sl.TopK(48, 13, k=1, seed=5)
    with torch.no_grad():
        coder.b_dec.copy_(store.rows(np.arange(len(store)), "embed").mean(0))
    random = index_features(coder.eval(), lm, store, path=tmp_path / "random")
    planted = explain(token_index, list(range(12)), measures=["detection"]).values("detection")[0].mean()
    found = explain(random, 10, measures=["detection"]).values("detection")[0].mean()
    assert found < planted - 0.1  # measured: .77 and 1


def test_the_table(token_index, token_words):
    result = explain(token_index, [3, 0, 5])
    text = repr(result)
    assert "detection - control" in text and "3 of 3 features scored, explained by rules" in text and "seed 0" in text
    frame = result.to_pandas()
    assert frame["feature"].tolist() == [3, 0, 5] and json.dumps(token_words[3], ensure_ascii=False) in result[3].text
    assert {"detection", "detection_control", "explanation", "called firing: random"} <= set(frame.columns)
    assert all(row.other != row.feature and row.other in (0, 3, 5) for row in result.rows)
    with pytest.raises(ValueError, match="feature 9 is not among the 3"):
        result[9]
    [figure] = [f for f in result.figures() if f.measure == "fuzzing"]
    assert figure.value == 1 and 0 <= figure.control <= 0.9 and "<table" in result._repr_html_()


def test_text_goes_through_the_prompts(token_index, token_words):
    explainer, judge = knows(token_words)
    result = explain(token_index, [0, 1, 2, 3], explainer, judge, retries=0)
    own, other = result.values("fuzzing")
    assert own.mean() == 1 and other.mean() < 0.8 and result.values("simulation")[0].mean() > 0.98
    assert "explainer: 4 of 4 questions answered" in result.asked and "judge: " in repr(result)


def test_a_second_call_goes_on(token_index, token_words):
    """The first is stopped in its third question; the second asks for what is missing alone, and ends as one would
    that was never stopped."""
    explainer, judge = knows(token_words)
    calls = []

    def counted(prompt):
        calls.append(prompt)
        return explainer(prompt)

    stops = iter([False, False, True] + [False] * 100)
    counted.name = explainer.name
    index = token_index

    class Stopped(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        original = running.explainer_prompt

        def stopping(passages):
            if next(stops):
                raise Stopped
            return original(passages)

        patch.setattr(running, "explainer_prompt", stopping)
        with pytest.raises(Stopped):
            explain(index, [0, 1, 2, 3], counted, judge)
    assert len(calls) == 2
    file = next(index.path.glob("explain-*.jsonl"))
    with open(file, "a") as f:
        f.write('{"feature": 2, "te')  # as a process leaves it that was killed
    result = explain(FeatureIndex(index.path, index.store, index.lm, index.coder), [0, 1, 2, 3], counted, judge)
    assert len(calls) == 4 and not result.failed
    again = explain(index, [0, 1, 2, 3], counted, judge)
    assert len(calls) == 4 and again.rows == result.rows and again.asked.startswith("explainer: 0 of 0")
    anew = explain(index, [0, 1, 2, 3], counted, judge, resume=False)
    assert len(calls) == 8 and anew.rows == result.rows


def test_failures_are_kept_and_tried_again(token_index, token_words):
    explainer, judge = knows(token_words)
    broken, release = {1: "", 2: None, 3: "hang"}, threading.Event()
    count = iter(range(100))

    def poor(prompt):
        number = next(count)
        if number not in broken:
            return explainer(prompt)
        if number == 2:
            raise RuntimeError("out of memory")
        if number == 3:
            release.wait(20)
        return ""

    poor.name = "poor"
    result = explain(token_index, [0, 1, 2, 3, 4], poor, judge, deadline=0.3, retries=0)
    release.set()
    assert [bool(row.failure) for row in result.rows] == [False, True, True, True, False]
    assert result[1].failure == "no explanation: returned an empty answer"
    assert "RuntimeError: out of memory" in result[2].failure and "no answer within 0.3 s" in result[3].failure
    assert "2 of 5 features scored" in repr(result) and "explainer: 2 of 5 questions answered" in result.asked
    assert math.isnan(result[1].score.detection) and result[0].score.fuzzing == 1
    second = explain(token_index, [0, 1, 2, 3, 4], poor, judge, deadline=5.0)
    assert not second.failed and "explainer: 3 of 3" in second.asked


def test_a_judge_that_is_no_use(token_index, token_words):
    explainer, _ = knows(token_words)
    result = explain(token_index, [0, 1], explainer, lambda prompt: "hm", retries=0)
    assert [row.failure for row in result.rows] == ["the judge gave too few answers that can be read"] * 2
    assert "undefined" in repr(result) and result.rows[0].text and result.rows[0].score.unanswered > 0


def test_a_dead_feature_is_a_failure(token_index):
    result = explain(token_index, [12, 0, 1])
    assert "fires in fewer than two contexts" in result[12].failure and not result[0].failure
    assert "; 1 failed: it fires in fewer" in repr(result)


def test_one_feature_has_no_control(token_index):
    result = explain(token_index, [0], measures=["detection"])
    assert result[0].score.detection == 1 and math.isnan(result[0].control.detection) and result[0].other == -1


def test_explanations_are_shown(token_index, token_words):
    token_index.annotate(1, "my own")
    result = explain(token_index, [0, 1])
    again = FeatureIndex(token_index.path, token_index.store, token_index.lm, token_index.coder)
    [said] = again[0].explanations
    assert said["text"] == result[0].text and said["source"] == "rules" and said["scores"]["detection"] == 1
    assert again.notes[1].label == "my own" and f"explained: {result[0].text}" in str(again[0])
    panel = FeatureInspector(again, feature=0)
    labels = {row["feature"]: row["label"] for row in panel.results}
    assert labels[1] == "my own" and labels[0].startswith("fires on the tokens") and labels[2] == ""
    assert panel.view["explanations"] == again[0].explanations
    assert "detection 1.00" in panel.snapshot()._repr_html_()
    panel.query = "label:fires"
    assert {row["feature"] for row in panel.results} == {0, 1}


def test_what_is_refused(token_index):
    with pytest.raises(ValueError, match="free text cannot be judged without a judge"):
        explain(token_index, [0], lambda prompt: "words")
    with pytest.raises(ValueError, match="feature must be an int from 0 to 12, got 99"):
        explain(token_index, [99])
    with pytest.raises(ValueError, match="a number from 1 to the 12 live ones, got 13"):
        explain(token_index, 13)
    with pytest.raises(ValueError, match="no feature to explain"):
        explain(token_index, [])
    with pytest.raises(ValueError, match="negatives are 'firing' or 'silent' passages, got 'random'"):
        explain(token_index, [9], negatives="random")
    with pytest.raises(ValueError, match="measures are detection, fuzzing, simulation, got 'x'"):
        explain(token_index, [0], measures=["x"])
    explain(token_index, [0])
    next(token_index.path.glob("explain-*.jsonl")).write_text("{}\n")
    with pytest.raises(ValueError, match=r"line 1 is damaged .* pass resume=False"):
        explain(token_index, [0])


def test_settings_of_rules_are_runs_of_their_own(token_index):
    explain(token_index, [0, 1])
    explain(token_index, [0, 1], RuleExplainer(most=1))
    explain(token_index, [0, 1], seed=1)
    assert len(list(token_index.path.glob("explain-*.jsonl"))) == 3


def test_the_bundled_model_explains(lm, token_index, monkeypatch):
    """It is too small to be right: that the whole way runs is what is looked at."""
    monkeypatch.setattr(explainers, "SHOWN", (2, 1))
    monkeypatch.setattr(running, "JUDGED", 2)
    ask = local_chat(lm, max_new_tokens=12)
    result = explain(token_index, [9, 10], ask, ask, measures=["fuzzing"], retries=0, deadline=60.0)
    assert len(result.rows) == 2 and "SmolLM2" in result.explainer
    assert "explainer: 2 of 2" in result.asked or result.failed
