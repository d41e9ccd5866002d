"""sl.find_features: which features tell some texts, or some tokens, from others."""

from collections.abc import Sequence
from dataclasses import field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy import ndarray

from sae_lab.activations.reading import alike, read_codes, require_fits
from sae_lab.arguments import as_annotated, check_least
from sae_lab.lm.model import LM
from sae_lab.noting import Names
from sae_lab.results import Result, counted, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import Ranks, area, sparse_ranks

Pooling = Literal["max", "mean", "last", "token"]
PERMUTATIONS = 999  # for every feature; where fewer than FEW reach its AUROC, 10 and then 100 times as many
FEW = 10
CELLS = 1 << 22  # permuted labels in memory at once


@result
class FoundFeatures(Result):
    """Result of ``index.search`` and ``sl.find_features``, the best first: ``.best`` is its number, ``.features`` are
    all. ``searched`` says what was looked for.

    Columns of ``to_pandas()``: feature, density (share of all tokens on which it fires), label (yours), and from an
    index tokens (those it fires on most); the others say what the order comes from, see ``index.search`` and
    ``sl.find_features``.
    """

    table: dict[str, ndarray] = field(repr=False)
    searched: str

    @property
    def features(self) -> list[int]:
        """All features found, the best first."""
        return self.table["feature"].tolist()

    @property
    def best(self) -> int:
        """The first feature. ValueError where none was found."""
        if not len(self.table["feature"]):
            raise ValueError(f"no feature was found for {self.searched}: look for another word, or for less at once")
        return int(self.table["feature"][0])

    def top(self, n: int = 10) -> "FoundFeatures":
        """The first n rows."""
        return replace(self, table={name: column[:n] for name, column in self.table.items()})

    _records, _gap, _shown, _digits = "table", " ", 10, ".3g"
    _below = "{table[feature]!n} features; {searched}"


class _Examples(NamedTuple):
    """The codes of examples that are not 0."""

    example: ndarray  # of each code
    feature: ndarray
    value: ndarray
    text: ndarray  # of each example: the text that it is, or stands in
    label: ndarray  # of each example: bool
    density: ndarray  # of each feature of the coder


@as_annotated
def find_features(
    lm: LM,
    coder: SparseCoder,
    texts: Sequence[str],
    against: Sequence[str] | Sequence[int | bool] | Sequence[Sequence[int | bool]],
    *,
    pooling: Pooling = "max",
    held_out: float = 0.5,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> FoundFeatures:
    """Rank features by how well they tell positive examples from negative ones. With an index, ``index.search`` does.

        sl.find_features(lm, sae, positives, negatives)
        sl.find_features(lm, sae, texts, labels)                              # a label (0 or 1) for each text
        sl.find_features(lm, sae, texts, token_labels, pooling="token")       # one for each of lm.tokens(text)

    Args:
        pooling: what an example is: a text, with each feature's "max", "mean" or "last" code over the tokens that the
            coder's mask keeps; or each such "token", with a label of its own or that of its text.
        held_out: share of the texts that features are not ranked on; only the AUROC there is free of selection.
        permutations: of the labels, for p: of texts' labels among texts, of tokens' labels within their text. Features
            whose AUROC fewer than 10 permutations reach get 10, then 100 times as many.

    Columns of the result: auroc: chance that the feature is stronger at a positive example than at a negative one (ties
    count half), on the examples it was ranked on; held_out: the same on the held-out examples; mean_difference: mean
    pooled code at positives less that at negatives, all examples; density: on these texts; p: two-sided, by permutation
    of the labels of all examples; q: p after Benjamini and Hochberg over all features that fire on these texts; label:
    what you called it (``sl.notes``).

    Raises ValueError where a class has fewer than two texts (or tokens) on either side of the split, labels do not fit,
    or the coder is at another width.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a share of the texts, from 0 to below 1, got {held_out}")
    check_least(1, permutations=permutations)
    texts, labels = _labelled(texts, against)
    by_token = any(isinstance(one, list) for one in labels)
    if by_token and pooling != "token":
        raise ValueError(f"labels of tokens need pooling='token', got {pooling!r}")
    require_fits(coder, lm, writes=False)
    examples = _encode(lm, coder, texts, labels, pooling)
    ranked = ~_held_out_texts(labels, held_out, seed)[examples.text]
    for what, chosen in (("ranked on", ranked), ("held out", ~ranked)):
        counts = [int((examples.label[chosen] == side).sum()) for side in (True, False)]
        if (held_out or what == "ranked on") and min(counts) < 2:
            raise ValueError(
                f"each class needs two examples among those {what}, got {counts[0]} positive and {counts[1]} negative: "
                "give more texts, or held_out=0"
            )
    from scipy.stats import false_discovery_control

    live = np.unique(examples.feature)
    auroc = _auroc(examples, ranked, live)
    # Of all examples: the correction is for the number of features, not for a choice among them.
    p = _p_values(examples, live, permutations, seed, within_texts=by_token)

    table = {
        "feature": live,
        "auroc": auroc,
        "held_out": _auroc(examples, ~ranked, live) if held_out else np.full(len(live), np.nan),
        "mean_difference": _mean_difference(examples, live),
        "density": examples.density[live],
        "p": p,
        "q": false_discovery_control(p) if len(p) else p,
    }
    order = np.lexsort((-table["mean_difference"], -auroc))
    table = {name: column[order] for name, column in table.items()}
    labels = Names(coder).labels
    table["label"] = np.array([labels.get(i, "") for i in table["feature"].tolist()], object)
    positives, mask = int(examples.label.sum()), coder.mask or lm.mask()
    what = "tokens" if pooling == "token" else f"texts, pooled by {pooling}"
    return FoundFeatures(table, f"{positives} positive and {len(examples.label) - positives} negative {what}; {mask}")


def _labelled(texts: Sequence[str], against: Any) -> tuple[list[str], list[Any]]:
    """Texts and their labels, True or False, or a list of them for the tokens of each."""
    texts, against = list(texts), list(against)
    if not texts or not against:
        raise ValueError("find_features takes positives and negatives, or texts and labels: one of them is empty")
    if all(isinstance(one, str) for one in against):
        return [*texts, *against], [True] * len(texts) + [False] * len(against)
    if len(against) != len(texts):
        raise ValueError(f"there must be a label, or a list of them, for each text: {len(texts)} and {len(against)}")
    nested = [isinstance(one, Sequence | np.ndarray | torch.Tensor) and np.ndim(one) == 1 for one in against]
    labels = [[bool(x) for x in one] if many else bool(one) for one, many in zip(against, nested, strict=True)]
    flat = [x for one, many in zip(against, nested, strict=True) for x in (one if many else [one])]
    if strange := [x for x in flat if x not in (0, 1)]:
        raise ValueError(f"a label is 0 or 1 (False or True), got {strange[0]!r}")
    if any(nested) and not all(nested):
        raise ValueError("labels are one for each text, or a list for each, not both")
    return texts, labels


def _held_out_texts(labels: list[Any], share: float, seed: int) -> ndarray:
    """Bool per text: a share of each class. A text whose tokens have labels is positive if one of them is."""
    random = np.random.default_rng(seed)
    classes = np.array([any(one) if isinstance(one, list) else one for one in labels])
    held = np.zeros(len(labels), bool)
    for side in (True, False):
        members = np.flatnonzero(classes == side)
        held[random.permutation(members)[: round(share * len(members))]] = True
    return held


@torch.no_grad()
def _encode(lm: LM, coder: SparseCoder, texts: list[str], labels: list[Any], pooling: Pooling) -> _Examples:
    lengths = [len(lm.tokenize(text).ids[0]) for text in texts]
    for text, length, label in zip(texts, lengths, labels, strict=True):
        if isinstance(label, list) and len(label) != length:
            raise ValueError(
                f"a text has {counted(length, 'token')} and {counted(len(label), 'label')}: give one for "
                f"each of lm.tokens(text), the prefix token at position 0 included ({text[:40]!r})"
            )
    tokens: list[tuple[ndarray, ndarray]] = []  # of those that count: (text, position)
    codes: list[tuple[ndarray, ndarray, ndarray]] = []  # (which of these tokens, feature, value)
    before = 0
    for group in alike(lengths):
        found, keep = read_codes(lm, coder, lm.tokenize([texts[i] for i in group]))
        row, position = (t.numpy() for t in keep.nonzero(as_tuple=True))
        tokens.append((np.array(group)[row], position))
        codes.append((found.rows.numpy() + before, found.features.numpy(), found.values.numpy()))
        before += len(row)
    text, position = (np.concatenate(column) for column in zip(*tokens, strict=True))
    token, feature, value = (np.concatenate(column) for column in zip(*codes, strict=True))
    if not before:
        mask = coder.mask or lm.mask()
        raise ValueError(f"the mask leaves out every token of these texts ({mask}): give longer ones")
    density = np.bincount(feature, minlength=coder.d_sae) / before
    if pooling == "token":
        places = zip(text.tolist(), position.tolist(), strict=True)
        label = [labels[t][p] if isinstance(labels[t], list) else labels[t] for t, p in places]
        return _Examples(token, feature, value, text, np.array(label, bool), density)
    if pooling == "last":
        last = np.full(len(texts), -1)
        np.maximum.at(last, text, position)
        here = (position == last[text])[token]
        token, feature, value = token[here], feature[here], value[here]
    pairs, which = np.unique(text[token] * coder.d_sae + feature, return_inverse=True)
    example, feature = np.divmod(pairs, coder.d_sae)
    pooled = np.zeros(len(pairs))
    if pooling == "mean":
        np.add.at(pooled, which, value)
        pooled /= np.bincount(text)[example]
    else:
        np.maximum.at(pooled, which, value)
    return _Examples(example, feature, pooled, np.arange(len(texts)), np.array(labels, bool), density)


def _ranks(examples: _Examples, chosen: ndarray, live: ndarray) -> tuple[ndarray, Ranks]:
    """(the example of each firing, its rank), of the chosen examples; features are numbered by their place in live."""
    here = chosen[examples.example]
    feature = np.searchsorted(live, examples.feature[here])
    ranks = sparse_ranks(feature, examples.value[here], len(live), int(chosen.sum()))
    return examples.example[here][ranks.order], ranks


def _auroc(examples: _Examples, chosen: ndarray, live: ndarray) -> ndarray:
    (example, ranks), label = _ranks(examples, chosen, live), examples.label
    rank_sum = np.bincount(ranks.features, ranks.above * label[example], minlength=len(live))
    return area(rank_sum, ranks.silent, (label & chosen).sum(), (~label & chosen).sum())


def _p_values(examples: _Examples, live: ndarray, permutations: int, seed: int, within_texts: bool) -> ndarray:
    """(1 + permutations whose AUROC is as far from 1/2) / (1 + permutations)."""
    from scipy.sparse import csr_array

    every = np.ones(len(examples.label), bool)
    (example, ranks), auroc = _ranks(examples, every, live), _auroc(examples, every, live)
    label, unit, sizes = examples.label, np.arange(len(every)), every.astype(float)
    _, first, text_of = np.unique(examples.text, return_index=True, return_inverse=True)
    if not within_texts:  # texts are permuted: a text's ranks go together
        label, unit, sizes = label[first], text_of, np.bincount(text_of).astype(float)
    table = csr_array((ranks.above, (unit[example], ranks.features)), shape=(len(label), len(live)))
    random, p = np.random.default_rng(seed + 1), np.ones(len(live))
    todo, many = np.arange(len(live)), permutations
    for _ in range(3):
        reached, part = np.zeros(len(todo)), table[:, todo]
        left = many
        while left:
            rows = min(left, max(1, CELLS // max(len(label), len(todo))))
            drawn = _permuted(label, text_of if within_texts else None, rows, random)
            positives = (drawn @ sizes)[:, None]
            areas = area(drawn @ part, ranks.silent[todo], positives, sizes.sum() - positives)
            reached += (np.abs(areas - 0.5) >= np.abs(auroc[todo] - 0.5) - 1e-12).sum(0)
            left -= rows
        p[todo] = (1 + reached) / (1 + many)
        todo, many = todo[reached < FEW], many * 10
        if not len(todo) or permutations < PERMUTATIONS:
            break
    return p


def _permuted(label: ndarray, within: ndarray | None, rows: int, random: np.random.Generator) -> ndarray:
    """``rows`` random orders of the labels; within groups, if groups are given."""
    keys = random.random((rows, len(label)))
    if within is not None:  # sorted by group first
        keys += within
        label = label[np.argsort(within, kind="stable")]
    drawn = np.empty(keys.shape)
    np.put_along_axis(drawn, keys.argsort(1), np.broadcast_to(label.astype(float), drawn.shape), 1)
    return drawn


def _mean_difference(examples: _Examples, live: ndarray) -> ndarray:
    feature, label = np.searchsorted(live, examples.feature), examples.label[examples.example]
    sums = [np.bincount(feature, examples.value * side, minlength=len(live)) for side in (label, ~label)]
    return sums[0] / examples.label.sum() - sums[1] / (~examples.label).sum()
