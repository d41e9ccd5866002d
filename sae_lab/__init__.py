"""sae_lab: a Jupyter-first lab for sparse autoencoders on language models.

    lm, site = sl.LM(), sl.Site("resid_post", layer=8)
    store = sl.harvest(lm, site, sl.load_text())
    sae = sl.BatchTopK(lm.width(site), 8 * lm.width(site), k=32)
    run = sl.train(sae, store, sl.TrainConfig(tokens=1_000_000))

Names are loaded when first used, so that importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LM": "lm.model",
    "load_text": "lm.text", "Text": "lm.text",
    "Site": "types", "TokenMask": "types", "Batch": "types",
    "harvest": "harvesting", "Store": "store",
    "SparseCoder": "saes",
    "L1": "saes", "Tied": "saes", "SqrtL1": "saes", "PAnneal": "saes", "Hoyer": "saes",
    "SmoothL0": "saes", "ProLU": "saes", "Gated": "saes", "JumpReLU": "saes", "TopK": "saes",
    "LeakyTopK": "saes", "BatchTopK": "saes", "Matryoshka": "saes", "Ordered": "saes", "Spline": "saes",
    "Switch": "saes", "Tokenized": "saes", "Transcoder": "saes", "SkipTranscoder": "saes", "Crosscoder": "saes",
    "MatrixSAE": "saes", "VQ": "saes",
    "load": "saes.formats",
    "sweep": "sweeping", "Sweep": "sweeping",
    "match": "matching",
    "train": "training", "meta_sae": "training", "TrainConfig": "training", "Run": "training",
    "features": "feature_index", "index_features": "feature_index", "FeatureIndex": "feature_index",
    "Steer": "edit", "Ablate": "edit", "Clamp": "edit",
    "FeatureInspector": "widgets",
    "plot": "plots",
}  # fmt: skip
_MODULES = ("cache", "evals", "saes", "worlds")

__all__ = [*_HOME, *_MODULES, "__version__"]

if TYPE_CHECKING:
    from sae_lab import cache as cache
    from sae_lab import evals as evals
    from sae_lab import saes as saes
    from sae_lab import worlds as worlds
    from sae_lab.edit import Ablate as Ablate
    from sae_lab.edit import Clamp as Clamp
    from sae_lab.edit import Steer as Steer
    from sae_lab.feature_index import FeatureIndex as FeatureIndex
    from sae_lab.feature_index import features as features
    from sae_lab.feature_index import index_features as index_features
    from sae_lab.harvesting import harvest as harvest
    from sae_lab.lm.model import LM as LM
    from sae_lab.lm.text import Text as Text
    from sae_lab.lm.text import load_text as load_text
    from sae_lab.matching import match as match
    from sae_lab.plots import plot as plot
    from sae_lab.saes import L1 as L1
    from sae_lab.saes import VQ as VQ
    from sae_lab.saes import BatchTopK as BatchTopK
    from sae_lab.saes import Crosscoder as Crosscoder
    from sae_lab.saes import Gated as Gated
    from sae_lab.saes import Hoyer as Hoyer
    from sae_lab.saes import JumpReLU as JumpReLU
    from sae_lab.saes import LeakyTopK as LeakyTopK
    from sae_lab.saes import MatrixSAE as MatrixSAE
    from sae_lab.saes import Matryoshka as Matryoshka
    from sae_lab.saes import Ordered as Ordered
    from sae_lab.saes import PAnneal as PAnneal
    from sae_lab.saes import ProLU as ProLU
    from sae_lab.saes import SkipTranscoder as SkipTranscoder
    from sae_lab.saes import SmoothL0 as SmoothL0
    from sae_lab.saes import SparseCoder as SparseCoder
    from sae_lab.saes import Spline as Spline
    from sae_lab.saes import SqrtL1 as SqrtL1
    from sae_lab.saes import Switch as Switch
    from sae_lab.saes import Tied as Tied
    from sae_lab.saes import Tokenized as Tokenized
    from sae_lab.saes import TopK as TopK
    from sae_lab.saes import Transcoder as Transcoder
    from sae_lab.saes.formats import load as load
    from sae_lab.store import Store as Store
    from sae_lab.sweeping import Sweep as Sweep
    from sae_lab.sweeping import sweep as sweep
    from sae_lab.training import Run as Run
    from sae_lab.training import TrainConfig as TrainConfig
    from sae_lab.training import meta_sae as meta_sae
    from sae_lab.training import train as train
    from sae_lab.types import Batch as Batch
    from sae_lab.types import Site as Site
    from sae_lab.types import TokenMask as TokenMask
    from sae_lab.widgets import FeatureInspector as FeatureInspector


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"sae_lab.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"sae_lab.{name}")
    else:
        raise AttributeError(f"module 'sae_lab' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
