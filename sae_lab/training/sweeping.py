"""sl.sweep: many coders on the same batches, so that a Pareto front costs one reading of the data."""

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_lab import processes
from sae_lab.activations.reconstructing import reconstruction
from sae_lab.activations.store import Harvested, Store
from sae_lab.activations.streaming import Stream
from sae_lab.activations.world import World
from sae_lab.arguments import Count, as_annotated
from sae_lab.cache import sole_writer
from sae_lab.feature_index.matching import match
from sae_lab.lm.model import LM
from sae_lab.lm.text import Documents
from sae_lab.processes import Peers
from sae_lab.results import Result, result
from sae_lab.saes import FAMILIES, SparseCoder
from sae_lab.saes.kernels import Memory
from sae_lab.training.aiming import Reached
from sae_lab.training.config import TrainConfig
from sae_lab.training.loop import Training, calibration_data, first_batch, measured
from sae_lab.training.run import Event, Run
from sae_lab.training.start import rows_for
from sae_lab.types import Batch, Site

MEASURES = ("l0", "fvu", "dead", "mmcs", "mmcs_back", "ce_delta", "ce_delta_se", "ce_recovered")
MEASURED = 16_384  # tokens that L0 and FVU are measured on
SLOWEST = timedelta(days=14)  # that a rank may train on when another has finished
Grid = Mapping[str, Mapping[str, Any]]
Done = tuple[Run, dict[str, Any]]  # a run and its figures


@result
class Sweep(Result):
    """Result of ``sl.sweep``: the coders, their runs, and one row of figures for each. ``sl.plot`` draws FVU, and ΔCE
    where it was measured, against L0.

    rows: family, the arguments that the grid varies, seed, site; l0 and fvu in eval mode on tokens that no training
    step saw; dead; changed, where a callback changed or stopped a training; on a planted world mmcs (true features
    found) and mmcs_back (found features true), else with a language model ce_delta, its standard error, and
    ce_recovered.
    """

    coders: list[SparseCoder]
    runs: list[Run]
    rows: list[dict[str, Any]] = field(repr=False)
    tokens: int = 0
    held_out: bool = True  # False: the data is too small to reserve any

    _below = "l0 and fvu on {tokens:,} tokens {_which}"
    _records, _shown = "rows", sys.maxsize  # every coder is printed

    @property
    def _which(self) -> str:
        return "that no training step saw" if self.held_out else "of training: there are too few to hold any out"

    def to_pandas(self):
        """One row a coder."""
        table = super().to_pandas()
        whole = [c for c in table if all(type(row.get(c, 0)) is int for row in self.rows)]  # k stays 4 beside NA
        arguments_first = sorted(table, key=lambda c: c in ("seed", "site", *MEASURES))
        return table.astype(dict.fromkeys(set(whole) - {"seed"}, "Int64"))[arguments_first]

    def best(self, by: str = "fvu", **where: Any) -> SparseCoder:
        """The coder with the least ``by`` (the largest for mmcs and ce_recovered): ``found.best("l0", family="TopK")``
        among the rows with these values. ValueError for another column, and where no row has a value there."""
        chosen = [(row, coder) for row, coder in zip(self.rows, self.coders, strict=True)
                  if all(row.get(k) == v for k, v in where.items())]  # fmt: skip
        if not chosen or any(by not in row for row, _ in chosen):
            raise ValueError(f"no coder with {where} and {by!r}; columns: {', '.join(self.to_pandas().columns)}")
        if not (chosen := [(row[by], coder) for row, coder in chosen if row[by] == row[by]]):  # NaN: not defined there
            raise ValueError(f"{by!r} is undefined for every coder with {where}: choose by another column")
        pick = max if by.startswith(("mmcs", "ce_recovered")) else min
        return pick(chosen, key=lambda one: one[0])[1]


@as_annotated
def sweep(
    grid: Grid | Sequence[SparseCoder],
    data: Store | Stream | Tensor | Batch | World,
    config: TrainConfig,
    *,
    d_sae: Count | None = None,
    seeds: Iterable[Count] = (0,),
    lm: LM | None = None,
    text: Documents | None = None,
    path: str | Path | None = None,
    callbacks: Iterable[Callable[[Event], Any]] = (),
) -> Sweep:
    """Train many coders in one pass over the data: each batch is read once for all of them.

        sl.sweep({"TopK": {"k": [16, 32, 64]}, "JumpReLU": {"sparsity": [0.5, 1, 2]}}, store, config, d_sae=4608)

    Args:
        grid: {family: its arguments}, with a list for each argument that varies; or a list of coders.
        data: as for ``sl.train``. On a store of several sites every coder is trained at each; a ``World`` brings its
            true features, which are compared with those found.
        d_sae: width of the coders whose arguments name none.
        seeds: of the coders; batches are the same for all.
        lm, text: a model and held-out text, to measure ΔCE too.
        path: folder of checkpoints; the same call goes on where it was interrupted.
        callbacks: as for ``sl.train``, called for every coder; ``event.label`` says which. A coder that is paused holds
            all, one that is stopped ends alone.

    Under torchrun the coders are dealt to the ranks, each of which reads the data itself; every rank returns the whole
    sweep, and its coders are those of one process, bit for bit. Callbacks run where their coder is trained. A sweep may
    go on over another number of ranks.

    Raises ValueError for an unknown family, a grid without coders, ranks with different arguments, and as ``sl.train``.
    """
    if config.objective != "reconstruction":
        raise ValueError(
            f"a sweep trains by reconstruction, got objective={config.objective!r}: call sl.train for each"
        )
    if (lm is None) != (text is None):
        raise ValueError("to measure ΔCE give lm and text, both: sl.sweep(..., lm=lm, text=text.held_out)")
    if lm is not None and not isinstance(data, Harvested):
        raise ValueError(
            "ΔCE is measured at a site, which only a store or a stream knows: sweep on one of them, or leave lm out"
        )
    world = data if isinstance(data, World) else None
    source = data.x if isinstance(data, World) else data
    coders, varied = _coders(grid, source, d_sae, seeds)
    callbacks, labels = tuple(callbacks), _labels(varied)
    trainings: list[Training] = []
    for number, (coder, row) in enumerate(zip(coders, varied, strict=True)):
        name = "-".join([f"{number:03d}", row["family"], *(f"{k}={v}" for k, v in row.items() if k != "family")])
        folder = None if path is None else Path(path) / name
        rows = rows_for(coder, source.at(row["site"]) if isinstance(source, Harvested) and "site" in row else source)
        same = (t.rows for t in trainings if t.rows.fingerprint == rows.fingerprint and t.rows.shapes == rows.shapes)
        rows = next(same, rows)  # one object for all that read the same rows
        trainings.append(Training(coder, rows, config, folder, callbacks, label=labels[number]))
    unseen = cache(lambda rows: rows.unseen(MEASURED))

    def measure(training: Training, run: Run) -> dict[str, Any]:
        """The figures of a trained coder."""
        found = measured(run.coder, unseen(training.rows)) | {"dead": run.coder.meta["dead"]}
        found |= {"changed": True} if run.changes else {}
        if world is not None:
            pairs = match(run.coder, world)
            found |= {"mmcs": pairs.b_to_a, "mmcs_back": pairs.a_to_b}
        if lm is not None and text is not None:
            result = reconstruction(run.coder, lm, text)
            found |= {name: getattr(result, name) for name in ("ce_delta", "ce_delta_se", "ce_recovered")}
        return found

    if processes.started() == 1:
        done = _done(trainings, measure)
    else:
        with processes.peers(SLOWEST) as peers:
            done = _dealt(trainings, measure, peers)
    tokens, held_out = len(unseen(trainings[-1].rows).x), all(t.rows.watched is not None for t in trainings)
    return Sweep(
        coders, [run for run, _ in done], [row | more for row, (_, more) in zip(varied, done, strict=True)], tokens,
        held_out,
    )  # fmt: skip


def _done(trainings: list[Training], measure: Callable[..., dict[str, Any]], quiet: bool = False) -> list[Done]:
    """(run, figures) of each coder, trained in this process."""
    with ExitStack() as alone:
        for t in trainings:
            if t.path is not None:
                alone.enter_context(sole_writer(t.path))
        runs = _run(trainings, quiet) if trainings else []
    return [(run, measure(t, run)) for t, run in zip(trainings, runs, strict=True)]


def _dealt(trainings: list[Training], measure: Callable[..., dict[str, Any]], peers: Peers) -> list[Done]:
    """The same by several ranks, each of which trains every N-th coder; all get all of them."""
    if any(isinstance(t.rows, Stream) and t.rows.kept for t in trainings):
        raise ValueError(
            f"keep='disk' needs one process, got {peers.size}: harvest a store first, which ranks do together, or "
            "leave keep out"
        )
    peers.require_same({t.label: t.identity | {"path": str(t.path)} for t in trainings}, "sweep")
    mine = trainings[peers.rank :: peers.size]
    for t in mine:
        if t.coder.W_dec.is_cuda:
            t.coder.to(processes.own_gpu())
    done, failure = [], None
    try:
        done = _done(mine, measure, quiet=not peers.first)
    except (ValueError, OSError, RuntimeError) as err:
        failure = err
    told = peers.tell({"error": str(failure)} if failure else {"done": [_facts(run) | {"more": m} for run, m in done]})
    processes.raise_for(told, failure)
    found = []
    for number, t in enumerate(trainings):
        turn, rank = divmod(number, peers.size)
        facts = told[rank]["done"][turn]
        for own in t.coder.state_dict().values():
            sent = peers.sent(own, rank)
            if rank != peers.rank:
                own.copy_(sent)
        found.append(done[turn] if rank == peers.rank else (_opened(t, facts), facts["more"]))
    return found


def _facts(run: Run) -> dict[str, Any]:
    """What another rank must know of a run, beside its coder's weights."""
    coder, reached = run.coder, run.reached
    facts = {"meta": coder.meta, "config": coder.config, "reads": [s.key for s in coder.reads]}
    facts |= {"writes": [s.key for s in coder.writes], "history": run.history, "changes": run.changes}
    return facts | {"reached": None if reached is None else reached._asdict()}


def _opened(training: Training, facts: dict[str, Any]) -> Run:
    """A run of another rank, whose weights are here."""
    coder, reached = training.coder, facts["reached"]
    if coder.config != facts["config"] and coder.sparsity_name is not None:  # target_l0 moved it
        coder.set_sparsity(facts["config"][coder.sparsity_name])
    coder.meta, coder.in_raw_units, coder.progress = facts["meta"], True, 1.0
    coder.reads, coder.writes = (tuple(map(Site.of, facts[which])) for which in ("reads", "writes"))
    if training.path is not None:
        coder.path = str(training.path.resolve())
    training.control.close()
    return Run(
        coder.eval(), training.config, facts["history"], training.path, facts["changes"],
        None if reached is None else Reached(**reached),
    )  # fmt: skip


def _coders(
    grid: Grid | Sequence[SparseCoder], data: Harvested | Tensor | Batch, d_sae: int | None, seeds: Iterable[int]
) -> tuple[list[SparseCoder], list[dict[str, Any]]]:
    """The coders, and for each the first entries of its row: family and the arguments that vary."""
    if not isinstance(grid, Mapping):
        coders = list(grid)
        if not coders or not all(isinstance(c, SparseCoder) for c in coders):
            raise ValueError(f"a sweep takes a grid ({{'TopK': {{'k': [16, 32]}}}}) or a list of coders, got {grid!r}")
        names = {k for c in coders for k, v in c.config.items() if any(d.config.get(k) != v for d in coders)}
        return coders, [
            {"family": type(c).__name__} | {k: _plain(c.config.get(k)) for k in sorted(names)} for c in coders
        ]
    seeds = list(seeds)
    coders, rows = [], []
    for family, arguments in grid.items():
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
        lists = {k: list(v) if isinstance(v, list | tuple | range) else [v] for k, v in arguments.items()}
        sites = _sites(family, lists, data)
        for values, seed, site in itertools.product(itertools.product(*lists.values()), seeds, sites):
            config = dict(zip(lists, values, strict=True))
            width = config.pop("d_sae", d_sae)
            if width is None:
                raise ValueError(f"give sweep(..., d_sae=), or 'd_sae' among the arguments of {family}")
            coders.append(FAMILIES[family](_width(data, site), width, seed=seed, **config))  # type: ignore[arg-type]
            row = {"family": family} | {k: _plain(v) for k, v in zip(lists, values, strict=True) if len(lists[k]) > 1}
            rows.append(row | {"seed": seed} | ({"site": site.key} if site is not None else {}))
    if not coders:
        raise ValueError("the grid is empty: give a family, values of arguments and a seed, {'TopK': {'k': [8, 16]}}")
    return coders, rows


def _labels(varied: list[dict[str, Any]]) -> list[str]:
    """A name for each coder: its family and the arguments that vary."""
    alike = {k for k in ("seed", "site") if len({row.get(k) for row in varied}) == 1}
    labels = []
    for number, row in enumerate(varied):
        label = " ".join([row["family"], *(f"{k}={v}" for k, v in row.items() if k != "family" and k not in alike)])
        labels.append(label if label not in labels else f"{label} ({number})")
    return labels


def _plain(value: Any) -> Any:
    """A setting as tables group by it."""
    return tuple(value) if isinstance(value, list) else value


def _sites(family: str, arguments: Mapping[str, Any], data: Harvested | Tensor | Batch) -> list[Site | None]:
    """The sites at which coders of a family are trained, each at one; [None] if the coder takes all there are."""
    takes_all = family in ("Transcoder", "SkipTranscoder", "Crosscoder") or "d_out" in arguments
    return list(data.chosen) if isinstance(data, Harvested) and len(data.chosen) > 1 and not takes_all else [None]


def _width(data: Harvested | Tensor | Batch, site: Site | None) -> int:
    if isinstance(data, Harvested):
        return data.at(site or data.chosen[0]).width
    return (data if isinstance(data, Tensor) else data.x).shape[-1]


def _run(trainings: list[Training], quiet: bool) -> list[Run]:
    """All trainings side by side: a step each, on one batch."""
    from tqdm.auto import tqdm

    runs: dict[int, Run] = {}
    begun: list[Training] = []
    scratch: dict[int, Memory] = {}
    config = trainings[0].config  # the same for all
    firsts = cache(lambda rows: first_batch(rows, config))
    data = cache(lambda rows: calibration_data(rows, config.total_steps))
    try:
        for number, t in enumerate(trainings):
            if finished := t.begin(firsts):
                runs[number] = finished
                continue
            begun.append(t)
            if t.coder.scratch is not None:  # they take turns, so one memory does
                t.coder.scratch = scratch.setdefault(t.coder.d_sae, t.coder.scratch)
        for t in begun:
            t.emit("start")
        total = config.total_steps if begun else 0
        first = min((t.step for t in begun), default=0)
        quiet = quiet or any(getattr(c, "shows_progress", False) for t in trainings for c in t.callbacks)
        name = f"sweep of {len(begun)}"
        readers = {t.rows: t.ahead for t in begun}
        with tqdm(total=total, initial=first, desc=name, dynamic_ncols=True, disable=quiet) as bar:
            for step in range(first, total):
                read = cache(lambda rows, step=step: readers[rows](step))
                for t in begun:
                    if t.step == step and t.going():  # an interrupted sweep's coders may be at different steps
                        t.one_step(read(t.rows))
                bar.update()
                if all(t.step >= t.control.last for t in begun):  # some were stopped before the total
                    break
                if fvus := [t.history[-1]["fvu"] for t in begun if t.history]:
                    bar.set_postfix_str(f"FVU {min(fvus):.3f} to {max(fvus):.3f}", refresh=False)
        for t in begun:  # calibration takes a while: if it is interrupted, training is not lost
            t.keep()
        for number, t in enumerate(trainings):
            if number not in runs:
                runs[number] = t.end(data)
    except BaseException as err:
        for t in begun:
            if t not in [trainings[number] for number in runs]:
                t.leave(err)
        raise
    return [runs[number] for number in range(len(trainings))]
