"""The feature index and the feature table, against dense recomputation."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import sae_lab as sl
from sae_lab.feature_index import Context, FeatureIndex, build, chunks, cofiring, directions, searching, summaries
from sae_lab.feature_index.index import CHECKED
from sae_lab.feature_index.labels import Labels
from sae_lab.feature_index.searching import stem
from sae_lab.types import Site, TokenMask

SITE = Site("resid_post", 1)
ROWS = 1500


@pytest.fixture(scope="module")
def tiny_module_lm(make_tiny):
    return make_tiny("llama")


@pytest.fixture(scope="module")
def store(tiny_module_lm, small_text, tmp_path_factory):
    """More rows are on disk than are seen, so that the last context is cut."""
    folder = tmp_path_factory.mktemp("index") / "store"
    sl.harvest(tiny_module_lm, [SITE, "mlp_in-1"], small_text, 1900, context=48, path=folder)
    return sl.Store(folder, ROWS, SITE)


@pytest.fixture(scope="module")
def sae(store):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    coder = sl.BatchTopK(48, 96, k=5)
    sl.train(coder, store, sl.TrainConfig(steps=60, batch_size=128, lr=3e-3))
    torch.set_num_threads(before)
    return coder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in place of one; all else is as it is."""
    monkeypatch.setattr(build, "BLOCK", 400)


@pytest.fixture(scope="module")
def index(sae, tiny_module_lm, store, tmp_path_factory):
    """The unbroken index, which no test changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BLOCK", 400)
        return sl.index_features(sae, tiny_module_lm, store, path=tmp_path_factory.mktemp("index") / "index")


@pytest.fixture(scope="module")
def dense(sae, store):
    """All codes, ``rows d_sae``, encoded in one go."""
    with torch.no_grad():
        return sae.encode(store.rows(np.arange(ROWS), SITE.key)).numpy()


def files(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *(t.untyped_storage().nbytes() // 4 for t in made)])
        return out


def close(a, b):
    # Other blocks of rows go through the product together: float32 rounding.
    return np.allclose(a, b, rtol=1e-4, atol=1e-5)


# ---- numbers


def test_statistics_are_the_dense_ones(index, dense):
    assert len(index) == 96 and index.tokens_seen == ROWS and index.site == SITE
    count = (dense > 0).sum(0)
    assert np.array_equal(index.counts, count) and close(index.density, count / ROWS)
    assert close(index.max, dense.max(0)) and close(index.mean, dense.sum(0) / np.maximum(count, 1))
    assert (count > 0).sum() > 20, "there is something to see"


def test_activations_are_the_dense_ones(index, dense):
    for feature in range(96):
        rows, values = index.activations(feature)
        where = np.flatnonzero(dense[:, feature])
        assert np.array_equal(rows, where) and close(values, dense[where, feature])


def test_a_view(index, dense, sae):
    feature = index.best()
    view = index[feature]
    codes = dense[:, feature][dense[:, feature] > 0]
    assert (view.feature, view.d_sae, view.count, view.tokens_seen) == (feature, 96, len(codes), ROWS)
    assert view.density == pytest.approx(len(codes) / ROWS)
    assert view.max == pytest.approx(codes.max(), rel=1e-4) and view.mean == pytest.approx(codes.mean(), rel=1e-4)
    assert view.f_scale == float(sae.f_scale[feature])
    text = str(view)
    assert re.match(rf"feature {feature} \(.+\): fires on ", text)
    assert ("promotes" in text) == (not view.lens_note), "a noisy logit lens is left out"
    assert f"max {view.max:.2f}" in text


def test_histograms_hold_every_activation(index, dense):
    for feature in index.order("density")[::3].tolist():
        h = index[feature].histogram
        assert sum(h["counts"]) == index.counts[feature] and len(h["edges"]) == len(h["counts"]) + 1
        codes = dense[:, feature][dense[:, feature] > 0]
        if len(codes):
            assert h["edges"][0] == 0 and h["edges"][-1] == pytest.approx(codes.max(), rel=1e-4)
            half = sum(c for c, e in zip(h["counts"], h["edges"][1:], strict=True) if e <= h["edges"][20] + 1e-9)
            assert half == pytest.approx((codes < h["edges"][20]).sum(), abs=1)


# ---- contexts


def contexts_of(view):
    return [c for group in view.groups for c in group["contexts"]]


def test_top_contexts(index, dense, store):
    contexts = store.contexts(np.arange(ROWS))
    for feature in index.order("density")[:10]:
        top = index[int(feature)].top
        peaks = [c.values[c.peak] for c in top]
        assert peaks == sorted(peaks, reverse=True) and len(top) <= 12
        assert peaks[0] == pytest.approx(dense[:, feature].max(), rel=1e-4)
        # One activation of each context, nearly always its best; of repeated text only the first is shown.
        best = sorted((dense[contexts == c, feature].max() for c in np.unique(contexts)), reverse=True)
        best = [b for b in best if b > 0]
        assert len({(c.document, c.position - c.peak, tuple(c.tokens)) for c in top}) == len(top)
        assert np.mean([min(abs(p - b) for b in best) < 1e-3 for p in peaks]) >= 0.7
        if len(best) >= 24:
            assert len(top) == 12 and peaks[-1] >= best[23] - 1e-3


def test_no_context_twice(index, store):
    for feature in index.order("density")[:10]:
        shown = contexts_of(index[int(feature)])
        keys = {(c.document, c.position, tuple(c.tokens)) for c in shown}
        assert len(keys) == len(shown)


def test_every_value_of_a_context(index, dense, store, tiny_module_lm):
    """Tokens, values and where there is none, recomputed from the store alone."""
    rows = np.arange(ROWS)
    position, document, context = (
        store.rows(rows, "position").numpy(), store.rows(rows, "document").numpy(), store.contexts(rows)
    )  # fmt: skip
    masked = 0
    for feature in index.order("max")[:12]:
        for c in contexts_of(index[int(feature)]):
            at = [r for r in np.flatnonzero((position == c.position) & (document == c.document))
                  if abs(dense[r, feature] - c.values[c.peak]) < 1e-3]  # fmt: skip
            assert at, "the peak is at its position of its document"
            number = next(n for n in context[at] if labels_match(tiny_module_lm, store.context_ids(int(n)), c))
            ids = store.context_ids(int(number))
            start = c.position - c.peak
            expected = [None] * len(ids)
            for row in np.flatnonzero(context == number):
                expected[position[row]] = dense[row, feature]
            for value, wanted in zip(c.values, expected[start:], strict=False):
                assert (value is None) == (wanted is None)
                assert value is None or value == pytest.approx(wanted, rel=1e-3, abs=1e-3)
                masked += value is None
            assert len(c.tokens) == len(c.values) <= 37 and c.values[c.peak] > 0
            assert f"[{c.tokens[c.peak]}]" in str(c) or "'" in c.tokens[c.peak] or "\\" in repr(c.tokens[c.peak])
    assert masked > 0, "no token was left out, so None was never tried"


def labels_match(lm, ids, c):
    start = c.position - c.peak
    labels = [t.label for t in lm.token_strings(ids[start : start + len(c.tokens)].tolist(), prefixed=start == 0)]
    return labels == c.tokens


def test_a_context_that_the_store_cuts(index, store, dense):
    """Kept tokens behind the last row are not known: None, not 0."""
    number = int(store.contexts(np.array([ROWS - 1]))[0])
    here, positions = store.context_rows(number)
    assert here[-1] >= ROWS, "the store must end within a context"
    feature = int(dense[here[here < ROWS]].max(0).argmax())
    rows, values = index.activations(feature)
    (c,) = index._contexts(here[:1], rows, values)
    start = c.position - c.peak
    unknown = {int(p) for p in positions[here >= ROWS]}
    assert all((c.values[p - start] is None) for p in unknown if 0 <= p - start < len(c.values))
    assert any(v is not None for v in c.values)


def test_quantile_groups(index):
    view = index[int(index.order("density")[0])]
    assert view.groups[0]["label"] == "top"
    labels = [g["label"] for g in view.groups[1:]]
    assert labels == [
        n for n in ("quantile 75-100 %", "quantile 50-75 %", "quantile 25-50 %", "quantile 0-25 %") if n in labels
    ]
    assert len(labels) >= 2
    _, values = index.activations(view.feature)
    for group in view.groups[1:]:
        low, high = (int(n) / 100 for n in group["label"].split()[1].split("-"))
        bounds = np.quantile(values, [low, high], method="nearest")
        assert len(group["contexts"]) <= 4
        for c in group["contexts"]:
            rank = (values < c.values[c.peak] - 1e-4).mean()
            assert low - 1.5 / len(values) <= rank <= high + 1.5 / len(values), (bounds, rank)


def test_a_feature_that_never_fires(tiny_module_lm, store, tmp_path):
    coder = sl.TopK(48, 32, k=3).eval()
    with torch.no_grad():
        coder.b_enc[5] = -1e6
    index = sl.index_features(coder, tiny_module_lm, store, path=tmp_path / "i")
    view = index[5]
    assert view.groups == [] and view.top == [] and sum(view.histogram["counts"]) == 0 and view.max == 0.0
    assert json.loads(json.dumps(view.to_dict(), allow_nan=False))["count"] == 0
    assert index.top_tokens(5) == [] and all(5 not in index.order(by) for by in ("density", "max", "best"))


def naive_choice(values, contexts, leads):
    """Rows to show of one feature, ``values`` by row: one by one, as a reader would."""
    fires = np.flatnonzero(values)
    order = fires[np.argsort(-values[fires], kind="stable")]
    seen, shown = set(), []
    spread = []
    for a, b in ((len(order) * q // 4, len(order) * (q + 1) // 4) for q in range(4)):
        spread.append(order[a:b][np.linspace(0, b - a - 1, min(b - a, 12)).astype(int)] if b > a else [])
    for limit, candidates in [(12, order[:96]), *((4, part) for part in spread)]:
        found = []
        for row in candidates:
            if len(found) < limit and not seen & {("context", contexts[row]), ("lead", leads[row])}:
                seen |= {("context", contexts[row]), ("lead", leads[row])}
                found.append(int(row))
        shown.append(found)
    return shown


@pytest.mark.parametrize("codes", [chunks.CODES, 50])  # all features at once, and few of them or one
def test_summaries_are_the_naive_ones(codes, index, dense, store, monkeypatch):
    monkeypatch.setattr(chunks, "CODES", codes)
    found = summaries.summarise(store, index._offsets, np.asarray(index._rows), np.asarray(index._values))
    rows = np.arange(ROWS)
    token, position, contexts = (
        store.rows(rows, "token").numpy(), store.rows(rows, "position").numpy(), store.contexts(rows)
    )  # fmt: skip
    leads = [tuple(store.context_ids(int(c))[max(0, p - 5) : p + 1]) for c, p in zip(contexts, position, strict=True)]
    for feature in range(96):
        here, values = index.activations(feature)
        along = np.zeros(ROWS)
        along[here] = values
        shown = np.split(found["shown"][feature], [12, 16, 20, 24])
        assert [part[part >= 0].tolist() for part in shown] == naive_choice(along, contexts, leads)
        top = max(float(values.max(initial=0)), 1e-9)
        counts, edges = np.histogram(values, 40, (0, top))
        near_edge = np.isclose(values[:, None], edges, rtol=0, atol=1e-5 * top).any(1).sum()
        assert np.abs(counts - found["histogram"][feature]).sum() <= 2 * near_edge
        strongest = here[np.argsort(-values, kind="stable")[:64]]
        totals = {t: along[strongest[token[strongest] == t]].sum() for t in np.unique(token[strongest])}
        best = found["top_tokens"][feature]
        best = best[best >= 0].tolist()
        assert len(best) == min(8, len(totals)) == len(set(best))
        assert np.allclose([totals[t] for t in best], sorted(totals.values(), reverse=True)[:8], rtol=1e-6)
    assert any(index.counts > 50), "one feature must be more than a chunk"


# ---- firing together


def brute(fires):
    """(Jaccard, counts), ``features features``, the diagonal 0."""
    together = fires.T.astype(int) @ fires.astype(int)
    n = fires.sum(0)
    np.fill_diagonal(together, 0)
    return together / np.maximum(n[:, None] + n - together, 1), together


def check_cofiring(found, fires):
    jaccard, together = brute(fires)
    for i, (ids, both) in enumerate(zip(found["cofiring"], found["cofiring_counts"], strict=True)):
        ids, both = ids[ids >= 0], both[ids >= 0]
        assert len(set(ids)) == len(ids) == min(32, (together[i] > 0).sum())
        assert np.array_equal(both, together[i, ids])
        # Equal ones may come in any order.
        assert np.allclose(jaccard[i, ids], np.sort(jaccard[i])[::-1][: len(ids)], rtol=1e-5)


@pytest.mark.parametrize("budget", [chunks.CHUNK_BYTES, 20_000, 1])
@pytest.mark.parametrize(("table", "apart"), [(cofiring.DENSE_BYTES, 11), (4 * 60 * 2, 2), (0, 0)])
def test_cofiring_is_the_brute_count(budget, table, apart, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", budget)
    monkeypatch.setattr(chunks, "CODES", 700)
    monkeypatch.setattr(cofiring, "DENSE_BYTES", table)
    random = np.random.default_rng(0)
    share = np.where(np.arange(60) < 50, 0.006, 0.1)
    share[[7, 31, 58]], share[[4, 59]] = [1.0, 0.9, 0.6], 0  # on every token and nearly; never
    fires = random.random((2000, 60)) < share
    fires[fires[:, 12], 13] = True  # where 12 fires, 13 does
    rows = np.concatenate([np.flatnonzero(column) for column in fires.T]).astype(np.int32)
    offsets = np.concatenate([[0], fires.sum(0).cumsum()])
    assert len(cofiring._dense(np.diff(offsets), 2000)) == apart
    with Largest() as most:
        found = cofiring.cofiring(offsets, rows, 2000)
    check_cofiring(found, fires)
    if budget == 20_000:  # more than a row or a dense feature takes; all at once would be 22,000 elements and more
        assert most.elements <= budget / 4
    assert found["cofiring"][12, 0] == 13 and (found["cofiring"][[4, 59]] == -1).all()
    first = cofiring.cofiring(offsets, rows, 2000, first=10)
    assert np.array_equal(first["cofiring_counts"], found["cofiring_counts"][:10])


def test_cofiring_of_the_index(index, dense):
    fires = dense > 0
    check_cofiring({name: index._stats[name] for name in ("cofiring", "cofiring_counts")}, fires)
    jaccard, together = brute(fires)
    for feature in index.order("density")[:20].tolist():
        view = index[feature]
        assert len(view.cofiring) == min(32, (together[feature] > 0).sum())
        for other, score, both in view.cofiring:
            assert both == together[feature, other] and score == pytest.approx(jaccard[feature, other])
        other, score, _ = view.cofiring[0]
        assert f"fires with {other} ({score:.2f})" in str(view)
        assert view.to_dict()["cofiring"] == view.cofiring
    dead = np.flatnonzero(index.counts == 0)
    assert all(index[int(f)].cofiring == [] for f in dead)


# ---- directions


def test_the_lens_is_the_models(index, sae, tiny_module_lm):
    feature = index.best()
    logits = tiny_module_lm.lens(sae.W_dec[feature : feature + 1], SITE)[0]
    view = index[feature]
    for side, largest in ((view.promoted, True), (view.suppressed, False)):
        top = logits.topk(10, largest=largest)
        assert [t for t, _ in side] == [tiny_module_lm.token_strings([int(i)])[0].label for i in top.indices]
        assert np.allclose([v for _, v in side], top.values.detach(), atol=1e-3)


def test_no_lens_where_nothing_is_written(tiny_module_lm, store, tmp_path):
    other = sl.Store(store.path, ROWS, "mlp_in-1")
    coder = sl.TopK(48, 32, k=3).eval()
    view = sl.index_features(coder, tiny_module_lm, other, path=tmp_path / "i")[0]
    assert view.promoted == view.suppressed == []
    assert view.lens_note == "no logit lens: Site('mlp_in', layer=1) is not written to the residual stream"


def test_neighbours_are_the_nearest_rows(index, sae):
    rows = F.normalize(sae.W_dec.detach(), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-2)
    for feature in (0, 41, 95):
        values, ids = zip(*reversed(sorted((float(v), i) for i, v in enumerate(cosines[feature]))[-8:]), strict=True)
        found = index[feature].neighbours
        assert [n for n, _ in found] == list(ids) and np.allclose([c for _, c in found], values, atol=1e-5)


# ---- finding


def test_order(index):
    for by in ("density", "max"):
        order, values = index.order(by), getattr(index, by)
        assert (np.diff(values[order]) <= 0).all() and set(order) == set(np.flatnonzero(index.counts))
    assert set(index.order("best")) == set(index.order("max"))
    with pytest.raises(ValueError, match="order by one of density, max, norm, best, got 'beauty'"):
        index.order("beauty")


def test_best(index):
    assert index.best() == index.best(5)[0] == index.order("best")[0] and len(index.best(5)) == 5
    assert index.counts[index.best()] > 0


@pytest.fixture
def token(store):
    return store.rows(np.arange(ROWS), "token").numpy()


def test_a_word_is_searched_as_a_dense_scan_does(index, dense, token, tiny_module_lm):
    """recall, share and relevance, from all codes on the tokens of the word."""
    labels = [(t, index.token_labels([t])[0]) for t in set(token.tolist())]
    words = {t: w.strip().lower() for t, w in labels if w[:1] == " " and w[1:].isalpha()}
    common = sorted(words, key=lambda t: -(token == t).sum())[5:9]
    for word in (words[t] for t in common):
        rows, whole = index._places.of(word)
        assert whole and len(rows)
        recall = (dense[rows] > 0).mean(0)
        share = dense[rows].sum(0) / np.maximum(dense.sum(0), 1e-9)
        found = index.search(word.upper(), limit=96)
        assert set(found.features) == set(np.flatnonzero(recall * share))
        table = found.to_pandas().set_index("feature")
        assert np.allclose(table.recall, recall[table.index])
        assert np.allclose(table.share, share[table.index], atol=1e-3)
        assert np.allclose(table.relevance, table.recall * table.share**0.25)
        assert table.relevance.is_monotonic_decreasing
        assert f"words: {word} ({len(rows)} in the store)" in found.searched and found.best == found.features[0]
        assert index.search(word, limit=1).features == [found.best]
        assert found.table["tokens"][0].split() == " ".join(index.top_tokens(found.best)).split()


def test_words_are_searched_as_one(index, dense):
    rows = [index._places.of(word)[0] for word in ("the", "and")]
    found = index.search("the and", limit=96).to_pandas().set_index("feature")
    recall = np.mean([(dense[r] > 0).mean(0) for r in rows], 0)
    share = dense[np.concatenate(rows)].sum(0) / np.maximum(dense.sum(0), 1e-9)
    assert np.allclose(found.recall, recall[found.index]) and np.allclose(found.share, share[found.index], atol=1e-3)


def test_of_a_frequent_word_some_occurrences_are_looked_at(index, monkeypatch):
    every = index.search("the", limit=96).to_pandas().set_index("feature")
    rows = len(index._places.of("the")[0])
    monkeypatch.setattr(searching, "LOOKED_AT", rows // 2)
    some = index.search("the", limit=96).to_pandas().set_index("feature")
    shared = every.index.intersection(some.index)[:5]
    for name in ("recall", "share"):
        assert 0 < (every[name] - some[name])[shared].abs().max() < 0.2


def test_where_a_word_stands(tiny_module_lm, index, token):
    """Whole words, also of several tokens; not the parts of longer ones. Else tokens that hold the letters."""
    texts = index.token_labels(token)
    text = "".join(texts)
    spans = np.cumsum([len(t) for t in texts])
    for word in ("the", "river", "ship", "ships", "she"):
        wanted = {stem(word), stem(word) + "s"}
        ends = [m.end() for m in re.finditer(r"[^\W_]+", text) if m[0].lower() in wanted]
        rows, whole = index._places.of(word)
        if whole:
            assert set(rows) <= set(np.searchsorted(spans, ends)), word  # words may end at gaps of the store, too
    rows, whole = index._places.of("tio")
    assert not whole and all("tio" in texts[r].lower() for r in rows)
    assert index._places.of("xyzzyx")[0].size == 0


def test_a_search_that_finds_nothing(index):
    found = index.search("xyzzyx")
    assert found.features == [] and "0 features" in repr(found) and "xyzzyx (0 in the store" in found.searched
    with pytest.raises(ValueError, match=r"no feature was found for words: xyzzyx .*: look for another word"):
        found.best  # noqa: B018
    assert index.search("   ").searched == "all live features"
    assert index.search("", limit=96).features == index.order("best").tolist()


def test_conditions_hold_for_words_too(index):
    plain, limit = index.search("the", limit=96).features, float(np.median(index.density))
    kept = index.search(f"the density<{limit}", limit=96)
    assert kept.features == [i for i in plain if index.density[i] < limit] and 0 < len(kept.features) < len(plain)
    assert f"; density < {limit:g}" in kept.searched


def test_what_you_named_so_comes_first(index, sae, store, tiny_module_lm):
    own = sl.index_features(sae, tiny_module_lm, store, path=index.path)  # its notes are this test's
    last = own.search("the", limit=96).features[-1]
    own.annotate(last, "The Article")
    found = own.search("the", limit=96)
    assert found.best == last and found.table["label"][0] == "The Article"
    assert own.search("label:article").features == [last]


def test_a_sentence_is_the_dense_codes_of_one_pass(index, sae, tiny_module_lm):
    text = "The ship went down the river at dawn"
    with torch.no_grad():
        codes = sae.encode(tiny_module_lm.read(text, SITE)[SITE][0, 1:]).numpy()
    found = index.search(text, limit=96)
    usual = index.density * index.mean
    assert set(found.features) == set(np.flatnonzero(codes.mean(0) > usual))
    assert f"sentence: {text}" in found.searched
    table = found.to_pandas().set_index("feature")
    relevance = (codes.mean(0) - usual) * -np.log(index.density)
    assert np.allclose(table.relevance, relevance[table.index], atol=1e-4) and table.relevance.is_monotonic_decreasing
    assert np.allclose(table.times, (codes.mean(0) / usual)[table.index], rtol=1e-3)
    assert np.allclose(table.peak, codes.max(0)[table.index], atol=1e-4)
    labels = [t.label for t in tiny_module_lm.tokens(text)][1:]
    assert [t for t in table.token] == [labels[i] for i in codes.argmax(0)[table.index]]
    assert index.search(f'"{text}"', limit=96).features == found.features


ODD = {
    "nothing": "", "spaces": " \t\n ", "signs": "?!…—", "hidden": "\x00\u202e\u200b", "a quotation mark": '"',
    "both": '""', "another": "“", "not closed": '"the army', "closed first": 'army" the', "many quotes": '"' * 99,
    "long": "x" * 400, "emoji": "👨‍👩‍👧‍👦" * 9, "label": "label:", "half a label": 'label:"', "half": "max>",
    "sizes": "> 5 <", "a pattern": "[a-z]+(*", "backslash": "\\", "percent": "%", "braces": "{0} %s {x}",
    "right to left": "שלום", "two of a kind": "max>0 max<0", "infinite": "max<inf", "a number": "1e999",
}  # fmt: skip


@pytest.mark.parametrize("line", ODD.values(), ids=ODD.keys())
def test_whatever_is_typed_finds_features_or_none(index, line):
    found = index.search(line, limit=5)
    assert set(found.features) <= set(range(96)) and len(found.features) <= 5
    for shown in (repr(found), found._repr_html_()):
        assert "\x00" not in shown and "\u202e" not in shown and len(shown) < 5_000


@pytest.mark.parametrize(
    ("asked", "words"),
    [("max>NaN", "max is compared with a number, got 'NaN'"), ("the densty>1%", "got 'densty'; did you mean density"),
     ("word " * 10_000, "tokens and this model reads at most"), ("x" * 10_000, "this model reads at most"),
     (7, "what must be"), (None, "what must be"),
     (float("nan"), "what must be"), ([], "a list of 0 texts needs others"), ("\ud800", "half a surrogate pair"),
     ('"\ud800 and so on"', "half a surrogate pair")],
)  # fmt: skip
def test_what_no_search_can_mean_is_refused_in_a_sentence(index, asked, words):
    with pytest.raises(ValueError, match=words):
        index.search(asked)


def test_examples_are_what_find_features_says(index, sae, tiny_module_lm):
    ships, crows = [f"The ship number {i} sailed" for i in range(6)], [f"A crow of {i} sat there" for i in range(6)]
    found = index.search(ships, against=crows, limit=5)
    plain = sl.find_features(tiny_module_lm, sae, ships, crows)
    assert found.features == plain.features[:5] and np.array_equal(found.table["held_out"], plain.table["held_out"][:5])
    assert "6 positive and 6 negative texts, pooled by max" in found.searched and "tokens" in found.table
    with pytest.raises(ValueError, match=r"a list of 6 texts needs others beside it: index.search\(texts, against="):
        index.search(ships)


def test_without_the_coder_words_are_found_and_sentences_refused(index, store, tiny_module_lm):
    bare = FeatureIndex(index.path, store, tiny_module_lm)
    assert bare.search("the").features == index.search("the").features
    for ask in (lambda: bare.search("one two three four"), lambda: bare.search(["a"], against=["b"])):
        with pytest.raises(ValueError, match=r"a search by .* needs the coder: open the index by sl\.index_features"):
            ask()


def test_labels_are_the_models(index, tiny_module_lm, store):
    labels = index._labels
    for i in range(0, len(tiny_module_lm.tokenizer), 7):  # all of them take a minute and a half
        assert labels[i] == tiny_module_lm.token_strings([i])[0].label
    for number in range(10):
        ids = store.context_ids(number).tolist()
        for start in (0, 3):
            part = ids[start : start + 30]
            wanted = [t.label for t in tiny_module_lm.token_strings(part, prefixed=start == 0)]
            assert labels.of(part, prefixed=start == 0) == wanted


def test_labels_of_the_bundled_model():
    lm = sl.LM()
    labels = Labels.decode(lm)
    texts = ["Zürich – naïve “quotes” …", "日本語のテキスト と English", "🙂🙃 ok", "tabs\tand\n\nlines", "x²+y³"]
    for text in texts:
        ids = lm.tokenizer(text)["input_ids"]
        for part in (ids, ids[1:], [lm.prefix_id, *ids]):
            prefixed = part[0] == lm.prefix_id
            assert labels.of(part, prefixed) == [t.label for t in lm.token_strings(part, prefixed)]


def test_out_of_range(index):
    for feature in (-1, 96, True):
        for call in (index.__getitem__, index.activations, index.top_tokens):
            with pytest.raises(ValueError, match=rf"feature must be .*(0 to 95|whole number), got {feature}"):
                call(feature)


# ---- on disk


def test_opened_again_without_work(index, sae, tiny_module_lm, store, monkeypatch):
    before, times = files(index.path), {f.name: f.stat().st_mtime_ns for f in index.path.iterdir()}
    assert set(before) == {"index.json", "stats.safetensors", *CHECKED}, "nothing is left over"
    monkeypatch.setattr(sae, "sparse_codes", lambda *_: pytest.fail("it encodes again"))
    again = sl.index_features(sae, tiny_module_lm, store, path=index.path)
    assert {f.name: f.stat().st_mtime_ns for f in index.path.iterdir()} == times
    assert again[again.best()] == index[index.best()]
    assert repr(again) == repr(index) and f"FeatureIndex(96 features, {(index.counts > 0).sum()} live on 1,500" in repr(
        index
    )


def test_size_on_disk(index):
    size = sum(f.stat().st_size for f in index.path.iterdir())
    assert index.bytes == size and repr(index).endswith(f", {size / 1e6:.1f} MB)")


def test_an_index_of_an_older_version_is_made_anew(index, sae, tiny_module_lm, store, tmp_path):
    path = tmp_path / "i"
    shutil.copytree(index.path, path)
    facts = json.loads((path / "index.json").read_text()) | {"version": 1}
    del facts["checksum"]
    (path / "index.json").write_text(json.dumps(facts))
    (path / "labels.json").unlink()
    assert files(sl.index_features(sae, tiny_module_lm, store, path=path).path) == files(index.path)


def test_memory_is_bounded_in_chunks(index, sae, tiny_module_lm, store, tmp_path, monkeypatch):
    """With a small budget no tensor is larger, and the numbers are the same."""
    vocab, d_sae = tiny_module_lm.lens(sae.W_dec[:1], SITE).shape[1], 96
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * 10 * vocab)
    monkeypatch.setattr(build, "PRE_BYTES", 4 * 30 * d_sae)
    rows = []
    real = sae.sparse_codes
    monkeypatch.setattr(sae, "sparse_codes", lambda x: (rows.append(len(x)), real(x))[1])
    with Largest() as lens:
        found = directions.lens(sae, tiny_module_lm, SITE)
    assert lens.elements <= max(10 * vocab, directions.RANDOM * 48, 48 * vocab)  # the control; W_U
    assert close(found["lens_kurtosis"], index._stats["lens_kurtosis"])
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * 10 * d_sae)
    with Largest() as near:
        cosines = directions.neighbours(sae)["cosines"]
    assert near.elements <= max(10 * d_sae, sae.W_dec.numel()) and close(cosines, index._stats["cosines"])
    again = sl.index_features(sae, tiny_module_lm, store, path=tmp_path / "i")
    assert max(rows) == 30 and sum(rows) == ROWS and sae.scratch is None
    for name in ("counts", "mean", "max"):
        assert close(getattr(again, name), getattr(index, name))
    assert np.array_equal(again._stats["shown"], index._stats["shown"])


def test_a_dense_family_in_parts(tiny_module_lm, store, tmp_path, monkeypatch):
    """Its codes are no view of the buffer that the next part is written to."""
    monkeypatch.setattr(build, "PRE_BYTES", 4 * 30 * 40)
    coder = sl.L1(48, 40).eval()
    f = coder.encode(store.rows(np.arange(ROWS), SITE.key)).detach().numpy()
    index = sl.index_features(coder, tiny_module_lm, store, path=tmp_path / "i")
    check_cofiring({name: index._stats[name] for name in ("cofiring", "cofiring_counts")}, f > 0)
    for feature in range(0, 40, 7):
        rows, values = index.activations(feature)
        assert np.array_equal(rows, np.flatnonzero(f[:, feature])) and close(values, f[rows, feature])


def test_in_the_cache_without_a_path(sae, tiny_module_lm, store, cache_folder):
    index = sl.index_features(sae, tiny_module_lm, store)
    assert index.path.parent == cache_folder / "indexes" and isinstance(index, FeatureIndex)
    assert any(e.kind == "indexes" and e.path == index.path for e in sl.cache.list())
    assert sl.index_features(sae, tiny_module_lm, store).path == index.path
    assert sl.index_features(sae, tiny_module_lm, sl.Store(store.path, 700, SITE)).path != index.path


def test_it_leaves_the_coder_as_it_was(sae, tiny_module_lm, store, dense, tmp_path):
    sae.train()
    try:
        index = sl.index_features(sae, tiny_module_lm, store, path=tmp_path / "i")
        assert sae.training and np.array_equal(index.counts, (dense > 0).sum(0)), "codes in eval mode"
    finally:
        sae.eval()


@pytest.mark.parametrize("where", ["block 0", "block 2", "lens", "cofiring", "place"])
def test_interrupted_and_called_again(where, index, sae, tiny_module_lm, store, tmp_path, monkeypatch):
    calls = []

    def interrupt(module, name, after=0):
        real = getattr(module, name)

        def call(*args):
            calls.append(name)
            if len(calls) > after:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(module, name, call)

    if where.startswith("block"):
        interrupt(sae, "sparse_codes", int(where[-1]))
    else:
        interrupt(build, "_place" if where == "place" else where)
    path = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        sl.index_features(sae, tiny_module_lm, store, path=path)
    monkeypatch.undo()
    monkeypatch.setattr(build, "BLOCK", 400)
    real, blocks = sae.sparse_codes, []
    monkeypatch.setattr(sae, "sparse_codes", lambda x: (blocks.append(1), real(x))[1])
    sl.index_features(sae, tiny_module_lm, store, path=path)
    assert len(blocks) == {"block 0": 4, "block 2": 2}.get(where, 0), "whole blocks are not made again"
    assert files(path) == files(index.path)


KILLED = """
import sys, time, torch
import sae_lab as sl
from sae_lab.feature_index import build
torch.set_num_threads(1)
model, coder, store, path = sys.argv[1:]
build.BLOCK = 400
sae = sl.load(coder)
encode = sae.sparse_codes
sae.sparse_codes = lambda x: (time.sleep(0.3), encode(x))[1]  # time to be killed in
sl.index_features(sae, sl.LM(model), sl.Store(store, 1500, "layers.1"), path=path)
"""


def test_killed_and_called_again(index, sae, tiny_module_lm, store, tmp_path):
    tiny_module_lm._module.save_pretrained(tmp_path / "model")
    tiny_module_lm.tokenizer.save_pretrained(tmp_path / "model")
    sae.save(tmp_path / "coder")
    path = tmp_path / "killed"
    arguments = [str(p) for p in (tmp_path / "model", tmp_path / "coder", store.path, path)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while len(list(path.glob("block-*"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must have been running"
    assert not (path / "index.json").exists()
    half = path / ".block-000003.safetensors.abc.tmp" / "block-000003.safetensors"  # what a kill in mid-write leaves
    half.parent.mkdir()
    half.write_bytes(b"half")
    (path / "block-000001.safetensors").write_bytes(b"half")  # and a disk that lost power
    sl.index_features(sae, tiny_module_lm, store, path=path)
    assert files(path) == files(index.path)


# ---- refused


def test_another_model_site_or_coder(sae, tiny_module_lm, make_tiny, store, index):
    with pytest.raises(
        ValueError, match=r"was harvested from LlamaForCausalLM \(weights .*has other weights: index with"
    ):
        sl.index_features(sae, make_tiny("llama", seed=3), store)
    with pytest.raises(
        ValueError, match=r"trained at Site\('resid_post', layer=1\), the store holds Site\('mlp_in', layer=1\)"
    ):
        sl.index_features(sae, tiny_module_lm, store.at("mlp_in-1"))
    with pytest.raises(ValueError, match=r"several sites .*choose with store.at\(site\)"):
        sl.index_features(sae, tiny_module_lm, sl.Store(store.path, ROWS))
    with pytest.raises(ValueError, match="the coder reads d_in=20, the store holds width 48: wrong site or coder"):
        sl.index_features(sl.TopK(20, 30, k=2), tiny_module_lm, store)
    before = files(index.path)
    with pytest.raises(
        ValueError, match=r"holds another index; it differs in coder: .* there, .* now: pass another path="
    ):
        sl.index_features(sl.TopK(48, 96, k=2), tiny_module_lm, store, path=index.path)
    assert files(index.path) == before


def test_no_permission(sae, tiny_module_lm, store, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write to the folder .*: pass path= to a folder you own"):
        sl.index_features(sae, tiny_module_lm, store, path=tmp_path / "file" / "below")


@pytest.mark.parametrize("name", ["index.json", "building.json"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95", b"[]"])
def test_hostile_index(name, content, sae, tiny_module_lm, store, tmp_path):
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is no index of sae_lab .*: index again with .*rebuild=True"):
        sl.index_features(sae, tiny_module_lm, store, path=tmp_path / "i")


# ---- in the panel


def test_to_dict_is_plain(index):
    for feature in range(0, 96, 5):
        view = index[feature].to_dict()
        assert json.loads(json.dumps(view, allow_nan=False))["feature"] == feature
    assert isinstance(view["groups"], list) and all(isinstance(g["contexts"], list) for g in view["groups"])


def test_the_inspector_opens_it(index):
    panel = sl.FeatureInspector(index)
    assert panel.feature == index.best() and panel.view["count"] == index.counts[panel.feature] > 0
    other = int(index.order("density")[3])
    panel.feature = other
    assert (
        panel.view["feature"] == other
        and panel.view["groups"][0]["contexts"][0]["tokens"] == index[other].top[0].tokens
    )
    panel.query = index.top_tokens(other)[0]
    assert panel.results and {"feature", "density", "max", "tokens"} <= set(panel.results[0])
    with pytest.raises(ValueError, match="feature must be an int from 0 to 95, got 96"):
        panel.feature = 96


# ---- the table of a prompt

TEXTS = ["The ship <b>went</b> down & under", "A fox ran home at dawn"]


@pytest.fixture
def table(tiny_module_lm, sae):
    return sl.features(tiny_module_lm, sae, TEXTS)


def test_the_table_is_encode_at_each_token(table, tiny_module_lm, sae):
    reading = tiny_module_lm.read(TEXTS, SITE)
    f = sae.encode(reading[SITE]).detach()
    keep = sae.mask.keep(reading.ids, reading.batch.positions, {SITE: reading[SITE]}) & reading.mask
    f[~keep] = 0
    found = torch.zeros_like(f)
    found[table.prompt, table.position, table.feature] = table.value
    assert torch.equal(found > 0, f > 0) and torch.allclose(found, f, rtol=1e-4, atol=1e-5)
    assert table.left_out == {(b, p) for b, p in (~keep & reading.mask).nonzero().tolist()} >= {(0, 0), (1, 0)}
    assert ["".join(row[1:]) for row in table.tokens] == TEXTS


def test_strongest_first(table):
    key = list(zip(table.prompt.tolist(), table.position.tolist(), (-table.value).tolist(), strict=True))
    assert key == sorted(key)


def test_top(table):
    top = table.top(2)
    whole, cut = table.to_pandas(), top.to_pandas()
    expected = whole.sort_values("value", ascending=False).groupby(["prompt", "position"]).head(2).sort_index()
    assert cut.equals(expected.reset_index(drop=True)) and len(cut) < len(whole)
    assert table.top(10**6).to_pandas().equals(whole)
    with pytest.raises(ValueError, match="top needs n >= 1, got 0"):
        table.top(0)


def test_to_pandas(table):
    df = table.to_pandas()
    assert list(df) == ["prompt", "position", "token", "feature", "name", "value"] and len(df) == len(table.value)
    row = df.iloc[0]
    assert row["token"] == table.tokens[row["prompt"]][row["position"]].label


def test_it_prints(table):
    text, html = repr(table.top(1)), table._repr_html_()
    assert len(text.splitlines()) == 1 + sum(len(row) for row in table.tokens) and "left out" in text
    feature, value = int(table.feature[0]), float(table.value[0])
    written = re.compile(rf"{feature}( \S.*?)? \({value:.1f}\)")  # with a name, where another test has an index open
    assert written.search(text) and written.search(html)
    assert "&lt;" in html and "&amp;" in html and "<b>" not in html


def test_the_table_takes_codes_in_eval_mode(tiny_module_lm, sae, table):
    sae.train()
    try:
        again = sl.features(tiny_module_lm, sae, TEXTS)
        assert sae.training and torch.equal(again.value, table.value)
    finally:
        sae.eval()


def test_nothing_to_show(tiny_module_lm, sae, table):
    quiet = sl.TopK(48, 30, k=2).eval()
    quiet.reads = (SITE,)
    quiet.meta = {"mask": TokenMask((), True, {SITE.key: 0.0}).to_dict()}
    empty = sl.features(tiny_module_lm, quiet, TEXTS)
    assert len(empty.value) == 0 and len(empty.top(3).value) == 0 and empty.to_pandas().empty
    assert repr(empty).count("left out") == sum(len(row) for row in empty.tokens)


def test_a_coder_of_another_width(tiny_module_lm):
    coder = sl.TopK(20, 30, k=2).eval()
    coder.reads = (SITE,)
    with pytest.raises(ValueError, match=r"this coder reads width 20 and LM\(.*\) has width 48 at "):
        sl.features(tiny_module_lm, coder, TEXTS)


def test_a_loaded_coder_needs_no_index(tiny_module_lm, sae, table, tmp_path):
    loaded = sl.load(sae.save(tmp_path / "coder"))
    assert torch.equal(sl.features(tiny_module_lm, loaded, TEXTS).value, table.value)


def test_contexts_print_their_peak():
    c = Context([" a", " b", " c"], [0.0, 2.5, None], 1, 0, 7)
    assert str(c) == "    2.50  ' a[ b] c'"
