"""Prompts that make a feature fire: those of a corpus, and those that a search makes."""

import math
from collections.abc import Sequence
from dataclasses import field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lab.activations.contexts import spread_contexts
from sae_lab.activations.reading import read_some, require_fits
from sae_lab.arguments import as_annotated, check_least
from sae_lab.feature_index.index import FeatureIndex
from sae_lab.lm.model import LM, token_losses
from sae_lab.lm.text import Text
from sae_lab.lm.tokens import Prompts
from sae_lab.results import Figure, Result, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import mean_and_error
from sae_lab.types import TokenBatch

Source = FeatureIndex | Text | Sequence[str]
STARTS = ("top", "random")

PASS_TOKENS = 2048  # that go through the model together
LOSS_PROMPTS = 16  # whose logits are held together
BEFORE, AFTER = 24, 12  # tokens of an example around its peak
TOKENS, CONTEXT = 20_000, 64  # tokens of a source that is text: all that are read, and in one context
FLUENCY = 0.02  # share of the corpus maximum that a nat of cross-entropy costs by default


def check_coder(sae: SparseCoder, lm: LM) -> None:
    """ValueError for a coder in training mode, of another width than the model's, or of several sites."""
    if sae.training:
        raise ValueError("explaining a feature needs the coder in eval mode, got a training one: call sae.eval()")
    if len(sae.in_shape) > 1:
        raise ValueError(f"features are read at one site, this coder reads {len(sae.reads)}: take an SAE of one site")
    require_fits(sae, lm, writes=False)


def check_features(sae: SparseCoder, features: Sequence[int]) -> list[int]:
    """The features' numbers. ValueError for none, one twice, or one that the coder does not have."""
    numbers = [sae.feature(f) for f in features]
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"features must be at least one number, each once, got {list(features)}")
    return numbers


@torch.no_grad()
def codes_of(
    sae: SparseCoder, lm: LM, features: Sequence[int], prompts: Prompts
) -> tuple[Float[Tensor, "batch pos features"], Bool[Tensor, "batch pos"]]:
    """Codes of some features on prompts, and which tokens the coder's mask keeps; 0 at the others and at padding.

    The model runs up to the coder's site, some prompts at a time.
    """
    batch = lm.tokenize(prompts)
    at = torch.arange(len(batch.ids)).split(max(1, PASS_TOKENS // batch.ids.shape[1]))
    parts = [TokenBatch(batch.ids[rows], batch.mask[rows], batch.positions[rows]) for rows in at]
    codes, kept = map(torch.cat, zip(*(read_some(lm, sae, features, part) for part in parts), strict=True))
    return codes * kept.unsqueeze(-1), kept


def strongest_activations(sae: SparseCoder, lm: LM, feature: int, prompts: Prompts) -> Float[Tensor, " batch"]:
    """The feature's largest activation on each prompt."""
    return codes_of(sae, lm, [feature], prompts)[0][..., 0].amax(1)


class Example(NamedTuple):
    """Some tokens of a corpus. ids: without the prefix; peak: the token that the feature fires on most; value: the
    activation there, read in its context."""

    ids: list[int]
    peak: int
    value: float


def top_examples(
    sae: SparseCoder, lm: LM, features: Sequence[int], source: Source, n: int = 10
) -> dict[int, list[Example]]:
    """The n contexts on which each feature fires most, the strongest first: one example a context.

    source: an index of this coder, or text of which ``TOKENS`` are read.
    """
    if isinstance(source, FeatureIndex):
        return {f: _indexed(source, f, n, lm.prefix_id) for f in features}
    contexts = [c.ids for c in spread_contexts(lm, source, TOKENS, min(CONTEXT, lm.max_length))]
    codes, _ = codes_of(sae, lm, features, contexts)
    values, places = codes.max(1)
    found = {}
    for i, feature in enumerate(features):
        best = [k for k in values[:, i].argsort(descending=True)[:n].tolist() if values[k, i] > 0]
        found[feature] = [_window(contexts[k], int(places[k, i]), float(values[k, i]), lm.prefix_id) for k in best]
    return found


def _indexed(index: FeatureIndex, feature: int, n: int, prefix: int | None) -> list[Example]:
    rows, values = index.activations(feature)
    order = np.argsort(-values, kind="stable")
    found: dict[int, Example] = {}
    for start in range(0, len(order), 8 * n):
        chosen = order[start : start + 8 * n]
        at = rows[chosen].astype(np.int64)
        for row, value, number in zip(at, values[chosen], index.store.contexts(at).tolist(), strict=True):
            if number in found:
                continue
            here, positions = index.store.context_rows(number)
            place = int(positions[np.searchsorted(here, row)])
            found[number] = _window(index.store.context_ids(number).tolist(), place, float(value), prefix)
            if len(found) == n:
                return list(found.values())
    return list(found.values())


def _window(ids: Sequence[int], place: int, value: float, prefix: int | None) -> Example:
    first = int(bool(ids) and ids[0] == prefix)
    start = max(first, place - BEFORE)
    return Example([int(i) for i in ids[start : place + AFTER + 1]], place - start, value)


def random_examples(lm: LM, source: Source, n: int, seed: int = 0) -> list[list[int]]:
    """Ids of n pieces of the corpus drawn at random."""
    rng = np.random.default_rng(seed)
    if isinstance(source, FeatureIndex):
        numbers = source.store.contexts(rng.choice(len(source.store), min(n, len(source.store)), replace=False))
        contexts = [source.store.context_ids(k).tolist() for k in numbers.tolist()]
    else:
        every = [c.ids for c in spread_contexts(lm, source, TOKENS, min(CONTEXT, lm.max_length))]
        contexts = [every[k] for k in rng.permutation(len(every))[:n]]
    return [_window(ids, int(rng.integers(1, len(ids))), 0.0, lm.prefix_id).ids for ids in contexts]


@result
class EvolvedPrompts(Result):
    """Result of ``evolve_prompts``: one entry a feature, in the order of ``features``.

    Attributes:
        prompts: the best prompt found; ``ids``: its tokens (the text may be tokenized differently).
        activation: the feature's largest activation on those ids; ``activation_of_text``: on the text, tokenized anew.
        ce: nats/token of the ids; ``start_ce``: of the prompt that the search began from.
        corpus_max: the largest activation in the corpus.
        random_activation, random_ce: the same of the random search, the control.
        evaluations: prompts whose activation was measured in each search.
    """

    features: tuple[int, ...]
    prompts: tuple[str, ...]
    activation: tuple[float, ...]
    activation_of_text: tuple[float, ...]
    ce: tuple[float, ...]
    start_ce: tuple[float, ...]
    corpus_max: tuple[float, ...]
    random_activation: tuple[float, ...]
    random_ce: tuple[float, ...]
    start: str
    length: int
    evaluations: int
    ce_weight: tuple[float, ...]
    ids: tuple[tuple[int, ...], ...] = field(repr=False, compare=False)

    _records = ("feature=features", "prompt=prompts", "activation", "activation_of_text", "corpus_max", "ce",
                "start_ce", "random_activation", "random_ce", "ce_weight")  # fmt: skip
    _below = (
        "{features!n} features, {length} tokens, start {start!r}, {evaluations} evaluations a search; ± over features"
    )

    def _relative(self, name: str) -> np.ndarray:
        """Activations in units of the corpus maximum."""
        return np.array(getattr(self, name)) / np.array(self.corpus_max)

    @property
    def exceeding(self) -> float:
        """Share of features whose best prompt exceeds the corpus maximum."""
        return float(np.mean(np.array(self.activation) > np.array(self.corpus_max)))

    def figures(self) -> list[Figure]:
        of = partial(Figure, control_name="random search", digits=2)
        found, chance = self._relative("activation"), self._relative("random_activation")
        return [
            of("exceed the corpus maximum", *mean_and_error(found > 1), float((chance > 1).mean()),
               meaning="share of features", best="high"),
            of("activation", *mean_and_error(found), float(chance.mean()),
               meaning="in units of the corpus maximum, mean over features", best="high"),
            Figure("as text", float(self._relative("activation_of_text").mean()), best="high", digits=2,
                   meaning="the same, with the prompt read as text and tokenized anew"),
            of("cross-entropy", *mean_and_error(self.ce), float(np.mean(self.random_ce)),
               meaning=f"nats/token; the start's is {np.mean(self.start_ce):.2f}", best="low"),
        ]  # fmt: skip

    def _footer(self) -> str:
        lines = [
            f"feature {f}: {a:.2f} (corpus {m:.2f}) {p!r}"
            for f, a, m, p in zip(self.features, self.activation, self.corpus_max, self.prompts, strict=True)
        ]
        return "\n".join([super()._footer(), *lines])


@as_annotated
def evolve_prompts(
    sae: SparseCoder,
    lm: LM,
    source: Source,
    features: Sequence[int],
    *,
    start: str = "top",
    length: int = 12,
    generations: int = 16,
    children: int = 48,
    population: int = 12,
    ce_weight: float | None = None,
    seed: int = 0,
) -> EvolvedPrompts:
    """``evolve_prompts(sae, lm, index, [812])``: change the tokens of prompts until a feature fires: maximise z − λ·CE.

    z is the feature's largest activation over the prompt's kept tokens, CE the model's cross-entropy of the prompt in
    nats/token. Each generation makes ``children`` prompts from the ``population`` best and keeps the best: one to three
    tokens are replaced by tokens of the vocabulary or of the feature's top contexts, in one prompt of four after a
    crossing with another parent. As CE ≥ 0, the CE of a prompt is measured only if its z is above the worst survivor's
    score. Control: random search over equally many prompts, made from the start by replacing a random number of tokens.

    Thompson et al. 2024 (arXiv:2402.01702) choose mutations by the gradient and give each member its λ; here mutations
    are random, and λ is one number.

    Args:
        source: an index of this coder, or text: of the corpus maximum, the start and some of the mutations.
        start: "top", the tokens up to the peak of the feature's top context; "random", tokens of the vocabulary.
        length: tokens of a prompt, without the prefix.
        ce_weight: λ, in units of z per nat; None: 2 % of the feature's corpus maximum.

    Raises ValueError for settings out of range, and for features that never fire in the source.
    """
    check_coder(sae, lm)
    features = check_features(sae, features)
    check_least(1, generations=generations, children=children, population=population)
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    if not 2 <= length < lm.max_length:
        raise ValueError(f"length must lie between 2 and the {lm.max_length - 1} tokens this model reads, got {length}")
    if ce_weight is not None and not (math.isfinite(ce_weight) and ce_weight >= 0):
        raise ValueError(f"ce_weight must be finite and at least 0, or None (2 % of the maximum), got {ce_weight}")
    corpus = top_examples(sae, lm, features, source)
    if silent := [f for f in features if not corpus[f]]:
        raise ValueError(f"feature {silent[0]} never fires in the source: choose live features, or a longer source")
    rows, evaluations = [], generations * children
    for feature in features:
        examples = corpus[feature]
        rng = np.random.default_rng([seed, *examples[0].ids])  # the same for any feature number
        weight = FLUENCY * examples[0].value if ce_weight is None else float(ce_weight)
        pool = np.array(sorted({i for example in examples for i in example.ids} - set(lm.mask().special_ids)))
        search = _Search(sae, lm, feature, weight, pool, rng)
        first = _first_prompt(examples[0], length, start, search)
        best, origin = search.evolve(first, generations, children, population)
        chance = search.at_random(first, evaluations, start == "random")
        prompt = lm.tokenizer.decode(list(best.ids))
        rows.append({
            "prompts": prompt, "ids": best.ids, "activation": best.z, "ce": search.ce(best), "ce_weight": weight,
            "start_ce": search.ce(origin), "corpus_max": examples[0].value, "random_activation": chance.z,
            "random_ce": search.ce(chance),
            "activation_of_text": float(strongest_activations(sae, lm, feature, [prompt])[0]),
        })  # fmt: skip
    columns: dict[str, Any] = {name: tuple(row[name] for row in rows) for name in rows[0]}
    return EvolvedPrompts(features=tuple(features), start=start, length=length, evaluations=evaluations, **columns)


class Candidate(NamedTuple):
    """A prompt of a search. ce is NaN if it was not measured."""

    ids: tuple[int, ...]
    z: float
    ce: float
    score: float


class _Search:
    """The search for one feature: the score of a prompt, and prompts made from others."""

    def __init__(self, sae: SparseCoder, lm: LM, feature: int, weight: float, pool: np.ndarray, rng: Any):
        self.sae, self.lm, self.feature, self.weight, self.pool, self.rng = sae, lm, feature, weight, pool, rng
        self.prefix = [] if lm.prefix_id is None else [lm.prefix_id]
        special = set(lm.mask().special_ids)
        self.vocabulary = np.array([i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if i not in special])

    def evolve(
        self, first: tuple[int, ...], generations: int, children: int, population: int
    ) -> tuple[Candidate, Candidate]:
        """(the best prompt, the one it began from)."""
        [origin] = self.survivors([], [first], 1)
        alive, seen = [origin], {first}
        for _ in range(generations):
            new: list[tuple[int, ...]] = []
            while len(new) < children:
                child = self.child([c.ids for c in alive])
                if child not in seen:
                    seen.add(child)
                    new.append(child)
            alive = self.survivors(alive, new, population)
        return alive[0], origin

    def at_random(self, first: tuple[int, ...], evaluations: int, afresh: bool) -> Candidate:
        """The best of ``evaluations`` prompts made from the first by replacing tokens."""
        n, share = len(first), 0.0 if afresh else 0.5
        counts = (n if afresh else int(self.rng.integers(1, n + 1)) for _ in range(evaluations))
        return self.survivors([], [self.replaced(list(first), count, share) for count in counts], 1)[0]

    def child(self, parents: list[tuple[int, ...]]) -> tuple[int, ...]:
        ids = list(parents[self.rng.integers(len(parents))])
        if len(parents) > 1 and self.rng.random() < 0.25:
            other, cut = parents[self.rng.integers(len(parents))], int(self.rng.integers(1, len(ids) + 1))
            ids = ids[:cut] + list(other[cut:])
        return self.replaced(ids, int(self.rng.integers(1, min(3, len(ids)) + 1)), 0.5)

    def replaced(self, ids: list[int], count: int, from_pool: float) -> tuple[int, ...]:
        """The prompt with ``count`` tokens replaced, each with probability ``from_pool`` from the top contexts."""
        for place in self.rng.choice(len(ids), count, replace=False):
            ids[place] = int(self.rng.choice(self.pool if self.rng.random() < from_pool else self.vocabulary))
        return tuple(ids)

    def survivors(self, alive: list[Candidate], new: list[tuple[int, ...]], keep: int) -> list[Candidate]:
        """The best of both, the best first. CE is only measured of prompts that could still be among them."""
        values = strongest_activations(self.sae, self.lm, self.feature, [[*self.prefix, *ids] for ids in new]).tolist()
        ordered = sorted(zip(values, new, strict=True), key=lambda pair: -pair[0])
        for start in range(0, len(ordered), LOSS_PROMPTS):
            bar = alive[keep - 1].score if len(alive) >= keep else -math.inf
            could = [(z, ids) for z, ids in ordered[start : start + LOSS_PROMPTS] if z > bar]
            if not could:
                break
            costs = self.losses([ids for _, ids in could]) if self.weight else [math.nan] * len(could)
            alive = alive + [
                Candidate(ids, z, ce, z - self.weight * ce if self.weight else z)
                for (z, ids), ce in zip(could, costs, strict=True)
            ]
            alive = sorted(alive, key=lambda c: -c.score)[:keep]
        return alive

    def losses(self, prompts: list[tuple[int, ...]]) -> list[float]:
        batch = self.lm.tokenize([[*self.prefix, *ids] for ids in prompts])
        form = Float[Tensor, " ".join(map(str, batch.ids.shape))]
        return self.lm.run(batch, logits=token_losses, form=form)[1].nanmean(1).tolist()

    def ce(self, candidate: Candidate) -> float:
        return self.losses([candidate.ids])[0] if math.isnan(candidate.ce) else candidate.ce


def _first_prompt(top: Example, length: int, start: str, search: _Search) -> tuple[int, ...]:
    """The top context's tokens up to the peak (or the first ``length``, if the peak is among them), or random ones."""
    end = max(top.peak + 1, length)
    known = top.ids[max(0, end - length) : end] if start == "top" else []
    missing = search.rng.choice(search.vocabulary, length - len(known)).tolist()  # of a very short context
    return (*known, *missing)
