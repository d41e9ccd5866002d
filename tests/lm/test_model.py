"""LM: logits, loss, generation, batching, errors, the lock, the fingerprint, the lens. Oracle: transformers itself."""

import threading

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import sae_lab as sl
from sae_lab.types import Site, TokenBatch, TokenMask, Write

SENTENCE = "The quick brown fox jumps over the lazy dog."
PROMPTS = [SENTENCE, "Yes.", "In March the river rose over the old stone bridge"]


def close(a, b, tolerance=1e-4):
    """Relative to the largest magnitude: padding alone moves activations by 1e-5 of it."""
    return a.shape == b.shape and (a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max()


class Add:
    """The smallest edit there is: a shift at one site."""

    def __init__(self, site, by):
        self.site, self.by = site, by

    def writes(self, lm, batch, new=0):
        return [Write(self.site, lambda x, tokens: x + self.by)]


# ---- against transformers


def test_logits_equal_transformers(any_lm):
    batch = any_lm.tokenize(SENTENCE)
    with torch.no_grad():
        expected = any_lm._module(input_ids=batch.ids).logits
    assert close(any_lm.logits(SENTENCE), expected)


def test_loss_equals_transformers(any_lm):
    ids = any_lm.tokenize(SENTENCE).ids
    with torch.no_grad():
        expected = any_lm._module(input_ids=ids, labels=ids).loss
    assert any_lm.loss(SENTENCE).item() == pytest.approx(expected.item(), rel=1e-4)


def test_loss_per_token(tiny_lm):
    per_token = tiny_lm.loss(PROMPTS, per_token=True)
    batch = tiny_lm.tokenize(PROMPTS)
    assert torch.equal(~per_token.isnan(), batch.mask & (batch.positions > 0))
    log_p = tiny_lm.logits(PROMPTS).log_softmax(-1)
    assert per_token[2, 3].item() == pytest.approx(-log_p[2, 2, batch.ids[2, 3]].item(), rel=1e-5)
    # The mean is over tokens, not over prompts.
    assert tiny_lm.loss(PROMPTS).item() == pytest.approx(per_token[~per_token.isnan()].mean().item(), rel=1e-6)


def test_a_row_gets_what_it_gets_alone(any_lm):
    sites = [Site("resid_post", 2), Site("attn_z", 1), Site("mlp_out", 0)]
    together, logits = any_lm.read(PROMPTS, sites), any_lm.logits(PROMPTS)
    losses = any_lm.loss(PROMPTS, per_token=True)
    for row, prompt in enumerate(PROMPTS):
        alone = any_lm.read(prompt, sites)
        n = alone.ids.shape[1]
        assert together.mask[row].sum() == n
        for site in sites:
            assert close(together[site][row, :n], alone[site][0]), site
            assert (together[site][row, n:] == 0).all(), "padding reads as zeros"
        assert close(logits[row, :n], any_lm.logits(prompt)[0])
        assert close(losses[row, 1:n], any_lm.loss(prompt, per_token=True)[0, 1:])


def test_edits_reach_logits_loss_and_reads(tiny_lm):
    edit = Add(Site("resid_post", 0), 2.0)
    with torch.no_grad():
        handle = tiny_lm._module.model.layers[0].register_forward_hook(lambda m, a, out: out + 2.0)
        expected = tiny_lm._module(input_ids=tiny_lm.tokenize(SENTENCE).ids).logits
        handle.remove()
    assert close(tiny_lm.logits(SENTENCE, edits=[edit]), expected)
    assert not close(tiny_lm.logits(SENTENCE), expected, 1e-2)
    assert tiny_lm.loss(SENTENCE, edits=[edit]) != tiny_lm.loss(SENTENCE)
    site = Site("resid_post", 0)
    assert torch.equal(tiny_lm.read(SENTENCE, site, edits=[edit])[site], tiny_lm.read(SENTENCE, site)[site] + 2.0)


# ---- generation


def test_greedy_equals_transformers_and_the_argmax_on_the_whole_text(any_lm):
    ids = any_lm.tokenize(SENTENCE).ids
    written = any_lm.generate(SENTENCE, max_new_tokens=12)
    end = any_lm.tokenizer.eos_token_id
    expected = any_lm._module.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=end, pad_token_id=0)
    assert written == any_lm.tokenizer.decode(expected[0], skip_special_tokens=True)
    assert written.startswith(SENTENCE) and len(written) > len(SENTENCE)
    whole = any_lm.logits(expected)[0].argmax(-1)
    assert torch.equal(whole[ids.shape[1] - 1 : -1], expected[0, ids.shape[1] :])


def test_edited_greedy_equals_the_edited_argmax_on_the_whole_text(any_lm):
    edit = Add(Site("resid_post", 1), 20 * torch.randn(48, generator=torch.Generator().manual_seed(0)))
    ids = any_lm.tokenize(SENTENCE).ids
    for _ in range(8):
        step = any_lm.logits(ids, edits=[edit])[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, step], dim=1)
    written = any_lm.generate(SENTENCE, edits=[edit], max_new_tokens=8)
    assert written == any_lm.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert written != any_lm.generate(SENTENCE, max_new_tokens=8)


def test_rows_of_a_batch_generate_what_they_generate_alone(tiny_lm):
    prompts = [*PROMPTS, "No."]  # two of one length, two of others
    assert tiny_lm.generate(prompts, max_new_tokens=6) == [tiny_lm.generate(p, max_new_tokens=6) for p in prompts]


def test_sampling_is_seeded(tiny_lm):
    def sample(seed):
        return tiny_lm.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=seed)

    torch.manual_seed(0)
    first = sample(3)
    torch.manual_seed(1)  # the seed argument alone decides
    assert sample(3) == first
    assert sample(4) != first


def test_sampling_follows_the_temperature(tiny_lm):
    cold = tiny_lm.generate(SENTENCE, max_new_tokens=6, temperature=1e-4, seed=0)
    assert cold == tiny_lm.generate(SENTENCE, max_new_tokens=6)


def test_generation_ends_at_the_models_end_token(lm):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = lm.tokenize(chat).ids
    expected = lm._module.generate(ids, do_sample=False, max_new_tokens=12)
    assert expected[0, -1] == lm.tokenizer.eos_token_id, "this prompt must end early for the test to mean anything"
    assert lm.generate(chat, max_new_tokens=12) == lm.tokenizer.decode(expected[0], skip_special_tokens=True)


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}])
def test_generate_refuses(tiny_lm, bad):
    words = r"max_new_tokens >= 1 and temperature >= 0, got|temperature must be a number, got nan"
    with pytest.raises(ValueError, match=words):
        tiny_lm.generate(SENTENCE, **bad)


# ---- what it is


def test_what_it_says_of_itself(tiny_lm):
    assert tiny_lm.n_layers == 3
    assert tiny_lm.max_length == 256
    assert tiny_lm.width("layers.2") == 48
    assert repr(tiny_lm) == "LM('LlamaForCausalLM', layers=3, prefix='<|im_start|>', device='cpu')"
    assert tiny_lm.mask() == TokenMask(tuple(sorted(tiny_lm.tokenizer.all_special_ids)), skip_first=True)


def test_the_bundled_model(lm):
    assert lm.id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (lm.n_layers, lm.width(Site("resid_post", 8)), lm.prefix_id) == (30, 576, 0)
    assert "prefix='<|endoftext|>'" in repr(lm)
    assert " Paris" in lm.generate("The capital of France is", max_new_tokens=4)
    # The norm at position 0 is the attention sink the token mask is there for: six medians, measured.
    norms = lm.read(SENTENCE, Site("resid_post", 8))["layers.8"][0].norm(dim=-1)
    assert norms[0] > 4 * norms.median()


def test_prefix_policies(make_tiny):
    assert make_tiny("llama").tokenize("a").ids[0, 0] == 1  # the tokenizer's BOS
    assert make_tiny("llama", prefix=7).tokenize("a").ids.tolist() == [[7, 81]]
    bare = make_tiny("llama", prefix=None)
    assert bare.tokenize("a").ids.tolist() == [[81]]
    assert bare.prefix_id is None and "prefix=none" in repr(bare)
    with pytest.raises(ValueError, match=r"prefix must be 'auto', None, or a token id in 0\.\.49151, got 'bos'"):
        make_tiny("llama", prefix="bos")
    with pytest.raises(ValueError, match="got 49152"):
        make_tiny("llama", prefix=49152)


def test_the_fingerprint_changes_with_any_one_weight(make_module, tokenizer):
    module = make_module("llama").bfloat16()  # two bytes a weight: an odd count leaves some over at the end
    module.model.norm.weight = torch.nn.Parameter(module.model.norm.weight.data[:47].clone())
    module.model.norm.forward = lambda x: x
    lm = sl.LM(module, tokenizer=tokenizer)
    first = lm.fingerprint()
    assert lm.fingerprint() == first
    for p in (module.model.norm.weight, module.lm_head.weight, module.model.layers[1].mlp.up_proj.weight):
        for at in (0, p.numel() // 2, p.numel() - 1):
            flat = p.data.view(-1)
            before = flat[at].clone()
            flat[at] += 1
            assert lm.fingerprint() != first
            flat[at] = before
    assert lm.fingerprint() == first


def test_the_fingerprint_of_weights_that_are_made_of_others(make_module, tokenizer):
    """As torchao's quantised weights are."""
    module, part = make_module("llama"), torch.zeros(3, 4)
    module.model.more = torch.nn.Parameter(TwoTensor(torch.zeros(3, 4), part), requires_grad=False)
    lm = sl.LM(module, tokenizer=tokenizer)
    first = lm.fingerprint()
    part[0, 0] = 1
    assert lm.fingerprint() != first


def test_two_threads(tiny_lm):
    site = Site("resid_post", 1)
    expected = [tiny_lm.read(p, site)[site] for p in PROMPTS]
    wrong = []

    def work():
        for _ in range(10):
            for prompt, x in zip(PROMPTS, expected, strict=True):
                try:
                    if not torch.equal(tiny_lm.read(prompt, site)[site], x):
                        wrong.append(prompt)
                except Exception as err:
                    wrong.append(err)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failed_run_leaves_the_model_usable(tiny_lm):
    site = Site("resid_post", 1)
    before = tiny_lm.read(SENTENCE, site)[site]

    def fail(x, tokens):
        raise RuntimeError("an edit with a fault")

    with pytest.raises(RuntimeError, match="an edit with a fault"):
        tiny_lm.run(tiny_lm.tokenize(SENTENCE), writes=[Write(site, fail)])
    assert torch.equal(tiny_lm.read(SENTENCE, site)[site], before)


# ---- prompts


def test_kinds_of_prompts_agree(tiny_lm):
    batch = tiny_lm.tokenize(SENTENCE)
    ids = batch.ids[0].tolist()
    expected = tiny_lm.logits(SENTENCE)
    for prompts in ([SENTENCE], ids, [ids], tuple(ids), batch.ids, batch.ids[0], batch):
        assert torch.equal(tiny_lm.logits(prompts), expected)
    assert isinstance(tiny_lm.generate(ids, max_new_tokens=1), str)
    assert isinstance(tiny_lm.generate([ids], max_new_tokens=1), list)


def test_prompts_that_are_refused(tiny_lm, make_tiny):
    with pytest.raises(ValueError, match=r"a prompt has 300 tokens and this model reads at most 256: split or shorten"):
        tiny_lm.logits([[5] * 300])
    for nothing in ([], [[]], ["a", []]):
        with pytest.raises(ValueError, match=r"no prompts: the list is empty|prompt 0 has no tokens|of one kind"):
            tiny_lm.read(nothing, Site("embed"))
    with pytest.raises(ValueError, match=r"prompt 1 has no tokens: pass some text, or a prefix token"):
        make_tiny("llama", prefix=None).logits(["a", ""])
    for bad in ([[49152]], [[-1, 3]]):
        with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.49151, got"):
            tiny_lm.logits(bad)
    for mixed in (["a", [1, 2]], [[1, 2], "a"], [[1], [{"role": "user", "content": "a"}]]):
        with pytest.raises(ValueError, match="or a list of one kind"):
            tiny_lm.logits(mixed)
    with pytest.raises(ValueError, match=r"integer tensor \(pos\) or \(batch, pos\), got \(3,\)"):
        tiny_lm.logits(torch.zeros(3))
    with pytest.raises(ValueError, match="a loss needs at least two tokens"):
        tiny_lm.loss([[5]])


def test_an_empty_prompt_is_the_prefix_alone(tiny_lm):
    assert tiny_lm.tokenize("").ids.tolist() == [[1]]
    assert tiny_lm.logits("").shape[:2] == (1, 1)


# ---- loading


def test_loading_is_refused(make_module, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"needs its tokenizer: sl\.LM\(module, tokenizer="):
        sl.LM(make_module("llama"))
    with pytest.raises(ValueError, match="sae_lab never sets trust_remote_code"):
        sl.LM("any/model", trust_remote_code=True)
    with pytest.raises(ValueError, match="dtype and from_pretrained's arguments do not apply to a loaded model"):
        sl.LM(make_module("llama"), tokenizer=tokenizer, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"no model at '/no/such/folder': pass a hub id, a folder with config.json"):
        sl.LM("/no/such/folder")
    with pytest.raises(ValueError, match=f"no model at '{tmp_path}'"):  # a folder with nothing in it
        sl.LM(str(tmp_path))


def test_a_folder(make_module, tokenizer, tmp_path):
    module = make_module("qwen3", len(tokenizer))
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = sl.LM(str(tmp_path))
    assert lm.id == str(tmp_path)
    assert close(lm.logits(SENTENCE), sl.LM(module, tokenizer=tokenizer).logits(SENTENCE), 1e-6)
    half = sl.LM(str(tmp_path), dtype=torch.bfloat16)
    assert next(half._module.parameters()).dtype == torch.bfloat16
    assert half.read(SENTENCE, Site("resid_post", 1))["layers.1"].dtype == torch.float32


# ---- the way out


def test_the_lens_is_the_models_own_way_out(any_lm):
    """Fed to the model's final norm and unembedding alone, a direction gives its lens, divided by the norm's scale."""
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    assert close(any_lm.lens(x, Site("resid_post", 1)), way_out(any_lm, x))
    assert torch.equal(any_lm.lens(x, "blocks.0.hook_mlp_out"), any_lm.lens(x, Site("embed")))
    assert any_lm.lens(x, Site("mlp_in", 1)) is None


def test_the_lens_of_a_head_goes_through_w_o(request, any_lm):
    name = request.node.callspec.params["any_lm"]
    for site in (Site("attn_z", 1), Site("attn_z", 1, head=2)):
        z = torch.randn(5, any_lm.width(site), generator=torch.Generator().manual_seed(0))
        whole = torch.zeros(5, any_lm.width(Site("attn_z", 1)))
        whole[:, 2 * z.shape[1] : 3 * z.shape[1]] = z if site.head else 0
        whole = whole if site.head else z
        block = next(m for p, m in any_lm._module.named_modules() if p.endswith((".layers.1", ".h.1")))
        w_o = {"gpt2": "attn.c_proj", "neox": "attention.dense", "neox_serial": "attention.dense"}
        output = block.get_submodule(w_o.get(name, "self_attn.o_proj"))
        with torch.no_grad():
            written = output(whole) - output(torch.zeros_like(whole))
            if name in ("gemma3", "olmo2"):  # these norm what attention adds
                norm = block.post_attention_layernorm
                written = norm(written) * rms(written)
        assert close(any_lm.lens(z, site), way_out(any_lm, written))


def test_the_lens_by_hand(tiny):
    gemma, gpt2 = tiny["gemma3"], tiny["gpt2"]
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    w = gemma._module.model.norm.weight
    assert close(gemma.lens(x, Site("embed")), (x * (1 + w)) @ gemma._module.lm_head.weight.T)
    w, centred = gpt2._module.transformer.ln_f.weight, x - x.mean(-1, keepdim=True)
    assert close(gpt2.lens(x, Site("embed")), (centred * w) @ gpt2._module.lm_head.weight.T)


def rms(x):
    return (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def way_out(lm, x):
    module = lm._module
    base = module.base_model
    norm = next(getattr(base, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(base, n))
    centred = x - x.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else x
    with torch.no_grad():
        bias = norm(torch.zeros_like(x))
        return module.get_output_embeddings()((norm(x) - bias) * rms(centred))


def test_token_batches_pass_as_they_are(tiny_lm):
    ids = torch.tensor([[1, 5, 6]])
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(3)[None])
    assert tiny_lm.tokenize(batch) is batch
