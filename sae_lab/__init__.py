"""sae_lab: a Jupyter-first lab for sparse autoencoders on language models.

    lm, site = sl.LM(), sl.Site("resid_post", layer=8)
    store = sl.harvest(lm, site, sl.load_text())
    sae = sl.BatchTopK(lm.width(site), 8 * lm.width(site), k=32)
    run = sl.train(sae, store, sl.TrainConfig(tokens=1_000_000))

Names are loaded when first used, so that importing the package costs next to nothing.
"""

from functools import cache as once  # sae_lab.cache is a module
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sae_lab import cache as cache
    from sae_lab import circuits as circuits
    from sae_lab import evals as evals
    from sae_lab import explain as explain
    from sae_lab import geometry as geometry
    from sae_lab import saes as saes
    from sae_lab import worlds as worlds
    from sae_lab.activations.harvesting import harvest as harvest
    from sae_lab.activations.store import Store as Store
    from sae_lab.activations.streaming import Stream as Stream
    from sae_lab.edits.edit import Ablate as Ablate
    from sae_lab.edits.edit import Clamp as Clamp
    from sae_lab.edits.edit import Edit as Edit
    from sae_lab.edits.edit import Patch as Patch
    from sae_lab.edits.edit import Project as Project
    from sae_lab.edits.edit import Push as Push
    from sae_lab.edits.edit import Scale as Scale
    from sae_lab.edits.edit import Splice as Splice
    from sae_lab.edits.edit import Steer as Steer
    from sae_lab.edits.vector import Vector as Vector
    from sae_lab.evals.fitting import fit_probe as fit_probe
    from sae_lab.feature_index import FeatureIndex as FeatureIndex
    from sae_lab.feature_index import features as features
    from sae_lab.feature_index import index_features as index_features
    from sae_lab.feature_index.annotations import notes as notes
    from sae_lab.feature_index.dosing import dose_response as dose_response
    from sae_lab.feature_index.finding import find_features as find_features
    from sae_lab.feature_index.matching import match as match
    from sae_lab.lm.model import LM as LM
    from sae_lab.lm.text import Text as Text
    from sae_lab.lm.text import load_text as load_text
    from sae_lab.nets.net import Net as Net
    from sae_lab.plots import plot as plot
    from sae_lab.saes import *  # noqa: F403 (the families)
    from sae_lab.saes import SparseCoder as SparseCoder
    from sae_lab.saes.clt import CrossLayerTranscoder as CrossLayerTranscoder
    from sae_lab.saes.io.opening import load as load
    from sae_lab.saes.sets import TranscoderSet as TranscoderSet
    from sae_lab.training.config import TrainConfig as TrainConfig
    from sae_lab.training.estimating import estimate as estimate
    from sae_lab.training.run import Run as Run
    from sae_lab.training.start import meta_sae as meta_sae
    from sae_lab.training.start import train as train
    from sae_lab.training.sweeping import Sweep as Sweep
    from sae_lab.training.sweeping import sweep as sweep
    from sae_lab.types import Batch as Batch
    from sae_lab.types import Site as Site
    from sae_lab.types import TokenMask as TokenMask
    from sae_lab.widgets import FeatureInspector as FeatureInspector
    from sae_lab.widgets import FeatureMap as FeatureMap
    from sae_lab.widgets import GraphLab as GraphLab
    from sae_lab.widgets import PatchingGrid as PatchingGrid
    from sae_lab.widgets import Session as Session
    from sae_lab.widgets import SteeringSliders as SteeringSliders
    from sae_lab.widgets import TokenFeatures as TokenFeatures
    from sae_lab.widgets import TrainingMonitor as TrainingMonitor


@once
def _homes() -> dict[str, str]:
    """The module of each name that is imported above ("sae_lab" of a module); read when a name is first asked for."""
    import ast

    with open(__file__, encoding="utf-8") as f:
        imports = [n for n in ast.walk(ast.parse(f.read())) if isinstance(n, ast.ImportFrom)]
    return {a.name: str(n.module) for n in imports for a in n.names if a.name == a.asname}


# Families that sl.<Tab> shows; the others are reached as sl.Gated too, and listed under sl.saes.
_SHOWN = ("TopK", "BatchTopK", "JumpReLU", "Transcoder")


def _names() -> list[str]:
    return [*_homes(), *import_module("sae_lab.saes").FAMILIES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__all__":
        value = __dir__()
    elif name.startswith("_"):  # tools ask modules for dunder names: no reason to load torch
        raise AttributeError(f"module 'sae_lab' has no attribute {name!r}; see dir(sae_lab)")
    elif home := _homes().get(name):
        value = import_module(f"sae_lab.{name}") if home == "sae_lab" else getattr(import_module(home), name)
    elif name == "checkpoint":  # a training's files, for scripts that look into them; no part of the API
        value = import_module("sae_lab.training.checkpoint")
    elif name not in (known := _names()):
        return import_module("sae_lab.spelling").no_attribute("sae_lab", known)(name)
    else:
        value = import_module("sae_lab.saes").FAMILIES[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_homes(), *_SHOWN, "__version__"])
