"""Files of other libraries, read as data or refused. No code in a file is ever run."""

import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lab import files

_AGAIN = "download it again"
_PICKLE = (
    "a pickle with other objects can run code and is never opened; save its state_dict alone, or as safetensors"
)
# By ending: (what reads it, what it is, the remedy where it is none)
_KINDS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    ".json": (partial(files.read_json, nan=True), "JSON", _AGAIN),
    ".yaml": (files.read_yaml, "YAML", _AGAIN),
    ".npz": (files.read_npz, "whole archive of plain arrays", _AGAIN),
    ".safetensors": (lambda file: files.read_tensors(file)[0], "whole safetensors file", _AGAIN),
    "": (files.read_torch, "whole file of plain tensors", _PICKLE),
}


def read_file(file: Path) -> dict[str, Any]:
    """What a file holds, by its ending: .json, .yaml, .npz, .safetensors; any other is read as torch.save wrote it.

    ValueError for a missing or damaged file, and for one that holds no values by name.
    """
    reader, what, remedy = _KINDS.get(file.suffix, _KINDS[""])
    try:
        content = reader(file)
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except (ValueError, OSError, RuntimeError) as err:
        raise ValueError(f"{file} is no {what} ({err}): {remedy}") from err
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold values by name, got a {type(content).__name__}")
    return content


def floats(content: dict[str, Any], where: Path) -> dict[str, Tensor]:
    """Tensors in float32. ValueError for anything else in the file."""
    if wrong := sorted(str(name) for name, value in content.items() if not isinstance(value, Tensor)):
        raise ValueError(f"{where} must hold only tensors; others: {', '.join(wrong[:6])}")
    return {name: tensor.float() for name, tensor in content.items()}


def must_hold(there: Collection[str], needed: Collection[str], where: Path | str, may: Collection[str] = ()) -> None:
    """ValueError unless the names are those needed, and of those that may be there some."""
    if wrong := sorted((set(needed) - set(there)) | (set(there) - set(needed) - set(may))):
        raise ValueError(f"{where} must hold {sorted(needed)}; missing or surplus: {wrong}")


def peek(file: Path) -> dict[str, Any]:
    """What a file of weights holds, of safetensors only names and shapes."""
    if file.suffix != ".safetensors":
        return read_file(file)
    try:
        return {n: torch.empty(info["shape"], device="meta") for n, info in files.read_header(file)[0].items()}
    except (ValueError, RuntimeError) as err:
        raise ValueError(f"{file} is no whole safetensors file ({err}): {_AGAIN}") from err


_CROSSCODER = "a crosscoder, which reads several layers or models at once"
_CLT = "a cross-layer transcoder (CLT), whose features write at several layers"


def refuse_layered(where: Path, content: dict[str, Any], config: dict[str, Any] | None = None) -> None:
    """ValueError for a crosscoder or a cross-layer transcoder, told by its config or by its tensors' axes."""
    keys = ("dict_class", "sae_type", "model_kind", "architecture")
    named = [str(value) for key in keys if (value := (config or {}).get(key))]
    named = [re.sub(r"[\W_]", "", name).lower() for name in named]
    axes = {name: value.dim() for name, value in content.items() if isinstance(value, Tensor)}

    def deep(pattern: str) -> bool:
        return any(dim > 2 and re.fullmatch(pattern, name, re.I) for name, dim in axes.items())

    many = any(re.fullmatch(r"W_(?:enc|dec|decs|D)[._]\d+|.*decoders\.\d+->\d+.*", name) for name in axes)
    kind = None
    if many or any("crosslayer" in name or "clt" in name for name in named):
        kind = _CLT
    elif deep(r"w_e(nc)?|encoder\.weight") or any("crosscoder" in name for name in named):
        kind = _CROSSCODER
    elif deep(r"w_d(ec)?|decoder\.weight"):
        kind = _CLT
    if kind:
        other = "; for a CLT see sl.CrossLayerTranscoder.load" if kind == _CLT else ""
        raise ValueError(f"{where} holds {kind}: sl.load takes coders that read one place and write at one{other}")
