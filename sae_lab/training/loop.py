"""sl.train: one loop for every coder. It sees coders and batches, never a family by name."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sae_lab import cache
from sae_lab.activations.store import ReadAhead, Rows, Store
from sae_lab.arguments import Count, as_annotated
from sae_lab.saes import kernels
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.families.batchtopk import BatchTopK
from sae_lab.training import checkpoint
from sae_lab.training.checkpoint import CHECKPOINT as CHECKPOINT
from sae_lab.training.control import Change, Control, check_lr
from sae_lab.training.ranks import ALONE, Ranks, joined
from sae_lab.types import Batch, Codes, Output

log = logging.getLogger(__name__)

CALIBRATION_TOKENS = 100_000  # threshold, f_scale and the count of dead features are taken on so many training tokens
MAX_GRADIENT = 1e18  # Adam squares it, in float32

Metrics = dict[str, int | float]
Shard = Literal["batch", "features"]


@as_annotated
@dataclass(frozen=True)
class TrainConfig:
    """How to train. Give ``tokens`` or ``steps``.

    lr: Adam's learning rate; None is 2e-3·sqrt(4608/d_sae), so that wider coders learn slower.
    warmup, decay: shares of the steps over which lr rises from 0 and falls to 0.
    dead_after: a feature that fires on none of so many tokens counts as dead, and AuxK revives it.
    checkpoint_every: steps between checkpoints (only with ``path=``).
    shard: what several ranks divide (``sl.train`` under torchrun): "batch", each takes its rows of every batch of
    ``batch_size`` in all; or "features", each holds some of the coder, which may then be wider than one device takes.
    """

    tokens: int | None = None
    steps: int | None = None
    batch_size: int = 4096
    lr: float | None = None
    warmup: float = 0.05
    decay: float = 0.2
    seed: int = 0
    dead_after: int = 100_000
    log_every: int = 1
    checkpoint_every: int = 100
    shard: Shard = "batch"

    def __post_init__(self):
        if (self.tokens is None) == (self.steps is None):
            raise ValueError(f"give tokens or steps, one of them: got tokens={self.tokens}, steps={self.steps}")
        for name in ("tokens", "steps", "batch_size", "dead_after", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.lr is not None:
            check_lr(self.lr)
        if self.shard not in get_args(Shard):
            raise ValueError(f"shard must be one of {', '.join(get_args(Shard))}, got {self.shard!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise ValueError(
                f"warmup and decay are shares of training that sum to <= 1, got {self.warmup}, {self.decay}"
            )

    @property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else -(-int(self.tokens or 0) // self.batch_size)

    def peak(self, d_sae: Count) -> float:
        """The largest learning rate."""
        return self.lr if self.lr is not None else 2e-3 * math.sqrt(4608 / d_sae)

    def lr_at(self, step: Count, d_sae: Count, peak: float | None = None) -> float:
        """The learning rate of a step: a trapezoid. peak: another than the config's."""
        peak = self.peak(d_sae) if peak is None else peak
        rise = (step + 1) / max(1, round(self.warmup * self.total_steps))
        fall = (self.total_steps - step) / max(1, round(self.decay * self.total_steps))
        return peak * min(1.0, rise, fall)


class Event(NamedTuple):
    """What a callback gets: ``kind`` is "start", "step" (a logged one), "checkpoint", "pause", "resume", "end", or
    "left" (interrupted or failed: ``error`` says by what); ``metrics`` as in ``Run.history``.

    control: steers this training. history: all rows so far, not to be changed. data: what serves the batches. label:
    which of a sweep's coders this is.
    """

    kind: str
    step: int
    metrics: Metrics
    coder: SparseCoder
    config: TrainConfig
    control: Control
    history: list[Metrics]
    data: Store | Rows
    label: str
    path: Path | None = None
    error: BaseException | None = None


@dataclass
class Run:
    """A finished training: the coder, its config, and one row of metrics per logged step.

    changes: what was changed while it ran, {"step", "what", "old", "new"} each (see ``Control``).
    """

    coder: SparseCoder
    config: TrainConfig
    history: list[Metrics] = field(repr=False)
    path: Path | None = None
    changes: list[Change] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        """Whether it was ended before its last step."""
        return any(change["what"] == "stop" for change in self.changes)

    def to_pandas(self):
        """The history: step, tokens, passes, loss, fvu, l0, dead, lr and the loss terms."""
        import pandas as pd

        return pd.DataFrame(self.history)

    def __repr__(self) -> str:
        m = self.history[-1]
        made = [
            f"stopped after {c['new']:,} of {c['old']:,} steps" if c["what"] == "stop"
            else f"{c['what']} {c['old']:.4g} to {c['new']:.4g} at step {c['step']:,}"
            for c in self.changes
        ]  # fmt: skip
        return (
            f"Run({type(self.coder).__name__}, {m['tokens']:,} tokens in {m['passes']:.1f} passes: last batch "
            f"FVU {m['fvu']:.3f}, L0 {m['l0']:.1f}; dead {self.coder.meta['dead']:.2%} "
            f"on {self.coder.meta['dead_tokens']:,} tokens{''.join(f'; {text}' for text in made)})"
        )


@as_annotated
def train(
    coder: SparseCoder,
    data: Store | Tensor | Batch,
    config: TrainConfig | None = None,
    *,
    path: str | Path | None = None,
    callbacks: Iterable[Callable[[Event], Any]] = (),
    changes: Iterable[Mapping[str, Any]] = (),
) -> Run:
    """Train a coder in place; returns a ``Run``, the coder in eval mode. Without a config: one pass over the data.

    data: a store (a transcoder reads the first of its two sites and writes the second, a crosscoder takes all), a
    (tokens, d_in) or (tokens, layers, d_in) tensor, or a ``Batch`` of all tokens with target or token ids.

    Activations are scaled to norm √d_in while training and the scale is folded into the biases at the end; b_dec starts
    at the geometric median; decoder rows keep unit norm. Afterwards the coder knows its site, token mask, model,
    threshold, ``f_scale`` and dead features.

    Callbacks get an ``Event`` at each logged step and may steer the training: ``event.control`` pauses it, changes the
    learning rate or the sparsity between two steps, or stops it early. ``run.changes`` tells what was done, and
    ``changes=run.changes`` does it again.

    With ``path``, checkpoints are written there, and the same call continues an interrupted run to the weights of an
    unbroken one, changes included; the finished coder is saved there too. Without it nothing is reused. A finished run
    that was changed or stopped is not what the plain call gives: it is opened by ``changes=`` that name what was done.

    ``torchrun --nproc-per-node N script.py`` trains one coder over N processes, up to rounding to the weights of a
    single one. Every rank returns the same coder; callbacks run on every rank; the first writes files and shows
    progress. A run may go on over another number of ranks. With ``shard="features"`` build the coder on the CPU; a
    callback's ``coder`` then has this rank's features.

    Raises ValueError for a width that does not fit, a ``path`` that holds another run (the difference is named),
    changes over several processes, and for NaN or Inf in data or loss (step and cause are named; the coder keeps its
    last good weights).
    """
    rows = rows_for(coder, data)
    config = config or one_pass(rows)
    with joined(coder, config.shard) as ranks:
        folder = Path(path) if path is not None else None
        if folder is not None:
            cache.make_folder(folder)
        with cache.sole_writer(folder) if folder is not None and ranks.first else nullcontext():
            ranks.wait()  # until the first has the folder for itself
            return Training(coder, rows, config, folder, tuple(callbacks), ranks, changes=changes).run()


@as_annotated
def meta_sae(coder: SparseCoder, d_sae: int, k: int, config: TrainConfig, *, seed: int = 0) -> Run:
    """A BatchTopK trained on the decoder rows of another coder, each row a token: are its features made of fewer parts?
    (Bussmann et al. 2024, "Showing SAE Latents Are Not Atomic Using Meta-SAEs"). Rows that never fired are left out.

    Args: d_sae: parts to look for, fewer than the rows. k: parts of a row.
    """
    rows = torch.nn.functional.normalize(coder.W_dec.detach(), dim=1)
    live = coder.f_scale > 0
    meta = BatchTopK(coder.d_out, d_sae, k, seed=seed).to(rows.device)
    return train(meta, rows[live] if bool(live.any()) else rows, config)


def one_pass(rows: Store | Rows) -> TrainConfig:
    """What is trained without a config."""
    return TrainConfig(tokens=rows.training_rows, batch_size=min(TrainConfig.batch_size, rows.training_rows))


def rows_for(coder: SparseCoder, data: Store | Tensor | Batch) -> Store | Rows:
    """What serves this coder its batches. ValueError where its sites or widths are not those of the data."""
    if not isinstance(data, Store):
        rows = Rows(data)
    elif data.writes != data.reads:  # a view that says what is read and written
        rows = data
    else:
        rows = data.view(*coder.choose_sites(data.chosen))
    if coder.input_norm != "none":
        raise ValueError(
            f"this coder normalises each x (input_norm={coder.input_norm!r}), which training does not: train a fresh "
            "one"
        )
    in_shape, out_shape = rows.shapes
    if isinstance(rows, Rows) and coder.transcodes and not rows.has_target:
        raise ValueError("a transcoder needs a target: pass sl.Batch(x, target), or a store of two sites")
    if in_shape == coder.in_shape and out_shape == coder.out_shape:
        return rows
    if len(in_shape) == len(coder.in_shape) == 1 and in_shape != coder.in_shape:
        width = in_shape[0]
        raise ValueError(f"the coder reads d_in={coder.d_in}, the activations have width {width}: make them equal")
    raise ValueError(
        f"the coder reads {coder.in_shape} and writes {coder.out_shape}, the data holds {in_shape} and {out_shape}: "
        "make them equal"
    )


class Training:
    """The state of one call of train(): coder, optimiser, counters, history."""

    def __init__(
        self, coder: SparseCoder, rows: Store | Rows, config: TrainConfig, path: Path | None, callbacks: tuple,
        ranks: Ranks = ALONE, *, changes: Iterable[Mapping[str, Any]] = (), label: str = "",
    ):  # fmt: skip
        ranks.require(coder, config.batch_size)
        alone = "" if ranks.size == 1 else f"{ranks.size} processes train this coder: only one alone can be changed"
        self.control = Control(coder, config.peak(coder.d_sae), config.total_steps, changes, alone)
        self.label = label or type(coder).__name__
        self.rows, self.config, self.path, self.callbacks, self.ranks = rows, config, path, callbacks, ranks
        self.whole = self.coder = coder  # coder: what this rank trains of it
        self.identity = {
            "config": {name: value for name, value in asdict(config).items() if name != "shard"},
            "data": rows.fingerprint,
            "coder": {"family": type(coder).__name__, **coder.config},
            "initial_weights": checkpoint.fingerprint(coder),
        }
        self.trained_from = coder.id if coder.meta else None  # what was said of its features goes on from there
        self.step = self.kept = 0  # kept: the step of the checkpoint on disk
        self.history: list[Metrics] = []
        self.scale: Tensor  # activations are multiplied by it: a number, or one per layer
        self.target_scale: Tensor | None  # None: the target is x
        self.idle = torch.zeros(coder.d_sae, dtype=torch.long)  # tokens since each feature fired
        read = lambda step: ranks.batch(rows, step, config.batch_size, config.seed)  # noqa: E731
        self.ahead = ReadAhead(read, config.total_steps)

    def run(self) -> Run:
        if finished := self.begin():
            return finished
        try:
            self.emit("start")
            with self._bar() as bar, self.ranks.stopping() as asked:
                while self.going():
                    self.one_step()
                    bar()
                    if asked():
                        self.keep()
                        raise KeyboardInterrupt
            self.keep()  # calibration takes a while: if it is interrupted, training is not lost
        except BaseException as err:
            self.leave(err)
            raise
        try:
            return self.end()
        except BaseException as err:
            self.tell_left(err)
            raise

    def going(self) -> bool:
        """Whether another step is due, once a pause is over and what callbacks asked for is done."""
        control = self.control
        if self.step < control.last and control.wanted:
            if control.paused:
                self.emit("pause")
                control.wait()
                self.emit("resume")
            control.act(self.step, shown=bool(self.history) and self.history[-1]["step"] == self.step)
        return self.step < control.last

    # ---- begin and end

    def begin(self, first: Callable[[], Batch] | None = None) -> Run | None:
        """Ready for the next step, from the checkpoint where there is one; or the run itself where it is finished.
        first: gives ``first_batch`` where it was read before."""
        ranks, finished, found = self.ranks, None, None
        if self.path is not None:
            finished = self.finished()
            found = None if finished else self.interrupted()
        self._require_same_everywhere(begun=found[0]["step"] if found else "finished" if finished else 0)
        if finished and self.path is not None:
            if ranks.first:
                checkpoint.remove_checkpoints(self.path)  # of a run that was killed just before it did
            return finished
        if found is not None:
            header, _ = found
            self.control.restore(header["changes"], header["step"])
            if header["changes"]:
                log.warning("going on with the changes made to this run: %s", header["changes"])
        coder = self.coder = ranks.own_part(self.whole)
        self.parameters = dict(coder.named_parameters())
        if found is None:
            start = self._on_device((first or self.first_batch)())
            self._require_finite(start.x)
            self._require_finite(start.target)
            self.scale = _scale(start.x)
            self.target_scale = None if start.target is start.x else _scale(start.target)
            if coder.in_raw_units:  # it was trained before
                coder.fold(1 / self.scale, None if self.target_scale is None else 1 / self.target_scale)
            coder.begin(self._scaled(start))
        self.idle = torch.zeros(coder.d_sae, dtype=torch.long, device=coder.W_dec.device)
        self.adam = checkpoint.Adam(coder)
        if found is not None:
            self._restore(*found)
        # Devices that differ in the last bit would stay apart.
        ranks.copy_first([self.scale] + [t for t in (self.target_scale,) if t is not None])
        ranks.copy_first(ranks.held_whole(coder.state_dict()))
        coder.in_raw_units = False
        if not coder.dense:
            rows = self.config.batch_size // ranks.row_shares
            coder.scratch = kernels.Memory(rows, coder.d_sae, coder.W_dec.device)
        coder.train()
        return None

    def first_batch(self) -> Batch:
        """What scales and biases start from."""
        return self.rows.batch(0, max(4096, self.config.batch_size), self.config.seed)

    def calibration_data(self) -> tuple[list[Tensor], Tensor | None]:
        """(training activations in blocks, activations that training never saw), 100,000 tokens each at most."""
        blocks = [x for _, x in islice(self.rows.blocks(), -(-CALIBRATION_TOKENS // 8192))]
        unseen = self.rows.reserved(CALIBRATION_TOKENS)
        for x in blocks if unseen is None else [*blocks, unseen]:  # training need not have seen every row
            self._require_finite(x)
        return blocks, unseen

    def fold(self) -> None:
        """Back to raw units: what the user gets."""
        self.coder.fold(self.scale, self.target_scale)
        self.coder.scratch, self.coder.in_raw_units, self.coder.progress = None, True, 1.0

    def end(self, data: Callable[[], tuple[list[Tensor], Tensor | None]] | None = None) -> Run:
        """Fit, save and hand over the coder. data: gives ``calibration_data`` where it was read before."""
        self.control.close()
        self.fold()
        facts = self._calibrate(data or self.calibration_data)
        whole, self.coder = self.whole, self.whole
        whole.in_raw_units, whole.progress = True, 1.0
        self._stamp(facts)
        run = Run(whole.eval(), self.config, self.history, self.path, self.control.changes)
        if self.path is not None and self.ranks.first:
            header = self.identity | {"history": self.history, "changes": run.changes}
            checkpoint.finish(self.path, whole, header)
        self.emit("end")
        self.ranks.wait()  # nobody leaves before the files are there
        return run

    def _calibrate(self, data: Callable[[], tuple[list[Tensor], Tensor | None]]) -> Metrics:
        """Threshold, f_scale and dead features of the whole coder. One rank does it for all, unless each has a part."""
        coder, ranks = self.coder, self.ranks
        facts: Metrics = {}
        if ranks.first or coder is not self.whole:
            device = coder.W_dec.device
            blocks, unseen = data()
            facts = coder.calibrate([x.to(device) for x in blocks], None if unseen is None else unseen.to(device))
        ranks.copy_first(ranks.held_whole(coder.state_dict()))
        ranks.rejoin(coder, self.whole)
        return ranks.from_first(facts)

    def _stamp(self, facts: Metrics) -> None:
        """What the coder must know to be used alone: site, mask, model."""
        rows, coder = self.rows, self.whole
        meta: dict[str, Any] = {
            "dead": facts["dead"],
            "dead_tokens": int(facts["tokens"]),
            "train_tokens": self.history[-1]["tokens"],
            "train": asdict(self.config),
        }
        if self.control.changes:
            meta["changes"] = self.control.changes
        if isinstance(rows, Store):
            coder.reads, coder.writes = rows.reads, rows.writes
            meta |= {key: rows.identity[key] for key in ("model", "model_fingerprint", "prefix_id", "text", "context")}
            meta["mask"] = rows.mask.to_dict()
            meta["excluded"] = rows.excluded
        if self.trained_from is not None:
            meta["trained_from"] = self.trained_from
        coder.meta = meta
        coder.id  # noqa: B018 (made now, on every rank alike)

    def keep(self) -> None:
        """A checkpoint of what is done so far, where there is a path."""
        if self.path is not None:
            self._checkpoint(left=True)

    def leave(self, error: BaseException) -> None:
        """Interrupted or failed: keep what can be continued, and leave the coder usable in raw units."""
        interrupted = isinstance(error, KeyboardInterrupt)
        try:
            if interrupted and self.ranks.size == 1:  # several ranks stop together, or leave at different steps
                self.keep()
        finally:
            self.fold()
        if interrupted and self.path is not None and self.ranks.first:
            log.warning("stopped at step %d; the same call with path=%r goes on from there", self.step, str(self.path))
        self.tell_left(error)

    def tell_left(self, error: BaseException) -> None:
        """Callbacks hear that no "end" will come; what they raise now would hide why."""
        self.control.close()
        try:
            self.emit("left", error)
        except Exception:
            log.exception("a callback failed after training did")

    # ---- one step

    def one_step(self, raw: Batch | None = None) -> None:
        """One step, on the batch that is due or on the same one handed in."""
        coder, config, ranks = self.coder, self.config, self.ranks
        raw = self._on_device(self.ahead(self.step) if raw is None else raw)
        batch = self._scaled(raw)
        lr = config.lr_at(self.step, self.whole.d_sae, self.control.lr)
        coder.zero_grad()
        if coder.scratch is not None:
            coder.scratch.rewind()
        progress = coder.progress = self.step / config.total_steps
        with ranks.choosing(coder):
            out = coder.output(batch.x, batch.tokens)
            terms = coder.terms(batch, out, progress=progress, dead=self.idle > config.dead_after)
        loss = torch.stack(list(terms.values()))
        loss.sum().backward()
        ranks.share_gradients(self.parameters)
        metrics = self._sound(raw, list(terms), loss.detach(), lr)
        logged = (self.step + 1) % config.log_every == 0 or self.step + 1 == self.control.last
        with checkpoint.whole_step():  # a checkpoint holds a whole step, wherever an interruption falls
            self.adam.update(lr)
            coder.project()
            ranks.copy_first(b for b in coder.buffers() if not b.dim())  # PAnneal's weight goes by a rank's own rows
            fired = ranks.over_rows(_fired(out, coder.d_sae).int()) > 0
            self.idle += config.batch_size
            self.idle[fired] = 0
            self.step += 1
            if logged:
                self._record(batch, out, metrics, lr)
        if logged:
            self.control.output = out
            self.emit("step")
            self.control.output = None  # no step is to wait for the memory of the one before
        if self.path is not None and self.step % config.checkpoint_every == 0:
            self._checkpoint()
            self.emit("checkpoint")

    def _require_same_everywhere(self, begun: int | str) -> None:
        """All ranks must do the same: a coder is as random as its seed."""
        if self.ranks.size == 1:
            return
        here = self.identity | {"config": asdict(self.config), "steps done": begun}
        first, *others = map(json.loads, self.ranks.texts(json.dumps(here)))
        for rank, other in enumerate(others, 1):
            if wrong := checkpoint.differences(other, first):
                raise ValueError(
                    f"rank {rank} trains otherwise than rank 0: it differs in {wrong}. Every rank must run the same "
                    "script, with fixed seeds and folders that all of them see"
                )

    def _sound(self, raw: Batch, terms: list[str], loss: Tensor, lr: float) -> Metrics:
        """The loss terms as numbers. ValueError where data, loss or gradients are not finite: before any weight is
        changed. One look at the device for all of it."""
        ranks = self.ranks
        loss = ranks.over_rows(loss) / ranks.row_shares
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        sizes = ranks.over_features(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
        data = [raw.x] if raw.target is raw.x else [raw.x, raw.target]
        sums = torch.stack([t.sum() for t in data])  # finite only if all of it is
        figures = torch.cat([sums, loss, sizes]).tolist()
        for t in data:
            if not math.isfinite(figures.pop(0)):
                self._require_finite(t)
        metrics = dict(zip(terms, figures, strict=False))
        self._require_sound("the loss is", [name for name, value in metrics.items() if not math.isfinite(value)], lr)
        found = zip(gradients, figures[len(terms) :], strict=True)
        self._require_sound("the gradients are", [name for name, size in found if not size < MAX_GRADIENT], lr)
        return metrics

    def _require_sound(self, what: str, bad: list[str], lr: float) -> None:
        if bad:
            raise ValueError(
                f"step {self.step}: {what} not finite ({', '.join(bad)}) though the data is, so the weights ran away: "
                f"lower lr (now {lr:.3g}) and train a fresh coder"
            )

    def _record(self, batch: Batch, out: Output, terms: Metrics, lr: float) -> None:
        """Figures of the batch of all ranks."""
        ranks, rows = self.ranks, len(batch.x) * self.ranks.row_shares
        tokens = self.step * self.config.batch_size
        codes = out.codes.values if isinstance(out.codes, Codes) else out.codes
        mean = ranks.over_rows(batch.target.mean(0)) / ranks.row_shares
        parts = zip(out.x_hat.detach().split(512), batch.target.split(512), strict=True)  # small ones: see Memory
        error, variance = ranks.over_rows(
            torch.stack([torch.stack([(y - t).square().sum(), (t - mean).square().sum()]) for y, t in parts]).sum(0)
        )
        dead = (self.idle > self.config.dead_after).sum()
        active = ranks.over_rows((codes > 0).sum())
        self.history.append(
            {
                "step": self.step,
                "tokens": tokens,
                "passes": tokens / self.rows.training_rows,
                "loss": sum(terms.values()),
                "fvu": float(error / variance),
                "l0": int(ranks.over_features(active)) / rows,
                "dead": int(ranks.over_features(dead)) / self.whole.d_sae,
                "lr": lr,
            }
            | terms
        )

    def _on_device(self, batch: Batch) -> Batch:
        """The batch where the coder is."""
        device = self.coder.W_dec.device
        x = batch.x.to(device)
        target = x if batch.target is batch.x else batch.target.to(device)
        return Batch(x, target, None if batch.tokens is None else batch.tokens.to(device), batch.positions)

    def _scaled(self, batch: Batch) -> Batch:
        x = batch.x * self.scale.unsqueeze(-1)
        target = x if self.target_scale is None else batch.target * self.target_scale.unsqueeze(-1)
        return Batch(x, target, batch.tokens, batch.positions)

    def _require_finite(self, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            row = int((~x.isfinite().flatten(1).all(-1)).nonzero()[0])
            raise ValueError(
                f"step {self.step}: the activations hold NaN or Inf (row {row} of the batch): drop such rows, or "
                f"harvest again in float32"
            )

    def emit(self, kind: str, error: BaseException | None = None) -> None:
        """Tell the callbacks."""
        metrics = self.history[-1] if self.history and kind != "start" else {}
        for callback in self.callbacks:
            callback(
                Event(kind, self.step, metrics, self.coder, self.config, self.control, self.history, self.rows,
                      self.label, self.path, error)
            )  # fmt: skip

    @contextmanager
    def _bar(self) -> Iterator[Callable[[], None]]:
        from tqdm.auto import tqdm

        total = self.config.total_steps
        passes = total * self.config.batch_size / self.rows.training_rows
        name = f"train {type(self.coder).__name__}, {passes:.2g} {'pass' if round(passes, 1) == 1 else 'passes'}"
        quiet = not self.ranks.first or any(getattr(c, "shows_progress", False) for c in self.callbacks)
        with tqdm(total=total, initial=self.step, desc=name, dynamic_ncols=True, disable=quiet) as bar:

            def show() -> None:
                bar.update(self.step - bar.n)
                if not self.history:  # log_every may lie ahead
                    return
                m = self.history[-1]
                text = f"pass {m['passes']:.1f}, loss {m['loss']:.1f}, FVU {m['fvu']:.3f}, "
                text += f"L0 {m['l0']:.1f}, dead {m['dead']:.1%}"
                bar.set_postfix_str(text, refresh=False)

            yield show

    # ---- on disk

    def _checkpoint(self, left: bool = False) -> None:
        """All that an unbroken run would have at this step; the same file over any number of ranks."""
        assert self.path is not None
        tensors = {}
        for name, part in checkpoint.pack(self.coder, self.adam, self.idle).items():
            whole = self.ranks.whole(name, part)
            if self.ranks.first:
                tensors[name] = whole
        if not self.ranks.first:
            return
        scales = [self.scale.tolist(), None if self.target_scale is None else self.target_scale.tolist()]
        header = self.identity | {"step": self.step, "scale": scales, "history": self.history, "left_weights": None}
        header["changes"] = self.control.changes
        if left and self.coder is self.whole:  # it is about to be folded; recognise it when it comes back
            header["left_weights"], header["left_config"] = self._folded_fingerprint(), self.coder.config
        far = f"the run is kept up to step {self.kept}" if self.kept else "nothing of this run is kept yet"
        checkpoint.write(self.path, header, tensors, f"{far}: make room there, and make the same call with a new coder")
        self.kept = self.step

    def _folded_fingerprint(self) -> str:
        keep = {n: t.clone() for n, t in self.coder.state_dict().items()}
        self.coder.fold(self.scale, self.target_scale)
        fingerprint = checkpoint.fingerprint(self.coder)
        self.coder.load_state_dict(keep)
        return fingerprint

    def interrupted(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        assert self.path is not None
        return checkpoint.read(self.path, self.identity, self.ranks.part)

    def _restore(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        assert self.path is not None
        device = self.coder.W_dec.device
        self.step = self.kept = header["step"]
        self.history = header["history"]
        scale, target_scale = header["scale"]
        self.scale = torch.tensor(scale, device=device)
        self.target_scale = None if target_scale is None else torch.tensor(target_scale, device=device)
        checkpoint.unpack(self.path, tensors, self.coder, self.adam, self.idle)

    def finished(self) -> Run | None:
        """The run at ``path`` if it is whole and the same; its coder's weights go into this one."""
        assert self.path is not None
        if (found := checkpoint.finished(self.path, self.identity)) is None:
            return None
        done, header = found
        self.control.require_same(header["changes"], self.path)
        self.control.close()
        self.whole.load_state_dict(done.state_dict())
        self.whole.reads, self.whole.writes, self.whole.meta = done.reads, done.writes, done.meta
        self.whole.path, self.whole.in_raw_units = done.path, True
        return Run(self.whole.eval(), self.config, header["history"], self.path, header["changes"])


def _scale(x: Tensor) -> Tensor:
    """What brings activations to a mean norm of √d: a number, or one for each layer of (tokens, layers, d)."""
    norm = x.norm(dim=-1).mean(0)
    if not bool((norm > 0).all()):
        raise ValueError(
            "data must hold activations that are not all 0, got zeros only (at a layer, where there are several): "
            "check what made them, or harvest again"
        )
    return math.sqrt(x.shape[-1]) / norm.clamp_min(1e-12)


def _fired(out: Output, d_sae: int) -> Tensor:
    """Bool per feature: active on any row of the batch."""
    if isinstance(out.codes, Codes):
        fired = torch.zeros(d_sae, dtype=torch.bool, device=out.codes.values.device)
        fired[out.codes.features[out.codes.values > 0]] = True
        return fired
    return (out.codes > 0).any(0)
