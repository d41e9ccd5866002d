"""Reading and writing sites against hand-written torch hooks, architecture by architecture."""

from contextlib import contextmanager

import pytest
import torch

from sae_lab.types import KINDS, LAYER_KINDS, Site, Write

PROMPT = "The quick brown fox jumps over the lazy dog."
LAYERS, HEADS = 3, 4

# Where each kind lies, written down from the architectures' source, independently of sae_lab.
PRE_NORM = {
    "embed": ("model.embed_tokens", "out"),
    "resid_pre": ("model.layers.{}", "in"),
    "attn_z": ("model.layers.{}.self_attn.o_proj", "in"),
    "attn_out": ("model.layers.{}.self_attn", "out"),
    "resid_mid": ("model.layers.{}.post_attention_layernorm", "in"),
    "mlp_in": ("model.layers.{}.post_attention_layernorm", "out"),
    "mlp_out": ("model.layers.{}.mlp.down_proj", "out"),
    "resid_post": ("model.layers.{}", "out"),
}
NEOX = {
    "embed": ("gpt_neox.embed_in", "out"),
    "resid_pre": ("gpt_neox.layers.{}", "in"),
    "attn_z": ("gpt_neox.layers.{}.attention.dense", "in"),
    "attn_out": ("gpt_neox.layers.{}.attention.dense", "out"),
    "mlp_in": ("gpt_neox.layers.{}.post_attention_layernorm", "out"),
    "mlp_out": ("gpt_neox.layers.{}.mlp.dense_4h_to_h", "out"),
    "resid_post": ("gpt_neox.layers.{}", "out"),
}
HOOKS = {
    "llama": PRE_NORM,
    "qwen3": PRE_NORM,
    "gpt2": {
        "embed": ("transformer.wte", "out"),
        "resid_pre": ("transformer.h.{}", "in"),
        "attn_z": ("transformer.h.{}.attn.c_proj", "in"),
        "attn_out": ("transformer.h.{}.attn.c_proj", "out"),
        "resid_mid": ("transformer.h.{}.ln_2", "in"),
        "mlp_in": ("transformer.h.{}.ln_2", "out"),
        "mlp_out": ("transformer.h.{}.mlp.c_proj", "out"),
        "resid_post": ("transformer.h.{}", "out"),
    },
    "neox": NEOX,  # attention and MLP in parallel: both read the stream before the block, and there is no middle
    "neox_serial": {**NEOX, "resid_mid": ("gpt_neox.layers.{}.post_attention_layernorm", "in")},
    "gemma3": {
        **PRE_NORM,
        "attn_out": ("model.layers.{}.post_attention_layernorm", "out"),
        "resid_mid": ("model.layers.{}.pre_feedforward_layernorm", "in"),
        "mlp_in": ("model.layers.{}.pre_feedforward_layernorm", "out"),
        "mlp_out": ("model.layers.{}.post_feedforward_layernorm", "out"),
    },
    "olmo2": {
        **PRE_NORM,
        "attn_out": ("model.layers.{}.post_attention_layernorm", "out"),
        "resid_mid": ("model.layers.{}.mlp", "in"),
        "mlp_in": ("model.layers.{}.mlp", "in"),
        "mlp_out": ("model.layers.{}.post_feedforward_layernorm", "out"),
    },
}


@pytest.fixture
def hooks(request, any_lm):
    return HOOKS[request.node.callspec.params["any_lm"]]


def all_sites(lm):
    return [s for k in lm.kinds for s in ([Site(k)] if k == "embed" else [Site(k, layer) for layer in range(LAYERS)])]


@contextmanager
def hooked(module, where, layer, change):
    """A torch hook that replaces the value there by ``change(value)``; a ``change`` that gives None only looks."""
    path, end = where
    target = module.get_submodule(path.format(layer))

    def before(_, args):
        new = change(args[0])
        return None if new is None else (new, *args[1:])

    def after(_, args, out):
        new = change(out[0] if isinstance(out, tuple) else out)
        return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

    handle = target.register_forward_pre_hook(before) if end == "in" else target.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def hook_read(lm, hooks, site, ids):
    seen = []
    with torch.no_grad(), hooked(lm._module, hooks[site.kind], site.layer, lambda x: seen.append(x.clone())):
        lm._module(input_ids=ids)
    return seen[0]


def hook_write(lm, where, layer, change, ids):
    with torch.no_grad(), hooked(lm._module, where, layer, change):
        return lm._module(input_ids=ids).logits


def close(a, b, tolerance=1e-4):
    """Relative to the largest magnitude: padding alone moves activations by 1e-5 of it."""
    return a.shape == b.shape and (a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max()


def test_kinds(any_lm, hooks):
    assert any_lm.kinds == [k for k in KINDS if k in hooks]
    assert any_lm.n_layers == LAYERS


def test_read_equals_a_torch_hook(any_lm, hooks):
    reading = any_lm.read(PROMPT, all_sites(any_lm))
    for site in all_sites(any_lm):
        expected = hook_read(any_lm, hooks, site, reading.ids)
        assert close(reading[site], expected), site
        assert reading[site].shape[-1] == any_lm.width(site)
        assert reading[site].dtype == torch.float32


def test_a_single_deep_site_reads_the_same_as_all_together(any_lm):
    site = Site("mlp_out", 1)
    assert torch.equal(any_lm.read(PROMPT, site)[site], any_lm.read(PROMPT, all_sites(any_lm))[site])


def test_the_stream_adds_up(any_lm):
    r = any_lm.read(PROMPT, all_sites(any_lm))
    for layer in range(LAYERS):
        attn, mlp = r[Site("attn_out", layer)], r[Site("mlp_out", layer)]
        pre, post = r[Site("resid_pre", layer)], r[Site("resid_post", layer)]
        if layer + 1 < LAYERS:
            assert torch.equal(post, r[Site("resid_pre", layer + 1)])
        if "resid_mid" in any_lm.kinds:
            mid = r[Site("resid_mid", layer)]
            assert close(mid, pre + attn, 1e-6)
            assert close(post, mid + mlp, 1e-6)
        else:
            assert close(post, pre + attn + mlp, 1e-6)


def test_heads_join_to_the_whole(any_lm):
    heads = [Site("attn_z", 1, head=h) for h in range(HEADS)]
    r = any_lm.read(PROMPT, [*heads, Site("attn_z", 1)])
    assert torch.equal(torch.cat([r[h] for h in heads], dim=-1), r[Site("attn_z", 1)])
    assert all(any_lm.width(h) == any_lm.width(Site("attn_z", 1)) // HEADS for h in heads)


def test_identity_writes_leave_logits_bit_equal(any_lm):
    batch = any_lm.tokenize([PROMPT, "Shorter."])
    _, plain = any_lm.run(batch)
    for site in [*all_sites(any_lm), Site("attn_z", 1, head=2)]:
        _, written = any_lm.run(batch, writes=[Write(site, lambda x, tokens: x)])
        assert torch.equal(written, plain), site


def test_writes_equal_a_torch_hook(any_lm, hooks):
    batch = any_lm.tokenize(PROMPT)
    _, plain = any_lm.run(batch)
    for site in all_sites(any_lm):
        shift = torch.randn(any_lm.width(site), generator=torch.Generator().manual_seed(0))
        for change in (torch.zeros_like, lambda x, shift=shift: x + shift):
            if site.kind == "resid_mid":  # no module's output: change what attention adds to the stream instead
                pre = any_lm.read(PROMPT, Site("resid_pre", site.layer))[Site("resid_pre", site.layer)]
                expected = hook_write(
                    any_lm, hooks["attn_out"], site.layer, lambda x, f=change, pre=pre: f(pre + x) - pre, batch.ids
                )
            else:
                expected = hook_write(any_lm, hooks[site.kind], site.layer, change, batch.ids)
            _, written = any_lm.run(batch, writes=[Write(site, lambda x, tokens, f=change: f(x))])
            assert close(written, expected), (site, change)
            assert not close(written, plain, 1e-3), f"writing at {site} changed nothing"


def test_writing_one_head_leaves_the_others(any_lm, hooks):
    batch = any_lm.tokenize(PROMPT)
    d = any_lm.width(Site("attn_z", 1, head=2))

    def zero_head(z):
        z = z.clone()
        z[..., 2 * d : 3 * d] = 0
        return z

    expected = hook_write(any_lm, hooks["attn_z"], 1, zero_head, batch.ids)
    zero = Write(Site("attn_z", 1, head=2), lambda x, tokens: torch.zeros_like(x))
    whole = Site("attn_z", 1)
    before, _ = any_lm.run(batch, [whole])
    after, written = any_lm.run(batch, [whole], [zero])
    assert close(written, expected)
    assert torch.equal(after[whole], zero_head(before[whole])), "a read of the whole sees the write at its head"


def test_writes_at_one_place_act_in_the_order_given(tiny_lm):
    site, batch = Site("resid_post", 1), tiny_lm.tokenize(PROMPT)
    before, _ = tiny_lm.run(batch, [site])
    writes = [Write(site, lambda x, tokens: x + 1), Write(site, lambda x, tokens: 2 * x)]
    after, _ = tiny_lm.run(batch, [site], writes)
    assert torch.equal(after[site], 2 * (before[site] + 1))


def test_reads_are_what_they_were_when_read(any_lm):
    """A later write, also one in place, must not change a value that was read before."""
    if "resid_mid" not in any_lm.kinds:
        pytest.skip("no middle of the stream in this architecture")
    batch = any_lm.tokenize(PROMPT)
    sites = [Site("resid_pre", 1), Site("attn_out", 1)]
    before, _ = any_lm.run(batch, sites)
    after, _ = any_lm.run(batch, sites, [Write(Site("resid_mid", 1), lambda x, tokens: torch.zeros_like(x))])
    assert all(torch.equal(before[s], after[s]) for s in sites)


def test_writes_see_positions_and_padding(tiny_lm):
    batch = tiny_lm.tokenize([PROMPT, "Short."])
    seen = []
    tiny_lm.run(batch, writes=[Write(Site("resid_post", 0), lambda x, tokens: seen.append(tokens) or x)])
    assert torch.equal(seen[0].ids, batch.ids)
    assert torch.equal(seen[0].positions[1], torch.arange(batch.ids.shape[1]))
    assert seen[0].mask[1].sum() == len(tiny_lm.tokens("Short."))


def test_the_model_stops_at_the_deepest_site(any_lm, hooks):
    ran = []
    mlp = hooks["resid_post"][0] + ".mlp"
    handles = [
        any_lm._module.get_submodule(mlp.format(layer)).register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer in range(LAYERS)
    ]
    handles.append(any_lm._module.get_output_embeddings().register_forward_hook(lambda *_: ran.append("head")))
    try:
        any_lm.read(PROMPT, [Site("resid_post", 1), Site("embed")])
        assert ran == [0, 1]
        ran.clear()
        any_lm.read(PROMPT, Site("resid_pre", 1))
        assert ran == [0]
        ran.clear()
        any_lm.logits(PROMPT)
        assert ran == [0, 1, 2, "head"]
    finally:
        for handle in handles:
            handle.remove()


SPELLINGS = {
    "llama": "model.layers.1", "qwen3": "layers.1", "gpt2": "transformer.h.1", "neox": "gpt_neox.layers.1",
    "neox_serial": "gpt_neox.layers.1", "gemma3": "model.layers.1", "olmo2": "model.layers.1",
}  # fmt: skip


def test_spellings_read_the_same(request, any_lm):
    path = SPELLINGS[request.node.callspec.params["any_lm"]]
    r = any_lm.read(PROMPT, [Site("resid_post", layer=1)])
    for spelling in (path, "blocks.1.hook_resid_post", "layers.1", "resid_post-1", Site("layers.1")):
        assert torch.equal(r[spelling], any_lm.read(PROMPT, spelling)[spelling])
    assert set(r) == {Site("resid_post", 1)}


def test_any_module_path(any_lm, hooks):
    path = hooks["mlp_in"][0].format(2) if hooks["mlp_in"][1] == "out" else "model.layers.2.mlp.up_proj"
    r = any_lm.read(PROMPT, path)
    seen = []
    with torch.no_grad(), hooked(any_lm._module, (path, "out"), 0, lambda x: seen.append(x)):
        any_lm._module(input_ids=r.ids)
    assert close(r[path], seen[0])
    assert any_lm.width(path) == seen[0].shape[-1]


def test_layers_and_heads_out_of_range(any_lm):
    for kind in set(any_lm.kinds) & set(LAYER_KINDS):
        with pytest.raises(ValueError, match=r"out of range: this model has layers 0 to 2"):
            any_lm.read(PROMPT, Site(kind, LAYERS))
    with pytest.raises(ValueError, match=r"head=4\) is out of range: this model has heads 0 to 3"):
        any_lm.width(Site("attn_z", 0, head=HEADS))


def test_a_kind_this_architecture_has_not(tiny):
    with pytest.raises(ValueError, match="this model has no 'resid_mid' sites; it has embed, resid_pre, attn_z"):
        tiny["neox"].read(PROMPT, Site("resid_mid", 0))


def test_an_unknown_module(tiny_lm):
    with pytest.raises(ValueError, match=r"no module 'model.layers.1.mlp.gate'.*similar: .*gate_proj"):
        tiny_lm.read(PROMPT, "model.layers.1.mlp.gate")
    with pytest.raises(ValueError, match=r"no module 'a.nothing'.*kinds: embed, resid_pre"):
        tiny_lm.width("a.nothing")


def test_no_site(tiny_lm):
    with pytest.raises(ValueError, match="no site given"):
        tiny_lm.read(PROMPT, [])
