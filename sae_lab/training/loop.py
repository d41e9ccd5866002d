"""The training loop: data -> batch -> loss -> step. It sees coders and batches, never a family by name."""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from sae_lab.activations.store import WATCHED, Harvested, ReadAhead, Rows
from sae_lab.activations.streaming import Stream
from sae_lab.saes import kernels, losses
from sae_lab.saes.base import SparseCoder
from sae_lab.training import checkpoint
from sae_lab.training.adam import Adam
from sae_lab.training.aiming import Aim, Reached
from sae_lab.training.checkpoint import Found
from sae_lab.training.config import TrainConfig, require_precision
from sae_lab.training.control import Control
from sae_lab.training.process import ALONE, Process
from sae_lab.training.run import Event, Metrics, Run
from sae_lab.training.through import Through
from sae_lab.training.watching import CrossEntropy
from sae_lab.types import Batch, Codes, Output

log = logging.getLogger(__name__)

CALIBRATION_TOKENS = 100_000  # at most: threshold, f_scale and dead features are taken on them
HELD_OUT_EVERY = 65_536  # tokens from one held-out measurement to the next, which then costs 1 % of the time
MEASURED_AT_ONCE = 512  # held-out rows
MAX_GRADIENT = 1e18  # Adam squares it, in float32
CalibrationData = tuple[list[Tensor], Tensor | None]


class Training:
    """One call of ``sl.train``: coder, optimiser, counters, history. ``begin``, then ``one_step`` while ``going``, then
    ``end``; ``run`` does all of it."""

    def __init__(
        self, coder: SparseCoder, rows: Harvested | Rows, config: TrainConfig, path: Path | None, callbacks: tuple,
        process: Process = ALONE, *, changes: Iterable[Mapping[str, Any]] = (), label: str = "",
        watch: tuple[Any, Any] | None = None,
    ):  # fmt: skip
        process.require(coder, config.batch_size)
        many = "" if process.size == 1 else f"{process.size} processes train this coder: only one alone can be changed"
        if many and (config.target_l0 is not None or watch is not None):
            raise ValueError(f"target_l0 and watch need one process, got {process.size}: start one, or leave them out")
        if watch is not None and not isinstance(rows, Harvested):
            raise ValueError(
                "watch splices the coder in at its site, which only a store or a stream knows: train on one of them"
            )
        self.watch = watch
        self.aim = None if config.target_l0 is None else Aim(coder, config.target_l0)
        self.control = Control(coder, config.peak(coder.d_sae), config.total_steps, changes, many, self.aim is not None)
        self.label = label or type(coder).__name__
        self.rows, self.config, self.path, self.callbacks, self.process = rows, config, path, callbacks, process
        self.whole = self.coder = coder  # coder: the part of it that this process trains
        coder._require_float32()
        require_precision(config.precision, coder.b_dec.device)
        if config.precision == "tf32" and isinstance(rows, Stream):
            raise ValueError(
                "precision='tf32' would hold for the model of a stream too, which reads meanwhile: harvest a store, or "
                "leave precision out"
            )
        self.through = None if config.objective == "reconstruction" else Through(rows, coder, config)
        if self.through and process.size > 1:
            raise ValueError(
                f"objective={config.objective!r} needs one process, got {process.size}: start one, or leave it out"
            )
        self.identity = {
            "config": {name: value for name, value in config.to_dict().items() if name != "shard"},
            "data": rows.fingerprint,
            "coder": checkpoint.arguments(coder),
            "initial_weights": checkpoint.fingerprint(coder),
        }
        self.trained_from = coder.id if coder.meta else None  # what was said of its features goes on from there
        self.cross_entropy: CrossEntropy | None = None
        self.step = self.kept = 0  # kept: the step of the checkpoint on disk
        self.history: list[Metrics] = []
        self.scale: Tensor  # activations are multiplied by it: a number, or one per layer
        self.target_scale: Tensor | None  # None: the target is x
        own = self.through.batch if self.through else partial(process.batch, rows)
        read = partial(own, batch_size=config.batch_size, seed=config.seed)
        # The loss through the model keeps it busy, so that nothing is gained by reading ahead.
        self.ahead = ReadAhead(read, 0 if self.through else config.total_steps)

    def run(self) -> Run:
        if finished := self.begin():
            return finished
        try:
            self.emit("start")
            with self._bar() as show, self.process.stopping() as asked:
                while self.going():
                    self.one_step()
                    show()
                    if asked():
                        self.keep()
                        raise KeyboardInterrupt
            self.keep()  # calibration takes a while: if it is interrupted, training is not lost
            return self.end()
        except BaseException as err:
            self.leave(err)
            raise

    def going(self) -> bool:
        """Whether another step is due. Waits while paused, and makes the changes that callbacks asked for."""
        control = self.control
        if self.step < control.last and control.wanted:
            if control.paused:
                self.emit("pause")
                control.wait()
                self.emit("resume")
            control.act(self.step, shown=bool(self.history) and self.history[-1]["step"] == self.step)
        return self.step < control.last

    def one_step(self, raw: Batch | None = None) -> None:
        """data -> batch -> loss -> step. raw: the batch that is due, where it was read before."""
        coder, config, process = self.coder, self.config, self.process
        raw = self._on_device(self.ahead(self.step) if raw is None else raw)
        batch = self._scaled(raw)
        lr = config.lr_at(self.step, self.whole.d_sae, self.control.lr)
        coder.zero_grad()
        if coder.scratch is not None:
            coder.scratch.rewind()
        coder.progress = self.step / config.total_steps
        coder.any_dead = self._any_dead()
        beyond: dict[str, Tensor] = {}  # figures of the loss through the model
        with coder.multiplying(config.precision), process.choosing(coder):
            out = coder.output(batch.x, batch.tokens)
            terms = coder.terms(batch, out, progress=coder.progress, dead=self.idle > config.dead_after)
        if self.through:
            terms, beyond = self.through.terms(out.x_hat / self._target_scale, terms)
        loss = torch.stack(list(terms.values()))
        with coder.multiplying(config.precision):
            loss.sum().backward()
        process.share_gradients(self.parameters)
        fired = process.over_rows(_fired(out, coder.d_sae).int()) > 0
        idle = (self.idle + config.batch_size).masked_fill_(fired, 0)
        logged = (self.step + 1) % config.log_every == 0 or self.step + 1 == self.control.last
        more = [process.over_features((idle > config.dead_after).sum())]
        more += [self._active(out)] if logged or self.aim else []
        more += [self._fvu(batch, out), *beyond.values()] if logged else []
        metrics, (dead, *figures) = self._sound(raw, list(terms), loss.detach(), more, lr)
        with checkpoint.whole_step():  # a checkpoint holds a whole step, wherever an interruption falls
            self.adam.update(lr)
            coder.project()
            process.copy_first(b for b in coder.buffers() if not b.dim())  # PAnneal's weight goes by its own rows
            self.idle.copy_(idle)
            self._known_dead = self.idle._version, dead > 0
            self.step += 1
            active = figures[0] / config.batch_size if figures else 0.0
            if self.aim:
                self.aim.follow(active, config.total_steps, self.step / config.total_steps)
            if logged:
                metrics_beyond = dict(zip(beyond, figures[2:], strict=True))
                self._record(active, figures[1], int(dead), metrics, lr, metrics_beyond)
        if logged:
            self.control.output = out
            self.emit("step")
            self.control.output = None  # its memory is free for the next step
        if self.path is not None and self.step % config.checkpoint_every == 0:
            self.keep()
            self.emit("checkpoint")

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

    @property
    def _target_scale(self) -> Tensor:
        return self.scale if self.target_scale is None else self.target_scale

    def _any_dead(self) -> bool | None:
        """Whether a feature is dead, as the last step found; None where ``idle`` was changed since, and where ranks
        hold features of their own."""
        version, any_dead = self._known_dead
        return any_dead if version == self.idle._version and self.process.feature_shares == 1 else None

    def _sound(
        self, raw: Batch, terms: list[str], loss: Tensor, more: list[Tensor], lr: float
    ) -> tuple[Metrics, list[float]]:
        """(the loss terms, the figures ``more``) as numbers. ValueError if data, loss or gradients are not finite,
        before any weight changes. Everything is read from the device at once: of a family that chooses k features of
        each token this is the one time in a step that the device is waited for."""
        process = self.process
        loss = process.over_rows(loss) / process.row_shares
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        sizes = process.over_features(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
        data = [raw.x] if raw.target is raw.x else [raw.x, raw.target]
        sums = torch.stack([t.sum() for t in data])  # finite only if all of it is
        figures = torch.cat([sums, loss, sizes, torch.stack([figure.float() for figure in more])]).tolist()
        for t in data:
            if not math.isfinite(figures.pop(0)):
                _require_finite(t, self.step)
        metrics = dict(zip(terms, figures, strict=False))
        found = zip(gradients, figures[len(terms) : -len(more)], strict=True)
        for what, bad in (
            ("the loss is", [name for name, value in metrics.items() if not math.isfinite(value)]),
            ("the gradients are", [name for name, size in found if not size < MAX_GRADIENT]),
        ):
            if bad:
                raise ValueError(
                    f"step {self.step}: {what} not finite ({', '.join(bad)}) though the data is, so the weights ran "
                    f"away: lower lr (now {lr:.3g}) and train a fresh coder"
                )
        return metrics, figures[-len(more) :]

    def _active(self, out: Output) -> Tensor:
        """The number of active features, over the whole batch."""
        process, codes = self.process, out.codes.values if isinstance(out.codes, Codes) else out.codes
        return process.over_features(process.over_rows((codes > 0).sum()))

    def _fvu(self, batch: Batch, out: Output) -> Tensor:
        """FVU over the whole batch."""
        process = self.process
        mean = process.over_rows(batch.target.mean(0)) / process.row_shares
        parts = zip(out.x_hat.detach().split(512), batch.target.split(512), strict=True)  # small ones: see Memory
        sums = torch.stack([torch.stack([(y - t).square().sum(), (t - mean).square().sum()]) for y, t in parts])
        error, variance = process.over_rows(sums.sum(0))
        return error / variance

    def _record(self, l0: float, fvu: float, dead: int, terms: Metrics, lr: float, beyond: Metrics) -> None:
        """A row of the history: figures of the whole batch, and now and then of held-out tokens."""
        tokens, known = self.step * self.config.batch_size, self.rows.training_rows
        passes = {"passes": tokens / known} if known else {}
        self.history.append(
            {"step": self.step, "tokens": tokens}
            | passes
            | {
                "loss": sum(terms.values()),
                "fvu": fvu,
                "l0": l0,
                "dead": dead / self.whole.d_sae,
                "lr": lr,
            }
            | terms
            | beyond
            | self._held_out(l0)
            | (self.cross_entropy(self._snapshot) if self.cross_entropy else {})
        )

    def _held_out(self, l0: float) -> Metrics:
        """FVU and L0 of held-out tokens, at the last step and where the step is due, whatever was measured before: the
        history of a resumed run is that of an unbroken one. l0: of the batch."""
        config, found = self.config, {}
        every = max(1, HELD_OUT_EVERY // config.batch_size)
        if self.aim:  # which goes by it
            found["coefficient"] = self.aim.coefficient
            every = max(1, min(every, config.total_steps // 20))
        every = max(every, config.total_steps // 300)
        due = self.step // every != (self.step - config.log_every) // every
        if self.rows.watched is None or not (due or self.step == self.control.last):
            return found
        held = measured(self.coder, self._scaled(self._on_device(self.rows.watched)), self.process)
        if self.aim:
            self.aim.correct(held["l0"], l0)
        return found | {f"{name}_held_out": value for name, value in held.items()}

    def begin(self, first: Callable[[Harvested | Rows], Batch] | None = None) -> Run | None:
        """Get ready for the first step, or the one after the checkpoint. Returns the run if it is finished already.
        first: a ``first_batch`` that several coders share."""
        run = self.finished()
        found = None if run else self.interrupted()
        begun = found.header["step"] if found else "finished" if run else 0
        self.process.require_same(self.identity | {"config": self.config.to_dict(), "steps done": begun})
        if run is not None:
            if run.path is not None and self.process.first:
                checkpoint.remove_checkpoints(run.path)  # of a run that was killed just before it did
            return run
        self.id = found.header["run"] if found is not None else self.process.from_first({"run": uuid4().hex})["run"]
        if found is not None:
            self.control.restore(found.header["changes"], found.header["step"])
            if self.control.changes:
                log.warning("going on with the changes made to this run: %s", self.control.changes)
        coder = self.coder = self.process.own_part(self.whole)
        self.parameters = dict(coder.named_parameters())
        if found is None:
            if self.aim:
                self.aim.apply()
            self._start(first(self.rows) if first else first_batch(self.rows, self.config))
        self.idle = torch.zeros(coder.d_sae, dtype=torch.long, device=coder.W_dec.device)  # tokens since it fired
        self._known_dead = self.idle._version, False
        self.adam = Adam(coder)
        if found is not None:
            self._restore(found)
        # Devices may round differently: all processes begin with the first one's numbers.
        self.process.copy_first([self.scale] if self.target_scale is None else [self.scale, self.target_scale])
        self.process.copy_first_state(coder)
        coder.in_raw_units = False
        if not coder.dense:
            rows = self.config.batch_size // self.process.row_shares
            coder.scratch = kernels.Memory(rows, coder.d_sae, coder.W_dec.device)
        if self.watch is not None:
            self.cross_entropy = CrossEntropy(self.watch, self._snapshot)
        coder.train()
        return None

    def _start(self, first: Batch) -> None:
        start = self._on_device(first)
        _require_finite(start.x, self.step)
        _require_finite(start.target, self.step)
        self.scale = _scale(start.x)
        self.target_scale = None if start.target is start.x else _scale(start.target)
        if self.coder.in_raw_units:  # it was trained before
            self.coder.fold(1 / self.scale, None if self.target_scale is None else 1 / self.target_scale)
        self.coder.begin(self._scaled(start))

    def fold(self) -> None:
        """Back to raw units: what the user gets."""
        with checkpoint.whole_step():
            self.coder.fold(self.scale, self.target_scale)
            self.coder.scratch, self.coder.in_raw_units, self.coder.progress = None, True, 1.0
            self.coder.any_dead = None
            if self.aim:
                self.aim.release()

    def end(self, data: Callable[[Harvested | Rows], CalibrationData] | None = None) -> Run:
        """Fit thresholds, save, and return the run. data: a ``calibration_data`` that several coders share."""
        self.control.close()
        self.rows.rest()
        self.fold()
        data = cache(data or partial(calibration_data, step=self.step))
        facts = self._calibrate(data)
        coder = self.coder = self.whole
        coder.in_raw_units, coder.progress = True, 1.0
        reached = None
        if self.aim:
            self.aim.settle()
            unseen = data(self.rows)[1]
            l0 = facts["l0"] if unseen is None else len(coder.codes_of(unseen).values) / len(unseen)
            reached = self.aim.reached(l0, 0 if unseen is None else len(unseen))
        self._stamp(facts, reached)
        run = Run(coder.eval(), self.config, self.history, self.path, self.control.changes, reached)
        if self.path is not None and self.process.first:
            checkpoint.finish(self.path, coder, self._header())
        self.emit("end")
        self.process.wait()  # nobody leaves before the files are there
        return run

    def _calibrate(self, data: Callable[[Harvested | Rows], CalibrationData]) -> Metrics:
        """Threshold, f_scale and dead features of the whole coder. One process does it for all, unless each has a
        part of the coder."""
        coder, process = self.coder, self.process
        facts: Metrics = {}
        if process.first or coder is not self.whole:
            device = coder.W_dec.device
            blocks, unseen = data(self.rows)
            facts = coder.calibrate([x.to(device) for x in blocks], None if unseen is None else unseen.to(device))
        process.copy_first_state(coder)
        process.rejoin(coder, self.whole)
        return process.from_first(facts)

    def _stamp(self, facts: Metrics, reached: Reached | None) -> None:
        """The coder's meta: all that it takes to use it later, such as site, mask and model."""
        coder = self.whole
        meta: dict[str, Any] = {
            "dead": facts["dead"],
            "dead_tokens": int(facts["tokens"]),
            "train_tokens": self.history[-1]["tokens"],
            "train": self.config.to_dict(),
        }
        if self.control.changes:
            meta["changes"] = self.control.changes
        if reached:
            meta["reached"] = reached._asdict()
        meta |= self._place(coder)
        if self.trained_from is not None:
            meta["trained_from"] = self.trained_from
        coder.meta = meta
        coder.id  # noqa: B018 (made now, on every rank alike)

    def _place(self, coder: SparseCoder) -> dict[str, Any]:
        """Set the coder's sites; what its meta is to say of them."""
        rows = self.rows
        if not isinstance(rows, Harvested):
            return {}
        coder.reads, coder.writes = rows.reads, rows.writes
        facts = {key: rows.identity[key] for key in ("model", "model_fingerprint", "prefix_id", "text", "context")}
        return facts | {"mask": rows.mask.to_dict(), "excluded": rows.excluded}

    def _snapshot(self) -> SparseCoder:
        """A copy of the coder as it would be if training ended now: in raw units, with a threshold, in eval mode."""
        scratch, self.coder.scratch = self.coder.scratch, None
        coder, self.coder.scratch = copy.deepcopy(self.coder), scratch
        coder.fold(self.scale, self.target_scale)
        coder.in_raw_units, coder.progress = True, 1.0
        coder.meta = self._place(coder)
        rows = self.rows.watched or self.rows.first(WATCHED, self.config.seed)
        coder.fit_threshold([rows.x.to(coder.W_dec.device)])
        return coder.eval()

    def leave(self, error: BaseException) -> None:
        """Interrupted or failed: keep what can be continued, and leave the coder usable in raw units. It notes which
        run left it, and callbacks get "left" in place of "end"."""
        interrupted = isinstance(error, KeyboardInterrupt) and not self.coder.in_raw_units  # else its steps are kept
        try:
            if interrupted and self.process.size == 1:  # several processes stop together, or leave at different steps
                self.keep()
        finally:
            if not self.coder.in_raw_units:
                self.fold()
        if interrupted and self.path is not None and self.process.first:
            log.warning("stopped at step %d; the same call with path=%r goes on from there", self.step, str(self.path))
        self.control.close()
        if self.process.size > 1:
            self.ahead.settle()  # ranks read a stream's batch together
        self.rows.rest()
        if self.path is not None:
            self.whole.meta = self.whole.meta | {checkpoint.LEFT: checkpoint.left(self.whole, self.id)}
        try:
            self.emit("left", error)
        except Exception:  # it would hide why training failed
            log.exception("a callback failed after training did")

    def finished(self) -> Run | None:
        """The run at ``path`` if it is whole and the same; its coder's weights go into this one."""
        if self.path is None or (found := checkpoint.finished(self.path, self.identity, self.whole)) is None:
            return None
        done, header = found
        self.control.require_same(header["changes"], self.path)
        self.control.close()
        self.whole.load_state_dict(done.state_dict())
        self.whole.reads, self.whole.writes, self.whole.meta = done.reads, done.writes, done.meta
        self.whole.path, self.whole.in_raw_units = done.path, True
        reached = Reached(**done.meta["reached"]) if "reached" in done.meta else None
        return Run(self.whole.eval(), self.config, header["history"], self.path, header["changes"], reached)

    def interrupted(self) -> Found | None:
        """The checkpoint of this run."""
        return None if self.path is None else checkpoint.read(self.path, self.identity, self.whole, self.process.part)

    def keep(self) -> None:
        """A checkpoint of what an unbroken run would have at this step, if there is a path."""
        if self.path is None:
            return
        parts = checkpoint.pack(self.coder, self.adam, self.idle).items()
        wholes = ((name, self.process.whole(name, part)) for name, part in parts)  # one after the other: they are large
        tensors = {name: whole for name, whole in wholes if self.process.first}
        if not self.process.first:
            return
        scales = [self.scale.tolist(), None if self.target_scale is None else self.target_scale.tolist()]
        header = self._header() | {"step": self.step, "scale": scales}
        header["data_at"] = (self.through or self.rows).state(self.step * self.config.batch_size)
        far = f"the run is kept up to step {self.kept}" if self.kept else "nothing of this run is kept yet"
        checkpoint.write(self.path, header, tensors, f"{far}: make room there, and make the same call with a new coder")
        self.kept = self.step

    def _header(self) -> dict[str, Any]:
        known = {"run": self.id, "trained_from": self.trained_from}
        known |= {"aim": self.aim.state} if self.aim else {}
        return self.identity | known | {"history": self.history, "changes": self.control.changes}

    def _restore(self, found: Found) -> None:
        assert self.path is not None
        device = self.coder.W_dec.device
        self.step = self.kept = found.header["step"]
        self.history, self.trained_from = found.header["history"], found.header["trained_from"]
        scale, target_scale = found.header["scale"]
        self.scale = torch.tensor(scale, device=device)
        self.target_scale = None if target_scale is None else torch.tensor(target_scale, device=device)
        (self.through or self.rows).resume(found.header.get("data_at"))
        checkpoint.unpack(self.path, found.tensors, self.coder, self.adam, self.idle)
        if self.aim:
            self.aim.state = found.header["aim"]
            self.aim.apply()

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

        total, name = self.config.total_steps, f"train {type(self.coder).__name__}"
        if self.rows.training_rows:
            passes = total * self.config.batch_size / self.rows.training_rows
            name += f", {passes:.2g} {'pass' if round(passes, 1) == 1 else 'passes'}"
        quiet = not self.process.first or any(getattr(c, "shows_progress", False) for c in self.callbacks)
        with tqdm(total=total, initial=self.step, desc=name, dynamic_ncols=True, disable=quiet) as bar:

            def show() -> None:
                bar.update(self.step - bar.n)
                if not self.history:  # log_every may lie ahead
                    return
                m = self.history[-1]
                text = f"pass {m['passes']:.1f}, " if "passes" in m else ""
                text += f"loss {m['loss']:.1f}, FVU {m['fvu']:.3f}, "
                text += f"L0 {m['l0']:.1f}, dead {m['dead']:.1%}"
                bar.set_postfix_str(text, refresh=False)

            yield show


@torch.no_grad()
def measured(coder: SparseCoder, batch: Batch, process: Process = ALONE) -> dict[str, float]:
    """l0 and fvu of rows, in eval mode. A coder in training whose threshold is fitted at the end chooses among these
    rows, as it will be fitted on such."""
    active, x_hats, device = 0, [], coder.W_dec.device
    chooses = coder.training and type(coder).fit_threshold is not SparseCoder.fit_threshold
    with nullcontext() if chooses else coder.evaluating(), coder.reusing(MEASURED_AT_ONCE):
        for start in range(0, len(batch.x), MEASURED_AT_ONCE):
            part = slice(start, start + MEASURED_AT_ONCE)
            tokens = None if batch.tokens is None else batch.tokens[part].to(device)
            out = coder.output(batch.x[part].to(device), tokens)
            codes = out.codes.values if isinstance(out.codes, Codes) else out.codes
            active += int(process.over_features((codes > 0).sum()))
            x_hats.append(out.x_hat.cpu())
    return {"l0": active / len(batch.x), "fvu": float(losses.fvu(torch.cat(x_hats), batch.target.cpu()))}


def first_batch(rows: Harvested | Rows, config: TrainConfig) -> Batch:
    """What scales and biases start from."""
    return rows.first(max(4096, config.batch_size), config.seed)


def calibration_data(rows: Harvested | Rows, step: int) -> CalibrationData:
    """(training activations in blocks, activations that training never saw), 100,000 tokens each at most."""
    blocks = [x for _, x in islice(rows.blocks(), -(-CALIBRATION_TOKENS // 8192))]
    unseen = rows.reserved(CALIBRATION_TOKENS)
    for x in blocks if unseen is None else [*blocks, unseen]:  # training need not have seen every row
        _require_finite(x, step)
    return blocks, unseen


def _require_finite(x: Tensor, step: int) -> None:
    if not bool(x.isfinite().all()):
        row = int((~x.isfinite().flatten(1).all(-1)).nonzero()[0])
        raise ValueError(
            f"step {step}: the activations hold NaN or Inf (row {row} of the batch): drop such rows, or harvest again "
            "in float32"
        )


def _scale(x: Tensor) -> Tensor:
    """The factor that brings activations to a mean norm of √d; for (tokens, layers, d) one a layer."""
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
        fired = torch.zeros(d_sae + 1, dtype=torch.bool, device=out.codes.values.device)
        fired[torch.where(out.codes.values > 0, out.codes.features, d_sae)] = True  # how many are 0 is not asked
        return fired[:d_sae]
    return (out.codes > 0).any(0)
