"""Sparse coders: torch only, never a language model. One short file per family; this is the registry."""

from sae_lab.saes.adapt import inform, optimise_codes, realign, resample, unsuppress
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.batchtopk import BatchTopK
from sae_lab.saes.crosscoder import Crosscoder
from sae_lab.saes.gated import Gated
from sae_lab.saes.hoyer import Hoyer
from sae_lab.saes.jumprelu import JumpReLU
from sae_lab.saes.l1 import L1, Tied
from sae_lab.saes.leakytopk import LeakyTopK
from sae_lab.saes.matrix import MatrixSAE
from sae_lab.saes.matryoshka import Matryoshka
from sae_lab.saes.ordered import Ordered
from sae_lab.saes.panneal import PAnneal
from sae_lab.saes.prolu import ProLU
from sae_lab.saes.smoothl0 import SmoothL0
from sae_lab.saes.spline import Spline
from sae_lab.saes.sqrtl1 import SqrtL1
from sae_lab.saes.switch import Switch
from sae_lab.saes.tokenized import Tokenized
from sae_lab.saes.topk import TopK
from sae_lab.saes.transcoder import SkipTranscoder, Transcoder
from sae_lab.saes.vq import VQ

FAMILIES: dict[str, type[SparseCoder]] = {
    cls.__name__: cls
    for cls in (
        L1, Tied, SqrtL1, PAnneal, Hoyer, SmoothL0, ProLU, Gated, JumpReLU,
        TopK, LeakyTopK, BatchTopK, Matryoshka, Ordered, Spline, Switch, Tokenized,
        Transcoder, SkipTranscoder, Crosscoder, MatrixSAE, VQ,
    )
}  # fmt: skip

__all__ = [
    *FAMILIES, "FAMILIES", "SparseCoder", "inform", "optimise_codes", "realign", "resample", "unsuppress",
]  # fmt: skip
