"""Where sae_lab keeps what it made: converted models, stores, indexes, figures of evals. ``SAE_LAB_CACHE`` moves it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

KINDS = ("models", "stores", "indexes", "evals")


class Entry(NamedTuple):
    """One thing in the cache: its kind, folder and size."""

    kind: str
    name: str
    path: Path
    megabytes: float


def root() -> Path:
    """The cache folder: ``$SAE_LAB_CACHE``, else ``$XDG_CACHE_HOME/sae_lab``, else ``~/.cache/sae_lab``."""
    if explicit := os.environ.get("SAE_LAB_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae_lab"


def list() -> "List":  # users read sl.cache.list()
    """Everything in the cache, largest first."""
    found = []
    for kind in KINDS:
        for path in sorted((root() / kind).glob("*")):
            size = sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file())
            found.append(Entry(kind, path.name, path, round(size / 1e6, 1)))
    return List(sorted(found, key=lambda e: -e.megabytes))


class List(tuple[Entry, ...]):
    """Cache entries that print as a table."""

    def __repr__(self) -> str:
        lines = [f"{root()}: {len(self)} entries, {sum(e.megabytes for e in self):.1f} MB"]
        lines += [f"  {e.kind:8} {e.megabytes:9.1f} MB  {e.name}" for e in self]
        return "\n".join(lines)


def clear(kind: str | None = None) -> float:
    """Delete the cache, or one kind of it ("models", "stores", "indexes", "evals"). Returns the megabytes freed.

    What was saved under a path of your own is never touched.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind of cache {kind!r}; kinds: {', '.join(KINDS)}")
    entries = [e for e in list() if kind in (None, e.kind)]
    for entry in entries:
        shutil.rmtree(entry.path) if entry.path.is_dir() else entry.path.unlink()
    return sum((e.megabytes for e in entries), 0.0)


def make_folder(path: Path) -> Path:
    """Create a folder, or say whose permission is missing and what to do."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is not writable")
    except OSError as err:  # no permission, a file in the way, a read-only or full disk
        raise ValueError(
            f"cannot write to the folder {path} ({err}): pass path= to a folder you own, or set SAE_LAB_CACHE to one"
        ) from err
    return path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and vanishes when it fails.

    Readers see the whole old file or the whole new one, also after a SIGKILL.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())  # the rename must not reach the disk before the bytes do
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
