"""A tiny random model of every text architecture that the installed transformers maps to a causal LM.

    from tiny_models import NAMES, build, tokenizer       # a test finds this module by itself
    module = build("llama")                               # a transformers model in eval mode, 4 layers, d=48
    lm = sl.LM(module, tokenizer=tokenizer(), device="cpu")

A name is transformers' model type, or that with a variant of a big switch: "gpt_neox:serial", "opt:350m". ``NAMES`` has
all of them, ``UNBUILT`` those of them that cannot be built here, with the reason.

All get one common set of arguments, each config class the ones it has, and small changes by name (``CHANGES``). Their
weights are drawn so that every part matters: gains, biases and scalars lie away from 0 and 1. A fresh model's own would
let a wrong norm, multiplier or gain go unnoticed.

The tokenizer has one token for each byte.
"""

import dataclasses
import warnings
from functools import cache
from typing import Any

import torch
from torch import nn

LAYERS, HEADS, D, D_HEAD, VOCAB = 4, 4, 48, 12, 264
FULL_LINEAR = ["linear_attention", "full_attention"] * (LAYERS // 2)
LINEAR_LAST = ["full_attention", "linear_attention"] * (LAYERS // 2)

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": 2 * D, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": D_HEAD, "max_position_embeddings": 256,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "sliding_window": 8, "query_pre_attn_scalar": D_HEAD, "n_inner": 2 * D, "ffn_dim": 2 * D,
    # scalars that are 1 by default
    "residual_multiplier": 0.6, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.3,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": D_HEAD,
    "index_n_heads": 16, "index_head_dim": 8, "index_topk": 6,  # so many that no two tokens tie at 0
    # linear attention and state spaces
    "linear_num_value_heads": HEADS, "linear_num_key_heads": 2, "linear_key_head_dim": D_HEAD,
    "linear_value_head_dim": D_HEAD, "mamba_n_heads": HEADS, "mamba_d_head": 2 * D // HEADS, "mamba_d_state": 8,
    "mamba_n_groups": 1, "mamba_chunk_size": 8, "mamba_dt_rank": 4, "chunk_size": 8, "state_size": 4,
    "use_mamba_kernels": False, "attention_hidden_size": D,
    # encoders with decoders
    "encoder_layers": 2, "encoder_attention_heads": HEADS, "encoder_ffn_dim": 2 * D, "decoder_layers": LAYERS,
    "decoder_attention_heads": HEADS, "decoder_ffn_dim": 2 * D,
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LATENT = {"num_key_value_heads": HEADS, "head_dim": 4}
# What differs from the common arguments, by name; None takes an argument away. A variant has its model's changes too.
CHANGES: dict[str, dict[str, Any]] = {
    "axk1": LATENT, "axk2": LATENT, "deepseek_v2": LATENT, "deepseek_v3": LATENT, "deepseek_v32": LATENT,
    "glm4_moe_lite": LATENT, "glm_moe_dsa": LATENT, "minicpm3": LATENT, "youtu": LATENT,
    "bailing_hybrid": {**LATENT, "head_dim": D_HEAD, "layer_group_size": 2},
    "kimi_linear": {**LATENT, "linear_head_dim": D_HEAD, "linear_num_heads": HEADS, "layer_types": FULL_LINEAR},
    "longcat_flash": {**LATENT, "ffn_hidden_size": 2 * D, "expert_ffn_hidden_size": 32, "zero_expert_num": 2,
                      "num_layers": LAYERS // 2},
    "camembert": IDS, "cwm": IDS, "data2vec-text": IDS, "modernbert-decoder": {**IDS, "local_attention": 8},
    "roberta": IDS, "roberta-prelayernorm": IDS, "xlm-roberta": IDS, "xlm-roberta-xl": IDS, "xlm": IDS,
    "prophetnet": {**IDS, "num_encoder_layers": 2, "num_decoder_layers": LAYERS, "num_encoder_attention_heads": HEADS,
                   "num_decoder_attention_heads": HEADS},
    "xmod": {**IDS, "default_language": "en_XX"},
    "roc_bert": {"shape_embed_dim": 16, "pronunciation_embed_dim": 16, "shape_vocab_size": 40,
                 "pronunciation_vocab_size": 40},
    "blt": {"encoder_hash_byte_group_vocab": 50, "patcher_config": {"vocab_size": VOCAB},
            "encoder_config": {"vocab_size": VOCAB, "hidden_size_global": 32},
            "decoder_config": {"vocab_size": VOCAB, "hidden_size_global": 32, "num_hidden_layers": LAYERS},
            "global_config": {"hidden_size": 32, "num_hidden_layers": LAYERS}},
    "codegen": {"rotary_dim": 6}, "gptj": {"rotary_dim": 6},
    "cpmant": {"dim_head": D_HEAD, "dim_ff": 2 * D, "position_bias_num_buckets": 16, "position_bias_max_distance": 64},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2,
                            "rope_parameters": {"sliding_attention": ROPE, "full_attention": None}},
    "ctrl": {"dff": 2 * D},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": D, "ffn_hidden_size": 32, "moe_top_k": 2}},
    "emu3": {"text_config": IDS},
    "falcon_h1": {"mamba_d_ssm": D, "mamba_d_head": D_HEAD},
    "gemma3n_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
                     "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "gemma4": {"text_config": IDS},
    "gemma4_assistant": {"text_config": {"vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0,
                                         "num_kv_shared_layers": LAYERS}},
    "gemma4_unified": {"text_config": IDS,
                       "vision_config": {"mm_embed_dim": 16, "mm_posemb_size": 16, "output_proj_dims": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]], "window_size": 8},
    "granitemoehybrid": {"layer_types": FULL_LINEAR},
    "inkling_text": {"swa_num_attention_heads": HEADS, "swa_num_key_value_heads": 2, "swa_head_dim": D_HEAD,
                     "sliding_window_size": 8, "d_rel": 8, "rel_extent": 16,
                     "layer_types": ["hybrid_sliding", "hybrid"] * 2, "mlp_layer_types": ["dense"] + ["sparse"] * 3,
                     "logits_mup_width_multiplier": 2.0},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": D_HEAD, "n_groups": 2},
    "mllama": {"text_config": IDS},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 24, "n_groups": 2, "ssm_state_size": 8,
                   "moe_shared_expert_intermediate_size": 32, "num_hidden_layers": None},
    "olmo_hybrid": {"layer_types": FULL_LINEAR}, "qwen3_next": {"layer_types": FULL_LINEAR},
    "qwen3_5_text": {"layer_types": FULL_LINEAR}, "qwen3_5_moe_text": {"layer_types": FULL_LINEAR},
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 16, "ext_pw_out_channel": 16,
                                         "depthwise_separable_out_channel": 16}},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 2, "hc_count": 2, "hc_lowrank": 8, "split_ngram_parts": 1,
                       "ngram_vocab_size_base": 500},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 32],
                 "attention_head_size": D_HEAD, "feed_forward_size": 2 * D, "attn_layers": ["local"] * LAYERS},
    "stablelm": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
              "num_hidden_layers": 5, "attention_hidden_size": 2 * D, "head_dim": 24, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "kolibri1": {"moe_intermediate_size": 32},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt_neox:serial": {"use_parallel_residual": False},
    "stablelm:parallel": {"use_parallel_residual": True},
    "falcon:new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon:serial": {"parallel_attn": False, "alibi": True, "bias": True, "multi_query": False},
    "opt:350m": {"word_embed_proj_dim": D // 2, "do_layer_norm_before": False},
    "granitemoehybrid:attention first": {"layer_types": LINEAR_LAST},
    "qwen3_next:attention first": {"layer_types": LINEAR_LAST},
    "olmo_hybrid:attention first": {"layer_types": LINEAR_LAST},
    "jamba:attention first": {"attn_layer_offset": 0},
    "bamba:attention first": {"attn_layer_indices": [0, 2]},
    "lfm2:attention first": {"layer_types": ["full_attention", "conv"] * 2},
    "minimax:attention first": {"layer_types": LINEAR_LAST},
    "phi:qk norm": {"qk_layernorm": True},
    "stablelm:qk norm": {"qk_layernorm": True},
    "cohere:qk norm": {"use_qk_norm": True},
    "gpt2:scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode:many heads": {"multi_query": False},
    "mpt:learned positions": {"attn_config": {"alibi": False}},
    "gemma2:tied to one window": {"layer_types": ["full_attention"] * LAYERS},
    "llama:tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "gemma3n_text:shared keys": {"num_kv_shared_layers": 2},
    "gemma4_text:experts": {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0},
    "bert:decoder": {"is_decoder": True},
}
# Those that transformers does not run from text alone, or not without a package that is not here.
UNBUILT = {
    "gemma3n": "its image tower needs the package timm (the text model is gemma3n_text)",
    "gemma4_assistant": "it drafts for another model, whose keys and values it is given; it takes no token ids alone",
    "gemma4_unified_assistant": "it drafts for another model, whose keys and values it is given",
    "musicgen": "transformers makes no causal LM of its config (it generates audio codes)",
    "musicgen_melody": "transformers makes no causal LM of its config (it generates audio codes)",
}
# Of the towers that multimodal models have beside the text model.
TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "depth": 2,
    "num_heads": 2, "embed_dim": 16, "image_size": 28, "patch_size": 14, "num_channels": 3, "in_channels": 3,
    "out_hidden_size": D, "output_channels": 16, "projection_dim": 16, "encoder_layers": 2, "d_model": 16,
    "num_key_value_heads": 2, "head_dim": 8, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "vision_output_dim": 16,
    "num_global_layers": 1, "attention_heads": 2,
}  # fmt: skip


def _names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    return [*known, *(name for name in VARIANTS if name.split(":")[0] in known)]


NAMES = _names()


def arguments(config_class: Any, common: dict[str, Any]) -> dict[str, Any]:
    """Those of the common arguments that a config class has, by its own names."""
    fields, own = {field.name for field in dataclasses.fields(config_class)}, {}
    for name, value in common.items():
        name = name if name in fields else config_class.attribute_map.get(name, name)
        if name in fields:
            own.setdefault(name, value)
    for part, spec in getattr(config_class, "sub_configs_defaults", {}).items():
        own[part] = _part(part, spec)
    return own


def _part(name: str, spec: Any) -> dict[str, Any]:
    """The arguments of a config within a config: another text model's, or a tower's."""
    from transformers import CONFIG_MAPPING

    kind = getattr(spec, "model_type", None)
    part = CONFIG_MAPPING[kind] if kind else getattr(spec, "config_class", spec)
    text = name in ("text_config", "decoder", "text_encoder") or name.endswith("depth_decoder_config")
    own = arguments(part, COMMON if text else TOWER)
    own |= CHANGES.get(part.model_type, {}) if text else {}
    return own | ({"model_type": kind} if kind else {})


def config(name: str, **changes: Any) -> Any:
    """The transformers config of a tiny model."""
    from transformers import CONFIG_MAPPING

    kind = name.split(":")[0]
    config_class = CONFIG_MAPPING[kind]
    own = arguments(config_class, COMMON)
    changes = CHANGES.get(kind, {}) | VARIANTS.get(name, {}) | changes
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(own.get(key), dict)
        own[key] = own[key] | value if both else value
    return config_class(**{k: v for k, v in own.items() if not (k in changes and v is None)})


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """The model, in eval mode, with eager attention where it has a choice. changes: to its config's arguments."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        own = config(name, **changes)
        module = AutoModelForCausalLM.from_config(own, attn_implementation="eager")
    draw(module, seed + 1)
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(module.generation_config, key, None)
    return module.eval()


@torch.no_grad()
def draw(module: nn.Module, seed: int = 0) -> None:
    """Weights so large that every part matters, and nothing left at 0 or 1: gains, biases, single scalars."""
    generator = torch.Generator().manual_seed(seed)

    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator)

    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, x in module.named_parameters():
        if id(x) in tables:
            x.copy_(0.7 * noise(x))
        elif x.dim() >= 2 and not name.endswith("A_log"):
            x.copy_(1.5 * noise(x) / max(x.shape[-2:]) ** 0.5)
        elif "dt_" in name or name.endswith(("A_log", "_decay")):
            continue  # rates: other values make a state explode or vanish
        else:
            x.add_(0.3 * noise(x))
    for name, x in module.named_buffers():
        if x.numel() == 1 and x.is_floating_point() and "scal" in name.rsplit(".", 1)[-1]:
            x.fill_(0.6 + 0.2 * float(torch.rand((), generator=generator)))


@cache
def tokenizer() -> Any:
    """Padding, begin, end, a spare one, then one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<pad>", "<s>", "</s>", "<spare>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
