"""Coders of other libraries: which format a folder has, how it is read, and how our coders are written in it.

Reading: SAELens (6 and before), sparsify, dictionary_learning, Gemma Scope 1 and 2, Llama Scope, Language-Model-SAEs,
circuit-tracer, Goodfire, Qwen Scope. Writing: SAELens 6, sparsify, dictionary_learning. A coder that a format cannot
hold is refused; so are files that leave open what a coder is, unless the caller says it (``sl.load(path, reads=...)``).

Codes are those of the other library, computed from the activations that transformers gives at ``sae.reads``. What
differs there from TransformerLens (``places``), where many of these coders were trained, is folded into the encoder.
"""

import io
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sae_lab import cache
from sae_lab.files import write_tensors
from sae_lab.saes import writing
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.io import dictionary_learning, gemma_scope, lm_saes, saelens, scopes, sparsify
from sae_lab.saes.io.foreign import Checkpoint, fold_gain
from sae_lab.saes.io.parts import Parts

__all__ = ["FILES", "OURS", "coders_in", "fold_gain", "format_of", "home", "named", "read", "save"]

Reader = Callable[[Path, dict[str, Any]], Checkpoint]

# format: (the files that tell it, files it may have beside, its reader)
FILES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Reader]] = {
    "saelens": (("cfg.json", "sae_weights.safetensors"), ("sparsity.safetensors",), saelens.read),
    "sparsify": (("cfg.json", "sae.safetensors"), ("../config.json",), sparsify.read),
    "dictionary_learning": (("ae.pt",), ("config.json",), dictionary_learning.read),
    "gemma_scope": (("params.npz",), (), gemma_scope.read_1),
    "gemma_scope_2": (("params.safetensors",), ("config.json",), gemma_scope.read_2),
    "llama_scope": (("hyperparams.json", "checkpoints/final.safetensors"), (), scopes.read_llama_scope),
    "lm_saes": (("config.json", "sae_weights.safetensors"), (), lm_saes.read),
}
OURS = writing.FILES
_WEIGHTS = (".safetensors", ".pt", ".pth", ".npz")
_WRITERS = {"saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning}


def format_of(names: set[str]) -> str | None:
    """The format with these files (relative to the coder's folder), or None."""
    return next((name for name, (files, _, _) in FILES.items() if set(files) <= names), None)


def home(file: str, there: Callable[[str], bool]) -> str | None:
    """The folder of the coder whose config or weights a file is; None for a file that stands for itself."""
    likely = []
    for files, beside in (*((files, beside) for files, beside, _ in FILES.values()), (OURS, ())):
        for name in (*files, *beside):
            if file == name or file.endswith("/" + name):
                folder = file[: -len(name)].rstrip("/")
                if all(there(f"{folder}/{n}" if folder or file.startswith("/") else n) for n in files):
                    return folder
                likely += [folder] if name in files else []
    return likely[0] if likely else None


def named(id: str, there: Callable[[str], bool]) -> str:
    """The file of an id without its ending ("layer3" for "layer3.sae.pt"); the id itself where there is none."""
    endings = ("", *_WEIGHTS, ".sae.pt")
    return next((id + ending for ending in endings if there(id + ending)), id)


def coders_in(names: Iterable[str]) -> list[str]:
    """Below a folder with these files: the folders that hold a coder, and files that may be one by themselves."""
    names = set(names)
    folders = {home(name, names.__contains__) for name in names if name.endswith(_WEIGHTS)} - {None}
    sets = [*(files for files, _, _ in FILES.values()), OURS]  # what tells a format, and ours
    whole = {f for f in folders if f and any({f"{f}/{n}" for n in files} <= names for files in sets)}
    loose = {n for n in names if n.endswith(_WEIGHTS) and home(n, names.__contains__) is None}
    loose -= {n for n in loose if any(n.startswith(f + "/") for f in whole)}
    return sorted(whole, key=_by_number) + sorted(loose, key=_by_number)


def _by_number(name: str) -> list[Any]:
    """Sorts layer2 before layer10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def read(path: Path, facts: dict[str, Any] | None = None) -> SparseCoder | None:
    """The coder in a folder or a file of another library; None where no format is recognised.

    facts: of the release, or given by the caller, beyond what the files say.
    """
    facts = facts or {}
    if path.is_file():
        return _checked("single-file", scopes.read_single, path, facts)
    present = {name for files, _, _ in FILES.values() for name in files if (path / name).is_file()}
    found = format_of(present)
    if found is None and (cut := {"cfg.json", "sae_weights.safetensors", "hyperparams.json"} & present):
        wants = sorted({f for files, _, _ in FILES.values() if cut & set(files) for f in files} - present)
        raise ValueError(f"{path} has {', '.join(sorted(cut))}, but not what belongs to it: {' or '.join(wants)}")
    if found is None and not (path / OURS[1]).is_file():
        loose = sorted((f for f in path.iterdir() if f.suffix in _WEIGHTS), key=lambda f: _by_number(f.name))
        if len(loose) == 1 and not any(f.is_dir() for f in path.iterdir()):
            return _checked("single-file", scopes.read_single, loose[0], facts)
        if loose:  # one of many files of one coder is told by its tensors; else one of them must be named
            scopes.refuse_parts(loose)
    return _checked(found, FILES[found][2], path, facts) if found else None


def _checked(format: str, reader: Reader, path: Path, facts: dict[str, Any]) -> SparseCoder:
    """The coder. An error of a reader means that the file is not as its format is: ValueError."""
    try:
        found = reader(path, facts)
        found.say(facts)
        return found.build()
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ZeroDivisionError) as err:
        raise ValueError(
            f"{path} is no whole {format} checkpoint: its config or tensors are not what that format has "
            f"({type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''})"
        ) from err


def save(coder: SparseCoder, path: Path, format: str) -> Path:
    """Write a coder in another library's format. ValueError for what that format cannot hold; f_scale is not kept."""
    parts, peer = Parts(coder), _WRITERS[format]
    with cache.together(path, valid=peer.WEIGHTS) as folder:
        # As safetensors wants them: contiguous, none sharing memory.
        tensors = {n: t.clone(memory_format=torch.contiguous_format) for n, t in peer.write(parts, folder).items()}
        if format == "dictionary_learning":
            content = io.BytesIO()  # written by torch itself, a full disk would be an error without a reason
            torch.save(tensors, content)
            (folder / peer.WEIGHTS).write_bytes(content.getbuffer())
        else:
            write_tensors(tensors, folder / peer.WEIGHTS)
    return path


writing.OTHERS.update({format: (FILES[format][0], partial(save, format=format)) for format in _WRITERS})
