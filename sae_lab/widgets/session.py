"""What the widgets of a notebook share: one selection, one stack of edits, notes; kept in one file."""

import json
import pathlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import traitlets

from sae_lab import cache
from sae_lab.arguments import Count, as_annotated
from sae_lab.edits.edit import Edit
from sae_lab.results import Html, tag
from sae_lab.saes.base import SparseCoder

from .coding import coder_line, expression, name_of
from .panel import STATIC, Panel, quick
from .static_html import code, table

VERSION = 1
TOGETHER = 0.1  # seconds within which changes of a stack go to the screen as one


class Selection(traitlets.HasTraits):
    """What is selected: a prompt, a token of it (its absolute position, 0 is the prefix), a feature, and the site that
    the feature belongs to (``site.key``). Widgets that share one follow each other; observe it like any trait. Another
    prompt takes the choice of a token away, unless one is picked with it."""

    prompt = traitlets.Unicode("")
    token = traitlets.Int(None, allow_none=True, min=0)
    feature = traitlets.Int(None, allow_none=True, min=0)
    site = traitlets.Unicode("")
    _picking = False

    def pick(self, **what: Any) -> None:
        """Set several at once: observers hear when all of them stand."""
        if unknown := set(what) - set(self.to_dict()):
            raise ValueError(f"a selection has prompt, token, feature and site, no {', '.join(sorted(unknown))}")
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
        return {name: getattr(self, name) for name in ("prompt", "token", "feature", "site")}

    def __repr__(self) -> str:
        return f"Selection({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items() if v not in (None, ''))})"


class EditStack(Panel):
    """The edits of a session. Iterating gives those that are on, so that it goes wherever edits do:
    ``lm.generate(prompt, edits=session.edits)``. Shown in a cell it is a list to switch and to remove from.

    ``rows`` (read only): what the screen shows, one {key, on, label, code} an edit.
    """

    _esm = STATIC / "edits.js"
    _css = STATIC / "edits.css"

    # Of anything: to look at each row again whenever one is added would take seconds for a thousand.
    rows = traitlets.List(help="the edits, as the screen shows them").tag(sync=True)

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        self._entries: dict[int, tuple[Edit, bool]] = {}
        self._next = 0
        self._sent, self._waiting = 0.0, False
        super().__init__()
        for edit in edits:
            self.add(edit)

    # ---- in Python

    def add(self, edit: Any, on: bool = True) -> int:
        """Put an edit on top. Returns its key. ValueError for what is no edit."""
        if not isinstance(edit, Edit):
            raise ValueError(f"an edit stack holds edits such as sl.Steer(sae, 7), got {type(edit).__name__}")
        with self._lock:
            key, self._next = self._next, self._next + 1
            self._entries[key] = (edit, on)
            self.rows = [*self.rows, self._row(key)]
        return key

    def replace(self, key: Count, edit: Edit) -> None:
        """Another edit in the place of one, on or off as it was."""
        with self._lock:
            self._entries[key] = (edit, self._entry(key)[1])
            self._show()

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._show()

    def entries(self) -> list[tuple[int, Edit, bool]]:
        """(key, edit, whether it is on), in the order in which they act."""
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

    def _show(self) -> None:
        self.rows = [self._row(key) for key in self._entries]

    def send_state(self, key: Any = None) -> None:
        """Many edits in a row are shown together: to send all rows for each of a thousand takes seconds."""
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

    def _row(self, key: int) -> dict[str, Any]:
        edit, on = self._entries[key]
        return {"key": key, "on": on, "label": repr(edit), "code": expression(edit, name_of(edit.coder, "sae"))}

    # ---- from the screen too

    @quick
    def switch(self, key: Count, on: bool) -> None:
        """Switch an edit on or off."""
        with self._lock:
            self._entries[key] = (self._entry(key)[0], bool(on))
            self._show()

    @quick
    def remove(self, key: Count) -> None:
        with self._lock:
            self._entry(key)
            del self._entries[key]
            self._show()

    def code(self) -> str:
        lines = ["import sae_lab as sl", ""]
        active = list(self)
        coders = {id(edit.coder): edit.coder for edit in active}
        names = _names(coders)
        lines += [coder_line(coder, names[key]) for key, coder in coders.items()]
        lines += ["edits = [", *(f"    {expression(edit, names[id(edit.coder)])}," for edit in active), "]"]
        return "\n".join(lines)

    def _html(self) -> Html:
        rows = [["on" if row["on"] else "off", code(row["code"])] for row in self.rows]
        return table(["edit", "code"], rows) or tag("p", "No edits.")

    def __repr__(self) -> str:
        return f"EditStack({len(self)} of {len(self._entries)} on)"


def _names(coders: Mapping[int, SparseCoder]) -> dict[int, str]:
    """A variable for each coder: the notebook's own, else sae, sae_1..."""
    found: dict[int, str] = {}
    for number, (key, coder) in enumerate(coders.items()):
        found[key] = name_of(coder, f"sae_{number}" if number else "sae")
    return found


@as_annotated
class Session:
    """What the widgets of a notebook share.

        session = sl.Session()
        sl.TokenFeatures(lm, sae, "I went to the", session=session)   # click a token, a feature...
        sl.FeatureInspector(index, session=session)                   # ...and it opens here
        lm.generate("I went to the", edits=session.edits)

    Attributes: selection (``Selection``), edits (``EditStack``), notes: a text of yours.
    """

    def __init__(self, notes: str = "") -> None:
        self.selection, self.edits, self.notes = Selection(), EditStack(), notes

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Selection, edits and notes in one JSON file. ValueError for edits whose coder lies nowhere yet, or whose
        positions are a function."""
        path = pathlib.Path(path)
        edits = [{"on": on, "edit": json.loads(edit.to_json())} for _, edit, on in self.edits.entries()]
        content = {"sae_lab session": VERSION, "selection": self.selection.to_dict(), "edits": edits}
        content["notes"] = self.notes
        with cache.atomic(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        return path

    @staticmethod
    def load(path: str | pathlib.Path, coders: Iterable[SparseCoder] = ()) -> "Session":
        """A session from its file. coders: those at hand, which edits then act with; others are loaded from where they
        lay. ValueError for what is no session, and for a coder that is gone or has changed."""
        path = pathlib.Path(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            version, selection, edits, notes = (found[k] for k in ("sae_lab session", "selection", "edits", "notes"))
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise ValueError(f"{path} is no session of sae_lab ({err!r}): pass what session.save(path) wrote") from err
        if version != VERSION:
            raise ValueError(f"{path} is a session of version {version}, this library reads version {VERSION}")
        known = {coder.fingerprint(): coder for coder in coders}
        session = Session(notes)
        session.selection.pick(**selection)
        for entry in edits:
            coder = known.get(entry["edit"]["coder"]["fingerprint"])
            edit = Edit.from_json(json.dumps(entry["edit"]), coder)
            known.setdefault(edit.coder.fingerprint(), edit.coder)
            session.edits.add(edit, entry["on"])
        return session

    def __repr__(self) -> str:
        return f"Session({self.selection!r}, {self.edits!r}{', with notes' if self.notes else ''})"
