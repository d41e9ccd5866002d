"""SAGE on a feature that needs two words: the model is made by hand, the coder too, and the agent by rules."""

import math

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.explain.sage import (
    Hypothesis,
    Trial,
    design_of,
    lines_of,
    numbers_of,
    sage_explain,
    verdict_of,
)
from sae_lab.explain.scripted import ScriptedAgent
from sae_lab.types import Site

PLENTY = (
    "green", "paper", "stone", "open", "light", "hand", "paint", "door", "small", "music", "field", "coffee", "winter",
    "summer", "window", "letter", "bread", "garden", "table", "market", "story", "number", "circle", "silver", "horse",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(make_module, tokenizer):
    """(lm, coder, documents). The coder's one feature fires on " bank" with " river" somewhere before it: the model's
    only layer writes the mean of what stands before into a coordinate of its own. Wherever " river" stands, so does
    " water", which has no effect."""
    module = make_module("llama", len(tokenizer), num_hidden_layers=1)
    river, bank = (tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in ("river", "bank"))
    with torch.no_grad():
        layer = module.model.layers[0]
        for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj,
                  layer.mlp.down_proj):  # fmt: skip
            p.weight.zero_()
        layer.input_layernorm.weight.fill_(1)
        layer.self_attn.v_proj.weight[0, 0] = 1.0
        layer.self_attn.o_proj.weight[2, 0] = 1.0
        table = module.model.embed_tokens.weight
        table.mul_(0.3)[:, :4] = 0.0
        table[river, 0] = table[bank, 1] = 5.0
    lm = sl.LM(module, tokenizer=tokenizer)
    coder = sl.L1(48, 2)
    with torch.no_grad():
        for p in coder.parameters():
            p.zero_()
        coder.W_enc[1, 0], coder.W_enc[2, 0], coder.b_enc[0] = 20.0, 10.0, -100.0
        coder.b_enc[1] = -1.0  # the second feature is dead
    coder.reads = coder.writes = (Site("resid_post", 0),)
    return lm, coder.eval(), documents()


def documents(n=64, seed=0):
    rng, texts = np.random.default_rng(seed), []
    for i in range(n):
        words = rng.choice(PLENTY, 24).tolist()
        if i % 4 in (0, 1):
            words[3:3] = ["river", "and", "water"]
        if i % 4 in (0, 2):
            words.insert(20, "bank")
        texts.append("There was " + " ".join(words))
    return texts


def test_the_planted_feature_fires_on_both_halves_only(world):
    lm, coder, _ = world
    texts = ["the river near the bank", "the bank near the river", "the bank near the bank", "the river and the river"]
    codes = coder.encode(lm.read(texts, coder.site)[coder.site])[..., 0].amax(1)
    assert (codes > 0).tolist() == [True, False, False, False]


def test_experiments_name_both_halves_where_a_single_pass_does_not(world):
    lm, coder, texts = world
    result = sage_explain(coder, lm, texts, 0, ScriptedAgent())
    assert result.explanation == 'the word "bank" behind the word "river"'
    # "water" explains the examples as well as "river" does; only an experiment tells them apart.
    refuted = {h.statement for h in result.hypotheses if h.status == "refuted"}
    assert {'the word "bank"', 'the word "bank" behind the word "water"'} <= refuted
    assert result.generation > result.single_pass_generation + 0.2
    assert result.generation > result.random_generation + 0.2
    assert result.prediction > 0.8 > abs(result.random_prediction)
    assert result.unread == 0


def test_a_feature_of_one_word_is_not_given_a_second(world):
    lm, coder, texts = world
    plain = sl.L1(48, 1)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
        plain.W_enc[1, 0], plain.b_enc[0] = 20.0, -50.0  # " bank", whatever stands before
    plain.reads = plain.writes = coder.reads
    result = sage_explain(plain.eval(), lm, texts, 0, ScriptedAgent())
    assert result.explanation == 'the word "bank"'
    assert result.generation == result.single_pass_generation == 1
    assert result.generation > result.random_generation + 0.2


def test_nonsense_is_counted_asked_again_and_kept(world):
    lm, coder, texts = world
    scripted = ScriptedAgent()
    result = sage_explain(coder, lm, texts, 0, lambda prompt: "lorem ipsum", retries=1)
    assert result.explanation == "" and result.hypotheses == () and result.rounds == 0
    assert result.calls == result.unread == 2 and math.isnan(result.prediction) and result.generation == 0
    assert [answer for _, answer in result.transcript] == ["lorem ipsum"] * 2
    assert "could not be read" in result.transcript[1][0] and "could not be read" not in result.transcript[0][0]
    late = iter(["Hm.", "I do not know."])
    patient = sage_explain(coder, lm, texts, 0, lambda prompt: next(late, None) or scripted(prompt))
    assert patient.explanation == 'the word "bank" behind the word "river"' and patient.unread == 2
    silent = sage_explain(
        coder, lm, texts, 0, lambda prompt: "" if "TASK: judge" in prompt else scripted(prompt), retries=0
    )
    assert {h.status for h in silent.hypotheses} == {"open"} and silent.unread == silent.rounds == 4
    assert all(h.evidence for h in silent.hypotheses)


def test_a_refined_hypothesis_is_tried_next_and_rounds_end(world):
    lm, coder, texts = world
    scripted = ScriptedAgent()

    def agent(prompt):
        if "TASK: judge" in prompt and 'HYPOTHESIS: the word "bank"\n' in prompt:
            return '**Verdict**: Refined.\n- Hypothesis: the word "bank" behind the word "river"'
        return scripted(prompt)

    result = sage_explain(coder, lm, texts, 0, agent)
    assert [h.status for h in result.hypotheses[:2]] == ["refined", "confirmed"]
    assert result.hypotheses[1].statement.endswith('"river"')
    short = sage_explain(coder, lm, texts, 0, scripted, rounds=1)
    assert short.rounds == 1 and [h.status for h in short.hypotheses] == ["refuted", "open", "open", "open"]


def test_a_language_model_may_be_the_agent(world, tiny_lm):
    lm, coder, texts = world
    result = sage_explain(
        coder, lm, texts, 0, lambda prompt: tiny_lm.generate(prompt[-40:], max_new_tokens=5), rounds=2, retries=0,
        examples=4, generated=2,
    )  # fmt: skip
    assert 0 <= result.unread <= result.calls == len(result.transcript)
    assert "generation accuracy" in repr(result) and len(result.to_pandas()) == 1


def test_agreement_by_hand():
    trials = (Trial("a", True, 3.0, True), Trial("b", True, 0.0, False), Trial("c", False, 0.0, False))
    assert Hypothesis("x", "open", trials).right == 2
    assert Hypothesis("x", "open", trials).agreement == pytest.approx(2 / 3)
    assert math.isnan(Hypothesis("x").agreement)


@pytest.mark.parametrize(
    "answer",
    [
        "HYPOTHESIS: dogs\nHYPOTHESIS: cats",
        "Sure!\n\n**Hypothesis 1:** dogs\n**Hypothesis 2:** cats",
        '- HYPOTHESIS - 1: dogs\n- Hypothesis: "cats"',
        "1. dogs\n2. cats",
        "* dogs\n* cats\n",
    ],
)
def test_answers_are_read_leniently(answer):
    assert lines_of(answer, "HYPOTHESIS") == ["dogs", "cats"]


def test_nothing_is_read_into_nonsense():
    assert lines_of("I like dogs.", "HYPOTHESIS") == []
    assert lines_of("HYPOTHESIS: ...", "HYPOTHESIS") == []
    assert lines_of("- dogs", "EXPLANATION", bullets=False) == []
    assert design_of("SILENT: a\nSILENT: b") is None
    assert verdict_of("It may be confirmed or refuted.") is None
    assert verdict_of("VERDICT: refined") is None
    assert numbers_of("ten, twenty", 2) is None
    assert numbers_of("1: 5", 4) is None


def test_designs_verdicts_and_numbers():
    assert design_of('Fires: "a b"\n* **SILENT:** c') == [("a b", True), ("c", False)]
    assert verdict_of("VERDICT: **Confirmed**") == ("confirmed", "")
    assert verdict_of("It is not confirmed.") == ("refuted", "")
    assert verdict_of("Verdict: to be refined\nHypothesis: cats") == ("refined", "cats")
    assert numbers_of("1: 10\n2) 30.5\n9: 4", 3) == [10.0, 30.5, 20.25]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rounds": 15}, "rounds must lie between 0 and 14, got 15"), ({"trials": 1}, "trials must be at least 2, got 1"),
     ({"retries": -1}, "retries must be at least 0, got -1"), ({"examples": 1}, "examples must be at least 2, got 1")],
)  # fmt: skip
def test_settings_out_of_range(world, settings, message):
    lm, coder, texts = world
    with pytest.raises(ValueError, match=message):
        sage_explain(coder, lm, texts, 0, ScriptedAgent(), **settings)


def test_a_dead_feature(world):
    lm, coder, texts = world
    with pytest.raises(ValueError, match="feature 1 never fires in the source: choose a live feature"):
        sage_explain(coder, lm, texts, 1, ScriptedAgent())
