"""Passages to explain from, and passages to judge on, from different documents."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from sae_lab.arguments import Count, as_annotated
from sae_lab.feature_index import FeatureIndex
from sae_lab.types import check_feature

LENGTH = 32  # tokens of a passage, as in Paulo et al.
LEAST_BEFORE = 12  # tokens before the one it was chosen for, if the document has them
QUANTILES = 5
HARD = ("same token", "co-firing")  # kinds of silent passages that are hard to tell from firing ones
PARTS = ("explain", "judge")
JUDGED_EVERY = 4  # one document in four is for judging: rules need more text than judges
TRIES = 40  # rows tried for each silent passage


@dataclass(frozen=True)
class Passage:
    """Some tokens of a document and a feature's activations on them.

    values: activation per token, NaN for a token left out. kind: "fires", or for a silent passage why it
    was chosen: "random", "same token" (it has a token on which the feature fires elsewhere), "co-firing" (it has a
    feature that often fires with this one). anchor: the token it was chosen for. quantile: of the activation at the
    anchor, 0 the weakest; -1 for a silent passage.
    """

    tokens: list[str]
    values: np.ndarray
    kind: str
    anchor: int
    document: int
    quantile: int = -1

    @property
    def fires(self) -> np.ndarray:
        """Bool per token: whether the feature fires."""
        return np.nan_to_num(self.values) > 0

    @property
    def known(self) -> np.ndarray:
        """Bool per token: whether its activation is known, 0 or more."""
        return ~np.isnan(self.values)

    @property
    def text(self) -> str:
        return "".join(self.tokens)


@dataclass(frozen=True)
class Passages:
    """Passages in which one feature fires, the strongest first, and passages in which it is silent. largest: its
    largest activation in the whole store."""

    feature: int
    firing: list[Passage]
    silent: list[Passage]
    largest: float

    @property
    def all(self) -> list[Passage]:
        return [*self.firing, *self.silent]


class _Window(NamedTuple):
    """A place for a passage: positions from ``start`` of a context, and a feature's values there."""

    context: int
    document: int
    start: int
    anchor: int
    values: np.ndarray


@as_annotated
class Corpus:
    """``Corpus(index).passages(812, "judge", 20, 20)``: an index's documents in two parts, "explain" (three of four) to
    make explanations from, and "judge" to judge them on. The parts depend on the seed alone.

    ValueError for a store of a single document.
    """

    def __init__(self, index: FeatureIndex, seed: int = 0):
        self.index, self.seed = index, seed
        everything = np.arange(index.tokens_seen)
        self._document = index.store.rows(everything, "document").numpy()
        self._context = index.store.contexts(everything)
        names, where = np.unique(self._document, return_inverse=True)
        if len(names) < 2:
            raise ValueError(
                "explanations are judged on documents they were not made from: the store has a single document, "
                "harvest from a text of several"
            )
        judged = (np.arange(len(names)) % JUDGED_EVERY == 0).astype(np.int8)
        self._part = np.random.default_rng([seed, 0]).permutation(judged)[where]  # of each row, as in PARTS

    @cached_property
    def _token(self) -> np.ndarray:
        return self.index.store.rows(np.arange(self.index.tokens_seen), "token").numpy()

    def passages(self, feature: int, part: str, firing: Count, silent: Count, strongest: bool = False) -> Passages:
        """At most ``firing`` and ``silent`` passages of a feature from one part, "explain" or "judge".

        Firing ones come equally from all quantiles of its activations (``strongest``: half of them are the strongest),
        silent ones equally at random, with the same token, and with co-firing features.
        """
        if part not in PARTS:
            raise ValueError(f'the parts of the documents are "explain" and "judge", got {part!r}')
        feature = check_feature(feature, self.index.d_sae)
        side = PARTS.index(part)
        rows, values = self.index.activations(feature)
        random = np.random.default_rng([self.seed, len(rows), *rows[:1].tolist(), side])  # for any number
        here = self._part[rows] == side
        chosen = self._firing(rows[here], values[here], firing, strongest, random)
        shown = [self._passage(self._window(rows, values, row, random), "fires", quantile) for row, quantile in chosen]
        quiet = self._silent(feature, rows, values, side, silent, random)
        return Passages(feature, shown, quiet, float(self.index.max[feature]))

    def _firing(
        self, rows: np.ndarray, values: np.ndarray, wanted: int, strongest: bool, random: np.random.Generator
    ) -> list[tuple[int, int]]:
        """(row, quantile) of activations in different contexts, the strongest first."""
        order = np.argsort(-values, kind="stable")
        quantile = QUANTILES - 1 - np.arange(len(order)) * QUANTILES // max(len(order), 1)
        if strongest:
            rest = random.permutation(np.arange(wanted // 2, len(order)))
            groups = [(wanted - wanted // 2, np.arange(len(order))), (wanted // 2, rest)]
        else:
            most = -(-wanted // QUANTILES)
            groups = [(most, random.permutation(np.flatnonzero(quantile == q))) for q in range(QUANTILES)]
        seen: set[int] = set()
        found: list[int] = []
        for most, places in groups:
            taken = 0
            for place in places.tolist():
                if taken == most or len(found) == wanted:
                    break
                if (context := int(self._context[rows[order[place]]])) not in seen:
                    seen.add(context)
                    found.append(place)
                    taken += 1
        return [(int(rows[order[place]]), int(quantile[place])) for place in sorted(found)]

    def _silent(
        self, feature: int, rows: np.ndarray, values: np.ndarray, side: int, wanted: int, random: np.random.Generator
    ) -> list[Passage]:
        """Passages in which the feature never fires; random ones replace those that a kind lacks."""
        found: list[Passage] = []
        seen: set[int] = set()
        for number, kind in enumerate((*HARD, "random")):
            share = (number + 1) * wanted // 3 - number * wanted // 3 if kind in HARD else wanted - len(found)
            if kind == "same token":
                places = self._same_token(rows, side, TRIES * share, random)
            else:
                places = self._cofiring(feature, side) if kind in HARD else np.flatnonzero(self._part == side)
            if len(places) > TRIES * max(share, 1):
                places = random.choice(places, TRIES * max(share, 1), replace=False)
            whole = len(found) + share
            for row in random.permutation(places).tolist():
                context = int(self._context[row])
                if len(found) < whole and context not in seen:
                    window = self._window(rows, values, row, random)
                    if not (window.values > 0).any():
                        seen.add(context)
                        found.append(self._passage(window, kind))
        return found

    def _same_token(self, rows: np.ndarray, side: int, most: int, random: np.random.Generator) -> np.ndarray:
        """Rows of this part on which the feature is silent, with the distribution of tokens of the rows on which it
        fires."""
        tokens, firing = np.unique(self._token[rows[self._part[rows] == side]], return_counts=True)
        alike = np.isin(self._token, tokens) & (self._part == side)
        alike[rows] = False
        places = np.flatnonzero(alike)
        if not len(places):
            return places
        which = np.searchsorted(tokens, self._token[places])
        weight = (firing / np.maximum(np.bincount(which, minlength=len(tokens)), 1))[which]
        return random.choice(places, min(most, len(places)), replace=False, p=weight / weight.sum())

    def _cofiring(self, feature: int, side: int) -> np.ndarray:
        """Rows of this part on which the feature is silent, and one of its five most co-firing features fires."""
        others = [other for other, _, _ in self.index[feature].cofiring[:5]]
        together = [self.index.activations(other)[0] for other in others]
        rows = np.unique(np.concatenate([*together, np.zeros(0, np.int32)]).astype(np.int64))
        return np.setdiff1d(rows[self._part[rows] == side], self.index.activations(feature)[0], assume_unique=True)

    def _window(self, rows: np.ndarray, values: np.ndarray, row: int, random: np.random.Generator) -> _Window:
        """LENGTH tokens around a row, with the row at a random place among the last 20 of them. rows, values: of the
        feature's activations."""
        context, document = int(self._context[row]), int(self._document[row])
        here, positions = self.index.store.context_rows(context)
        seen = here < self.index.tokens_seen  # the store may end within a context
        here, positions = here[seen], positions[seen]
        own = positions[self._document[here] == document]  # a packed context holds several documents
        first, last = int(own[0]), int(own[-1]) + 1
        at = int(positions[np.searchsorted(here, row)])
        start = max(first, at - int(random.integers(LEAST_BEFORE, LENGTH)))
        stop = min(last, start + LENGTH)
        start = max(first, stop - LENGTH)
        found = np.full(stop - start, math.nan, np.float32)
        inside = (positions >= start) & (positions < stop)
        found[positions[inside] - start] = _at(rows, values, here[inside])
        return _Window(context, document, start, at - start, found)

    def _passage(self, window: _Window, kind: str, quantile: int = -1) -> Passage:
        ids = self.index.store.context_ids(window.context)[window.start : window.start + len(window.values)]
        labels = self.index.token_labels(ids)
        return Passage(labels, window.values, kind, window.anchor, window.document, quantile)


def _at(rows: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """A feature's activations on ascending rows of the store; rows, values: where it fires."""
    first, last = np.searchsorted(rows, np.array([wanted[0], wanted[-1] + 1], rows.dtype))
    found = np.zeros(len(wanted), np.float32)
    found[np.searchsorted(wanted, rows[first:last])] = values[first:last]
    return found
