"""Steering a training that runs: pause, stop, another learning rate or sparsity between two steps."""

import threading
from collections.abc import Iterable, Mapping
from typing import Any

from sae_lab.saes.base import SparseCoder
from sae_lab.training.config import check_lr, is_number
from sae_lab.types import Output

Change = dict[str, Any]  # {"step", "what", "old", "new"}


class Control:
    """What a callback steers its training with, ``event.control``, from any thread. It acts before the next step.

        sl.train(sae, store, config, callbacks=[lambda e: e.step == 500 and e.control.set(lr=1e-4, sparsity=16)])

    Each change is kept in ``Run.changes`` as {"step", "what", "old", "new"}, and ``sl.train(..., changes=)`` makes the
    same changes again, to the same weights. what: "lr" (the peak of the schedule, which keeps its shape), the coder's
    ``sparsity_name`` ("k" or "sparsity"), or "stop" (old: the steps planned, new: the steps taken).

    Attributes: lr: the peak now. last: the step at which training ends. changes: those made. output: that of the last
    batch, while callbacks hear of its step. aimed: ``target_l0`` sets the sparsity, and nobody else. paused; over:
    nothing can be changed any more.
    """

    def __init__(self, coder: SparseCoder, lr: float, steps: int, planned: Iterable[Mapping[str, Any]] = (),
                 refused: str = "", aimed: bool = False) -> None:  # fmt: skip
        self.coder, self.lr, self.last = coder, lr, steps
        self.paused = self.over = False
        self.changes: list[Change] = []
        self.output: Output | None = None
        self._turn = threading.Condition(threading.RLock())
        self._asked: list[tuple[str, Any]] = []
        self._refused, self.aimed = refused, aimed
        self._planned = sorted(map(self._plan, planned), key=lambda change: change[0])
        if self._planned:
            self._require_open()

    def pause(self) -> None:
        """The step under way is the last until ``resume``."""
        with self._turn:
            self._require_open()
            self.paused = True

    def resume(self) -> None:
        """Go on after a pause."""
        with self._turn:
            self.paused = False
            self._turn.notify_all()

    def stop(self) -> None:
        """Training ends as if it were complete: thresholds are fitted, the coder notes how many tokens it saw, and is
        saved if there is a path."""
        with self._turn:
            self._require_open()
            if not self.stopping:
                self._asked.append(("stop", None))
            self.resume()

    def set(self, *, lr: float | None = None, sparsity: float | None = None) -> None:
        """Another peak learning rate; another k, or weight of the penalty (``coder.sparsity_name`` says which).
        ValueError for a value that the config or the coder would refuse, and for a coder without such an argument."""
        with self._turn:
            self.check(lr=lr, sparsity=sparsity)
            if lr is not None:
                self._asked.append(("lr", float(lr)))
            if sparsity is not None:
                self._asked.append((str(self.coder.sparsity_name), sparsity))

    def check(self, *, lr: float | None = None, sparsity: float | None = None) -> None:
        """The ValueError that ``set`` would raise, and nothing else."""
        self._require_open()
        if lr is not None:
            check_lr(lr)
        if sparsity is not None:
            self._check_sparsity(sparsity)

    @property
    def sparsity(self) -> float | None:
        """The coder's k, or the weight of its penalty, now; None where it has neither."""
        return self.coder.config.get(self.coder.sparsity_name) if self.coder.sparsity_name else None

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop, or has."""
        with self._turn:
            return "stop" in [what for what, _ in self._asked] + [change["what"] for change in self.changes]

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do before the next step."""
        return bool(self.paused or self._asked or self._planned)

    def wait(self) -> None:
        """Until nobody wants a pause. Ctrl-C ends it."""
        with self._turn:
            while self.paused:
                self._turn.wait()

    def act(self, step: int, shown: bool) -> None:
        """Make the changes that are due. shown: whether the history has the last step; if not, a stop waits for one
        more step, which is then its last row."""
        with self._turn:
            while self._planned and self._planned[0][0] <= step:
                _, what, new = self._planned.pop(0)
                self._make(step, what, new)
            for what, new in self._asked:
                if what == "stop":
                    self._make(step, what, step + (not shown))
                elif new != self._now(what):
                    self._make(step, what, new)
            self._asked.clear()

    def restore(self, changes: list[Change], step: int) -> None:
        """Go on from a checkpoint at this step. ValueError for a change planned before it that was not made."""
        left = [*self._planned]
        for change in changes:
            self._set(change["what"], change["new"])
            if (key := _key(change)) in left:
                left.remove(key)
        if missed := [key for key in left if key[0] < step]:
            raise ValueError(
                f"changes: {_words(missed)} was not made when that step was taken: plan changes for steps from {step} "
                "on, or pass another path="
            )
        self.changes, self._planned = list(changes), left

    def require_same(self, changes: list[Change], path: Any) -> None:
        """ValueError if a finished run was changed in another way than planned here."""
        made = [_key(change) for change in changes]
        if made != self._planned:
            call = [{"step": step, "what": what, "new": new} for step, what, new in made]
            raise ValueError(
                f"{path} holds this run, but changed while it ran ({_words(made)}; planned here: "
                f"{_words(self._planned)}): open its coder with sl.load, call sl.train with changes={call}, or pass "
                "another path="
            )
        self.restore(changes, 0)

    def close(self) -> None:
        """Training is over."""
        with self._turn:
            self.over, self.paused = True, False
            self._asked.clear()
            self._turn.notify_all()

    def _now(self, what: str) -> Any:
        return {"lr": self.lr, "stop": self.last}.get(what, self.sparsity)

    def _make(self, step: int, what: str, new: Any) -> None:
        self.changes.append({"step": step, "what": what, "old": self._now(what), "new": new})
        self._set(what, new)

    def _set(self, what: str, new: Any) -> None:
        if what == "lr":
            self.lr = new
        elif what == "stop":
            self.last = new
        else:
            self.coder.set_sparsity(new)

    def _check_sparsity(self, value: Any) -> None:
        if self.aimed:
            name = self.coder.sparsity_name
            raise ValueError(f"target_l0 sets {name} in this training, got {name}={value!r}: train without target_l0")
        if self.coder.sparsity_name and not is_number(value):
            raise ValueError(f"{self.coder.sparsity_name} must be a number, got {value!r}")
        self.coder.check_sparsity(value)

    def _plan(self, change: Mapping[str, Any]) -> tuple[int, str, Any]:
        try:
            step, what, new = _key(change)
        except (KeyError, TypeError) as err:
            raise ValueError(f"a change is a dict of step, what and new, as in run.changes, got {change!r}") from err
        if not isinstance(step, int) or not 0 <= step <= self.last:
            raise ValueError(f"a change's step must be an integer from 0 to {self.last}, got {step!r}")
        if what == "lr":
            check_lr(new)
        elif what == self.coder.sparsity_name:
            self._check_sparsity(new)
        elif what != "stop":
            names = ", ".join(filter(None, ("lr", "stop", self.coder.sparsity_name)))
            raise ValueError(f"what changes in a {type(self.coder).__name__} while it trains is {names}, got {what!r}")
        elif not isinstance(new, int) or not max(1, step) <= new <= self.last:
            raise ValueError(f"a stop's new must be a step from {max(1, step)} to {self.last}, got {new!r}")
        return step, what, new

    def _require_open(self) -> None:
        if self._refused or self.over:
            raise ValueError(self._refused or "this training is over: nothing of it can be changed any more")


def _key(change: Mapping[str, Any]) -> tuple[int, str, Any]:
    return change["step"], change["what"], change["new"]


def _words(changes: Iterable[tuple[int, str, Any]]) -> str:
    return ", ".join(f"step {step}: {what} {new}" for step, what, new in changes) or "nothing"
