"""evals.uncertainty: labels that we planted, a model whose right answers we know, and questions made by rule."""

import math

import numpy as np
import pytest
import torch

import sae_lab as sl

# The formulas by hand: uncertainty itself asks a model many questions.
from sae_lab.evals.hesitation import (
    _alike,
    _answered,
    _auroc_within,
    _classes,
    _predict,
    _shuffled_t,
    _tokenized,
    association,
    greedy_and_entropy,
    synthetic_qa,
    uncertainty,
)
from sae_lab.stats import auroc
from sae_lab.types import Site

SITE = Site("resid_post", layer=1)


# ---- formulas


def test_entropy_and_greedy_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], [[0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]]]))
    said = greedy_and_entropy(logits, None, torch.tensor([0, 1]))
    assert said["greedy"].tolist()[0] == [0, 1] and said["greedy"][1, 0] == 2
    assert said["entropy"].tolist() == pytest.approx([1.5 * math.log(2), math.log(3)])


def test_auroc_within_groups():
    # Two groups that differ in level and in share: within them the score says nothing, over all it does.
    group = np.repeat([0, 1], 50)
    positive = np.r_[np.arange(50) < 40, np.arange(50) < 10]
    level = np.repeat([1.0, 0.0], 50)
    assert auroc(level[:, None], positive)[0] == pytest.approx(0.8) and _auroc_within(level, positive, group) == 0.5
    assert math.isnan(_auroc_within(level, np.ones(100, bool), group))


def test_association_is_the_t_of_a_regression():
    random = np.random.default_rng(0)
    group = random.integers(0, 3, 90)
    u, i = random.random(90) < 0.5, random.random(90) < 0.4
    f = random.normal(0, 1, (90, 2)) + 2 * u[:, None] + group[:, None]
    x = np.column_stack([u, i, np.eye(3)[group]]).astype(float)  # a constant for each group, the plain way
    slopes, residual = np.linalg.lstsq(x, f, rcond=None)[:2]
    error = np.sqrt(np.linalg.inv(x.T @ x).diagonal()[:2, None] * residual / (90 - 5))
    assert association(f, u, i, group) == pytest.approx(slopes[:2] / error, rel=1e-6)


# ---- planted labels


def planted(n=400, seed=0):
    """Codes whose first features go with uncertainty, with a wrong answer, with both, and with the group; 30 more are
    noise. The labels go together, as they do in models."""
    random = np.random.default_rng(seed)
    group = random.integers(0, 2, n)
    uncertain = random.random(n) < 0.5
    correct = random.random(n) < np.where(uncertain, 0.35, 0.7)
    level = np.stack([uncertain, ~correct, uncertain + 1.0 * ~correct, 2.0 * group, *np.zeros((30, n))])
    f = np.maximum(level.T + random.normal(0.5, 0.7, (n, 34)), 0).astype(np.float32)
    return f, uncertain, correct, group


def test_classes_of_planted_features():
    f, uncertain, correct, group = planted()
    classes = _classes(association(f, uncertain, ~correct, group), 3.0)
    assert [np.flatnonzero(c[:4]).tolist() for c in classes] == [[0], [1], [2]]
    assert classes[:, 4:].sum() <= 1  # of 60 t values of noise .16 are expected above 3
    random = np.random.default_rng(0)
    shuffled = np.mean(
        [_classes(t, 3.0).sum(1) for t in _shuffled_t(f, uncertain, correct, group, random, times=50)], axis=0
    )
    assert shuffled.sum() < 0.6  # of 68 t values, .2 by chance


def test_three_features_predict_what_was_planted_and_nothing_of_noise():
    f, _, correct, group = planted()
    found = _predict(f, correct, group, 5, np.random.default_rng(0))
    assert found["auroc"] > 0.8 and found["auroc_within"] > 0.8  # measured: .87, .87
    assert found["auroc_shuffled"] == pytest.approx(0.5, abs=0.08)
    noise = _predict(f[:, 4:], correct, group, 5, np.random.default_rng(0))
    assert noise["auroc"] == pytest.approx(0.5, abs=0.08)
    # A feature of the group predicts where one group is hard, and not within groups.
    hard = np.where(group == 0, np.random.default_rng(1).random(len(group)) < 0.85, correct & (f[:, 5] > 0.8))
    found = _predict(f[:, 3:], hard, group, 5, np.random.default_rng(0))
    assert found["auroc"] > 0.7 and found["auroc_within"] < found["auroc"] - 0.1


def test_the_random_features_fire_as_often():
    firings = np.arange(200)
    chosen = np.array([10, 100, 190])
    others = np.setdiff1d(np.arange(200), chosen)
    drawn = _alike(chosen, others, firings, np.random.default_rng(0))
    assert len(set(drawn)) == 3 and not set(drawn) & set(chosen) and np.abs(drawn - chosen).max() <= 12


# ---- questions


def test_questions_are_made_by_rule(tokenizer):
    qa = synthetic_qa(seed=0, n=160)
    assert qa == synthetic_qa(seed=0, n=160) and qa != synthetic_qa(seed=1, n=160)
    kinds = [q.kind for q in qa]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == dict.fromkeys(
        ("sum", "product", "capital", "opposite"), 40
    )
    for q in qa:
        *shown, asked = q.prompt.split("\n")
        assert len(shown) == 3 and asked not in q.prompt[: -len(asked)], q
        if q.kind in ("sum", "product"):
            for line in [*shown, asked + q.answer]:
                left, right = line.split(" = ")
                assert eval(left) == int(right)
    assert len({q.prompt for q in synthetic_qa(n=1000)}) > 990, "more than there are pairs: another round"
    assert "France is" in " ".join(q.prompt for q in synthetic_qa(n=280)) and len(synthetic_qa(n=6)) == 6
    for q in qa:  # what the eval needs of them
        ids, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (q.prompt, q.prompt + q.answer)
        )
        assert whole[: len(ids)] == ids and len(whole) > len(ids)
    with pytest.raises(ValueError, match="n must be at least 4"):
        synthetic_qa(n=3)


def test_the_bundled_model_answers_some(lm):
    """Measured, 160 questions: .75 of capitals, .13 of sums of two-digit numbers (64 questions)."""
    qa = [q for q in synthetic_qa(n=40) if q.kind == "capital"][:6]
    rows, starts = _tokenized(lm, [q.prompt for q in qa], [q.answer for q in qa])
    correct, entropy, codes = _answered(lm, None, rows, starts)
    assert correct.mean() >= 0.5 and entropy.min() >= 0 and codes.shape == (6, 0)
    said = lm.generate(qa[0].prompt, max_new_tokens=3)
    assert (qa[0].answer in said[len(qa[0].prompt) :]) == bool(correct[0])


# ---- the whole of it


def coder_at(coder):
    coder.reads = coder.writes = (SITE,)
    return coder.eval()


def answerable(lm, n=40):
    """Prompts whose right answer is what the model says, for every second one."""
    random = np.random.default_rng(0)
    words = [" apple", " house", " river", " stone", " light", " paper", " green", " music", " seven", " north"]
    prompts = ["".join(random.choice(words, 6)) for _ in range(n)]
    answers = []
    for i, prompt in enumerate(prompts):
        best = lm.logits(prompt)[0, -1].argsort(descending=True).tolist()
        candidates = best[:1] if i % 2 == 0 else best[400:500]
        whole = lm.tokenize(prompt).ids[0].tolist()
        texts = ((lm.tokenizer.decode([token]), token) for token in candidates)
        fits = (text for text, token in texts if lm.tokenize(prompt + text).ids[0].tolist() == [*whole, token])
        answers.append(next(fits, None))
    return [(p, a, i % 2 == 0) for i, (p, a) in enumerate(zip(prompts, answers, strict=True)) if a is not None]


@pytest.fixture(scope="module")
def known(tiny_lm):
    return answerable(tiny_lm)


def test_right_answers_are_found(tiny_lm, known):
    prompts, answers, right = zip(*known, strict=True)
    assert sum(right) >= 8 and len(right) - sum(right) >= 8
    coder = coder_at(sl.TopK(48, 96, k=8))
    groups = ["a" if i % 3 else "b" for i in range(len(known))]
    r = uncertainty(coder, tiny_lm, prompts, answers, groups, suppress=4, splits=4)
    assert r.correct.tolist() == list(right) and r.accuracy == pytest.approx(np.mean(right))
    assert sum(r.cells) == r.questions == len(known) and r.cells[0] + r.cells[2] == sum(right)
    assert abs(r.auroc_shuffled - 0.5) < 0.25 and 0 <= r.auroc_entropy <= 1
    entropy = torch.distributions.Categorical(logits=tiny_lm.logits(prompts[3])[0, -1]).entropy()
    assert float(r.entropies[3]) == pytest.approx(float(entropy), rel=1e-4)
    assert len(r.figures()) == 6 and "random halves" in repr(r) and len(r.suppressed) <= 4
    if r.suppressed:
        assert -1 <= r.accuracy_change <= 1 and r.accuracy_change_se >= 0

    rows, starts = _tokenized(tiny_lm, prompts, answers)
    codes = _answered(tiny_lm, coder, rows, starts)[2]
    expected = coder.encode(tiny_lm.read(prompts[5], SITE)[SITE])[0, -1]
    assert codes[5] == pytest.approx(expected.detach().numpy(), abs=1e-4)


def test_ablating_a_coder_that_is_the_stream_changes_answers(tiny_lm, known):
    """The identity coder's features are the stream's coordinates: without them answers are no longer what they were."""
    coder = sl.L1(48, 96)
    with torch.no_grad():
        coder.W_enc.copy_(torch.cat([torch.eye(48), -torch.eye(48)], dim=1))
        coder.W_dec.copy_(coder.W_enc.T)
    prompts, answers, _ = zip(*known, strict=True)
    rows, starts = _tokenized(tiny_lm, prompts, answers)
    before = _answered(tiny_lm, None, rows, starts)[0]
    gone = _answered(tiny_lm, None, rows, starts, [sl.Ablate(coder_at(coder), list(range(96)))])[0]
    none = _answered(tiny_lm, None, rows, starts, [sl.Ablate(coder_at(coder), [0], rows=[])])[0]
    assert gone.mean() < 0.5 * before.mean() and (none == before).all()


def test_what_it_refuses(tiny_lm, known):
    prompts, answers, right = zip(*known, strict=True)
    coder = coder_at(sl.TopK(48, 96, k=8))
    with pytest.raises(ValueError, match="each prompt needs an answer, got 2 prompts and 1 answers"):
        uncertainty(coder, tiny_lm, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match=r"must begin those of prompt \+ answer, not so for 'an appl' \+ 'e'"):
        uncertainty(coder, tiny_lm, ["an appl"], ["e"])
    with pytest.raises(ValueError, match="groups must name the kind of each question, got 1 for"):
        uncertainty(coder, tiny_lm, prompts, answers, ["a"])
    wrong = [i for i, one in enumerate(right) if not one]
    with pytest.raises(ValueError, match=f"the model answers 0 of {len(wrong)} questions"):
        uncertainty(coder, tiny_lm, [prompts[i] for i in wrong], [answers[i] for i in wrong])
    with pytest.raises(ValueError, match="evals need coders in eval mode"):
        uncertainty(coder_at(sl.TopK(48, 96, k=8)).train(), tiny_lm, prompts, answers)
    silent = coder_at(sl.TopK(48, 96, k=8))
    with torch.no_grad():
        silent.W_enc.zero_()
    with pytest.raises(ValueError, match="three features must fire on 5 questions or more, got 0"):
        uncertainty(silent, tiny_lm, prompts, answers)
