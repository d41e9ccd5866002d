"""Tiny models of the most used architectures: right in everything, by plain PyTorch hooks (``make models``: all)."""

import pytest
import torch
from checking_models import check
from tiny_models import NAMES, UNBUILT, VOCAB, build, tokenizer

import sae_lab as sl

MOST_USED = [
    "bloom", "cohere", "deepseek_v3", "falcon", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neo", "gpt_neox",
    "gpt_oss", "gptj", "granite", "jamba", "llama", "mamba2", "mistral", "mixtral", "mpt", "olmo2", "opt", "phi",
    "qwen2", "qwen3_next",
]  # fmt: skip


def test_every_architecture_has_a_tiny_model():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    assert set(known) <= set(NAMES) and set(UNBUILT) <= set(NAMES)
    for name in ("llama", "gpt_neox:serial", "opt:350m"):
        module = build(name)
        with torch.no_grad():
            logits = module(input_ids=torch.arange(12)[None]).logits
        assert logits.shape == (1, 12, VOCAB)
    assert tokenizer().decode(tokenizer()("à la carte")["input_ids"]) == "à la carte"


@pytest.mark.parametrize("name", MOST_USED)
def test_an_architecture_is_right_in_everything(name):
    result = check(name)
    assert result.verdict == "right", [f for f in result.findings if f.kind != "refused"]
    assert {"embed", "resid_pre", "resid_post"} <= set(result.kinds)
    if result.attention:
        assert {"attn_z", "attn_out"} <= set(result.kinds)


def test_encoders_are_refused():
    result = check("bert")
    assert result.verdict == "refused" and "causal" in result.whole


def louder(read):
    def wrong(self, prompts, at, edits=()):
        reading = read(self, prompts, at, edits)
        for site, x in reading.items():
            x *= 1.01 if site.kind == "attn_out" else 1
        return reading

    return wrong


def one_early(generate):
    return lambda self, *args, max_new_tokens=8, **kwargs: generate(self, *args, max_new_tokens=max_new_tokens - 1)


def steeper(gradient):
    return lambda self, *args: 1.01 * gradient(self, *args)


def half(logits):
    def wrong(self, prompts, edits=()):
        return (logits(self, prompts, edits) + logits(self, prompts)) / 2

    return wrong


def uncentred(lens):
    return lambda self, x, at: lens(self, x + 1, at)


def unclear(generate):
    def wrong(self, *args, **kwargs):
        raise IndexError("list index out of range")

    return wrong


@pytest.mark.parametrize(
    ("method", "planted", "verdict", "part"),
    [("read", louder, "WRONG", "reads"), ("generate", one_early, "WRONG", "generation"),
     ("lens", uncentred, "WRONG", "lens"), ("gradient", steeper, "WRONG", "gradients"),
     ("logits", half, "WRONG", "edits"), ("generate", unclear, "UNCLEAR", "generation")],
)  # fmt: skip
def test_a_planted_fault_is_found(monkeypatch, method, planted, verdict, part):
    monkeypatch.setattr(sl.LM, method, planted(getattr(sl.LM, method)))
    assert check("llama", (part,)).verdict == verdict
