"""fit_probe: its direction is that of logistic regression by hand, and what it says is of texts it has not seen."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import sae_lab as sl
from sae_lab.edits.vector import text_means
from sae_lab.evals.probe_sets import ProbeSet
from sae_lab.evals.probes import split

SITE = sl.Site("resid_post", 1)
SHIP, FOX = ["ship", "boat", "river", "harbour", "sailor"], ["fox", "dog", "field", "snow", "burrow"]


def two_kinds(n, seed=0):
    draw = np.random.default_rng(seed)
    texts = [f"{number} {' '.join(draw.choice(kind, 6))}" for number in range(n) for kind in (SHIP, FOX)]
    return texts, ["ships", "foxes"] * n


@pytest.fixture(scope="module")
def text(small_text):
    return small_text[:3]


def test_the_probe_of_two_kinds(make_tiny, text):
    lm = make_tiny("llama")
    texts, labels = two_kinds(40)
    found = sl.fit_probe(lm, SITE, texts, np.array(labels), text=text)
    one = ProbeSet.of("texts", texts, labels).balanced(80)
    train, validation, test = split(one.labels, [0])
    assert (found.texts, found.held_out) == (80, len(test)) and not set(test) & {*train, *validation}
    x = text_means(lm, [SITE], one.texts)[0].numpy()
    scaled = (x - x[train].mean(0)) / x[train].std(0)
    by_hand = LogisticRegression(C=found.penalty, max_iter=1000).fit(scaled[train], one.labels[train])
    direction = torch.tensor(by_hand.coef_[0] / x[train].std(0)).float()
    assert float(found.vector.unit @ direction / direction.norm()) == pytest.approx(1, abs=1e-4)
    assert found.accuracy == pytest.approx((by_hand.predict(scaled[test]) == one.labels[test]).mean())
    assert found.positive == "ships" == found.vector.name
    assert found.accuracy > 0.9 and found.auroc > 0.9 and 0.2 < found.shuffled_auroc < 0.8
    ships, foxes = (text_means(lm, [SITE], texts[i::2])[0].mean(0) for i in (0, 1))
    assert float((ships - foxes) @ found.vector.unit) > 0
    assert found.figure("accuracy").control == found.shuffled_accuracy and "held out" in repr(found)
    push = sl.Push(found.vector, 2.0)
    assert not torch.equal(lm.logits("A fox", edits=[push]), lm.logits("A fox"))
    assert not torch.equal(sl.fit_probe(lm, SITE, texts, labels, seed=1, text=text).vector.unit, found.vector.unit)


def test_copies_are_on_one_side(make_tiny, text):
    """Noise that stands often is not known by heart."""
    draw = np.random.default_rng(0)
    texts = [f"{i} {draw.choice(SHIP)}" for i in range(24)]
    found = sl.fit_probe(make_tiny("llama"), SITE, texts * 5, list(draw.permutation([0, 1] * 12)) * 5, text=text)
    assert found.texts == 24


def test_what_it_refuses(tiny_lm):
    texts, labels = two_kinds(20)
    for args, words in (
        ((texts, ["one"] * 40), "a probe tells two classes apart, got 1"), ((texts, labels[:-1]), "every text needs"),
        ((texts[:4], labels[:4]), "texts must be at least 8, half of either class, got 4 that differ"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            sl.fit_probe(tiny_lm, SITE, *args)
    with pytest.raises(ValueError, match="shuffles must be at least 1, got 0"):
        sl.fit_probe(tiny_lm, SITE, texts, labels, shuffles=0)
