"""Features of a token's position in its context."""

from collections.abc import Iterator
from dataclasses import field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.activations.contexts import trained_context
from sae_lab.activations.reading import read_codes
from sae_lab.activations.store import Store
from sae_lab.arguments import Count, as_annotated, check_least
from sae_lab.lm.model import LM
from sae_lab.lm.text import Documents, as_text
from sae_lab.lm.tokens import pad
from sae_lab.results import Result, figure, result
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Codes

STRONG = 0.8  # R² from which a feature is called positional
ROTATED = "positions rotated"
Pieces = Iterator[tuple[Codes, np.ndarray]]  # codes of tokens in the order of the text, and their positions


@result
class Positional(Result):
    """Result of ``sl.evals.positional``. ``r2``, ``r2_shuffled`` (control), ``firings``: of every feature; R² is NaN
    where a feature never fires. ``profile``: mean activation by bin, ``bins d_sae``; ``edges``: where bins start."""

    strong: int = figure(f"features of R2 > {STRONG}", "of {features:,}", control="strong_shuffled",
                         control_name=ROTATED, digits=0)  # fmt: skip
    strong_shuffled: int
    largest: float = figure("largest R2", "{_of_best}", control="largest_shuffled", control_name=ROTATED)
    largest_shuffled: float
    median: float = figure("median R2", control="median_shuffled", control_name=ROTATED, digits=4)
    median_shuffled: float
    mean: float = figure("mean R2", "share of a feature's variance that position explains", control="mean_shuffled",
                         control_name=ROTATED, digits=4)  # fmt: skip
    mean_shuffled: float
    features: int
    tokens: int
    bins: int
    min_firings: int
    best: tuple[int, ...]
    mask: str
    edges: np.ndarray = field(repr=False, compare=False)
    r2: Tensor = field(repr=False, compare=False)
    r2_shuffled: Tensor = field(repr=False, compare=False)
    firings: Tensor = field(repr=False, compare=False)
    profile: Tensor = field(repr=False, compare=False)

    _below = (
        "{tokens:,} tokens, {bins} bins of positions; features that fire on {min_firings} tokens or more; chance is "
        "{_chance:.4f} for one without bursts; {mask}"
    )

    @property
    def _of_best(self) -> str:
        return f"of feature {self.best[0]}" if self.best else ""

    @property
    def _chance(self) -> float:
        return (self.bins - 1) / max(1, self.tokens - 1)

    @property
    def _counted(self) -> dict[str, np.ndarray]:
        """The columns for the features that count, the most positional first."""
        chosen = (self.firings >= self.min_firings).nonzero().flatten()
        chosen = chosen[self.r2[chosen].nan_to_num(-torch.inf).argsort(descending=True, stable=True)]
        columns = {name: getattr(self, name)[chosen].numpy() for name in ("r2", "r2_shuffled", "firings")}
        return {"feature": chosen.numpy()} | columns

    _records = "_counted"


@as_annotated
@torch.no_grad()
def positional(
    coder: SparseCoder,
    lm: LM,
    data: Store | Documents,
    tokens: int = 100_000,
    bins: int = 32,
    context: Count | None = None,
    min_firings: Count = 30,
    seed: int = 0,
) -> Positional:
    """``sl.evals.positional(sae, lm, store)``: share of each feature's variance that a token's position explains.

    R² = Σ_b n_b·(m_b − m)²/Σ(f − m)², b bins of positions, m_b a feature's mean activation in bin b; zeros count. One
    pass in O(active codes), with memory for ``bins d_sae``. Control: each context's positions rotated by a random
    number of tokens, which leaves bursts of activity whole. Chance is (bins − 1)/(tokens − 1) for independent firings,
    and (bins − 1)/(contexts − 1) if all firings of a context are dependent.

    Args:
        data: a store at the coder's site (read in its order), or text, of which the model reads ``tokens``.
        bins: of positions, of equal width; fewer where contexts are shorter. min_firings: tokens on which a feature
            must fire to be counted (R² of a feature that fires once is 1/n_b).
        context: for text: tokens the model sees at once; None: the coder's training context, else 128.

    Raises ValueError for a store of another width, and if no token or no feature is left to measure.

    Positional features of the first layer: Chughtai & Lau 2024.
    """
    check_least(2, bins=bins, tokens=tokens)
    if isinstance(data, Store) and data.width != coder.d_in:
        raise ValueError(f"the coder reads d_in={coder.d_in}, the store holds width {data.width}: wrong site or coder")
    with coder.evaluating():
        if isinstance(data, Store):
            length = int(data.rows(np.arange(min(tokens, len(data))), "position").max()) + 1
            pieces, mask = _of_store(coder, data, tokens), str(data.mask)
        else:
            length = trained_context(coder) if context is None else context
            pieces, mask = _of_text(coder, lm, data, tokens, length), str(coder.mask or lm.mask())
        edges = np.unique(np.linspace(0, length, bins + 1).astype(int))[:-1]
        tally = _Tally(len(edges), coder.d_sae, seed)
        for codes, positions in pieces:
            tally.add(codes, positions, edges)
    if tally.tokens < 2:
        raise ValueError("no token is left to measure: the mask leaves out all of them, or the text is empty")
    r2, control = (variance_by_bin(tally.sums[i], tally.counts[i], tally.squares) for i in (0, 1))
    counted = (tally.firings >= min_firings) & r2.isfinite()
    if not counted.any():
        varies = " and varies" if (tally.firings >= min_firings).any() else ""
        raise ValueError(
            f"no feature fires on min_firings={min_firings} of {tally.tokens:,} tokens{varies}: read more, or lower it"
        )
    order = torch.where(counted, r2, -1.0).argsort(descending=True)[: min(10, int(counted.sum()))]
    a, b = r2[counted], control[counted]
    return Positional(
        strong=int((a > STRONG).sum()),
        strong_shuffled=int((b > STRONG).sum()),
        largest=float(a.max()),
        largest_shuffled=float(b.max()),
        median=float(a.median()),
        median_shuffled=float(b.median()),
        mean=float(a.mean()),
        mean_shuffled=float(b.mean()),
        features=int(counted.sum()),
        tokens=tally.tokens,
        bins=len(edges),
        min_firings=min_firings,
        best=tuple(order.tolist()),
        mask=mask,
        edges=edges,
        r2=r2.float(),
        r2_shuffled=control.float(),
        firings=tally.firings,
        profile=(tally.sums[0] / tally.counts[0].clamp(min=1)[:, None]).float(),
    )


class _Tally:
    """Sums over tokens from which every feature's R² is computed, with true positions and with rotated ones."""

    def __init__(self, bins: int, d_sae: int, seed: int):
        self.sums = torch.zeros(2, bins, d_sae, dtype=torch.double)
        self.counts = torch.zeros(2, bins, dtype=torch.double)
        self.squares, self.firings = torch.zeros(d_sae, dtype=torch.double), torch.zeros(d_sae, dtype=torch.long)
        self.random, self.tokens = np.random.default_rng(seed), 0

    def add(self, codes: Codes, positions: np.ndarray, edges: np.ndarray) -> None:
        rows, features, values = codes.rows.cpu(), codes.features.cpu(), codes.values.cpu().double()
        for i, at in enumerate((positions, rotated(positions, self.random))):
            bins = torch.from_numpy(np.searchsorted(edges, at, side="right") - 1)
            self.sums[i].view(-1).index_add_(0, bins[rows] * codes.d_sae + features, values)
            self.counts[i] += torch.bincount(bins, minlength=len(edges))
        self.squares.index_add_(0, features, values.square())
        self.firings += torch.bincount(features, minlength=codes.d_sae)
        self.tokens += len(positions)


def rotated(positions: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each context's positions, rotated by a random number of tokens. A context ends where positions stop rising."""
    out = positions.copy()
    starts = np.flatnonzero(np.diff(positions, prepend=positions[0] + 1 if len(positions) else 0) <= 0)
    for first, end in zip(starts, np.append(starts[1:], len(positions)), strict=True):
        out[first:end] = np.roll(positions[first:end], random.integers(end - first))
    return out


def variance_by_bin(
    sums: Float[Tensor, "bins d_sae"], counts: Float[Tensor, " bins"], squares: Float[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    """R² of each feature: (Σ_b S_b²/n_b − S²/n)/(Σf² − S²/n); NaN for one that never varies."""
    n, total = counts.sum(), sums.sum(0)
    full = counts > 0
    between = (sums[full].square() / counts[full, None]).sum(0) - total.square() / n
    variance = squares - total.square() / n
    return torch.where(variance > 1e-12 * squares.clamp(min=1e-30), between / variance, torch.nan)


def _of_store(coder: SparseCoder, store: Store, tokens: int) -> Pieces:
    for rows, x in store.blocks(2048):
        if rows[0] >= tokens:
            return
        rows, x = rows[: tokens - rows[0]], x[: tokens - rows[0]]
        yield coder.sparse_codes(x.to(coder.W_dec.device)), store.rows(rows, "position").numpy()


def _of_text(coder: SparseCoder, lm: LM, data: Documents, tokens: int, length: int) -> Pieces:
    rows, seen = [], 0
    for context in as_text(data).contexts(lm.tokenizer, lm.prefix_id, length):
        rows.append(context.ids)
        seen += len(context.ids)
        if seen >= tokens:
            break
    for start in range(0, len(rows), 8):
        batch = pad(rows[start : start + 8])
        codes, keep = read_codes(lm, coder, batch)
        yield codes, batch.positions[keep].numpy()
