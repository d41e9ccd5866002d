"""How few directions carry the difference between two runs: an SAE's features against PCA, neurons and random axes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated, check_least
from sae_lab.circuits.gradients import mean_gradient
from sae_lab.circuits.metric import ROWS, final_log_chances, kl_to, measured, plus
from sae_lab.circuits.pairs import check_positions, kept, paired, require_sae
from sae_lab.lm.model import LM
from sae_lab.results import Result, by_column, counted, result
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch, Write

NUMBERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STEPS = 8


class AreaDifference(NamedTuple):
    """Area under one curve minus area under another, in nats (each divided by the length of its axis, so that it is a
    mean KL), with the 95 % interval of a bootstrap over the scored prompts."""

    value: float
    low: float
    high: float
    prompts: int

    def __repr__(self) -> str:
        return f"{self.value:+.3f} nats (95 %: {self.low:+.3f} to {self.high:+.3f}; {counted(self.prompts, 'prompt')})"


@as_annotated
@result
class DirectionCurves(Result):
    """Result of ``circuits.patched_directions``. Its table has one row a method and number.

    Attributes:
        kl: by method, "prompts numbers": KL(source ‖ patched) at the last token, nats, of prompts that the ranking
            did not use.
        edit: by method, "prompts numbers": norm of the edit over the norm of the whole difference between the runs (1:
            that of replacing the activations).
        numbers: how many directions are patched, the same for all methods; the first is 0: none (or the error alone).
        directions: by method, the number of directions that differ between the runs of any prompt.
        site, ranked: the site; the number of prompts that the ranking used.
    """

    kl: dict[str, Float[np.ndarray, "prompts numbers"]]
    edit: dict[str, Float[np.ndarray, "prompts numbers"]]
    numbers: list[int]
    directions: dict[str, int]
    site: Site
    ranked: int

    _records = "_points"
    _above = "KL(source ‖ patched), nats, at {site}; {_scored} prompts, ranked on {ranked} others:"

    @property
    def _scored(self) -> int:
        return len(next(iter(self.kl.values())))

    @property
    def _points(self) -> dict[str, list[Any]]:
        rows = [
            (name, n, one.mean(), one.std(ddof=1) / len(one) ** 0.5, self.edit[name][:, i].mean())
            for name, kl in self.kl.items()
            for i, (n, one) in enumerate(zip(self.numbers, kl.T, strict=True))
        ]
        return by_column("method n kl se edit", rows)

    def _printed(self, table: Any) -> Any:
        return table.pivot(index="n", columns="method", values="kl")[list(self.kl)].reset_index()

    def area_difference(
        self, a: str, b: str, *, against: str = "number", draws: int = 2000, seed: int = 0
    ) -> AreaDifference:
        """``curves.area_difference("features", "PCA")``: area under a's mean curve minus area under b's; negative: a
        needs fewer directions (or a smaller edit).

        against: "number": over log n, from n = 1 to the largest; "edit": over the norm of the edit, in the range of
        both curves, with straight lines between the points of a curve (NaN if they have no range in common).

        Raises ValueError for an unknown method or axis.
        """
        if unknown := [name for name in (a, b) if name not in self.kl]:
            raise ValueError(f"no method {unknown[0]!r} was measured: choose among {', '.join(self.kl)}")
        if against not in ("number", "edit"):
            raise ValueError(f"against must be 'number' or 'edit', got {against!r}")
        count = len(self.kl[a])
        rows = np.random.default_rng(seed).integers(0, count, (draws, count))
        found = np.array([self._difference(a, b, against, one) for one in rows])
        low, high = np.quantile(found, [0.025, 0.975])
        return AreaDifference(self._difference(a, b, against, np.arange(count)), float(low), float(high), count)

    def _difference(self, a: str, b: str, against: str, rows: np.ndarray) -> float:
        curves = [(self.edit[name][rows].mean(0), self.kl[name][rows].mean(0)) for name in (a, b)]
        if against == "number":
            axis = np.log(self.numbers[1:])
            areas = [np.trapezoid(kl[1:], axis) for _, kl in curves]
        else:
            low, high = (pick([end(x) for x, _ in curves]) for pick, end in ((max, np.min), (min, np.max)))
            axis = np.linspace(low, high, 200)
            ordered = [(x[order], kl[order]) for x, kl in curves for order in [np.argsort(x, kind="stable")]]
            areas = [np.trapezoid(np.interp(axis, x, kl), axis) for x, kl in ordered]
        length = axis[-1] - axis[0]
        return float((areas[0] - areas[1]) / length) if length > 0 else float("nan")


@dataclass(frozen=True)
class _Runs:
    """Both runs of some prompts: activations, the tokens that a patch may change, log p after the sources."""

    batch: TokenBatch
    x: Tensor
    given: Tensor
    keep: Tensor
    log_p: Tensor

    def part(self, rows: Tensor) -> "_Runs":
        b = self.batch
        batch = TokenBatch(b.ids[rows], b.mask[rows], b.positions[rows])
        return _Runs(batch, self.x[rows], self.given[rows], self.keep[rows], self.log_p[rows])


@dataclass(frozen=True)
class _Method:
    """Directions and how far each differs between the runs: patching all of them adds changes·directions + rest."""

    directions: Float[Tensor, "n d"]
    changes: Float[Tensor, "batch pos n"]
    rest: Tensor | None = None

    def ranked(self, gradient: Tensor, rows: Tensor, each: bool) -> tuple[Tensor, Tensor]:
        """(positions, directions) of all nodes, first the node whose patch should lower the divergence most. A node is
        a direction at every position (position -1), or with ``each`` at one position."""
        scores = -(self.changes[rows] * (gradient @ self.directions.T)).sum(0)
        scores = scores if each else scores.sum(0, keepdim=True)
        order = scores.flatten().argsort(descending=True, stable=True)
        return order // len(self.directions) if each else torch.full_like(order, -1), order % len(self.directions)

    def edit(self, rows: Tensor, at: Tensor, chosen: Tensor) -> Float[Tensor, "batch pos d"]:
        kept = torch.zeros(self.changes.shape[1:], device=self.changes.device)
        kept.index_put_((at, chosen), torch.ones(len(at), device=kept.device))
        kept = kept[-1].expand_as(kept) if bool((at < 0).any()) else kept
        added = (self.changes[rows] * kept) @ self.directions
        return added if self.rest is None else added + self.rest[rows]


@as_annotated
def patched_directions(
    lm: LM,
    coder: SparseCoder,
    prompts: Sequence[str],
    sources: Sequence[str],
    *,
    bases: Mapping[str, Tensor] | None = None,
    numbers: Sequence[int] = NUMBERS,
    positions: Sequence[int] | None = None,
    each_position: bool = False,
    steps: int = STEPS,
    seed: int = 0,
) -> DirectionCurves:
    """``patched_directions(lm, sae, prompts, sources)``: how near n patched directions bring the model to its answer in
    the other run, for every n: the IOI experiment of Cunningham et al. 2023, arXiv:2309.08600.

    Patching a set S takes the sources' coefficients of S and keeps all others, at the same positions for all methods:

        features            x + Σ_S (f_source - f)_i·W_dec_i        (the coder's error stays as in the prompt; with an
                                                                    input_norm at the scale of the prompt's x)
        features and error  the same, and the error as in the source: all features together give the source's x
        a basis U           x + Σ_S ((x_source - x)·u_i) u_i        all directions together give the source's x

    Half of the prompts (drawn by ``seed``) rank the directions of all methods, the others are scored. g, the gradient
    of KL(source ‖ patched) at the site, is averaged over ``steps`` points from prompt to source; direction i's score
    is the reduction estimated for it alone, -Σ (change of i's coefficient)·(direction_i·g), summed over tokens and
    prompts. The n directions with the highest scores are patched together.

    Args:
        coder: an SAE at one site.
        prompts, sources: at least four of each, all of one token length; a source is its prompt's counterfactual.
        bases: more methods by name, "n d": at most d orthonormal rows, such as ``principal_axes`` for PCA. Always
            measured are "neurons" (the axes of the site), "random" (a random rotation, by ``seed``) and "differences":
            the principal axes of x_source - x in the ranking half, a ceiling, since they are fitted to the runs.
        numbers: how many directions to patch; a number above a method's directions means all of them.
        positions: of the patch; None: all but position 0 and the tokens that the coder's mask leaves out.
        each_position: True: a direction at one position is chosen and counted by itself; False: a direction is patched
            at all positions and counts once.

    Raises ValueError as ``patching``, and for a coder that does not write where it reads, rows that are not
    orthonormal, a name that is measured anyway, fewer than four prompts, and numbers below 1.
    """
    _check(coder, bases or {}, numbers, steps, len(prompts))
    runs = _both_runs(lm, coder, prompts, sources, positions)
    order = torch.randperm(len(runs.batch.ids), generator=torch.Generator().manual_seed(seed))
    ranking, scoring = order[: len(order) // 2].sort().values, order[len(order) // 2 :].sort().values
    with torch.no_grad():
        methods = _methods(coder, runs, ranking, bases or {}, seed)
    gradients = []
    for part in map(runs.part, ranking.split(ROWS)):
        across, metric = (part.given - part.x) * part.keep.unsqueeze(-1), partial(kl_to, given=part.log_p)
        gradients.append(mean_gradient(lm, part.batch, coder.site, metric, part.x, across, steps))
    held, counts = runs.part(scoring), [0, *sorted(numbers)]
    kl, edit = {}, {}
    whole = ((held.given - held.x) * held.keep.unsqueeze(-1)).flatten(1).norm(dim=1)
    for name, method in methods.items():
        at, best = method.ranked(torch.cat(gradients), ranking, each_position)
        edits = [method.edit(scoring, at[:n], best[:n]) for n in counts]
        kl[name] = _divergences(lm, coder.site, held, edits)
        sizes = [one.flatten(1).norm(dim=1) / whole.clamp_min(1e-12) for one in edits]
        edit[name] = torch.stack(sizes, 1).cpu().numpy()
    changes = {name: m.changes if each_position else m.changes.flatten(0, 1) for name, m in methods.items()}
    there = {name: int(one.ne(0).any(0).sum()) for name, one in changes.items()}
    return DirectionCurves(kl, edit, counts, there, coder.site, len(ranking))


@as_annotated
@torch.no_grad()
def principal_axes(x: Float[Tensor, "tokens d"], uncentred: bool = False) -> Float[Tensor, "n d"]:
    """``principal_axes(x)``: the axes of PCA as orthonormal rows, the largest variance first; axes without variance are
    left out.

    uncentred: keep the mean, as for differences between two runs, where it is part of the difference.

    Raises ValueError for fewer than two rows.
    """
    if len(x) < 2:
        raise ValueError(f"principal axes need at least two rows of activations, got {len(x)}")
    x = x.double()
    _, sizes, axes = torch.linalg.svd(x if uncentred else x - x.mean(0), full_matrices=False)
    return axes[sizes > 1e-6 * sizes[0]].float()


def _check(coder: SparseCoder, bases: Mapping[str, Tensor], numbers: Sequence[int], steps: int, count: int) -> None:
    require_sae(coder, "patched_directions")
    if count < 4:
        raise ValueError(f"patched_directions ranks on half of the prompts: give at least 4, got {count}")
    if not numbers or min(numbers) < 1:
        raise ValueError(f"numbers must be at least 1, got {list(numbers)}: n = 0 is always measured")
    check_least(1, steps=steps)
    for name, basis in bases.items():
        if name in ("features", "features and error", "neurons", "random", "differences"):
            raise ValueError(f"{name!r} is measured anyway: give the basis another name")
        if basis.dim() != 2 or basis.shape[1] != coder.d_in:
            raise ValueError(f"basis {name!r} must be 'n d' with d={coder.d_in}, got shape {tuple(basis.shape)}")
        gram = basis.float() @ basis.float().T
        if float((gram - torch.eye(len(gram), device=gram.device)).abs().max()) > 1e-3:
            raise ValueError(f"basis {name!r} must have orthonormal rows: torch.linalg.qr(basis.T)[0].T makes them")


def _both_runs(
    lm: LM, coder: SparseCoder, prompts: Sequence[str], sources: Sequence[str], positions: Sequence[int] | None
) -> _Runs:
    batch, theirs = paired(lm, prompts, sources)
    site, length = coder.site, batch.ids.shape[1]
    check_positions(positions or (), length)
    x = lm.run(batch, [site], logits=False)[0]
    form = Float[Tensor, f"{len(batch.ids)} {lm.vocab_size}"]
    given, log_p = lm.run(theirs, [site], logits=final_log_chances, form=form)
    keep = kept(lm, [coder], (batch, x), (theirs, given))
    keep[:, 0] = False
    if positions is not None:
        keep &= torch.isin(torch.arange(length), torch.tensor(list(positions)))
    return _Runs(batch, x[site], given[site], keep.to(x[site].device), log_p)


def _methods(
    coder: SparseCoder, runs: _Runs, ranking: Tensor, bases: Mapping[str, Tensor], seed: int
) -> dict[str, _Method]:
    keep, difference = runs.keep.unsqueeze(-1), (runs.given - runs.x)
    f, given = coder.encode(runs.x), coder.encode(runs.given)
    changes, rows = coder.strengths(given - f, runs.x) * keep, coder.directions()
    rest = difference * keep - changes @ rows
    found = {"features": _Method(rows, changes), "features and error": _Method(rows, changes, rest)}
    d = coder.d_in
    random = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed + 1)))[0].T
    seen = difference[ranking][runs.keep[ranking]]
    always = {"neurons": torch.eye(d), "random": random, "differences": principal_axes(seen, uncentred=True)}
    for name, basis in {**bases, **always}.items():
        basis = basis.to(difference)
        found[name] = _Method(basis, (difference * keep) @ basis.T)
    return found


def _divergences(lm: LM, site: Site, runs: _Runs, edits: Sequence[Tensor]) -> Float[np.ndarray, "prompts numbers"]:
    """KL(source ‖ patched) for each edit; the prompts of several edits run in one batch."""
    n, found = len(runs.x), []
    rows = torch.arange(n).repeat(len(edits))
    for part in torch.arange(len(rows)).split(ROWS):
        some = runs.part(rows[part])
        write = Write(site, partial(plus, by=torch.cat(list(edits))[part]))
        found.append(measured(lm, some.batch, partial(kl_to, given=some.log_p), [write]))
    return torch.cat(found).view(len(edits), n).T.numpy()
