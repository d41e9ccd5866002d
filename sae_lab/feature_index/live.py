"""What is asked of features beyond the store: a text that was just typed, and two features side by side."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from sae_lab.activations.reading import read_some
from sae_lab.lm.model import LM
from sae_lab.lm.network import Network
from sae_lab.saes.base import SparseCoder


@dataclass(frozen=True)
class Scored:
    """One feature on a text. values: its activation at each token, None where the mask leaves the token out; ``peak``:
    the index of the largest."""

    feature: int
    tokens: list[str]
    values: list[float | None]
    peak: int

    @property
    def max(self) -> float:
        return max((v for v in self.values if v is not None), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __repr__(self) -> str:
        marked = [f"[{t}]" if v else t for t, v in zip(self.tokens, self.values, strict=True)]
        return f"feature {self.feature} on {''.join(marked)!r}: max {self.max:.2f}"


def score(lm: Network, coder: SparseCoder, feature: int, text: Any) -> Scored:
    """The activation of one feature at each token of a text, in one pass that ends at the coder's site; of a network
    that is no language model, at each place of one input.

    ValueError for a text beyond the model's length, and for several inputs.
    """
    if isinstance(text, str) and not isinstance(lm, LM):
        raise ValueError(f"{lm} reads no text: score an input from Python, index.score(feature, x)")
    batch = lm._batch(text, coder.site)
    if len(batch.ids) != 1:
        raise ValueError(f"one input is scored at a time, got {len(batch.ids)}: pass x[:1]")
    codes, keep = read_some(lm, coder, [coder.feature(feature)], batch)
    values = [round(v, 4) if k else None for v, k in zip(codes[0, :, 0].tolist(), keep[0].tolist(), strict=True)]
    peak = max(range(len(values)), key=lambda i: -1.0 if values[i] is None else values[i] or 0.0)
    labels = [t.label for t in lm.tokens(text)] if isinstance(lm, LM) else [str(i) for i in batch.ids[0].tolist()]
    return Scored(feature, labels, values, peak)


@dataclass(frozen=True)
class Pair:
    """Two features side by side. cosine: of their decoder rows. both: tokens of the store on which both fire; jaccard:
    both / either. only: tokens on which one fires without the other."""

    features: tuple[int, int]
    cosine: float
    both: int
    only: tuple[int, int]
    jaccard: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pair(coder: SparseCoder, a: int, b: int, rows_a: np.ndarray, rows_b: np.ndarray) -> Pair:
    """Two features of a coder, from the rows of the store on which each fires."""
    first, second = (coder.W_dec[i].detach().flatten().float() for i in (a, b))
    cosine = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
    both = len(np.intersect1d(rows_a, rows_b, assume_unique=True))
    either = len(rows_a) + len(rows_b) - both
    return Pair((a, b), cosine, both, (len(rows_a) - both, len(rows_b) - both), both / either if either else 0.0)
