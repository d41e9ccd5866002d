"""FeatureInspector: search, open, read, try, compare and note the features of one sparse coder."""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import traitlets

from sae_lab.edits.edit import Ablate, Steer
from sae_lab.feature_index import FeatureIndex
from sae_lab.feature_index.finding import FoundFeatures
from sae_lab.results import Html, counted
from sae_lab.types import check_feature

from .coding import index_lines, name_of
from .panel import STATIC, Job, beside, checked, quick
from .session import Linked, Session
from .static_html import feature_html

RESULTS = 50
TOKENS_PER_RESULT = 5
FROZEN_CONTEXTS = 6  # of a group, in a page without a kernel: fifty features stay under 1 MB
_SORTS = {
    "best": "most readable first", "density": "by density", "max": "by max activation", "norm": "by norm at f_scale",
}  # fmt: skip
_HELP = "try another word, a sentence in quotation marks, or conditions such as density>0.1% norm<20 label:word"


class FeatureInspector(Linked):
    """A panel on a feature index: search, open, read, try, compare and note features.

        panel = sl.FeatureInspector(index)     # shown in a cell
        panel.feature = 812                    # opens a feature, as a click does

    Args:
        index: what ``sl.index_features`` gives, of ``d_sae`` features.
        feature: the feature to open, an int from 0 to ``d_sae - 1``; None: the one that the session has selected at the
            index's site, else ``index.best()``.
        session: what it shares with other widgets (``sl.Session``); None: a new one.

    Traits that can be read, set and observed: ``feature``, the open one; ``query``, what to list, a line as
    ``index.search`` takes it (one to three words, a sentence, conditions; "": all live features); ``sort``: "best" (as
    the search has them, else most readable first), "density" (share of tokens), "max" (activation) or "norm" (of the
    decoder row times f_scale); ``pinned``, a feature to compare with, or None. Read only: ``view``, what is shown of
    the feature, as ``index[feature].to_dict()``; ``note``, your label and text on it; ``pair``, its comparison with the
    pinned one; ``results``, the list, a dict of feature, density, max, tokens, label and why (why it was found) each;
    ``results_note``, what the list is; ``overview``, a histogram of log10 density over the live features; ``live``,
    whether model and coder are loaded; ``error``, why the last action failed.

    Raises ValueError for a ``feature`` or ``pinned`` that is not an int from 0 to ``d_sae - 1``.
    """

    _esm = STATIC / "inspector.js"
    _css = STATIC / "inspector.css"
    _chooses = ("feature",)

    feature: Any = traitlets.TraitType().tag(sync=True)  # not Any, which takes None unchecked
    query = traitlets.Unicode("").tag(sync=True)
    sort = traitlets.Enum(list(_SORTS), "best").tag(sync=True)
    results = traitlets.List(traitlets.Dict()).tag(sync=True)
    results_note = traitlets.Unicode("").tag(sync=True)
    view = traitlets.Dict().tag(sync=True)
    note = traitlets.Dict().tag(sync=True)
    pinned = traitlets.Any(None).tag(sync=True)
    pair = traitlets.Dict().tag(sync=True)
    overview = traitlets.Dict().tag(sync=True)
    live = traitlets.Bool().tag(sync=True)

    def __init__(self, index: FeatureIndex, feature: int | None = None, *, session: Session | None = None) -> None:
        self._index, self.d_sae = index, index.d_sae
        self._site = "" if index.site is None else index.site.key
        self._tried = ""  # the text that was scored last
        self._examples: list[list[str]] | None = None  # those that the list comes from
        self._found: FoundFeatures | None = None
        self._kept: list[int] | None = None  # the features of a page that is written
        self.session = session or Session()
        if feature is None:
            feature = self._feature_of(self._site, self.d_sae)
        feature = self._valid_feature(index.best() if feature is None else feature)
        results, note = self._listing("best")
        # The whole state goes into the first message, so that a view can be drawn at once.
        super().__init__(
            self.session, feature=feature, view=self._index[feature].to_dict(), results=results, results_note=note,
            note=index.notes[feature]._asdict(), overview=dict(index.density_histogram), live=index.coder is not None,
        )  # fmt: skip
        self.observe(self._on_feature, "feature")
        self.observe(self._on_search, ["query", "sort"])
        self.observe(self._on_pinned, "pinned")
        index.notes.listeners.append(self._on_notes)
        self._link(lambda: index.notes.listeners.remove(self._on_notes))

    def _valid_feature(self, feature: Any) -> int:
        try:
            return check_feature(feature, self.d_sae)
        except ValueError as error:
            remedy = "index.best() names a live one, index.search(text) finds others"
            raise ValueError(f"{error}; {remedy}") from None

    _open = checked("feature")(_valid_feature)
    _pin = checked("pinned")(lambda self, feature: None if feature is None else self._valid_feature(feature))

    def _on_feature(self, _change: object) -> None:
        with self._lock, self._reported():
            # The trait, not the change that called: of two threads the later one must win.
            feature = self.feature
            view, pair = self._index[feature].to_dict(), self._compared(feature, self.pinned)
            with self.hold_sync():  # one message
                self.note, self.pair, self.view = self._index.notes[feature]._asdict(), pair, view

    def _on_notes(self, features: set[int]) -> None:
        """Somebody wrote on these features: this panel, another one, or Python."""
        with self._lock, self.hold_sync():
            if self.feature in features:
                self.note = self._index.notes[self.feature]._asdict()
                said = self._index.explanations[self.feature]
                self.view = self.view | {"explanations": [one._asdict() for one in said]}
            self.view = self.view | {"names": self._index.names_around(self.feature)}
            self.pair = self.pair and self.pair | {"name": self._index.names[self.pinned]}
            self.results = [
                row | {"label": self._index.notes.heading(row["feature"])} if row["feature"] in features else row
                for row in self.results
            ]

    def _on_search(self, change: Any) -> None:
        with self._lock:
            if change["name"] == "sort":
                return self._list(self._found)
            self._examples = None
            self._list_found(lambda: self._index.search(self.query, limit=RESULTS) if self.query.strip() else None)

    @beside
    def find_by_examples(self, job: Job, examples: str, against: str) -> bool:
        """List what tells examples from others, one text a line; of no texts at all, what ``query`` says. Returns
        whether it could; else ``error`` says why."""
        both = [[line for line in text.splitlines() if line.strip()] for text in (examples, against)]
        if not any(both):
            self._on_search({"name": "query"})
            return not self.error
        self._list_found(lambda: self._index.search(both[0], against=both[1], limit=RESULTS), job)
        self._examples = self._examples if self.error else both
        return not self.error

    def _list_found(self, search: Callable[[], FoundFeatures | None], job: Job | None = None) -> None:
        self.error = ""
        try:
            found = search()
        except ValueError as error:  # a condition that is not typed to its end, too few examples
            self.error = str(error)
            return
        if job is not None:
            job.check()
        with self._lock:
            self._list(found)

    def _list(self, found: FoundFeatures | None) -> None:
        self._found = found
        results, note = self._listing(self.sort)
        with self.hold_sync():
            self.results, self.results_note = results, note

    def _on_pinned(self, _change: object) -> None:
        with self._lock, self._reported():
            self.pair = self._compared(self.feature, self.pinned)

    def _compared(self, feature: int, other: int | None) -> dict[str, Any]:
        if other is None or other == feature:
            return {}
        index = self._index
        view = index[other].to_dict()
        kept = ("feature", "density", "count", "mean", "max", "f_scale", "promoted", "suppressed", "lens_note")
        tokens = {"tokens": index.top_tokens(other, 8), "tokens_here": index.top_tokens(feature, 8)}
        shown = {"view": {k: view[k] for k in kept}, "name": index.names[other]}
        return index.compare(feature, other).to_dict() | shown | tokens

    def _listing(self, sort: str) -> tuple[list[dict[str, Any]], str]:
        """The rows to list, and what the list is: what was searched, and the order, in words."""
        found = self._found
        if found is None:
            live = self._index.order(sort)
            note = f"{min(RESULTS, len(live)):,} of {counted(len(live), 'live feature')}, {self._order(sort)}"
            return [self._row(int(feature)) for feature in live[:RESULTS]], note
        if not found.features:
            return [], f"no feature for {found.searched}; {_HELP}"
        whys = dict(zip(found.features, map(_why, found.to_pandas().to_dict("records")), strict=True))
        features = found.features
        if sort != "best":  # a search comes best first
            values = getattr(self._index, sort)
            features = sorted(features, key=lambda feature: -values[feature])
        many = f"first {RESULTS}" if len(features) == RESULTS else len(features)
        order = "best first" if sort == "best" else self._order(sort)
        return [self._row(i) | {"why": whys[i]} for i in features], f"{many} for {found.searched}; {order}"

    def _order(self, sort: str) -> str:
        places = getattr(self._index, "unit", "token") == "place"  # there are no words to read
        return "most selective first" if places and sort == "best" else _SORTS[sort]

    def _row(self, feature: int) -> dict[str, Any]:
        return {
            "feature": feature,
            "density": float(self._index.density[feature]),
            "max": float(self._index.max[feature]),
            "tokens": list(self._index.top_tokens(feature, TOKENS_PER_RESULT)),
            "label": self._index.notes.heading(feature),
        }

    @beside
    def score(self, job: Job, text: str) -> dict[str, Any]:
        """The open feature's activation on each token of a text."""
        if not text:
            raise ValueError("the text is empty: type some text to score")
        scored = self._index.score(self.feature, text)
        job.check()
        self._tried = text
        return scored.to_dict()

    @beside
    def weakest(self, job: Job) -> list[dict[str, Any]]:
        """The contexts of the open feature's smallest activations."""
        return [vars(context) for context in self._index.weakest(self.feature)]

    @quick
    def write_note(
        self, label: str, text: str, feature: int | None = None, was: Any = None, typed: Any = None
    ) -> dict[str, str]:
        """Put a label and a note on a feature (None: the open one); they are kept with the coder (``sl.notes``). was,
        typed: what the screen showed of both while they were typed, and when that was, in seconds. Returns the note as
        it is then."""
        feature = int(self.feature) if feature is None else self._valid_feature(feature)
        if was is None:
            note = self._index.annotate(feature, label, text)
        else:
            note = self._index.notes.write(feature, label, text, seen=was, typed=typed)
        self._on_notes({feature})  # the screen may show a value that was not taken
        return note._asdict()

    @quick
    def add_edit(self, kind: str) -> str:
        """Put an edit of the open feature on the session's stack: "steer" or "ablate"."""
        coder = self._index.coder
        if coder is None:
            raise ValueError("an edit needs the coder: open the index with sl.index_features(coder, lm, store)")
        edit = Steer(coder, self.feature) if kind == "steer" else Ablate(coder, self.feature)
        self.session.edits.add(edit)
        return f"{edit!r} is on the session's stack: lm.generate(prompt, edits=panel.session.edits)"

    def to_html(self, path: str | pathlib.Path, features: Iterable[int] | None = None) -> pathlib.Path:
        """Write the panel as one HTML file without kernel or network: these features (None: the open one and those
        listed, 50 at most), with search, order and hover. Fifty features stay under 1 MB. Returns the path."""
        self._kept = None if features is None else list(map(self._valid_feature, features))
        try:
            return super().to_html(path)
        finally:
            self._kept = None

    def _frozen(self) -> dict[str, Any]:
        listed = [row["feature"] for row in self.results] if self._kept is None else self._kept
        index, chosen = self._index, [int(i) for i in dict.fromkeys([self.feature, *listed])][:RESULTS]
        norms = index.norm if index.coder is not None else np.zeros(index.d_sae)
        rows = [self._row(i) | {"norm": float(norms[i])} for i in chosen]
        return {
            "query": "", "sort": "best", "live": False, "pinned": None, "pair": {}, "error": "", "results": rows,
            "results_note": f"{counted(len(rows), 'feature')} kept in this page",
            "kept": {str(i): {"view": _small(index[i].to_dict()), "note": index.notes[i]._asdict()} for i in chosen},
        }  # fmt: skip

    def code(self) -> str:
        name = name_of(self._index, "index")
        lines = [*index_lines(self._index), f"print({name}[{self.feature}])"]
        if self.pinned is not None:
            lines.append(f"print({name}.compare({self.feature}, {self.pinned}))")
        if self._examples is not None:
            lines.append(f"print({name}.search({self._examples[0]!r}, against={self._examples[1]!r}))")
        elif self.query.strip():
            lines.append(f"print({name}.search({self.query!r}))")
        if self._tried:
            lines.append(f"print({name}.score({self.feature}, {self._tried!r}))")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"FeatureInspector(feature={self.feature}, d_sae={self.d_sae})"

    def _html(self) -> Html:
        return feature_html(self.view, self.note)


def _why(row: dict[str, Any]) -> str:
    """Why a feature was found, from its row of the search's table."""
    if "recall" in row:
        return f"on {row['recall']:.0%} of their places, which hold {row['share']:.0%} of its activation"
    if "held_out" in row:
        return f"AUROC {row['held_out']:.2f} held out"
    return f"{row['times']:,.1f} × the usual, most on “{row['token'].strip()}”" if "peak" in row else ""


def _small(view: dict[str, Any]) -> dict[str, Any]:
    """A view with fewer contexts."""
    return view | {"groups": [g | {"contexts": g["contexts"][:FROZEN_CONTEXTS]} for g in view["groups"]]}
