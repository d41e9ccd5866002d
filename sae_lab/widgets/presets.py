"""Presets of SteeringSliders: prompt, sliders and settings as a JSON file that names its coder."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sae_lab import cache
from sae_lab.saes.base import SparseCoder

VERSION = 1
SETTINGS = ("prompt", "max_new_tokens", "temperature", "seed", "target")


def content(coder: SparseCoder, settings: Mapping[str, Any], sliders: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A preset as plain data. ValueError for a slider that acts on several features, or not everywhere."""
    for row in sliders:
        if row["more"] or len(row["features"]) > 1:
            what = row["more"] or f"several features {row['features']}"
            raise ValueError(
                f"a preset keeps sliders of one feature at every token, not {what}: use session.save(path)"
            )
    kept = [{"feature": row["features"][0], "strength": row["strength"], "on": row["on"]} for row in sliders]
    return {"sae_lab steering": VERSION, "coder": coder.fingerprint(), **settings, "sliders": kept}


def write(path: pathlib.Path, preset: Mapping[str, Any]) -> pathlib.Path:
    with cache.atomic(path) as temporary:
        temporary.write_text(json.dumps(preset, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def read(path: pathlib.Path, coder: SparseCoder) -> tuple[dict[str, Any], list[tuple[int, float, bool]]]:
    """(settings, sliders: (feature, strength, on)) of a preset. ValueError for what is none and for another coder's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version, fingerprint = found["sae_lab steering"], found["coder"]
        settings = {name: found[name] for name in SETTINGS}
        sliders = [(row["feature"], float(row["strength"]), bool(row["on"])) for row in found["sliders"]]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{path} is no steering preset ({err!r}): give a file that SteeringSliders saved") from err
    if version != VERSION:
        raise ValueError(f"{path} is a preset of version {version}, this library reads version {VERSION}")
    if fingerprint != (ours := coder.fingerprint()):
        raise ValueError(
            f"{path} was made with another coder (weights {fingerprint}, these are {ours}), where its features mean "
            "something else: open SteeringSliders with that coder"
        )
    return settings, sliders


def in_folder(name: str) -> pathlib.Path:
    """A file of the working folder by its bare name."""
    name = name.strip()
    if not name or pathlib.PurePath(name).name != name or "\\" in name or name.startswith("."):
        raise ValueError(f"a preset's name is a plain file name such as war.json, got {name!r}")
    return pathlib.Path(name if name.endswith(".json") else f"{name}.json")
