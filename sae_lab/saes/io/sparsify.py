"""EleutherAI's sparsify: ``<hookpoint>/cfg.json`` and ``sae.safetensors``, one folder per hookpoint, and above them the
run's ``config.json``. A hookpoint is a module's path inside the base model; a transcoder reads that module's input.

From November 2024 to February 2025 "transcode" stood in the run's config.json only, and transcoders subtracted b_dec
from x as autoencoders do. Where that file is missing, the decoder tells: only autoencoders had theirs normalised.
"""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_lab.saes.io.foreign import Checkpoint
from sae_lab.saes.io.layouts import floats, must_hold, read_file, refuse_layered
from sae_lab.saes.io.places import place

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(folder: Path, facts: dict[str, Any]) -> Checkpoint:
    cfg = read_file(folder / CONFIG)
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise ValueError(f"{folder} uses sparsify's activation {activation!r}; supported: 'topk'")
    if cfg.get("signed"):
        raise ValueError(f"{folder} takes the k largest by size and keeps their signs (signed): that is not supported")
    t = floats(read_file(folder / WEIGHTS), folder / WEIGHTS)
    refuse_layered(folder, t, {"sae_type": "clt"} if (cfg.get("n_targets") or 0) > 1 else {})
    names = ["encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if cfg.get("skip_connection") else [])]
    must_hold(t, names, folder / WEIGHTS)
    tensors = {"W_enc": t["encoder.weight"].T, "b_enc": t["encoder.bias"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    if "W_skip" in t:
        tensors["W_skip"] = t["W_skip"].T
    # A run of several seeds has a folder for each inside the hookpoint's.
    hookpoint = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    run = read_file(file) if (file := hookpoint.parent / "config.json").is_file() else {}
    transcodes = _transcodes(cfg, run, tensors, folder, facts)
    pre_bias = not cfg.get("transcode")
    found = Checkpoint("sparsify", str(folder), "TopK", tensors, pre_bias=pre_bias, transcodes=transcodes)
    d_in = cfg.get("d_in")
    found.must_be(d_in, cfg.get("num_latents") or (d_in or 0) * cfg.get("expansion_factor", 0))
    if "W_skip" in tensors and not transcodes:
        raise ValueError(f"{folder}: a skip on an autoencoder lets it copy its input; only transcoders have one here")
    found.config["k"] = found.checked_k(cfg.get("k"))
    found.config |= {"multi": 4} if cfg.get("multi_topk") else {}
    found.expected["l0"] = float(found.config["k"])
    _where(found, cfg, run, facts.get("hook") or hookpoint.name, facts)
    return found


def _transcodes(
    cfg: dict[str, Any], run: dict[str, Any], t: dict[str, Tensor], folder: Path, facts: dict[str, Any]
) -> bool:
    """Whether it predicts a module's output from its input. ValueError where nothing tells."""
    if "transcode" in cfg or "transcode" in run or "W_skip" in t:
        return bool(cfg.get("transcode", run.get("transcode", True)))
    if facts.get("writes") is not None:
        return facts["writes"] != facts.get("reads")
    if cfg.get("normalize_decoder"):  # a step of training moves rows by far less than this
        return not bool((t["W_dec"].norm(dim=1) - 1).abs().median() < 0.05)
    if "skip_connection" not in cfg:  # of before there were transcoders
        return False
    raise ValueError(
        f"{folder}: only its run's config.json says whether it is a transcoder: put that file above the folder, or "
        "pass reads= and writes= (a transcoder reads 'mlp_in-5' and writes 'mlp_out-5', say)"
    )


def _where(found: Checkpoint, cfg: dict[str, Any], run: dict[str, Any], hookpoint: str, facts: dict[str, Any]) -> None:
    found.model = facts.get("model") or run.get("model")
    found.ours = cfg.get("sae_lab")
    if isinstance(run.get("ctx_len"), int):
        found.meta["context"] = run["ctx_len"]
    if run.get("exclude_tokens"):
        found.meta["mask"] = {"special_ids": run["exclude_tokens"], "skip_first": False, "max_norm": {}}
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
