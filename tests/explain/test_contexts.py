"""Passages: whose documents, which activations, silent ones that are silent."""

import numpy as np
import pytest

import sae_lab as sl
from sae_lab.explain.contexts import LENGTH, Corpus
from sae_lab.feature_index import index_features


def test_no_document_is_explained_from_and_judged_on(token_index):
    corpus = Corpus(token_index, seed=3)
    explained, judged = set(), set()
    for feature in range(12):
        explained |= {p.document for p in corpus.passages(feature, "explain", 50, 50).all}
        judged |= {p.document for p in corpus.passages(feature, "judge", 50, 50).all}
    assert explained and judged and not explained & judged
    assert len(explained) > len(judged) > 1


def test_values_are_the_activations_and_silent_is_silent(token_index, token_words):
    corpus = Corpus(token_index)
    for feature in (0, 3, 7):
        passages = corpus.passages(feature, "explain", 20, 21)
        assert passages.firing and len(passages.silent) == 21
        for p in passages.firing:
            assert p.kind == "fires" and p.tokens[p.anchor] == token_words[feature] and p.fires[p.anchor]
        for p in passages.all:
            assert len(p.tokens) == len(p.values) <= LENGTH
            same = np.array([t == token_words[feature] for t in p.tokens])
            assert np.array_equal(p.fires, same & p.known)
        assert not any(p.fires.any() for p in passages.silent)
        anchored = [float(p.values[p.anchor]) for p in passages.firing]
        assert anchored == sorted(anchored, reverse=True)


def test_kinds_of_silent_passages(make_tiny, small_text, tmp_path):
    """A trained coder: tokens on which a feature is silent elsewhere, and features that fire together, exist."""
    lm = make_tiny("llama")
    store = sl.harvest(lm, sl.Site("resid_post", 1), small_text, 3000, context=64, path=tmp_path / "store")
    coder = sl.TopK(48, 96, k=4)
    sl.train(coder, store, sl.TrainConfig(steps=60, batch_size=128, lr=3e-3))
    index = index_features(coder, lm, store, path=tmp_path / "index")
    corpus, found = Corpus(index), {}
    for feature in index.order("density")[20:40].tolist():
        rows, _ = index.activations(feature)
        tokens = set(store.rows(rows.astype(np.int64), "token").tolist())
        labels = {t for i in tokens for t in index.token_labels([0, i])[1:]}
        for p in corpus.passages(feature, "judge", 9, 9).silent:
            found[p.kind] = found.get(p.kind, 0) + 1
            assert not p.fires.any()
            assert p.kind != "same token" or p.tokens[p.anchor] in labels or p.anchor == 0
    assert set(found) == {"same token", "co-firing", "random"} and min(found.values()) > 5


def test_all_quantiles_are_judged(token_index):
    """Firing passages of a feature with many activations come from each fifth of them."""
    passages = Corpus(token_index).passages(0, "judge", 10, 1)
    counts = np.bincount([p.quantile for p in passages.firing], minlength=5)
    # Embeddings give one activation for all tokens: quantiles then go by row, and contexts are not taken twice.
    assert (counts > 0).sum() >= 3 and counts.max() <= 2


def test_the_same_seed_the_same_passages(token_index):
    first, again, other = (Corpus(token_index, seed).passages(2, "judge", 5, 5) for seed in (0, 0, 1))
    assert [p.text for p in first.all] == [p.text for p in again.all] != [p.text for p in other.all]


def test_what_is_refused(token_index, token_store, token_coder, tmp_path):
    corpus = Corpus(token_index)
    with pytest.raises(ValueError, match='"explain" and "judge", got \'train\''):
        corpus.passages(0, "train", 1, 1)
    with pytest.raises(ValueError, match="feature must be an int from 0 to 12, got 13"):
        corpus.passages(13, "judge", 1, 1)
    lm, _ = token_store
    one = sl.harvest(lm, sl.Site("embed"), [sl.load_text()[0][:3000]], 300, context=64, path=tmp_path / "one")
    index = index_features(token_coder[0], lm, one, path=tmp_path / "index")
    with pytest.raises(ValueError, match="a single document, harvest from a text of several"):
        Corpus(index)


def test_a_dead_feature_has_no_passages(token_index):
    passages = Corpus(token_index).passages(12, "judge", 5, 5)
    assert passages.firing == [] and len(passages.silent) == 5 and passages.largest == 0
