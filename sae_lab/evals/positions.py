"""FVU and loss along the context, also beyond the training context; and a curve through several coders."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_lab.activations.contexts import context_length, spread_contexts, trained_context
from sae_lab.activations.reconstructing import Reconstruction, _losses, _measure, read_and_reconstruct, recovered
from sae_lab.arguments import as_annotated
from sae_lab.lm.model import LM
from sae_lab.lm.text import Documents
from sae_lab.results import Figure, Result, counted, figure, number, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import clustered_error, ratio_difference, ratio_error
from sae_lab.types import Site

_OF_BIN = ("fvu", "fvu_se", "pca_fvu", "ce_clean", "ce_delta", "ce_delta_se", "ce_recovered", "pca_ce_delta")
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 3 / 2, 2, 3)  # of the training context, where a bin ends


@result
class ByPosition(Result):
    """Result of ``sl.evals.by_position``: one entry a bin of positions, ``edges[i]`` to ``edges[i + 1] - 1``.

    ``fvu``, ``ce_delta`` (nats/token) and ``ce_recovered`` (against mean ablation) with standard errors; ``pca_*`` the
    control, PCA of rank k; ``ce_clean`` the model's own loss. ``rise``: ΔCE beyond the training context minus ΔCE in
    its second half; ``pca_rise`` the same for PCA. ``rise`` is NaN if no position lies beyond, ``ce_recovered`` in a
    bin where ablation costs too little (as in ``sl.evals.reconstruction``).
    """

    edges: tuple[int, ...]
    trained: int
    fvu: tuple[float, ...]
    fvu_se: tuple[float, ...]
    pca_fvu: tuple[float, ...]
    ce_clean: tuple[float, ...]
    ce_delta: tuple[float, ...]
    ce_delta_se: tuple[float, ...]
    ce_recovered: tuple[float, ...]
    pca_ce_delta: tuple[float, ...]
    rise: float = figure("rise of dCE", "{_inside}, nats/token", control="pca_rise", control_name="PCA {pca_rank}")
    rise_se: float
    pca_rise: float
    fvu_rise: float = figure("rise of FVU", "{_inside}")
    fvu_rise_se: float
    pca_rank: int
    tokens: int
    documents: int
    mask: str

    def figures(self) -> list[Figure]:
        k = f"PCA {self.pca_rank}"
        found = []
        for i, (a, b) in enumerate(pairwise(self.edges)):
            place = f"{a}-{b - 1}"
            where = f"positions {place}" + ", beyond training" * (a >= self.trained)
            told = f"nats/token; clean {self.ce_clean[i]:.2f}, recovered {number(self.ce_recovered[i])}"
            found += [
                Figure(f"FVU {place}", self.fvu[i], self.fvu_se[i], self.pca_fvu[i], k, where, "low",
                       key=f"fvu {place}"),
                Figure(f"dCE {place}", self.ce_delta[i], self.ce_delta_se[i], self.pca_ce_delta[i], k, told, "low",
                       key=f"ce_delta {place}"),
            ]  # fmt: skip
        return found + super().figures()

    @property
    def _context(self) -> int:
        return self.edges[-1]

    @property
    def _inside(self) -> str:
        return f"beyond {self.trained} less {self.trained // 2}-{self.trained - 1}"

    @property
    def _bins(self) -> list[dict[str, Any]]:
        bins = enumerate(pairwise(self.edges))
        return [{"start": a, "end": b} | {name: getattr(self, name)[i] for name in _OF_BIN} for i, (a, b) in bins]

    _records = "_bins"
    _below = (
        "{tokens:,} tokens of {documents} documents, whole contexts of {_context} only; trained on contexts of "
        "{trained}; ± clustered by document; {mask}; PCA fitted on these very tokens"
    )


@as_annotated
def by_position(
    coder: SparseCoder,
    lm: LM,
    text: Documents,
    tokens: int = 16_384,
    context: int | None = None,
    edges: Sequence[int] | None = None,
    site: Site | str | None = None,
) -> ByPosition:
    """``sl.evals.by_position(sae, lm, text.held_out)``: FVU and ΔCE by position, also beyond the training context.

    FVU of a bin = Σ‖y−ŷ‖²/Σ‖y−ȳ‖² over its kept tokens, ȳ over all kept tokens. ΔCE = CE(spliced) − CE(clean) of the
    tokens predicted there, with the whole context spliced. Only contexts of full length count, so that every bin reads
    the same texts. Control: PCA of rank k, fitted on these activations of all positions.

    Args:
        tokens: how many to choose contexts from. context: tokens the model sees at once; None: twice the coder's
            training context, at most what the model can read.
        edges: where bins start, and the end of the last: increasing, at most ``context``; None: 0, ``context``, and
            between them 1/16, 1/8, 1/4, 1/2, 1, 3/2, 2 and 3 times the training context.

    Raises ValueError for edges that do not increase, and for text without two documents that fill a context.
    """
    trained = trained_context(coder)
    context = context_length(coder, lm, tokens, min(2 * trained, lm.max_length) if context is None else context)
    if edges is None:
        ends = sorted({round(trained * share) for share in _SHARES if round(trained * share) < context})
        edges = (0, *(end for end in ends if end > 0), context)
    edges = tuple(edges)
    if len(edges) < 2 or edges[0] < 0 or edges[-1] > context or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"edges must be two or more increasing positions from 0 to context={context}, got {edges}")
    contexts = [c for c in spread_contexts(lm, text, tokens, context) if len(c.ids) == context]
    if (documents := len({c.documents[0] for c in contexts})) < 2:
        raise ValueError(
            f"by_position needs two documents of at least context={context} tokens, got {documents}: give longer text, "
            "more tokens, or a shorter context"
        )
    read = read_and_reconstruct(coder, lm, contexts, site)
    measured = _measure(coder, read.y, read.y_hat, read.active, read.kept)
    losses, _ = _losses(lm, read.site, contexts, read.kept, read.y_hat, measured)
    kept, position, document = read.kept, read.positions, read.documents
    y, mean, basis = read.y[kept], measured["mean"], measured["basis"]
    variance = (y - mean).pow(2).sum(-1).double()
    error = (y - read.y_hat[kept]).pow(2).sum(-1).double()
    pca_error = (variance - ((y - mean) @ basis).pow(2).sum(-1).double()).clamp(min=0)
    at, of, seen = position[kept], document[kept], position > 0  # a context's first token is not predicted
    predicted, document_predicted = position[seen], document[seen]
    clean, spliced, ablated, _, pca = losses.double()
    bins = []
    for first, end in pairwise(edges):
        a, b = (at >= first) & (at < end), (predicted >= first) & (predicted < end)
        total, delta, cost = float(variance[a].sum()), (spliced - clean)[b], (ablated - clean)[b]
        cost_se = clustered_error(cost, document_predicted[b])
        row = (
            float(error[a].sum()) / total if total else math.nan,
            ratio_error(error[a], variance[a], of[a]),
            float(pca_error[a].sum()) / total if total else math.nan,
            float(clean[b].mean()),
            float(delta.mean()),
            clustered_error(delta, document_predicted[b]),
            recovered(float(delta.mean()), float(cost.mean()), cost_se),
            float((pca - clean)[b].mean()),
        )
        bins.append(row)

    def beyond(top: Tensor, bottom: Tensor, at: Tensor, of: Tensor) -> tuple[float, float]:
        return ratio_difference(top, bottom, at >= trained, (at >= trained // 2) & (at < trained), of)

    ones = torch.ones_like(clean)
    rise, rise_se = beyond(spliced - clean, ones, predicted, document_predicted)
    fvu_rise, fvu_rise_se = beyond(error, variance, at, of)
    return ByPosition(
        edges=edges,
        trained=trained,
        **dict(zip(_OF_BIN, zip(*bins, strict=True), strict=True)),
        rise=rise,
        rise_se=rise_se,
        pca_rise=beyond(pca - clean, ones, predicted, document_predicted)[0],
        fvu_rise=fvu_rise,
        fvu_rise_se=fvu_rise_se,
        pca_rank=measured["rank"],
        tokens=len(kept),
        documents=len(document.unique()),
        mask=read.mask,
    )


@result
class Hill(Result):
    """Result of ``sl.evals.hill``. ``half_l0``: the L0 at which half of the loss is recovered; ``slope``: Hill's n.

    Both and their errors are NaN if the points do not determine them. ``rmse``: of the fit, for lost = 1 − recovered;
    ``line_rmse``: of a straight line, the control.
    """

    half_l0: float = figure("L0 at half", "where 1 - recovered is 1/2", best="low")
    half_l0_se: float
    slope: float = figure("slope n", "how fast it is lost as 1/L0 grows")
    slope_se: float
    rmse: float = figure("rmse", "of 1 - recovered", control="line_rmse", control_name="straight line", best="low",
                         digits=4)  # fmt: skip
    line_rmse: float
    l0: tuple[float, ...] = field(repr=False)
    lost: tuple[float, ...] = field(repr=False)

    def lost_at(self, l0: float) -> float:
        """The curve's 1 − recovered at an L0."""
        return float(_hill(1 / l0, math.log(1 / self.half_l0), self.slope))

    _below = "{_coders}; ± of the least squares fit"

    @property
    def _coders(self) -> str:
        return f"{counted(len(self.l0), 'coder')} of L0 {self.l0[0]:.1f} to {self.l0[-1]:.1f}"


@as_annotated
def hill(results: Sequence[Reconstruction | tuple[Any, Any]]) -> Hill:
    """``sl.evals.hill(results)``: a Hill curve through coders, lost = sⁿ/(sⁿ + hⁿ), s = 1/L0, lost = 1 − CE recovered.

    With no active feature the reconstruction is the mean, which recovers 0: the curve goes to 1 as 1/L0 grows.
    h = 1/(L0 at half). Fitted by least squares in (log h, n); standard errors from its covariance, with the spread of
    the points about the curve as their error. Control: a straight line in 1/L0, also with two parameters.

    Args: results: of ``sl.evals.reconstruction`` on the same text, or pairs (L0, CE recovered): at least three. If they
            do not determine the parameters (all recover equally), these and their errors are NaN.

    Raises ValueError for fewer, for equal L0, and for an L0 of 0.
    """
    from scipy.optimize import OptimizeWarning, curve_fit

    points = sorted((r.l0, r.ce_recovered) if isinstance(r, Reconstruction) else (r[0], r[1]) for r in results)
    l0, recovered = (np.array(column, float) for column in zip(*points, strict=True)) if points else (np.zeros(0),) * 2
    if len(np.unique(l0)) < 3:
        raise ValueError(f"a Hill curve needs coders of three different L0 at least, got {len(np.unique(l0))}")
    if (bad := ~((l0 > 0) & np.isfinite(recovered))).any():
        wrong = points[int(bad.argmax())]
        raise ValueError(f"a Hill curve needs L0 above 0 and numbers for CE recovered, got {wrong}: leave it out")
    s, lost = 1 / l0, 1 - recovered
    odds = np.log(np.clip(lost, 1e-4, 1 - 1e-4) / (1 - np.clip(lost, 1e-4, 1 - 1e-4)))
    slope, offset = np.polyfit(np.log(s), odds, 1)  # log odds = n·(log s − log h): a start from which it converges
    start = (-offset / slope, slope) if slope > 0.05 else (float(np.log(s).max()) + 1, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # without a covariance the errors are NaN
        try:
            (log_h, n), covariance = curve_fit(_hill, s, lost, p0=start, maxfev=20_000)
        except RuntimeError:  # the search does not end
            (log_h, n), covariance = (math.nan, math.nan), np.full((2, 2), math.nan)
    errors = np.sqrt(np.diag(covariance))
    told = bool(np.isfinite(errors).all())  # else any flat curve fits, and half_l0 is arbitrary
    line = np.polyval(np.polyfit(s, lost, 1), s)
    return Hill(
        half_l0=math.exp(-log_h) if told else math.nan,
        half_l0_se=math.exp(-log_h) * float(errors[0]) if told else math.nan,
        slope=float(n) if told else math.nan,
        slope_se=float(errors[1]) if told else math.nan,
        rmse=float(np.sqrt(np.mean((_hill(s, log_h, n) - lost) ** 2))),
        line_rmse=float(np.sqrt(np.mean((line - lost) ** 2))),
        l0=tuple(l0.tolist()),
        lost=tuple(lost.tolist()),
    )


def _hill(s, log_h, n):
    from scipy.special import expit

    return expit(n * (np.log(s) - log_h))
