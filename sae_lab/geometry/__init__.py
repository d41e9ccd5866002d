"""Geometry of features: clusters of directions, circles of words, patterns of contexts."""

from sae_lab.geometry.circles import MONTHS, WEEKDAYS, Circular, circular
from sae_lab.geometry.clustering import Clusters, Control, clusters
from sae_lab.geometry.spectra import Patterns, patterns
from sae_lab.spelling import no_attribute

__all__ = [
    "MONTHS", "WEEKDAYS", "Circular", "Clusters", "Control", "Patterns", "circular", "clusters", "patterns",
]  # fmt: skip

__getattr__ = no_attribute(__name__, __all__)
