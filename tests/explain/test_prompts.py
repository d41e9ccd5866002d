"""Prompts: examples of a corpus by hand, and the search where the best prompt is known."""

import math

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.explain import prompts
from sae_lab.explain.prompts import Candidate, codes_of, evolve_prompts, random_examples, top_examples
from sae_lab.types import Site

EMBED = Site("embed")
SMALL = {"length": 4, "generations": 6, "children": 24, "population": 6}


def reader(lm, tokens, site=EMBED):
    """A coder at the embeddings: feature i is relu of the projection on the embedding of the i-th token, less a third
    of that token's own; the last feature is dead."""
    rows = lm._module.get_input_embeddings().weight[tokens].detach().float()
    coder = sl.L1(lm.width(site), len(tokens) + 1)
    with torch.no_grad():
        for p in coder.parameters():
            p.zero_()
        coder.W_enc[:, :-1] = rows.T
        coder.W_dec[:-1] = torch.nn.functional.normalize(rows, dim=1)
        coder.b_enc[:-1] = -rows.pow(2).sum(1) / 3
        coder.b_enc[-1] = -1
    coder.reads = coder.writes = (site,)
    return coder.eval()


def token(lm, text):
    [number] = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return number


TEXTS = ["We walked along the old river for days.", "The bank was closed, and the river rose.", "Nobody came at all."]


def test_codes_and_what_the_mask_keeps(tiny_lm):
    coder = reader(tiny_lm, [token(tiny_lm, " river")])
    codes, kept = codes_of(coder, tiny_lm, [0], TEXTS)
    full = coder.encode(tiny_lm.read(TEXTS, EMBED)[EMBED])[..., 0]
    batch = tiny_lm.tokenize(TEXTS)
    assert not kept[:, 0].any() and torch.equal(kept[:, 1:], batch.mask[:, 1:])
    torch.testing.assert_close(codes[..., 0], full * kept)
    assert [int(row.argmax()) for row in codes[:2, :, 0]] == [6, 8]


def test_chunks_change_nothing(tiny_lm, monkeypatch):
    coder = reader(tiny_lm, [token(tiny_lm, " river")], Site("resid_post", 1))
    whole = codes_of(coder, tiny_lm, [0], TEXTS)
    monkeypatch.setattr(prompts, "PASS_TOKENS", 1)  # one prompt at a time
    torch.testing.assert_close(codes_of(coder, tiny_lm, [0], TEXTS), whole, rtol=1e-4, atol=1e-4)


def test_examples_stand_at_their_peaks(tiny_lm):
    coder = reader(tiny_lm, [token(tiny_lm, " river"), token(tiny_lm, " bank")])
    top = top_examples(coder, tiny_lm, [0, 1, 2], TEXTS, n=2)
    assert [len(top[f]) >= 1 for f in (0, 1, 2)] == [True, True, False]
    best = top[1][0]
    assert tiny_lm.vocabulary[best.ids[best.peak]] == " bank"
    assert tiny_lm.tokenizer.decode(best.ids) == TEXTS[1]  # without the prefix
    own = tiny_lm._module.get_input_embeddings().weight[token(tiny_lm, " bank")].detach().pow(2).sum()
    assert best.value == pytest.approx(float(own) * 2 / 3, rel=1e-4)


def test_an_index_gives_the_examples_of_its_store(tiny_lm, small_text, tmp_path):
    site = Site("resid_post", 1)
    store = sl.harvest(tiny_lm, site, small_text, tokens=1500, path=tmp_path / "store", context=32)
    coder = sl.TopK(48, 64, k=4)
    coder.reads = coder.writes = (site,)
    index = sl.index_features(coder.eval(), tiny_lm, store, tmp_path / "index")
    feature = int(index.order("density")[0])
    found = top_examples(coder, tiny_lm, [feature], index, n=5)[feature]
    assert found[0].value == pytest.approx(float(index.max[feature]), rel=1e-3)
    assert [e.value for e in found] == sorted((e.value for e in found), reverse=True)
    assert tiny_lm.vocabulary[found[0].ids[found[0].peak]] == index[feature].top[0].tokens[index[feature].top[0].peak]
    drawn = random_examples(tiny_lm, index, 7)
    assert len(drawn) == 7 and all(tiny_lm.prefix_id not in ids for ids in drawn)
    assert drawn == random_examples(tiny_lm, index, 7) != random_examples(tiny_lm, index, 7, seed=1)


def test_the_search_finds_a_better_token_than_the_corpus_has(tiny_lm):
    # The feature is strongest on " river"; the corpus has only a token that fires it less.
    river = token(tiny_lm, " river")
    table = tiny_lm._module.get_input_embeddings().weight.detach().float()
    coder = reader(tiny_lm, [river])
    with torch.no_grad():
        coder.b_enc[0] = 0.0
    weaker = int((table @ table[river]).topk(40).indices[-1])
    text = [tiny_lm.tokenizer.decode([weaker]) + " and nothing else"] * 3
    result = evolve_prompts(coder, tiny_lm, text, [0], ce_weight=0, start="random", **SMALL)
    assert result.evaluations == 144
    assert result.activation[0] == pytest.approx(
        float(codes_of(coder, tiny_lm, [0], [[tiny_lm.prefix_id, *result.ids[0]]])[0].max()), rel=1e-5
    )


def test_the_search_climbs_where_chance_does_not(tiny_lm):
    """In a deeper layer all of a prompt matters. Selection is worth something: over 6 random directions it reaches more
    than as many prompts without parents (measured: for 5 of 6, by 27 % in the mean)."""
    coder = sl.L1(48, 6)
    coder.reads = coder.writes = (Site("resid_post", 2),)
    result = evolve_prompts(
        coder.eval(), tiny_lm, TEXTS, range(6), ce_weight=0, start="random", length=6, generations=10, children=24,
        population=6,
    )  # fmt: skip
    gain = np.array(result.activation) / np.array(result.random_activation) - 1
    assert (gain > 0).sum() >= 4 and gain.mean() > 0.1
    assert result.exceeding == np.mean(np.array(result.activation) > np.array(result.corpus_max))
    assert len(result.to_pandas()) == 6 and "random search" in repr(result)


def test_ce_is_weighed_against_activation(tiny_lm):
    coder = sl.L1(48, 1)
    coder.reads = coder.writes = (Site("resid_post", 2),)
    coder.eval()
    free, bound = (evolve_prompts(coder, tiny_lm, TEXTS, [0], ce_weight=w, **SMALL) for w in (0.0, 100.0))
    assert bound.ce[0] < free.ce[0] - 0.5 and bound.activation[0] < free.activation[0]
    again = evolve_prompts(coder, tiny_lm, TEXTS, [0], ce_weight=100.0, **SMALL)
    assert again == bound


def test_pruned_by_ce_finds_what_full_scores_find(tiny_lm):
    """A prompt whose z alone is below the worst survivor is dropped without its CE: the survivors are the same."""
    coder = sl.L1(48, 1)
    coder.reads = coder.writes = (Site("resid_post", 1),)
    rng = np.random.default_rng(0)
    search = prompts._Search(coder.eval(), tiny_lm, 0, 0.02, np.arange(100), rng)
    new = [tuple(rng.integers(10, 5000, 5).tolist()) for _ in range(60)]
    z = prompts.strongest_activations(coder, tiny_lm, 0, [[tiny_lm.prefix_id, *ids] for ids in new]).tolist()
    scores = {ids: value - 0.02 * ce for ids, value, ce in zip(new, z, search.losses(new), strict=True)}
    asked = []
    losses = search.losses
    search.losses = lambda batch: asked.extend(batch) or losses(batch)
    kept = search.survivors([], new, 3)
    assert [c.ids for c in kept] == sorted(new, key=lambda ids: -scores[ids])[:3]
    assert kept[0].score == pytest.approx(scores[kept[0].ids], abs=1e-3) and len(asked) < len(new)
    assert isinstance(kept[0], Candidate) and not math.isnan(kept[0].ce)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"start": "best"}, "start must be one of top, random, got 'best'"),
     ({"length": 1}, "length must lie between 2 and the 255 tokens this model reads, got 1"),
     ({"children": 0}, "children must be at least 1, got 0"),
     ({"ce_weight": -1.0}, "ce_weight must be finite and at least 0"),
     ({"features": []}, r"features must be at least one number, each once, got \[\]"),
     ({"features": [1]}, "feature 1 never fires in the source: choose live features, or a longer source")],
)  # fmt: skip
def test_what_is_refused(tiny_lm, settings, message):
    coder = reader(tiny_lm, [token(tiny_lm, " river")])
    features = settings.pop("features", [0])
    with pytest.raises(ValueError, match=message):
        evolve_prompts(coder, tiny_lm, TEXTS, features, **{**SMALL, **settings})


def test_a_coder_that_does_not_fit(tiny_lm):
    coder = reader(tiny_lm, [token(tiny_lm, " river")]).train()
    with pytest.raises(ValueError, match=r"needs the coder in eval mode, got a training one: call sae\.eval"):
        evolve_prompts(coder, tiny_lm, TEXTS, [0], **SMALL)
    other = sl.L1(20, 4).eval()
    other.reads = (EMBED,)
    with pytest.raises(ValueError, match="this coder reads width 20 and "):
        evolve_prompts(other, tiny_lm, TEXTS, [0], **SMALL)
