"""dictionary_learning: ``ae.pt`` (a pickled state_dict, read with weights_only) and ``config.json``; of a run that goes
on, ``checkpoints/ae_1000.pt`` below that config, in the units of raw activations too."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lab.saes.io.foreign import Checkpoint
from sae_lab.saes.io.layouts import floats, read_file, refuse_layered
from sae_lab.saes.io.places import Place, place
from sae_lab.types import Site

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
_PLAIN = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
# class: (family, its tensors, those older versions lack, whether b_dec is subtracted from x)
CLASSES = {
    "AutoEncoder": ("L1", _LINEAR | {"bias"}, set(), True),
    "AutoEncoderNew": ("L1", _LINEAR | {"decoder.bias"}, set(), False),
    "GatedAutoEncoder": (
        "Gated", {"encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"}, set(), True,
    ),
    "AutoEncoderTopK": ("TopK", _LINEAR | {"b_dec"}, {"k", "threshold"}, True),
    "BatchTopKSAE": ("BatchTopK", _LINEAR | {"b_dec"}, {"k", "threshold"}, True),
    "MatryoshkaBatchTopKSAE": ("Matryoshka", _PLAIN | {"group_sizes"}, {"k"}, True),
    "JumpReluAutoEncoder": ("JumpReLU", _PLAIN, set(), False),
}  # fmt: skip
_RENAMED = {
    "encoder.bias": "b_enc", "bias": "b_dec", "decoder.bias": "b_dec", "decoder_bias": "b_dec", "gate_bias": "b_enc",
    "mag_bias": "b_mag",
}  # fmt: skip
_FORMER = {"MatroyshkaBatchTopKSAE": "MatryoshkaBatchTopKSAE"}  # until January 2025
_SUBMODULE = re.compile(r"(resid_pre|resid_post|mlp_out|attn_out)(?:_layer)?_(\d+)")


def read(path: Path, facts: dict[str, Any]) -> Checkpoint:
    """path: the folder, or a checkpoint's own file in or below it."""
    file = path if path.is_file() else path / WEIGHTS
    content, scale = read_file(file), None
    config = config_of(file)
    if is_backup(content):  # of unfinished training, under the same file name; its biases are in other units
        config = config or {"trainer": content.get("config") or {}}
        content, scale = content["ae"], content.get("norm_factor")
    trainer, folder = config.get("trainer", {}), file.parent
    refuse_layered(file, content, trainer)
    tensors = floats(content, file)
    name = _class(trainer.get("dict_class"), tensors.keys(), file)
    family, _, _, pre_bias = CLASSES[name]
    found = Checkpoint("dictionary_learning", str(path), family, {}, pre_bias)
    k, groups = tensors.pop("k", None), tensors.pop("group_sizes", None)
    found.tensors = {_RENAMED.get(n, n): t for n, t in tensors.items()}
    for theirs, ours in (("encoder.weight", "W_enc"), ("decoder.weight", "W_dec")):
        if theirs in found.tensors:
            found.tensors[ours] = found.tensors.pop(theirs).T
    if k is not None or family in ("TopK", "BatchTopK", "Matryoshka"):
        known = trainer.get("k") if k is None else float(k)
        if known is None:
            known = facts.get("k")
            found.used.add("k")
        found.config["k"] = found.checked_k(known)
        found.expected["l0"] = float(found.config["k"])
    if groups is not None:
        found.config["prefixes"] = [int(n) for n in groups.cumsum(0)]
    _threshold(found)
    if scale:  # weights were trained on x / scale: codes and outputs grow by it, the matrices stay
        for name in found.tensors.keys() & {"b_enc", "b_dec", "b_mag", "threshold"}:
            found.tensors[name] = found.tensors[name] * float(scale)
    if name == "AutoEncoder":  # their loader does this too, so that codes are comparable
        norms = found.tensors["W_dec"].norm(dim=1)
        if not torch.allclose(norms, torch.ones_like(norms)):
            found.scale_codes(norms.clamp_min(1e-8))
    _where(found, config, folder, facts)
    return found


def is_backup(content: dict[str, Any]) -> bool:
    """Whether this is the state of a training that goes on."""
    return isinstance(content.get("ae"), dict) and "step" in content


def fits(content: dict[str, Any]) -> bool:
    """Whether these tensors are those of one of its classes."""
    names = content.get("ae", {}).keys() if is_backup(content) else content.keys()
    return any(needs <= names <= needs | may for _, needs, may, _ in CLASSES.values())


def config_of(file: Path) -> dict[str, Any]:
    """The run's config: beside the weights, or above the folder of a checkpoint."""
    beside = [file.parent / CONFIG] + ([file.parent.parent / CONFIG] if file.parent.name == "checkpoints" else [])
    return next((read_file(config) for config in beside if config.is_file()), {})


def _class(named: Any, names: Any, file: Path) -> str:
    folder, named = file.parent, _FORMER.get(named, named)
    if named is not None and named not in CLASSES:
        raise ValueError(f"{folder} holds a dictionary_learning {named!r}; supported: {', '.join(CLASSES)}")
    fitting = [c for c, (_, needs, may, _) in CLASSES.items() if needs <= set(names) <= needs | may]
    if named is not None and named not in fitting:
        _, needs, may, _ = CLASSES[named]
        raise ValueError(
            f"{file}: a {named} has the tensors {sorted(needs)}{f' and {sorted(may)}' if may else ''}, "
            f"got {sorted(names)}"
        )
    if named is None and len(fitting) != 1:
        raise ValueError(
            f"{folder} has no {CONFIG} that names its class, and its tensors {sorted(names)} fit "
            f"{' and '.join(fitting) or 'none'}: write {CONFIG} with "
            '{"trainer": {"dict_class": ...}}, one of ' + ", ".join(CLASSES)
        )
    return named or fitting[0]


def _threshold(found: Checkpoint) -> None:
    """TopK stores one and ignores it; a negative one, and none (until December 2024), was never fitted."""
    if found.family == "TopK":
        found.tensors.pop("threshold", None)
    elif found.family in ("BatchTopK", "Matryoshka"):
        fitted = found.tensors.get("threshold")
        if fitted is None or bool((fitted < 0).any()):
            found.tensors["threshold"] = torch.tensor(float("nan"))
            log.warning("%s has no fitted threshold: call sae.calibrate([activations]) before you use it", found.where)


def _where(found: Checkpoint, config: dict[str, Any], folder: Path, facts: dict[str, Any]) -> None:
    trainer, buffer = config.get("trainer", {}), config.get("buffer") or {}
    found.model = facts.get("model") or trainer.get("lm_name")
    found.ours = config.get("sae_lab")
    if isinstance(buffer.get("ctx_len"), int):
        found.meta["context"] = buffer["ctx_len"]
    if buffer.get("io") == "in_and_out" and facts.get("writes") is None and found.ours is None:
        raise ValueError(f"{found.where} was trained from a module's input to its output: pass reads= and writes=")
    layer, named = trainer.get("layer"), trainer.get("submodule_name")
    match = _SUBMODULE.search(str(named or "")) or next(
        (m for part in reversed(folder.parts) if (m := _SUBMODULE.fullmatch(part.removesuffix("_checkpoints")))), None
    )
    if match:
        found.reads = Place(Site(match[1], int(match[2])), match[0])
    elif named:
        found.reads = place(named, found.model) or Place(None, named)
    elif isinstance(layer, int) and layer >= 0:  # what its get_submodule gives: the block, whose output is read
        found.reads = Place(Site("resid_pre" if buffer.get("io") == "in" else "resid_post", layer), f"layer {layer}")


def write(parts: Any, folder: Path) -> dict[str, Tensor]:
    """config.json as its load_dictionary reads it; returns the tensors for ``ae.pt``."""
    if parts.transcodes or parts.input_norm != "none":
        raise ValueError(
            f"dictionary_learning holds autoencoders on raw activations, not a {parts.family} with "
            f"{'another target' if parts.transcodes else f'input_norm {parts.input_norm!r}'}: save as 'sae_lab'"
        )
    name = {"relu": "AutoEncoder" if parts.pre_bias else "AutoEncoderNew", "jump": "JumpReluAutoEncoder",
            "gated": "GatedAutoEncoder", "topk": "AutoEncoderTopK"}[parts.kind]  # fmt: skip
    if parts.shared_threshold is not None:
        name = "MatryoshkaBatchTopKSAE" if parts.prefixes else "BatchTopKSAE"
    parts.want_pre_bias(CLASSES[name][3])
    t = dict(parts.tensors)
    norms = t["W_dec"].norm(dim=1)
    if name == "AutoEncoder" and not torch.allclose(norms, torch.ones_like(norms)):
        log.warning("decoder rows are not of unit norm: dictionary_learning's loader will rescale codes by the norms")
    if parts.shared_threshold is not None:
        t["threshold"] = parts.shared_threshold
    if parts.prefixes:
        t["group_sizes"] = torch.tensor(parts.prefixes).diff(prepend=torch.tensor([0]))
    elif parts.kind != "jump" or parts.shared_threshold is not None:
        t["encoder.weight"], t["decoder.weight"] = t.pop("W_enc").T, t.pop("W_dec").T
        back = {ours: theirs for theirs, ours in _RENAMED.items() if theirs in CLASSES[name][1]}
        t = {str(back.get(n, n)): tensor for n, tensor in t.items()}
    if parts.k is not None:
        t["k"] = torch.tensor(parts.k, dtype=torch.int)
        t.setdefault("threshold", torch.tensor(-1.0))
    site = parts.site
    config = {
        "trainer": {
            "dict_class": name, "activation_dim": parts.d_in, "dict_size": parts.d_sae, "k": parts.k,
            "layer": site.layer if site else None, "lm_name": parts.model,
            "submodule_name": f"{site.kind}_layer_{site.layer}" if site and site.layer is not None else None,
        },
        "buffer": {"ctx_len": parts.meta.get("context")}, "sae_lab": parts.ours(),
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    return t
