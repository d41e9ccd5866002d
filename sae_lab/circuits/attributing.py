"""Effects of patching features: estimated by gradient, and measured by patches."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated, check_least
from sae_lab.circuits.gradients import mean_gradient, require_slope
from sae_lab.circuits.metric import ROWS, Metric, measured, shifted
from sae_lab.circuits.pairs import both_runs, copied, kept, require_sae
from sae_lab.lm.model import LM
from sae_lab.nets.net import Net
from sae_lab.noting import Names
from sae_lab.results import Result, by_column
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch, Write

Place = tuple[int, int]  # position, feature (-1: the coder's error)


class Estimates(Result):
    """Base of results whose effects are estimated by gradient, and for some nodes also measured by a patch. The last
    two columns of their table are the estimate and the "truth", as measured: NaN for a node that was not patched."""

    _shown, _digits = 8, ".4f"
    steps: int

    @property
    def _how(self) -> str:
        return "gradient" if self.steps == 1 else f"integrated gradients, {self.steps} steps"

    def agreement(self) -> dict[str, float]:
        """Pearson's and Spearman's correlation of estimated and true effects, over the nodes that were patched."""
        from scipy.stats import pearsonr, spearmanr

        table = self.to_pandas().dropna()
        if len(table) < 3:
            raise ValueError("agreement needs at least three true effects: pass check=, a number of nodes to patch")
        both: list[Any] = [of(table.iloc[:, -2], table["truth"]) for of in (pearsonr, spearmanr)]
        return {"pearson": float(both[0][0]), "spearman": float(both[1][0]), "nodes": len(table)}


@dataclass(frozen=True, repr=False)
class Attribution(Estimates):
    """Result of ``circuits.attribution``. Its table has one row per patched node; if none was patched, one row per node
    with an effect.

    Attributes:
        effects: "pos d_sae": estimated effect of patching each feature, mean over prompts, in units of the metric; 0
            for a feature that is active in neither run.
        error: " pos": the same for the coder's error.
        true_effects: measured, by (position, feature), of the nodes that were patched; feature -1 is the error.
        base, source: the metric's mean over the prompts, and over the sources.
        steps: 1: the gradient at the prompts; more: integrated gradients over that many points. names: of features.
    """

    effects: Float[Tensor, "pos d_sae"]
    error: Float[Tensor, " pos"]
    true_effects: dict[Place, float]
    base: float
    source: float
    steps: int
    names: Names = field(default_factory=Names)

    _records, _sorted = "_nodes", "estimate"
    _above = "metric {base:.3f} → {source:.3f} with the sources; {_how}:"

    @property
    def _nodes(self) -> dict[str, list[Any]]:
        places = list(self.true_effects) or [(p, f) for p, f in self.effects.nonzero().tolist()]
        estimates = [float(self.error[p] if f < 0 else self.effects[p, f]) for p, f in places]
        truth = [self.true_effects.get(place, float("nan")) for place in places]
        names = self.names.of(f for _, f in places)
        called = [names.get(f, "") for _, f in places]
        rows = [(*place, *rest) for place, *rest in zip(places, called, estimates, truth, strict=True)]
        return by_column("position feature name estimate truth", rows)


@as_annotated
def attribution(
    lm: LM | Net,
    coder: SparseCoder,
    prompts: Any,
    sources: Any,
    metric: Metric,
    *,
    steps: int = 1,
    check: int = 0,
) -> Attribution:
    """``attribution(lm, sae, prompts, sources, metric)``: attribution patching, (z_source - z)·(W_dec·dm/dx), by one
    backward pass for all features at all positions.

    The effects are those of ``sl.Patch``: with an ``input_norm`` the new code is written at the scale of the prompt's
    activation. With ``steps`` > 1 the gradient is the mean over that many points between the activations of both
    runs (integrated gradients, as in Marks et al. 2024, arXiv:2403.19647). The coder's error, x - x_hat, is a node.

    Args:
        coder: an SAE at one site. prompts, sources, metric: as for ``patching``; the metric must be differentiable. Of
            a ``sl.Net`` they are inputs, with a metric (output, places) -> a number for each.
        check: the number of features that are also patched, evenly spread over the ranking of those active in either
            run by their estimates; above 0, the error is also patched at every position.

    Raises ValueError as ``patching``, and for a coder that does not write where it reads.
    """
    require_sae(coder)
    check_least(1, steps=steps)
    site = coder.site
    runs = both_runs(lm, prompts, sources, metric, [site])
    batch, x, given = runs.batch, runs.x[site], runs.given[site]
    require_slope(lm, metric, batch)
    keep = kept(lm, [coder], (batch, runs.x), (runs.theirs, runs.given))
    if steps == 1:
        gradient = lm.gradient(batch, site, metric, x)
    else:
        gradient = mean_gradient(lm, batch, site, metric, x, given - x, steps)
    with torch.no_grad():
        z, z_given = coder.encode(x), coder.encode(given)
        wrong = (given - coder(given, runs.theirs.ids).x_hat) - (x - coder(x, batch.ids).x_hat)
        changes = coder.strengths(z_given - z, x)
        counted = keep.to(x.device)
        effects = changes * (gradient @ coder.directions().T) * counted.unsqueeze(-1)
        error = (wrong * gradient).sum(-1) * counted
    n = len(batch.ids)
    active = (((z > 0) | (z_given > 0)) & counted.unsqueeze(-1)).any(0).cpu()
    found = effects.sum(0).cpu() / n
    truth: dict[Place, float] = {}
    if check:
        order = found[active].abs().argsort(descending=True)
        places = active.nonzero()[order[evenly(len(order), check)]]
        nodes = [(int(p), int(f)) for p, f in places] + [(p, -1) for p in range(isinstance(lm, LM), x.shape[1])]
        rows = coder.directions()
        added = {(p, f): wrong[:, p] if f < 0 else changes[:, p, f, None] * rows[f] for p, f in nodes}
        truth = true_effects(lm, batch, site, keep, added, metric, runs.base)
    return Attribution(found, error.sum(0).cpu() / n, truth, runs.base, runs.source, steps, Names(coder))


def evenly(count: int, wanted: int) -> list[int]:
    """``wanted`` of the numbers below ``count``, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)).tolist()


def true_effects(
    lm: LM | Net, batch: TokenBatch, site: Site, keep: Tensor, changes: dict[Place, Tensor], metric: Metric, base: float
) -> dict[Place, float]:
    """The change of the metric's mean when each change is added at its position."""
    n, found, nodes = len(batch.ids), {}, list(changes)
    at_once = max(1, ROWS // n)
    for start in range(0, len(nodes), at_once):
        part = nodes[start : start + at_once]
        copies = copied(batch, len(part))
        where = torch.tensor([p for p, _ in part]).repeat_interleave(n)
        added = torch.cat([changes[node] * keep[:, node[0], None].to(changes[node]) for node in part])
        write = Write(site, partial(shifted, where=where, by=added.detach()))
        means = measured(lm, copies, metric, [write]).view(len(part), n).mean(1)
        found |= {node: float(mean) - base for node, mean in zip(part, means, strict=True)}
    return found
