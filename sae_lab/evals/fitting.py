"""sl.fit_probe: a linear probe of a model's activations, as a vector that steers."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import numpy as np
import torch

from sae_lab.arguments import as_annotated, check_least
from sae_lab.edits.vector import Vector, text_means
from sae_lab.evals.probe_sets import ProbeSet
from sae_lab.evals.probes import fit_logistic, split
from sae_lab.lm.model import LM
from sae_lab.lm.text import Documents
from sae_lab.results import Result, figure, result
from sae_lab.types import Site


@result
class Probe(Result):
    """Result of ``sl.fit_probe``. ``.vector`` is the probe's direction, towards ``positive``."""

    accuracy: float = figure("accuracy", "on held-out texts, half of either class", control="shuffled_accuracy",
                             control_name="shuffled labels", best="high")  # fmt: skip
    accuracy_se: float
    auroc: float = figure("AUROC", "on held-out texts", control="shuffled_auroc", control_name="shuffled labels",
                          best="high")  # fmt: skip
    shuffled_accuracy: float
    shuffled_auroc: float
    vector: Vector = field(repr=False)
    positive: str
    texts: int
    held_out: int
    penalty: float
    _below = "{vector}, towards {positive!r}; {texts} texts, of which {held_out} are held out; C = {penalty:g}"


@as_annotated
def fit_probe(
    lm: LM, site: Site | str, texts: Sequence[str], labels: Any, *, name: str = "", shuffles: int = 5,
    seed: int = 0, text: Documents | None = None,
) -> Probe:  # fmt: skip
    """``probe = sl.fit_probe(lm, site, texts, labels)``: logistic regression on texts' mean activations;
    ``sl.Push(probe.vector, strength=2.0)`` steers with its direction.

    As the dense probe of ``sl.evals.probing``: 60 % of the texts fit it, 20 % choose its L2 penalty, accuracy and AUROC
    are of the other 20 %, half of either class. A text that stands twice counts once, so none is on both sides. The
    control is the same with shuffled labels. Accurate probes can steer worse than ``sl.Vector.difference``.

    Args:
        labels: one a text, of two classes, the one that sorts last is positive; of more classes, the commonest is.
        name: of the vector; "": the positive class. shuffles: of the labels, at least 1. seed: of split and shuffles.
        text: where the vector's scale is measured, see ``sl.Vector.calibrated``.

    Raises ValueError for fewer than 8 texts of both classes, labels of one class, another number of labels than of
    texts, and a text without a token that counts.
    """
    check_least(1, shuffles=shuffles)
    one = ProbeSet.of("texts", texts, labels)
    one = one.balanced(len(one.texts), seed)
    parts = split(one.labels, [seed])
    if not min(map(len, parts)):
        raise ValueError(f"texts must be at least 8, half of either class, got {len(one.texts)} that differ: give more")
    means, mask = text_means(lm, [Site.of(site)], one.texts)
    x, draw = means.numpy(), np.random.default_rng([seed, 1])
    fit = fit_logistic(x, one.labels, parts, True)
    chance = [fit_logistic(x, draw.permutation(one.labels), parts, True) for _ in range(shuffles)]
    vector = Vector(torch.tensor(fit.weights), site, name or one.positive, mask=mask, model=lm.id)
    error = float(np.sqrt(fit.accuracy * (1 - fit.accuracy) / len(parts[2])))
    return Probe(
        fit.accuracy, error, fit.auroc, float(np.mean([c.accuracy for c in chance])),
        float(np.mean([c.auroc for c in chance])), vector.calibrated(lm, text), one.positive, len(one.texts),
        len(parts[2]), fit.penalty,
    )  # fmt: skip
