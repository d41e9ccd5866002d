"""The same codes from tokens: transformers' activations read through our LM, against SAELens's own pipeline, a
TransformerLens model (or its wrapper of a transformers model) with the same weights."""

import pytest
import torch

import sae_lab as sl
from sae_lab.saes.io.peers import fold_gain
from tests.conftest import D_HEAD, HEADS, LAYERS, D
from tests.saes.conftest import normal
from tests.saes.test_exchange import close, fill

IDS = torch.randint(1, 200, (3, 20), generator=torch.Generator().manual_seed(1))
COMMON = {"d_model": D, "n_layers": LAYERS, "n_heads": HEADS, "n_ctx": 256}
MODERN = {
    **COMMON, "d_mlp": 2 * D, "n_key_value_heads": 2, "normalization_type": "RMS", "gated_mlp": True, "final_rms": True,
    "positional_embedding_type": "rotary", "rotary_adjacent_pairs": False, "eps": 1e-6, "act_fn": "silu",
}  # fmt: skip
LENS = {
    "gpt2": {**COMMON, "d_head": D_HEAD, "act_fn": "gelu_new", "eps": 1e-5, "normalization_type": "LN"},
    "llama": {**MODERN, "d_head": D_HEAD, "rotary_dim": D_HEAD, "rotary_base": 10000},
    "gemma3": {
        **MODERN, "d_head": 16, "rotary_dim": 16, "act_fn": "gelu_pytorch_tanh", "use_qk_norm": True,
        "use_normalization_before_and_after": True, "use_local_attn": True, "window_size": 8,
        "attn_types": ["local"] * (LAYERS - 1) + ["global"], "rotary_base": 1000000, "rotary_base_local": 10000,
        "use_attn_scale": True, "attn_scale": 4.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def worlds(make_module, tokenizer):
    """world(name, centred): our LM, and SAELens's model of the same weights."""
    sae_lens = pytest.importorskip("sae_lens")
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions as convert

    convert = {
        "gpt2": convert.convert_gpt2_weights, "llama": convert.convert_llama_weights,
        "gemma3": convert.convert_gemma_weights,
    }  # fmt: skip
    made = {}

    def world(name, centred=False):
        if (name, centred) not in made:
            module = make_module(name, vocab=len(tokenizer))
            cfg = HookedTransformerConfig(**LENS[name], d_vocab=len(tokenizer))
            theirs = sae_lens.HookedSAETransformer(cfg)
            state = {k: v.detach().clone() for k, v in convert[name](module, cfg).items()}
            theirs.load_and_process_state_dict(
                state, fold_ln=False, center_writing_weights=centred, center_unembed=False, fold_value_biases=False
            )
            made[name, centred] = sl.LM(module, tokenizer=tokenizer), theirs, module
        return made[name, centred]

    return world


NAMES = {"gpt2": "gpt2-small", "llama": "meta-llama/Llama-3.1-8B", "gemma3": "google/gemma-3-1b-pt"}


def theirs_at(model, hook, width, name, hook_out=None, centred=False, **options):
    """A random SAELens coder for a hook."""
    import sae_lens

    architecture = "transcoder" if hook_out else "standard"
    sae_class, config = sae_lens.registry.get_sae_class(architecture)
    options |= {"d_out": D} if hook_out else {}
    coder = fill(sae_class(config(d_in=width, d_sae=64, apply_b_dec_to_input=not hook_out, **options)))
    coder.cfg.metadata = sae_lens.saes.sae.SAEMetadata(
        model_name=NAMES[name], hook_name=hook, hook_name_out=hook_out,
        model_from_pretrained_kwargs={"center_writing_weights": True} if centred else {},
    )  # fmt: skip
    return coder


def pipeline(model, coder, hook):
    """Codes and reconstructions as SAELens computes them from tokens."""
    with torch.no_grad():
        x = model.run_with_cache(IDS, names_filter=hook)[1][hook]
        return coder.encode(x), coder(x).flatten(2), x


HOOKS = [
    ("gpt2", "blocks.1.hook_resid_pre"), ("gpt2", "blocks.0.hook_resid_pre"), ("gpt2", "blocks.1.hook_resid_mid"),
    ("gpt2", "blocks.1.hook_resid_post"), ("gpt2", "blocks.1.hook_attn_out"), ("gpt2", "blocks.1.hook_mlp_out"),
    ("gpt2", "blocks.1.attn.hook_z"),
    ("llama", "blocks.1.hook_resid_pre"), ("llama", "blocks.1.hook_mlp_out"), ("llama", "blocks.1.attn.hook_z"),
    ("gemma3", "blocks.1.hook_resid_post"), ("gemma3", "blocks.1.hook_attn_out"), ("gemma3", "blocks.1.hook_mlp_out"),
    ("gemma3", "hook_embed"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "hook"), HOOKS)
def test_codes_from_tokens(worlds, tmp_path, name, hook):
    lm, model, _ = worlds(name)
    z = hook.endswith("hook_z")
    width = lm.width(sl.Site(hook))
    coder = theirs_at(model, hook, width, name, reshape_activations="hook_z" if z else "none")
    coder.save_model(tmp_path)
    ours = sl.load(tmp_path)
    f, x_hat, x = pipeline(model, coder, hook)
    read = lm.read(IDS, ours.site)[ours.site]
    close(read, x.flatten(2))  # the two models themselves
    close(ours.encode(read), f)
    close(ours(read).x_hat, x_hat)


def test_the_wrong_site_is_not_close(worlds, tmp_path):
    """The control: resid_pre of block 1 is not the output of block 1."""
    lm, model, _ = worlds("gpt2")
    coder = theirs_at(model, "blocks.1.hook_resid_pre", D, "gpt2")
    coder.save_model(tmp_path)
    f, _, _ = pipeline(model, coder, "blocks.1.hook_resid_pre")
    with pytest.raises(AssertionError, match="relative error"):
        close(sl.load(tmp_path).encode(lm.read(IDS, "layers.1")["layers.1"]), f, 0.1)


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "topk"])
def test_centred_residual_streams(worlds, tmp_path, hook, architecture):
    """As gpt2-small-res-jb: trained on a model with center_writing_weights, read from transformers' own stream."""
    import sae_lens

    lm, model, _ = worlds("gpt2", centred=True)
    sae_class, config = sae_lens.registry.get_sae_class(architecture)
    coder = fill(sae_class(config(d_in=D, d_sae=64, **({"k": 8} if architecture == "topk" else {}))))
    kwargs = {"center_writing_weights": True}
    coder.cfg.metadata = sae_lens.saes.sae.SAEMetadata(
        model_name="gpt2-small", hook_name=hook, model_from_pretrained_kwargs=kwargs
    )
    coder.save_model(tmp_path)
    ours = sl.load(tmp_path)
    f, x_hat, x = pipeline(model, coder, hook)
    read = lm.read(IDS, ours.site)[ours.site]
    assert float((read.mean(-1)).abs().max()) > 0.05 > 1e-3 > float(x.mean(-1).abs().max()), "centring must matter"
    close(ours.encode(read), f)
    close(ours(read).x_hat, x_hat)
    close(ours.encode(read + 7), ours.encode(read))  # a mean of any size is not seen
    assert ours.meta["centred"] is True


def test_a_centred_reconstruction_in_an_uncentred_stream(worlds, tmp_path):
    """Its x_hat has mean 0 and the stream has not: the model reads the stream through norms that take the mean off, so
    that logits are those of the centred model with SAELens's reconstruction spliced in, and the mean is not missed."""
    hook = "blocks.1.hook_resid_pre"
    lm, model, _ = worlds("gpt2", centred=True)
    coder = theirs_at(model, hook, D, "gpt2", centred=True)
    coder.save_model(tmp_path)
    ours = sl.load(tmp_path)
    with torch.no_grad():
        wanted = model.run_with_hooks(IDS, fwd_hooks=[(hook, lambda x, hook: coder(x))])
    batch = lm.tokenize(IDS)

    def spliced(extra):
        from sae_lab.types import Write

        def write(x, tokens):
            return ours(x).x_hat + (x.mean(-1, keepdim=True) if extra else 0)

        return lm.run(batch, writes=[Write(ours.site, write)])[1]

    clean = lm.logits(IDS)
    assert float((wanted - clean).abs().max()) > 0.1 * float(clean.abs().max()), "the splice must matter"
    close(spliced(extra=False), wanted)
    close(spliced(extra=True), spliced(extra=False))


def test_no_centring_where_the_norm_does_not_center(worlds, tmp_path):
    """TransformerLens ignores center_writing_weights on RMSNorm models; so does the loader."""
    lm, model, _ = worlds("llama", centred=True)
    coder = theirs_at(model, "blocks.1.hook_resid_pre", D, "llama", centred=True)
    coder.save_model(tmp_path)
    ours = sl.load(tmp_path)
    f, _, _ = pipeline(model, coder, "blocks.1.hook_resid_pre")
    close(ours.encode(lm.read(IDS, ours.site)[ours.site]), f)
    assert "centred" not in ours.meta


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_transcoders_at_the_normalised_stream(worlds, tmp_path, name):
    """TransformerLens's ln2.hook_normalized lacks the norm's gain (Gemma's is 1 + w) and bias, which mlp_in has."""
    hook, out = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    lm, model, _ = worlds(name)
    coder = theirs_at(model, hook, D, name, hook_out=out)
    coder.save_model(tmp_path)
    ours = sl.load(tmp_path)
    f, y_hat, _ = pipeline(model, coder, hook)
    assert ours.reads == (sl.Site("resid_mid", 1),) and ours.writes == (sl.Site("mlp_out", 1),)
    read = lm.read(IDS, ours.reads[0])[ours.reads[0]]
    close(ours.encode(read), f)
    close(ours(read).x_hat, y_hat)
    mlp_in = lm.read(IDS, sl.Site("mlp_in", 1))[sl.Site("mlp_in", 1)]
    with pytest.raises(AssertionError, match="relative error"):  # the control: with the gain, codes are others
        close((mlp_in @ ours.W_enc + ours.b_enc).relu(), f, 0.1)


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_autoencoders_at_the_normalised_stream(worlds, tmp_path, caplog, name):
    """They read mlp_in once they know the gain. x_hat is then an mlp_in too."""
    hook = "blocks.1.ln2.hook_normalized"
    lm, model, module = worlds(name)
    coder = theirs_at(model, hook, D, name)
    coder.save_model(tmp_path)
    ours = sl.load(tmp_path)
    assert ours.reads == (sl.Site("mlp_in", 1),) and "fold_gain" in caplog.text and ours.meta["needs_gain"]
    if name == "gpt2":
        norm = module.transformer.h[1].ln_2
        gain, bias = norm.weight.detach(), norm.bias.detach()
    else:
        gain, bias = 1 + module.model.layers[1].pre_feedforward_layernorm.weight.detach(), None
    fold_gain(ours, gain, bias)
    f, x_hat, _ = pipeline(model, coder, hook)
    read = lm.read(IDS, ours.site)[ours.site]
    close(ours.encode(read), f)
    close(ours(read).x_hat, x_hat * gain + (0 if bias is None else bias))
    with pytest.raises(ValueError, match=r"gain must have shape \(48,\)"):
        fold_gain(ours, gain[:3])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("hook", ["model.layers.1", "model.layers.1.mlp", "model.layers.1.self_attn"])
def test_module_paths_of_transformers(worlds, tmp_path, name, hook):
    """SAELens's other pipeline, model_class_name AutoModelForCausalLM: a module's path is its output, which in Gemma is
    before the post-norm."""
    from sae_lens.load_model import HookedProxyLM

    lm, _, module = worlds(name)
    coder = theirs_at(None, hook, D, name)
    coder.save_model(tmp_path)
    ours = sl.load(tmp_path)
    proxy = HookedProxyLM(module, lm.tokenizer, hook_names=[hook])
    with torch.no_grad():
        x = proxy.run_with_cache(IDS, names_filter=[hook])[1][hook]
    close(ours.encode(lm.read(IDS, ours.site)[ours.site]), coder.encode(x))


def test_one_head(worlds, tmp_path):
    lm, model, _ = worlds("gpt2")
    coder = theirs_at(model, "blocks.1.attn.hook_z", D_HEAD, "gpt2")
    coder.cfg.metadata.hook_head_index = 2
    coder.save_model(tmp_path)
    ours = sl.load(tmp_path)
    with torch.no_grad():
        z = model.run_with_cache(IDS)[1]["blocks.1.attn.hook_z"][:, :, 2]
    assert ours.site == sl.Site("attn_z", 1, head=2)
    close(ours.encode(lm.read(IDS, ours.site)[ours.site]), coder.encode(z))


def test_a_coder_of_ours_in_saelens_pipeline(worlds, tmp_path):
    """The way out: what we train on a site, SAELens runs at the hook we wrote, on the same tokens."""
    import sae_lens

    lm, model, _ = worlds("gpt2")
    site = sl.Site("resid_mid", 1)
    ours = sl.TopK(D, 64, k=8, seed=3)
    with torch.no_grad():
        ours.b_dec += normal(D, seed=2)
    ours.reads = ours.writes = (site,)
    ours.save(tmp_path, format="saelens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    f, x_hat, _ = pipeline(model, theirs, theirs.cfg.metadata.hook_name)
    read = lm.read(IDS, site)[site]
    close(ours.eval().encode(read), f)
    close(ours(read).x_hat, x_hat)
