"""Absorption where the true features are known: planted parents and children."""

import numpy as np
import torch

from sae_lab.activations.world import World
from sae_lab.arguments import as_annotated
from sae_lab.evals.sampling import share_of
from sae_lab.feature_index.matching import match
from sae_lab.results import Result, figure, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import mean_and_error, with_error
from sae_lab.types import rows_of


@result
class PlantedAbsorption(Result):
    """Result of ``sl.evals.planted_absorption``. Means over parents; recall: how often a parent's feature fires."""

    recall_alone: float = figure("recall alone", "of parents that fire without a child", best="high")
    recall_given: float = figure("recall given a child", control="recall_foreign", best="high",
                                 control_name="other parents' children")  # fmt: skip
    recall_foreign: float
    gap: float = figure("alone less given", "what is absorbed", control="gap_foreign", best="low",
                        control_name="other parents' children")  # fmt: skip
    gap_se: float
    gap_foreign: float
    leak: float = figure("leak", "cos(child's row, parent)", control="leak_foreign", control_name="other parents",
                         best="low")  # fmt: skip
    leak_se: float
    leak_foreign: float
    leak_true: float
    parents: int
    children: int
    matched_cosine: float
    rows: int

    _below = (
        "{parents} parents, {children} children, {rows:,} rows; ± over parents; true directions of child and parent: "
        "{leak_true:.3f}; features matched at a mean cosine of {matched_cosine:.3f}"
    )


@as_annotated
@torch.no_grad()
def planted_absorption(sae: SparseCoder, world: World, rows: int = 20_000) -> PlantedAbsorption:
    """Absorption of known parents by known children: ``sl.evals.planted_absorption(sae, world)``.

    A parent's and a child's features are those matched one to one with their true directions (``sl.match``).
    gap = P(parent's feature fires | parent fires, no child does) − P(... | parent and one of its children fire);
    leak = cos(W_dec of the child's feature, the parent's true direction). Controls: the gap for children of other
    parents (with the parent's children silent), and the leak with other parents. Absorbed: gap near 1, leak near √½.

    ValueError for a world without ``hierarchy=`` or of another width.
    """
    parent = world.labels["parent"]
    if not bool((parent >= 0).any()):
        raise ValueError("planted_absorption needs parents and children: make the world with planted(hierarchy=1)")
    if sae.d_in != world.x.shape[1]:
        raise ValueError(f"the coder reads d_in={sae.d_in}, the world has width {world.x.shape[1]}: make them equal")
    found = match(sae, world)
    rows = min(rows, len(world))
    offsets = world.codes.offsets[: rows + 1]
    true = torch.zeros(rows, world.codes.d_sae, dtype=torch.bool)
    true[rows_of(offsets), world.codes.features[: int(offsets[-1])]] = True
    fires = sae.codes_of(world.x[:rows]).dense() > 0
    is_child = parent >= 0
    any_child = true[:, is_child].any(1)
    recalls, leaks, foreign_leaks = [], [], []
    directions = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu(), dim=1)
    parents = parent[is_child].unique()
    for one in parents.tolist():
        children = (parent == one).nonzero().flatten()
        feature = int(found.permutation[one])
        own = true[:, children].any(1)
        when = (~any_child, own, any_child & ~own)
        fired = fires[:, feature] & (feature >= 0)  # -1: no feature is matched
        recalls.append([share_of(fired, true[:, one] & w) for w in when])
        rows_of_children = found.permutation[children]
        cosines = directions[rows_of_children[rows_of_children >= 0]] @ world.dictionary[parents].T
        here = parents == one
        leaks.append(float(cosines[:, here].mean()))
        foreign_leaks.append(float(cosines[:, ~here].mean()))
    alone, given, foreign = np.array(recalls).T
    return PlantedAbsorption(
        recall_alone=float(np.nanmean(alone)),
        recall_given=float(np.nanmean(given)),
        recall_foreign=float(np.nanmean(foreign)),
        **with_error(gap=_known(alone - given), leak=_known(np.array(leaks))),
        gap_foreign=mean_and_error(_known(alone - foreign))[0],
        leak_foreign=mean_and_error(_known(np.array(foreign_leaks)))[0],
        leak_true=float((world.dictionary[is_child] * world.dictionary[parent[is_child]]).sum(1).mean()),
        parents=len(parents),
        children=int(is_child.sum()),
        matched_cosine=float(found.cosines.nanmean()),
        rows=len(true),
    )


def _known(values: np.ndarray) -> list[float]:
    return values[~np.isnan(values)].tolist()
