"""Which parts of a model make it answer as it does: patching, and its estimates by gradient."""

from sae_lab.circuits.attribution import Attribution, attribution
from sae_lab.circuits.directions import AreaDifference, DirectionCurves, patched_directions, principal_axes
from sae_lab.circuits.edges import EdgeCheck, check_edges, edges, norm_scale
from sae_lab.circuits.heads import Attention, HeadAttribution, attention, head_attribution, head_shares
from sae_lab.circuits.metric import Metric, logit_difference
from sae_lab.circuits.patching import PatchGrid, patching

__all__ = [
    "AreaDifference", "Attention", "Attribution", "DirectionCurves", "EdgeCheck", "HeadAttribution", "Metric",
    "PatchGrid", "attention", "attribution", "check_edges", "edges", "head_attribution", "head_shares",
    "logit_difference", "norm_scale", "patched_directions", "patching", "principal_axes",
]  # fmt: skip
