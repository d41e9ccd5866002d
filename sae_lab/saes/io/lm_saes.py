"""OpenMOSS's Language-Model-SAEs, as Llama Scope R1 Distill has it: ``config.json`` and ``sae_weights.safetensors``.

    pre = s·x·W_enc + b_enc, on where pre·‖W_dec‖ > θ; s = √d_in / mean norm

The norms of activations stand beside the weights. Codes come in those units, as SAELens gives them.
"""

from pathlib import Path
from typing import Any

from sae_lab.saes.io.foreign import Checkpoint
from sae_lab.saes.io.layouts import floats, must_hold, read_file, refuse_layered

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
_THRESHOLD, _NORM = "log_jumprelu_threshold", "dataset_average_activation_norm."


def read(folder: Path, facts: dict[str, Any]) -> Checkpoint:
    cfg = read_file(folder / CONFIG)
    t = floats(read_file(folder / WEIGHTS), folder / WEIGHTS)
    refuse_layered(folder, t, cfg)
    norms = {name.removeprefix(_NORM): float(t.pop(name)) for name in list(t) if name.startswith(_NORM)}
    act = cfg.get("act_fn", "relu")
    if act not in ("relu", "jumprelu") or cfg.get("use_glu_encoder") or cfg.get("sae_type", "sae") != "sae":
        raise ValueError(
            f"{folder}: act_fn {act!r}, use_glu_encoder {cfg.get('use_glu_encoder', False)}, sae_type "
            f"{cfg.get('sae_type', 'sae')!r}; supported of Language-Model-SAEs: 'relu' and 'jumprelu' without a GLU"
        )
    must_hold(t, [*_NAMES, *([_THRESHOLD] if act == "jumprelu" else [])], folder / WEIGHTS)
    tensors = {ours: t[theirs].T if t[theirs].dim() == 2 else t[theirs] for theirs, ours in _NAMES.items()}
    if act == "jumprelu":
        tensors["threshold"] = t[_THRESHOLD].exp()
        if cfg.get("sparsity_include_decoder_norm", True):
            tensors["threshold"] = tensors["threshold"] / tensors["W_dec"].norm(dim=1).clamp_min(1e-8)
    found = Checkpoint("Language-Model-SAEs", str(folder), "L1" if act == "relu" else "JumpReLU", tensors, False)
    hook_in = cfg["hook_point_in"]
    hook_out = cfg.get("hook_point_out") or hook_in
    found.pre_bias = bool(cfg.get("apply_decoder_bias_to_pre_encoder"))
    _scale(found, cfg, norms, (hook_in, hook_out), facts)
    found.between(hook_in, hook_out, facts.get("model"))
    return found


def _scale(
    found: Checkpoint, cfg: dict[str, Any], norms: dict[str, float], hooks: tuple[str, str], facts: dict[str, Any]
) -> None:
    """The factors that x and the target were multiplied by. ValueError where nothing says them."""
    named = cfg.get("norm_activation", "dataset-wise")
    if named == "inference":  # folded into the weights
        return
    if named == "token-wise" and hooks[0] == hooks[1]:
        found.input_norm = "length"
        return
    if named != "dataset-wise":
        raise ValueError(f"{found.where} normalises by {named!r}; supported: 'dataset-wise', 'token-wise', 'inference'")
    if not set(hooks) <= norms.keys():
        found.used.add("scale")
    into, out = (cfg["d_model"] ** 0.5 / norms[hook] if hook in norms else facts.get("scale") for hook in hooks)
    if not into or not out:
        raise found.unknown_scale()
    if found.pre_bias and into != out:
        raise ValueError(f"{found.where}: a pre-encoder bias beside two different scales is not supported")
    found.scale(into, out)
