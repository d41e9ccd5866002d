"""Gemma Scope 1 (``params.npz``) and 2 (``params.safetensors``, ``config.json``): JumpReLU, b_dec never subtracted.

Version 1 states model, site and width in the names of repository and folders only, so that a file that lies elsewhere
does not say whether it is an autoencoder or a transcoder: the caller must. Its MLP coders read what the MLP adds to the
stream, after the post-norm; its attention coders read all heads' z side by side; its transcoders read the MLP's input
without the norm's gain. Version 2 names modules of transformers.
"""

import re
from pathlib import Path
from typing import Any

import torch

from sae_lab.saes.io.foreign import Checkpoint
from sae_lab.saes.io.layouts import floats, must_hold, read_file, refuse_layered
from sae_lab.saes.io.places import place, told

ARCHIVE, WEIGHTS = "params.npz", "params.safetensors"
NAMES = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
RENAMED = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}  # of version 2
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "ln2.hook_normalized"}
_FOLDERS = {
    "resid_post": ("output", None),
    "attn_out": ("self_attn.o_proj.input", None),
    "mlp_out": ("post_feedforward_layernorm.output", None),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}


def read_1(path: Path, facts: dict[str, Any]) -> Checkpoint:
    """path: the folder, or an archive of any name."""
    file = path if path.is_file() else path / ARCHIVE
    t = {("W_" + n[2:] if n.startswith("w_") else n): v for n, v in floats(read_file(file), file).items()}
    refuse_layered(file, t)
    must_hold(t, NAMES, file, may=["scaling_factor"])
    if not bool((t.pop("scaling_factor", torch.ones(())) == 1).all()):
        raise ValueError(f"{file} has a scaling_factor that is not 1, which Gemma Scope's coders do not have")
    found = Checkpoint("Gemma Scope", str(path), "JumpReLU", t, pre_bias=False)
    where = facts.get("path") or path.as_posix()
    release = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)", where)
    layer = re.search(r"layer_(\d+)", where)
    embedding = re.search(r"(?:^|/)embedding/", where)
    if l0 := re.search(r"average_l0_(\d+)", where):
        found.expected["l0"] = float(l0[1])
    found.meta["context"] = 1024
    if release:
        size, kind, what = release.groups()
        found.model = f"google/gemma-2-{size}{'-it' if kind == 'it' else ''}"
        if layer:
            found.transcodes = what == "transcoders"
            found.reads = place(f"blocks.{layer[1]}.{_HOOKS[what]}", found.model)
            found.writes = place(f"blocks.{layer[1]}.hook_mlp_out", found.model) if found.transcodes else None
    found.model = facts.get("model") or found.model
    said = told(facts["reads"], found.model, False).site if facts.get("reads") is not None else None
    if embedding or (said and said.kind == "embed"):
        found.reads = place("hook_embed", found.model)
        # Trained on rows of the embedding matrix; the model's embedding is √d_in times as large.
        found.scale(t["b_dec"].shape[0] ** -0.5, t["b_dec"].shape[0] ** -0.5)
    if said and said.kind == "mlp_in":
        raise ValueError(
            f"{file}: Gemma Scope's transcoders read the MLP's input without the norm's gain: pass "
            f"reads='blocks.{said.layer}.ln2.hook_normalized'"
        )
    if found.model is None or (found.reads is None and said is None):
        raise ValueError(
            f"{file} does not say where its coder reads, nor whether it is a transcoder: pass model= "
            "('google/gemma-2-2b') and reads= ('blocks.20.hook_resid_post'); for a transcoder "
            "reads='blocks.20.ln2.hook_normalized' and writes='blocks.20.hook_mlp_out'; or keep it below folders with "
            "the hub's names (gemma-scope-2b-pt-transcoders/layer_20/…)"
        )
    return found


def read_2(path: Path, facts: dict[str, Any]) -> Checkpoint:
    """path: the folder, or a file of weights of any name."""
    file = path if path.is_file() else path / WEIGHTS
    folder, address = file.parent, facts.get("path") or path.as_posix()
    cfg = read_file(folder / "config.json") if (folder / "config.json").is_file() else {}
    if cfg.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(f"{folder}: architecture {cfg['architecture']!r} of Gemma Scope 2; supported: 'jump_relu'")
    t = {RENAMED.get(n, n): v for n, v in floats(read_file(file), file).items()}
    refuse_layered(folder, t, cfg)
    must_hold(t, NAMES, file, may=["W_skip"])
    found = Checkpoint("Gemma Scope 2", str(folder), "JumpReLU", t, pre_bias=False)
    into, out = cfg.get("hf_hook_point_in"), cfg.get("hf_hook_point_out")
    kind = next((k for k in _FOLDERS if re.search(rf"(?:^|/){k}(?:_all)?/", address)), None)
    layer = re.search(r"layer_(\d+)", address)
    if into is None and kind and layer:  # some folders have no config.json
        into, out = (part and f"model.layers.{layer[1]}.{part}" for part in _FOLDERS[kind])
    if into is None and facts.get("reads") is None:
        raise ValueError(
            f"{folder} has no config.json that says where its coder reads, nor the folders' names of the hub: pass "
            "reads=, and writes= for a transcoder (one of layer 7 reads 'mlp_in-7' and writes 'mlp_out-7')"
        )
    model = facts.get("model") or _model(cfg.get("model_name"))
    found.between(into, out, model or "gemma-3")
    found.model = model
    if isinstance(cfg.get("l0"), int | float):
        found.expected["l0"] = float(cfg["l0"])
    return found


def _model(name: str | None) -> str | None:
    """The hub's id: configs write gemma-v3-1b-pt, and the smallest pretrained model has no suffix there."""
    if name is None:
        return None
    name = name.replace("-v3", "-3").removeprefix("google/")
    return "google/" + (name.removesuffix("-pt") if "270m" in name else name)
