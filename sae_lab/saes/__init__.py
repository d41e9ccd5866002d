"""Sparse coders: torch only, never a language model. One short file per family, and one line here, which is all that
``sl.Family``, ``sl.load`` and the tests of every family's contract need."""

from sae_lab.saes.adapt import inform as inform
from sae_lab.saes.adapt import optimise_codes as optimise_codes
from sae_lab.saes.adapt import realign as realign
from sae_lab.saes.adapt import resample as resample
from sae_lab.saes.adapt import unsuppress as unsuppress
from sae_lab.saes.base import SparseCoder as SparseCoder
from sae_lab.saes.baselines import baselines as baselines
from sae_lab.saes.batchtopk import BatchTopK as BatchTopK
from sae_lab.saes.crosscoder import Crosscoder as Crosscoder
from sae_lab.saes.gated import Gated as Gated
from sae_lab.saes.hoyer import Hoyer as Hoyer
from sae_lab.saes.jumprelu import JumpReLU as JumpReLU
from sae_lab.saes.l1 import L1 as L1
from sae_lab.saes.l1 import Tied as Tied
from sae_lab.saes.leakytopk import LeakyTopK as LeakyTopK
from sae_lab.saes.matrix import MatrixSAE as MatrixSAE
from sae_lab.saes.matryoshka import Matryoshka as Matryoshka
from sae_lab.saes.ordered import Ordered as Ordered
from sae_lab.saes.panneal import PAnneal as PAnneal
from sae_lab.saes.prolu import ProLU as ProLU
from sae_lab.saes.smoothl0 import SmoothL0 as SmoothL0
from sae_lab.saes.spline import Spline as Spline
from sae_lab.saes.sqrtl1 import SqrtL1 as SqrtL1
from sae_lab.saes.switch import Switch as Switch
from sae_lab.saes.tokenized import Tokenized as Tokenized
from sae_lab.saes.topk import TopK as TopK
from sae_lab.saes.transcoder import SkipTranscoder as SkipTranscoder
from sae_lab.saes.transcoder import Transcoder as Transcoder
from sae_lab.saes.vq import VQ as VQ
from sae_lab.spelling import no_attribute as _no_attribute

FAMILIES: dict[str, type[SparseCoder]] = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, SparseCoder) and value is not SparseCoder
}

__getattr__ = _no_attribute(__name__, [name for name in globals() if not name.startswith("_")])
