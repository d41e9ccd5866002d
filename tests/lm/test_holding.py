"""A model held at a prompt: what lies between embeddings and logits is then linear, whatever the architecture."""

import pytest
import tiny_models
import torch
from torch import nn

import sae_lab as sl
from sae_lab.lm.holding import Holding
from sae_lab.types import Site, Write
from tests.edits.test_edit import LONGER

NAMES = ["llama", "gpt2", "gemma2", "olmo2", "qwen3", "gpt_neox", "bloom", "falcon:new", "cohere:qk norm", "laguna"]


def held_pass(lm, batch, held, embed, mlp):
    """The stream after the last layer, with other embeddings and other outputs of MLPs."""
    last = Site("resid_post", lm.n_layers - 1)
    writes = [Write(Site("embed"), lambda x, tokens: embed.clone())]
    writes += [Write(Site("mlp_out", n), lambda x, tokens, n=n: mlp[n].clone()) for n in range(lm.n_layers)]
    with held.replaying():
        return lm.run(batch, [last], writes, logits=False)[0][last]


@pytest.mark.parametrize("name", NAMES)
def test_a_held_model_is_linear_up_to_constants(name):
    lm = sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer(), device="cpu")
    batch, held = lm.tokenize(LONGER[:24]), Holding()
    before = lm.run(batch)[1]
    with held.recording():
        noted = lm.run(batch)[1]
    assert torch.allclose(noted, before, atol=1e-5 * float(before.abs().max())), "noting changes nothing"
    length, d = batch.ids.shape[1], lm.width("embed")
    torch.manual_seed(0)
    some = [(torch.randn(1, length, d), torch.randn(lm.n_layers, 1, length, d)) for _ in range(2)]
    a, b = (held_pass(lm, batch, held, *one) for one in some)
    both = held_pass(lm, batch, held, *(2 * x - 3 * y for x, y in zip(*some, strict=True)))
    none = held_pass(lm, batch, held, *(0 * x for x in some[0]))
    largest = float((both - none).abs().max())
    assert float((both - none - 2 * (a - none) + 3 * (b - none)).abs().max()) < 1e-5 * largest
    assert largest > 1.0 and torch.equal(lm.run(batch)[1], before), "nothing stays held"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_ways_of_attention_are_held_alike(make_module, tokenizer, implementation):
    module = make_module("llama", len(tokenizer))
    module.config._attn_implementation = implementation
    lm, held = sl.LM(module, tokenizer=tokenizer), Holding()
    batch, site = lm.tokenize(LONGER), Site("attn_z", 2)
    z = lm.read(LONGER, site)[site]
    with held.recording():
        noted = lm.run(batch, [site], logits=False)[0][site]
    assert torch.allclose(noted, z, atol=1e-5 * float(z.abs().max()))
    seen = sl.circuits.attention(lm, LONGER, 2)
    own = [v for v in held._values if v.shape == seen.pattern.shape]  # what is held has no name outside
    assert torch.allclose(own[-1], seen.pattern, atol=1e-6)


def test_other_functions_are_refused():
    class Counting(nn.Module):
        def forward(self, x):
            return x.softmax(-1) if float(x.sum()) > 0 else x.softmax(-1).softmax(-1)

    held, module = Holding(), Counting()
    with held.recording():
        first = module(torch.ones(2, 3))
    with held.replaying():
        assert torch.equal(module(torch.zeros(2, 3) + 0.5), first)
    with pytest.raises(ValueError, match="it cannot be held at a prompt"), held.replaying():
        module(-torch.ones(2, 3))
