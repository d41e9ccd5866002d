"""Sparse coders: torch only, never a language model."""

from sae_lab.saes.adapt import inform as inform
from sae_lab.saes.adapt import optimise_codes as optimise_codes
from sae_lab.saes.adapt import realign as realign
from sae_lab.saes.adapt import resample as resample
from sae_lab.saes.adapt import unsuppress as unsuppress
from sae_lab.saes.base import SparseCoder as SparseCoder
from sae_lab.saes.clt import CrossLayerTranscoder as CrossLayerTranscoder
from sae_lab.saes.families import *  # noqa: F403
from sae_lab.saes.families import FAMILIES as FAMILIES
from sae_lab.saes.families.untrained import baselines as baselines
from sae_lab.saes.io import peers as _peers  # noqa: F401 (it says how other libraries' formats are written)
from sae_lab.spelling import no_attribute as _no_attribute

__getattr__ = _no_attribute(__name__, [name for name in globals() if not name.startswith("_")])
