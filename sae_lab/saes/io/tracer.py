"""circuit-tracer's transcoders of a whole model, as mwhanna and mntss publish them: ``config.yaml`` tells the model and
where they read and write, files beside it or elsewhere on the hub hold the weights, one file a layer.

    model_name: Qwen/Qwen3-4B
    model_kind: transcoder_set
    feature_input_hook: mlp.hook_in      # of TransformerLens: hook_resid_mid, ln2.hook_normalized, mlp.hook_in, ...
    feature_output_hook: hook_mlp_out
    transcoders:                         # without it: layer_0.safetensors, layer_1.safetensors, ... beside
    - hf://google/gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76/params.npz
"""

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sae_lab.saes.base import SparseCoder
from sae_lab.saes.io import peers, releases
from sae_lab.saes.io.layouts import read_file

CONFIG = "config.yaml"
KINDS = {
    "transcoder_set": "a transcoder for each layer: load it with sl.TranscoderSet.load",
    "cross_layer_transcoder": "a cross-layer transcoder (CLT): load it with sl.CrossLayerTranscoder.load",
}
_URI = re.compile(r"hf://([\w.-]+/[\w.-]+)/([^?]+)(?:\?revision=([\w./-]+))?")


class Source(NamedTuple):
    """A folder on this machine, or one of a repository on the hub. names: of files in it. get: the path of one of them,
    which is downloaded first where it has to be."""

    where: str
    names: Collection[str]
    get: Callable[[str], Path]


def source(path: str | Path, id: str | None) -> Source:
    """What lies at a folder, or at "user/name" or "user/name/folder" on the hub. id: a folder inside."""
    folder = Path(path).expanduser() / (id or "")
    if folder.is_dir():
        names = [f.relative_to(folder).as_posix() for pattern in ("*", "*/*") for f in folder.glob(pattern)]
        return Source(str(folder), names, folder.joinpath)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(/.+)?", str(path))
    if match is None:
        raise ValueError(f"no transcoders at {folder}: pass a folder or a hub repository, 'user/name' with id='folder'")
    inside = "/".join(part.strip("/") for part in (match[2], id) if part)
    below = f"{inside}/" if inside else ""
    names = [n.removeprefix(below) for n in releases.files_of(match[1], inside) if n.startswith(below)]
    return Source(f"{match[1]}/{below}".rstrip("/"), names, lambda name: releases.download(match[1], below + name))


def config_of(place: Source, kind: str) -> dict[str, Any]:
    """A ``config.yaml`` of this ``model_kind``. ValueError for another one, and where it leaves a place open."""
    if CONFIG not in place.names:
        inside = sorted(n.removesuffix(f"/{CONFIG}") for n in place.names if n.endswith(f"/{CONFIG}"))
        more = f"pass id=, one of {', '.join(inside[:6])}" if inside else "circuit-tracer's have one"
        raise ValueError(f"no transcoders in {place.where}: it has no {CONFIG}; {more}")
    config = read_file(place.get(CONFIG))
    said = config.get("model_kind", "transcoder_set")
    if said != kind:
        known = f"which is {KINDS[said]}" if said in KINDS else f"known here: {', '.join(KINDS)}"
        raise ValueError(f"{place.where}/{CONFIG} has model_kind {str(said)[:40]!r}, {known}")
    if wrong := [key for key in ("feature_input_hook", "feature_output_hook") if not isinstance(config.get(key), str)]:
        raise ValueError(f"{place.where}/{CONFIG} does not say where transcoders read and write: it lacks {wrong[0]}")
    return config


def hooks(config: dict[str, Any], layer: int) -> dict[str, str]:
    """reads and writes of a layer's transcoder, by TransformerLens's names."""
    named = (config[key].replace("{layer}", str(layer)) for key in ("feature_input_hook", "feature_output_hook"))
    into, out = (name if name.startswith("blocks.") else f"blocks.{layer}.{name}" for name in named)
    return {"reads": into, "writes": out}


def read_set(path: str | Path, id: str | None, model: str | None) -> list[SparseCoder]:
    """The transcoders of a set, each read as its own file is. model: goes before what the config says."""
    place = source(path, id)
    config = config_of(place, "transcoder_set")
    model, coders = model or config.get("model_name"), []
    for layer, file, address in weights(config, place):
        coder = peers.read(file, {"model": model, "path": address, **hooks(config, layer)})
        assert coder is not None, "a file is read, or refused"
        coders.append(coder)
    return coders


def weights(config: dict[str, Any], place: Source) -> Iterator[tuple[int, Path, str]]:
    """(layer, file, address) of each layer's weights. ValueError where the config names no such file."""
    listed = config.get("transcoders")
    if listed is None:
        found = {int(m[1]): m[0] for n in place.names if (m := re.fullmatch(r"layer_(\d+)\.safetensors", n))}
        if not found:
            raise ValueError(f"{place.where} holds no layer_0.safetensors, ..., and its {CONFIG} no 'transcoders'")
        listed = [{"layer": layer, "filepath": found[layer]} for layer in sorted(found)]
    if not isinstance(listed, list):
        raise ValueError(f"'transcoders' in {place.where}/{CONFIG} must be a list of files, got {str(listed)[:40]!r}")
    for number, entry in enumerate(listed):
        entry = entry if isinstance(entry, dict) else {"filepath": entry}
        layer, name = entry.get("layer", number), str(entry.get("filepath"))
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"a layer in {place.where}/{CONFIG} must be a whole number, got {str(layer)[:40]!r}")
        if match := _URI.fullmatch(name):
            yield layer, releases.download(*match.groups()), f"{match[1]}/{match[2]}"
        elif Path(name).is_absolute() or ".." in Path(name).parts or not (file := place.get(name)).is_file():
            raise ValueError(
                f"{place.where}/{CONFIG} names the weights {name[:60]!r}, which must be hf://user/name/file, or a file "
                "in its folder"
            )
        else:
            yield layer, file, f"{place.where}/{name}"
