"""Notebook widgets: panels that read and set plain Python objects."""

from .inspector import FeatureInspector
from .static_html import Snapshot

__all__ = ["FeatureInspector", "Snapshot"]
