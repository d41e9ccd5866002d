"""find_features: AUROC as sklearn counts it, p as permutations give it, and the planted feature found."""

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

import sae_lab as sl
from sae_lab.feature_index import finding
from sae_lab.types import Site
from tests.edits.test_edit import make

SITE = Site("resid_post", 1)
SHIPS = [
    f"The {a} ship {b} the river to the sea" for a in ("old", "red", "small", "lost") for b in ("left", "saw", "found")
]
CROWS = [
    f"A {a} crow {b} on the field at dawn" for a in ("old", "red", "small", "lost") for b in ("sat", "ran", "slept")
]


@pytest.fixture(scope="module")
def sae(make_tiny):
    return make(make_tiny("llama"))


def pooled(lm, sae, texts, how):
    """Codes of each text by hand, one text at a time."""
    rows = []
    for text in texts:
        f = sae.encode(lm.read(text, SITE)[SITE][0, 1:]).detach()  # the prefix is left out
        rows.append({"max": f.amax(0), "mean": f.mean(0), "last": f[-1]}[how])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("how", ["max", "mean", "last"])
def test_against_sklearn(how, tiny_lm, sae):
    found = sl.find_features(tiny_lm, sae, SHIPS, CROWS, pooling=how, held_out=0).to_pandas().set_index("feature")
    f = pooled(tiny_lm, sae, SHIPS + CROWS, how)
    label = np.array([1] * len(SHIPS) + [0] * len(CROWS))
    assert len(found) > 10
    for feature, row in found.iterrows():
        assert row.auroc == pytest.approx(roc_auc_score(label, f[:, feature]), abs=1e-6), feature
        difference = f[label == 1, feature].mean() - f[label == 0, feature].mean()
        assert row.mean_difference == pytest.approx(difference, abs=1e-5)
    assert found.auroc.is_monotonic_decreasing and found.held_out.isna().all()
    tokens = np.concatenate(
        [sae.encode(tiny_lm.read(t, SITE)[SITE][0, 1:]).detach().numpy() for t in SHIPS + CROWS]
    )
    assert np.allclose(found.density, (tokens[:, found.index] > 0).mean(0))


def test_tokens_with_labels_of_their_own(tiny_lm, sae):
    texts = SHIPS + CROWS
    labels = [[str(t) in (" river", " field") for t in tiny_lm.tokens(text)] for text in texts]
    found = sl.find_features(tiny_lm, sae, texts, labels, pooling="token", held_out=0)
    f = np.concatenate([sae.encode(tiny_lm.read(t, SITE)[SITE][0, 1:]).detach().numpy() for t in texts])
    flat = np.concatenate([one[1:] for one in labels])
    for feature, auroc in zip(found.table["feature"], found.table["auroc"], strict=True):
        assert auroc == pytest.approx(roc_auc_score(flat, f[:, feature]), abs=1e-6)
    assert f"{flat.sum()} positive and {(~flat).sum()} negative tokens" in repr(found)
    of_texts = sl.find_features(tiny_lm, sae, SHIPS, CROWS, pooling="token", held_out=0)
    counts = [int(word) for word in of_texts.searched.split() if word.isdigit()]
    assert sum(counts[:2]) == len(flat)


def test_labels_and_two_lists_say_the_same(tiny_lm, sae):
    by_lists = sl.find_features(tiny_lm, sae, SHIPS, CROWS, held_out=0)
    by_labels = sl.find_features(tiny_lm, sae, SHIPS + CROWS, [1] * len(SHIPS) + [0] * len(CROWS), held_out=0)
    assert by_lists.to_pandas().equals(by_labels.to_pandas())


class Planted:
    """Examples of known codes: feature 0 tells the classes apart, the others are noise, mostly 0."""

    def __init__(self, n=60, features=200, seed=0, per_text=1):
        random = np.random.default_rng(seed)
        self.label = np.arange(n) % 2 == 0
        f = random.random((n, features)) * (random.random((n, features)) < 0.3)
        f[:, 0] = self.label + 0.1 * random.random(n)
        example, feature = np.nonzero(f)
        text = np.arange(n) // per_text
        self.f = f
        self.examples = finding._Examples(example, feature, f[example, feature], text, self.label, (f > 0).mean(0))


def auroc_of(label, ranks):
    """As Mann and Whitney count it: sklearn's takes a millisecond, too long for 5,000 of them."""
    positive = int(label.sum())
    beyond = ranks[label].sum() - positive * (positive + 1) / 2
    return beyond / (positive * (len(label) - positive))


def test_p_values_are_those_of_a_rank_test():
    """Of noise they are uniform (the control), of a planted difference as small as permutations can tell."""
    planted = Planted()
    chosen, live = np.ones(60, bool), np.arange(200)
    auroc = finding._auroc(planted.examples, chosen, live)
    p = finding._p_values(planted.examples, live, 999, 0, within_texts=False)
    assert auroc[0] == 1.0 and p[0] <= 1 / 90_000
    noise = np.sort(p[1:])
    # Kolmogorov's distance from uniform stays below 1.63/sqrt(n) in 99 of 100 samples.
    assert np.abs(noise - np.arange(1, 200) / 200).max() < 1.63 / np.sqrt(199)
    random = np.random.default_rng(5)
    for feature in range(1, 6):
        f = planted.f[:, feature]
        ranks = rankdata(f)
        assert auroc_of(planted.label, ranks) == pytest.approx(roc_auc_score(planted.label, f))
        null = np.array([auroc_of(random.permutation(planted.label), ranks) for _ in range(999)])
        by_hand = np.mean(np.abs(null - 0.5) >= abs(auroc[feature] - 0.5) - 1e-12)
        assert p[feature] == pytest.approx(by_hand, abs=0.06)  # standard error of the difference: .022 at most


def test_tokens_of_a_text_are_not_independent():
    """Sixty tokens of six texts: a feature that tells texts apart has no small p, however many tokens say so."""
    random = np.random.default_rng(0)
    text = np.arange(60) // 10
    label = text % 2 == 0
    f = np.where(label, 1.0, 0.5) + 0.01 * random.random(60)
    examples = finding._Examples(np.arange(60), np.zeros(60, int), f, text, label, np.ones(1))
    chosen, live = np.ones(60, bool), np.array([0])
    auroc = finding._auroc(examples, chosen, live)
    p = finding._p_values(examples, live, 999, 0, within_texts=False)
    assert auroc[0] == 1.0 and p[0] == pytest.approx(2 / 20, abs=0.03)  # of the 20 ways to label three of six texts
    within = finding._p_values(examples, live, 999, 0, within_texts=True)
    assert within[0] == 1.0  # within a text all tokens have one label: nothing can be permuted


def test_permuting_within_texts_keeps_each_texts_count():
    label, within = np.array([1, 0, 0, 1, 1, 0, 0, 0], bool), np.array([0, 0, 0, 1, 1, 1, 1, 1])
    drawn = finding._permuted(label, within, 200, np.random.default_rng(0))
    assert (drawn[:, :3].sum(1) == 1).all() and (drawn[:, 3:].sum(1) == 2).all()
    assert np.allclose(drawn.mean(0), [1 / 3] * 3 + [2 / 5] * 5, atol=0.1)


def test_the_held_out_half_is_the_honest_one():
    """The best of many noise features looks good where it was chosen, and is a coin's toss elsewhere."""
    label = np.array([True] * 30 + [False] * 30)
    chosen_auroc, held = [], []
    for seed in range(20):
        random = np.random.default_rng(seed)
        f = random.random((60, 400))
        example, feature = np.nonzero(f)
        examples = finding._Examples(example, feature, f[example, feature], np.arange(60), label, np.ones(400))
        out = finding._held_out_texts(label.tolist(), 0.5, seed)
        assert out[:30].sum() == out[30:].sum() == 15
        live = np.arange(400)
        auroc = finding._auroc(examples, ~out, live)
        chosen_auroc.append(auroc.max())
        held.append(finding._auroc(examples, out, live)[auroc.argmax()])
    assert np.mean(chosen_auroc) > 0.75 and abs(np.mean(held) - 0.5) < 0.06  # 20 means of 15 and 15: s.e. .024


def test_what_it_prints(tiny_lm, sae):
    found = sl.find_features(tiny_lm, sae, SHIPS, CROWS)
    assert found.best == found.to_pandas().feature[0] and len(found.top(3).to_pandas()) == 3
    assert list(found.to_pandas()) == ["feature", "auroc", "held_out", "mean_difference", "density", "p", "q", "label"]
    assert (found.table["q"] >= found.table["p"] - 1e-12).all()
    assert "12 positive and 12 negative texts, pooled by max" in repr(found) and "left out" in repr(found)
    assert "<table" in found._repr_html_()
    assert sae.training is False


def test_features_bear_their_labels(tiny_lm, sae):
    found = sl.find_features(tiny_lm, sae, SHIPS, CROWS, permutations=9)
    sl.notes(sae).write(found.best, "the first side")
    label = sl.find_features(tiny_lm, sae, SHIPS, CROWS, permutations=9).to_pandas().set_index("feature").label
    assert label[found.best] == "the first side" and set(label.drop(found.best)) == {""}


def test_a_feature_of_the_shipped_coder(lm):
    """On the bundled model: what tells weather from cooking is told on texts that it was not chosen on."""
    sae = sl.load("smollm2-135m/resid_post-8")
    rains, winds = ("Heavy", "Light", "Steady", "Cold"), ("strong", "little", "northern")
    weather = [f"{a} rain and {b} wind are expected over the coast tomorrow." for a in rains for b in winds]
    verbs, others = ("Chop", "Fry", "Peel", "Slice"), ("season", "taste", "finish")
    cooking = [f"{a} the onions and {b} the soup with salt before serving it." for a in verbs for b in others]
    found = sl.find_features(lm, sae, weather, cooking, pooling="mean")
    assert found.table["auroc"][0] == 1.0 and found.table["held_out"][0] == 1.0
    assert found.table["p"][0] < 0.01


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((SHIPS, []), {}, "one of them is empty"),
        ((SHIPS, [1, 0]), {}, "a label, or a list of them, for each text: 12 and 2"),
        ((SHIPS, [2] * 12), {}, "a label is 0 or 1"),
        ((SHIPS[:2], [[0, 1], 1]), {"pooling": "token"}, "against must be a list of .*, got a list with"),
        ((SHIPS[:2], [[0, 1], [1]]), {"pooling": "token"}, r"a text has \d+ tokens and 2 labels"),
        ((SHIPS[:2], [[0, 1], [1]]), {}, "labels of tokens need pooling='token'"),
        ((SHIPS[:2], CROWS[:2]), {}, "each class needs two examples among those ranked on, got 1 positive and 1"),
        ((SHIPS, CROWS), {"held_out": 1.0}, "held_out is a share"),
        ((SHIPS, CROWS), {"permutations": 0}, "permutations must be at least 1, got 0"),
    ],
)
def test_refused(args, kwargs, words, tiny_lm, sae):
    with pytest.raises(ValueError, match=words):
        sl.find_features(tiny_lm, sae, *args, **kwargs)


def test_another_width(tiny_lm):
    sae = sl.TopK(20, 64, k=3).eval()
    sae.reads = (SITE,)
    with pytest.raises(ValueError, match="this coder reads width 20 and "):
        sl.find_features(tiny_lm, sae, SHIPS, CROWS)
