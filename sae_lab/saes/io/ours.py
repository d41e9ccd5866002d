"""Our own format, read: ``config.json`` for people and tools, ``sae.safetensors`` for weights, every tensor checked."""

import logging
from pathlib import Path
from typing import Any

import torch

from sae_lab import files
from sae_lab.saes import packing
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.families import FAMILIES
from sae_lab.saes.io.layouts import must_hold
from sae_lab.saes.writing import FORMAT, VERSION
from sae_lab.types import Site, TokenMask

log = logging.getLogger(__name__)

OTHERS: dict[str, type[SparseCoder]] = {}  # coders that are no family of one place: saes.clt adds its own
SHIPPED = Path(__file__).parents[2] / "data" / "saes"  # made by benchmarks/train_shipped.py
# What a coder's meta may hold, by type: it comes from files that anybody may have written.
_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "model": (str, type(None)), "model_fingerprint": (str,), "text": (str,), "f_scale": (str,), "scale": (str,),
    "prefix_id": (int, type(None)), "context": (int,), "dead_tokens": _NUMBER, "train_tokens": _NUMBER,
    "dead": _NUMBER, "excluded": _NUMBER, "centred": (bool,), "needs_gain": (bool,), "train": (dict,),
    "changes": (list,), "card": (dict,), "check": (dict,), "source": (dict,), "expected": (dict,), "id": (str,),
    "mask": (dict, type(None)), "trained_from": (str,),
}  # fmt: skip


def shipped() -> list[str]:
    """The names of the coders that come with the library."""
    return sorted("/".join(file.parts[-3:-1]) for file in SHIPPED.glob("*/*/config.json"))


def home(name: Path) -> Path:
    """Where a coder or a set of this name comes with the library, if one does."""
    inside = name.parts and not name.is_absolute() and ".." not in name.parts
    return SHIPPED / name if inside else SHIPPED / "none"


def read(folder: Path, said: dict[str, Any]) -> SparseCoder:
    """The coder in a folder. said: what the caller says of it, which is refused: the files note all of it."""
    file = folder / "config.json"
    if file.is_file() and (names := sorted(said.get("said", ()))):
        raise ValueError(f"{folder} was written by sae_lab, which records these: leave out {', '.join(names)}")
    config = _read_config(file)
    weights, inside = _read_weights(folder / "sae.safetensors")
    if inside is not None and inside != config:
        log.warning("%s differs from the config inside sae.safetensors, which is used", file)
        config = inside
    return build(config, weights, folder)


def build(config: dict[str, Any], weights: dict[str, torch.Tensor], where: Path) -> SparseCoder:
    """A coder from its config and weights, every tensor checked."""
    family = {**FAMILIES, **OTHERS}.get(config["family"])
    if family is None:
        raise ValueError(f"{where} holds a coder of family {config['family']!r}; known here: {', '.join(FAMILIES)}")
    try:
        with torch.device("meta"):  # shapes, and no memory: a config can name a coder of any size
            coder = family(**config["config"])
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError) as err:
        raise ValueError(f"{where}/config.json has a config that {config['family']} does not take ({err})") from err
    try:
        weights = packing.unpacked(weights, coder.state_dict())
    except ValueError as err:
        raise ValueError(f"{where}/sae.safetensors: {err}") from None
    check(coder, weights, f"{where}/sae.safetensors")
    assign(coder, weights)
    coder.pre_bias, coder.input_norm = config["pre_bias"], config["input_norm"]
    coder.reads = tuple(Site.of(s) for s in config["reads"])
    coder.writes = tuple(Site.of(s) for s in config["writes"])
    coder.meta = config["meta"]
    coder.in_raw_units = True
    return coder.eval()


def check(coder: SparseCoder, weights: dict[str, torch.Tensor], where: str) -> None:
    """ValueError unless these are the coder's tensors, in shape and kind, and finite."""
    expected = coder.state_dict()
    must_hold(weights, expected, where)
    may_be_nan = {name for name, _ in coder.named_buffers()} & {"threshold"}  # until it is fitted
    for name, shaped in expected.items():
        tensor = weights[name]
        if tensor.shape != shaped.shape:
            raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, its config says {tuple(shaped.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, not floats")
        if name not in may_be_nan and not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: {name} holds NaN or Inf; this coder's training failed or the file is damaged")


def assign(coder: SparseCoder, weights: dict[str, torch.Tensor]) -> None:
    """Give a coder that was built without memory these weights, laid out in memory as its own."""
    shaped = coder.state_dict()
    held = {name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for name, t in shaped.items()}
    for name, tensor in weights.items():
        held[name].copy_(tensor)
    coder.load_state_dict(held, assign=True)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return _checked(files.read_json(file))
    except FileNotFoundError:
        raise ValueError(f"no coder in {file.parent}: it has no config.json (sae.save writes one)") from None
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{file} is not a coder's config that this version can read: {err}") from err


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    if config["format"] != FORMAT:
        raise ValueError(f"format {config['format']!r}, expected {FORMAT!r}")
    if config["version"] > VERSION:
        raise ValueError(f"format version {config['version']} is newer than {VERSION}: upgrade sae_lab")
    kinds = {"family": str, "config": dict, "pre_bias": bool, "reads": list, "writes": list, "meta": dict}
    for key, kind in kinds.items():
        if not isinstance(config[key], kind):
            raise ValueError(f"its {key!r} is {type(config[key]).__name__}, not {kind.__name__}")
    if wrong := [s for s in [*config["reads"], *config["writes"]] if not isinstance(s, str)]:
        raise ValueError(f"its sites must be named by text, got {wrong[0]!r:.60}")
    check_meta(config["meta"])
    if config["input_norm"] not in ("none", "layer", "length"):
        raise ValueError(f"its 'input_norm' is {config['input_norm']!r}; known here: none, layer, length")
    return config


def check_meta(meta: dict[str, Any]) -> None:
    """ValueError where an entry that this library reads has another type. Entries it does not know may be anything."""
    for name, kinds in _TYPES.items():
        if name not in meta:
            continue
        value = meta[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            words = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"its meta's {name!r} must be {words}, got {type(value).__name__} {str(value)[:40]!r}")
    if (context := meta.get("context", 1)) < 1:
        raise ValueError(f"its meta's 'context' must be at least 1, got {context}")
    for name, value in meta.get("expected", {}).items():
        if isinstance(value, bool) or not isinstance(value, _NUMBER):
            raise ValueError(f"its meta's expected {name!r} must be a number, got {type(value).__name__}")
    if meta.get("mask"):
        TokenMask.from_dict(meta["mask"])


def _read_weights(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    try:
        tensors, notes = files.read_tensors(file)
        inside = notes.get("config")
        return tensors, None if inside is None else _checked(files.parse_json(inside))
    except FileNotFoundError:
        raise ValueError(f"no coder in {file.parent}: it has no sae.safetensors") from None
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{file} is no whole safetensors file ({err}); it was not read as anything else") from err
