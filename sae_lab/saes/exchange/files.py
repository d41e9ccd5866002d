"""Files of other libraries, read as data or refused. No code in a file is ever run."""

import json
import pickle
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
