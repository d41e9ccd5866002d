"""What the evals of codes share: sampled rows, a coder's codes of them, and checks of the coder."""

import math
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sae_lab.activations.store import Rows, Store
from sae_lab.arguments import check_least, is_finite
from sae_lab.saes import kernels
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Codes

FOLDS = 10  # groups of documents, for the jackknife
_CHUNK = 2048


class Sample(NamedTuple):
    """Rows on which an eval is measured. number: their place in x. documents: clusters of dependent rows; each row of a
    tensor is a cluster. tokens: ids, from a store."""

    x: Tensor
    number: Int[Tensor, " rows"]
    documents: Int[Tensor, " rows"]
    tokens: Int[Tensor, " rows"] | None = None

    @property
    def folds(self) -> Int[Tensor, " rows"]:
        """Each row's group of documents, a number from 0 to 9."""
        return self.documents.unique(return_inverse=True)[1] % FOLDS


def sample(x: Tensor | Store, tokens: int, coder: SparseCoder) -> Sample:
    """At most ``tokens`` rows, spread evenly over a tensor, or over a store's held-out rows (over all if it has none).

    ValueError for fewer than two rows, NaN, and a coder in training mode.
    """
    require(coder)
    check_least(2, tokens=tokens)
    if isinstance(x, Tensor):
        where = evenly(len(x), min(tokens, len(x)))
        found = Sample(Rows(x).x[where].float().cpu(), where, where)
    else:
        store = x if x.reads else x.at(coder.site)
        unseen = store._split[1]
        every = len(unseen) if len(unseen) else len(store)
        where = evenly(every, min(tokens, every)).numpy()
        where = unseen[where] if len(unseen) else where
        rows = torch.cat([store._x(part) for part in np.array_split(where, 1 + len(where) // 8192)])
        found = Sample(rows, torch.from_numpy(where), store.rows(where, "document"), store.rows(where, "token"))
    if len(found.x) < 2:
        raise ValueError(f"x must have at least 2 rows, got {len(found.x)}")
    if not is_finite(found.x):
        raise ValueError("x holds NaN or Inf: activations must be finite")
    return found


def evenly(rows: int, wanted: int) -> Int[Tensor, " wanted"]:
    """``wanted`` row numbers, spread over all."""
    return torch.linspace(0, rows - 1, wanted, dtype=torch.float64).round().long()


@torch.no_grad()
def encoded(coder: SparseCoder, rows: Sample) -> tuple[Codes, Tensor]:
    """(codes that are not 0, as ``SparseCoder.strengths``; x_hat) of all rows, on the CPU."""
    device = coder.W_dec.device
    tokens = [None] * len(rows.x) if rows.tokens is None else rows.tokens.split(_CHUNK)
    parts, x_hats = [], []
    for x, ids in zip(rows.x.split(_CHUNK), tokens, strict=False):
        out = coder(x.to(device), None if ids is None else ids.to(device))
        parts.append(coder.strengths(nonzero(out.codes), x.to(device)))
        x_hats.append(out.x_hat.cpu())
    return kernels.joined(parts, coder.d_sae), torch.cat(x_hats)


def nonzero(codes: Codes | Tensor) -> Codes:
    """The codes that are not 0, negative ones among them."""
    if isinstance(codes, Tensor):
        return kernels.where(codes, codes != 0)
    on = codes.values != 0
    before = torch.cat([on.new_zeros(1, dtype=torch.long), on.long().cumsum(0)])
    return Codes(codes.values[on], codes.features[on], before[codes.offsets], codes.d_sae)


def summed(values: Tensor, place: Tensor, *shape: int) -> Tensor:
    """Sums in double precision of the values at each place of a tensor of this shape; places count row by row."""
    return torch.zeros(math.prod(shape), dtype=torch.float64).index_add(0, place, values.double()).view(shape)


def share_of(which: Tensor, among: Tensor) -> float:
    """The share of ``among`` in which ``which`` is true; NaN if ``among`` is empty."""
    return float(which[among].float().mean())


def without_each(sums: Tensor) -> Tensor:
    """For each fold the sum over all other folds, from sums over each fold along the first axis."""
    return sums.sum(0) - sums


def by_content(codes: Codes) -> Int[Tensor, " d_sae"]:
    """Features by the sum of their codes, the largest first: with this order random draws do not depend on features'
    numbers."""
    return summed(codes.values.abs(), codes.features, codes.d_sae).argsort(descending=True, stable=True)


def named(coder: SparseCoder) -> str:
    """A coder's family and settings, such as ``TopK(seed=0, k=32)``."""
    settings = {key: v for key, v in coder.config.items() if key not in ("d_in", "d_sae", "d_out") and v is not None}
    return f"{type(coder).__name__}({', '.join(f'{key}={v}' for key, v in settings.items())})"


def require(*coders: SparseCoder, reconstructs: str = "") -> None:
    """ValueError for a coder in training mode; with the name of an eval in ``reconstructs``, also for a transcoder."""
    for coder in coders:
        if coder.training:
            raise ValueError(f"evals need coders in eval mode, got {named(coder)} in training: call sae.eval()")
        if reconstructs and coder.transcodes:
            raise ValueError(f"{reconstructs} needs coders that reconstruct what they read, {named(coder)} does not")


def require_choice(name: str, value: str, choices: Any) -> None:
    """ValueError for a value that is not among those of a ``Literal``."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
