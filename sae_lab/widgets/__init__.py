"""Notebook widgets: panels that read and set plain Python objects."""

from sae_lab.spelling import no_attribute
from sae_lab.widgets.grid import PatchingGrid
from sae_lab.widgets.tokens import TokenFeatures

from .feature_map import FeatureMap
from .graph_lab import GraphLab
from .inspector import FeatureInspector
from .monitor import TrainingMonitor
from .session import EditStack, Selection, Session
from .static_html import Snapshot
from .steering import SteeringSliders

__all__ = [
    "EditStack", "FeatureInspector", "FeatureMap", "GraphLab", "PatchingGrid", "Selection", "Session", "Snapshot",
    "SteeringSliders", "TokenFeatures", "TrainingMonitor",
]  # fmt: skip

__getattr__ = no_attribute(__name__, __all__)
