"""evals.token_injection on a feature that reads a token, one that reads a context, and what it refuses."""

import numpy as np
import pytest
import torch

import sae_lab as sl

# Where tokens are put in, of which the result shows only means.
from sae_lab.evals.injection import _as_frequent, _insert, _peaks, token_injection
from sae_lab.types import Site

EMBED, ATTENTION = Site("embed"), Site("attn_z", layer=0)
SMALL = {"texts": 8, "length": 24}


@pytest.fixture(scope="module")
def averaging_lm(make_tiny):
    """A model whose first layer attends to all earlier tokens alike: its heads' outputs are means over the context."""
    lm = make_tiny("llama", seed=5)
    with torch.no_grad():
        lm._module.model.layers[0].self_attn.q_proj.weight.zero_()
    return lm


@pytest.fixture(scope="module")
def red_text(small_text):
    """Documents that speak of red in every other token or more, among others that never do."""
    random = np.random.default_rng(0)
    words = [" apple", " house", " river", " stone", " light", " paper", " green", " music"]
    red = ["".join(" red" if random.random() < 0.7 else random.choice(words) for _ in range(100)) for _ in range(4)]
    plain = [document[:400] for document in small_text]
    return sl.load_text([text for pair in zip(plain, red * 4, strict=False) for text in pair])


def token_id(lm, text):
    [token] = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return token


def reading(site, directions, biases):
    coder = sl.L1(directions.shape[1], len(directions))
    with torch.no_grad():
        coder.W_enc.copy_(directions.T)
        coder.b_enc.copy_(torch.tensor(biases))
    coder.reads = coder.writes = (site,)
    coder.meta = {"context": 32}
    return coder.eval()


def lexical(lm):
    """Feature 0 fires on " red", 1 on nearly everything, 2 never."""
    table = lm._module.get_input_embeddings().weight.detach()
    red = table[token_id(lm, " red")]
    return reading(EMBED, torch.stack([red / red.square().sum(), 0 * red, 0 * red]), [-0.9, 1.0, -1.0])


def contextual(lm):
    """Feature 0 fires where more than .4 of the context so far is " red"."""
    block = lm._module.model.layers[0]
    with torch.no_grad():
        values = block.self_attn.v_proj(block.input_layernorm(lm._module.get_input_embeddings().weight))
        heads = values.view(len(values), 2, 12).repeat_interleave(2, dim=1).flatten(1)  # two heads share their values
    red, mean = heads[token_id(lm, " red")], heads.mean(0)
    w = (red - mean) / (red - mean).square().sum()
    return reading(ATTENTION, torch.stack([w, w]), [-0.4 - float(mean @ w), -1e3])


def indexed(coder, lm, text, folder):
    store = sl.harvest(lm, coder.site, text, tokens=3000, path=folder / "store", context=32)
    return sl.index_features(coder, lm, store, path=folder / "index")


def test_a_token_is_enough_for_a_feature_that_reads_tokens(averaging_lm, red_text, small_text, tmp_path):
    coder = lexical(averaging_lm)
    index = indexed(coder, averaging_lm, red_text, tmp_path)
    r = token_injection(coder, averaging_lm, index, [0], small_text, **SMALL)
    assert r.activated == 1.0 and r.mean_rate == 1.0 and r.mean_rate_random == 0.0 and r.activated_random == 0.0
    [found] = r.counterexamples
    assert found.tokens == (" red",) and " red" in found.example and found.reached == pytest.approx(1.0, rel=1e-3), (
        "a store is float16"
    )
    assert found.random_reached == 0.0 and "random 0%" in repr(r) and len(r.to_pandas()) == 1
    assert r == token_injection(coder, averaging_lm, index, [0], small_text, **SMALL)


def test_tokens_are_not_enough_for_a_feature_that_reads_a_context(averaging_lm, red_text, small_text, tmp_path):
    coder = contextual(averaging_lm)
    index = indexed(coder, averaging_lm, red_text, tmp_path)
    assert index.counts[0] > 100 and " red" in index.top_tokens(0, 5)
    r = token_injection(coder, averaging_lm, index, [0], small_text, **SMALL)
    # Measured: 0. A " red" right behind the prefix would be half of its context.
    assert r.mean_rate < 0.2 and r.activated == 0.0 and not r.counterexamples
    # The feature does fire where the context is red, so that the test could have failed.
    many = token_injection(coder, averaging_lm, index, [0], small_text, tokens=200, **SMALL)
    assert many.found[0].tokens[0] == " red"
    whole = _peaks(averaging_lm, coder, [averaging_lm.tokenize(" red" * 20).ids[0].tolist()], [0])
    assert float(whole[0, 0]) > 0.4


def test_peaks_are_those_of_encode(averaging_lm):
    coder = lexical(averaging_lm)
    rows = [averaging_lm.tokenize(text).ids[0].tolist() for text in (" a red stone", " nothing", " red red")]
    peaks = _peaks(averaging_lm, coder, rows, [0, 2, 0])
    expected = [float(coder.encode(averaging_lm.read([ids], EMBED)[EMBED])[0, 1:, 0].max()) for ids in rows]
    assert peaks[:, 0].tolist() == pytest.approx(expected, abs=1e-6) and torch.equal(peaks[:, 0], peaks[:, 2])
    assert peaks[0, 0] > 0 and peaks[1, 0] == 0 and not peaks[:, 1].any()


def test_insertion_and_its_control():
    assert _insert([9, 1, 2, 3], np.array([1, 4]), [7, 8]) == [9, 7, 1, 2, 3, 8]
    by_count = np.arange(1000)  # token i is the i-th rarest
    drawn = [_as_frequent(500, [500, 501], by_count, np.random.default_rng(s)) for s in range(200)]
    assert min(drawn) >= 475 and max(drawn) <= 525 and not {500, 501} & set(drawn) and len(set(drawn)) > 30
    assert _as_frequent(3, [3], np.array([3]), np.random.default_rng(0)) == 3, "there is no other"


def test_what_it_refuses(averaging_lm, red_text, small_text, tmp_path):
    coder = lexical(averaging_lm)
    index = indexed(coder, averaging_lm, red_text, tmp_path)
    with pytest.raises(ValueError, match="no features given"):
        token_injection(coder, averaging_lm, index, [], small_text)
    with pytest.raises(ValueError, match="feature 2 never fires in the index's store"):
        token_injection(coder, averaging_lm, index, [0, 2], small_text)
    with pytest.raises(ValueError, match="no text leaves feature 1 off"):
        token_injection(coder, averaging_lm, index, [1], small_text, **SMALL)
    with pytest.raises(ValueError, match="feature must be an int from 0 to 2, got 3"):
        token_injection(coder, averaging_lm, index, [3], small_text)
    with pytest.raises(ValueError, match="share must lie above 0 and be at most 1, got 0"):
        token_injection(coder, averaging_lm, index, [0], small_text, share=0.0)
    with pytest.raises(ValueError, match="texts must be at least 1, got 0"):
        token_injection(coder, averaging_lm, index, [0], small_text, texts=0)
    with pytest.raises(ValueError, match="no context of length=200: give"):
        token_injection(coder, averaging_lm, index, [0], ["a short one"], length=200)
    with pytest.raises(ValueError, match="the coder has 5 features, the index 3"):
        token_injection(sl.L1(48, 5), averaging_lm, index, [0], small_text)
