"""How ``index.search`` finds features: where words stand in a store and what fires there, or in a sentence."""

from collections.abc import Callable

import numpy as np

from sae_lab.activations.reading import read_codes, require_fits
from sae_lab.feature_index.labels import Labels
from sae_lab.lm.model import LM
from sae_lab.saes.base import SparseCoder

LOOKED_AT = 512  # occurrences of a word; the standard error of a share of them is then at most 2.2 %


def stem(word: str) -> str:
    """A word without the ending of an English plural: the rules of Harman's S stemmer (1991, "How effective is
    suffixing?"), which leave words of three letters alone."""
    if len(word) <= 3:
        return word
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith(("us", "ss")) else word


class Places:
    """Where words stand among the rows of a store: on the last token of each occurrence.

    A token that begins or ends within a longer word does not count. Where no whole word is found, all tokens that
    contain the letters do.
    """

    def __init__(self, lm: LM, labels: Labels, tokens: np.ndarray):
        self._lm, self._labels, self._tokens = lm, labels, tokens
        ends = [(label[:1].isalnum(), label[-1:].isalnum()) for label in labels.within]
        ends += [(False, False)] * max(0, int(tokens.max(initial=0)) + 1 - len(ends))
        self._goes_on, self._open = np.array(ends, bool).reshape(-1, 2).T  # begins, ends with a letter or digit

    def of(self, word: str) -> tuple[np.ndarray, bool]:
        """(rows of a word in lower case, whether they are of the whole word)."""
        lower, wanted = self._labels.lower, stem(word)
        holding = [i for i, label in enumerate(lower) if wanted in label]
        whole = [i for i in holding if stem(lower[i].strip()) == wanted]
        rows = self._bounded(self._of_ids(whole), 1)
        pieces = [self._of_pieces(form) for form in {word, wanted, wanted + "s"} if stem(form) == wanted]
        rows = np.unique(np.concatenate([rows, *pieces]))
        return (rows, True) if len(rows) else (self._of_ids([i for i in holding if word in lower[i]]), False)

    def _of_ids(self, ids: list[int]) -> np.ndarray:
        wanted = np.zeros(len(self._goes_on), bool)
        wanted[[i for i in ids if i < len(wanted)]] = True
        return np.flatnonzero(wanted[self._tokens])

    def _of_pieces(self, word: str) -> np.ndarray:
        """Rows where a word ends that the tokenizer cuts in several."""
        found = [np.zeros(0, np.int64)]
        for form in {f"{space}{w}" for space in (" ", "") for w in (word, word.capitalize())}:
            ids = self._lm.tokenize(form).ids[0].tolist()
            ids = ids[1:] if ids[0] == self._lm.prefix_id else ids
            if len(ids) > 1:
                rows = np.flatnonzero(self._tokens[len(ids) - 1 :] == ids[-1]) + len(ids) - 1
                for back, token in enumerate(ids[::-1]):
                    rows = rows[self._tokens[rows - back] == token]
                found.append(self._bounded(rows, len(ids)))
        return np.concatenate(found)

    def _bounded(self, rows: np.ndarray, length: int) -> np.ndarray:
        """Without those that are a part of a longer word."""
        first, tokens, last = rows - length + 1, self._tokens, len(self._tokens) - 1
        before = (first > 0) & self._open[tokens[np.maximum(first - 1, 0)]] & self._goes_on[tokens[first]]
        after = (rows < last) & self._goes_on[tokens[np.minimum(rows + 1, last)]] & self._open[tokens[rows]]
        return rows[~before & ~after]


def relevance(
    places: list[np.ndarray], codes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], total: np.ndarray
) -> dict[str, np.ndarray]:
    """How much of each feature lies on some words: recall·share^¼, which found the right feature more often than other
    forms (benchmarks/search.py).

    recall: the share of a word's occurrences on which the feature fires, the mean over the words; share: of the
    feature's activation, what lies on the words. Of a word with more than LOOKED_AT occurrences so many are looked at,
    evenly spread.

    Args:
        places: rows of the store, of each word. codes: gives the features and activations of all codes on some rows.
        total: each feature's summed activation over the store.
    """
    recall, mass = np.zeros((2, len(total)))
    for rows in places:
        some = rows[np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).astype(np.int64)]
        features, values = codes(some)
        each = max(len(some), 1)
        recall += np.bincount(features, minlength=len(total)) / each / len(places)
        mass += np.bincount(features, values, len(total)) * len(rows) / each
    share = np.minimum(mass / np.maximum(total, 1e-12), 1)
    return {"relevance": recall * share**0.25, "share": share, "recall": recall}


def on_sentence(
    lm: LM, coder: SparseCoder, text: str, density: np.ndarray, mean: np.ndarray
) -> dict[str, np.ndarray]:
    """The features that fire on a text more than on the store, in one pass of the model, by
    (mean code on the text - density·mean) · log(1/density), which found a class of texts more often than other forms
    (benchmarks/search.py).

    density, mean: of each feature on the store; mean: where it fires. times: mean code on the text over that on the
    store. peak, token: the largest code, and where.
    """
    require_fits(coder, lm, writes=False)
    codes, keep = read_codes(lm, coder, lm.tokenize(text))
    rows, features, values = codes.rows.numpy(), codes.features.numpy(), codes.values.numpy()
    here = np.bincount(features, values, len(density)) / max(int(keep.sum()), 1)
    usual = density * mean
    live = np.flatnonzero((here > usual) & (density > 0))
    relevance = (here - usual)[live] * -np.log(density[live])
    order = np.argsort(-relevance, kind="stable")
    strongest = np.lexsort((rows, -values, features))  # the first of equal ones
    first = strongest[np.searchsorted(features[strongest], live[order])]
    labels = np.array([t.label for t in lm.tokens(text)], object)
    return {
        "feature": live[order], "relevance": relevance[order], "times": (here / np.maximum(usual, 1e-12))[live][order],
        "peak": values[first], "token": labels[keep[0].nonzero()[:, 0].numpy()[rows[first]]],
    }  # fmt: skip
