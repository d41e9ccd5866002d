"""Sparse coders: torch only, never a language model. One short file per family; this is the registry."""

from sae_lab.saes.base import SparseCoder
from sae_lab.saes.batchtopk import BatchTopK
from sae_lab.saes.l1 import L1
from sae_lab.saes.topk import TopK

FAMILIES: dict[str, type[SparseCoder]] = {cls.__name__: cls for cls in (L1, TopK, BatchTopK)}

__all__ = ["FAMILIES", "L1", "BatchTopK", "SparseCoder", "TopK"]
