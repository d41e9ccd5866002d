"""Formats of single releases: Llama Scope (``hyperparams.json``); Goodfire, Qwen Scope and gpt2-small-hook-z (one
``.pt`` file each)."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lab.saes.exchange.checkpoint import Checkpoint
from sae_lab.saes.exchange.files import read_json, read_safetensors, read_torch, tensors_only
from sae_lab.saes.exchange.places import place

LLAMA_CONFIG, LLAMA_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def read_llama_scope(folder: Path, facts: dict[str, Any]) -> Checkpoint:
    """JumpReLU on s·x, s = √d_in / mean norm. Codes come in those units, as SAELens gives them. The threshold is in
    units of x (its authors fold s into the biases and the decoder, not into the encoder), so it grows by s."""
    cfg = read_json(folder / LLAMA_CONFIG)
    if cfg.get("act_fn", "jumprelu") != "jumprelu" or cfg.get("apply_decoder_bias_to_pre_encoder"):
        raise ValueError(
            f"{folder}: Llama Scope with act_fn {cfg.get('act_fn')!r} or a pre-encoder bias is not supported; "
            "supported: 'jumprelu' without"
        )
    for key in ("d_model", "jump_relu_threshold", "dataset_average_activation_norm", "hook_point_in"):
        if key not in cfg:
            raise ValueError(f"{folder / LLAMA_CONFIG} has no {key!r}")
    tensors = _linear(read_safetensors(folder / LLAMA_WEIGHTS), folder / LLAMA_WEIGHTS)
    found = Checkpoint("Llama Scope", str(folder), "JumpReLU", tensors, pre_bias=False)
    norms = cfg["dataset_average_activation_norm"]
    into, out = (cfg["d_model"] ** 0.5 / norms[end] for end in ("in", "out"))
    tensors["threshold"] = torch.full((tensors["W_enc"].shape[1],), cfg["jump_relu_threshold"] * into)
    found.scale(into, out)
    found.model = facts.get("model") or "meta-llama/Llama-3.1-8B"
    found.reads = place(cfg["hook_point_in"], found.model)
    hook_out = cfg.get("hook_point_out", cfg["hook_point_in"])
    found.transcodes = hook_out != cfg["hook_point_in"]
    found.writes = place(hook_out, found.model) if found.transcodes else None
    found.meta["context"] = 1024
    return found


def read_file(file: Path, facts: dict[str, Any]) -> Checkpoint:
    """One ``.pt`` file; its tensors' names tell which. Codes of the first two are ReLU, without a pre-bias."""
    tensors = tensors_only(read_torch(file), file)
    names = tensors.keys()
    if names == {n.replace("coder.", "coder_linear.") for n in _LINEAR}:
        return _goodfire({n.replace("_linear", ""): t for n, t in tensors.items()}, file, facts)
    if names == set(_LINEAR):
        return _goodfire(tensors, file, facts)
    if names == {"W_enc", "W_dec", "b_enc", "b_dec"}:
        config = file.with_name(file.stem + "_cfg.json")
        return _hook_z(tensors, file, read_json(config)) if config.is_file() else _qwen(tensors, file, facts)
    raise ValueError(
        f"{file} holds the tensors {sorted(names)}, which no single-file format here has; supported: Goodfire, "
        "Qwen Scope, gpt2-small-hook-z. For dictionary_learning pass the folder with ae.pt and config.json"
    )


def _linear(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    if missing := [name for name in _LINEAR if name not in tensors]:
        raise ValueError(f"{file} must hold {list(_LINEAR)}; missing: {missing}")
    w_enc, b_enc, w_dec, b_dec = (tensors[name].float() for name in _LINEAR)
    return {"W_enc": w_enc.T, "b_enc": b_enc, "W_dec": w_dec.T, "b_dec": b_dec}


def _goodfire(tensors: dict[str, Tensor], file: Path, facts: dict[str, Any]) -> Checkpoint:
    found = Checkpoint("Goodfire", str(file), "L1", _linear(tensors, file), pre_bias=False)
    named = re.fullmatch(r"(.+)-SAE-l(\d+)", file.stem)
    makers = {"Llama": "meta-llama/", "DeepSeek": "deepseek-ai/"}
    if named:
        found.model = makers.get(named[1].split("-")[0], "") + named[1]
        found.reads = place(f"blocks.{named[2]}.hook_resid_post", found.model)
    if "l0" in facts:
        found.expected["l0"] = facts["l0"]
    return found


def _qwen(tensors: dict[str, Tensor], file: Path, facts: dict[str, Any]) -> Checkpoint:
    """TopK; W_enc is stored "d_sae d_in" and W_dec "d_in d_sae". k stands in the repository's name only."""
    path = facts.get("path") or file.as_posix()
    k = re.search(r"L0_(\d+)", path)
    if k is None:
        raise ValueError(
            f"{file}: a Qwen Scope coder's k stands only in its repository's name (…-L0_50): load it by release or "
            "repository, or keep it in a folder of that name"
        )
    t = {n: v.float().T if n.startswith("W_") else v.float() for n, v in tensors.items()}
    found = Checkpoint("Qwen Scope", str(file), "TopK", t, pre_bias=False)
    found.config["k"], found.expected["l0"] = found.checked_k(int(k[1])), float(k[1])
    named, layer = re.search(r"SAE-Res-(.+)-W\d+K", path), re.search(r"layer(\d+)", file.name)
    found.model = f"Qwen/{named[1]}" if named else facts.get("model")
    found.reads = place(f"model.layers.{layer[1]}", found.model) if layer else None
    return found


def _hook_z(tensors: dict[str, Tensor], file: Path, cfg: dict[str, Any]) -> Checkpoint:
    t = {n: v.float() for n, v in tensors.items()}
    found = Checkpoint("hook_z", str(file), "L1", t, pre_bias=True, model="gpt2")
    found.reads = place(cfg.get("act_name"), "gpt2")
    found.meta["context"] = 128
    return found
