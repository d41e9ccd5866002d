"""TrainingMonitor: the curves of a training that runs, and its controls."""

import logging
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import traitlets
from torch import Tensor

from sae_lab.activations.store import Store
from sae_lab.activations.streaming import Stream
from sae_lab.results import Html
from sae_lab.saes.base import SparseCoder
from sae_lab.training import checkpoint
from sae_lab.training.config import TrainConfig
from sae_lab.training.run import Event, Run
from sae_lab.training.start import train
from sae_lab.training.watching import Curves
from sae_lab.types import Batch

from .monitor_views import Watched, arguments_before, code_of, html_of
from .panel import STATIC, Panel, in_words, quick
from .session import Session

log = logging.getLogger(__name__)

PERIOD = 0.5  # seconds between two messages to the screen
RATE_OVER = 20  # messages over which the speed is measured
OVER = ("done", "stopped", "interrupted", "failed")


class TrainingMonitor(Panel):
    """Live curves of a training, and its controls: pause, another learning rate or sparsity, stop and save.

        monitor = sl.TrainingMonitor(sae, store, config, path="runs/first")
        monitor.start()                                            # on a thread: the notebook stays free
        run = monitor.wait()

        sl.train(sae, store, config, callbacks=[monitor])          # or in a cell
        sl.sweep(grid, store, config, callbacks=[monitor])         # a line for each coder

    Args:
        coder, data, config: as for ``sl.train``; None, all three, for a monitor that is a callback.
        path: a folder for the coder and its checkpoints; None: nothing is saved.
        session: kept as ``monitor.session``; a training has nothing to select.
        watch: as for ``sl.train``.

    Attributes: ``run``, the ``Run`` of ``start`` when it is done, else None; ``state``: "waiting", "running",
    "pausing", "paused", "stopping", "finishing" (thresholds are fitted), "done", "stopped", "interrupted" or "failed".
    Traits, read only: ``status``, a dict of state, step, steps, tokens, passes over the data (0 of a stream),
    tokens_per_second, seconds_left and more; ``curves``, {coder: {"step": [...], "loss": [...], ...}} as in ``Curves``,
    as of the last pause or end; ``lines``, what may be changed of each coder; ``changes``, what was changed;
    ``can_start``; ``error``.

    The training goes on whatever happens to the monitor, closing included. ``Run.changes`` has what was changed, and
    ``monitor.code()`` the call that does the same again. While a cell trains, clicks are heard on ipykernel 7 only;
    ``start`` works with every kernel.

    Raises ValueError for one or two of coder, data and config without the others.
    """

    _esm = STATIC / "monitor.js"
    _css = STATIC / "monitor.css"

    shows_progress = True  # sl.train shows no bar beside it

    status = traitlets.Dict().tag(sync=True)
    lines = traitlets.List(traitlets.Dict()).tag(sync=True)
    changes = traitlets.List(traitlets.Dict()).tag(sync=True)
    curves = traitlets.Dict().tag(sync=True)
    can_start = traitlets.Bool(False).tag(sync=True)

    def __init__(
        self, coder: SparseCoder | None = None, data: Store | Stream | Tensor | Batch | None = None,
        config: TrainConfig | None = None, *, path: str | Path | None = None, session: Session | None = None,
        watch: tuple[Any, Any] | None = None,
    ) -> None:  # fmt: skip
        given = [thing is not None for thing in (coder, data, config)]
        if any(given) != all(given) or (path is not None and not all(given)):
            raise ValueError(
                "a monitor takes coder, data and config, all three (and path=, if wanted), or none of them for a "
                "callback: sl.train(..., callbacks=[monitor])"
            )
        self.session = session or Session()
        self.run: Run | None = None
        self._task, self._watch = (coder, data, config, path), watch
        self._initial = checkpoint.fingerprint(coder) if coder is not None else ""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._broken = False
        self.state, self._why = "waiting", ""
        self._forget()
        super().__init__(can_start=all(given))
        self.status = self._status()

    @quick
    def start(self) -> None:
        """Train on a thread. ValueError while it trains, and for a monitor that was given nothing to train."""
        with self._lock:
            coder, *_ = self._task
            if coder is None:
                raise ValueError(
                    "there is nothing to start: make the monitor with sl.TrainingMonitor(sae, store, config), or pass "
                    "it to sl.train(..., callbacks=[monitor])"
                )
            if self._thread is not None and self._thread.is_alive():
                raise ValueError("this training runs already: wait for it, or stop it")
            self.run, self._failure = None, None
            self._forget()
            self._enter("running")
            # A daemon: it ends with the kernel. Checkpoints are whole files.
            self._thread = threading.Thread(target=self._train, name="sae_lab trains", daemon=True)
            self._thread.start()

    def wait(self, timeout: float | None = None) -> Run:
        """Wait for the end, and return the ``Run``. Raises what training raised, and TimeoutError after ``timeout``
        seconds."""
        if self._thread is None:
            raise ValueError("nothing was started: call monitor.start() first")
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"still training after {timeout} s: {self!r}")
        if self._failure is not None:
            raise self._failure
        assert self.run is not None
        return self.run

    def _train(self) -> None:
        coder, data, config, path = self._task
        assert coder is not None and data is not None and config is not None
        try:
            run = train(coder, data, config, path=path, callbacks=[self], watch=self._watch)
        except BaseException as error:
            self._failure = error
            log.warning("the training of the monitor failed", exc_info=error)
            self._end("failed", error)
            return
        self.run = run
        with self._lock:
            if not self._watched:  # the run was complete already: its curves come from its files
                label, self._opened = type(coder).__name__, run
                self._curves.lines[label] = self._curves.empty()
                for row in run.history:
                    self._curves.add(label, row, run.config.total_steps)
        self._end("stopped" if run.stopped else "done")

    @quick
    def pause(self) -> None:
        """Hold after the step under way."""
        for watched in self._running():
            watched.control.pause()
        self._enter("pausing")

    @quick
    def resume(self) -> None:
        """Continue after a pause."""
        for watched in self._running():
            watched.control.resume()
        if self.state == "pausing":
            self._enter("running")

    @quick
    def stop(self, coder: str | None = None) -> None:
        """End the training now as if it were complete, and save. coder: the label of one of a sweep; None: all."""
        for watched in self._running(coder):
            watched.control.stop()
        if coder is None:
            self._enter("stopping")

    @quick
    def change(self, lr: float | None = None, sparsity: float | None = None, coder: str | None = None) -> None:
        """Set the peak learning rate or the sparsity from the next step on. coder: as for ``stop``. ValueError for a
        value that is refused; then nothing changes."""
        chosen = self._running(coder)
        for watched in chosen:
            watched.control.check(lr=lr, sparsity=sparsity)
        for watched in chosen:
            watched.control.set(lr=lr, sparsity=sparsity)

    @quick
    def now(self) -> dict[str, Any]:
        """Status and curves as of this moment, for a view that was just opened."""
        with self._lock:
            return {"status": self._status(), "curves": self._copy()}

    def _running(self, label: str | None = None) -> list[Watched]:
        with self._lock:
            running = [w for w in self._watched.values() if not w.over and label in (None, w.label)]
        if not running:
            which = "no training" if label is None else f"no training of {label}"
            raise ValueError(f"{which} runs now, so that nothing can be changed")
        return running

    def __call__(self, event: Event) -> None:
        """The callback of ``sl.train`` and ``sl.sweep``. Errors are logged and shown, never raised."""
        try:
            with torch.no_grad(), self._lock:
                self._hear(event)
        except Exception as error:
            if not self._broken:  # once, not at each step
                log.exception("the monitor failed; training goes on")
                self._broken = True
                self.error = f"the monitor failed ({type(error).__name__}: {error}); training goes on"
        finally:
            # ipykernel 7.4 gives clicks to the thread that last sent a message, which is this one: it trains. Without
            # this entry it gives them to the thread that JupyterLab asks for, beside the cell.
            getattr(self.comm, "__dict__", {}).pop("_reply_subshell_id", None)

    def _hear(self, event: Event) -> None:
        if event.kind == "start":
            self._begin(event)
        elif event.label in self._watched:
            self._curves(event)
        else:
            return
        watched = self._watched[event.label]
        watched.step = event.step
        if len(event.control.changes) != self._known.get(event.label) or event.kind in ("start", "end", "left"):
            self._known[event.label] = len(event.control.changes)
            watched.over = event.kind in ("end", "left")
            self._show_lines()
        if event.kind == "step":
            self._metrics = event.metrics
            if self.state == "running" and all(w.step >= w.control.last for w in self._watched.values()):
                self._enter("finishing")
            self._tell()
        elif event.kind in ("pause", "resume"):
            self._enter("paused" if event.kind == "pause" else "running")
        elif event.kind in ("end", "left") and all(w.over for w in self._watched.values()):
            if event.kind == "left":
                interrupted = isinstance(event.error, KeyboardInterrupt)
                self._end("interrupted" if interrupted else "failed", event.error)
            elif threading.current_thread() is not self._thread:  # of ``start``: ``_train`` says it with the run
                self._end("stopped" if all(w.control.stopping for w in self._watched.values()) else "done")

    def _begin(self, event: Event) -> None:
        if self.state in OVER and all(w.over for w in self._watched.values()):  # a training before this one
            self._forget()
        self._curves(event)
        coder, control = event.coder, event.control
        first = arguments_before(coder, control.changes)
        self._watched[event.label] = Watched(
            event.label, type(coder).__name__, first, coder.path, control, event.config, event.data, event.path
        )
        self._metrics = event.history[-1] if event.history else {}
        if self.state != "running":
            self._enter("running")

    def _forget(self) -> None:
        self._curves = Curves()
        self._watched: dict[str, Watched] = {}
        self._known: dict[str, int] = {}
        self._opened: Run | None = None
        self._metrics: dict[str, Any] = {}
        self._next, self._speed = 0.0, deque[tuple[float, int]](maxlen=RATE_OVER)

    def _enter(self, state: str, why: str = "") -> None:
        """Another state; all traits are brought up to date."""
        with self._lock:
            self.state, self._why = state, why
            self._speed.clear()
            if state in ("paused", *OVER):
                self.curves = self._copy()
            if state in ("running", *OVER):
                self._show_lines()
            self._tell(now=True)

    def _end(self, state: str, error: BaseException | None = None) -> None:
        self._enter(state, "" if error is None or state == "interrupted" else in_words(error))

    def _tell(self, now: bool = False) -> None:
        """Bring the status up to date and send what the curves have gained, at most once in ``PERIOD``."""
        clock = time.monotonic()
        if not now and clock < self._next:
            return
        self._next = clock + PERIOD
        self._speed.append((clock, self._step()))
        self.status = self._status()
        if self.comm is None:
            return
        gained = {}
        for watched in self._watched.values():
            points = len(self._curves.lines[watched.label]["step"])
            at = max(0, watched.sent - 1)  # the last point is a mean that still changes
            gained[watched.label] = [at, self._curves.last(watched.label, points - at) if points else []]
            watched.sent = points
        self.send({"grown": gained})

    def _step(self) -> int:
        steps = [w.step for w in self._watched.values() if not w.over] or [w.step for w in self._watched.values()]
        return max(steps, default=0)

    def _status(self) -> dict[str, Any]:
        run = self._opened
        step, metrics = self._step(), self._metrics or (run.history[-1] if run else {})
        config = next((w.config for w in self._watched.values()), self._task[2])
        last = max((w.control.last for w in self._watched.values()), default=config.total_steps if config else 0)
        rate = None
        if len(self._speed) > 1 and self._speed[-1][0] > self._speed[0][0]:
            rate = (self._speed[-1][1] - self._speed[0][1]) / (self._speed[-1][0] - self._speed[0][0])
        return {
            "state": self.state,
            "why": self._why,
            "step": int(metrics.get("step", 0)) if run else step,
            "steps": last,
            "tokens": int(metrics.get("tokens", 0)),
            "passes": round(metrics.get("passes", 0.0), 3),
            "tokens_per_second": rate and config and round(rate * config.batch_size, 1),
            "seconds_left": round((last - step) / rate, 1) if rate else None,
            "note": _deaf() if self._thread is None and self.state not in ("waiting", *OVER) else "",
        }

    def _show_lines(self) -> None:
        self.lines = [
            {
                "label": w.label, "sparsity_name": None if w.control.aimed else w.control.coder.sparsity_name,
                "sparsity": w.control.sparsity, "lr": w.control.lr, "over": w.over,
            }
            for w in self._watched.values()
        ]  # fmt: skip
        made = [(w.label, w.control.changes) for w in self._watched.values()]
        if self._opened is not None:
            made = [(type(self._opened.coder).__name__, self._opened.changes)]
        self.changes = [{"coder": label, **change} for label, changes in made for change in changes]

    def _copy(self) -> dict[str, Any]:
        return {label: {k: list(v) for k, v in line.items()} for label, line in self._curves.lines.items()}

    def _frozen(self) -> dict[str, Any]:
        return self.now()

    def data(self) -> dict[str, Any]:
        """What is shown now as plain data for a JSON file: the traits by their names, the curves as of this moment."""
        return self._state() | self.now()

    def _html(self) -> Html:
        with self._lock:
            return html_of(self._status(), self._copy(), self.changes)

    def code(self) -> str:
        """The calls of ``sl.train`` that give these runs again, their changes included."""
        with self._lock:
            return code_of(list(self._watched.values()), self._opened, self._task, self._initial)

    def __repr__(self) -> str:
        status = self._status()
        if not status["steps"]:
            return f"TrainingMonitor({self.state})"
        return f"TrainingMonitor({self.state}, step {status['step']:,} of {status['steps']:,})"


def _deaf() -> str:
    """A remark for kernels that hear clicks only when the cell is done."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()  # type: ignore[attr-defined]
    kernel = getattr(shell, "kernel", None)
    if kernel is None or getattr(kernel, "_supports_kernel_subshells", False):
        return ""
    return "This kernel hears the buttons when the cell is done; monitor.start() trains on a thread."
