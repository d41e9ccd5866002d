"""Coders on disk: ``config.json`` for people and tools, ``sae.safetensors`` for weights. Nothing is ever unpickled.

The weights file carries the same config in its header and is replaced in one piece, so that a save which is killed
half-way leaves the old coder or the new one. ``load`` is also the door to the formats of other libraries
(``exchange``) and to what was published (``releases``).
"""

import json
import logging
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from sae_lab import cache, files, noting
from sae_lab.arguments import as_annotated
from sae_lab.files import write_tensors as save_file
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.meta import check_meta
from sae_lab.types import Site

log = logging.getLogger(__name__)

FORMAT, VERSION = "sae_lab coder", 1
_SAID = {
    "model": "a model's name", "centred": "True or False",
    "scale": "a number above 0, by which activations were multiplied",
}  # fmt: skip
SHIPPED = Path(__file__).parent.parent / "data" / "saes"  # made by benchmarks/train_shipped.py


def save(
    coder: SparseCoder, path: str | Path, format: str = "sae_lab", dtype: torch.dtype = torch.float32
) -> Path:  # fmt: skip
    """Write a coder into the folder ``path``; see ``SparseCoder.save``.

    format: "sae_lab" keeps all of it; "saelens", "sparsify", "dictionary_learning": as those libraries read it, without
    ``f_scale``. Raises ValueError for an unknown format, a coder that the format cannot hold, or a dtype that cannot.
    """
    from sae_lab.saes import exchange

    _require_free(Path(path), format)
    if dtype != torch.float32 and format != "sae_lab":
        raise ValueError(f"only the format 'sae_lab' is written in {dtype}: leave dtype= out for {format!r}")
    coder.id  # noqa: B018 (made now, it goes into the file)
    if format in exchange.WRITES:
        folder = exchange.save(coder, Path(path), format)
        noting.save_beside(coder, folder)
        return folder
    if format != "sae_lab":
        raise ValueError(f"unknown format {format!r}; supported: sae_lab, {', '.join(exchange.WRITES)}")
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
        save_file(tensors, temporary / "sae.safetensors", {"config": text})
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


@as_annotated
def load(
    path: str | Path, id: str | None = None, check: Any = None, *, model: str | None = None,
    reads: Site | str | None = None, writes: Site | str | None = None, centred: bool | None = None,
    scale: float | None = None, k: int | None = None,
) -> SparseCoder:  # fmt: skip
    """Read a coder, in eval mode.

    path: a coder that comes with the library, "smollm2-135m/resid_post-8" (its ``sae.meta["card"]`` says what it was
    trained on and how good it is); a folder of ``sae.save``, of SAELens, sparsify, dictionary_learning, Gemma Scope,
    Llama Scope or circuit-tracer, or its file of weights (what is in the files tells which); a release's name, such as
    "gemma-scope-2b-pt-res-canonical"; or a hub repository, "user/name". id: the coder in it,
    "layer_20/width_16k/canonical"; a folder or file inside for the others. check: activations (a tensor, or a store) on
    which FVU and L0 are measured; warns where they are absurd or contradict what the checkpoint states, see
    ``sae.meta["check"]``.

    What another library's files do not say, the caller can; an error says which of these is needed. It goes before what
    the files say. model: the hub's name of the model it was trained on. reads, writes: places, as ``sl.Site`` or as
    the other library names them ("blocks.20.ln2.hook_normalized"); writes only for a transcoder. centred: whether it
    was trained on a stream with mean 0 (TransformerLens's ``center_writing_weights``). scale: the number by which its
    training multiplied activations. k: of a TopK.

    Codes are those of the library it comes from, computed from transformers' activations at ``sae.reads``. What the
    files do not say is marked: ``sae.meta["model"]`` "unknown", ``sae.mask`` None, ``f_scale`` 0 and
    ``sae.meta["f_scale"]`` "unknown" until ``check`` or ``sae.calibrate`` fits it.

    Raises ValueError for an unknown name, id, format, class or family (with what is known), a newer format, files that
    leave open what the coder is, crosscoders and cross-layer transcoders of other libraries, and weights that are
    damaged, missing, of the wrong shape, or not finite. Code inside a file is never run.
    """
    for name, value, kind in (("model", model, str), ("centred", centred, bool), ("scale", scale, int | float)):
        if value is not None and (not isinstance(value, kind) or (name == "scale" and isinstance(value, bool))):
            raise ValueError(f"{name} must be {_SAID[name]}, got {value!r}")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale must be {_SAID['scale']}, got {scale!r}")
    said = {"model": model, "reads": reads, "writes": writes, "centred": centred, "scale": scale, "k": k}
    said = {name: value for name, value in said.items() if value is not None}
    coder, coder.path = _find(path, id, {**said, "said": set(said)} if said else {})
    if coder.path is not None:
        noting.bring_in(coder, Path(coder.path))
    if check is not None:
        from sae_lab.saes.check import check as measure

        measure(coder, check)
    return coder


def _find(path: str | Path, id: str | None, said: dict[str, Any]) -> tuple[SparseCoder, str | None]:
    """(the coder, where it lies; None for a release, whose name and id are in meta)"""
    from sae_lab.saes import exchange

    folder = Path(path).expanduser()
    here = Path(exchange.named((folder / id if id is not None else folder).as_posix(), os.path.isfile))
    if here.is_file():
        home = exchange.home(here.as_posix(), os.path.isfile)
        here = here if home is None else Path(home or "/" if here.is_absolute() else home or ".")
    if here.exists():
        return _read(here, said), str(here.resolve())
    if path in shipped() and id is None:
        return _read_ours(SHIPPED / path, said), str(path)
    return _published(path, id, said), None


def _read(here: Path, facts: dict[str, Any]) -> SparseCoder:
    from sae_lab.saes import exchange

    return exchange.read(here, facts) or _read_ours(here, facts)


def shipped() -> list[str]:
    """The names of the coders that come with the library."""
    return sorted("/".join(file.parts[-3:-1]) for file in SHIPPED.glob("*/*/config.json"))


def _published(path: str | Path, id: str | None, said: dict[str, Any]) -> SparseCoder:
    """From the hub; ValueError for a path or name that is nothing."""
    from sae_lab.saes import releases

    ours = shipped()  # a name as theirs is hardly a repository's: the hub is not asked
    like = get_close_matches(str(path), ours, cutoff=0.8) or [n for n in ours if Path(n).parent == Path(path).parent]
    named = isinstance(path, str) and not like and not Path(path).is_dir()
    found = releases.locate(path, id) if named else None  # type: ignore[arg-type]
    if found is None:
        inside = _ids(Path(path))
        if inside:
            known = f"that holds one (ids here: {', '.join(inside)})"
        else:
            like = like or releases.near(str(path))
            known = "another library did, a hub repository 'user/name', a release's name, or one that comes with the "
            known += f"library; names like it: {', '.join(like)}" if like else f"library: {', '.join(ours)}"
        asked = f"{str(path)!r}{f' with id {id!r}' if id else ''}"
        raise ValueError(f"no coder at {asked}: pass a folder that sae.save wrote or {known}")
    return _read(releases.fetch(found), {**found.facts, **said})


def _ids(folder: Path) -> list[str]:
    """What could be loaded from a folder, for messages."""
    from sae_lab.saes import exchange

    names = []
    for root, folders, inside in os.walk(folder):
        below = Path(root).relative_to(folder)
        folders[:] = folders[:200] if len(below.parts) < 4 and len(names) < 2_000 else []
        names += [(below / file).as_posix() for file in inside]
    return exchange.coders_in(names)[:8]


def _read_ours(folder: Path, said: dict[str, Any]) -> SparseCoder:
    file = folder / "config.json"
    if not (folder / "sae.safetensors").is_file() and (inside := _ids(folder)):
        raise ValueError(f"no coder in {folder}: it has no config.json (sae.save writes one); pass id=, {inside}")
    if file.is_file() and (names := sorted(said.get("said", ()))):
        raise ValueError(f"{folder} was written by sae_lab, which notes that: leave out {', '.join(names)}")
    config = _read_config(file)
    weights, inside = _read_weights(folder / "sae.safetensors")
    if inside is not None and inside != config:
        log.warning("%s differs from the config inside sae.safetensors, which is used", file)
        config = inside
    return build(config, weights, folder)


def build(config: dict[str, Any], weights: dict[str, torch.Tensor], where: Path) -> SparseCoder:
    """A coder from its config and weights, every tensor checked."""
    from sae_lab.saes import FAMILIES

    family = FAMILIES.get(config["family"])
    if family is None:
        raise ValueError(f"{where} holds a coder of family {config['family']!r}; known here: {', '.join(FAMILIES)}")
    try:
        with torch.device("meta"):  # shapes, and no memory: a config can name a coder of any size
            coder = family(**config["config"])
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError) as err:
        raise ValueError(f"{where}/config.json has a config that {config['family']} does not take ({err})") from err
    assign(coder, weights, where, f"{where}/sae.safetensors")
    coder.pre_bias = config.get("pre_bias", coder.pre_bias)  # files of before 0.2 have neither
    coder.input_norm = config.get("input_norm", coder.input_norm)
    coder.reads = tuple(Site.of(s) for s in config["reads"])
    coder.writes = tuple(Site.of(s) for s in config["writes"])
    coder.meta = config["meta"]
    coder.in_raw_units = True
    return coder.eval()


def assign(coder: SparseCoder, weights: dict[str, torch.Tensor], where: Path | str, file: str = "") -> None:
    """Give a coder that was built without memory these weights, every tensor checked. ValueError else."""
    expected = coder.state_dict()
    if missing := sorted(expected.keys() ^ weights.keys()):
        raise ValueError(f"{file or where} must hold {sorted(expected)}; missing or surplus: {missing}")
    for name, shaped in expected.items():
        tensor = weights[name]
        if tensor.shape != shaped.shape:
            raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, its config says {tuple(shaped.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, not floats")
        if name != "threshold" and not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: {name} holds NaN or Inf; this coder's training failed or the file is damaged")
    held = {name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for name, t in expected.items()}
    for name, tensor in weights.items():
        held[name].copy_(tensor)
    coder.load_state_dict(held, assign=True)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return _checked(files.read_json(file))
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
    if wrong := [s for s in [*config["reads"], *config["writes"]] if not isinstance(s, str)]:
        raise ValueError(f"its sites must be named by text, got {wrong[0]!r:.60}")
    check_meta(config["meta"])
    if not isinstance(config.get("pre_bias", True), bool):
        raise ValueError(f"its 'pre_bias' is {config['pre_bias']!r}, not true or false")
    if config.get("input_norm", "none") not in ("none", "layer", "length"):
        raise ValueError(f"its 'input_norm' is {config['input_norm']!r}; known here: none, layer, length")
    return config


def _read_weights(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    try:
        tensors, notes = files.read_tensors(file)
        inside = notes.get("config")
        return tensors, None if inside is None else _checked(files.parse_json(inside))
    except FileNotFoundError:
        raise ValueError(f"no coder in {file.parent}: it has no sae.safetensors") from None
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{file} is no whole safetensors file ({err}); it was not read as anything else") from err
