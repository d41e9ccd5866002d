"""``sl.load``: a coder from our files, from those of other libraries (``peers``), or from what was published
(``releases``). Nothing is ever unpickled."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sae_lab import noting
from sae_lab.arguments import as_annotated
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.io import ours, peers, releases
from sae_lab.saes.io.checking import check as measure
from sae_lab.types import Site


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
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a number above 0, by which activations were multiplied, got {scale!r}")
    said = {"model": model, "reads": reads, "writes": writes, "centred": centred, "scale": scale, "k": k}
    said = {name: value for name, value in said.items() if value is not None}
    coder, coder.path = _find(path, id, {**said, "said": set(said)} if said else {})
    if coder.path is not None:
        noting.bring_in(coder, Path(coder.path))
    if check is not None:
        measure(coder, check)
    return coder


def _find(path: str | Path, id: str | None, said: dict[str, Any]) -> tuple[SparseCoder, str | None]:
    """(the coder, its path; None for a release, whose name and id are in meta)"""
    folder = Path(path).expanduser()
    here = Path(peers.named((folder / id if id is not None else folder).as_posix(), os.path.isfile))
    if here.is_file():
        home = peers.home(here.as_posix(), os.path.isfile)
        here = here if home is None else Path(home or "/" if here.is_absolute() else home or ".")
    if here.exists():
        return _read(here, said), str(here.resolve())
    name = folder / (id or "")
    if (home := ours.home(name)).is_dir():
        return _read(home, said), name.as_posix()
    return _published(path, id, said), None


def _read(here: Path, facts: dict[str, Any]) -> SparseCoder:
    if coder := peers.read(here, facts):
        return coder
    if not (here / "sae.safetensors").is_file() and (inside := _ids(here)):
        raise ValueError(f"no coder in {here}: it has no config.json (sae.save writes one); pass id=, {inside}")
    return ours.read(here, facts)


def _published(path: str | Path, id: str | None, said: dict[str, Any]) -> SparseCoder:
    """A coder from the hub. ValueError for a path or name that leads to none."""
    known_here = ours.shipped()  # for names like these the hub is not asked
    like = get_close_matches(str(path), known_here, cutoff=0.8)
    like = like or [n for n in known_here if Path(n).parent == Path(path).parent]
    named = isinstance(path, str) and not like and not Path(path).is_dir()
    found = releases.locate(path, id) if named else None  # type: ignore[arg-type]
    if found is None:
        inside = _ids(Path(path))
        if inside:
            known = f"that holds one (ids here: {', '.join(inside)})"
        else:
            like = like or releases.near(str(path))
            known = "another library did, a hub repository 'user/name', a release's name, or one that comes with the "
            known += f"library; names like it: {', '.join(like)}" if like else f"library: {', '.join(known_here)}"
        asked = f"{str(path)!r}{f' with id {id!r}' if id else ''}"
        raise ValueError(f"no coder at {asked}: pass a folder that sae.save wrote or {known}")
    return _read(releases.fetch(found), {**found.facts, **said})


def _ids(folder: Path) -> list[str]:
    """What could be loaded from a folder, for messages."""
    names = []
    for root, folders, inside in os.walk(folder):
        below = Path(root).relative_to(folder)
        folders[:] = folders[:200] if len(below.parts) < 4 and len(names) < 2_000 else []
        names += [(below / file).as_posix() for file in inside]
    return peers.coders_in(names)[:8]
