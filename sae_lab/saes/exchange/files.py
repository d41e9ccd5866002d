"""Files of other libraries, read as data or refused. No code in a file is ever run."""

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. ValueError where there is none."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except ValueError as err:
        raise ValueError(f"{file} is no JSON ({err}): download it again") from err
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(content).__name__}")
    return content


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name. ValueError for a missing, cut-off or other file."""
    try:
        with safe_open(file, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except SafetensorError as err:
        raise ValueError(f"{file} is no whole safetensors file ({err}); it was not read as anything else") from err


def read_torch(file: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote, as long as it is tensors and plain containers. ValueError for all else."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError) as err:
        reason = str(err).splitlines()[0].split(". ")[0] if str(err) else type(err).__name__  # less torch's advice
        raise ValueError(
            f"{file} is no whole file of plain tensors ({reason}). A pickle with other objects can run code and is "
            "never opened; save its state_dict alone, or as safetensors"
        ) from err
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a dictionary of tensors, got a {type(content).__name__}")
    return content


def read_npz(file: Path) -> dict[str, Tensor]:
    """Arrays of a numpy archive as tensors. ValueError for all else, pickled objects too."""
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as err:
        raise ValueError(f"{file} is no whole archive of plain arrays ({err}); nothing in it was run") from err


def tensors_only(content: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """The same dictionary, every value a tensor. ValueError else."""
    if wrong := sorted(str(name) for name, value in content.items() if not isinstance(value, Tensor)):
        raise ValueError(f"{file} must hold only tensors; others: {', '.join(wrong[:6])}")
    return content


def read_yaml(file: Path) -> dict[str, Any]:
    """A mapping of plain values in YAML. ValueError where there is none."""
    import yaml

    try:
        content = yaml.safe_load(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except (yaml.YAMLError, ValueError) as err:
        raise ValueError(f"{file} is no YAML ({str(err).splitlines()[0]}): download it again") from err
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
        with safe_open(file, framework="pt") as f:
            return {n: torch.empty(f.get_slice(n).get_shape(), device="meta") for n in f.keys()}  # noqa: SIM118
    except SafetensorError as err:
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
