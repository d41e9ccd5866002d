"""Activation patching: which layers and positions of a model cause its answer, by patch and by gradient."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.circuits.gradients import gradients, require_slope
from sae_lab.circuits.metric import ROWS, Metric, measured, placed
from sae_lab.circuits.pairs import Runs, both_runs, check_positions, copied, require_here
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Texts
from sae_lab.results import Result, by_column, result
from sae_lab.types import Site, Write

TOKENS = 512  # of copies in one batch, since their logits take much memory
KINDS = ("resid_post", "attn_out", "mlp_out")
Cell = tuple[str, int, int]  # kind, layer, position


@result
class PatchGrid(Result):
    """Result of ``circuits.patching`` and ``circuits.patching_estimate``. Its table has one row per patch.

    Attributes:
        values: "kind layer pos": the share of the metric's change that one patch causes, (patched - base) / (source -
            base), of means over prompts; 0: none of it, 1: all of it.
        base, source: the metric's mean over the prompts, and over the sources.
        kinds, layers, positions: the axes. tokens: for each position, the first prompt's token and its source's.
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

    _records, _shown = "_patches", 8
    _above = "metric {base:.3f} → {source:.3f} with the sources; the strongest patches{_how}:"

    @property
    def _how(self) -> str:
        return ", estimated by gradient" if self.estimated else ""

    @property
    def _patches(self) -> dict[str, list[Any]]:
        rows = product(self.kinds, self.layers, self.positions)
        effects = self.values.flatten().tolist()
        return by_column("kind layer position effect", [(*r, e) for r, e in zip(rows, effects, strict=True)])

    def _printed(self, table: Any) -> Any:
        return table.sort_values("effect", ascending=False)


@as_annotated
def patching(
    lm: LM,
    prompts: Texts,
    sources: Texts,
    metric: Metric,
    *,
    kinds: Sequence[str] = KINDS,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> PatchGrid:
    """``patching(lm, prompts, sources, metric)``: activation patching, one run of the prompts for each kind, layer and
    position, with that activation taken from the sources' run (Meng et al. 2022, arXiv:2202.05262; "denoising" if the
    prompts are the corrupted ones).

    Args:
        prompts, sources: texts, or chats; equal numbers, all of one token length.
        metric: (logits, tokens) -> a number for each row, such as ``logit_difference``.
        layers, positions: None: all; position 0, whose activation no prompt changes, is left out.

    Raises ValueError for prompts and sources that do not pair up, a metric that does not give one number a row, and
    one that is the same for prompts and sources.
    """
    runs = both_runs(lm, prompts, sources, metric)
    layers, positions = _axes(lm, runs, layers, positions)
    found: dict[Cell, float] = {}
    for part in _patched(lm, runs, metric, [(k, layer, p) for k in kinds for layer in layers for p in positions]):
        found |= part
    values = torch.tensor([[[found[k, layer, p] for p in positions] for layer in layers] for k in kinds])
    return _grid(lm, runs, values, kinds, layers, positions)


@as_annotated
def patched_cells(
    lm: LM, prompts: Texts, sources: Texts, metric: Metric, cells: Iterable[Cell]
) -> Iterator[dict[Cell, float]]:
    """``for found in patched_cells(lm, prompts, sources, metric, cells)``: patch some cells, (kind, layer, position),
    and yield the results as they come: {cell: share of the metric's change}, a few at a time.

    The numbers are those of ``patching``; a cell is computed when the iterator gets to it. Raises ValueError as
    ``patching``.
    """
    runs = both_runs(lm, prompts, sources, metric)
    cells = [(str(kind), int(layer), int(position)) for kind, layer, position in cells]
    _axes(lm, runs, None, [p for _, _, p in cells])
    return _patched(lm, runs, metric, cells)


@as_annotated
def patched_together(lm: LM, prompts: Texts, sources: Texts, metric: Metric, cells: Iterable[Cell]) -> float:
    """``patched_together(lm, prompts, sources, metric, cells)``: all these cells, (kind, layer, position), patched in
    one run: the share of the metric's change that they cause together.

    It is not the sum of what each causes alone (``patched_cells``): cells on one path carry the same effect, and a
    patched cell no longer hears of the patches before it. Raises ValueError as ``patching``, and without cells.
    """
    places = [(0, Site(str(kind), int(layer)), int(position)) for kind, layer, position in cells]
    if not places:
        raise ValueError("patched_together needs at least one cell, (kind, layer, position), got none")
    runs = both_runs(lm, prompts, sources, metric, list(dict.fromkeys(site for _, site, _ in places)))
    _axes(lm, runs, None, [position for *_, position in places])
    mean = float(measured(lm, runs.batch, metric, _writes(places, runs.given)).float().mean())
    return (mean - runs.base) / (runs.source - runs.base)


@as_annotated
def patching_estimate(
    lm: LM,
    prompts: Texts,
    sources: Texts,
    metric: Metric,
    *,
    kinds: Sequence[str] = KINDS,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> PatchGrid:
    """``patching_estimate(lm, prompts, sources, metric)``: attribution patching, (x_source - x)·dm/dx, at every kind,
    layer and position by one backward pass.

    The effect that each patch would have if the metric were linear in the activation (Nanda 2023; Syed et al. 2023,
    arXiv:2310.10348), in the unit of ``patching``. Arguments and errors are those of ``patching``; the metric must be
    differentiable, and the model on this machine. A patch of attention's or an MLP's output changes the stream little,
    and is estimated well; a patch of the whole stream at a token is a large change, and its estimate can be far off
    (benchmarks/patching.py).
    """
    require_here(lm, "patching_estimate")
    chosen = list(range(lm.n_layers)) if layers is None else list(layers)
    sites = [Site(kind, layer) for kind in kinds for layer in chosen]
    runs = both_runs(lm, prompts, sources, metric, sites)
    require_slope(lm, metric, runs.batch)
    layers, positions = _axes(lm, runs, chosen, positions)
    (slopes,) = gradients(lm, runs.batch, sites, lambda _, logits: [metric(logits, runs.batch).sum()])
    changes = [((runs.given[s] - runs.x[s]) * slopes[s]).sum(-1).mean(0)[positions].cpu() for s in sites]
    return _grid(lm, runs, torch.stack(changes) / (runs.source - runs.base), kinds, layers, positions, estimated=True)


def _grid(
    lm: LM, runs: Runs, values: Tensor, kinds: Sequence[str], layers: list[int], positions: list[int],
    estimated: bool = False,
) -> PatchGrid:  # fmt: skip
    ours, theirs = (lm.tokens(one.ids[0].tolist()) for one in (runs.batch, runs.theirs))
    tokens = [(ours[p].label, theirs[p].label) for p in positions]
    values = values.view(len(kinds), len(layers), len(positions))
    return PatchGrid(values, runs.base, runs.source, tuple(kinds), layers, positions, tokens, estimated)


def _axes(
    lm: LM, runs: Runs, layers: Sequence[int] | None, positions: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """(layers, positions): those asked for; None: all layers, and all positions but 0. ValueError for a position that
    the prompts do not have, and if prompts and sources have the same metric."""
    base, source, length = runs.base, runs.source, runs.batch.ids.shape[1]
    if not (math.isfinite(base) and math.isfinite(source)):
        raise ValueError(f"a metric is finite, this one is {base} for prompts and {source} for sources")
    if abs(base - source) < 1e-6 * max(abs(base), abs(source)) or base == source:  # equal up to rounding
        raise ValueError(
            f"the metric is {base:.4g} for the prompts and for the sources too, so there is no difference to patch: "
            "take sources with another answer, or another metric"
        )
    check_positions(positions or (), length)
    layers = list(range(lm.n_layers)) if layers is None else list(layers)
    return layers, list(range(1, length)) if positions is None else list(positions)


def _patched(lm: LM, runs: Runs, metric: Metric, cells: list[Cell]) -> Iterator[dict[Cell, float]]:
    """Shares of the metric's change, pass by pass: one pass patches several cells, each in a copy of the prompts."""
    n, length = runs.batch.ids.shape
    at_once = max(1, min(ROWS, TOKENS // length) // n)
    cells, given = sorted(cells, key=lambda cell: cell[:2]), dict[Site, Tensor]()
    for start in range(0, len(cells), at_once):
        part = cells[start : start + at_once]
        places = [(copy, Site(kind, layer), position) for copy, (kind, layer, position) in enumerate(part)]
        sites = {site for _, site, _ in places}
        given = {site: x for site, x in given.items() if site in sites}
        if new := sites - set(given):
            given |= lm.run(runs.theirs, new, logits=False)[0]
        values = measured(lm, copied(runs.batch, len(part)), metric, _writes(places, given)).float()
        shares = (values.view(len(part), n).mean(1) - runs.base) / (runs.source - runs.base)
        yield dict(zip(part, shares.tolist(), strict=True))


def _writes(places: Sequence[tuple[int, Site, int]], given: Mapping[Site, Tensor]) -> list[Write]:
    """The writes of (copy of the prompts, site, position) each, of what the sources' run has there."""
    by_site: dict[Site, list[tuple[int, int]]] = {}
    for copy, site, position in places:
        by_site.setdefault(site, []).append((copy, position))
    found = []
    for site, here in by_site.items():
        n, (copies, positions) = len(given[site]), torch.tensor(here).T
        rows, where = (copies[:, None] * n + torch.arange(n)).flatten(), positions.repeat_interleave(n)
        put = given[site][:, positions].transpose(0, 1).flatten(0, 1)  # the activation that each copy gets
        found.append(Write(site, partial(placed, rows=rows, where=where, put=put)))
    return found
