"""Circles of words: do features place the days of the week in order around a circle?"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import field
from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import Count, as_annotated
from sae_lab.lm.model import LM
from sae_lab.results import Result, figure, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import mean_and_error, permutation_p, with_error
from sae_lab.types import check_feature

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_EITHER = (
    "See you next {}", "It happened last {}", "I will be there by {}", "The shop is closed every {}",
    "We have not met since {}", "The work went on until {}",
)  # fmt: skip
_OF = {
    WEEKDAYS: (*_EITHER, "The meeting is on {}", "They met on {}", "She was born on a {}", "The train leaves on {}",
               "The game was played on {}", "The report is due on {}"),
    MONTHS: (*_EITHER, "The meeting is in {}", "They met in {}", "She was born in {}", "The snow came in {}",
             "The war began in {}", "The report is due in {}"),
}  # fmt: skip
EXACT = 8  # words up to which all orders are tried
FIRES = 0.5  # share of a word's prompts in which a feature must fire to be one of the words'
ELSEWHERE = 0.1  # share of the prompts' other tokens in which it may fire at most


class Order(NamedTuple):
    """Words around one plane. correlation: 1 for the true order, either way round. adjacent: true neighbours that are
    neighbours. p: share of orders that do as well in the best of all planes. each: the correlation in each template."""

    plane: tuple[int, int]
    correlation: float
    adjacent: int
    p: float
    p_alone: float
    points: np.ndarray
    each: np.ndarray


@result
class Circular(Result):
    """Result of ``sl.geometry.circular``; ``raw_``: the same from activations instead of features.

    Attributes:
        adjacent: how many true neighbours are neighbours around the circle; all of ``words`` is the true order.
        correlation: circular rank correlation, 1 for the true order; ``each``: its mean over single templates.
        p: corrected for the ``planes`` tried; ``p_alone``: without (optimistic: do not report it).
        random_adjacent, random_correlation: means over draws of equally many other features that fire on the words.
        random_share: of the draws that do at least as well.
        features: those the circle was made from; ``points``: ``words 2``, mean of each word; ``angles``: radians.
    """

    words: int
    adjacent: int = figure("neighbours right", "of {words}", control="random_adjacent",
                           control_name="{draws} x other features", best="high", digits=1)  # fmt: skip
    correlation: float = figure("circular correlation", "of ranks around the circle, 1 = true order", best="high",
                                control="random_correlation", control_name="{draws} x other features")  # fmt: skip
    each: float = figure("in one template", "correlation, ± over templates", best="high")
    each_se: float
    p: float = figure("p", "share of orders as good in the best of {planes} planes ({p_alone:.4f} in one)",
                      digits=4, best="low")  # fmt: skip
    p_alone: float
    planes: int
    plane: str
    raw_adjacent: int = figure("raw: neighbours", "the same from activations, p {raw_p:.4f}", digits=1, best="high")
    raw_correlation: float
    raw_p: float
    random_adjacent: float
    random_correlation: float
    random_share: float
    draws: int
    n_features: int
    templates: int
    site: str
    names: tuple[str, ...] = field(repr=False)
    features: tuple[int, ...] = field(repr=False)
    points: Tensor = field(repr=False, compare=False)
    raw_points: Tensor = field(repr=False, compare=False)

    _below = (
        "order {_found}: {adjacent}/{words}, p {p:.4f} (corrected); plane {plane}; {n_features} features at {site}, "
        "{_drawn}; chosen on {templates} templates, measured on {templates} others"
    )

    @property
    def angles(self) -> Float[Tensor, " words"]:
        return torch.atan2(self.points[:, 1], self.points[:, 0])

    @property
    def order(self) -> list[str]:
        """The words as they come around the circle, from the first one on."""
        around = self.angles.argsort().tolist()
        first = around.index(0)
        return [self.names[i] for i in around[first:] + around[:first]]

    @property
    def _found(self) -> str:
        return "recovered" if self.adjacent == self.words else "not recovered"

    @property
    def _drawn(self) -> str:
        return f"{self.random_share:.0%} of draws do as well" if self.draws else "too few other features to draw"


@as_annotated
@torch.no_grad()
def circular(
    coder: SparseCoder,
    lm: LM,
    words: Sequence[str] = WEEKDAYS,
    templates: Sequence[str] | None = None,
    *,
    features: Iterable[int] | None = None,
    components: int = 3,
    draws: Count = 50,
    seed: int = 0,
) -> Circular:
    """``circular(sae, lm)``: whether words with a circular order lie in that order in a plane of what some features
    reconstruct.

    y_tw = Σ_{i∈features} f_i(x_tw) W_dec[i] (times the size that an ``input_norm`` is undone by), x_tw the activation
    at the last token of word w in template t. Principal components of y over even templates; in each plane of two of
    them the angles of the words' means. The plane is chosen on even templates, the order measured on odd ones.
    Correlation = max over both ways round of |mean_w exp(i(r_w ∓ 2πw/n))|, r_w the rank of word w's angle times 2π/n.

    p is taken over all (n−1)! orders of the words (10,000 random ones beyond 8 words), each with the best of all
    planes, since words differ little between templates: a plane that orders them by chance on even templates does so on
    odd ones too. After Engels et al. 2024 (arXiv:2405.14860), who look at clusters of decoder rows one by one: pass a
    cluster as ``features`` for that (p is then not corrected for the number of clusters).

    Args:
        words: in their order. templates: at least four texts with "{}" for the word; the text after it is not read.
            None: ours, for ``WEEKDAYS`` and ``MONTHS``.
        features: None takes those that fire on some word in at least half of the even templates, and on at most a tenth
            of the templates' other tokens.
        components: principal components; c(c−1)/2 planes. More planes make p larger.
        draws: how often equally many other features that fire on the words are drawn, as control.

    Raises ValueError for too few words, templates or components, and if no feature passes.
    """
    words, templates = tuple(words), _templates(tuple(words), templates)
    if not 2 <= components <= len(words) - 1:
        raise ValueError(f"components must be an integer from 2 to {len(words) - 1}, got {components!r}")
    x, codes, elsewhere = _read(coder, lm, words, templates)
    fires = (codes[::2] > 0).double().mean(0)  # word, feature
    if features is None:
        chosen = ((fires >= FIRES).any(0) & (elsewhere <= ELSEWHERE)).nonzero()[:, 0]
    else:
        chosen = torch.tensor(sorted({check_feature(i, coder.d_sae) for i in features}), dtype=torch.long)
    rng = np.random.default_rng(seed)
    W_dec = coder.directions().cpu()
    y = codes[..., chosen] @ W_dec[chosen]
    if len(y[::2].flatten(0, 1).unique(dim=0)) <= components:
        raise ValueError(
            f"{len(chosen)} features tell these words apart in too few ways: try other features, words or templates"
        )
    orders = _orders(len(words), rng)
    own, raw = _order(y, components, orders), _order(x, components, orders)
    others = codes[::2].double().sum((0, 1)) * (fires > 0).any(0)
    others[chosen] = 0.0
    ranked = others.argsort(descending=True)[: int(others.count_nonzero())]  # in any order of features
    drawn = []
    for _ in range(draws if len(ranked) >= len(chosen) else 0):
        other = ranked[torch.from_numpy(rng.permutation(len(ranked))[: len(chosen)])]
        drawn.append(_order(codes[..., other] @ W_dec[other], components, None))
    correlations = [o.correlation for o in drawn]
    return Circular(
        words=len(words), adjacent=own.adjacent, correlation=own.correlation, **with_error(each=own.each), p=own.p,
        p_alone=own.p_alone, planes=components * (components - 1) // 2,
        plane=f"PC{own.plane[0] + 1}, PC{own.plane[1] + 1}", raw_adjacent=raw.adjacent,
        raw_correlation=raw.correlation, raw_p=raw.p, draws=len(drawn), n_features=len(chosen),
        random_adjacent=mean_and_error([o.adjacent for o in drawn])[0],
        random_correlation=mean_and_error(correlations)[0],
        random_share=mean_and_error([c >= own.correlation - 1e-9 for c in correlations])[0], templates=len(own.each),
        site=coder.site.key, names=words, features=tuple(chosen.tolist()),
        points=torch.from_numpy(own.points).float(), raw_points=torch.from_numpy(raw.points).float(),
    )  # fmt: skip


def circular_correlation(angles: Float[np.ndarray, "*sets words"]) -> np.ndarray:
    """max over both ways round of |mean_w exp(i(r_w ∓ 2πw/n))|, r_w = 2π/n · rank of angle w. 1: in order."""
    return _correlation(_on_circle(angles))


def _on_circle(angles: np.ndarray) -> np.ndarray:
    """exp(2πi/n · rank) of each of n angles."""
    return np.exp(2j * math.pi / angles.shape[-1] * angles.argsort(-1).argsort(-1))


def neighbours(angles: Float[np.ndarray, " words"]) -> int:
    """How many of the n pairs (w, w+1), the last and first among them, are next to each other around the circle."""
    ranks = angles.argsort().argsort()
    return int(np.isin((np.roll(ranks, -1) - ranks) % len(ranks), (1, len(ranks) - 1)).sum())


def _correlation(around: np.ndarray) -> np.ndarray:
    n = around.shape[-1]
    true = np.exp(2j * math.pi / n * np.arange(n))
    return np.asarray(np.maximum(np.abs(around @ true), np.abs(around @ true.conj())) / n)


def _templates(words: tuple[str, ...], templates: Sequence[str] | None) -> tuple[str, ...]:
    if len(set(words)) < max(4, len(words)):
        raise ValueError(f"an order around a circle needs at least four different words, got {words}")
    if templates is None:
        if words not in _OF:
            raise ValueError("templates are ours for WEEKDAYS and MONTHS only: give some, like ['See you on {}', ...]")
        return _OF[words]
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"a template has one {{}}, where the word goes, got {wrong[0]!r}")
    if len(templates) < 4:
        raise ValueError(f"templates are split in two halves of at least two: give four or more, got {len(templates)}")
    return tuple(templates)


def _read(
    coder: SparseCoder, lm: LM, words: tuple[str, ...], templates: tuple[str, ...]
) -> tuple[Float[Tensor, "templates words d"], Float[Tensor, "templates words d_sae"], Float[Tensor, " d_sae"]]:
    """(activations at the words, strengths there, share of the even templates' other tokens on which each fires)."""
    site, mask = coder.site, coder.mask or lm.mask()
    xs, codes, fired, count = [], [], torch.zeros(coder.d_sae), 0
    with coder.evaluating():
        for number, template in enumerate(templates):
            batch = lm.tokenize([template.split("{}")[0] + word for word in words])
            x = lm.run(batch, [site], logits=False)[0][site].float().cpu()
            keep = mask.of(batch, {site: x})
            last = batch.mask.sum(1) - 1
            here = torch.arange(len(words)), last
            if not keep[here].all():
                left = words[int(keep[here].int().argmin())]
                raise ValueError(f"the coder's mask leaves out {left!r} in {template!r} ({mask}): try another template")
            xs.append(x[here])
            read = xs[-1].to(coder.W_dec.device)
            codes.append(coder.strengths(coder.encode(read), read).float().cpu())
            keep[here] = False
            if number % 2 == 0:
                other = coder.codes_of(x[keep])
                fired, count = fired + torch.bincount(other.features, minlength=coder.d_sae), count + int(keep.sum())
    return torch.stack(xs), torch.stack(codes), fired / max(count, 1)


def _orders(n: int, rng: np.random.Generator) -> np.ndarray:
    """Orders of n words, the true one first; up to rotation, since a circle has no first word."""
    if n <= EXACT:
        return np.array([(0, *rest) for rest in permutations(range(1, n))])
    drawn = np.stack([rng.permutation(n) for _ in range(10_000)])
    return np.concatenate([np.arange(n)[None], drawn])


def _order(y: Float[Tensor, "templates words d"], components: int, orders: np.ndarray | None) -> Order:
    """The words around the plane that is best on even templates, measured on odd ones."""
    seen = y[::2].flatten(0, 1).double()
    mean = seen.mean(0)
    basis = torch.linalg.svd(seen - mean, full_matrices=False).Vh[:components].T
    placed = ((y.double() - mean) @ basis).numpy()
    planes = list(combinations(range(components), 2))
    chosen = int(np.argmax([circular_correlation(_angles(placed[::2].mean(0)[:, plane])) for plane in planes]))
    around = np.stack([_angles(placed[1::2].mean(0)[:, plane]) for plane in planes])
    found = circular_correlation(around)
    p = p_alone = math.nan
    if orders is not None:
        scores = np.stack([_correlation(plane[orders[1:]]) for plane in _on_circle(around)])  # plane, wrong order
        p, p_alone = (permutation_p(found[chosen] - 1e-9, of) for of in (scores.max(0), scores[chosen]))
    plane = planes[chosen]
    points = placed[1::2].mean(0)[:, plane]
    each = np.array([circular_correlation(_angles(own[:, plane])) for own in placed[1::2]])
    return Order(plane, float(found[chosen]), neighbours(around[chosen]), p, p_alone, points - points.mean(0), each)


def _angles(points: Float[np.ndarray, "words 2"]) -> np.ndarray:
    x, y = (points - points.mean(0)).T
    return np.arctan2(y, x)
