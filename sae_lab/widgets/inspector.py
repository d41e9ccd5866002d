"""FeatureInspector: search, open and read the features of one sparse coder."""

import operator
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
import traitlets

from .panel import STATIC, Panel
from .static_html import feature_html

RESULTS = 50
TOKENS_PER_RESULT = 5
_SORTS = {"best": "most readable first", "density": "by density", "max": "by max activation"}


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

    def best(self, n: int = 1) -> int | list[int]: ...
    def order(self, by: str) -> np.ndarray: ...
    def search(self, text: str, limit: int = 50) -> list[int]: ...
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
        feature: the feature to open, an int from 0 to ``d_sae - 1``; None opens ``index.best()``.

    Traits, each of which can be read, set and observed from Python: ``feature``; ``query``, text to find
    among the features' top tokens ("": all live features); ``sort``, one of "best", "density", "max".
    Read only: ``results``, rows of {feature, density, max, tokens}; ``view``, what the panel shows;
    ``error``, why the last action failed.

    Raises:
        ValueError: ``feature`` is not an int from 0 to ``d_sae - 1``.
    """

    _esm = STATIC / "inspector.js"
    _css = STATIC / "inspector.css"

    feature = _FeatureTrait(help="the open feature").tag(sync=True)
    query = traitlets.Unicode("", help="text to find among top tokens").tag(sync=True)
    sort = traitlets.Enum(list(_SORTS), "best", help="order of the results").tag(sync=True)
    results = traitlets.List(traitlets.Dict(), help="the listed features").tag(sync=True)
    results_note = traitlets.Unicode("", help="what the list is").tag(sync=True)
    view = traitlets.Dict(help="the open feature, as FeatureView.to_dict() gives it").tag(sync=True)

    def __init__(self, index: Index, feature: SupportsIndex | None = None) -> None:
        self._index = index  # before any trait: the validation of `feature` reads it
        feature = _checked(index.best() if feature is None else feature, index.d_sae)
        results, note = self._listing("", "best")
        # The whole state goes into the first message: a view drawn at once finds everything.
        super().__init__(feature=feature, view=index[feature].to_dict(), results=results, results_note=note)
        self.observe(self._on_feature, "feature")
        self.observe(self._on_search, ["query", "sort"])

    def _on_feature(self, _change: object) -> None:
        with self._lock, self._reported():
            # The trait, not the change that called: of two threads the later one must win.
            self.view = self._index[self.feature].to_dict()

    def _on_search(self, _change: object) -> None:
        with self._lock, self._reported():
            results, note = self._listing(self.query, self.sort)
            with self.hold_sync():  # one message
                self.results = results
                self.results_note = note

    def _listing(self, query: str, sort: str) -> tuple[list[dict[str, Any]], str]:
        """The rows to list and what they are, in words that name query and sort."""
        if query == "":
            live = self._index.order(sort)
            features = live[:RESULTS]
            note = f"{len(features):,} of {len(live):,} live features, {_SORTS[sort]}"
        else:
            features = self._index.search(query, limit=RESULTS)
            if sort != "best":  # a search comes best first
                values = self._index.density if sort == "density" else self._index.max
                features = sorted(features, key=lambda feature: -values[feature])
            count = f"first {RESULTS}" if len(features) == RESULTS else f"{len(features)}"
            note = f"{count} with “{query}” among their top tokens, {_SORTS[sort]}"
            if not len(features):
                note = f"no feature has “{query}” among its top tokens; try a shorter piece of the word"
        return [self._row(int(feature)) for feature in features], note

    def _row(self, feature: int) -> dict[str, Any]:
        return {
            "feature": feature,
            "density": float(self._index.density[feature]),
            "max": float(self._index.max[feature]),
            "tokens": list(self._index.top_tokens(feature, TOKENS_PER_RESULT)),
        }

    def __repr__(self) -> str:
        return f"FeatureInspector(feature={self.feature}, d_sae={self._index.d_sae})"

    def _html(self) -> str:
        return feature_html(self.view)
