"""FeatureMap: features as points, one of which a click selects for all widgets of the session."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import traitlets

from sae_lab.results import Html, tag
from sae_lab.types import check_feature

from .coding import name_of
from .panel import STATIC, checked, quick
from .session import Linked, Session
from .static_html import block, table

TOKENS = 5  # of a label
FROZEN_LABELS = 2_000  # in a page without a kernel
GROUPS_LISTED = 20
MOST = 100_000  # points
_FULL = 65_535


class FeatureMap(Linked):
    """Features as points on a plane: hovering says what one is, a click selects it for the whole session.

        session = sl.Session()
        sl.FeatureMap(index, sl.geometry.clusters(sae), session=session)
        sl.FeatureInspector(index, session=session)

    Args:
        source: a feature index, whose notes and top tokens are the labels; or a coder, which has none.
        points: ``d_sae 2`` in any unit (NaN: no point), or a result with ``points`` and ``labels``, such as that of
            ``sl.geometry.clusters``. At most 100,000 points.
        groups: ``d_sae``, a group's number from 0 for each feature, drawn as a colour and a shape, or -1; None: the
            result's labels.
        session: what it shares with other widgets (``sl.Session``); None: a new one.

    Traits: ``feature``, the selected one, an int or None, can be read, set and observed. Read only: ``points``,
    ``features`` and ``groups`` of what is drawn, in base64; ``note``, what the groups are; ``error``.

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

    def __init__(
        self, source: Any, points: Any, groups: Sequence[int] | Any = None, *, session: Session | None = None
    ) -> None:
        self._source, self.d_sae = source, int(source.d_sae)
        self._site = site.key if (site := getattr(source, "site", None)) is not None else ""
        given, groups = getattr(points, "points", points), getattr(points, "labels", None) if groups is None else groups
        places, self._groups = _checked(given, groups, self.d_sae)
        self._on = np.flatnonzero(np.isfinite(places).all(1))
        if len(self._on) > MOST:
            raise ValueError(f"a map shows at most {MOST:,} points, got {len(self._on):,}: set others to NaN")
        own = self._groups[self._on]
        super().__init__(
            session or Session(), points=_packed(places[self._on]), features=_base64(self._on.astype("<u4")),
            groups=_base64(own.astype("<i2")), note=_note(own),
        )  # fmt: skip
        self.feature = self._feature_of(self._site, self.d_sae)
        self._link()

    @checked("feature")
    def _valid(self, feature: Any) -> int | None:
        return None if feature is None else check_feature(feature, self.d_sae)

    @quick
    def label(self, feature: int) -> str:
        """A feature's label: yours and its top tokens; "" for a map of a coder."""
        feature = check_feature(feature, self.d_sae)
        if not hasattr(self._source, "top_tokens"):
            return ""
        own = self._source.notes[feature].label
        tokens = " ".join(repr(token)[1:-1] for token in self._source.top_tokens(feature, TOKENS))
        return f"{own} ({tokens})" if own else tokens

    def _frozen(self) -> dict[str, Any]:
        return {"labels": {str(i): self.label(int(i)) for i in self._on[:FROZEN_LABELS]}}

    def code(self) -> str:
        name = name_of(self._source, "index" if hasattr(self._source, "top_tokens") else "sae")
        if self.feature is None:
            return f"{name}  # nothing is selected"
        return f"{name}[{self.feature}]" if hasattr(self._source, "top_tokens") else f"{name}.W_dec[{self.feature}]"

    def _html(self) -> Html:
        own = self._groups[self._on]
        numbers = [int(g) for g in np.unique(own) if g >= 0][:GROUPS_LISTED]
        rows = [[str(g), f"{int((own == g).sum()):,}", self._members(g)] for g in numbers]
        text = f"Map of {len(self._on):,} features{'; ' + self.note if self.note else ''}."
        return block(tag("p", text), table(["group", "features", "first of them"], rows))

    def _members(self, group: int) -> str:
        first = np.flatnonzero(self._groups == group)[:4]
        said = [(int(i), self.label(int(i))) for i in first if i in self._on]
        return "; ".join(f"{i} {label}".strip() for i, label in said)

    def __repr__(self) -> str:
        return f"FeatureMap({len(self._on):,} of {self.d_sae:,} features, feature={self.feature})"


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


def _note(groups: np.ndarray) -> str:
    inside = int((groups >= 0).sum())
    return f"{inside:,} in {len(np.unique(groups[groups >= 0]))} groups, the others grey" if inside else ""


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
