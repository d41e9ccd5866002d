"""One short file per family of coder. A new family needs its file and one line here: ``sl.Family``, ``sl.load`` and the
tests that all families share then find it."""

from sae_lab.saes.base import SparseCoder
from sae_lab.saes.families.batchtopk import BatchTopK as BatchTopK
from sae_lab.saes.families.crosscoder import Crosscoder as Crosscoder
from sae_lab.saes.families.gated import Gated as Gated
from sae_lab.saes.families.hoyer import Hoyer as Hoyer
from sae_lab.saes.families.jumprelu import JumpReLU as JumpReLU
from sae_lab.saes.families.l1 import L1 as L1
from sae_lab.saes.families.l1 import Tied as Tied
from sae_lab.saes.families.leakytopk import LeakyTopK as LeakyTopK
from sae_lab.saes.families.matrix import MatrixSAE as MatrixSAE
from sae_lab.saes.families.matryoshka import Matryoshka as Matryoshka
from sae_lab.saes.families.ordered import Ordered as Ordered
from sae_lab.saes.families.panneal import PAnneal as PAnneal
from sae_lab.saes.families.prolu import ProLU as ProLU
from sae_lab.saes.families.smoothl0 import SmoothL0 as SmoothL0
from sae_lab.saes.families.spline import Spline as Spline
from sae_lab.saes.families.sqrtl1 import SqrtL1 as SqrtL1
from sae_lab.saes.families.switch import Switch as Switch
from sae_lab.saes.families.tokenized import Tokenized as Tokenized
from sae_lab.saes.families.topk import TopK as TopK
from sae_lab.saes.families.transcoder import SkipTranscoder as SkipTranscoder
from sae_lab.saes.families.transcoder import Transcoder as Transcoder
from sae_lab.saes.families.vq import VQ as VQ

FAMILIES: dict[str, type[SparseCoder]] = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, SparseCoder) and value is not SparseCoder
}
