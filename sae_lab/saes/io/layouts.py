"""Files of other libraries, read as data or refused. No code in a file is ever run."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lab import files


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. ValueError where there is none."""
    try:
        return files.read_json(file, nan=True)
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except ValueError as err:
        raise ValueError(f"{file} is no JSON that can be read ({err}): download it again") from err


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name. ValueError for a missing, cut-off or other file."""
    try:
        return files.read_tensors(file)[0]
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except ValueError as err:
        raise ValueError(f"{file} is no whole safetensors file ({err}); it was not read as anything else") from err


def read_torch(file: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote, as long as it is tensors and plain containers. ValueError for all else."""
    try:
        content = files.read_torch(file)
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except (ValueError, OSError) as err:
        raise ValueError(
            f"{file} is no whole file of plain tensors ({err}). A pickle with other objects can run code and is "
            "never opened; save its state_dict alone, or as safetensors"
        ) from err
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a dictionary of tensors, got a {type(content).__name__}")
    return content


def read_npz(file: Path) -> dict[str, Tensor]:
    """Arrays of a numpy archive as tensors. ValueError for all else, pickled objects too."""
    try:
        return files.read_npz(file)
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except ValueError as err:
        raise ValueError(f"{file} is no whole archive of plain arrays ({err}); nothing in it was run") from err


def tensors_only(content: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """The same dictionary, every value a tensor. ValueError else."""
    if wrong := sorted(str(name) for name, value in content.items() if not isinstance(value, Tensor)):
        raise ValueError(f"{file} must hold only tensors; others: {', '.join(wrong[:6])}")
    return content


def read_yaml(file: Path) -> dict[str, Any]:
    """A mapping of plain values in YAML. ValueError where there is none."""
    try:
        content = files.read_yaml(file)
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except ValueError as err:
        raise ValueError(f"{file} is no YAML ({err}): download it again") from err
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a mapping, got a {type(content).__name__}")
    return content


def read_weights(file: Path) -> dict[str, Any]:
    """What a file of weights holds, by its ending."""
    if file.suffix == ".npz":
        return dict(read_npz(file))
    return dict(read_safetensors(file)) if file.suffix == ".safetensors" else read_torch(file)


def peek(file: Path) -> dict[str, Any]:
    """The same, of safetensors only names and shapes."""
    if file.suffix != ".safetensors":
        return read_weights(file)
    try:
        return {n: torch.empty(info["shape"], device="meta") for n, info in files.read_header(file)[0].items()}
    except (ValueError, RuntimeError) as err:
        raise ValueError(f"{file} is no whole safetensors file ({err}); it was not read as anything else") from err


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
        raise ValueError(f"{where} holds {kind}: sl.load takes coders that read one place and write at one")
