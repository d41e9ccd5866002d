"""FeatureMap: features as points, one of which a click selects for all widgets of the session."""

import base64
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import traitlets

from sae_lab import noting
from sae_lab.results import Html, counted, joined, tag
from sae_lab.types import check_feature

from .coding import header, index_lines, name_of
from .panel import STATIC, checked, quick
from .session import Linked, Session
from .static_html import block, numbered, table

FROZEN_LABELS = 2_000  # in a page without a kernel
GROUPS_LISTED = 20
FOUND = 500  # features that a search marks
MOST = 100_000  # points
MOST_GROUPS = 32_000
_FULL = 65_535


class FeatureMap(Linked):
    """Features as points on a plane: hovering says what one is, a click selects it for the whole session. It zooms, has
    a legend, finds features by name, and colours them by group or by your labels.

        session = sl.Session()
        sl.FeatureMap(index, sl.geometry.clusters(sae), session=session)
        sl.FeatureInspector(index, session=session)

    Args:
        source: a feature index, or a coder, whose features are called by your labels and what others say of them.
        points: ``d_sae 2`` in any unit (NaN: no point), or a result with ``points`` and ``labels``, such as that of
            ``sl.geometry.clusters``. At most 100,000 points.
        groups: ``d_sae``, a group's number from 0 for each feature, drawn as a colour and a shape, or -1; None: the
            result's labels.
        session: what it shares with other widgets (``sl.Session``); None: a new one.

    Traits that can be read, set and observed: ``feature``, the selected one, an int or None; ``colour``, what colours
    points: "groups" or "labels". Read only: ``points``, ``features`` and ``groups`` of what is drawn, in base64;
    ``legend``, the largest groups, a dict of group, name and count each; ``note``, what the groups are; ``error``.

    Raises ValueError for points or groups of another shape, more points, and a feature that the coder does not have.
    """

    _esm = STATIC / "feature_map.js"
    _css = STATIC / "feature_map.css"
    _chooses = ("feature",)

    feature = traitlets.Any(None).tag(sync=True)
    points = traitlets.Unicode("").tag(sync=True)
    features = traitlets.Unicode("").tag(sync=True)
    groups = traitlets.Unicode("").tag(sync=True)
    note = traitlets.Unicode("").tag(sync=True)
    colour = traitlets.Enum(["groups", "labels"], "groups").tag(sync=True)
    legend = traitlets.List(traitlets.Dict()).tag(sync=True)

    def __init__(
        self, source: Any, points: Any, groups: Sequence[int] | Any = None, *, session: Session | None = None
    ) -> None:
        self._source, self.d_sae = source, int(source.d_sae)
        self._site = site.key if (site := getattr(source, "site", None)) is not None else ""
        given, groups = getattr(points, "points", points), getattr(points, "labels", None) if groups is None else groups
        places, self._groups = _checked(given, groups, self.d_sae)
        self._places = places
        self._on = np.flatnonzero(np.isfinite(places).all(1))
        if len(self._on) > MOST:
            raise ValueError(f"a map shows at most {MOST:,} points, got {len(self._on):,}: set others to NaN")
        self._names = noting.Names(*((None, source) if hasattr(source, "top_tokens") else (source, None)))
        super().__init__(
            session or Session(), points=_packed(places[self._on]), features=_base64(self._on.astype("<u4")),
            colour="groups" if (self._groups >= 0).any() else "labels",
        )  # fmt: skip
        self.feature = self._feature_of(self._site, self.d_sae)
        self.observe(self._rename, ["colour", "feature"])
        self._link()

    def _called(self) -> dict[int, str]:
        return {} if self.feature is None else self._names.of([self.feature])

    def _rename(self, _change: object = None) -> None:
        """Colour the points, by what they are called now."""
        super()._rename()
        own, called = self._groups[self._on], {}
        if self.colour == "labels":
            said = self._names.labels
            labels = [said.get(int(i), "") for i in self._on]
            called = dict(enumerate(name for name, _ in Counter(filter(None, labels)).most_common(MOST_GROUPS)))
            numbers = {name: group for group, name in called.items()}
            own = np.array([numbers.get(label, -1) for label in labels], np.int64)
        largest = Counter(own[own >= 0].tolist()).most_common(GROUPS_LISTED)
        with self.hold_sync():
            self.groups, self.note = _base64(own.astype("<i2")), _note(own, self.colour)
            self.legend = [{"group": group, "name": called.get(group, ""), "count": count} for group, count in largest]

    @checked("feature")
    def _valid(self, feature: Any) -> int | None:
        return None if feature is None else check_feature(feature, self.d_sae)

    @quick
    def label(self, feature: int) -> str:
        """What a feature is called."""
        return self._names[check_feature(feature, self.d_sae)]

    @quick
    def find(self, text: str) -> list[int]:
        """The features on the map with this number, or with this text in their name, case ignored."""
        names, text, on = self._names.of(self._on), text.strip().lower(), self._on.tolist()
        return [i for i in on if text == str(i) or text in names.get(i, "").lower()][:FOUND] if text else []

    def _frozen(self) -> dict[str, Any]:
        return {"labels": {str(i): name for i, name in self._names.of(self._on[:FROZEN_LABELS]).items()}}

    def data(self) -> dict[str, Any]:
        """What is shown as plain data for a JSON file: the number, place and group of each feature, and the one that is
        selected."""
        on, places = self._on.tolist(), self._places[self._on]
        columns = {"features": on, "x": places[:, 0].tolist(), "y": places[:, 1].tolist()}
        return columns | {"groups": self._groups[self._on].tolist(), "feature": self.feature, "note": self.note}

    def code(self) -> str:
        index = hasattr(self._source, "top_tokens")
        name = name_of(self._source, "index" if index else "sae")
        lines = index_lines(self._source) if index else header(None, **{name: self._source})
        what = "# nothing is selected" if self.feature is None else f"{name}{'' if index else '.W_dec'}[{self.feature}]"
        return "\n".join([*lines, what])

    def _html(self) -> Html:
        own = self._groups[self._on]
        numbers = [int(g) for g in np.unique(own) if g >= 0][:GROUPS_LISTED]
        rows = [[str(g), f"{int((own == g).sum()):,}", self._members(g)] for g in numbers]
        text = f"Map of {counted(len(self._on), 'feature')}{'; ' + self.note if self.note else ''}."
        chosen = None if self.feature is None else tag("p", "Selected: feature ", numbered(self.feature, self.names))
        return block(tag("p", text), chosen, table(["group", "features", "first of them"], rows))

    def _members(self, group: int) -> Html:
        first = self._on[self._groups[self._on] == group][:4].tolist()
        names = {str(i): name for i, name in self._names.of(first).items()}
        return joined((numbered(i, names) for i in first), "; ")

    def __repr__(self) -> str:
        return f"FeatureMap({len(self._on):,} of {counted(self.d_sae, 'feature')}, feature={self.feature})"


def _checked(points: Any, groups: Any, d_sae: int) -> tuple[np.ndarray, np.ndarray]:
    places = np.asarray(points.cpu() if isinstance(points, torch.Tensor) else points, dtype=np.float64)
    if places.shape != (d_sae, 2):
        raise ValueError(f"points must be of shape ({d_sae}, 2), one a feature, NaN for none; got {places.shape}")
    own = np.full(d_sae, -1) if groups is None else np.asarray(groups)
    if own.shape != (d_sae,) or own.dtype.kind not in "iu" or own.min(initial=-1) < -1 or own.max(initial=-1) > 32_767:
        raise ValueError(f"groups must be {d_sae} integers from -1 to 32767, one a feature; got shape {own.shape}")
    return places, own.astype(np.int64)


def _packed(places: np.ndarray) -> str:
    """x to the right and y up, of any size, in a square from the top left corner."""
    if not len(places):
        return ""
    low, high = places.min(0), places.max(0)
    share = (places - low) / np.where(high > low, high - low, 1)
    share[:, 1] = 1 - share[:, 1]
    return _base64(np.rint(share * _FULL).astype("<u2"))


def _note(groups: np.ndarray, colour: str) -> str:
    inside, many = int((groups >= 0).sum()), len(np.unique(groups[groups >= 0]))
    return f"{inside:,} in {counted(many, colour[:-1])}, the others grey" if inside else ""


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
