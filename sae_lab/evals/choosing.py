"""Choose L0: decoder cosines of coders trained at several L0 (Chanin & Garriga-Alonso 2025, arXiv:2508.16560)."""

from collections.abc import Iterable
from dataclasses import field

import numpy as np
import torch
from torch import Tensor

from sae_lab.activations.store import Store
from sae_lab.arguments import as_annotated
from sae_lab.evals.sampling import encoded, evenly, named, require, sample
from sae_lab.results import Result, result
from sae_lab.saes.base import SparseCoder

_TAG = 0x434F4E54524F4C  # sets the control's seeds apart from those with which coders start
_CHUNK = 2048
MOST_PROJECTIONS = 2**24  # entries of x·W_decᵀ that are sorted at once


@result
class L0Choice(Result):
    """Result of ``sl.evals.choose_l0``: one entry per coder, in ascending order of L0.

    Attributes:
        l0: active features per row; fvu: fraction of variance unexplained, on the same rows.
        c_dec: mean absolute cosine of two decoder rows; c_dec_random: of d_sae random rows, the control.
        s_n: the (n·rows)-th largest decoder projection, in units of x; s_n_centred: the same, with the rows' mean
            subtracted from x instead of b_dec.
        projected: the number of rows that s_n uses.
    """

    names: tuple[str, ...]
    l0: tuple[float, ...]
    fvu: tuple[float, ...]
    c_dec: tuple[float, ...]
    s_n: tuple[float, ...]
    s_n_centred: tuple[float, ...]
    c_dec_random: float
    n: int
    rows: int
    projected: int
    coders: tuple[SparseCoder, ...] = field(compare=False)

    @property
    def best_index(self) -> int:
        """The index of the coder whose c_dec is least."""
        return int(np.argmin(self.c_dec))

    @property
    def best(self) -> SparseCoder:
        """The coder whose c_dec is least."""
        return self.coders[self.best_index]

    @property
    def best_l0(self) -> float:
        """The L0 of ``best``."""
        return self.l0[self.best_index]

    @property
    def at_edge(self) -> bool:
        """Whether the least c_dec is at an end of the L0s tried: a smaller one may lie beyond."""
        return self.best_index in (0, len(self.l0) - 1)

    _records = ("name=names", "l0", "fvu", "c_dec", "s_n", "s_n_centred")
    _columns = {  # noqa: RUF012
        "": "{name}", "L0": "{l0:.2f}", "FVU": "{fvu:.4f}", "c_dec": "{c_dec:.4f}", "s_n": "{s_n:.4f}",
        "centred": "{s_n_centred:.4f}", " ": "{mark}",
    }  # fmt: skip
    _mark = "< least"
    _below = "random rows: c_dec {c_dec_random:.4f}; n = {n}; {rows:,} rows{_remark}"

    @property
    def _remark(self) -> str:
        text = f" ({self.projected:,} for s_n)" * (self.projected < self.rows)
        return text + "; the least c_dec is at an end of the L0s tried: train beyond it" * self.at_edge


@as_annotated
@torch.no_grad()
def choose_l0(
    coders: Iterable[SparseCoder], x: Tensor | Store, *, n: int | None = None, tokens: int = 16_384
) -> L0Choice:
    """``sl.evals.choose_l0(coders, store)``: choose among coders of one width and several L0 by their decoders.

    c_dec = mean over pairs i < j of |cos(W_dec[i], W_dec[j])|: a coder whose L0 is too low mixes correlated features
    into its directions, one whose L0 is too high finds degenerate ones, and both raise the cosines. s_n = the (n·B)-th
    largest of the B·d_sae entries of (x − b_dec)·W_decᵀ, index counted from 0: rows of x project even on mixed
    directions whose features are off. Both should be least at the true L0, while FVU keeps falling beyond it. The paper
    takes n from somewhat above the guessed L0 up to d_sae/2, prefers c_dec, and where c_dec is flat takes the elbow on
    the side of low L0; ``best`` has the least c_dec. Rows of W_dec have unit norm here; a row of zeros has cosine 0
    with all.

    On planted worlds (tests/evals/test_choosing.py): averaged over seeds, c_dec is least at the true L0 if features are
    correlated and fewer than dimensions; a single seed can miss it by 30 %. With more features than dimensions c_dec
    falls with L0 throughout. s_n as published is *largest* just below the true L0, for every n tried: b_dec
    absorbs the mean of x in all coders but the one with the true L0. ``s_n_centred``, which sae_lab adds, subtracts the
    rows' mean: its flat minimum lies at 0.6 to 1.3 times the true L0 for n of 1.2 to 1.8 times it; n = d_sae/2 fails.

    Args:
        coders: two or more trained coders in eval mode, of equal d_in and d_sae, that reconstruct what they read.
        x: activations ``rows d_in`` (spread evenly over them), or a Store (its rows that no training batch held).
        tokens: how many rows at most.

    Raises ValueError for coders that cannot be compared, a decoder of zeros, and an x of another width.
    """
    coders = list(coders)
    if len(coders) < 2:
        raise ValueError(f"choose_l0 compares coders of several L0: give at least two, got {len(coders)}")
    widths = sorted({(c.d_in, c.d_sae) for c in coders})
    if len(widths) > 1:
        raise ValueError(f"coders must have equal d_in and d_sae, got {widths}: c_dec depends on both")
    require(*coders, reconstructs="choose_l0")
    if flat := [named(c) for c in coders if int(c.W_dec.detach().flatten(1).any(1).sum()) < 2]:  # c_dec would be 0
        raise ValueError(f"choose_l0 compares decoder rows, {flat[0]} has fewer than two not 0: leave it out")
    most = widths[0][1] // 2
    n = most if n is None else n
    if not 1 <= n <= most:
        raise ValueError(f"n must be from 1 to d_sae/2={most}, above the L0 you expect; None is d_sae/2; got {n}")
    rows = sample(x, tokens, coders[0])
    variance = float((rows.x - rows.x.mean(0, dtype=torch.float64)).pow(2).sum())
    projected = min(len(rows.x), max(256, MOST_PROJECTIONS // coders[0].d_sae))
    few = rows.x[evenly(len(rows.x), projected)]
    middle = few.flatten(1).mean(0)
    measured = []
    for coder in coders:
        codes, x_hat = encoded(coder, rows)
        active, error = len(codes.values) / len(rows.x), float((x_hat - rows.x).pow(2).sum(dtype=torch.float64))
        projections = (s_n(coder, few, n), s_n(coder, few, n, middle))
        measured.append((active, error / variance, c_dec(coder.W_dec), *projections))
    order = sorted(range(len(coders)), key=lambda i: measured[i][0])
    l0, fvu, cosine, projection, centred = zip(*(measured[i] for i in order), strict=True)
    random = np.random.default_rng(np.random.SeedSequence([_TAG])).standard_normal(
        tuple(coders[0].W_dec.shape), dtype=np.float32
    )
    return L0Choice(
        names=tuple(named(coders[i]) for i in order),
        l0=l0,
        fvu=fvu,
        c_dec=cosine,
        s_n=projection,
        s_n_centred=centred,
        c_dec_random=c_dec(torch.from_numpy(random)),
        n=n,
        rows=len(rows.x),
        projected=projected,
        coders=tuple(coders[i] for i in order),
    )


def c_dec(W_dec: Tensor) -> float:
    """Mean absolute cosine over all pairs of rows of ``d_sae d``, a block at a time: d_sae² cosines are never held."""
    rows = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
    total = 0.0
    for start in range(0, len(rows), _CHUNK):
        block = rows[start : start + _CHUNK]
        total += float((block @ rows[start:].T).abs().triu(1).sum(dtype=torch.float64))
    return total / (len(rows) * (len(rows) - 1) / 2)


@torch.no_grad()
def s_n(coder: SparseCoder, x: Tensor, n: int, origin: Tensor | None = None) -> float:
    """The (n·B)-th largest projection of B rows x − origin (None: b_dec, or what an ``input_norm`` makes
    of it) on unit decoder rows, counted from 0."""
    rows = coder.directions()
    x = x.to(rows.device)
    origin = coder.silent(x).flatten(1) if origin is None else origin.to(rows.device)
    z = ((x.flatten(1) - origin) @ rows.T).flatten()
    return float(z.kthvalue(len(z) - n * len(x)).values)
