"""Formats of single releases: Llama Scope (``hyperparams.json``); and coders that are one file each: Goodfire, Qwen
Scope and gpt2-small-hook-z (``.pt``), circuit-tracer's transcoders (``layer_5.safetensors``, beside ``config.yaml``).
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lab.saes.io import dictionary_learning, gemma_scope
from sae_lab.saes.io.foreign import Checkpoint
from sae_lab.saes.io.layouts import floats, must_hold, peek, read_file, refuse_layered
from sae_lab.saes.io.places import place

LLAMA_CONFIG, LLAMA_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_PLAIN, _THRESHOLD = {"W_enc", "W_dec", "b_enc", "b_dec"}, "activation_function.threshold"
TRACER_CONFIG = "config.yaml"


def read_llama_scope(folder: Path, facts: dict[str, Any]) -> Checkpoint:
    """JumpReLU on s·x, s = √d_in / mean norm. Codes come in those units, as SAELens gives them. The threshold is in
    units of x (its authors fold s into the biases and the decoder, not into the encoder), so it grows by s."""
    cfg = read_file(folder / LLAMA_CONFIG)
    if cfg.get("act_fn", "jumprelu") != "jumprelu" or cfg.get("apply_decoder_bias_to_pre_encoder"):
        raise ValueError(
            f"{folder}: Llama Scope with act_fn {cfg.get('act_fn')!r} or a pre-encoder bias is not supported; "
            "supported: 'jumprelu' without"
        )
    keys = ("d_model", "jump_relu_threshold", "dataset_average_activation_norm", "hook_point_in")
    must_hold(cfg, keys, folder / LLAMA_CONFIG, may=cfg)
    tensors = _linear(read_file(folder / LLAMA_WEIGHTS), folder / LLAMA_WEIGHTS)
    found = Checkpoint("Llama Scope", str(folder), "JumpReLU", tensors, pre_bias=False)
    norms = cfg["dataset_average_activation_norm"]
    into, out = (cfg["d_model"] ** 0.5 / norms[end] for end in ("in", "out"))
    tensors["threshold"] = torch.full((tensors["W_enc"].shape[1],), cfg["jump_relu_threshold"] * into)
    found.scale(into, out)
    found.between(cfg["hook_point_in"], cfg.get("hook_point_out"), facts.get("model") or "meta-llama/Llama-3.1-8B")
    found.meta["context"] = 1024
    return found


def read_single(file: Path, facts: dict[str, Any]) -> Checkpoint:
    """One file of weights; its tensors' names and axes tell which."""
    content = read_file(file)
    refuse_layered(file, content)
    if file.suffix == ".npz" and {*content, *(n.replace("w_", "W_") for n in content)} >= gemma_scope.NAMES:
        return gemma_scope.read_1(file, facts)
    if content.keys() >= {"w_enc", "w_dec", "threshold"}:
        return gemma_scope.read_2(file, facts)
    goodfire = {n.replace("_linear", ""): t for n, t in content.items()}
    if goodfire.keys() == set(_LINEAR) and (content.keys() != set(_LINEAR) or not dictionary_learning.config_of(file)):
        return _goodfire(goodfire, file, facts)
    if dictionary_learning.fits(content):
        return dictionary_learning.read(file, facts)
    if content.keys() - {"W_skip", _THRESHOLD} == _PLAIN:
        tensors = floats(content, file)
        turned = tensors["W_enc"].shape[:1] == tensors["b_enc"].shape
        if file.suffix == ".safetensors":
            return _tracer(tensors, file, facts)
        if content.keys() == _PLAIN:
            return _qwen(tensors, file, facts) if turned else _hook_z(tensors, file, facts)
    raise ValueError(
        f"{file} holds the tensors {sorted(map(str, content))}, which no format of one file here has; supported: "
        "Goodfire, Qwen Scope, gpt2-small-hook-z, circuit-tracer, Gemma Scope, dictionary_learning. For other formats "
        "pass the folder, with its config"
    )


def refuse_parts(files: list[Path]) -> None:
    """ValueError where files beside each other are one crosscoder or cross-layer transcoder."""
    several = [f for f in files if re.fullmatch(r"params_layer_\d+", f.stem)]
    if several:
        raise ValueError(
            f"{files[0].parent} holds a crosscoder or a cross-layer transcoder (CLT), whose files for each layer "
            "belong together: sl.load takes coders that read one place and write at one"
        )
    if len({re.sub(r"\d+", "", f.stem) for f in files}) <= 2:  # a set: encoders and decoders, say
        refuse_layered(files[0].parent, peek(files[0]))


def _linear(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    must_hold(tensors, _LINEAR, file, may=tensors)
    w_enc, b_enc, w_dec, b_dec = (floats(tensors, file)[name] for name in _LINEAR)
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
    path = facts.get("path") or file.absolute().as_posix()
    named = re.search(r"L0_(\d+)", path)
    k = facts.get("k") or (int(named[1]) if named else None)
    if k is None:
        raise ValueError(
            f"{file}: a Qwen Scope coder's k stands only in its repository's name (…-L0_50): pass k=, load it by "
            "release or repository, or keep it in a folder of that name"
        )
    t = {n: v.T if n.startswith("W_") else v for n, v in tensors.items()}
    found = Checkpoint("Qwen Scope", str(file), "TopK", t, pre_bias=False)
    found.used.add("k")
    found.config["k"], found.expected["l0"] = found.checked_k(k), float(k)
    named, layer = re.search(r"SAE-Res-(.+)-W\d+K", path), re.search(r"layer(\d+)", file.name)
    found.model = f"Qwen/{named[1]}" if named else facts.get("model")
    found.reads = place(f"model.layers.{layer[1]}", found.model) if layer else None
    return found


def _hook_z(tensors: dict[str, Tensor], file: Path, facts: dict[str, Any]) -> Checkpoint:
    """ReLU with a pre-bias on all heads' z side by side. What it read stands in ``…_cfg.json`` beside."""
    config = file.with_name(file.stem + "_cfg.json")
    hook = facts.get("hook_point") or (read_file(config).get("act_name") if config.is_file() else None)
    if hook is None and facts.get("reads") is None:
        raise ValueError(f"{file}: what it reads stands only in {config.name}, which is missing: pass reads=")
    found = Checkpoint("hook_z", str(file), "L1", tensors, pre_bias=True, model="gpt2")
    found.reads = place(hook, "gpt2")
    found.meta["context"] = 128
    return found


def _tracer(tensors: dict[str, Tensor], file: Path, facts: dict[str, Any]) -> Checkpoint:
    """A transcoder of circuit-tracer: ReLU, or JumpReLU where it has a threshold; W_enc stored "d_sae d_in"."""
    config, layer = file.with_name(TRACER_CONFIG), re.fullmatch(r"layer_(\d+)", file.stem)
    said = {} if "hooks" in facts or not config.is_file() else read_file(config)
    hooks = facts.get("hooks") or (said.get("feature_input_hook"), said.get("feature_output_hook"))
    if (layer is None or None in hooks) and (facts.get("reads") is None or facts.get("writes") is None):
        raise ValueError(
            f"{file}: where a transcoder of circuit-tracer reads and writes stands in {TRACER_CONFIG} beside it, its "
            "layer in its name (layer_5.safetensors): pass reads= and writes= ('blocks.5.mlp.hook_in', "
            "'blocks.5.hook_mlp_out')"
        )
    t = {n: v.T if n in ("W_enc", "W_skip") else v for n, v in tensors.items()}
    if _THRESHOLD in t:
        t["threshold"] = t.pop(_THRESHOLD)
        if bool((t["threshold"] < 0).any()):
            raise ValueError(f"{file}: a threshold below 0 lets codes be negative, which coders here cannot have")
    family = "JumpReLU" if "threshold" in t else "L1"
    found = Checkpoint("circuit-tracer", str(file), family, t, pre_bias=False, transcodes=True)
    found.model = facts.get("model") or said.get("model_name")
    if layer and None not in hooks:
        found.reads, found.writes = (place(f"blocks.{layer[1]}.{hook}", found.model) for hook in hooks)
    return found
