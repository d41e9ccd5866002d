"""Which parts of a model cause its answer: patching, attribution patching, feature circuits, heads, edges."""

from sae_lab.circuits.attributing import Attribution, attribution
from sae_lab.circuits.attribution_graph import AttributionGraph
from sae_lab.circuits.direct import DirectEffects, direct_effects
from sae_lab.circuits.directions import AreaDifference, DirectionCurves, patched_directions, principal_axes
from sae_lab.circuits.downstream import DownstreamEffects, effects_of
from sae_lab.circuits.faithfulness import Faithfulness
from sae_lab.circuits.graph import FeatureCircuit, feature_circuit
from sae_lab.circuits.groups import GraphGroups, Group, GroupedGraph
from sae_lab.circuits.heads import Attention, HeadAttribution, attention, head_attribution, head_shares
from sae_lab.circuits.invariant import EdgeCheck, check_edges, invariant_edges, norm_scale
from sae_lab.circuits.linearizing import PulledBack, pull_back
from sae_lab.circuits.metric import Metric, kl_from, log_probability, logit_difference
from sae_lab.circuits.nodes import Edge, Node
from sae_lab.circuits.pairs import aligned_tokens
from sae_lab.circuits.patching_effects import PatchGrid, patched_cells, patched_together, patching, patching_estimate
from sae_lab.circuits.prompt import PromptReading, read_prompt
from sae_lab.circuits.task_graph import TaskEdge, TaskGraph, trace_many
from sae_lab.circuits.tracing import trace
from sae_lab.spelling import no_attribute

__all__ = [
    "AreaDifference", "Attention", "Attribution", "AttributionGraph", "DirectEffects", "DirectionCurves",
    "DownstreamEffects", "Edge", "EdgeCheck", "Faithfulness", "FeatureCircuit", "GraphGroups", "Group", "GroupedGraph",
    "HeadAttribution", "Metric", "Node", "PatchGrid", "PromptReading", "PulledBack", "TaskEdge", "TaskGraph",
    "aligned_tokens", "attention", "attribution", "check_edges", "direct_effects", "effects_of", "feature_circuit",
    "head_attribution", "head_shares", "invariant_edges", "kl_from", "log_probability", "logit_difference",
    "norm_scale", "patched_cells", "patched_directions", "patched_together", "patching", "patching_estimate",
    "principal_axes", "pull_back", "read_prompt", "trace", "trace_many",
]  # fmt: skip

__getattr__ = no_attribute(__name__, __all__)
