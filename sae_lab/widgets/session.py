"""What the widgets of a notebook share: one selection, one stack of edits, notes; kept in one file."""

import contextlib
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import traitlets

from sae_lab import cache
from sae_lab.arguments import Count, as_annotated
from sae_lab.edits.edit import Edit
from sae_lab.results import Html, Name, tag
from sae_lab.saes.base import SparseCoder

from .coding import expression, header, named
from .panel import STATIC, Panel, checked, quick
from .prompting import checked_prompt
from .static_html import code, table

VERSION = 1  # of files
TOGETHER = 0.1  # seconds within which changes of a stack go to the screen as one
NAMED = 4  # features of an edit whose names are shown
SELECTED = ("prompt", "token", "feature", "site")

T = TypeVar("T")


class Selection(traitlets.HasTraits):
    """What is selected in a session. Widgets of one session follow it; read, set and observe it like any trait:

        session.selection.pick(feature=7, site="resid_post-8")

    Attributes: prompt, a text or chat messages; token, an absolute position in it (0 is the first one, the prefix) or
    None; feature, an int or None; site, the ``site.key`` of the coder that the feature belongs to. Another prompt sets
    token to None.
    """

    prompt = traitlets.Any("")
    token = traitlets.Int(None, allow_none=True, min=0)
    feature = traitlets.Int(None, allow_none=True, min=0)
    site = traitlets.Unicode("")

    _valid_prompt = checked("prompt")(lambda self, prompt: checked_prompt(prompt))

    def __init__(self) -> None:
        self._lock = threading.RLock()  # of all panels of the session: with two, two clicks could wait for each other
        self._picking = False
        super().__init__()

    def pick(self, **what: Any) -> None:
        """Set several of them at once; observers hear of it when all are set. ValueError for another name."""
        if unknown := set(what) - set(SELECTED):
            raise ValueError(f"a selection has {', '.join(SELECTED)}, no {', '.join(sorted(unknown))}")
        with self._lock:
            if what.get("prompt", self.prompt) != self.prompt:
                what.setdefault("token", None)
            self._picking = True
            try:
                with self.hold_trait_notifications():
                    for name, value in what.items():
                        setattr(self, name, value)
            finally:
                self._picking = False

    @traitlets.observe("prompt")
    def _on_prompt(self, _change: object) -> None:
        if not self._picking:
            self.token = None

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SELECTED}

    def __repr__(self) -> str:
        return f"Selection({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items() if v not in (None, ''))})"


class EditStack(Panel):
    """The edits of a session. Iterating gives those that are on, so it goes wherever edits do; in a cell it is a list
    with a switch and a button to remove each:

        lm.generate(prompt, edits=session.edits)

    Args:
        edits: ``sl.Steer``, ``sl.Ablate``, ... They act in this order.

    Trait, read only: ``rows``, a dict of key, on, label, code and the features' name for each edit.
    """

    _esm = STATIC / "edits.js"
    _css = STATIC / "edits.css"

    # Not a list of Dict: traitlets would check every row whenever one is added, seconds for a thousand.
    rows = traitlets.List().tag(sync=True)

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        self._entries: dict[int, tuple[Edit, bool]] = {}
        self._next = 0
        self._sent, self._waiting = 0.0, False
        super().__init__()
        for edit in edits:
            self.add(edit)
        self._hear_names(self._show)

    def add(self, edit: Any, on: bool = True) -> int:
        """Put an edit behind the others. Returns its key. ValueError for another object."""
        if not isinstance(edit, Edit):
            raise ValueError(f"an edit stack holds edits such as sl.Steer(sae, 7), got {type(edit).__name__}")
        with self._lock:
            key, self._next = self._next, self._next + 1
            self._entries[key] = (edit, on)
            self.rows = [*self.rows, self._row(key)]
        return key

    def replace(self, key: Count, edit: Edit) -> None:
        """Put an edit in the place of another, on or off as that one was."""
        with self._lock:
            self._entries[key] = (edit, self._entry(key)[1])
            self._show()

    def clear(self) -> None:
        """Remove all edits."""
        with self._lock:
            self._entries.clear()
            self._show()

    def entries(self) -> list[tuple[int, Edit, bool]]:
        """(key, edit, whether it is on) of each edit, in the order in which they act."""
        with self._lock:
            return [(key, edit, on) for key, (edit, on) in self._entries.items()]

    def __iter__(self) -> Iterator[Edit]:
        return iter([edit for _, edit, on in self.entries() if on])

    def __len__(self) -> int:
        return sum(on for _, _, on in self.entries())

    def _entry(self, key: int) -> tuple[Edit, bool]:
        if key not in self._entries:
            raise ValueError(f"this stack has no edit {key!r}; it has {list(self._entries)}: see stack.entries()")
        return self._entries[key]

    def _row(self, key: int) -> dict[str, Any]:
        edit, on = self._entries[key]
        name = " + ".join(edit.names.of(edit.features[:NAMED]).values()) if hasattr(edit, "feature") else ""
        return {"key": key, "on": on, "label": repr(edit), "code": expression(edit), "name": name}

    def _show(self, _change: object = None) -> None:
        with self._lock:
            self.rows = [self._row(key) for key in self._entries]

    def send_state(self, key: Any = None) -> None:
        """Sends edits that are added in a row together: all rows for each of a thousand would take seconds."""
        now = time.monotonic()
        if key != "rows" or now - self._sent > TOGETHER:
            self._sent = now
            super().send_state(key)
        elif not self._waiting:
            self._waiting = True
            timer = threading.Timer(TOGETHER, self._send_rows)
            timer.daemon = True
            timer.start()

    def _send_rows(self) -> None:
        self._waiting = False
        super().send_state("rows")

    @quick
    def switch(self, key: Count, on: bool) -> None:
        """Switch an edit on or off."""
        with self._lock:
            self._entries[key] = (self._entry(key)[0], bool(on))
            self._show()

    @quick
    def remove(self, key: Count) -> None:
        """Remove an edit."""
        with self._lock:
            self._entry(key)
            del self._entries[key]
            self._show()

    def code(self) -> str:
        active, names = list(self), named(self)
        calls = [f"    {expression(edit, names)}," for edit in active]
        return "\n".join([*header(None, **dict(names.values())), "edits = [", *calls, "]"])

    def _html(self) -> Html:
        rows = [["on" if row["on"] else "off", code(row["code"]), Name(row["name"])] for row in self.rows]
        return table(["edit", "code", "feature"], rows) or tag("p", "No edits.")

    def __repr__(self) -> str:
        return f"EditStack({len(self)} of {len(self._entries)} on)"


@as_annotated
class Session:
    """What the widgets of a notebook share: a click in one is followed by the others.

        session = sl.Session()
        sl.TokenFeatures(lm, sae, "I went to the", session=session)   # click a token, a feature...
        sl.FeatureInspector(index, session=session)                   # ...and it opens here
        lm.generate("I went to the", edits=session.edits)

    Selection and edits are shared. A prompt belongs to its widget, which a token of the selection reaches only if it
    has that prompt. A new widget changes nothing of the session but by what it is given.

    Args:
        notes: a text of yours.
        share: "prompt": a prompt that is typed in one widget is taken up by the others too.

    Attributes: selection (``Selection``), edits (``EditStack``), notes, share.
    """

    def __init__(self, notes: str = "", share: str | None = None) -> None:
        if share not in (None, "prompt"):
            raise ValueError(f"share must be 'prompt' or None, got {share!r}: selection and edits are always shared")
        self.selection, self.edits, self.notes, self.share = Selection(), EditStack(), notes, share

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Write selection, edits and notes as one JSON file. Returns the path. Coders that are not saved as they are
        now are saved beside it, in the folder ``session.coders`` for ``session.json``. ValueError for edits whose
        positions are a function."""
        path, edits = pathlib.Path(path), []
        for _, edit, on in self.edits.entries():
            for coder in [] if callable(edit.positions) else edit.subjects:
                if isinstance(coder, SparseCoder) and not coder.is_saved:
                    coder.save(_beside(path, coder.fingerprint()))
            edits.append({"on": on, "edit": json.loads(edit.to_json())})
        content = {"selection": self.selection.to_dict(), "edits": edits, "notes": self.notes, "share": self.share}
        return write_kept(path, "session", content)

    @staticmethod
    def load(path: str | pathlib.Path, coders: Iterable[SparseCoder] = ()) -> "Session":
        """A session from its file. coders: those that its edits are to use; others are loaded from where they were
        saved. ValueError for a file of another kind, and for a coder that is gone or has changed."""
        path, parts = pathlib.Path(path), ("notes", "selection", "edits")
        notes, selection, edits, share = read_kept(
            path, "session", lambda kept: [*(kept[part] for part in parts), kept.get("share")]
        )
        known = {coder.fingerprint(): coder for coder in coders}
        session = Session(notes, share)
        session.selection.pick(**selection)
        for entry in edits:
            for kept in (entry["edit"].get("coder"), (entry["edit"].get("when") or [None])[0]):
                weights = kept.get("fingerprint") if isinstance(kept, dict) else None
                if kept and weights and (folder := _beside(path, weights)).exists():
                    kept["path"] = str(folder)  # it may have been moved together with the file
            coder = known.get(entry["edit"].get("coder", {}).get("fingerprint"))  # a vector stands in the file
            edit = Edit.from_json(json.dumps(entry["edit"]), coder)
            known.setdefault(edit.coder.fingerprint(), edit.coder)
            session.edits.add(edit, entry["on"])
        return session

    def __repr__(self) -> str:
        return f"Session({self.selection!r}, {self.edits!r}{', with notes' if self.notes else ''})"


def _beside(path: pathlib.Path, fingerprint: str) -> pathlib.Path:
    """The folder of a coder that a session file has with it."""
    return path.with_name(f"{path.stem}.coders") / fingerprint


class Linked(Panel):
    """Base of panels that share a selection: what is chosen in one is taken up by the others.

    A subclass names the traits that choose (``_chooses``), says what they choose (``_chosen``, the arguments of
    ``Selection.pick``), takes up what another panel chose (``_take``), and calls ``_link`` at the end of ``__init__``.
    One that shows features by their numbers says which names they have (``_called``, by what ``names`` calls them) and
    calls ``_rename`` where it shows others.
    One that chooses a feature of one coder needs ``_site`` and ``d_sae`` alone. While a panel tells the session what is
    chosen it does not listen, and while it takes something up it does not tell: so nothing echoes.
    """

    names = traitlets.Dict().tag(sync=True)

    _chooses: tuple[str, ...] = ()
    _telling = _linked = False
    feature: Any
    _site: str
    d_sae: Any

    def __init__(self, session: Session, **state: Any) -> None:
        self.session = session
        super().__init__(lock=session.selection._lock, **state)

    def _chosen(self) -> dict[str, Any]:
        return {} if self.feature is None else {"feature": self.feature, "site": self._site}

    def _take(self, name: str) -> None:
        """name: which part of the selection has changed, one of ``SELECTED``."""
        if (feature := self._feature_of(self._site, self.d_sae)) is not None:
            self.feature = feature

    @property
    def _shared_prompt(self) -> Any:
        """The prompt to take up from other panels; "": none."""
        return self.session.selection.prompt if self.session.share == "prompt" else ""

    def _feature_of(self, site: str, d_sae: int) -> int | None:
        """The selected feature, if it is one at this site and below ``d_sae``."""
        selected = self.session.selection
        mine = selected.site == site and selected.feature is not None and selected.feature < d_sae
        return selected.feature if mine else None

    def _called(self) -> Mapping[Any, str]:
        """The names of the features that are shown, by number."""
        return {}

    def _rename(self, _change: object = None) -> None:
        self.names = {str(feature): name for feature, name in self._called().items()}

    def _link(self, unlink: Callable[[], None] = lambda: None) -> None:
        """unlink: called on closing."""
        self._hear_names(self._rename)
        self.observe(self._tell, list(self._chooses))
        self.session.selection.observe(self._hear, list(SELECTED))
        self._linked, self._unlink = True, unlink

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Within, this panel neither tells nor listens. Gives whether it did before."""
        with self._lock:
            before, self._telling = self._telling, True
            try:
                yield not before
            finally:
                self._telling = before

    def _tell(self, _change: object = None) -> None:
        with self._alone() as free:
            if free and self._linked:
                self.session.selection.pick(**self._chosen())

    def _hear(self, change: Any) -> None:
        with self._alone() as free:
            if free:
                self._take(change.name)

    def close(self) -> None:
        """Take the widget off the page, and out of the session."""
        if self._linked:
            self._linked = False
            self.session.selection.unobserve(self._hear, list(SELECTED))
            self._unlink()
        super().close()


def write_kept(path: pathlib.Path, kind: str, content: Mapping[str, Any]) -> pathlib.Path:
    """Write a session or a preset as JSON. Returns the path."""
    with cache.atomic(path) as temporary:
        kept = json.dumps({f"sae_lab {kind}": VERSION, **content}, indent=1, ensure_ascii=False)
        temporary.write_text(kept, encoding="utf-8")
    return path


def read_kept(path: pathlib.Path, kind: str, take: Callable[[Any], T]) -> T:
    """What ``take`` reads from a file of ``write_kept``. ValueError for a file of another kind or version."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (version := found[f"sae_lab {kind}"]) == VERSION:
            return take(found)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{path} is no {kind} file of sae_lab ({err!r}): give one that save(path) wrote") from err
    raise ValueError(f"{path} is a {kind} file of version {version}, and this library reads version {VERSION}")
