"""``lm.edited``: the transformers module run by other code gives what ``lm.logits`` and ``lm.generate`` give."""

import pytest
import tiny_models
import torch

import sae_lab as sl

TEXTS = ["The river rose in March", "A fox ran away from the old castle on the hill", "Moon"]


def coder(lm, site):
    made = sl.TopK(lm.width(site), 48, k=6, seed=1).eval()
    made.reads = made.writes = (sl.Site.of(site),)
    made.f_scale.fill_(1.0)
    norms = lm.read(TEXTS, site)[site][0, 1:].norm(dim=-1)
    limit = {made.reads[0].key: float(norms.sort().values[-2:].mean())}  # one loud token of the first text
    made.meta = {"mask": sl.TokenMask((), True, limit).to_dict()}
    return made


def edits_of(lm):
    stream, heads = coder(lm, "resid_post-1"), coder(lm, "attn_z-1")
    mid = coder(lm, "resid_pre-2")
    transcoder = sl.Transcoder(lm.width("mlp_in-2"), 48, k=6, d_out=lm.width("mlp_out-2"), seed=2).eval()
    transcoder.reads, transcoder.writes = (sl.Site("mlp_in", 2),), (sl.Site("mlp_out", 2),)
    transcoder.threshold.fill_(0.1)
    transcoder.f_scale.fill_(1.0)
    strongest = int(transcoder.encode(lm.read(TEXTS, "mlp_in-2")["mlp_in-2"][0, 1:]).sum(0).argmax())
    return [
        sl.Steer(stream, 3, strength=4.0), sl.Clamp(heads, 5, value=3.0, positions=slice(2, None)),
        sl.Ablate(mid, list(range(20)), error="drop"), sl.Scale(transcoder, strongest, factor=-3.0),
        sl.Steer(stream, 9, strength=2.0, when=(3, 0.0, "token")),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "falcon:new"])
def test_it_gives_the_logits_of_lm(name):
    lm = sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer(), device="cpu")
    edits = edits_of(lm)
    batch = lm.tokenize(TEXTS)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
    clean = lm._module(**inputs).logits.detach()
    with lm.edited(edits) as module, torch.no_grad():
        logits = module(**inputs).logits
        assert torch.equal(lm.logits(TEXTS), lm.logits(TEXTS)), "calls of lm have their own edits"
        inside = lm.logits(TEXTS)
    assert torch.allclose(inside[batch.mask], clean[batch.mask], atol=1e-5)
    wanted = lm.logits(TEXTS, edits)
    assert torch.allclose(logits[batch.mask], wanted[batch.mask], atol=1e-4)
    assert float((wanted - clean)[batch.mask].abs().max()) > 0.01, "the edits do something"
    assert torch.equal(lm._module(**inputs).logits, clean), "nothing stays behind"


def test_generation_with_a_cache(tiny_lm):
    lm = tiny_lm
    edits = [sl.Steer(coder(lm, "resid_post-1"), 3, strength=6.0), sl.Clamp(coder(lm, "resid_pre-2"), 2, value=4.0)]
    ids = lm.tokenize(TEXTS[0]).ids
    with lm.edited(edits) as module:
        made = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert lm.tokenizer.decode(made[0], skip_special_tokens=True) == lm.generate(TEXTS[0], edits, max_new_tokens=12)
    assert made.shape[1] > ids.shape[1] + 1
    plain = lm._module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert plain.tolist() != made.tolist()


def test_gradients_take_the_change_as_a_constant(tiny_lm):
    """Of a steered model: what ``lm.edited`` gives by autograd, beside a model with the same vector in a bias."""
    lm = tiny_lm
    sae = coder(lm, "resid_post-1")
    sae.meta = {"mask": sl.TokenMask((), True, {}).to_dict()}
    edit = sl.Steer(sae, 3, strength=4.0, positions=slice(1, None))
    ids = lm.tokenize(TEXTS[0]).ids
    weight = next(p for n, p in lm._module.named_parameters() if "embed" in n)
    with lm.edited(edit) as module:
        loss = module(input_ids=ids, labels=ids).loss
    (found,) = torch.autograd.grad(loss, weight)

    def add(_module, _args, output):
        added = torch.zeros_like(output)
        added[:, 1:] = 4.0 * sae.f_scale[3] * sae.W_dec[3]
        return output + added

    handle = lm._module.model.layers[1].register_forward_hook(add)
    by_hand = lm._module(input_ids=ids, labels=ids).loss
    handle.remove()
    (wanted,) = torch.autograd.grad(by_hand, weight)
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5)
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_bad_input(tiny_lm):
    lm, sae = tiny_lm, coder(tiny_lm, "resid_post-1")
    batch = lm.tokenize(TEXTS)
    before = hooks(lm)
    for more, words in [({"rows": 0}, "leave out rows=0"), ({"steps": [0]}, r"leave out steps=\[0\]")]:
        with pytest.raises(ValueError, match=words), lm.edited(sl.Steer(sae, 3, **more)):
            pass
    left = batch.mask.flip(1)
    for inputs, words in [
        ({"inputs_embeds": torch.zeros(1, 3, 48)}, "call the module with input_ids, not with inputs_embeds"),
        ({"input_ids": batch.ids, "attention_mask": left.long()}, "rows that are padded on the right: set tokenizer"),
        ({"input_ids": batch.ids, "attention_mask": torch.ones(1, 1, 4, 4)}, "an attention_mask of shape"),
    ]:
        with lm.edited(sl.Steer(sae, 3)) as module, pytest.raises(ValueError, match=words):
            module(**inputs)
    past = lm._module(batch.ids[:1], use_cache=True).past_key_values
    with lm.edited(sl.Steer(sae, 3)) as module, pytest.raises(ValueError, match="with 1 rows of a cache, after 0 prom"):
        module(input_ids=batch.ids[:1, :1], past_key_values=past)
    with pytest.raises(ValueError, match="from 0 to 47, got 99"), lm.edited(sl.Steer(sae, 99)) as module:
        module(batch.ids)
    assert hooks(lm) == before, "no hook stays"


def test_ctrl_c_leaves_no_hook(tiny_lm):
    before = hooks(tiny_lm)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = tiny_lm._module.model.layers[2].register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), tiny_lm.edited(sl.Steer(coder(tiny_lm, "resid_post-1"), 3)) as module:
            module(tiny_lm.tokenize(TEXTS).ids)
    finally:
        handle.remove()
    assert hooks(tiny_lm) == before


def hooks(lm):
    """The numbers of all hooks in the model. nnsight keeps some of its own, so tests compare before and after."""
    modules = list(lm._module.modules())
    # torch has no public list of a module's hooks
    return [(sorted(m._forward_hooks), sorted(m._forward_pre_hooks)) for m in modules]
