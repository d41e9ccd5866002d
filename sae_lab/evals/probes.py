"""k-sparse probing: how well a few features tell two kinds of text apart, compared with probes without a coder."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lab.activations.reading import require_fits
from sae_lab.arguments import as_annotated, check_least
from sae_lab.evals.probe_sets import ProbeData, ReadSet, as_probe_sets, read_sets
from sae_lab.evals.sampling import require_choice
from sae_lab.lm.model import LM
from sae_lab.results import Figure, Result, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import mean_and_error
from sae_lab.types import Site, TokenMask

Pooling = Literal["mean", "max", "last"]
Convention = Literal["sae_lab", "saebench"]
PENALTIES = (0.001, 0.01, 0.1, 1.0)  # C of the logistic regressions tried: the inverse of the L2 penalty
SHARES = (0.6, 0.2)  # of the texts, for train and for validation; the rest is test
PCA_COMPONENTS = 64  # from which the control chooses
BASES = ("features", "neurons", "pca")
CHOSEN, ALL = "chosen", "all"
_ROWS = 2048  # encoded at a time


class ProbeScore(NamedTuple):
    """One probe on one dataset's test texts. setting: k, "chosen" (k chosen on validation) or "all" (dense). inputs:
    their number. penalty: the C chosen. shuffled_...: mean over shuffled labels, everything else the same."""

    dataset: str
    probe: str
    setting: str
    inputs: int
    accuracy: float
    auroc: float
    shuffled_accuracy: float
    shuffled_auroc: float
    penalty: float


@result
class Probing(Result):
    """Result of ``sl.evals.probing``. ``.to_pandas()``: every dataset and probe; ``.mean(...)``, ``.gain(...)``: over
    datasets."""

    datasets: tuple[str, ...]
    k: tuple[int, ...]
    convention: str
    pooling: str
    texts: tuple[int, ...]
    test_texts: tuple[int, ...]
    shuffles: int
    excluded: float
    mask: str
    seed: int
    scores: tuple[ProbeScore, ...] = field(repr=False)

    def values(self, probe: str, setting: int | str, what: str = "accuracy") -> np.ndarray:
        """A measure by dataset. probe: "features", "neurons", "pca" or "dense"."""
        found = [getattr(s, what) for s in self.scores if (s.probe, s.setting) == (probe, str(setting))]
        if not found:
            raise ValueError(f"no probe {probe!r} with setting {str(setting)!r}; there are {sorted(self._settings)}")
        return np.array(found)

    def mean(self, probe: str, setting: int | str, what: str = "accuracy") -> tuple[float, float]:
        """(mean over datasets, its standard error over datasets: NaN for a single one)."""
        return mean_and_error(self.values(probe, setting, what))

    def gain(self, other: str, setting: int | str, what: str = "accuracy") -> tuple[float, float]:
        """(mean of features minus another probe, standard error): paired by dataset. "dense" has one setting only."""
        others = self.values(other, ALL if other == "dense" else setting, what)
        return mean_and_error(self.values("features", setting, what) - others)

    @property
    def best(self) -> int | str:
        """The setting at which probes are compared: "chosen" (k chosen on validation), else the largest k."""
        return max(self.k) if self.convention == "saebench" else CHOSEN

    @property
    def _settings(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((s.probe, s.setting) for s in self.scores))

    def figures(self) -> list[Figure]:
        out = []
        for probe, setting in self._settings:
            label, best = "dense" if probe == "dense" else f"{probe}, k {setting}", "high" * (probe == "features")
            for what, name in (("accuracy", "accuracy"), ("auroc", "AUROC")):
                chance = self.mean(probe, setting, f"shuffled_{what}")[0]
                out.append(Figure(
                    f"{label}: {name}", *self.mean(probe, setting, what), chance, "shuffled labels",
                    f"{name} on test texts, mean over datasets", best, key=f"{what} {probe} {setting}",
                ))  # fmt: skip
        for other in ("dense", "neurons", "pca"):
            meaning = f"accuracy, k {self.best}, paired by dataset"
            gain = self.gain(other, self.best)
            out.append(Figure(f"features less {other}", *gain, meaning=meaning, best="high", key=f"less {other}"))
        chance, meaning = self.mean("features", self.best, "shuffled_accuracy"), f"accuracy of features, k {self.best}"
        return [*out, Figure("shuffled labels", *chance, 0.5, "chance", meaning, key="shuffled")]

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("", "k", "accuracy", "AUROC", "shuffled labels", "features less this")]
        for probe, setting in self._settings:
            means = [self.mean(probe, setting, what) for what in ("accuracy", "auroc", "shuffled_accuracy")]
            means += [] if probe == "features" else [self.gain(probe, self.best if probe == "dense" else setting)]
            texts = [Figure("", *mean).text for mean in means]
            rows.append((probe, setting, *texts, *[""] * (4 - len(texts))))
        return rows

    _records = "scores"
    _below = (
        "{datasets!n} datasets of {_texts} in test), pooled by {pooling}; ± over datasets; {shuffles} shuffles; "
        "{convention}, seed {seed}; {excluded:.1%} of tokens {mask}"
    )

    @property
    def _texts(self) -> str:
        return f"{min(self.texts)} to {max(self.texts)} texts ({sum(self.test_texts)}"


@as_annotated
def probing(
    sae: SparseCoder,
    lm: LM,
    data: Any = None,
    k: Sequence[int] = (1, 5, 20),
    *,
    pooling: str = "mean",
    examples: int = 400,
    tokens: int = 64,
    shuffles: int = 5,
    seed: int = 0,
    convention: str = "sae_lab",
) -> Probing:
    """``sl.evals.probing(sae, lm)``: probes of k features on labelled texts, and of the activations without a coder.

    A text's code is the mean, the maximum or the last of its tokens' codes (``pooling``; tokens that the mask leaves
    out do not count), in ``SparseCoder.strengths``. Features are ranked on the training texts by |mean₁ −
    mean₀|/deviation; a logistic regression reads the first k, standardised on train, with the L2 penalty of least log
    loss on validation; accuracy and AUROC are of test texts ("chosen": k is also chosen on validation). Split 60/20/20,
    both classes equal: chance is .5.

    Controls, chosen and fitted the same way: k coordinates of x (``neurons``); k of the first 64 principal components
    of the training texts' x (``pca``); all of x (``dense``); and all of these with shuffled labels, which must give .5.
    x is pooled as the codes are. In Kantamneni et al. 2025 (arXiv:2502.16681) features do not beat dense probes.

    After Gurnee et al. 2023 (arXiv:2305.01610). ``convention="saebench"``: what SAEBench does (Karvonen et al. 2025,
    arXiv:2503.09532): ranked by |mean₁ − mean₀| alone, C = 1, inputs not standardised, trained on train and validation
    together, mean pooling; SAEBench takes k of 1, 2 and 5, 4,000 training texts and contexts of 128.

    Args:
        data: names of probe sets (None: ``DEFAULT_SETS``, eight kinds), a pair (texts, labels), a dict of such pairs by
            name, or the result of ``read_probe_sets`` (``examples`` and ``tokens`` are then its own).
        k: how many features. shuffles: how often labels are shuffled; 0 leaves that control out (NaN).

    Raises ValueError for a k above d_sae or above the number of training texts, labels of one class, and activations of
    another model or site.
    """
    require_choice("pooling", pooling, Pooling)
    require_choice("convention", convention, Convention)
    if convention == "saebench" and pooling != "mean":
        raise ValueError(f"SAEBench pools by the mean: pass pooling='mean' or convention='sae_lab', got {pooling!r}")
    if wrong := [one for one in k if not 1 <= one <= sae.d_sae]:
        raise ValueError(f"k must be integers from 1 to d_sae={sae.d_sae}, got {wrong[0]!r}")
    if not k:
        raise ValueError("k must name at least one number of features, got none: e.g. k=(1, 5, 20)")
    k = tuple(sorted(set(k)))
    check_least(0, shuffles=shuffles)
    require_fits(sae, lm, writes=False)
    site, mask = sae.site, sae.mask or lm.mask()
    if isinstance(data, ProbeData):
        if data.site != site or data.model != lm.id:
            raise ValueError(
                f"these texts were read at {data.site} of {data.model}, the coder reads {site} of {lm.id}: read them "
                "again with read_probe_sets(lm, sae.site)"
            )
        read: Any = data.sets
    else:
        read = read_sets(lm, site, as_probe_sets(data), examples, tokens, seed)
    scores, names, texts, tested, real, kept = [], [], [], [], 0, 0
    for one in read:
        x, codes, labels, keep = pooled(sae, one, site, mask, pooling)
        if not keep.any():
            raise ValueError(f"{one.name}: the mask leaves out every token ({mask}): give longer texts")
        # Each dataset has a split and shuffles of its own: shared ones would correlate errors, and make ± too small.
        key = [seed, *one.name.encode()]
        train, validation, test = map(len, split(labels, key))
        if not min(train, validation, test):
            got = len(labels)
            raise ValueError(f"{one.name}: to train, choose and test takes at least 8 texts, got {got}: pass more")
        if max(k) > train:
            raise ValueError(
                f"{one.name}: k must be at most its {train} training texts, got {max(k)}: lower k or raise examples"
            )
        true = pipeline(x, codes, labels, k, convention, key)
        draw = np.random.default_rng([*key, 1])
        chance = [
            pipeline(x, codes, draw.permutation(labels), k, convention, [*key, 2 + shuffle])
            for shuffle in range(shuffles)
        ]
        for probe, found in true.items():
            own = (found.inputs, found.accuracy, found.auroc)
            by_chance = (mean_and_error([getattr(c[probe], of) for c in chance])[0] for of in ("accuracy", "auroc"))
            accuracy, auroc = by_chance
            scores.append(ProbeScore(one.name, *probe, *own, accuracy, auroc, found.penalty))
        names.append(one.name)
        texts.append(len(labels))
        tested.append(test)
        real, kept = real + len(keep), kept + int(keep.sum())
    return Probing(
        datasets=tuple(names),
        k=k,
        convention=convention,
        pooling=pooling,
        texts=tuple(texts),
        test_texts=tuple(tested),
        shuffles=shuffles,
        excluded=1 - kept / real,
        mask=str(mask),
        seed=seed,
        scores=tuple(scores),
    )


@torch.no_grad()
def pooled(
    sae: SparseCoder, one: ReadSet, site: Site, mask: TokenMask, pooling: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
    """(x "texts d", codes "texts live" of the features that fire at all, labels, which tokens count); texts without a
    token that counts are left out."""
    keep = mask.keep(one.ids, one.positions, {site: one.x})
    text = torch.repeat_interleave(torch.arange(len(one.labels)), one.offsets.diff())
    text, x = text[keep], one.x[keep]
    counts = torch.bincount(text, minlength=len(one.labels))
    if pooling == "last":
        last = counts[counts > 0].cumsum(0) - 1
        text, x = text[last], x[last]
        counts = (counts > 0).long()
    index = text[:, None].expand(-1, x.shape[1])
    reduce, at_once = ("amax", np.maximum) if pooling == "max" else ("mean", np.add)
    rows = torch.zeros(len(counts), x.shape[1]).scatter_reduce(0, index, x.float(), reduce, include_self=False)
    found = sae.codes_of((rows.float() for rows in x.split(_ROWS)), strengths=True)
    names, where = np.unique(found.features.numpy(), return_inverse=True)
    codes = np.zeros((len(counts), len(names)))
    at_once.at(codes, (text[found.rows].numpy(), where), found.values.double().numpy())
    if pooling != "max":
        codes /= counts.clamp_min(1)[:, None].numpy()
    has = (counts > 0).numpy()
    return rows.numpy()[has], codes[has], one.labels[has], keep


class Fit(NamedTuple):
    """One probe's test scores, its C, its validation loss (by which C and k are chosen), and its number of inputs.
    weights: of the inputs as they are, not standardised."""

    accuracy: float
    auroc: float
    penalty: float
    loss: float
    inputs: int
    weights: np.ndarray


def pipeline(
    x: np.ndarray, codes: np.ndarray, labels: np.ndarray, k: Sequence[int], convention: str, seed: Sequence[int]
) -> dict[tuple[str, str], Fit]:
    """Every probe of one dataset, by (probe, setting): split, selection, choice and test."""
    parts = split(labels, seed)
    ours = convention == "sae_lab"
    if not ours:
        parts = (np.concatenate(parts[:2]), parts[1], parts[2])
    train = parts[0]
    out: dict[tuple[str, str], Fit] = {}
    centred = x - x[train].mean(0)
    directions = np.linalg.svd(centred[train], full_matrices=False)[2]  # principal components of the training texts
    for name, basis in zip(BASES, (codes, x, centred @ directions[:PCA_COMPONENTS].T), strict=True):
        order = ranked(basis[train], labels[train], scaled=ours)
        fits = {str(n): fit_logistic(basis[:, order[:n]], labels, parts, ours) for n in k}
        out |= {(name, setting): fit for setting, fit in fits.items()}
        if ours:
            out[name, CHOSEN] = min(fits.values(), key=lambda fit: (fit.loss, fit.inputs))
    out["dense", ALL] = fit_logistic(x, labels, parts, ours)
    return out


def split(labels: np.ndarray, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train, validation and test texts, half of either class in each (the surplus of one class is left out)."""
    draw = np.random.default_rng([*seed, 0])
    classes = [draw.permutation(np.flatnonzero(labels == label)) for label in (False, True)]
    each = min(map(len, classes))
    first, second = round(SHARES[0] * each), round((SHARES[0] + SHARES[1]) * each)
    cuts = (slice(0, first), slice(first, second), slice(second, each))
    train, validation, test = (np.concatenate([c[cut] for c in classes]) for cut in cuts)
    return train, validation, test


def ranked(inputs: np.ndarray, labels: np.ndarray, scaled: bool = True) -> np.ndarray:
    """Columns in descending order of |mean₁ − mean₀|, over the column's deviation if ``scaled``; constant ones last."""
    gap = np.abs(inputs[labels].mean(0) - inputs[~labels].mean(0))
    if scaled:
        deviation = inputs.std(0)
        gap = np.divide(gap, deviation, out=np.zeros_like(gap), where=deviation > 1e-8 * (1 + np.abs(inputs).max(0)))
    return np.argsort(-gap, kind="stable")


def fit_logistic(inputs: np.ndarray, labels: np.ndarray, parts: tuple[np.ndarray, ...], ours: bool) -> Fit:
    """The test scores of the logistic regression of least validation loss."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss, roc_auc_score

    train, validation, test = parts
    if not inputs.shape[1]:  # a coder that never fires
        inputs = np.zeros((len(labels), 1))
    unit: Any = 1.0
    if ours:
        deviation = inputs[train].std(0)
        unit = np.where(deviation > 0, deviation, 1)
        inputs = (inputs - inputs[train].mean(0)) / unit
    fits = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # if one penalty does not converge, others do
        for penalty in PENALTIES if ours else (1.0,):
            model = LogisticRegression(C=penalty, max_iter=1000).fit(inputs[train], labels[train])
            loss = log_loss(labels[validation], model.predict_proba(inputs[validation])[:, 1]) if ours else math.nan
            fits.append((loss, penalty, model))
    loss, penalty, model = min(fits, key=lambda fit: fit[0]) if ours else fits[0]
    return Fit(
        accuracy=float((model.predict(inputs[test]) == labels[test]).mean()),
        auroc=float(roc_auc_score(labels[test], model.decision_function(inputs[test]))),
        penalty=penalty,
        loss=float(loss),
        inputs=inputs.shape[1],
        weights=model.coef_[0] / unit,
    )
