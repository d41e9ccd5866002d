"""Coders on disk: ``config.json`` for people and tools, ``sae.safetensors`` for weights. Nothing is ever unpickled.

The weights file carries the same config in its header and is replaced in one piece, so that a save which is killed
half-way leaves the old coder or the new one.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sae_lab import cache
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site

log = logging.getLogger(__name__)

FORMAT, VERSION = "sae_lab coder", 1


def save(coder: SparseCoder, path: str | Path) -> Path:
    """Write a coder into the folder ``path``."""
    folder = cache.make_folder(Path(path))
    config = {
        "format": FORMAT,
        "version": VERSION,
        "family": type(coder).__name__,
        "config": coder.config,
        "reads": [s.key for s in coder.reads],
        "writes": [s.key for s in coder.writes],
        "meta": coder.meta,
    }
    text = json.dumps(config, indent=2)
    tensors = {name: t.detach().cpu().contiguous() for name, t in coder.state_dict().items()}
    with cache.atomic(folder / "sae.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"config": text})
    with cache.atomic(folder / "config.json") as temporary:
        temporary.write_text(text)
    return folder


def load(path: str | Path, id: str | None = None) -> SparseCoder:
    """Read a coder that ``sae.save`` wrote, in eval mode.

    Raises ValueError for a folder without one, a newer format, an unknown family, or weights that are damaged, missing,
    of the wrong shape, or not finite.
    """
    folder = Path(path)
    if id is not None or not folder.is_dir():
        raise ValueError(f"no coder at {path!r}{f' with id {id!r}' if id else ''}: pass a folder that sae.save wrote")
    config = _read_config(folder / "config.json")
    weights, inside = _read_weights(folder / "sae.safetensors")
    if inside is not None and inside != config:
        log.warning("%s differs from the config inside sae.safetensors, which is used", folder / "config.json")
        config = inside
    return build(config, weights, folder)


def build(config: dict[str, Any], weights: dict[str, torch.Tensor], where: Path) -> SparseCoder:
    """A coder from its config and weights, every tensor checked."""
    from sae_lab.saes import FAMILIES

    family = FAMILIES.get(config["family"])
    if family is None:
        raise ValueError(f"{where} holds a coder of family {config['family']!r}; known here: {', '.join(FAMILIES)}")
    said = (config["config"].get("d_in"), config["config"].get("d_sae"))
    if "W_enc" in weights and tuple(weights["W_enc"].shape) != said:  # before any memory is taken for such a coder
        raise ValueError(f"{where}: W_enc has shape {tuple(weights['W_enc'].shape)}, its config says {said}")
    try:
        coder = family(**config["config"])
    except TypeError as err:
        raise ValueError(f"{where}/config.json has a config that {config['family']} does not take ({err})") from err
    expected = coder.state_dict()
    if missing := sorted(expected.keys() ^ weights.keys()):
        raise ValueError(f"{where}/sae.safetensors must hold {sorted(expected)}; missing or surplus: {missing}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, its config says {tuple(expected[name].shape)}"
            )
        if name != "threshold" and not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: {name} holds NaN or Inf; this coder's training failed or the file is damaged")
    coder.load_state_dict(weights)
    coder.reads = tuple(Site.of(s) for s in config["reads"])
    coder.writes = tuple(Site.of(s) for s in config["writes"])
    coder.meta = config["meta"]
    return coder.eval()


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return _checked(json.loads(file.read_bytes()))
    except FileNotFoundError:
        raise ValueError(f"no coder in {file.parent}: it has no config.json (sae.save writes one)") from None
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{file} is no coder's config that this version reads: {err}") from err


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    if config["format"] != FORMAT:
        raise ValueError(f"format {config['format']!r}, expected {FORMAT!r}")
    if config["version"] > VERSION:
        raise ValueError(f"format version {config['version']} is newer than {VERSION}: upgrade sae_lab")
    for key, kind in (("family", str), ("config", dict), ("reads", list), ("writes", list), ("meta", dict)):
        if not isinstance(config[key], kind):
            raise ValueError(f"its {key!r} is {type(config[key]).__name__}, not {kind.__name__}")
    return config


def _read_weights(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    try:
        with safe_open(file, framework="pt") as f:
            inside = (f.metadata() or {}).get("config")
            return {name: f.get_tensor(name) for name in f.keys()}, inside and _checked(json.loads(inside))  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"no coder in {file.parent}: it has no sae.safetensors") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{file} is no whole safetensors file ({err}); it was not read as anything else") from err
