"""How a coder is written: the format "sae_lab", and a table of other libraries' formats, which ``saes.io.peers`` fills.

The weights file carries the config in its header too, and is replaced in one piece: a save that is killed half-way
leaves the old coder or the new one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sae_lab import cache, noting
from sae_lab.files import write_tensors
from sae_lab.saes import packing

FORMAT, VERSION = "sae_lab coder", 2  # 2: matrices in 8 or 4 bits; others are written as version 1, as before
FILES = ("config.json", "sae.safetensors")
# Other formats: (the files by which one is known, what writes a coder into a folder).
OTHERS: dict[str, tuple[tuple[str, ...], Callable[[Any, Path], Path]]] = {}


def save(coder: Any, path: str | Path, format: str, dtype: torch.dtype, bits: int | None = None) -> Path:
    """Write a coder into the folder ``path``; see ``SparseCoder.save``."""
    folder, known = Path(path), {"sae_lab": FILES} | {name: files for name, (files, _) in OTHERS.items()}
    there = {name for name, files in known.items() if all((folder / file).exists() for file in files)}
    if other := there - {format}:  # the two would overwrite each other's config
        raise ValueError(
            f"{folder} holds a coder in the format {', '.join(sorted(other))}: save the format {format!r} into a "
            f"folder of its own"
        )
    if dtype != torch.float32 and format != "sae_lab":
        raise ValueError(f"only the format 'sae_lab' is written in {dtype}: leave dtype= out for {format!r}")
    if bits is not None and (bits not in packing.BITS or format != "sae_lab" or dtype != torch.float32):
        raise ValueError(f"bits must be 8 or 4, in the format 'sae_lab' and without dtype=, got {bits} in {format!r}")
    if format not in known:
        raise ValueError(f"unknown format {format!r}; supported: {', '.join(known)}")
    coder.id  # noqa: B018 (made now, it goes into the file)
    OTHERS[format][1](coder, folder) if format in OTHERS else _write(coder, folder, dtype, bits)
    noting.save_beside(coder, folder)
    return folder


def _write(coder: Any, folder: Path, dtype: torch.dtype, bits: int | None) -> None:
    config = {
        "format": FORMAT,
        "version": 1 if bits is None else VERSION,
        "family": type(coder).__name__,
        "config": coder.config,
        "pre_bias": coder.pre_bias,
        "input_norm": coder.input_norm,
        "reads": [s.key for s in coder.reads],
        "writes": [s.key for s in coder.writes],
        "meta": coder.meta,
    }
    text = json.dumps(config, indent=2)
    tensors: dict[str, torch.Tensor] = {}
    for name, t in coder.state_dict().items():
        whole = bits is None or t.dim() < 2 or not t.is_floating_point()
        tensors |= {name: _written(name, t, dtype)} if whole else packing.packed(name, t, bits or 8)
    with cache.together(folder) as temporary:
        write_tensors(tensors, temporary / "sae.safetensors", {"config": text})
        (temporary / "config.json").write_text(text)
    coder.path = str(folder.resolve())


def _written(name: str, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor as it is written: only matrices are rounded, since biases and thresholds take little space."""
    t = t.detach().cpu().contiguous()
    if t.dim() < 2 or not t.is_floating_point():
        return t
    if not dtype.is_floating_point or not bool(t.to(dtype).isfinite().all()):
        largest = float(t.abs().max())
        raise ValueError(f"{dtype} cannot hold {name}, whose largest number is {largest:.3g}: save float32, or bits=8")
    return t.to(dtype)
