"""Verdicts on published claims: a statistic, its interval and a threshold that was named before."""

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from sae_lab.arguments import as_annotated
from sae_lab.results import Result, number, result
from sae_lab.stats import mean_and_error

HOLDS, FAILS, OPEN = "holds", "does not hold", "open"
MIME = "application/vnd.sae_lab.claims+json"


@result
class Claim(Result):
    """One claim with its verdict, from ``sl.evals.claim``. low, high: the 95 % interval of ``value``; ``least``,
    ``most``: the threshold; ``control``: the same statistic of ``control_name``, NaN without one."""

    claim: str
    value: float
    low: float
    high: float
    least: float
    most: float
    published: str = ""
    control: float = math.nan
    control_name: str = ""
    seeds: int = 1
    digits: int | str = 3

    @property
    def verdict(self) -> str:
        """"holds" if the whole interval is on the threshold's right side, "does not hold" if it is wholly on the other
        side, "open" if it crosses the threshold or has no ends."""  # fmt: skip
        if self.low >= self.least and self.high <= self.most:
            return HOLDS
        return FAILS if self.high < self.least or self.low > self.most else OPEN

    @property
    def threshold(self) -> str:
        bounds = [("at least", self.least), ("at most", self.most)]
        return ", ".join(f"{words} {number(at, self.digits)}" for words, at in bounds if math.isfinite(at))

    @property
    def here(self) -> str:
        low, value, high = (number(x, self.digits) for x in (self.low, self.value, self.high))
        return f"{value} [{low}, {high}]"

    @property
    def beside(self) -> str:
        return "" if math.isnan(self.control) else f"{number(self.control, self.digits)} {self.control_name}".strip()


@result
class Verdicts(Result):
    """The claims of one paper, from ``sl.evals.verdicts``. A saved notebook keeps them as data too, under the type
    ``application/vnd.sae_lab.claims+json``."""

    paper: str
    claims: list[Claim] = field(repr=False)
    setting: str = ""
    _above, _below = "{paper}", "{setting}"
    _records = "_shown_claims"
    _align = "<"
    _columns = {  # noqa: RUF012
        "claim": "{claim}", "published": "{published}", "threshold": "{threshold}", "here": "{here}",
        "control": "{beside}", "verdict": "{verdict}",
    }  # fmt: skip

    @property
    def _shown_claims(self) -> list[dict[str, Any]]:
        names = ("claim", "published", "threshold", "here", "beside", "verdict", "value", "low", "high", "control")
        return [{name: getattr(one, name) for name in names} for one in self.claims]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        kept = [
            {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in one.items()}
            for one in self._shown_claims
        ]
        data = {"paper": self.paper, "setting": self.setting, "claims": kept}
        return {"text/plain": repr(self), "text/html": str(self._repr_html_()), MIME: data}


@as_annotated
def claim(
    text: str,
    values: float | Sequence[float],
    *,
    least: float | None = None,
    most: float | None = None,
    interval: tuple[float, float] | None = None,
    published: str = "",
    control: float | Sequence[float] | None = None,
    control_name: str = "",
    digits: int | str = 3,
) -> Claim:
    """``sl.evals.claim("replacing beats deleting", [0.91, 0.88, 0.93], least=0.7, published="92.4 %")``: a verdict.

    The verdict goes by the 95 % interval: the claim holds if the whole interval is at or above ``least`` and at or
    below ``most``, does not hold if all of it is beyond, and is open if the threshold lies inside.

    Args:
        text: what is claimed.
        values: one per seed, three at least; the interval is then Student's t interval of their mean. Or one number
            with its ``interval``, as from a bootstrap over documents. "A beats B" is the difference of each seed's
            pair, with ``least=0``.
        least, most: the threshold, named before the measurement; one of them or both.
        published: what the paper reports.
        control: the same statistic of ``control_name``; of several values the mean.
        digits: after the point, or a format such as ".1%".

    Raises ValueError for fewer than three values without an interval, no threshold, or an interval that leaves the
    value out.
    """
    if least is None and most is None:
        raise ValueError(
            f"a claim needs a threshold, least= or most=, got neither for {text!r}: name one before measuring"
        )
    several = [float(v) for v in values] if isinstance(values, Sequence) else [float(values)]
    value, error = mean_and_error(several)
    if interval is None:
        if len(several) < 3:
            raise ValueError(
                f"values must be one for each of three seeds at least, got {len(several)} for {text!r}: measure more "
                "seeds, or give interval=(low, high)"
            )
        from scipy.stats import t

        half = float(t.ppf(0.975, len(several) - 1)) * error
        interval = value - half, value + half
    low, high = map(float, interval)
    if not low <= value <= high and not math.isnan(value + low + high):
        raise ValueError(
            f"interval must hold the value, got {(low, high)} around {value} for {text!r}: give (low, high)"
        )
    beside = control if isinstance(control, Sequence) else [math.nan if control is None else control]
    return Claim(
        text, value, low, high, -math.inf if least is None else least, math.inf if most is None else most, published,
        mean_and_error([float(c) for c in beside])[0], control_name, len(several), digits,
    )  # fmt: skip


@as_annotated
def verdicts(paper: str, *claims: Claim, setting: str = "") -> Verdicts:
    """``sl.evals.verdicts("Young 2026, [2605.12770](https://arxiv.org/abs/2605.12770)", first, second)``: the claims of
    a paper as one table.

    Args:
        paper: authors, year and a link, in Markdown.
        claims: of ``sl.evals.claim``.
        setting: what was measured: seeds, model, sizes.

    Raises ValueError without a claim.
    """
    if not claims:
        raise ValueError(f"verdicts needs a claim, got none for {paper!r}: pass those of sl.evals.claim")
    return Verdicts(paper, list(claims), setting)
