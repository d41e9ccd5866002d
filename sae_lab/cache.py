"""The cache of converted models, stores, indexes, figures of evals and coders that were not saved (``SAE_LAB_CACHE``
moves it), and how all files are written.

A file is written in a temporary folder beside its place and then renamed (``atomic``, ``together``); its mode follows
the umask; a full disk ends in one sentence (``told``). One process at a time writes into a folder (``sole_writer``).
"""

import errno
import glob
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

KINDS = ("models", "stores", "indexes", "evals", "coders")
LOCK = ".lock"  # the file that a folder holds while somebody writes into it
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on the size of files
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # from file systems without locks


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
            size = sum(_size(f) for f in [path, *path.rglob("*")])
            found.append(Entry(kind, path.name, path, round(size / 1e6, 1)))
    return List(sorted(found, key=lambda e: -e.megabytes))


def _size(path: Path) -> int:
    """Bytes of a file; 0 for a folder, and for a file that another process has removed."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


class List(tuple[Entry, ...]):
    """Cache entries that print as a table."""

    def __repr__(self) -> str:
        many = f"{len(self)} {'entry' if len(self) == 1 else 'entries'}"
        lines = [f"{root()}: {many}, {sum(e.megabytes for e in self):.1f} MB"]
        lines += [f"  {e.kind:8} {e.megabytes:9.1f} MB  {e.name}" for e in self]
        return "\n".join(lines)


def clear(kind: str | None = None) -> float:
    """Delete the cache, or one kind of it ("models", "stores", "indexes", "evals"). Returns the megabytes freed.

    Files saved under a path of your own stay, and so do files that are being written.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind of cache {kind!r}; kinds: {', '.join(KINDS)}")
    freed = 0.0
    for entry in [e for e in list() if kind in (None, e.kind)]:
        if not entry.path.is_dir():
            entry.path.unlink(missing_ok=True)
        elif not _removed(entry.path, unsure=True):
            log.warning("%s is being written: it stays", entry.path)
            continue
        freed += entry.megabytes
    return freed


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
def atomic(path: Path, kept: str = "") -> Iterator[Path]:
    """A temporary path, renamed to ``path`` when the block ends without an error, and removed otherwise. So readers see
    the whole old file or the whole new one, also after a SIGKILL. kept: see ``told``."""
    path = path.resolve() if path.is_symlink() else path  # the link stays
    with told(path, kept), _beside(path) as temporary:
        yield temporary
        _settle(temporary)
        os.replace(temporary, path)


@contextmanager
def together(folder: Path, valid: str | None = None, kept: str = "") -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` when the block ends without an error; else they are removed.

    A new folder appears whole. In a folder that exists, files are replaced one by one, and other files stay. valid: the
    file without which nothing loads; it is removed first and written last, so that a mixture of new and old files never
    loads. None: new files may stand beside old ones for a moment.
    """
    there = folder.exists()
    make_folder(folder if there else folder.parent)
    # The temporary folder lies in an existing folder, which may be a mount point: a rename stays on one file system.
    with told(folder, kept), _beside(folder / (valid or folder.name) if there else folder) as temporary:
        temporary.mkdir()
        yield temporary
        _settle(temporary)
        if not there:
            try:
                temporary.rename(folder)
                return
            except OSError:
                if not folder.exists():  # else another process was first
                    raise
        with sole_writer(folder):
            if valid is not None:
                (folder / valid).unlink(missing_ok=True)
            for file in sorted(temporary.iterdir(), key=lambda f: (f.name == valid, f.name)):
                os.replace(file, folder / file.name)


@contextmanager
def told(path: Path, kept: str = "") -> Iterator[None]:
    """Turns a full disk into ``NoRoom``, one sentence about ``path``. kept: which files are left, and how to go on; the
    outermost of nested blocks says it."""
    try:
        yield
    except Exception as err:
        if (number := _number(err)) not in NO_ROOM or (isinstance(err, NoRoom) and not kept):
            raise
        kept = kept or "an older file there is unchanged: make room on that disk, or give another path"
        cause = err.__cause__ if isinstance(err, NoRoom) else err
        raise NoRoom(number, f"could not write {path} ({os.strerror(number)}); {kept}") from cause


class NoRoom(OSError):
    """A full disk, a quota or a limit on the size of files: which files are left, and how to go on."""


def _number(err: Exception) -> int:
    """The system's number of an error, or 0. Errors of safetensors, which is written in Rust, have it in their text."""
    if isinstance(err, OSError):
        return err.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(err))
    return int(found[1]) if found else 0


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path of the same name in a new temporary folder beside. What killed writers of the path left is removed."""
    if not any(folder == path.parent.resolve() for *_, folder in _held.copy()):  # else sole_writer has removed them
        remove_leftovers(make_folder(path.parent), path.name)
    lock = scratch = None
    try:
        while scratch is None or lock is None:  # until it is locked, another process may remove it as a leftover
            scratch = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
            scratch.mkdir()
            lock = _locked(scratch)
        yield scratch / path.name
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            lock.release()


def _settle(temporary: Path) -> None:
    """Give written files the mode of the umask, and bring them to the disk before they get their names."""
    mode = temporary.parent.stat().st_mode & 0o666
    for file in [temporary, *temporary.rglob("*")]:
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
            file.chmod(mode)


def mapped(file: Path, dtype: Any, length: int) -> np.memmap:
    """A new array of zeros in a .npy file, mapped for writing. All its blocks on the disk are allocated first: a page
    without a block would end the process (SIGBUS)."""
    with open(file, "wb") as f:
        facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(f, facts)
        start = f.tell()
        _allocate(f, start + length * np.dtype(dtype).itemsize)
    return np.memmap(file, dtype, "r+", start, (length,))


def _allocate(f: Any, end: int) -> None:
    """Allocate a file's blocks; write zeros where the system (macOS) or the file system cannot allocate."""
    f.flush()
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(f.fileno(), 0, end)
        except OSError as err:
            if err.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    zeros = bytes(1 << 20)
    while (left := end - f.tell()) > 0:
        f.write(zeros[:left])


_held: set[tuple[int, int, Path]] = set()  # (process, thread, folder) of every lock that this process holds


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """A block that one thread of one process at a time is in, for each folder; others wait. The folder is made, and
    cleared of what killed writers left. A lock ends with its process."""
    make_folder(folder)
    mine = (os.getpid(), threading.get_ident(), folder.resolve())
    if mine in _held:
        yield
        return
    with told(folder):
        lock = _locked(folder)
    if lock is None:
        log.warning("another process or thread is writing into %s: waiting until it is done", folder)
        lock = FileLock(folder / LOCK)
        lock.acquire()
    if not lock.is_locked:
        log.warning("the file system of %s has no locks: let one process at a time write there", folder)
    _held.add(mine)
    try:
        remove_leftovers(folder)
        yield
    finally:
        _held.discard(mine)
        (folder / LOCK).unlink(missing_ok=True)  # while the lock is held: a process that waits for it looks again
        lock.release()


def _locked(folder: Path) -> FileLock | None:
    """A folder's lock, acquired; None if somebody else holds it. On a file system without locks it does nothing."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError):
        return None
    except OSError as err:
        if err.errno not in NO_LOCKS:
            raise
    return lock


def _removed(folder: Path, unsure: bool) -> bool:
    """Remove a folder unless somebody writes into it; returns whether it was removed. unsure: also on a file system
    without locks."""
    lock = _locked(folder)
    if lock is None or not (lock.is_locked or unsure):
        return False
    try:
        if folder.is_symlink():  # the link goes; what it points to is the user's
            (folder / LOCK).unlink(missing_ok=True)
            folder.unlink()
        else:
            shutil.rmtree(folder)
    finally:
        lock.release()
    return True


def tidy(folder: Path) -> None:
    """Remove what killed writers left in a complete folder, unless somebody is writing there."""
    if not ((folder / LOCK).exists() or any(folder.glob(".*.tmp"))):
        return
    with suppress(OSError):  # another user's
        if (lock := _locked(folder)) is not None:
            remove_leftovers(folder)
            (folder / LOCK).unlink(missing_ok=True)
            lock.release()


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left of the file of this name, or of any file in the folder."""
    for left in folder.glob(".*.tmp" if name is None else f".{glob.escape(name)}.*.tmp"):
        with suppress(OSError):  # another user's
            _removed(left, unsure=False)
    if name is None:
        for left in folder.glob(".tmp" + 6 * "[A-Za-z0-9]"):  # safetensors' own, which it writes beside the file
            with suppress(OSError):
                left.unlink()


def hub_answers() -> bool:
    """Whether the model hub can be reached. One request of at most 5 s, whose answer holds for a minute: the hub's own
    client would make five requests for each file, with pauses."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _asked(constants.ENDPOINT, int(time.monotonic() / 60))


@lru_cache(maxsize=1)
def _asked(endpoint: str, minute: int) -> bool:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=5)
    except Exception:  # of a kind that depends on the hub client's version
        return False
    return True
