"""Direct effects: their sum against the model's own logits, each alone against a model with its norm's scale held."""

import pytest
import torch
from torch import nn

import sae_lab as sl
from sae_lab.circuits import direct_effects, read_prompt
from sae_lab.types import Site
from tests.edits.test_edit import PROMPT

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "attn_z", "embed")


def coder_at(lm, site, d_sae=96, seed=0, **wiring):
    coder = sl.TopK(lm.width(site), d_sae, k=8, seed=seed, **wiring)
    with torch.no_grad():
        coder.b_dec.normal_(generator=torch.Generator().manual_seed(1))
        coder.f_scale.fill_(2.0)
    coder.reads = coder.writes = (site,)
    return coder.eval()


def site_of(kind, layer=1):
    return Site(kind) if kind == "embed" else Site(kind, layer)


def centred(lm, prompt, position):
    logits = lm.logits(prompt)[0, position]
    return logits - logits.mean()


def close(a, b, scale):
    return float((a - b).abs().max()) < 1e-4 * float(scale.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_add_up_to_the_models_logits(any_lm, kind):
    if kind not in any_lm.kinds:
        pytest.skip("no such site")
    coder, ids = coder_at(any_lm, site_of(kind)), [7, 1000, 20_000]
    for position in (2, len(any_lm.tokens(PROMPT)) - 1):
        found = direct_effects(any_lm, coder, PROMPT, position, on=ids, n=None)
        truth = centred(any_lm, PROMPT, position)
        assert close(found.logits, truth[ids], truth)
        total = found.effects.sum(0) + found.others + found.error + found.bias + found.rest
        assert close(total, truth[ids], truth)
        assert float(found.effects.abs().max()) > 1e-3 * float(truth.abs().max()), "the features do something"


class Held(nn.Module):
    """A norm that divides by what it divided another input by."""

    def __init__(self, norm, before):
        super().__init__()
        self.norm, self.before = norm, before

    def forward(self, x):
        shift = self.norm(torch.zeros_like(self.before))
        out, zero = self.norm(x) - shift, self._size(self.before)
        return out * self._size(x) / zero + shift

    def _size(self, x):
        x = x - x.mean(-1, keepdim=True) if isinstance(self.norm, nn.LayerNorm) else x
        eps = next(getattr(self.norm, n) for n in ("eps", "variance_epsilon") if hasattr(self.norm, n))
        return (x.square().mean(-1, keepdim=True) + eps).sqrt()


def test_one_features_effect_is_what_taking_it_out_does_with_the_scale_held(any_lm):
    """At the last layer, where all effects are direct."""
    last = Site("resid_post", any_lm.n_layers - 1)
    coder, position = coder_at(any_lm, last), 4
    found = direct_effects(any_lm, coder, PROMPT, position, on=list(range(0, 300, 7)), n=3)
    x = any_lm.read(PROMPT, last)[last][0, position]
    norm = any_lm._sites.modules[any_lm._sites.way_out[-1]]
    held, head = Held(norm, x[None, None]), any_lm._module.get_output_embeddings()
    with torch.no_grad():
        for feature, value, effect in zip(found.features, found.values, found.effects, strict=True):
            without = x - value * coder.W_dec[feature]
            change = (head(held(x[None, None])) - head(held(without[None, None])))[0, 0]
            assert close(effect, (change - change.mean())[found.targets], change)


def test_a_coder_that_normalises_its_input_and_a_transcoder(tiny_lm):
    site = Site("resid_post", 1)
    normalising = coder_at(tiny_lm, site)
    normalising.input_norm = "layer"
    transcoder = coder_at(tiny_lm, Site("mlp_in", 1), d_out=48, skip=True)
    with torch.no_grad():
        transcoder.W_skip.normal_()
    transcoder.writes = (Site("mlp_out", 1),)
    truth = centred(tiny_lm, PROMPT, 3)
    for coder in (normalising, transcoder):
        found = direct_effects(tiny_lm, coder, PROMPT, 3, on=[5, 6], n=2)
        total = found.effects.sum(0) + found.others + found.error + found.bias + found.rest
        assert close(total, truth[[5, 6]], truth)
        assert float(found.others.abs().max()) > 0


def test_a_head_alone(any_lm):
    coder = coder_at(any_lm, Site("attn_z", 1, head=2))
    truth = centred(any_lm, PROMPT, 3)
    found = direct_effects(any_lm, coder, PROMPT, 3, on=[5, 6], n=None)
    assert close(torch.tensor(found.parts()["logit"]), truth[[5, 6]], truth)
    assert close(found.effects.sum(0) + found.error + found.bias + found.rest, truth[[5, 6]], truth)


def test_features_and_targets(tiny_lm):
    coder = coder_at(tiny_lm, Site("resid_post", 1))
    table = sl.features(tiny_lm, coder, PROMPT)
    here = table.position == 3
    found = direct_effects(tiny_lm, coder, PROMPT, 3)
    assert found.features.tolist() == table.feature[here].tolist() and found.active == 8
    assert torch.equal(found.values, table.value[here]) and torch.allclose(found.scaled, found.values / 2)
    ids = tiny_lm.tokenize(PROMPT).ids[0]
    assert found.targets == [int(ids[4])], "the prompt's next token"
    last = direct_effects(tiny_lm, coder, PROMPT)
    assert last.position == len(ids) - 1 and last.targets == [int(tiny_lm.logits(PROMPT)[0, -1].argmax())]
    assert direct_effects(tiny_lm, coder, PROMPT, 3, on=" the").names == [" the"]
    everything = direct_effects(tiny_lm, coder, PROMPT, 3, on=list(range(tiny_lm.vocab_size)), promoted=2)
    assert torch.allclose(everything.effects.mean(1), torch.zeros(8), atol=1e-4), "centred over the vocabulary"
    for row, effects in zip(everything.promoted, everything.effects, strict=True):
        assert [v for _, v in row] == pytest.approx(effects.topk(2).values.tolist(), abs=1e-4)


def test_the_order_and_the_table(tiny_lm):
    coder = coder_at(tiny_lm, Site("resid_post", 1))
    whole = direct_effects(tiny_lm, coder, PROMPT, 3)
    assert whole.values.tolist() == sorted(whole.values.tolist(), reverse=True)
    best = direct_effects(tiny_lm, coder, PROMPT, 3, by="effect", n=3)
    assert best.effects[:, 0].abs().tolist() == pytest.approx(sorted(whole.effects[:, 0].abs().tolist())[:-4:-1])
    assert torch.allclose(best.effects.sum(0) + best.others, whole.effects.sum(0) + whole.others, atol=1e-5)
    frame = best.to_pandas()
    assert list(frame.columns[:4]) == ["feature", "name", "activation", "in_f_scale"] and len(frame) == 3
    assert "position 3" in repr(best) and "8 active features" in repr(best)


def test_a_reading_costs_one_pass(tiny_lm, monkeypatch):
    coder, other = coder_at(tiny_lm, Site("resid_post", 1)), coder_at(tiny_lm, Site("mlp_out", 0), seed=3)
    alone = direct_effects(tiny_lm, coder, PROMPT, 3)
    reading = read_prompt(tiny_lm, [coder, other], PROMPT)
    assert not reading.is_through
    reading.way_out()
    monkeypatch.setattr(tiny_lm, "run", lambda *a, **k: 1 / 0)
    assert torch.allclose(direct_effects(tiny_lm, coder, reading, 3).effects, alone.effects, atol=1e-5)
    assert direct_effects(tiny_lm, other, reading, 3).site == Site("mlp_out", 0)
    assert reading.is_through


def test_losses(any_lm):
    reading = read_prompt(any_lm, [], PROMPT)
    truth = any_lm.loss(PROMPT, per_token=True)[0]
    assert torch.allclose(reading.losses(), truth, atol=1e-3, equal_nan=True) and bool(truth[0].isnan())


def test_a_capped_models_effects_are_before_the_cap(make_module, tokenizer):
    import transformers as tf

    config = tf.Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, final_logit_softcapping=5.0, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    module = tf.Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        module.lm_head.weight.mul_(20)
    lm = sl.LM(module, tokenizer=tokenizer)
    found = direct_effects(lm, coder_at(lm, Site("resid_post", 1)), PROMPT, 3, on=list(range(len(tokenizer))))
    assert "caps its logits" in found.note
    capped = lm.logits(PROMPT)[0, 3]
    before = 5.0 * (capped / 5.0).clamp(-0.999999, 0.999999).atanh()
    assert float((capped - before).abs().max()) > 0.5, "the cap bites"
    assert torch.allclose(found.logits, before - before.mean(), atol=2e-2)
    truth = lm.loss(PROMPT, per_token=True)[0]
    assert torch.allclose(read_prompt(lm, [], PROMPT).losses(), truth, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(("change", "known"), [(lambda x: 3 * x, True), (lambda x: x + 0.1 * x**3, False)])
def test_what_a_model_makes_of_its_logits(change, known, make_module, tokenizer):
    """A factor (Granite's, Cohere's) is a part of the effects; what bends logits is refused."""
    import transformers as tf

    class Changing(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = change(out.logits)
            return out

    module = Changing(make_module("llama", len(tokenizer)).config).eval()
    lm = sl.LM(module, tokenizer=tokenizer)
    coder = coder_at(lm, Site("resid_post", 1))
    if known:
        found, own = direct_effects(lm, coder, PROMPT, 3, on=[5, 6]), lm.logits(PROMPT)[0, 3]
        assert close(found.logits, (own - own.mean())[[5, 6]], own)
    else:
        with pytest.raises(ValueError, match="changes its logits after the head"):
            direct_effects(lm, coder, PROMPT, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position": 99}, "position must be an int from 0 to"),
        ({"position": True}, "got True"),
        ({"position": 0}, "mask leaves out token 0"),
        ({"on": "two words"}, "a target is one token, 'two words' is"),
        ({"on": ""}, "is 0 .nothing."),
        ({"on": [10**9]}, "id must lie in 0.."),
        ({"on": []}, "no targets"),
        ({"by": "size"}, "by must be"),
    ],
)
def test_what_is_refused(tiny_lm, change, words):
    with pytest.raises(ValueError, match=words):
        direct_effects(tiny_lm, coder_at(tiny_lm, Site("resid_post", 1)), PROMPT, **{"position": 3, **change})


def test_coders_that_are_refused(tiny_lm):
    with pytest.raises(ValueError, match="this one writes at Site"):
        direct_effects(tiny_lm, coder_at(tiny_lm, Site("mlp_in", 1)), PROMPT, 3)
    wide = sl.TopK(64, 96, k=8).eval()
    wide.reads = wide.writes = (Site("resid_post", 1),)
    with pytest.raises(ValueError, match="reads width 64 and LM"):
        direct_effects(tiny_lm, wide, PROMPT, 3)
    with pytest.raises(ValueError, match="one prompt"):
        direct_effects(tiny_lm, coder_at(tiny_lm, Site("resid_post", 1)), [PROMPT, PROMPT], 3)


def test_a_silent_token_has_no_features(tiny_lm):
    coder = sl.L1(48, 96, sparsity=0.1).eval()
    coder.reads = coder.writes = (Site("resid_post", 1),)
    with torch.no_grad():
        coder.b_enc.fill_(-1e6)
    found = direct_effects(tiny_lm, coder, PROMPT, 3)
    assert len(found.features) == 0 and found.promoted == [] and len(found.to_pandas()) == 0
    assert float(found.error + found.rest + found.bias) == pytest.approx(float(found.logits), rel=1e-4)
