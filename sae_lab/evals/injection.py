"""Whether a feature needs more than its tokens to fire: its top tokens are inserted into unrelated text."""

from collections.abc import Sequence
from dataclasses import field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lab.activations.contexts import spread_contexts
from sae_lab.activations.reading import read_codes
from sae_lab.arguments import as_annotated, check_least
from sae_lab.feature_index import FeatureIndex
from sae_lab.lm.model import LM
from sae_lab.lm.text import Documents
from sae_lab.lm.tokens import label, pad
from sae_lab.results import Result, figure, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import with_error

ENOUGH = 0.5  # share of texts in which a feature must activate to count as activated by its tokens
NEAR = 25  # tokens on each side, in order of frequency, that count as equally frequent
FEWEST = 3  # firings on a token that a top token needs; fewer count if no token has that many
ROWS = 64  # texts that go through the model together


class Injected(NamedTuple):
    """One feature's outcome. rate: share of ``texts`` in which it reaches the threshold; random_rate: the same share
    with random tokens; reached: mean peak over its typical activation; example: the first text that activates it."""

    feature: int
    tokens: tuple[str, ...]
    rate: float
    random_rate: float
    reached: float
    random_reached: float
    texts: int
    example: str


@result
class Injection(Result):
    """Result of ``sl.evals.token_injection``. ``found``: every feature; ``counterexamples``: features that the inserted
    tokens activate without their usual context."""

    activated: float = figure(
        "features activated", f"in {ENOUGH:.0%} of texts or more, by {{tokens}} of their top tokens",
        control="activated_random", control_name="random tokens",
    )  # fmt: skip
    activated_se: float
    activated_random: float
    mean_rate: float = figure(
        "share of texts", "peak of {share:g} of the typical activation or more, mean over features",
        control="mean_rate_random", control_name="random tokens",
    )  # fmt: skip
    mean_rate_se: float
    mean_rate_random: float
    features: int
    texts: int
    length: int
    tokens: int
    share: float
    mask: str
    found: tuple[Injected, ...] = field(repr=False)

    @property
    def counterexamples(self) -> tuple[Injected, ...]:
        """Features that their tokens alone activate, the clearest first."""
        return tuple(sorted((f for f in self.found if f.rate >= ENOUGH), key=lambda f: -f.rate))

    _records = "found"
    _below = (
        "{features} features, {texts} texts of {length} tokens, of which each feature uses those that leave it off; "
        "tokens equally frequent in the store; ± over features; {mask}{_examples}"
    )

    @property
    def _examples(self) -> str:
        return "".join(
            f"\n#{f.feature} {' '.join(map(repr, f.tokens))}: {f.rate:.0%} of texts (random {f.random_rate:.0%}), e.g. "
            f"{f.example!r}"
            for f in self.counterexamples[:3]
        )


@as_annotated
@torch.no_grad()
def token_injection(
    coder: SparseCoder,
    lm: LM,
    index: FeatureIndex,
    features: Sequence[int],
    text: Documents,
    tokens: int = 3,
    texts: int = 20,
    length: int = 32,
    share: float = 0.5,
    seed: int = 0,
) -> Injection:
    """``sl.evals.token_injection(sae, lm, index, features, text.held_out)``: whether tokens alone activate features.

    Each feature's top tokens are inserted into neutral text, at random places.

    A feature activates in a text if its peak reaches share·(its median activation where it fires in the index's store).
    A neutral text does not activate it before insertion. Top tokens: largest mean activation per occurrence in the
    store, zeros counted, among tokens on which it fires three times. Control: each top token replaced by a random token
    of equal frequency in the store. A feature that reads tokens activates in all texts; one that reads a context, in
    few; random tokens activate neither.

    Args:
        index: of this coder, over text in which the features fire. features: which to test.
        text: where to insert tokens, e.g. ``text.held_out``. tokens: how many to insert. texts: how many texts, of
            ``length`` tokens.

    Raises ValueError for features that never fire in the store, and for text without a neutral piece.

    GeorgeMLP/reasoning-probing finds that cue tokens activate 45 to 90 % of "reasoning features".
    """
    if coder.d_sae != index.d_sae:
        raise ValueError(f"the coder has {coder.d_sae} features, the index {index.d_sae}: use an index of this coder")
    check_least(1, tokens=tokens, texts=texts, length=length)
    if not 0 < share <= 1:
        raise ValueError(f"share must lie above 0 and be at most 1, got {share}: 0.5 is half the typical activation")
    chosen = [coder.feature(f) for f in features]
    if not chosen:
        raise ValueError("no features given: pass a few, e.g. index.search('because').features")
    if silent := [f for f in chosen if index.counts[f] == 0]:
        raise ValueError(f"feature {silent[0]} never fires in the index's store, so it has no top tokens: leave it out")
    random = np.random.default_rng(seed)
    contexts = [c.ids for c in spread_contexts(lm, text, 2 * texts * length, length) if len(c.ids) == length][:texts]
    if not contexts:
        raise ValueError(f"the text has no context of length={length}: give longer documents, or a smaller length")
    vocabulary = index.store.rows(np.arange(index.tokens_seen), "token").numpy()
    counts = np.bincount(vocabulary)
    by_count = np.argsort(counts, kind="stable")[-np.count_nonzero(counts) :]
    tops, typical, rows = [], [], []
    for feature in chosen:
        top, median = _top_tokens(index, feature, vocabulary, counts, tokens)
        tops.append(top)
        typical.append(median)
        others = [_as_frequent(token, top, by_count, random) for token in top]
        for ids in contexts:
            places = np.sort(random.choice(np.arange(1, length + 1), len(top), replace=len(top) > length))
            rows += [_insert(ids, places, top), _insert(ids, places, others)]
    own, units = torch.arange(len(chosen)).repeat_interleave(2 * len(contexts)), torch.tensor(typical)[:, None]
    peaks = _peaks(lm, coder, rows, chosen)[torch.arange(len(rows)), own].view(len(chosen), -1, 2) / units[..., None]
    neutral = _peaks(lm, coder, contexts, chosen).T / units < share
    found = []
    for i, feature in enumerate(chosen):
        if not neutral[i].any():
            raise ValueError(f"no text leaves feature {feature} off: give other text, or a feature that fires less")
        counted = peaks[i][neutral[i]].double()
        hit, reached = (counted >= share).double().mean(0).tolist(), counted.mean(0).tolist()
        example = torch.nonzero(neutral[i] & (peaks[i, :, 0] >= share)).flatten()
        shown = lm.tokenizer.decode(rows[2 * (i * len(contexts) + int(example[0]))][1:]) if len(example) else ""
        words = tuple(label(lm.tokenizer, token) for token in tops[i])
        found.append(Injected(feature, words, hit[0], hit[1], reached[0], reached[1], len(counted), shown))
    rate, by_chance = (np.array([getattr(f, name) for f in found]) for name in ("rate", "random_rate"))
    return Injection(
        **with_error(activated=rate >= ENOUGH, mean_rate=rate),
        activated_random=float((by_chance >= ENOUGH).mean()),
        mean_rate_random=float(by_chance.mean()),
        features=len(found),
        texts=len(contexts),
        length=length,
        tokens=tokens,
        share=share,
        mask=str(coder.mask or lm.mask()),
        found=tuple(found),
    )


def _top_tokens(
    index: FeatureIndex, feature: int, vocabulary: np.ndarray, counts: np.ndarray, n: int
) -> tuple[list[int], float]:
    """(token ids of the largest mean activation, the median activation where it fires)."""
    rows, values = index.activations(feature)
    values = np.asarray(values, np.float64)
    ids, where, firings = np.unique(vocabulary[rows], return_inverse=True, return_counts=True)
    mean = np.bincount(where, values) / counts[ids]
    mean[firings < min(FEWEST, firings.max())] = 0
    order = np.argsort(-mean, kind="stable")[:n]
    return ids[order[mean[order] > 0]].tolist(), float(np.median(values))


def _as_frequent(token: int, top: list[int], by_count: np.ndarray, random: np.random.Generator) -> int:
    """A random token of those nearest in frequency, without the top tokens."""
    at = int(np.flatnonzero(by_count == token)[0])
    near = by_count[max(0, at - NEAR) : at + NEAR + 1]
    near = near[~np.isin(near, top)]
    return int(random.choice(near)) if len(near) else token


def _insert(ids: list[int], places: np.ndarray, tokens: list[int]) -> list[int]:
    """ids with a token inserted in front of each of these places, in order."""
    return np.insert(np.array(ids), places, tokens).tolist()


def _peaks(lm: LM, coder: SparseCoder, rows: list[list[int]], features: list[int]) -> Tensor:
    """The largest activation of each feature in each text, "texts features"."""
    out = []
    for start in range(0, len(rows), ROWS):
        batch = pad(rows[start : start + ROWS])
        codes, keep = read_codes(lm, coder, batch)
        place = keep.nonzero()[:, 0][codes.rows] * coder.d_sae + codes.features
        peaks = torch.zeros(len(batch.ids) * coder.d_sae).scatter_reduce_(0, place, codes.values.float(), "amax")
        out.append(peaks.view(-1, coder.d_sae)[:, features])
    return torch.cat(out)
