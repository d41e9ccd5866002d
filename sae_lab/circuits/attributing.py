"""What patching features would do, estimated by gradient, beside what it does."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.circuits.metric import ROWS, Metric, copied, measured, paired, shifted
from sae_lab.lm.model import LM
from sae_lab.results import frame_text
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch, Write


@dataclass(frozen=True, repr=False)
class Attribution:
    """Result of ``circuits.attribution``: what patching features (and the coder's error) would do to the metric.

    Attributes:
        effects: "pos d_sae": estimated, mean over prompts, in units of the metric; 0 where a feature is active in
            neither run.
        error: " pos": of the coder's error, a node like the others.
        true_effects: by (position, feature), of those that were patched in truth; feature -1 is the error.
        steps: 1: the gradient at the prompts; more: integrated gradients with so many.
    """

    effects: Float[Tensor, "pos d_sae"]
    error: Float[Tensor, " pos"]
    true_effects: dict[tuple[int, int], float]
    base: float
    source: float
    steps: int

    def to_pandas(self):
        """One row a node that was patched in truth, or all active ones where none was: position, feature, estimate,
        truth."""
        import pandas as pd

        places = list(self.true_effects) or [(p, f) for p, f in self.effects.nonzero().tolist()]
        rows = [
            {
                "position": p, "feature": f, "estimate": float(self.error[p] if f < 0 else self.effects[p, f]),
                "truth": self.true_effects.get((p, f), float("nan")),
            }
            for p, f in places
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def agreement(self) -> dict[str, float]:
        """Pearson's and Spearman's correlation of estimate and truth, over the nodes patched in truth."""
        if len(self.true_effects) < 3:
            raise ValueError("agreement needs at least three true effects: pass attribution(..., check=)")
        table = self.to_pandas()
        return correlations(table["estimate"].to_numpy(), table["truth"].to_numpy())

    def __repr__(self) -> str:
        table = self.to_pandas()
        best = table.iloc[np.argsort(-table["estimate"].abs().to_numpy())[:8]]
        how = "gradient" if self.steps == 1 else f"integrated gradients, {self.steps} steps"
        return (
            f"metric {self.base:.3f} → {self.source:.3f} with the sources; {how}:\n"
            + frame_text(best, ".4f")
        )


@as_annotated
def attribution(
    lm: LM,
    coder: SparseCoder,
    prompts: Sequence[str],
    sources: Sequence[str],
    metric: Metric,
    *,
    steps: int = 1,
    check: int = 0,
) -> Attribution:
    """Attribution patching: (z_source - z)·(W_dec·dm/dx), one backward pass for all features at all positions.

    What patching a feature adds is what ``sl.Patch`` adds: with an ``input_norm`` the new code is written in the size
    of the prompt's own activation.

    With ``steps`` > 1 the gradient is the mean over so many points between the two runs' activations (integrated
    gradients, as Marks et al. 2024, arXiv:2403.19647, use them); the error term, x - x_hat, is a node of its own.

    Args:
        coder: an SAE at one site. prompts, sources, metric: as for ``patching``.
        check: so many nodes are patched in truth too, drawn evenly from those active in either run by the size of
            their estimate, and the error node at every position.

    Raises ValueError as ``patching``, and for a coder that reads elsewhere than it writes.
    """
    require_sae(coder)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    batch, theirs = paired(lm, prompts, sources)
    site, mask = coder.site, coder.mask or lm.mask()
    x, given = (lm.run(one, [site], logits=False)[0][site] for one in (batch, theirs))
    keep = mask.keep(batch.ids, batch.positions, {site: x.cpu()}) & mask.keep(
        theirs.ids, theirs.positions, {site: given.cpu()}
    )
    if not keep.any():
        raise ValueError(f"the mask leaves out every token of these prompts ({mask}): give others")
    base, source = measured(lm, batch, metric).mean(), measured(lm, theirs, metric).mean()
    gradient = torch.zeros_like(x)
    for step in range(steps):
        share = (step + 0.5) / steps if steps > 1 else 0.0
        between = x + share * (given - x)
        gradient += lm.gradient(batch, site, metric, between) / steps
    with torch.no_grad():
        z, z_given = coder.encode(x), coder.encode(given)
        wrong = (given - coder(given, theirs.ids).x_hat) - (x - coder(x, batch.ids).x_hat)
        changes = coder.strengths(z_given - z, x)
        effects = changes * (gradient @ coder.directions().T) * keep.unsqueeze(-1)
        error = (wrong * gradient).sum(-1) * keep
    n = len(batch.ids)
    active = (((z > 0) | (z_given > 0)) & keep.unsqueeze(-1)).any(0)
    found = effects.sum(0) / n
    truth: dict[tuple[int, int], float] = {}
    if check:
        nodes = _nodes_to_check(found, active, check) + [(p, -1) for p in range(1, x.shape[1])]
        rows = coder.directions()
        added = {(p, f): wrong[:, p] if f < 0 else changes[:, p, f, None] * rows[f] for p, f in nodes}
        truth = true_effects(lm, batch, site, keep, added, metric, float(base))
    return Attribution(found, error.sum(0) / n, truth, float(base), float(source), steps)


def require_sae(coder: SparseCoder) -> None:
    """ValueError for a coder that reads elsewhere than it writes."""
    if coder.transcodes or (coder.writes and coder.writes != coder.reads):
        raise ValueError("attribution takes a coder that writes where it reads: an SAE")


def correlations(estimate: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation, and over how many nodes."""
    from scipy.stats import pearsonr, spearmanr

    pearson: Any = pearsonr(estimate, truth)
    spearman: Any = spearmanr(estimate, truth)
    return {"pearson": float(pearson[0]), "spearman": float(spearman[0]), "nodes": len(truth)}


def _nodes_to_check(effects: Tensor, active: Tensor, count: int) -> list[tuple[int, int]]:
    """Of the active nodes, evenly over the order of their estimates, the strongest included."""
    places = active.nonzero()
    order = effects[active].abs().argsort(descending=True)
    chosen = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [(int(p), int(f)) for p, f in places[order[torch.from_numpy(chosen)]]]


def true_effects(
    lm: LM, batch: TokenBatch, site: Site, keep: Tensor, changes: dict[tuple[int, int], Tensor], metric: Metric,
    base: float,
) -> dict[tuple[int, int], float]:  # fmt: skip
    """What adding each change at its position does to the metric's mean."""
    n, found, nodes = len(batch.ids), {}, list(changes)
    at_once = max(1, ROWS // n)
    for start in range(0, len(nodes), at_once):
        part = nodes[start : start + at_once]
        copies = copied(batch, len(part))
        where = torch.tensor([p for p, _ in part]).repeat_interleave(n)
        added = torch.cat([changes[node] * keep[:, node[0], None] for node in part])
        write = Write(site, partial(shifted, where=where, by=added.detach()))
        means = measured(lm, copies, metric, [write]).view(len(part), n).mean(1)
        found |= {node: float(mean) - base for node, mean in zip(part, means, strict=True)}
    return found
