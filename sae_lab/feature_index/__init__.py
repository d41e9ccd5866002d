"""A coder's features: which are active in a text, and an index of all of them over a store."""

from sae_lab.feature_index.annotations import Note, Notes
from sae_lab.feature_index.build import index_features
from sae_lab.feature_index.index import Context, FeatureIndex, FeatureView
from sae_lab.feature_index.live import Pair, Scored
from sae_lab.feature_index.table import FeatureTable, features
from sae_lab.spelling import no_attribute

__all__ = [
    "Context", "FeatureIndex", "FeatureTable", "FeatureView", "Note", "Notes", "Pair", "Scored", "features",
    "index_features",
]  # fmt: skip

__getattr__ = no_attribute(__name__, __all__)
