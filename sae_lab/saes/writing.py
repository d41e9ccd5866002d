"""How a coder is written: our own format, and the table of those of other libraries, which ``saes.io.peers`` fills.

The weights file carries the same config in its header as ``config.json`` holds, and is replaced in one piece, so that a
save which is killed half-way leaves the old coder or the new one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sae_lab import cache, noting
from sae_lab.files import write_tensors

FORMAT, VERSION = "sae_lab coder", 1
OTHERS: dict[str, Callable[[Any, Path], Path]] = {}  # format: what writes a coder into a folder


def save(coder: Any, path: str | Path, format: str, dtype: torch.dtype) -> Path:
    """Write a coder into the folder ``path``; see ``SparseCoder.save``.

    format: "sae_lab" keeps all of it; "saelens", "sparsify", "dictionary_learning": as those libraries read it, without
    ``f_scale``. Raises ValueError for an unknown format, a coder that the format cannot hold, or a dtype that cannot.
    """
    _require_free(Path(path), format)
    if dtype != torch.float32 and format != "sae_lab":
        raise ValueError(f"only the format 'sae_lab' is written in {dtype}: leave dtype= out for {format!r}")
    coder.id  # noqa: B018 (made now, it goes into the file)
    if format in OTHERS:
        folder = OTHERS[format](coder, Path(path))
        noting.save_beside(coder, folder)
        return folder
    if format != "sae_lab":
        raise ValueError(f"unknown format {format!r}; supported: sae_lab, {', '.join(OTHERS)}")
    folder = Path(path)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "family": type(coder).__name__,
        "config": coder.config,
        "pre_bias": coder.pre_bias,
        "input_norm": coder.input_norm,
        "reads": [s.key for s in coder.reads],
        "writes": [s.key for s in coder.writes],
        "meta": coder.meta,
    }
    text = json.dumps(config, indent=2)
    tensors = {name: _written(name, t, dtype) for name, t in coder.state_dict().items()}
    with cache.together(folder) as temporary:
        write_tensors(tensors, temporary / "sae.safetensors", {"config": text})
        (temporary / "config.json").write_text(text)
    coder.path = str(folder.resolve())
    noting.save_beside(coder, folder)
    return folder


def _written(name: str, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is written of a tensor. Biases, thresholds and scales take no space worth rounding them for."""
    t = t.detach().cpu().contiguous()
    if t.dim() < 2 or not t.is_floating_point():
        return t
    if not dtype.is_floating_point or not bool(t.to(dtype).isfinite().all()):
        largest = float(t.abs().max())
        raise ValueError(f"{dtype} cannot hold {name}, whose largest number is {largest:.3g}: save float32")
    return t.to(dtype)


# The files that tell a format, some of them of several.
_FILES = {
    "sae_lab": {"config.json", "sae.safetensors"},
    "saelens": {"cfg.json", "sae_weights.safetensors"},
    "sparsify": {"cfg.json", "sae.safetensors"},
    "dictionary_learning": {"config.json", "ae.pt"},
}


def _require_free(folder: Path, format: str) -> None:
    """Two formats in one folder would overwrite each other's config: the coder there would load as another one."""
    there = {name for name, files in _FILES.items() if all((folder / file).exists() for file in files)}
    if other := there - {format}:
        raise ValueError(
            f"{folder} holds a coder in the format {', '.join(sorted(other))}: save the format {format!r} into a "
            f"folder of its own"
        )
