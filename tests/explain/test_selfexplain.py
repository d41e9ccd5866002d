"""The model explains a direction: in a model by hand, which says what stands in the place of the word."""

import math

import pytest
import torch

import sae_lab as sl
from sae_lab.explain.selfexplain import (
    Implant,
    choose_scale,
    holds,
    implant_sites,
    placeholder_position,
    self_explain,
    share,
    typical_norm,
)
from sae_lab.types import Site

PROMPT = 'The meaning of "X" is'
WORDS = ("river", "bank", "winter", "horse", "silver", "garden")


@pytest.fixture(scope="module")
def parrot(make_module, tokenizer):
    """(lm, coder). Embeddings are 0 but for some words'; the last layer's attention hands on the mean of what it sees,
    so that the model says the word that stands anywhere. A feature of the coder is such a word's direction."""
    module = make_module("llama", len(tokenizer), num_hidden_layers=2)
    ids = [tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in WORDS]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in module.model.layers:
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj,
                      layer.mlp.down_proj):  # fmt: skip
                p.weight.zero_()
            layer.input_layernorm.weight.fill_(1)
        module.model.norm.weight.fill_(1)
        v, o = module.model.layers[1].self_attn.v_proj.weight, module.model.layers[1].self_attn.o_proj.weight
        v[:24, :24] = torch.eye(24)  # two key-value heads of 12, for four heads
        o[:12, :12] = o[12:24, 24:36] = torch.eye(12)
        head = torch.nn.functional.normalize(torch.randn(len(tokenizer), 48, generator=generator), dim=1)
        head[:, 24:] = 0
        words = torch.nn.functional.normalize(torch.randn(len(WORDS), 24, generator=generator), dim=1)
        head[ids, :24] = words
        module.lm_head.weight.copy_(head)
        module.model.embed_tokens.weight.zero_()[ids, :24] = words
    lm = sl.LM(module, tokenizer=tokenizer)
    coder = sl.L1(48, len(WORDS))
    with torch.no_grad():
        coder.W_dec.zero_()[:, :24] = words
    coder.reads = coder.writes = (Site("resid_post", 0),)
    return lm, coder.eval()


def test_the_model_says_the_word_and_random_vectors_do_not(parrot, monkeypatch):
    lm, coder = parrot
    monkeypatch.setattr("sae_lab.explain.selfexplain.typical_norm", lambda lm, site: 1.0)  # most embeddings are 0
    words = dict(enumerate(WORDS[:5]))
    result = self_explain(coder, lm, range(6), words, prompt=PROMPT, tokens=2, controls=3)
    assert result.hit_rate == 1 and result.random_hit_rate == 0 and result.other_hit_rate == 0
    assert result.hits == (True,) * 5 + (False,) and result.words[5] == ""
    assert result.texts[0].startswith(" river") and len(result.random_texts[0]) == 3
    assert min(result.similarity) > 0.99  # what the last token hears is the direction alone
    assert "random vectors" in repr(result) and len(result.to_pandas()) == 6
    assert self_explain(coder, lm, range(6), words, prompt=PROMPT, tokens=2, controls=3) == result
    # Control: with the words of others in their place nothing is named.
    wrong = {i: WORDS[(i + 1) % 5] for i in range(5)}
    assert self_explain(coder, lm, range(6), wrong, prompt=PROMPT, tokens=2, controls=1).hit_rate == 0
    nameless = self_explain(coder, lm, [0], prompt=PROMPT, tokens=2)
    assert math.isnan(nameless.hit_rate) and nameless.hits == (False,)


def test_an_implant_is_there_and_nowhere_else(tiny_lm):
    site, rows = Site("resid_post", 1), torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    batch = tiny_lm.tokenize([PROMPT, PROMPT])
    clean = tiny_lm.run(batch, [site], logits=False)[0][site]
    new = tiny_lm.run(batch, [site], Implant(site, 3, rows).writes(tiny_lm, batch), logits=False)[0][site]
    torch.testing.assert_close(new[:, 3], rows)
    assert torch.equal(new[:, :3], clean[:, :3]) and torch.equal(new[:, 4:], clean[:, 4:])


def test_generation_hears_the_implant_through_its_cache(tiny_lm):
    rows = 30 * torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    edit = Implant(Site("resid_post", 0), 3, rows)
    text = tiny_lm.generate(PROMPT, [edit], max_new_tokens=4)
    ids = tiny_lm.tokenize(PROMPT).ids
    for _ in range(4):  # the whole text again for each token
        batch = tiny_lm.tokenize(ids)
        logits = tiny_lm.run(batch, writes=edit.writes(tiny_lm, batch))[1]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert text == tiny_lm.tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)
    assert text != tiny_lm.generate(PROMPT, max_new_tokens=4)


def test_the_scale_with_the_largest_self_similarity(tiny_lm):
    at, compare = Site("resid_post", 0), Site("resid_post", 2)
    vectors = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    scales, best = choose_scale(tiny_lm, PROMPT, 3, at, compare, vectors, [0.5, 2.0, 8.0])
    by_hand = []
    for s in (0.5, 2.0, 8.0):
        batch = tiny_lm.tokenize([PROMPT] * 3)
        last = tiny_lm.run(batch, [compare], Implant(at, 3, s * vectors).writes(tiny_lm, batch), logits=False)[0][
            compare
        ]
        by_hand.append(torch.cosine_similarity(last[:, -1], vectors, dim=1))
    top = torch.stack(by_hand).max(0)
    torch.testing.assert_close(best, top.values, rtol=1e-3, atol=1e-5)
    assert scales.tolist() == [(0.5, 2.0, 8.0)[i] for i in top.indices.tolist()]


def test_words_in_texts():
    assert holds(" The Bank, he said", "bank") and not holds("the banker", "bank") and not holds("anything", "")
    assert holds('"C++" is', "C++")
    assert share(["a bank", "none"], "bank") == 0.5 and math.isnan(share([], "bank"))


def test_sites_and_norms(tiny_lm):
    coder = sl.L1(48, 4)
    coder.reads = coder.writes = (Site("resid_post", 2),)
    assert implant_sites(coder, tiny_lm, None, None) == (Site("resid_post", 1), Site("resid_post", 2))
    coder.reads = coder.writes = (Site("embed"),)
    assert implant_sites(coder, tiny_lm, "embed", None) == (Site("embed"), Site("resid_post", 2))
    with pytest.raises(ValueError, match="self-similarity needs a later layer than the implant's"):
        implant_sites(coder, tiny_lm, Site("resid_post", 2), Site("resid_post", 1))
    with pytest.raises(ValueError, match="directions are 20 wide"):
        narrow = sl.L1(20, 4)
        narrow.reads = narrow.writes = (Site("resid_post", 2),)
        implant_sites(narrow, tiny_lm, None, None)
    norms = tiny_lm.read("one two three four", Site("embed"))[Site("embed")][0, 1:].norm(dim=-1)
    assert typical_norm(tiny_lm, Site("embed"), "one two three four") == pytest.approx(float(norms.median()))


def test_what_is_refused(tiny_lm):
    coder = sl.L1(48, 4)
    coder.reads = coder.writes = (Site("resid_post", 2),)
    coder.eval()
    assert placeholder_position(tiny_lm, PROMPT, "X") == 5
    with pytest.raises(ValueError, match="placeholder must be a token of the prompt, got 'Y'"):
        self_explain(coder, tiny_lm, [0], prompt=PROMPT, placeholder="Y")
    with pytest.raises(ValueError, match="scales must be at least one positive number"):
        self_explain(coder, tiny_lm, [0], prompt=PROMPT, scales=(0.0, 1.0))
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        self_explain(coder, tiny_lm, [0], prompt=PROMPT, tokens=0)
