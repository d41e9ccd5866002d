"""Which parts of a model make it answer as it does: patching, and its estimates by gradient."""

from sae_lab.circuits.attribution import Attribution, attribution
from sae_lab.circuits.metric import Metric, logit_difference
from sae_lab.circuits.patching import PatchGrid, patching

__all__ = ["Attribution", "Metric", "PatchGrid", "attribution", "logit_difference", "patching"]
