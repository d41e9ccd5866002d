"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, of version 6 and before; ``sparsity.safetensors`` beside.

What its loader does that its files do not say, and is done here too: pre-6 configs subtract b_dec unless they say
otherwise; TopK with ``rescale_acts_by_decoder_norm`` picks by pre-activation times decoder norm (folded, exactly);
``expected_average_only_in`` means that x was scaled by a factor that the files of an unfinished run hold beside.

Until September 2024 (version 3) it trained on TransformerLens's processed models, where the stream of a model with
LayerNorm is centred, and its configs say nothing of it; coders converted to its format say nothing either.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lab.saes.io.foreign import Checkpoint
from sae_lab.saes.io.layouts import floats, must_hold, read_file, refuse_layered
from sae_lab.saes.io.places import can_be_centred, place

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
FAMILY = {
    "standard": "L1", "gated": "Gated", "jumprelu": "JumpReLU", "topk": "TopK", "batchtopk": "BatchTopK",
    "matryoshka_batchtopk": "Matryoshka", "transcoder": "L1", "skip_transcoder": "L1",
    "jumprelu_transcoder": "JumpReLU", "jumprelu_skip_transcoder": "JumpReLU",
}  # fmt: skip
PICKS = ("TopK", "BatchTopK", "Matryoshka")
NORMS = {"none": "none", "expected_average_only_in": "none", "layer_norm": "layer", "constant_norm_rescale": "length"}


def read(folder: Path, facts: dict[str, Any]) -> Checkpoint:
    """facts (of a release) go before what the config says: ``model``, ``centred``, ``normalize``, ``scale``."""
    cfg = read_file(folder / CONFIG)
    about = {**cfg, **(cfg.get("metadata") or {})}  # version 6 keeps these apart
    refuse_layered(folder, {}, cfg)
    architecture = _architecture(cfg, folder)
    tensors = _tensors(folder, cfg, architecture)
    found = Checkpoint("SAELens", str(folder), FAMILY[architecture], tensors, pre_bias=False)
    found.must_be(cfg.get("d_in"), cfg.get("d_sae", tensors["W_enc"].shape[-1]))
    found.transcodes = "transcoder" in architecture
    found.pre_bias = not found.transcodes and bool(cfg.get("apply_b_dec_to_input", True))
    rescaled = found.family in PICKS and bool(cfg.get("rescale_acts_by_decoder_norm", architecture != "topk"))
    _normalisation(found, cfg, folder, facts, rescaled)
    if rescaled:
        found.scale_codes(found.tensors["W_dec"].norm(dim=1).clamp_min(1e-8))
    if found.family in PICKS:
        found.config["k"] = found.checked_k((cfg.get("activation_fn_kwargs") or {}).get("k", cfg.get("k")))
    if found.family == "Matryoshka" and cfg.get("matryoshka_widths"):
        found.config["prefixes"] = sorted({*cfg["matryoshka_widths"], found.tensors["W_enc"].shape[1]})
    found.ours = about.get("sae_lab")
    _where(found, about, facts)
    _expected(found, cfg, about, folder)
    return found


def _architecture(cfg: dict[str, Any], folder: Path) -> str:
    named = cfg.get("architecture", "standard")
    function = cfg.get("activation_fn_str", cfg.get("activation_fn", "relu"))
    if named == "standard" and function == "topk":  # before 6.0
        named = "topk"
    elif function not in ("relu", "topk"):
        raise ValueError(f"{folder} uses the activation {function!r}; supported: relu, topk")
    if named not in FAMILY:
        raise ValueError(f"{folder} holds a coder of architecture {named!r}; supported: {', '.join(sorted(FAMILY))}")
    return named


def _tensors(folder: Path, cfg: dict[str, Any], architecture: str) -> dict[str, Tensor]:
    t = floats(read_file(folder / WEIGHTS), folder / WEIGHTS)
    refuse_layered(folder, t, cfg)
    for theirs, ours in (("b_gate", "b_enc"), ("topk_threshold", "threshold")):
        if theirs in t:
            t[ours] = t.pop(theirs)
    if "log_threshold" in t:
        t["threshold"] = t.pop("log_threshold").exp()
    if "W_skip" in t:
        t["W_skip"] = t["W_skip"].T
    scaling = t.pop("scaling_factor", None)  # finetuned against shrinkage: applied between codes and decoder
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        if not cfg.get("finetuning_scaling_factor"):
            raise ValueError(f"{folder} has a scaling_factor that its config does not switch on")
        t["W_dec"] = t["W_dec"] * scaling[:, None]
    known = {"W_enc", "W_dec", "b_enc", "b_dec"}
    known |= {"threshold"} if FAMILY[architecture] in ("JumpReLU", "BatchTopK", "Matryoshka") else set()
    known |= {"r_mag", "b_mag"} if architecture == "gated" else set()
    known |= {"W_skip"} if "skip" in architecture else set()
    must_hold(t, known, f"{folder / WEIGHTS} of a SAELens {architecture!r}")
    return t


def _normalisation(found: Checkpoint, cfg: dict[str, Any], folder: Path, facts: dict[str, Any], rescaled: bool) -> None:
    named = facts.get("normalize", cfg.get("normalize_activations")) or "none"
    if isinstance(named, bool):  # before 6.0
        named = "expected_average_only_in" if named else "none"
    if named not in NORMS:
        raise ValueError(f"{folder} normalises by {named!r}; supported: {', '.join(NORMS)}")
    found.input_norm = NORMS[named]
    if found.input_norm != "none" and "W_skip" in found.tensors:
        raise ValueError(f"{folder}: a skip on raw x beside normalisation by {named!r} is not supported")
    if named != "expected_average_only_in":
        return
    if found.transcodes:
        raise ValueError(f"{folder}: a transcoder normalised by {named!r} is not supported")
    beside = folder / "activation_scaler.json"
    found.used.add("scale")
    scale = facts.get("scale") or (read_file(beside).get("scaling_factor") if beside.is_file() else None)
    if scale:
        found.scale(scale, scale)
        if rescaled and "threshold" in found.tensors:  # it is in units of pre-activation times decoder norm
            found.tensors["threshold"] = found.tensors["threshold"] / scale
        return
    if not facts.get("listed"):
        raise found.unknown_scale()
    found.meta["scale"] = "unknown"  # SAELens's directory names no factor, and SAELens applies none
    log.warning(
        "%s was trained on activations scaled to norm √d_in by a factor that neither its files nor SAELens's directory "
        "say: unless it was folded into the weights, call sae.fold(√d_in / mean norm of the training activations)",
        folder,
    )


def _where(found: Checkpoint, about: dict[str, Any], facts: dict[str, Any]) -> None:
    found.model = facts.get("model") or about.get("model_name")
    name = about.get("hook_name") or about.get("hook_point")
    head = about.get("hook_head_index", about.get("hook_point_head_index"))
    found.reads = place(name, found.model, head=head)
    if found.transcodes:
        found.writes = place(about.get("hook_name_out"), found.model, head=about.get("hook_head_index_out"))
    found.say({"centred": _centred(found, about, facts)})
    if isinstance(about.get("context_size"), int):
        found.meta["context"] = about["context_size"]
    if isinstance(about.get("exclude_special_tokens"), list):
        found.meta["mask"] = {
            "special_ids": about["exclude_special_tokens"], "max_norm": {},
            "skip_first": bool((about.get("seqpos_slice") or [0])[0]),
        }  # fmt: skip
    if "prepend_bos" in about:
        found.meta["prepend_bos"] = about["prepend_bos"]


def _centred(found: Checkpoint, about: dict[str, Any], facts: dict[str, Any]) -> bool | None:
    """Whether the model that it was trained on had centred streams. ValueError where nothing says so and it matters."""
    if found.ours is not None:
        return None
    if facts.get("centred") is not None:
        return facts["centred"]
    if "model_from_pretrained_kwargs" in about:
        return bool((about["model_from_pretrained_kwargs"] or {}).get("center_writing_weights", False))
    if re.match(r"[6-9]|\d\d", str(about.get("sae_lens_version"))) or found.input_norm == "layer":
        return False  # version 6 trains on unprocessed models; layer_norm centres by itself
    if found.reads is None or not can_be_centred(found.reads, found.model):
        return False
    raise ValueError(
        f"{found.where}: {CONFIG} does not say whether the stream of {found.model or 'the model'} was centred: pass "
        "centred=True (SAELens trained so until September 2024; as gpt2-small-res-jb), or centred=False (a coder that "
        "another library trained, in SAELens's format)"
    )


def _expected(found: Checkpoint, cfg: dict[str, Any], about: dict[str, Any], folder: Path) -> None:
    """The L0 that the files state."""
    k = found.config.get("k") or (about.get("training_architecture_details") or {}).get("k")
    if (folder / SPARSITY).is_file():
        frequency = 10 ** read_file(folder / SPARSITY)["sparsity"].float()
        found.meta["dead"] = float((frequency < 1e-9).float().mean())
        found.expected["l0"] = float(frequency.sum())
    elif isinstance(k, int | float):
        found.expected["l0"] = float(k)


def write(parts: Any, folder: Path) -> dict[str, Tensor]:
    """cfg.json as SAELens 6 reads it; returns the tensors for ``sae_weights.safetensors``."""
    architecture = {"relu": "standard", "jump": "jumprelu", "gated": "gated", "topk": "topk"}[parts.kind]
    if parts.transcodes:
        names = {"relu": ("transcoder", "skip_transcoder"), "jump": ("jumprelu_transcoder", "jumprelu_skip_transcoder")}
        if parts.kind not in names:
            raise ValueError(
                f"SAELens holds transcoders with ReLU or JumpReLU, not a {parts.family}: save it in format 'sae_lab'"
                + (", or 'sparsify'" if parts.kind == "topk" else "")
            )
        architecture = names[parts.kind]["W_skip" in parts.tensors]
        if parts.input_norm != "none":
            raise ValueError(f"SAELens's transcoders have no input_norm {parts.input_norm!r}: save as 'sae_lab'")
    t = dict(parts.tensors)
    if parts.kind == "gated":
        t["b_gate"] = t.pop("b_enc")
    if "W_skip" in t:
        t["W_skip"] = t["W_skip"].T
    norms = {"none": "none", "layer": "layer_norm", "length": "constant_norm_rescale"}
    cfg = {
        "architecture": architecture, "d_in": parts.d_in, "d_sae": parts.d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": parts.pre_bias, "normalize_activations": norms[parts.input_norm],
        "reshape_activations": "hook_z" if parts.lens_in.endswith("hook_z") and parts.head is None else "none",
        "metadata": {
            # The version whose config this is; without one the reader takes it for one of before 6.0.
            "sae_lens_version": "6.54.12", "model_name": parts.model, "hook_name": parts.lens_in or None,
            "hook_head_index": parts.head, "context_size": parts.meta.get("context"), "prepend_bos": True,
            "training_architecture": parts.family, "sae_lab": parts.ours(),
        },
    }  # fmt: skip
    if parts.k is not None:
        cfg["metadata"]["training_architecture_details"] = {"k": parts.k}
    if architecture == "topk":
        cfg |= {"k": parts.k, "rescale_acts_by_decoder_norm": False}
    if parts.transcodes:
        cfg["d_out"] = parts.d_out
        cfg["metadata"]["hook_name_out"] = parts.lens_out or None
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2))
    return t
