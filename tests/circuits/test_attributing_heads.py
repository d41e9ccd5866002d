"""Shares of heads and of words against the model's own attention; edges against what the model does."""

import pytest
import torch

import sae_lab as sl
from sae_lab import circuits
from sae_lab.circuits import invariant_edges as edges
from sae_lab.circuits.heads import CAPTURE
from sae_lab.types import Site, Write
from tests.conftest import ARCHITECTURES, D_HEAD, HEADS
from tests.edits.test_edit import LONGER, PROMPT, firing, make

Z = Site("attn_z", 1)
PARALLEL = ("neox",)  # attention and MLP read the same stream: nothing between
POST_NORM = ("gemma3", "olmo2")


# ---------------------------------------------------------------------------------------------- heads


def eager_pattern(lm, prompt, layer):
    """transformers' own eager attention, asked for its weights."""
    module, before = lm._module, lm._module.config._attn_implementation
    module.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            return module(lm.tokenize(prompt).ids, output_attentions=True).attentions[layer]
    finally:
        module.config._attn_implementation = before


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 2])
def test_attention_against_transformers(name, layer, tiny):
    """LONGER is longer than Gemma's sliding window, so that a wrong mask shows."""
    lm, site = tiny[name], Site("attn_z", layer)
    before, clean = lm._module.config._attn_implementation, lm.logits(LONGER)
    seen = circuits.attention(lm, LONGER, layer)
    assert torch.allclose(seen.pattern, eager_pattern(lm, LONGER, layer), atol=1e-5)
    assert torch.allclose(seen.pattern.sum(-1), torch.ones(1), atol=1e-5) and seen.pattern.shape[1] == HEADS
    z = lm.read(LONGER, site)[site]
    assert torch.allclose((seen.pattern @ seen.v).transpose(1, 2).flatten(2), z, atol=1e-4 * float(z.abs().max()))
    assert lm._module.config._attn_implementation == before and torch.equal(lm.logits(LONGER), clean)


def test_attention_puts_the_implementation_back(tiny_lm, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = tiny_lm._module.config._attn_implementation
    with monkeypatch.context() as patch:
        patch.setattr(tiny_lm, "run", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            circuits.attention(tiny_lm, PROMPT, 1)
    assert tiny_lm._module.config._attn_implementation == before
    assert CAPTURE not in ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_add_up_to_the_pre_activation(name, tiny):
    lm = tiny[name]
    sae = make(lm, Z)
    with torch.no_grad():
        sae.b_enc.add_(torch.linspace(-1, 1, 64))
    live = firing(lm, sae)[0]
    found = circuits.head_attribution(lm, sae, live, PROMPT, position=7)
    with torch.no_grad():
        out = sae(lm.read(PROMPT, Z)[Z][0, 7])
    scale = float(found.parts.abs().max())
    assert float(found.parts.sum()) + found.bias == pytest.approx(float(out.pre[0, live]), abs=1e-4 * scale)
    assert found.pre == pytest.approx(float(out.pre[0, live]), abs=1e-4 * scale)
    assert found.activation == pytest.approx(float(out.f[live]), abs=1e-4 * scale)
    assert float(found.shares.sum()) == pytest.approx(1, abs=1e-4) == float(found.written.sum())
    assert (found.parts[:, 8:] == 0).all() and (found.parts[:, :8] != 0).any()
    width = sae.d_in // HEADS
    for h in range(HEADS):  # a head's part: its own columns of z, by hand
        columns = slice(h * width, (h + 1) * width)
        by_hand = lm.read(PROMPT, Z)[Z][0, 7, columns] @ sae.W_enc[columns, live]
        assert float(found.heads[h]) == pytest.approx(by_hand.item(), abs=1e-4 * scale)
        norms = sae.W_dec[live, columns].square().sum() / sae.W_dec[live].square().sum()
        assert float(found.written[h]) == pytest.approx(float(norms.detach()), abs=1e-5)


def test_a_words_part_is_what_goes_with_its_value(tiny_lm):
    """With one word's value vectors at zero (the pattern stays), pre falls by that word's parts."""
    sae = make(tiny_lm, Z)
    live = firing(tiny_lm, sae)[0]
    found = circuits.head_attribution(tiny_lm, sae, live, PROMPT, position=8)
    batch, site = tiny_lm.tokenize(PROMPT), Site("model.layers.1.self_attn.v_proj")

    def silenced(v, tokens):
        v = v.clone()
        v[:, 3] = 0
        return v

    z = tiny_lm.run(batch, [Z], [Write(site, silenced)], logits=False)[0][Z][0, 8]
    fallen = found.pre - float(sae(z).pre[0, live])
    assert fallen == pytest.approx(float(found.parts[:, 3].sum()), abs=1e-4 * float(found.parts.abs().max()))
    assert abs(fallen) > 1e-3


def test_shares_over_prompts(tiny_lm):
    sae = make(tiny_lm, Z)
    shares = circuits.head_shares(tiny_lm, sae, [PROMPT, LONGER])
    reading = tiny_lm.read([PROMPT, LONGER], Z)
    kept = reading.mask.clone()
    kept[:, 0] = False
    f, z = sae.encode(reading[Z][kept]), reading[Z][kept]
    fires = (f > 0).any(0)
    assert torch.equal(shares.isnan().all(1), ~fires) and fires.any() and not fires.all()
    assert torch.allclose(shares[fires].sum(1), torch.ones(1), atol=1e-4)
    i = int(fires.nonzero()[0])
    on = z[f[:, i] > 0].view(-1, HEADS, D_HEAD)
    parts = (on * sae.W_enc[:, i].view(HEADS, D_HEAD)).sum(-1).sum(0)
    assert torch.allclose(shares[i], parts / parts.sum(), atol=1e-4)


def test_the_table(tiny_lm):
    sae = make(tiny_lm, Z)
    found = circuits.head_attribution(tiny_lm, sae, firing(tiny_lm, sae)[0], PROMPT)
    table = found.to_pandas()
    assert len(table) == HEADS * (found.position + 1) and found.position > 0
    assert table.part.sum() == pytest.approx(float(found.parts.sum()), abs=1e-4)
    assert "shares of heads" in repr(found) and found.tokens[found.position] in repr(found)


# ---------------------------------------------------------------------------------------------- edges


def transcoder(lm, layer=2, seed=3, site=None):
    """One that reads the MLP's input, random, with the encoder biased so that it fires."""
    coder = sl.Transcoder(48, 64, d_out=48, k=6, seed=seed)
    coder.reads, coder.writes = (Site("mlp_in", layer),), (Site("mlp_out", layer),)
    with torch.no_grad():
        coder.b_enc.add_(torch.linspace(-0.5, 0.5, 64))
    x = lm.read([PROMPT, LONGER], coder.reads[0])[coder.reads[0]].flatten(0, 1)
    coder.calibrate([x])
    return coder


def norm_free(name):
    return [a for a in ARCHITECTURES if a not in name]


@pytest.mark.parametrize("name", norm_free((*PARALLEL, "olmo2")))
@pytest.mark.parametrize("upstream", [Site(*at) for at in (("resid_post", 0), ("mlp_out", 1), ("attn_z", 2))])
def test_edges_are_the_measured_effects(name, upstream, tiny):
    lm = tiny[name]
    first, second = make(lm, upstream), transcoder(lm)
    if upstream.kind == "attn_z" and name in POST_NORM:
        with pytest.raises(ValueError, match="at attn_out in place of attn_z"):
            circuits.invariant_edges(lm, first, second)
        return
    live = firing(lm, first)[0]
    found = circuits.check_edges(lm, first, second, live, [PROMPT, LONGER], features=list(range(64)))
    assert found.error < 1e-3 and abs(found.frozen).max() > 1e-3
    assert abs(found.frozen - found.free).max() > 1e-3 * abs(found.frozen).max()  # freezing matters
    assert len(found.to_pandas()) == 64 and "taken out" in repr(found)


@pytest.mark.parametrize("name", norm_free(PARALLEL))
def test_edges_into_the_stream(name, tiny):
    """A transcoder's output is part of the stream behind it: nothing stands between, so free is frozen."""
    lm = tiny[name]
    first, second = transcoder(lm, 1), make(lm, Site("resid_post", 1))
    read = lm.read([PROMPT, LONGER], first.reads[0])
    live = int(first.encode(read[first.reads[0]][:, 1:].flatten(0, 1)).sum(0).argmax())
    found = circuits.check_edges(lm, first, second, live, [PROMPT, LONGER])
    assert found.error < 1e-3 and found.slope == pytest.approx(1, abs=1e-3) and found.correlation > 0.999
    by_hand = first.W_dec[live] @ second.W_enc[:, found.features]
    assert torch.allclose(circuits.invariant_edges(lm, first, second, [live])[0, found.features], by_hand, atol=1e-5)


def test_an_edge_by_hand(tiny_lm):
    """Through W_O and the norm's gain, and at a token over what the norm divides by."""
    first, second = make(tiny_lm, Site("attn_z", 2)), transcoder(tiny_lm)
    block = tiny_lm._module.model.layers[2]
    whole = circuits.invariant_edges(tiny_lm, first, second)
    direction = block.self_attn.o_proj.weight @ first.W_dec[5] * block.post_attention_layernorm.weight
    assert torch.allclose(whole[5], direction @ second.W_enc, atol=1e-4) and whole.shape == (64, 64)
    x = tiny_lm.read(PROMPT, Site("resid_mid", 2))[Site("resid_mid", 2)]
    scale = circuits.norm_scale(tiny_lm, "mlp_in-2", PROMPT)
    normed = tiny_lm.read(PROMPT, Site("mlp_in", 2))[Site("mlp_in", 2)]
    assert torch.allclose(x / scale.unsqueeze(-1) * block.post_attention_layernorm.weight, normed, atol=1e-4)


REFUSED = [
    (lambda lm: circuits.head_attribution(lm, make(lm), 0, PROMPT), "takes a coder at attn_z of all heads"),
    (lambda lm: circuits.head_attribution(lm, make(lm, Site("attn_z", 1, head=2)), 0, PROMPT), "of all heads"),
    (lambda lm: circuits.head_attribution(lm, make(lm, Z), 64, PROMPT), "from 0 to 63"),
    (lambda lm: circuits.head_attribution(lm, make(lm, Z), 0, [PROMPT, PROMPT]), "one prompt, got 2"),
    (lambda lm: circuits.head_attribution(lm, make(lm, Z), 0, PROMPT, position=10), "from 0 to 9"),
    (lambda lm: circuits.attention(lm, PROMPT, 3), "layers 0 to 2"),
    (lambda lm: circuits.head_shares(lm, make(lm), PROMPT), "at attn_z of all heads"),
    (lambda lm: edges(lm, make(lm), transcoder(lm, 1)), "must write before the downstream one reads"),
    (lambda lm: edges(lm, make(lm, Site("mlp_in", 0)), transcoder(lm)), "write to the residual stream"),
    (lambda lm: edges(lm, make(lm), make(lm, Site("attn_z", 2))), "read the residual stream or mlp_in"),
    (lambda lm: circuits.check_edges(lm, make(lm), transcoder(lm), 64, PROMPT), "from 0 to 63"),
    (lambda lm: circuits.norm_scale(lm, "resid_mid-1", PROMPT), "norm_scale needs a site at mlp_in"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_refused(call, words, tiny_lm):
    with pytest.raises(ValueError, match=words):
        call(tiny_lm)


def test_refused_where_it_never_fires_or_has_no_norm(tiny_lm, tiny):
    sae = make(tiny_lm)
    silent = int((sae.f_scale == 0).nonzero()[0])
    with pytest.raises(ValueError, match="fires at no token"):
        circuits.check_edges(tiny_lm, sae, transcoder(tiny_lm), silent, PROMPT)
    with pytest.raises(ValueError, match="no norm before its MLP"):
        circuits.invariant_edges(tiny["olmo2"], make(tiny["olmo2"]), transcoder(tiny["olmo2"]))
    with pytest.raises(ValueError, match="no 'resid_mid' sites"):
        circuits.invariant_edges(tiny["neox"], make(tiny["neox"]), transcoder(tiny["neox"]))
