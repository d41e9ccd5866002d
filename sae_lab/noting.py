"""Notes on features: one log file for each coder, in the user's data folder (``SAE_LAB_DATA`` moves it).

Each line is one change of a feature. A field is "label" or "text" (a person's), or "said:" and the name of a source:

    {"feature": 812, "label": "months", "time": 1764451234.5, "crc": "0b8a1f6c"}

``Log.write`` appends lines under a lock, and returns when they are on disk. A field's latest value counts; of two with
the same time, the one that sorts last. So logs are merged by joining their lines in any order.
"""

import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakMethod, WeakValueDictionary
from zlib import crc32

from filelock import FileLock

from sae_lab import cache, files
from sae_lab.results import Name, visible
from sae_lab.spelling import check_text

log = logging.getLogger(__name__)
T = TypeVar("T")

SAID = "said:"
TOKENS = 4  # of a name that is made of tokens
WAIT = 60  # seconds for another process to finish writing
_ID = re.compile(r"[0-9a-f]{16,64}")
_BEGIN = b'{"feature": '
_SUMMED = re.compile(rb'(\{.*), "crc": "([0-9a-f]{8})"\}', re.DOTALL)
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)  # what a damaged line raises


class Said(NamedTuple):
    """A statement about a feature by a source (an explainer, or a web site with labels), and its scores by name."""

    text: str
    source: str = ""
    scores: dict[str, float] = {}  # noqa: RUF012 (never written to)


def root() -> Path:
    """The user's data folder: ``$SAE_LAB_DATA``, else ``$XDG_DATA_HOME/sae_lab``, else the platform's."""
    if explicit := os.environ.get("SAE_LAB_DATA"):
        return Path(explicit).expanduser()
    platform = "Library/Application Support" if sys.platform == "darwin" else ".local/share"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / platform) / "sae_lab"


def is_id(value: Any) -> bool:
    """Whether a value can be a coder's id. It names a file, and comes from a config that may be a stranger's."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


class Change(NamedTuple):
    """One line: a feature's new values by field, the time in seconds, and the line's bytes."""

    feature: int
    fields: dict[str, Any]
    time: float
    line: bytes


class Log:
    """The notes on one coder's features. ``listeners`` are called with the changed features after each write here."""

    def __init__(self, file: Path):
        self.file = file
        self.listeners: list[Callable[[set[int]], Any]] = []
        self._lock = threading.RLock()
        self._between = FileLock(file.with_name(f".{file.name}.lock"), timeout=WAIT)
        self._untold: set[int] = set()
        self._forget()

    def _forget(self) -> None:
        self._stamp: tuple[int, ...] = ()
        self._end = 0  # of the last whole line that was read
        self._now: dict[int, dict[str, tuple[float, Any]]] = {}  # feature: field: (time, value)

    def fields(self, feature: int) -> dict[str, Any]:
        """A feature's present values by field, the oldest first; emptied fields are left out."""
        self.refresh()
        with self._lock:
            return self._values(feature)

    def all(self) -> dict[int, dict[str, Any]]:
        """``fields`` of every feature that has any."""
        self.refresh()
        with self._lock:
            return {feature: fields for feature in sorted(self._now) if (fields := self._values(feature))}

    def _values(self, feature: int) -> dict[str, Any]:
        found = self._now.get(feature, {})
        return {field: found[field][1] for field in sorted(found, key=lambda f: found[f][0]) if found[field][1]}

    def changes(self) -> list[Change]:
        """The latest values, in as few lines as possible."""
        self.refresh()
        with self._lock:
            lines: dict[tuple[int, float], dict[str, Any]] = {}
            for feature, fields in sorted(self._now.items()):
                for field, (at, value) in fields.items():
                    lines.setdefault((feature, at), {})[field] = value
            return [Change(i, fields, at, line(i, fields, at)) for (i, at), fields in lines.items()]

    def refresh(self) -> None:
        """Read the lines that any process has written since the last read. Damaged lines go into a file beside."""
        with self._lock:
            try:
                if _stamp(self.file.stat()) == self._stamp:
                    return
                with open(self.file, "rb") as f:
                    stamp = _stamp(os.fstat(f.fileno()))
                    if stamp[:1] != self._stamp[:1] or stamp[1] <= self._end:  # another file, or changed by hand
                        self._forget()
                    f.seek(self._end)
                    data = f.read()
            except FileNotFoundError:
                self._forget()
                return
            except OSError as err:
                raise ValueError(
                    f"cannot read {self.file} ({err}): make it readable, or set SAE_LAB_DATA to a folder of yours"
                ) from err
            good, bad = parsed(data)
            for change in good:
                here = self._now.setdefault(change.feature, {})
                for field, value in change.fields.items():
                    before, old = here.get(field, (-math.inf, None))
                    if change.time > before or (change.time == before and json.dumps(value) > json.dumps(old)):
                        here[field] = (change.time, value)
                        self._untold.add(change.feature)
            self._stamp, self._end = stamp, self._end + data.rfind(b"\n") + 1
            if bad:
                self._set_aside(bad)

    def _set_aside(self, bad: list[bytes]) -> None:
        shown = ", ".join(repr(one[:60]) for one in bad[:3])
        try:
            with self._alone():
                data = self.file.read_bytes()
                aside = self.file.with_name(f"{self.file.name}.damaged-{crc32(data):08x}")
                for file, content in ((aside, data), (self.file, b"".join(c.line for c in parsed(data)[0]))):
                    with cache.atomic(file) as temporary:
                        temporary.write_bytes(content)
        except (OSError, ValueError) as err:  # a folder that cannot be written to
            log.warning("%s: %d damaged lines are left out (%s), and stay in it (%s)", self.file, len(bad), shown, err)
            return
        log.warning("%s: %d damaged lines are left out (%s); the whole file is kept as %s", self.file, len(bad), shown,
                    aside)  # fmt: skip
        self._forget()
        self.refresh()

    def write(
        self, changes: Mapping[int, Mapping[str, Any]], seen: Mapping[str, Any] | None = None,
        at: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Set fields of features, {feature: {field: value}}. All are on disk before this returns.

        seen: the values on the screen while the user typed, by field; at: the times of typing. A value equal to the one
        on the screen is no change. A value typed before another writer's newer value does not replace it.
        """
        with self._lock, self._alone():
            self.refresh()
            lines = [
                line(feature, {field: value}, said_at)
                for feature, fields in changes.items()
                for field, value in fields.items()
                if (said_at := self._time(feature, field, value, seen, at or {})) is not None
            ]
            self._append(lines)
        self.tell()

    def _time(
        self, feature: int, field: str, value: Any, seen: Mapping[str, Any] | None, at: Mapping[str, float]
    ) -> float | None:
        """The time to write beside a value; None if the value is no change."""
        before, here = self._now.get(feature, {}).get(field, (-math.inf, None))
        if (value or None) == (here or None) or (seen is not None and value == seen.get(field)):
            return None
        now = time.time()
        said_at = min(now, at.get(field, now))
        if seen is not None and seen.get(field, here) != (here or ""):
            return said_at
        return max(said_at, math.nextafter(before, math.inf))  # clocks tie, and go back

    def add(self, data: bytes) -> list[bytes]:
        """Add the lines of another log of the same coder; newer values here stay. Returns its damaged lines, which are
        not added."""
        with self._lock, self._alone():
            self.refresh()
            mine = set(self.file.read_bytes().split(b"\n")) if self.file.exists() else set()
            changes, damaged = parsed(b"\n".join(one for one in dict.fromkeys(data.split(b"\n")) if one not in mine))
            self._append(change.line for change in changes if change.line[:-1] not in mine)
        self.tell()
        return damaged

    def merge(self, file: Path) -> None:
        """``add`` the lines of a file."""
        if damaged := self.add(files.read_bytes(file, "MOST_UNPACKED")):
            log.warning("%s: %d damaged lines are left out (%r)", file, len(damaged), damaged[0][:60])

    def _append(self, lines: Iterable[bytes]) -> None:
        """Write lines at the end, and read them. The caller holds both locks, and has called ``refresh``."""
        data = b"".join(lines)
        if not data:
            return
        try:
            with open(self.file, "a+b", buffering=0) as f:
                f.seek(self._end)
                if parsed(tail := f.read())[0]:  # a line typed by hand, without a line break
                    data = b"\n" + data
                elif tail:  # of a writer that was killed
                    log.warning("%s: half a last line is left out (%r)", self.file, tail[:60])
                    f.truncate(self._end)
                size = f.seek(0, os.SEEK_END)
                try:
                    if f.write(data) != len(data):
                        raise OSError("the disk took only a part")
                    os.fsync(f.fileno())
                except BaseException:
                    with suppress(OSError):
                        f.truncate(size)
                    raise
        except OSError as err:
            raise ValueError(
                f"cannot write {self.file} ({err}), and no part of these notes was saved: make room, or set "
                "SAE_LAB_DATA to a folder of yours elsewhere"
            ) from err
        self.refresh()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A block in which no other process writes."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._between.acquire()
        except OSError as err:
            if err.errno not in cache.NO_LOCKS:
                raise ValueError(
                    f"cannot write to the folder {self.file.parent} ({err}): set SAE_LAB_DATA to a folder of yours"
                ) from err
        try:
            yield
        finally:
            if self._between.lock_counter == 1:
                Path(self._between.lock_file).unlink(missing_ok=True)  # while it is held: who waits looks again
            self._between.release()

    def tell(self) -> None:
        """Call the listeners with the changed features; without a lock, since they take locks of their own."""
        with self._lock:
            changed, self._untold = self._untold, set()
        HEAR[:] = [method for method in HEAR if method() is not None]
        everywhere = [heard for method in HEAR if (heard := method()) is not None]
        for listener in [*self.listeners, *everywhere] if changed else ():
            try:
                listener(changed)
            except Exception:  # a panel's, for example; the notes are on disk
                log.exception("a panel may show old notes of features %s", sorted(changed)[:9])


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def line(feature: int, fields: Mapping[str, Any], at: float) -> bytes:
    """One line of a log."""
    text = json.dumps({"feature": feature, **fields, "time": at}, ensure_ascii=False)[:-1].encode()
    return text + b', "crc": "%08x"}\n' % crc32(text)


def parsed(data: bytes, at: float | None = None) -> tuple[list[Change], list[bytes]]:
    """(the changes in these lines, the damaged lines). An incomplete last line is neither: its writer is still at
    work, or was killed. at: the time of lines without one."""
    good, bad = [], []
    *lines, last = data.split(b"\n")
    for one in (*lines, last):
        if one.strip():
            try:
                good.append(_parsed(one, at))
            except _UNREADABLE:
                bad.append(one)
    if bad and bad[-1] is last and last[: len(_BEGIN)] == _BEGIN[: len(last)]:
        bad.pop()
    return good, bad


def _parsed(text: bytes, at: float | None) -> Change:
    """The change in one line. Raises one of ``_UNREADABLE`` for a damaged line."""
    if (summed := _SUMMED.fullmatch(text)) and crc32(summed[1]) != int(summed[2], 16):
        raise ValueError("the checksum does not fit")
    record = json.loads(text)
    if b"\\u" in text:  # an escape can hold half a surrogate pair
        check_text(json.dumps(record, ensure_ascii=False), "a line")
    feature, at = record["feature"], float(record.get("time", at))
    if isinstance(feature, bool) or not isinstance(feature, int) or feature < 0 or not 0 <= at < 1e15:
        raise ValueError("no feature, or no time")
    fields = {f: _checked(f, value) for f, value in record.items() if f in ("label", "text") or f.startswith(SAID)}
    return Change(feature, fields, at, text + b"\n" if summed else line(feature, fields, at))


def _checked(field: str, value: Any) -> Any:
    """A field's value. Raises one of ``_UNREADABLE`` for another type."""
    said = value if field.startswith(SAID) else [{"text": value, "scores": {}}]
    for one in said:
        if not isinstance(one["text"], str) or not all(map(math.isfinite, one["scores"].values())):
            raise ValueError(f"{field} is of another type")
    return value if said is not value else [{"text": one["text"], "scores": one["scores"]} for one in said]


_LOGS: dict[str, Log] = {}  # one for each file: all panels listen to the same, and none is read twice
HEAR: list[WeakMethod[Any]] = []  # methods that are called after each change of any log in this process
INDEXES: WeakValueDictionary[str, Any] = WeakValueDictionary()  # the feature index of a coder that was opened last


def by_id(id: str) -> Log:
    """The log of the coder with this id."""
    if not is_id(id):
        raise ValueError(f"a coder's id is 16 to 64 hexadecimal digits, got {id!r}: the file that names it is damaged")
    file = root() / "notes" / f"{id}.jsonl"
    return _LOGS.get(str(file)) or _LOGS.setdefault(str(file), Log(file))


def of(coder: Any) -> Log:
    """A coder's log. The log of a coder that was trained on from another begins with the other's notes."""
    found, before = by_id(coder.id), coder.meta.get("trained_from")
    if is_id(before) and not found.file.exists() and (file := by_id(before).file).exists():
        found.merge(file)
    return found


class Names:
    """What a coder's features are called, for tables and screens: ``names[7]``, ``names.of([7, 9])``.

    A name is the feature's label; else the tokens (of a ``sl.Net``, the places) it fires on most, where an index of the
    coder is open; else what somebody else says of it; else "". It is looked up when it is asked for. A result keeps
    this and not the coder; a coder that is trained on has other names.
    """

    def __init__(self, coder: Any = None, index: Any = None):
        self._meta, self._index = getattr(coder, "meta", {}), index
        if self._meta and not is_id(self._meta.get("id")) and any((root() / "notes").glob("*.jsonl")):
            coder.id  # noqa: B018 (a hash of its weights: made only where there are notes)

    @property
    def index(self) -> Any:
        """The feature index, the one given or the one that was opened last; None where none is open."""
        return INDEXES.get(str(self._meta.get("id"))) if self._index is None else self._index

    @property
    def _log(self) -> Any:
        """The log of the coder; before it has one, that of the coder it was trained on from."""
        if self._index is not None:
            return self._index.notes._log
        id, before = str(self._meta.get("id")), str(self._meta.get("trained_from"))
        found = by_id(id) if is_id(id) else None
        return by_id(before) if found and is_id(before) and not found.file.exists() else found

    def of(self, features: Iterable[Any]) -> dict[int, str]:
        """The names of those features that have one."""
        if (log := self._log) is None:
            return {}
        with suppress(ValueError):  # notes that cannot be read hinder no table: ``sl.notes`` says why
            log.refresh()
        index = self.index
        named = ((i, _named(log._values(i), index, i)) for i in dict.fromkeys(map(int, features)) if i >= 0)
        return {i: name for i, name in named if name}

    @property
    def labels(self) -> dict[int, str]:
        """The labels of all features that have one."""
        found = {} if (log := self._log) is None else log.all()
        return {feature: fields["label"] for feature, fields in found.items() if "label" in fields}

    def __getitem__(self, feature: int) -> str:
        return self.of([feature]).get(int(feature), "")

    def numbered(self, feature: int) -> str:
        """``812 'months'``: the number, and the name cut to a few words if there is one."""
        return f"{feature} {str(name)!r}" if (name := Name(self[feature])) else f"{feature}"


def names_of(coders: Mapping[T, Any], index: Any = None) -> dict[T, Names]:
    """Names for each coder. index: a feature index of one, or several. ValueError for an index of none of them."""
    many = [] if index is None else [index] if hasattr(index, "notes") else list(index)
    given = {one.notes.file.stem: one for one in many}
    if given and not given.keys() <= {coder.id for coder in coders.values()}:
        raise ValueError("index is of another coder: pass what sl.index_features(coder, lm, store) gives for this one")
    return {key: Names(coder, given.get(coder.id) if given else None) for key, coder in coders.items()}


def _named(fields: Mapping[str, Any], index: Any, feature: int) -> str:
    if label := fields.get("label"):
        return label
    if tokens := [] if index is None else index.top_tokens(feature, TOKENS):
        if getattr(index, "unit", "token") == "place":
            return f"at {', '.join(tokens)}"
        return " ".join(visible(token).strip() or "·" for token in tokens)
    said = [one["text"] for field in reversed(list(fields)) if field.startswith(SAID) for one in fields[field]]
    return next(iter(said), "")


def beside(coder: Any, folder: Path) -> Path:
    """The file of notes that ``sae.save`` puts beside a coder."""
    return folder / f"notes-{coder.id}.jsonl"


def save_beside(coder: Any, folder: Path) -> None:
    """Copy a coder's notes into its folder. Lines that only the copy there has stay in it."""
    if (here := of(coder)).file.exists():
        copy = beside(coder, folder)
        with _or_warn(here.file, copy):
            if copy.exists():
                return Log(copy).merge(here.file)
            with cache.atomic(copy) as temporary:
                shutil.copyfile(here.file, temporary)


def bring_in(coder: Any, folder: Path) -> None:
    """Merge the notes beside a coder that is loaded into its log."""
    if any(folder.glob("notes-*.jsonl")) and (file := beside(coder, folder)).is_file():
        with _or_warn(file, (here := by_id(coder.id)).file):
            of(coder)
            here.merge(file)


@contextmanager
def _or_warn(file: Path, to: Path) -> Iterator[None]:
    """Warn where notes cannot be copied; the coder is saved or loaded anyway."""
    try:
        yield
    except (OSError, ValueError) as err:
        log.warning("the notes in %s did not go into %s: %s", file, to, err)
