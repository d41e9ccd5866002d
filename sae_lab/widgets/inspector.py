"""FeatureInspector: search, open, read, try, compare and note the features of one sparse coder."""

import contextlib
import operator
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import traitlets

from sae_lab.edits.edit import Ablate, Steer
from sae_lab.results import Html

from .coding import coder_line, lm_line, name_of
from .panel import STATIC, Job, Panel, beside, quick
from .session import Session
from .static_html import feature_html

RESULTS = 50
LABEL_LETTERS = 80  # of an explanation that stands in the list
TOKENS_PER_RESULT = 5
FROZEN_CONTEXTS = 6  # of a group, in a page without a kernel: fifty features stay under 1 MB
_SORTS = {
    "best": "most readable first", "density": "by density", "max": "by max activation", "norm": "by norm at f_scale",
}  # fmt: skip
_HELP = "try a shorter piece of the word, or conditions such as density>0.1% norm<20 label:word"


@runtime_checkable
class View(Protocol):
    """One feature, ready to send."""

    def to_dict(self) -> dict[str, Any]: ...


@runtime_checkable
class Index(Protocol):
    """What the inspector asks of a feature index."""

    d_sae: int
    density: np.ndarray
    max: np.ndarray
    coder: Any
    notes: Any
    density_histogram: Mapping[str, Any]

    def best(self, n: int = 1) -> int | list[int]: ...
    def order(self, by: str) -> np.ndarray: ...
    def find(self, line: str, limit: int = 50) -> list[int]: ...
    def top_tokens(self, feature: int, n: int = 5) -> list[str]: ...
    def __getitem__(self, feature: int) -> View: ...


class FeatureError(traitlets.TraitError, ValueError):
    """A feature number that the coder does not have.

    A TraitError, so that traitlets rolls back; a ValueError, as everywhere in this library.
    """


class _FeatureTrait(traitlets.Int):
    """An int from 0 to d_sae - 1."""

    def validate(self, obj: "FeatureInspector", value: Any) -> int:
        return _checked(value, obj._index.d_sae)


def _checked(value: Any, d_sae: int) -> int:
    """``value`` as an int (those of numpy and torch count) if the coder has that feature."""
    try:
        feature = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        feature = -1
    if not 0 <= feature < d_sae:
        raise FeatureError(
            f"feature must be an int from 0 to {d_sae - 1}, got {value!r}; "
            "index.best() names a live one, index.search(text) finds features by token"
        )
    return feature


class FeatureInspector(Panel):
    """A panel on a feature index; ``panel.feature`` is the open feature, in Python and on screen alike.

    Args:
        index: a feature index of ``d_sae`` features.
        feature: the feature to open, an int from 0 to ``d_sae - 1``; None opens what the session has selected at the
            index's site, else ``index.best()``.
        session: what it shares with other widgets (``sl.Session``); None: a session of its own.

    Traits, each of which can be read, set and observed from Python: ``feature``; ``query``, what to list: text among
    the features' top tokens, conditions and labels, as ``index.find`` takes them ("": all live features); ``sort``, one
    of "best", "density", "max", "norm"; ``pinned``, another feature to compare with, or None. Read only: ``results``,
    rows of {feature, density, max, tokens, label}; ``view``, what the panel shows; ``note``, what you wrote on it;
    ``error``, why the last action failed.

    Raises:
        ValueError: ``feature`` is not an int from 0 to ``d_sae - 1``.
    """

    _esm = STATIC / "inspector.js"
    _css = STATIC / "inspector.css"

    feature = _FeatureTrait(help="the open feature").tag(sync=True)
    query = traitlets.Unicode("", help="what to list").tag(sync=True)
    sort = traitlets.Enum(list(_SORTS), "best", help="order of the results").tag(sync=True)
    results = traitlets.List(traitlets.Dict(), help="the listed features").tag(sync=True)
    results_note = traitlets.Unicode("", help="what the list is").tag(sync=True)
    view = traitlets.Dict(help="the open feature, as FeatureView.to_dict() gives it").tag(sync=True)
    note = traitlets.Dict(help="label and text of your note on the open feature").tag(sync=True)
    pinned = traitlets.Int(None, allow_none=True, help="the feature to compare with").tag(sync=True)
    pair = traitlets.Dict(help="the open feature beside the pinned one").tag(sync=True)
    overview = traitlets.Dict(help="histogram of log10 density over live features").tag(sync=True)
    live = traitlets.Bool(help="whether model and coder are at hand, to try a text and to edit").tag(sync=True)

    def __init__(self, index: Index, feature: int | None = None, *, session: Session | None = None) -> None:
        self._index = index  # before any trait: the validation of `feature` reads it
        self._heard: list[Any] = getattr(index.notes, "listeners", [])
        self.session = session or Session()
        self._tried = ""  # the text that was scored last
        self._site = site.key if (site := getattr(index, "site", None)) is not None else ""
        selected = self.session.selection
        if feature is None and selected.feature is not None and selected.site == self._site:
            feature = selected.feature
        feature = _checked(index.best() if feature is None else feature, index.d_sae)
        results, note = self._listing("", "best")
        # The whole state goes into the first message: a view drawn at once finds everything.
        super().__init__(
            feature=feature, view=index[feature].to_dict(), results=results, results_note=note,
            note=index.notes[feature]._asdict(), overview=dict(index.density_histogram), live=index.coder is not None,
        )  # fmt: skip
        if selected.feature is None:
            selected.pick(feature=feature, site=self._site)
        self.observe(self._on_feature, "feature")
        self.observe(self._on_search, ["query", "sort"])
        self.observe(self._on_pinned, "pinned")
        selected.observe(self._on_selected, ["feature", "site"])
        self._heard.append(self._on_notes)

    # ---- what follows what

    def _on_feature(self, _change: object) -> None:
        with self._lock, self._reported():
            # The trait, not the change that called: of two threads the later one must win.
            feature = self.feature
            view, pair = self._index[feature].to_dict(), self._compared(feature, self.pinned)
            with self.hold_sync():  # one message
                self.note = self._index.notes[feature]._asdict()
                self.pair = pair
                self.view = view
            self.session.selection.pick(feature=feature, site=self._site)

    def _on_selected(self, _change: object) -> None:
        selected = self.session.selection
        if selected.site == self._site and selected.feature is not None:
            self.feature = selected.feature

    def _on_notes(self, features: set[int]) -> None:
        """Somebody wrote on these: this panel, another one, or Python."""
        with self._lock, self.hold_sync():
            if self.feature in features:
                self.note = self._index.notes[self.feature]._asdict()
                if (said := getattr(self._index, "explanations", None)) is not None:
                    self.view = self.view | {"explanations": [one._asdict() for one in said[self.feature]]}
            self.results = [
                row | {"label": self._label(row["feature"])} if row["feature"] in features else row
                for row in self.results
            ]

    def _on_search(self, _change: object) -> None:
        with self._lock:
            self.error = ""
            try:
                results, note = self._listing(self.query, self.sort)
            except ValueError as error:  # a condition that is not typed to its end
                self.error = str(error)
                return
            with self.hold_sync():
                self.results = results
                self.results_note = note

    def _on_pinned(self, _change: object) -> None:
        with self._lock, self._reported():
            if self.pinned is not None:
                _checked(self.pinned, self._index.d_sae)
            self.pair = self._compared(self.feature, self.pinned)

    def _compared(self, feature: int, other: int | None) -> dict[str, Any]:
        if other is None or other == feature:
            return {}
        index: Any = self._index
        view = index[other].to_dict()
        kept = ("feature", "density", "count", "mean", "max", "f_scale", "promoted", "suppressed", "lens_note")
        tokens = {"tokens": index.top_tokens(other, 8), "tokens_here": index.top_tokens(feature, 8)}
        return index.compare(feature, other).to_dict() | {"view": {k: view[k] for k in kept}} | tokens

    # ---- the list

    def _listing(self, query: str, sort: str) -> tuple[list[dict[str, Any]], str]:
        """The rows to list and what they are, in words that name query and sort."""
        if query.strip() == "":
            live = self._index.order(sort)
            features = live[:RESULTS]
            note = f"{len(features):,} of {len(live):,} live features, {_SORTS[sort]}"
        else:
            features = self._index.find(query, limit=RESULTS)
            if sort != "best":  # a search comes best first
                values = getattr(self._index, sort)
                features = sorted(features, key=lambda feature: -values[feature])
            count = f"first {RESULTS}" if len(features) == RESULTS else f"{len(features)}"
            note = f"{count} for “{query}”, {_SORTS[sort]}"
            if not len(features):
                note = f"no feature for “{query}”; {_HELP}"
        return [self._row(int(feature)) for feature in features], note

    def _row(self, feature: int) -> dict[str, Any]:
        return {
            "feature": feature,
            "density": float(self._index.density[feature]),
            "max": float(self._index.max[feature]),
            "tokens": list(self._index.top_tokens(feature, TOKENS_PER_RESULT)),
            "label": self._label(feature),
        }

    def _label(self, feature: int) -> str:
        """Your label, or the first explanation somebody else gave."""
        explanations = getattr(self._index, "explanations", None)
        said = explanations.label(feature)[:LABEL_LETTERS] if explanations is not None else ""
        return self._index.notes[feature].label or said

    # ---- from the screen

    @beside
    def score(self, job: Job, text: str) -> dict[str, Any]:
        """The open feature on a text that was typed."""
        if not text:
            raise ValueError("there is nothing to score: type some text")
        index: Any = self._index
        scored = index.score(self.feature, text)
        job.check()
        self._tried = text
        return scored.to_dict()

    @beside
    def weakest(self, job: Job) -> list[dict[str, Any]]:
        """The contexts of the open feature's smallest activations."""
        index: Any = self._index
        return [vars(context) for context in index.weakest(self.feature)]

    @quick
    def write_note(
        self, label: str, text: str, feature: int | None = None, was: Any = None, typed: Any = None
    ) -> dict[str, str]:
        """Put a label and a note on a feature, None: the open one. They follow the coder (``sl.notes``). was, typed:
        what the screen showed of both while they were typed, and when that was. Returns the note as it is now."""
        index: Any = self._index
        feature = self.feature if feature is None else _checked(feature, index.d_sae)
        if was is None:
            note = index.annotate(feature, label, text)
        else:
            note = index.notes.write(feature, label, text, seen=was, typed=typed)
        self._on_notes({feature})  # a value that did not count is put right
        return note._asdict()

    @quick
    def add_edit(self, kind: str) -> str:
        """Put an edit of the open feature on the session's stack: "steer" or "ablate"."""
        coder = self._index.coder
        if coder is None:
            raise ValueError("an edit needs the coder: open the index by sl.index_features(coder, lm, store)")
        edit = Steer(coder, self.feature) if kind == "steer" else Ablate(coder, self.feature)
        self.session.edits.add(edit)
        return f"{edit!r} is on the session's stack: lm.generate(prompt, edits=panel.session.edits)"

    # ---- other forms

    def to_html(self, path: str | pathlib.Path, features: Iterable[int] | None = None) -> pathlib.Path:
        """The panel as one file without kernel or network: these features (None: the open one and those listed), with
        search, order and hover. Fifty features stay under 1 MB."""
        chosen = [row["feature"] for row in self.results] if features is None else list(features)
        self._chosen = list(dict.fromkeys([self.feature, *(_checked(i, self._index.d_sae) for i in chosen)]))[:RESULTS]
        return super().to_html(path)

    def _frozen(self) -> dict[str, Any]:
        index, chosen = self._index, self._chosen
        norms = index.norm if index.coder is not None else np.zeros(index.d_sae)  # type: ignore[attr-defined]
        rows = [self._row(i) | {"norm": float(norms[i])} for i in chosen]
        return {
            "query": "", "sort": "best", "live": False, "pinned": None, "pair": {}, "error": "", "results": rows,
            "results_note": f"{len(rows)} features kept in this page",
            "kept": {
                str(i): {"view": _small(index[i].to_dict()), "note": index.notes[i]._asdict()} for i in chosen
            },
        }  # fmt: skip

    def code(self) -> str:
        index: Any = self._index
        if index.coder is None:
            return f"index[{self.feature}]"
        lm, sae = name_of(index.lm, "lm"), name_of(index.coder, "sae")
        store, name = name_of(index.store, "store"), name_of(index, "index")
        lines = [
            "import sae_lab as sl",
            "",
            lm_line(index.lm, lm),
            coder_line(index.coder, sae),
            f"{store} = sl.Store({str(index.store.path)!r}, {len(index.store)}, {index.site.key!r})",
            f"{name} = sl.index_features({sae}, {lm}, {store}, {str(index.path)!r})",
            f"print({name}[{self.feature}])",
        ]
        if self.pinned is not None:
            lines.append(f"print({name}.compare({self.feature}, {self.pinned}))")
        if self._tried:
            lines.append(f"print({name}.score({self.feature}, {self._tried!r}))")
        return "\n".join(lines)

    def close(self) -> None:
        """Take the widget off the page, and out of the session."""
        if "session" in self.__dict__:  # an __init__ that raised has none
            with contextlib.suppress(ValueError):  # it was closed before
                self.session.selection.unobserve(self._on_selected, ["feature", "site"])
                self._heard.remove(self._on_notes)
        super().close()

    def __repr__(self) -> str:
        return f"FeatureInspector(feature={self.feature}, d_sae={self._index.d_sae})"

    def _html(self) -> Html:
        return feature_html(self.view, self.note)


def _small(view: dict[str, Any]) -> dict[str, Any]:
    """A view with fewer contexts."""
    return view | {"groups": [g | {"contexts": g["contexts"][:FROZEN_CONTEXTS]} for g in view["groups"]]}
