"""FeatureIndex: everything about every feature, opened in milliseconds from memory-mapped files."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sae_lab.lm.model import LM
from sae_lab.store import Store, memory_map
from sae_lab.types import Site, check_feature

VERSION = 1
TOP_TOKENS = 8
BEFORE, AFTER = 24, 12  # tokens shown around an activation
TOP_CONTEXTS, QUANTILE_CONTEXTS = 12, 4
BINS = 40
READABLE_DENSITY = (5e-4, 1e-2)  # rarer features have too few contexts to judge, denser ones are rarely about one thing


@dataclass(frozen=True)
class Context:
    """Tokens around an activation. values: the feature's activation per token, None where the mask leaves it out;
    ``peak`` is the index of the activation in ``tokens``, ``position`` its position in the model's context."""

    tokens: list[str]
    values: list[float | None]
    peak: int
    document: int
    position: int

    def __str__(self) -> str:
        marked = [f"[{t}]" if i == self.peak else t for i, t in enumerate(self.tokens)]
        return f"{self.values[self.peak]:8.2f}  {''.join(marked)!r}"


@dataclass(frozen=True)
class FeatureView:
    """One feature. density: share of kept tokens on which it fires; mean: over those; histogram: of activations > 0."""

    feature: int
    d_sae: int
    density: float
    count: int
    tokens_seen: int
    mean: float
    max: float
    f_scale: float
    histogram: dict[str, list[int] | list[float]]
    groups: list[dict[str, Any]]
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    lens_note: str
    neighbours: list[tuple[int, float]]

    @property
    def top(self) -> list[Context]:
        """The strongest contexts."""
        return self.groups[0]["contexts"] if self.groups else []

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        head = f"feature {self.feature}: fires on {self.density:.3%} of tokens, max {self.max:.2f}"
        words = f"promotes {' '.join(repr(t) for t, _ in self.promoted[:6])}" if self.promoted else ""
        return "\n".join([head, words, *(str(c) for c in self.top[:6])])

    __repr__ = __str__


class FeatureIndex:
    """All features of a coder over a store. Made and opened by ``sl.index_features``.

    ``index[i]`` opens a feature; ``index.search("Paris")`` finds features by token; ``index.order("density")`` sorts
    them; ``density``, ``mean``, ``max``, ``counts`` are arrays over features.
    """

    def __init__(self, path: Path, store: Store, lm: LM):
        self.path, self.store, self._lm = Path(path), store, lm
        facts = json.loads((self.path / "index.json").read_text())
        self.d_sae: int = facts["d_sae"]
        self.site = Site.of(facts["site"])
        self.tokens_seen: int = facts["rows"]
        stats = memory_map(self.path / "stats.safetensors")
        self._stats = stats
        self._rows = np.load(self.path / "rows.npy", mmap_mode="r", allow_pickle=False)
        self._values = np.load(self.path / "values.npy", mmap_mode="r", allow_pickle=False)
        self._offsets = stats["offsets"]
        self.counts = np.diff(self._offsets)
        self.density = self.counts / self.tokens_seen
        self.mean, self.max = stats["mean"], stats["max"]

    def __len__(self) -> int:
        return self.d_sae

    def __repr__(self) -> str:
        live = int((self.counts > 0).sum())
        return f"FeatureIndex({self.d_sae} features, {live} live on {self.tokens_seen:,} tokens, {self.site})"

    # ---- finding features

    def order(self, by: str = "density") -> np.ndarray:
        """Live features, largest first, by "density", "max" or "best" (readable)."""
        keys = {"density": self.density, "max": self.max, "best": self._readability}
        if by not in keys:
            raise ValueError(f"order by one of {', '.join(keys)}, got {by!r}")
        order = np.argsort(-np.asarray(keys[by]), kind="stable")
        return order[self.counts[order] > 0]

    def best(self, n: int = 1) -> int | list[int]:
        """Live, readable features, the most readable first: an int for n=1."""
        found = self.order("best")[:n].tolist()
        if not found:
            raise ValueError("no feature of this coder fires on the store: train it longer, or on this site")
        return found[0] if n == 1 else found

    @property
    def _readability(self) -> np.ndarray:
        """How readable each feature looks; those of middling density come first."""
        low, high = READABLE_DENSITY
        middling = (self.density >= low) & (self.density <= high)
        return self._stats["readability"] + middling

    def search(self, text: str, limit: int = 50) -> list[int]:
        """Features among whose top tokens one contains ``text`` (case ignored), the most decided first."""
        needle = text.strip().lower()
        if not needle:
            return []
        top = self._stats["top_tokens"]
        ids = np.array([i for i in np.unique(top) if i >= 0 and needle in self._token(int(i)).lower()])
        if not len(ids):
            return []
        exact = np.array([i for i in ids if self._token(int(i)).strip().lower() == needle])
        rank = 1 / (1 + np.arange(top.shape[1]))
        score = (np.isin(top, ids) * rank).sum(1) + (np.isin(top, exact) * rank).sum(1)
        order = np.argsort(-score, kind="stable")
        return order[score[order] > 0][:limit].tolist()

    def top_tokens(self, feature: int, n: int = 5) -> list[str]:
        """The tokens a feature fires on most."""
        ids = self._stats["top_tokens"][self._check(feature)]
        return [self._token(int(i)) for i in ids[:n] if i >= 0]

    def _token(self, token_id: int) -> str:
        return _label(self._lm, token_id)

    def _check(self, feature: int) -> int:
        return check_feature(feature, self.d_sae)

    # ---- opening one

    def activations(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the store, values) where a feature fires, in the order of rows."""
        feature = self._check(feature)
        part = slice(*self._offsets[feature : feature + 2])
        return self._rows[part], self._values[part]

    def __getitem__(self, feature: int) -> FeatureView:
        rows, values = self.activations(feature)
        stats = self._stats
        counts, edges = np.histogram(values, BINS, (0.0, float(self.max[feature]) or 1.0))
        return FeatureView(
            feature=int(feature),
            d_sae=self.d_sae,
            density=float(self.density[feature]),
            count=len(values),
            tokens_seen=self.tokens_seen,
            mean=float(self.mean[feature]),
            max=float(self.max[feature]),
            f_scale=float(stats["f_scale"][feature]),
            histogram={"counts": counts.tolist(), "edges": edges.tolist()},
            groups=self._groups(rows, values),
            promoted=self._lens(feature, "up"),
            suppressed=self._lens(feature, "down"),
            lens_note=self._lens_note(feature),
            neighbours=list(
                zip(stats["neighbours"][feature].tolist(), stats["cosines"][feature].tolist(), strict=True)
            ),
        )

    def __iter__(self) -> Iterator[FeatureView]:
        return (self[i] for i in range(self.d_sae))

    def _lens(self, feature: int, side: str) -> list[tuple[str, float]]:
        if f"lens_{side}" not in self._stats:
            return []
        ids, values = self._stats[f"lens_{side}_ids"][feature], self._stats[f"lens_{side}"][feature]
        return [(self._token(int(i)), round(float(v), 3)) for i, v in zip(ids, values, strict=True)]

    def _lens_note(self, feature: int) -> str:
        if "lens_kurtosis" not in self._stats:
            return f"no logit lens: {self.site} is not written to the residual stream"
        limit = float(np.quantile(self._stats["lens_random"], 0.99))
        kurtosis = float(self._stats["lens_kurtosis"][feature])
        if kurtosis > limit:
            return ""
        return f"probably noise: kurtosis {kurtosis:.2f}, and 1 % of random directions exceed {limit:.2f}"

    def _groups(self, rows: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
        """Top contexts, then a few from each quarter of the activations; no stretch of text twice."""
        if not len(rows):
            return []
        order = np.argsort(-values, kind="stable")
        seen: set[Any] = set()
        groups = [{"label": "top", "contexts": self._contexts(order, rows, values, TOP_CONTEXTS, seen)}]
        for quarter in range(4):
            part = order[len(order) * quarter // 4 : len(order) * (quarter + 1) // 4]
            spread = (
                part[np.linspace(0, len(part) - 1, min(len(part), 3 * QUANTILE_CONTEXTS)).astype(int)]
                if len(part)
                else part
            )
            found = self._contexts(spread, rows, values, QUANTILE_CONTEXTS, seen)
            if found:
                groups.append({"label": f"quantile {75 - 25 * quarter}-{100 - 25 * quarter} %", "contexts": found})
        return groups

    def _contexts(
        self, picks: np.ndarray, rows: np.ndarray, values: np.ndarray, limit: int, seen: set[Any]
    ) -> list[Context]:
        """Contexts of the picked activations. ``seen`` holds what was shown: contexts, and the tokens that lead up to
        an activation (repeated text)."""
        found: list[Context] = []
        picks = picks[: 8 * limit]
        numbers = self.store.contexts(np.asarray(rows[picks], np.int64)) if len(picks) else []
        for pick, number in zip(picks, numbers, strict=True):
            if len(found) == limit:
                break
            ids = self.store.context_ids(int(number))
            here, positions = self.store.context_rows(int(number))
            peak = int(positions[np.searchsorted(here, rows[pick])])
            lead = tuple(ids[max(0, peak - 5) : peak + 1].tolist())
            if int(number) in seen or lead in seen:
                continue
            seen |= {int(number), lead}
            found.append(self._context(ids, here, positions, rows, values, peak))
        return found

    def _context(
        self, ids: np.ndarray, here: np.ndarray, positions: np.ndarray, rows: np.ndarray, values: np.ndarray, peak: int
    ) -> Context:
        along: list[float | None] = [None] * len(ids)
        first, last = np.searchsorted(rows, [here[0], here[-1] + 1])
        fires = dict(zip(rows[first:last].tolist(), values[first:last].tolist(), strict=True))
        for row, position in zip(here.tolist(), positions.tolist(), strict=True):
            if row < self.tokens_seen:  # the store may end within a context
                along[position] = round(fires.get(row, 0.0), 4)
        start, stop = max(0, peak - BEFORE), min(len(ids), peak + AFTER + 1)
        labels = [t.label for t in self._lm.token_strings(ids[start:stop].tolist(), prefixed=start == 0)]
        document = int(self.store.rows(here[:1], "document")[0])
        return Context(labels, along[start:stop], peak - start, document, peak)


@lru_cache(maxsize=200_000)
def _label(lm: LM, token_id: int) -> str:
    return lm.token_strings([token_id])[0].label
