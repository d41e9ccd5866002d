"""Absorption: a general feature is silent where a more specific one fires, which has absorbed the general direction."""

import math
import re
from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from sae_lab.activations.reading import require_fits
from sae_lab.arguments import as_annotated, check_least
from sae_lab.evals.sampling import require_choice
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import encode_texts, pad
from sae_lab.results import Figure, Result, figure, result
from sae_lab.saes import kernels
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import f1, mean_and_error, with_error

Convention = Literal["sae_lab", "saebench"]
LEAST_F1 = {"sae_lab": 0.8, "saebench": 0.6}  # of a letter's probe: below, x hardly predicts the letter
LEAST_WORDS = 60  # of a letter
COSINE = 0.025  # with the probe, of a feature that absorbs
SHARE = 0.4  # of the word's projection on the probe: at least this from the absorbing feature
WEAK = 0.1  # of that projection: at most this from main features that are "silent or weak"
F1_JUMP = 0.03  # by which another main feature must raise the F1 of the main features before it
MOST_MAIN = 10
PARTIAL_COSINE, PARTIAL_FEATURES = 0.1, 3  # SAEBench's absorption fraction: least cosine, most absorbing features
_PENALTY = 0.1  # C of the probes: the value of .01, .1 and 1 with the best F1 on the bundled model
SHUFFLED = "shuffled letters"
_BATCH = 512


class Case(NamedTuple):
    """An absorbed word: the feature that fires in place of the main ones, and its share of the projection."""

    letter: str
    word: str
    feature: int
    share: float


class Letter(NamedTuple):
    """One letter. probe_f1, k1_f1, main_f1: of the model's probe, of the best single feature and of the main features,
    on test words. words: test words that the probe gets right. silent: share of these with silent main features.
    rate, fraction: NaN where probe_f1 is too low. control: the rate by probes of shuffled letters."""

    letter: str
    probe_f1: float
    k1_f1: float
    main_f1: float
    main: tuple[int, ...]
    words: int
    silent: float
    rate: float
    fraction: float
    control: float


@result
class Absorption(Result):
    """Result of ``sl.evals.absorption``. rate: share of words absorbed, the mean over letters; fraction: SAEBench's
    absorption fraction; ``letters``: of each; ``cases``: the absorbed words. Means of F1 are over all letters."""

    rate: float = figure("absorption", "share of words", control="rate_control", control_name=SHUFFLED, best="low")
    rate_se: float
    rate_control: float
    silent: float = figure("silent", "share of words in which the main features are")
    fraction: float = figure("absorption fraction", "of the projection", best="low")
    fraction_se: float
    probe_f1: float = figure("probe F1", "of the model's activations", control="probe_f1_shuffled",
                             control_name=SHUFFLED)  # fmt: skip
    probe_f1_shuffled: float
    k1_f1: float = figure("k=1 F1", "of the best feature", control="k1_f1_shuffled", control_name=SHUFFLED,
                          best="high")  # fmt: skip
    k1_f1_shuffled: float
    main_features: float = figure("main features", "a letter", digits=2)
    defined: int = figure("letters", "of {letters!n} letters: their probe's F1 is at least {_least}", digits=0)
    words: int
    left_out: int
    convention: str
    mask: str
    seed: int
    letters: tuple[Letter, ...] = field(repr=False)
    cases: tuple[Case, ...] = field(repr=False)

    def figures(self) -> list[Figure]:
        return [one for one in super().figures() if self.convention == "saebench" or one.key != "fraction"]

    _records = "letters"
    _below = (
        "{words:,} words, a fifth in test; ± over letters; convention {convention}; seed {seed}; "
        "{left_out} words {mask}"
    )

    @property
    def _least(self) -> float:
        return LEAST_F1[self.convention]


@as_annotated
def absorption(
    sae: SparseCoder,
    lm: LM,
    *,
    words: int = 8_000,
    before: str = "",
    seed: int = 0,
    convention: str = "sae_lab",
) -> Absorption:
    """``sl.evals.absorption(sae, lm)``: share of words where another feature replaces the first letter's features.

    Words are single tokens (a space and small letters), about equally many per letter, split 60/20/20. Per letter: p,
    the unit direction of a logistic probe of x at the word's token; the main features, the first k by (mean of the
    letter − mean of others)/deviation on train, where k grows as long as the F1 of a probe of them rises by .03 on
    validation. Of the test words that the probe gets right, a word is absorbed if the main features bring at most .1 of
    its projection P = (x − x̄)·p, and another feature with a cosine of .025 or more with p brings at least .4 of it. A
    feature brings (f − f̄)·W_dec·p: f are ``SparseCoder.strengths``, W_dec unit rows, x̄ and f̄ means over the other
    letters' training words. NaN for a letter whose probe's F1 is below .8. Control: the same words and silences, but p
    of probes trained on shuffled letters.

    After Chanin et al. 2024 (arXiv:2409.14507), whose prompt is "{word} has the first letter:" after examples: what
    follows the word cannot change its activation and is not read; ``before`` is the text in front of it. They ask which
    feature matters most for the model's answer; this measure asks which one brings a large share of the projection.

    ``convention="saebench"`` (Karvonen et al. 2025, arXiv:2503.09532): P = x·p, a feature brings f·cosine; the main
    features must be silent, and the largest of all must be the one that absorbs; letters from F1 .6; ``fraction`` is
    their absorption fraction. Main features are found as above; SAEBench finds them by an L1 probe.

    Raises ValueError for a coder of another model, a transcoder, or a tokenizer with too few such words.
    """
    require_choice("convention", convention, Convention)
    check_least(2 * LEAST_WORDS, words=words)
    if sae.transcodes:
        raise ValueError("absorption needs a coder that reconstructs what it reads, got a transcoder")
    require_fits(sae, lm)
    ids, names = _words(lm, words, seed)
    x, f, kept = _read(sae, lm, ids, before)
    names = [name for name, k in zip(names, kept, strict=True) if k]
    letters = np.array([name[0] for name in names])
    draw = np.random.default_rng([seed, 1])
    part = np.empty(len(names), np.int64)  # 0 train, 1 validation, 2 test
    for letter in np.unique(letters):
        own = draw.permutation(np.flatnonzero(letters == letter))
        part[own] = np.digitize(np.arange(len(own)), [0.6 * len(own), 0.8 * len(own)])
    shuffled = letters.copy()
    for n in range(3):  # the same letters in every part
        shuffled[part == n] = draw.permutation(letters[part == n])
    W_dec = sae.directions().cpu().numpy()
    found: list[Letter] = []
    cases: list[Case] = []
    chance = []
    for letter in np.unique(letters).tolist():
        direction, probe_f1, says = _probe(x, letters == letter, part)
        false_direction, false_f1, _ = _probe(x, shuffled == letter, part)
        main, k1, main_f1 = _main(f, letters == letter, part)
        chance.append((false_f1, _main(f, shuffled == letter, part, most=1)[1]))
        right = np.flatnonzero((part == 2) & (letters == letter) & says)
        others = np.flatnonzero((part == 0) & (letters != letter))
        knows = probe_f1 >= LEAST_F1[convention] and len(right)
        here = (f[right].toarray(), x[right], W_dec)
        base = (np.asarray(f[others].mean(0)).ravel(), x[others].mean(0))
        judged = judge(*here, direction, main, *base, convention)
        control = judge(*here, false_direction, main, *base, convention, judged.silent)
        rates = [float(r.mean()) for r in (judged.silent, judged.absorbed, judged.fraction, control.absorbed) if knows]
        found.append(Letter(letter, probe_f1, k1, main_f1, tuple(main), len(right), *(rates or [math.nan] * 4)))
        cases += [
            Case(letter, names[right[i]], int(judged.feature[i]), float(judged.share[i]))
            for i in np.flatnonzero(judged.absorbed)
            if knows
        ]
    known = [one for one in found if not math.isnan(one.rate)]
    of_letters = {name: [getattr(one, name) for one in known] for name in ("rate", "fraction", "control", "silent")}
    probe_shuffled, k1_shuffled = np.mean(chance, axis=0).tolist()
    return Absorption(
        **with_error(rate=of_letters["rate"], fraction=of_letters["fraction"]),
        rate_control=mean_and_error(of_letters["control"])[0],
        silent=mean_and_error(of_letters["silent"])[0],
        probe_f1=float(np.mean([one.probe_f1 for one in found])),
        probe_f1_shuffled=probe_shuffled,
        k1_f1=float(np.mean([one.k1_f1 for one in found])),
        k1_f1_shuffled=k1_shuffled,
        main_features=mean_and_error([len(one.main) for one in known])[0],
        defined=len(known),
        words=len(names),
        left_out=int((~kept).sum()),
        convention=convention,
        mask=str(sae.mask or lm.mask()),
        seed=seed,
        letters=tuple(found),
        cases=tuple(cases),
    )


class Judged(NamedTuple):
    """For each word: whether its main features are silent, whether it is absorbed, the strongest feature besides the
    main ones, that feature's share of the projection, and the absorption fraction."""

    silent: np.ndarray
    absorbed: np.ndarray
    feature: np.ndarray
    share: np.ndarray
    fraction: np.ndarray


def judge(
    f: np.ndarray, x: np.ndarray, W_dec: np.ndarray, p: np.ndarray, main: Sequence[int], f_base: np.ndarray,
    x_base: np.ndarray, convention: str = "sae_lab", silent: np.ndarray | None = None,
) -> Judged:  # fmt: skip
    """The criteria of ``absorption`` for strengths ``words d_sae`` and activations ``words d`` of words of one letter.

    p: the unit direction of the letter's probe. f_base, x_base: means over words of other letters. silent: if known."""
    main = list(main)
    cosine = W_dec @ p / np.linalg.norm(W_dec, axis=1).clip(1e-8)
    if convention == "saebench":
        brings, projection = f * cosine, x @ p
        quiet = np.all(f[:, main] <= 0, axis=1) if silent is None else silent
        feature = brings.argmax(1)
    else:
        brings, projection = (f - f_base) * (W_dec @ p), (x - x_base) @ p
        quiet = brings[:, main].sum(1) <= WEAK * projection if silent is None else silent
        candidates = np.where(cosine >= COSINE, brings, -np.inf)
        candidates[:, main] = -np.inf
        feature = candidates.argmax(1)
    share = brings[np.arange(len(f)), feature] / np.where(projection > 0, projection, np.inf)
    absorbed = quiet & (projection > 0) & (share >= SHARE) & (cosine[feature] >= COSINE)
    return Judged(quiet, absorbed, feature, share, _fraction(f, x, p, cosine, main))


def _fraction(f: np.ndarray, x: np.ndarray, p: np.ndarray, cosine: np.ndarray, main: list[int]) -> np.ndarray:
    """SAEBench's absorption fraction a/(a + m): m is what the main features bring, a what the three strongest others do
    of the rest of the projection; 1 if m is not positive; 0 if the three bring less than .4 of the projection."""
    brings, projection = f * cosine, x @ p
    own = brings[:, main].sum(1)
    others = np.where(cosine >= PARTIAL_COSINE, brings, 0.0).clip(0)
    others[:, main] = 0
    taken = np.sort(others, axis=1)[:, -PARTIAL_FEATURES:].sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        enough = (own < projection) & (taken / projection >= SHARE)
        absorbed = np.minimum(taken, projection - own)
        part = np.where(own <= 0, 1.0, absorbed / (absorbed + own))
    return np.where(enough, part, 0.0).clip(0, 1)


def _words(lm: LM, words: int, seed: int) -> tuple[list[int], list[str]]:
    """(ids, words), sorted by letter: tokens of a space and at least three small letters."""
    vocab = min(lm.vocab_size, len(lm.tokenizer))
    raw = lm.tokenizer.convert_ids_to_tokens(list(range(vocab)))
    by_letter: dict[str, list[tuple[int, str]]] = {}
    for number, token in enumerate(raw):  # a space is Ġ in byte-level vocabularies, ▁ in SentencePiece's
        if token and (match := re.fullmatch(r"[Ġ▁]([a-z]{3,})", token)):
            by_letter.setdefault(match[1][0], []).append((number, match[1]))
    by_letter = {letter: found for letter, found in sorted(by_letter.items()) if len(found) >= LEAST_WORDS}
    if len(by_letter) < 2:
        raise ValueError(
            f"absorption needs {LEAST_WORDS} words that are single tokens (a space and small letters) for each of two "
            f"letters; this tokenizer has that many for {len(by_letter)}: take a model whose vocabulary has whole words"
        )
    each, left = {}, words
    for place, letter in enumerate(sorted(by_letter, key=lambda one: len(by_letter[one]))):
        each[letter] = min(len(by_letter[letter]), max(LEAST_WORDS, left // (len(by_letter) - place)))
        left -= each[letter]
    draw = np.random.default_rng(seed)
    chosen = [found[i] for letter, found in by_letter.items() for i in draw.permutation(len(found))[: each[letter]]]
    ids, names = map(list, zip(*chosen, strict=True))
    return ids, names


@torch.no_grad()
def _read(sae: SparseCoder, lm: LM, ids: list[int], before: str) -> tuple[np.ndarray, Any, np.ndarray]:
    """(x "words d", strengths "words d_sae", sparse, of words that the mask keeps; which those are)."""
    from tqdm.auto import tqdm

    site, mask = sae.site, sae.mask or lm.mask()
    start = [] if lm.prefix_id is None else [lm.prefix_id]
    start += encode_texts(lm.tokenizer, [before])[0] if before else []
    xs, keeps = [], []
    for first in tqdm(range(0, len(ids), _BATCH), "words", unit="batch", dynamic_ncols=True):
        batch = pad([[*start, i] for i in ids[first : first + _BATCH]])
        x = lm.run(batch, [site], logits=False)[0][site][:, -1].cpu()
        keeps.append(mask.keep(batch.ids[:, -1], batch.positions[:, -1], {site: x}))
        xs.append(x[keeps[-1]].float())
    codes = kernels.feature_rows(sae.codes_of(xs, strengths=True)).T.tocsr()
    kept = torch.cat(keeps).numpy()
    if kept.sum() < LEAST_WORDS:
        raise ValueError(
            f"the mask keeps {kept.sum()} of {len(ids)} words ({mask}): give them something to stand after, e.g. "
            "before='The word:'"
        )
    return torch.cat(xs).numpy(), codes, kept


def _probe(x: np.ndarray, y: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """A logistic probe of x: (its unit direction in x, its F1 on test, its prediction for every word)."""
    from sklearn.linear_model import LogisticRegression

    train = part == 0
    mean, deviation = x[train].mean(0), x[train].std(0)
    z = (x - mean) / np.where(deviation > 0, deviation, 1)
    model = LogisticRegression(C=_PENALTY, class_weight="balanced", max_iter=500).fit(z[train], y[train])
    direction = model.coef_[0] / np.where(deviation > 0, deviation, 1)
    says = model.predict(z)
    return direction / np.linalg.norm(direction).clip(1e-8), _f1(y[part == 2], says[part == 2]), says


def _main(f: Any, y: np.ndarray, part: np.ndarray, most: int = MOST_MAIN) -> tuple[list[int], float, float]:
    """(the main features, F1 on test of the first one, F1 on test of all)."""
    from sklearn.linear_model import LogisticRegression

    train = part == 0
    own, others = (np.asarray(f[train & which].mean(0)).ravel() for which in (y, ~y))
    mean = np.asarray(f[train].mean(0)).ravel()
    square = np.asarray(f[train].multiply(f[train]).mean(0)).ravel()
    deviation = np.sqrt((square - mean**2).clip(0))
    score = np.divide(own - others, deviation, out=np.zeros_like(mean), where=deviation > 1e-6 * (1e-6 + mean))
    order = np.argsort(-score, kind="stable")[: min(most, int((score > 0).sum()))]
    main, before, scores = [], -math.inf, []
    for k in range(1, len(order) + 1):
        inputs = f[:, order[:k]].toarray() / deviation[order[:k]]
        says = LogisticRegression(class_weight="balanced", max_iter=500).fit(inputs[train], y[train]).predict(inputs)
        now = _f1(y[part == 1], says[part == 1])
        if now <= before + F1_JUMP:
            break
        main, before = order[:k].tolist(), now
        scores.append(_f1(y[part == 2], says[part == 2]))
    return (main, scores[0], scores[-1]) if scores else ([], 0.0, 0.0)


def _f1(y: np.ndarray, says: np.ndarray) -> float:
    return float(f1((y & says).sum(), says.sum(), y.sum()))
