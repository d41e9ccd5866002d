"""Results on features of which each has a word: whether the word is found, beside a control."""

from collections.abc import Mapping, Sequence

from sae_lab.lm.model import LM
from sae_lab.results import Result
from sae_lab.stats import mean_and_error


class WordHits(Result):
    """Base of results with ``words``, "" for a feature without one, and ``hits``: whether the word was found."""

    words: tuple[str, ...]

    @property
    def hit_rate(self) -> float:
        """Share of the features with a word whose word was found; NaN if none has one."""
        return self._rate("hits")[0]

    def _rate(self, name: str) -> tuple[float, float]:
        """(mean, standard error) of a field over the features with a word."""
        return mean_and_error([float(v) for v, word in zip(getattr(self, name), self.words, strict=True) if word])

    @property
    def _named(self) -> int:
        return sum(map(bool, self.words))


def words_for(features: Sequence[int], words: Mapping[int, str] | None) -> tuple[str, ...]:
    """Each feature's word, stripped; "" for a feature without one."""
    return tuple("" if words is None else words.get(f, "").strip() for f in features)


def check_k(k: int, lm: LM) -> int:
    if not 1 <= k <= lm.vocab_size:
        raise ValueError(f"k must lie between 1 and the vocabulary's {lm.vocab_size} tokens, got {k}")
    return k
