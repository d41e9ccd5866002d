"""EleutherAI's sparsify: ``<hookpoint>/cfg.json`` and ``sae.safetensors``, one folder per hookpoint, and above them the
run's ``config.json``. A hookpoint is a module's path inside the base model; a transcoder reads that module's input."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_lab.saes.exchange.checkpoint import Checkpoint
from sae_lab.saes.exchange.files import read_json, read_safetensors
from sae_lab.saes.exchange.places import place

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(folder: Path, facts: dict[str, Any]) -> Checkpoint:
    cfg = read_json(folder / CONFIG)
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise ValueError(f"{folder} uses sparsify's activation {activation!r}; supported: 'topk'")
    t = {name: tensor.float() for name, tensor in read_safetensors(folder / WEIGHTS).items()}
    names = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"} | ({"W_skip"} if cfg.get("skip_connection") else set())
    if wrong := sorted(t.keys() ^ names):
        raise ValueError(f"{folder / WEIGHTS} must hold {sorted(names)}; missing or surplus: {wrong}")
    tensors = {"W_enc": t["encoder.weight"].T, "b_enc": t["encoder.bias"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    if "W_skip" in t:
        tensors["W_skip"] = t["W_skip"].T
    d_in = cfg.get("d_in")
    said = (d_in, cfg.get("num_latents") or (d_in or 0) * cfg.get("expansion_factor", 0))
    if tuple(tensors["W_enc"].shape) != said:
        raise ValueError(f"{folder}: the encoder is {tuple(tensors['W_enc'].shape)}, its config says {said}")
    transcodes = bool(cfg.get("transcode"))
    found = Checkpoint("sparsify", str(folder), "TopK", tensors, pre_bias=not transcodes, transcodes=transcodes)
    if "W_skip" in tensors and not transcodes:
        raise ValueError(f"{folder}: a skip on an autoencoder lets it copy its input; only transcoders have one here")
    found.config["k"] = found.checked_k(cfg.get("k"))
    found.config |= {"multi": 4} if cfg.get("multi_topk") else {}
    found.expected["l0"] = float(found.config["k"])
    _where(found, cfg, folder, facts)
    return found


def _where(found: Checkpoint, cfg: dict[str, Any], folder: Path, facts: dict[str, Any]) -> None:
    run = read_json(folder.parent / "config.json") if (folder.parent / "config.json").is_file() else {}
    found.model = facts.get("model") or run.get("model")
    found.ours = cfg.get("sae_lab")
    if isinstance(run.get("ctx_len"), int):
        found.meta["context"] = run["ctx_len"]
    if run.get("exclude_tokens"):
        found.meta["mask"] = {"special_ids": run["exclude_tokens"], "skip_first": False, "max_norm": {}}
    hookpoint = facts.get("hook") or folder.name
    out = place(hookpoint, found.model)
    if out is None or out.site is None or not found.transcodes:
        found.reads = out if out and out.site else None
        return
    found.reads, found.writes = place(f"{hookpoint}.input", found.model), out


def write(parts: Any, folder: Path) -> dict[str, Tensor]:
    """cfg.json as sparsify reads it (it drops what it does not know); returns the tensors for ``sae.safetensors``."""
    if parts.kind != "topk":
        raise ValueError(f"sparsify holds TopK coders only, not a {parts.family}: save it in format 'sae_lab'")
    if parts.input_norm != "none" or parts.d_out != parts.d_in:
        raise ValueError(
            "sparsify holds coders that read raw activations and write as wide as they read, got input_norm "
            f"{parts.input_norm!r}, d_in {parts.d_in}, d_out {parts.d_out}: save it in format 'sae_lab'"
        )
    parts.want_pre_bias(not parts.transcodes)
    t = parts.tensors
    norms = t["W_dec"].norm(dim=1)
    cfg = {
        "activation": "topk", "expansion_factor": max(1, parts.d_sae // parts.d_in), "num_latents": parts.d_sae,
        "normalize_decoder": bool(((norms - 1).abs() < 1e-4).all()), "k": parts.k, "multi_topk": parts.multi == 4,
        "skip_connection": "W_skip" in t, "transcode": parts.transcodes, "d_in": parts.d_in, "sae_lab": parts.ours(),
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2))
    out = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    return out | ({"W_skip": t["W_skip"].T} if "W_skip" in t else {})
