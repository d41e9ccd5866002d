"""Which parts of a model make it answer as it does: patching, its estimates by gradient, and circuits of features."""

from sae_lab.circuits.attribution import Attribution, attribution
from sae_lab.circuits.downstream import DownstreamEffects, effects_of
from sae_lab.circuits.edges import Edge
from sae_lab.circuits.faithfulness import Faithfulness
from sae_lab.circuits.graph import FeatureCircuit, feature_circuit
from sae_lab.circuits.linearizing import PulledBack, pull_back
from sae_lab.circuits.metric import Metric, logit_difference
from sae_lab.circuits.nodes import Node
from sae_lab.circuits.patching import PatchGrid, patching

__all__ = [
    "Attribution", "DownstreamEffects", "Edge", "Faithfulness", "FeatureCircuit", "Metric", "Node", "PatchGrid",
    "PulledBack", "attribution", "effects_of", "feature_circuit", "logit_difference", "patching", "pull_back",
]  # fmt: skip
