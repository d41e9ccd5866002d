"""Steering a training that runs: pause, stop, another learning rate or sparsity between two steps."""

import threading
from collections.abc import Iterable, Mapping
from typing import Any

from sae_lab.saes.base import SparseCoder
from sae_lab.training.config import check_lr, is_number
from sae_lab.types import Output

Change = dict[str, Any]  # {"step", "what", "old", "new"}


class Control:
    """What a callback steers its training with: ``event.control``. From any thread; it acts before the next step.

        sl.train(sae, store, config, callbacks=[lambda e: e.step == 500 and e.control.set(lr=1e-4, sparsity=16)])

    Each change is written down in ``Run.changes`` as {"step", "what", "old", "new"}; ``sl.train(..., changes=)`` makes
    the same changes again, to the same weights. what: "lr" (the peak of the schedule, which keeps its shape), the
    coder's ``sparsity_name`` ("k", "sparsity"), or "stop" (of how many steps, after how many).

    Attributes: lr: the peak now. last: the step at which training ends. changes: those made. output: of the last batch,
    while callbacks hear of its step. over: nothing can be changed any more.
    """

    def __init__(self, coder: SparseCoder, lr: float, steps: int, planned: Iterable[Mapping[str, Any]] = (),
                 refused: str = "") -> None:  # fmt: skip
        self.coder, self.lr, self.last, self.over = coder, lr, steps, False
        self.changes: list[Change] = []
        self.output: Output | None = None
        self._turn = threading.Condition(threading.RLock())
        self._paused = False
        self._asked: list[tuple[str, Any]] = []
        self._refused = refused
        self._planned = [self._plan(change) for change in planned]
        self._planned.sort(key=lambda change: change[0])
        if self._planned:
            self._require_open()

    # ---- what a callback calls

    def pause(self) -> None:
        """The step under way is the last until ``resume``."""
        with self._turn:
            self._require_open()
            self._paused = True

    def resume(self) -> None:
        """Go on after a pause."""
        with self._turn:
            self._paused = False
            self._turn.notify_all()

    def stop(self) -> None:
        """Training ends as if it were complete: thresholds are fitted, the coder is stamped with the tokens it really
        saw, and saved where there is a path."""
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
    def paused(self) -> bool:
        return self._paused

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop, or has."""
        with self._turn:
            return "stop" in [what for what, _ in self._asked] + [change["what"] for change in self.changes]

    # ---- what the loop calls

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do before the next step."""
        return bool(self._paused or self._asked or self._planned)

    def wait(self) -> None:
        """Until nobody wants a pause. Ctrl-C ends it."""
        with self._turn:
            while self._paused:
                self._turn.wait()

    def act(self, step: int, shown: bool) -> None:
        """Make the changes that are due. shown: whether the figures of the last step are known; else a stop waits for
        one more step, whose figures then are the last."""
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
        """Go on from a checkpoint at this step. ValueError where what is planned up to there was not done there."""
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
        """ValueError where a finished run was changed otherwise than planned here."""
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
            self.over, self._paused = True, False
            self._asked.clear()
            self._turn.notify_all()

    # ---- one change

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
        if self.coder.sparsity_name and not is_number(value):
            raise ValueError(f"{self.coder.sparsity_name} must be a number, got {value!r}")
        self.coder.check_sparsity(value)

    def _plan(self, change: Mapping[str, Any]) -> tuple[int, str, Any]:
        names = ["lr", "stop", *([self.coder.sparsity_name] if self.coder.sparsity_name else [])]
        try:
            step, what, new = _key(change)
        except (KeyError, TypeError) as err:
            raise ValueError(f"a change is a dict of step, what and new, as in run.changes, got {change!r}") from err
        if not isinstance(step, int) or not 0 <= step <= self.last:
            raise ValueError(f"a change's step must be an integer from 0 to {self.last}, got {step!r}")
        if what == "lr":
            check_lr(new)
        elif what == "stop":
            if not isinstance(new, int) or not step <= new <= self.last or new < 1:
                raise ValueError(f"a stop's new must be a step from {max(1, step)} to {self.last}, got {new!r}")
        elif what == self.coder.sparsity_name:
            self._check_sparsity(new)
        else:
            raise ValueError(
                f"what changes in a {type(self.coder).__name__} while it trains is {', '.join(names)}, got {what!r}"
            )
        return step, what, new

    def _require_open(self) -> None:
        if self._refused or self.over:
            raise ValueError(self._refused or "this training is over: nothing of it can be changed any more")


def _key(change: Mapping[str, Any]) -> tuple[int, str, Any]:
    return change["step"], change["what"], change["new"]


def _words(changes: Iterable[tuple[int, str, Any]]) -> str:
    return ", ".join(f"step {step}: {what} {new}" for step, what, new in changes) or "nothing"
