"""probing: labelled texts, pooling and selection by hand; chance where there is nothing; degenerate coders."""

import importlib.util

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.evals import probe_sets as sets
from sae_lab.evals.probe_sets import ProbeSet, ReadSet, as_probe_sets, read_probe_sets
from sae_lab.evals.probes import pipeline, pooled, probing, ranked, split
from sae_lab.types import TokenMask

SITE = sl.Site("resid_post", layer=0)
installed = pytest.mark.skipif(importlib.util.find_spec("sae_probes") is None, reason="needs sae-probes")


def two_kinds(n=60, seed=0):
    """Texts of two vocabularies, and what they are."""
    draw = np.random.default_rng(seed)
    words = [["river", "mountain", "forest", "valley", "stone"], ["market", "price", "trade", "money", "bank"]]
    labels = np.arange(n) % 2
    return [" ".join(draw.choice(words[label], 6)) + f" {i}" for i, label in enumerate(labels)], labels


def on(coder, site=SITE):
    coder.reads = coder.writes = (site,)
    return coder.eval()


# ---- texts


def test_labels_of_any_kind():
    assert ProbeSet.of("a", ["x", "y"], [0, 1]).labels.tolist() == [False, True]
    several = ProbeSet.of("a", list("uvwxyz"), ["p", "q", "q", "r", "q", "p"])
    assert several.positive == "q" and several.labels.sum() == 3  # the commonest against the rest
    with pytest.raises(ValueError, match=r"a: a probe tells two classes apart, got 1: \['1'\]"):
        ProbeSet.of("a", ["x", "y"], [1, 1])
    with pytest.raises(ValueError, match="a: labels must be at most 50 classes, got 60 values"):
        ProbeSet.of("a", ["x"] * 60, range(60))
    with pytest.raises(ValueError, match="every text needs a label, got 1 text and 2 labels"):
        ProbeSet.of("a", ["x"], [0, 1])


def test_balanced_and_the_same_again():
    made = ProbeSet.of("a", [f"{i // 2}" for i in range(100)], np.arange(100) < 80)
    chosen = made.balanced(16)
    assert len(chosen.texts) == 16 == len(set(chosen.texts)) and chosen.labels.sum() == 8
    assert chosen.texts == made.balanced(16).texts != made.balanced(16, seed=1).texts
    assert made.balanced(1000).labels.sum() == 10 and len(made.balanced(1000).texts) == 20  # ten texts of the rarer


def test_forms_of_data():
    texts, labels = two_kinds(8)
    assert as_probe_sets((texts, labels))[0].name == "texts"
    assert [one.name for one in as_probe_sets({"p": (texts, labels), "q": (texts, labels)})] == ["p", "q"]
    with pytest.raises(ValueError, match="data must be names of probe sets, a pair"):
        as_probe_sets([1, 2, 3])


@installed
def test_the_installed_sets():
    names = sets.available_sets()
    assert len(names) > 100 and not {sets._number(n) for n in names} & set(sets.SKIPPED)
    assert set(sets.DEFAULT_SETS) <= set(names)
    made = sets.probe_set("97_news_class").balanced(20)
    assert made.positive in ("Entertainment", "Politics", "Sport", "Technology") and made.labels.mean() == 0.5
    with pytest.raises(ValueError, match="no probe set 'sst2'; near it: 92_glue_sst2"):
        sets.probe_set("sst2")
    with pytest.raises(ValueError, match="11_us_lat: labels must be at most 50 classes"):
        sets.probe_set("11_us_lat")


def test_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: pip install --no-deps sae-probes"):
        as_probe_sets()


# ---- by hand


def test_pooling_by_hand():
    # Two texts of two and three tokens, and one whose only token the mask leaves out.
    x = torch.tensor([[1.0, 0], [3, 0], [0, 2], [0, -4], [4, 4], [9, 9]])
    one = ReadSet(
        "a", np.array([True, False, True]), x, torch.arange(6), torch.ones(6).long(), torch.tensor([0, 2, 5, 6])
    )
    coder = sl.L1(2, 3).eval()
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        coder.W_dec.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 1]]))  # of norm 1, so that strengths are codes
    mask = TokenMask(special_ids=(5,))
    means, codes, labels, keep = pooled(coder, one, SITE, mask, "mean")
    assert means.tolist() == [[2, 0], [pytest.approx(4 / 3), pytest.approx(2 / 3)]]
    assert codes.tolist() == [[2, 0], [pytest.approx(4 / 3), pytest.approx(2)]]  # −4 is no code; feature 2 never fires
    assert labels.tolist() == [True, False] and keep.tolist() == [True] * 5 + [False]
    assert pooled(coder, one, SITE, mask, "max")[0].tolist() == [[3, 0], [4, 4]]
    assert pooled(coder, one, SITE, mask, "max")[1].tolist() == [[3, 0], [4, 4]]
    assert pooled(coder, one, SITE, mask, "last")[0].tolist() == [[3, 0], [4, 4]]
    x[4] = 1
    assert pooled(coder, one, SITE, mask, "last")[1].tolist() == [[3, 0], [1, 1]]


def test_ranking_by_hand():
    labels = np.array([True, True, False, False])
    inputs = np.array([[10.0, 1, 5, 0], [2, 1, 5, 0], [0, 0, 5, 1], [0, 0, 5, 0]])
    assert ranked(inputs, labels).tolist() == [1, 0, 3, 2]  # gaps 6, 1, 0, .5 over deviations 4.1, .5, 0, .43
    assert ranked(inputs, labels, scaled=False).tolist() == [0, 1, 3, 2]


def test_split_is_balanced_and_disjoint():
    labels = np.arange(50) < 30
    parts = split(labels, [0])
    assert [len(p) for p in parts] == [24, 8, 8] and len(set(np.concatenate(parts))) == 40
    assert all(labels[p].mean() == 0.5 for p in parts)


def test_selection_never_sees_the_test_texts():
    draw = np.random.default_rng(0)
    labels = draw.permutation(np.arange(100) % 2 == 0)
    codes = draw.random((100, 5))
    train, _, test = split(labels, [3])
    codes[test, 4] = labels[test]  # a feature that knows the test texts, and only these
    codes[train, 2] += labels[train]
    for convention in ("sae_lab", "saebench"):
        found = pipeline(codes, codes, labels, (1,), convention, [3])
        assert found["features", "1"].accuracy < 0.8  # with feature 4 it would be 1


def test_noise_is_at_chance():
    draw = np.random.default_rng(0)
    scores = []
    for run in range(15):
        x, codes = draw.standard_normal((60, 20)), draw.random((60, 30)) * (draw.random((60, 30)) < 0.2)
        labels = draw.permutation(np.arange(60) % 2 == 0)
        scores.append([fit.accuracy for fit in pipeline(x, codes, labels, (1, 3), "sae_lab", [run]).values()])
    means, errors = np.mean(scores, 0), np.std(scores, 0, ddof=1) / 15**0.5
    assert (np.abs(means - 0.5) < 3.5 * errors).all(), (means, errors)  # ten probes: more than two errors


# ---- a model


@pytest.fixture(scope="module")
def read(tiny_lm):
    return read_probe_sets(tiny_lm, SITE, {"a": two_kinds(60), "b": two_kinds(80, seed=1)}, examples=80, tokens=12)


def test_one_pass_for_several_coders(read, tiny_lm):
    coder = on(sl.TopK(48, 96, k=8))
    result = probing(coder, tiny_lm, read, k=(1, 5), shuffles=2)
    again = {"a": two_kinds(60), "b": two_kinds(80, seed=1)}
    assert probing(coder, tiny_lm, again, k=(1, 5), shuffles=2, examples=80, tokens=12).scores == result.scores
    # Two vocabularies are told apart from the pooled activations of the first layer, and not with shuffled labels.
    assert result.mean("dense", "all")[0] > 0.9 and result.mean("features", 5)[0] > 0.7
    assert abs(result.mean("dense", "all", "shuffled_accuracy")[0] - 0.5) < 0.2
    assert len(result.to_pandas()) == 2 * (3 * 3 + 1) and "features less this" in repr(result)
    gain, error = result.gain("dense", "chosen")
    difference = result.values("features", "chosen") - result.values("dense", "all")
    assert gain == pytest.approx(difference.mean()) and error == pytest.approx(abs(difference[0] - difference[1]) / 2)
    names = [figure.measure for figure in result.figures()]
    assert "features, k chosen: accuracy" in names and "features less dense" in names and names[-1] == "shuffled labels"
    assert "2 datasets of 60 to 80 texts" in repr(read) or "ProbeData(2 sets" in repr(read)


def test_degenerate_coders(read, tiny_lm):
    silent = on(sl.L1(48, 96))
    with torch.no_grad():
        silent.b_enc.fill_(-1e9)
    result = probing(silent, tiny_lm, read, k=(1, 5), shuffles=0)
    assert result.mean("features", 5)[0] == 0.5 == result.mean("features", "chosen", "auroc")[0]
    assert np.isnan(result.mean("dense", "all", "shuffled_accuracy")[0])
    # ± the coordinates: features are then as good as neurons, within the halves that relu takes.
    both = on(sl.L1(48, 96))
    with torch.no_grad():
        both.W_enc.copy_(torch.cat([torch.eye(48), -torch.eye(48)], 1))
    result = probing(both, tiny_lm, read, k=(5,), shuffles=0)
    assert abs(result.gain("neurons", 5)[0]) < 0.15


def test_saebench_convention(read, tiny_lm):
    result = probing(on(sl.TopK(48, 96, k=8)), tiny_lm, read, k=(1, 2, 5), convention="saebench", shuffles=1)
    assert {s.setting for s in result.scores} == {"1", "2", "5", "all"} and {s.penalty for s in result.scores} == {1.0}
    assert result.best == 5


def test_refuses(read, tiny_lm):
    coder = on(sl.TopK(48, 96, k=8))
    with pytest.raises(ValueError, match="k must be integers from 1 to d_sae=96, got 100"):
        probing(coder, tiny_lm, read, k=(1, 100))
    with pytest.raises(ValueError, match="a: k must be at most its 36 training texts, got 90: lower k or raise"):
        probing(coder, tiny_lm, read, k=(90,))
    with pytest.raises(ValueError, match=r"this coder reads width 40 and .* has width 48 at .*: use the model it was"):
        probing(on(sl.TopK(40, 96, k=8)), tiny_lm, read)
    with pytest.raises(ValueError, match=r"these texts were read at Site.*layer=0.* the coder reads Site.*layer=1"):
        probing(on(sl.TopK(48, 96, k=8), sl.Site("resid_post", layer=1)), tiny_lm, read)
    with pytest.raises(ValueError, match="pooling must be one of mean, max, last, got 'sum'"):
        probing(coder, tiny_lm, read, pooling="sum")
    with pytest.raises(ValueError, match="SAEBench pools by the mean: pass pooling='mean'"):
        probing(coder, tiny_lm, read, pooling="max", convention="saebench")
    with pytest.raises(ValueError, match="examples must be at least 8, got 2"):
        read_probe_sets(tiny_lm, SITE, two_kinds(8), examples=2)
    with pytest.raises(ValueError, match="no probe 'features' with setting '7'; there are"):
        probing(coder, tiny_lm, read, k=(1,), shuffles=0).mean("features", 7)
