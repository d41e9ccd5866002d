"""Activation patching: which places of a model carry what makes it answer as it does, in truth and by one gradient."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.circuits.gradients import gradients
from sae_lab.circuits.metric import ROWS, Metric, copied, measured, numbers, of_metric, paired, placed, require_here
from sae_lab.lm.model import LM
from sae_lab.results import frame_text
from sae_lab.types import Site, TokenBatch, Write

TOKENS = 512  # of copies that go through the model together: their logits are many
KINDS = ("resid_post", "attn_out", "mlp_out")
Cell = tuple[str, int, int]  # kind, layer, position


@dataclass(frozen=True, repr=False)
class PatchGrid:
    """Result of ``circuits.patching`` and ``circuits.patching_estimate``.

    Attributes:
        values: "kind layer pos": the share of the metric that one patch brings over, (patched - base) / (source -
            base), of means over prompts; 0: nothing, 1: all of it.
        base, source: the metric's mean over the prompts, and over the sources.
        kinds, layers, positions: the axes. tokens: what stands at the positions of the first prompt, and of its source.
        estimated: whether values are estimates by gradient.
    """

    values: Float[Tensor, "kind layer pos"]
    base: float
    source: float
    kinds: tuple[str, ...]
    layers: list[int]
    positions: list[int]
    tokens: list[tuple[str, str]] = field(default_factory=list)
    estimated: bool = False

    def to_pandas(self):
        """One row a patch."""
        import pandas as pd

        table = [
            {"kind": kind, "layer": layer, "position": position, "effect": float(self.values[i, j, p])}
            for i, kind in enumerate(self.kinds)
            for j, layer in enumerate(self.layers)
            for p, position in enumerate(self.positions)
        ]
        return pd.DataFrame(table)

    def __repr__(self) -> str:
        best = self.to_pandas().sort_values("effect", ascending=False).head(8)
        table = frame_text(best)
        what = "the strongest patches, estimated by gradient" if self.estimated else "the strongest patches"
        return f"metric {self.base:.3f} → {self.source:.3f} with the sources; {what}:\n{table}"


@as_annotated
def patching(
    lm: LM,
    prompts: Sequence[str],
    sources: Sequence[str],
    metric: Metric,
    *,
    kinds: Sequence[str] = KINDS,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> PatchGrid:
    """Activation patching: the prompts run again and again, each time with one activation of the sources' run.

    At every kind, layer and position one patch takes what stands there in each source's run into its prompt's (Meng et
    al. 2022, arXiv:2202.05262; "denoising" where the prompts are the corrupted ones).

    Args:
        prompts, sources: as many, of the same token lengths all together.
        metric: (logits, tokens) -> a number for each row, such as ``logit_difference``.
        layers, positions: None: all; position 0, the same everywhere, is left out.

    Raises ValueError for prompts and sources that do not pair up, a metric that gives no number a row, and one that is
    the same for both.
    """
    pair = _Pair.of(lm, prompts, sources, metric)
    layers, positions = pair.axes(layers, positions)
    found: dict[Cell, float] = {}
    for part in _patched(pair, [(k, layer, p) for k in kinds for layer in layers for p in positions]):
        found |= part
    values = torch.tensor([[[found[k, layer, p] for p in positions] for layer in layers] for k in kinds])
    values = values.view(len(kinds), len(layers), len(positions))
    return PatchGrid(values, pair.base, pair.source, tuple(kinds), layers, positions, pair.tokens(positions))


@as_annotated
def patched_cells(
    lm: LM, prompts: Sequence[str], sources: Sequence[str], metric: Metric, cells: Iterable[Cell]
) -> Iterator[dict[Cell, float]]:
    """Patches of some cells, (kind, layer, position), as they are done: {cell: share of the metric}, a few at a time.

    The same numbers as ``patching``'s; what is not asked of the iterator is not computed. Raises ValueError as it does.
    """
    pair = _Pair.of(lm, prompts, sources, metric)
    cells = [(str(kind), int(layer), int(position)) for kind, layer, position in cells]
    pair.axes(None, [p for _, _, p in cells])
    return _patched(pair, cells)


@as_annotated
def patching_estimate(
    lm: LM,
    prompts: Sequence[str],
    sources: Sequence[str],
    metric: Metric,
    *,
    kinds: Sequence[str] = KINDS,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> PatchGrid:
    """Attribution patching: (x_source - x)·dm/dx, at every kind, layer and position by one backward pass.

    What each patch would do if the metric were linear in the activation (Nanda 2023; Syed et al. 2023,
    arXiv:2310.10348), in the unit of ``patching``: the share of the metric that it brings over. Arguments and errors
    are those of ``patching``; the metric must be differentiable, and the model on this machine. What attention and MLPs
    add is small in the stream, and estimated well; the whole stream at a token is a large change, and its estimate can
    be far off (benchmarks/patching.py).
    """
    require_here(lm, "patching_estimate")
    batch, theirs = paired(lm, prompts, sources)
    _require_slope(lm, metric, batch)
    chosen = list(range(lm.n_layers)) if layers is None else list(layers)
    sites = [Site(kind, layer) for kind in kinds for layer in chosen]
    (x, base), (given, source) = (_read(lm, one, sites, metric) for one in (batch, theirs))
    pair = _Pair(lm, batch, theirs, metric, base, source)
    layers, positions = pair.axes(layers, positions)
    (slopes,) = gradients(lm, batch, sites, lambda _, logits: [metric(logits, batch).sum()])
    changes = [((given[s] - x[s]) * slopes[s]).sum(-1).mean(0)[positions].cpu() for s in sites]
    values = torch.stack(changes).view(len(kinds), len(layers), len(positions)) / (pair.source - pair.base)
    return PatchGrid(values, base, source, tuple(kinds), layers, positions, pair.tokens(positions), estimated=True)


def _read(lm: LM, batch: TokenBatch, sites: list[Site], metric: Metric) -> tuple[dict[Site, Tensor], float]:
    """The activations at the sites and the metric's mean, by one pass."""
    acts, value = lm.run(batch, sites, logits=partial(of_metric, metric=metric))
    return acts, float(numbers(value, batch).float().mean())


def _require_slope(lm: LM, metric: Metric, batch: TokenBatch) -> None:
    """ValueError for a metric that carries no gradient."""
    with torch.enable_grad():
        value = metric(torch.zeros(*batch.ids.shape, lm.vocab_size, requires_grad=True), batch)
    if not (isinstance(value, Tensor) and value.requires_grad):
        raise ValueError(
            "an estimate by gradient needs a metric that is differentiable in the logits, and this one is not: leave "
            "out argmax, comparisons, .item() and .detach(), or use circuits.patching, which needs none"
        )


@dataclass(frozen=True)
class _Pair:
    """Prompts, their sources, and the metric's mean over each."""

    lm: LM
    batch: TokenBatch
    theirs: TokenBatch
    metric: Metric
    base: float
    source: float

    @staticmethod
    def of(lm: LM, prompts: Sequence[str], sources: Sequence[str], metric: Metric) -> "_Pair":
        batch, theirs = paired(lm, prompts, sources)
        base, source = (float(measured(lm, one, metric).float().mean()) for one in (batch, theirs))
        return _Pair(lm, batch, theirs, metric, base, source)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.base) and math.isfinite(self.source)):
            raise ValueError(f"a metric is finite, this one is {self.base} for prompts and {self.source} for sources")
        if abs(self.base - self.source) < 1e-6 * max(abs(self.base), abs(self.source)) or self.base == self.source:
            raise ValueError(  # a difference of rounding is none
                f"the metric is {self.base:.4g} for the prompts and for the sources too, so a patch has nothing to "
                "bring over: take sources that the model answers otherwise, or another metric"
            )

    def axes(self, layers: Sequence[int] | None, positions: Sequence[int] | None) -> tuple[list[int], list[int]]:
        """Layers and positions asked for, or all but position 0. ValueError for a position that is not there."""
        length = self.batch.ids.shape[1]
        layers = list(range(self.lm.n_layers)) if layers is None else list(layers)
        positions = list(range(1, length)) if positions is None else list(positions)
        if beyond := [p for p in positions if not 0 <= p < length]:
            raise ValueError(f"position {beyond[0]} is beyond the prompts, which have {length} tokens")
        return layers, positions

    def tokens(self, positions: list[int]) -> list[tuple[str, str]]:
        ours, theirs = (self.lm.tokens(one.ids[0].tolist()) for one in (self.batch, self.theirs))
        return [(ours[p].label, theirs[p].label) for p in positions]


def _patched(pair: _Pair, cells: list[Cell]) -> Iterator[dict[Cell, float]]:
    """Shares of the metric, a pass at a time: the positions of one site go together, as copies of the prompts."""
    by_site: dict[Site, list[int]] = {}
    for kind, layer, position in cells:
        by_site.setdefault(Site(kind, layer), []).append(position)
    n, length = pair.batch.ids.shape
    at_once = max(1, min(ROWS, TOKENS // length) // n)
    for site, positions in by_site.items():
        given = pair.lm.run(pair.theirs, [site], logits=False)[0][site]
        for start in range(0, len(positions), at_once):
            part = positions[start : start + at_once]
            copies = copied(pair.batch, len(part))
            where = torch.tensor(part).repeat_interleave(n)
            put = given[:, part].transpose(0, 1).flatten(0, 1)  # of each copy, what it gets
            write = Write(site, partial(placed, where=where, put=put))
            means = measured(pair.lm, copies, pair.metric, [write]).float().view(len(part), n).mean(1)
            shares = (means - pair.base) / (pair.source - pair.base)
            yield {(site.kind, site.layer or 0, p): float(v) for p, v in zip(part, shares, strict=True)}
