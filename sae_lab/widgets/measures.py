"""The metrics that a patching grid offers: built, said in words, and written down as code."""

import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sae_lab import circuits
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompt

from .coding import name_of

DIFFERENCE, CHANCE, KL, WRITTEN = "logit difference", "log-probability", "KL from the source", "function"
ANSWERS = {DIFFERENCE: ("right", "wrong"), CHANCE: ("right",), KL: (), WRITTEN: ()}  # what each asks for
MAKERS = {DIFFERENCE: "logit_difference", CHANCE: "log_probability", KL: "kl_from"}  # functions of circuits


@dataclass(frozen=True)
class Measure:
    """A choice of metric. function: the one written in Python, which stays on offer while another is chosen."""

    kind: str
    right: str = ""
    wrong: str = ""
    function: Any = None

    @staticmethod
    def of(metric: Any, answers: Sequence[str] | None) -> "Measure":
        """The choice that a grid's arguments make. ValueError for another metric."""
        if answers is not None and (isinstance(answers, str) or len(answers) != 2):
            raise ValueError(f"answers are two, (right, wrong), each one token, got {answers!r}")
        right, wrong = answers or ("", "")
        if callable(metric):
            return Measure(WRITTEN, right, wrong, metric)
        if metric is None:
            metric = DIFFERENCE if answers else KL
        return Measure(str(metric), right, wrong).checked()

    def chosen(self, kind: str, right: str, wrong: str) -> "Measure":
        """The choice made on screen."""
        return replace(self, kind=kind, right=right, wrong=wrong).checked()

    def changed(self, metric: Any, answers: Sequence[str] | None) -> "Measure":
        """The choice made in Python; what is None stays."""
        if metric is None and answers is None:
            return self
        new = Measure.of(metric, answers or ((self.right, self.wrong) if self.right else None))
        return replace(new, function=new.function or self.function)

    def checked(self) -> "Measure":
        if self.kind not in self.offered:
            raise ValueError(
                f"metric must be one of {', '.join(map(repr, self.offered))}, or a function (logits, tokens) -> a "
                f"number for each row, got {self.kind!r}"
            )
        if missing := [side for side in ANSWERS[self.kind] if not getattr(self, side)]:
            raise ValueError(f"the {self.kind} needs the {missing[0]} answer, one token such as ' Mary': it is empty")
        return self

    @property
    def offered(self) -> list[str]:
        return [kind for kind in ANSWERS if kind != WRITTEN or self.function is not None]

    @property
    def name(self) -> str:
        """What the screen calls the metric."""
        if self.kind == WRITTEN:
            return getattr(self.function, "__name__", type(self.function).__name__)
        return f"{self.kind} {' − '.join(map(repr, self._answers))}".rstrip()

    def built(self, lm: LM, source: Prompt) -> circuits.Metric:
        """The metric. ValueError for an answer that is not one token."""
        self.checked()
        if self.kind == WRITTEN:
            return self.function
        return getattr(circuits, MAKERS[self.kind])(lm, *(self._answers or [source]))

    @property
    def _answers(self) -> list[str]:
        return [getattr(self, side) for side in ANSWERS[self.kind]]

    def code(self) -> list[str]:
        """The Python that makes ``metric`` from ``lm`` and ``source``."""
        if self.kind != WRITTEN:
            return [f"metric = sl.circuits.{MAKERS[self.kind]}(lm, {', '.join(map(repr, self._answers)) or 'source'})"]
        name = name_of(self.function, self.name)
        try:
            source = textwrap.dedent(inspect.getsource(self.function)).rstrip()
        except (OSError, TypeError):
            source = ""
        if not source.startswith("def "):  # the source of a lambda is its whole line
            return [f"# metric: your function {name}, (logits, tokens) -> a number for each row"]
        needs = ["import torch", ""] if "torch" in source else []
        return [*needs, source, "", f"metric = {self.function.__name__}"]
