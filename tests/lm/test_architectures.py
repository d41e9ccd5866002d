"""Tiny models of every architecture: right in everything, by plain PyTorch hooks."""

import torch
from tiny_models import NAMES, UNBUILT, VOCAB, build, tokenizer


def test_every_architecture_has_a_tiny_model():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    assert set(known) <= set(NAMES) and set(UNBUILT) <= set(NAMES)
    for name in ("llama", "gpt_neox:serial", "opt:350m"):
        module = build(name)
        with torch.no_grad():
            logits = module(input_ids=torch.arange(12)[None]).logits
        assert logits.shape == (1, 12, VOCAB)
    assert tokenizer().decode(tokenizer()("à la carte")["input_ids"]) == "à la carte"
