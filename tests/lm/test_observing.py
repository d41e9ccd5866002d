"""What one watched pass tells of models that the usual names and sums do not fit."""

import pytest
import tiny_models
import torch

import sae_lab as sl
from sae_lab.types import Site, Write

PROMPT = "The quick brown fox jumps over the lazy dog near the river."


@pytest.fixture(scope="module")
def build():
    known = {}

    def made(name):
        if name not in known:
            known[name] = sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer())
        return known[name]

    return made


def close(a, b, tolerance=1e-4):
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def read(lm, *sites):
    return [lm.read(PROMPT, sites)[s] for s in sites]


def moved(lm, site, by):
    """Logits when a vector is added at a site."""
    return lm.run(lm.tokenize(PROMPT), writes=[Write(site, lambda x, tokens: x + by.to(x))])[1]


@pytest.mark.parametrize("name", ["granite", "glm4", "bloom", "opt"])
def test_what_is_added_is_found_behind_norms_and_multipliers(name, build):
    """Granite multiplies it, GLM-4 norms it, BLOOM adds inside its modules, OPT makes one axis of rows and tokens."""
    lm = build(name)
    kinds = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    pre, attn, mid, mlp, post = read(lm, *(Site(kind, 1) for kind in kinds))
    assert close(pre + attn, mid, 1e-5) and close(mid + mlp, post, 1e-5)
    by = torch.randn(lm.width(Site("resid_mid", 1)), generator=torch.Generator().manual_seed(0))
    assert close(moved(lm, Site("attn_out", 1), by), moved(lm, Site("resid_mid", 1), by))
    assert close(moved(lm, Site("mlp_out", 1), by), moved(lm, Site("resid_post", 1), by))
    for kind in kinds:
        assert torch.equal(moved(lm, Site(kind, 1), torch.zeros(())), lm.run(lm.tokenize(PROMPT))[1]), kind


def test_a_difference_where_the_skip_connection_is_normed(build):
    """MiniMax norms the stream itself after attention: what attention makes of it is resid_mid - resid_pre."""
    lm = build("minimax")
    pre, attn, mid = read(lm, Site("resid_pre", 1), Site("attn_out", 1), Site("resid_mid", 1))
    assert close(pre + attn, mid, 1e-6)
    by = torch.ones(lm.width(Site("resid_mid", 1)))
    assert close(moved(lm, Site("attn_out", 1), by), moved(lm, Site("resid_mid", 1), by))
    with pytest.raises(ValueError, match="a difference of two tensors in this model"):
        lm.gradient(lm.tokenize(PROMPT), Site("attn_out", 1), lambda logits, tokens: logits.sum((1, 2)), attn)


def test_kinds_by_layer(build):
    lm = build("jamba")  # Mamba, attention, Mamba...
    attending = [layer for layer, block in enumerate(lm._sites.layers) if "attn_z" in block.places]
    assert attending and len(attending) < lm.n_layers and "attn_z" in lm.kinds
    lm.read(PROMPT, Site("attn_z", attending[0]))
    other = next(layer for layer in range(lm.n_layers) if layer not in attending)
    with pytest.raises(ValueError, match=f"layer {other} of this model has no 'attn_out' site: it has no attention"):
        lm.read(PROMPT, Site("attn_out", other))


def test_what_is_no_stream_is_refused(build):
    with pytest.raises(ValueError, match="hand on a tensor of 4 axes, not one residual stream"):
        build("gemma3n_text").read(PROMPT, Site("resid_post", 1))
    with pytest.raises(ValueError, match="does not hand its stream on by adding to it"):
        build("opt:350m").read(PROMPT, Site("mlp_out", 1))


@pytest.mark.parametrize(("name", "why"), [("prophetnet", "a later token changes"), ("bert", "a later token changes")])
def test_what_is_not_causal_is_refused(name, why):
    with pytest.raises(ValueError, match=why):
        sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer())


def test_an_encoder_decoder_is_refused(tokenizer):
    import transformers as tf

    config = tf.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="a T5ForConditionalGeneration is an encoder-decoder"):
        sl.LM(tf.T5ForConditionalGeneration(config), tokenizer=tokenizer)


def test_weights_that_are_packed(make_module, tokenizer):
    module = make_module("llama", len(tokenizer))
    plain = sl.LM(module, tokenizer=tokenizer)
    eight = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear}, dtype=torch.qint8)
    lm = sl.LM(eight, tokenizer=tokenizer)
    assert lm.fingerprint() != plain.fingerprint() and lm.kinds == plain.kinds
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    for site in (Site("resid_post", 1), Site("attn_z", 1)):
        cosine = torch.cosine_similarity(lm.lens(x, site), plain.lens(x, site), dim=-1)
        assert float(cosine.min()) > 0.99  # eight bits lose about half a percent


@pytest.mark.parametrize("name", ["mamba", "bamba", "rwkv", "llama"])
def test_a_state_is_carried_or_each_token_reads_all(name, build):
    """Either way generation is the argmax of one pass, and edits at some steps act at these."""
    lm = build(name)
    site = Site("resid_post", 1)
    torch.manual_seed(0)
    sae = sl.TopK(lm.width(site), 64, k=8).eval()
    sae.reads = sae.writes = (site,)
    sae.f_scale = torch.ones(64)
    edits = [sl.Clamp(sae, 3, value=30.0, steps=[1, 2])]
    carried = lm._empty_state
    assert carried is not None, "transformers carries the state of each of these"
    texts = lm.generate(PROMPT, edits=edits, max_new_tokens=6)
    lm.__dict__["_empty_state"] = None
    try:
        assert lm.generate(PROMPT, edits=edits, max_new_tokens=6) == texts
        assert lm.generate(PROMPT, max_new_tokens=6) != texts, "the edit says something"
    finally:
        lm.__dict__["_empty_state"] = carried
    ids = lm.tokenize(PROMPT).ids
    for _ in range(6):
        ids = torch.cat([ids, lm.logits(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert lm.generate(PROMPT, max_new_tokens=6) == lm.tokenizer.decode(ids[0], skip_special_tokens=True)


def test_a_path_is_not_taken_for_another_layer(make_module, tokenizer):
    module = make_module("llama", len(tokenizer))
    module.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])  # beside model.layers, and never run
    lm = sl.LM(module, tokenizer=tokenizer)
    assert torch.equal(*read(lm, Site("model.layers.1"), Site("resid_post", 1)))
    with pytest.raises(ValueError, match=r"'layers.0' is a module of this model but no part of its layers"):
        lm.read(PROMPT, Site("layers.0"))


class Whole(torch.nn.Module):
    """A block in a module that does the same, as torch.compile puts it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_block_in_a_wrapper_has_the_same_sites(name, build):
    plain, module = build(name), tiny_models.build(name)
    blocks = module.get_submodule(plain._sites.blocks)
    for i, block in enumerate(blocks):
        blocks[i] = Whole(block)
    lm = sl.LM(module, tokenizer=tiny_models.tokenizer())
    sites = [Site(kind, 1) for kind in plain.kinds if kind != "embed"]
    assert lm.kinds == plain.kinds
    assert all(torch.equal(a, b) for a, b in zip(read(lm, *sites), read(plain, *sites), strict=True))


class Adapted(torch.nn.Module):
    """A linear module with an adapter beside it, which reads the same (LoRA), or one behind it."""

    def __init__(self, base, behind=False):
        super().__init__()
        out, width = base.weight.shape
        self.base, self.behind = base, behind
        self.down = torch.nn.Linear(out if behind else width, 2, bias=False)
        self.up = torch.nn.Linear(2, out, bias=False)

    def forward(self, x):
        y = self.base(x)
        return y + 2.0 * self.up(self.down(y if self.behind else x).relu() if self.behind else self.down(x))


def adapted(module, behind=False):
    torch.manual_seed(0)
    for path, part in list(module.named_modules()):
        if isinstance(part, torch.nn.Linear) and ".layers." in path:
            module.set_submodule(path, Adapted(part, behind))
    return sl.LM(module.eval(), tokenizer=tiny_models.tokenizer())


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt:350m", "minimax"])
def test_adapters_beside_linear_modules(name):
    """The same model as with the adapters' products in the weights: an edit at attn_z goes into both."""
    lm, merged = adapted(tiny_models.build(name)), tiny_models.build(name)
    with torch.no_grad():
        for path, part in lm._module.named_modules():
            if isinstance(part, Adapted):
                merged.get_submodule(path).weight += 2.0 * part.up.weight @ part.down.weight
    plain = sl.LM(merged, tokenizer=tiny_models.tokenizer())
    assert lm.kinds == plain.kinds
    for kind in lm.kinds:
        site = Site(kind, None if kind == "embed" else 1)
        [a], [b] = read(lm, site), read(plain, site)
        assert close(a, b), kind
        by = b.std() * torch.randn(b.shape[-1], generator=torch.Generator().manual_seed(1))
        assert close(moved(lm, site, by), moved(plain, site, by)), kind
        a, b = lm.lens(by[None], site), plain.lens(by[None], site)
        assert (a is None) == (b is None) and (b is None or close(a, b, 1e-3)), kind


def test_an_adapter_behind_w_o_has_no_lens_of_heads():
    """What attention adds is then more than W_O makes of attn_z."""
    lm = adapted(tiny_models.build("llama"), behind=True)
    assert "attn_z" in lm.kinds and lm.lens(torch.ones(1, 48), Site("attn_z", 1)) is None
    assert lm.lens(torch.ones(1, 48), Site("resid_post", 1)) is not None


def test_a_model_without_weights_or_that_does_not_run_is_refused():
    with pytest.raises(ValueError, match=r"this model has no weights .*: load them with from_pretrained"):
        sl.LM(tiny_models.build("llama").to("meta"), tokenizer=tiny_models.tokenizer())
    module = tiny_models.build("llama")
    module.model.norm = torch.nn.LayerNorm(5)
    with pytest.raises(ValueError, match=r"and this model does not run so \(RuntimeError: "):
        sl.LM(module, tokenizer=tiny_models.tokenizer())
