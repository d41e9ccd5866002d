"""Which parts of a model make it answer as it does: patching, and its estimates by gradient."""

from sae_lab.circuits.attribution import Attribution, attribution
from sae_lab.circuits.directions import AreaDifference, DirectionCurves, patched_directions, principal_axes
from sae_lab.circuits.metric import Metric, logit_difference
from sae_lab.circuits.patching import PatchGrid, patching

__all__ = [
    "AreaDifference", "Attribution", "DirectionCurves", "Metric", "PatchGrid", "attribution", "logit_difference",
    "patched_directions", "patching", "principal_axes",
]  # fmt: skip
