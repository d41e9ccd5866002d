"""What to look for among features, as one line: ``war density>0.1% norm<20 label:weapons``."""

import operator
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

COLUMNS = ("density", "norm", "max", "mean", "count")
_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(rf"(?:^|(?<=\s))({'|'.join(COLUMNS)})\s*(>=|<=|>|<)\s*(\S+)", re.IGNORECASE)
_LABEL = re.compile(r"(?:^|(?<=\s))label:(?:\"([^\"]*)\"|(\S*))", re.IGNORECASE)


class Query(NamedTuple):
    """tokens: text to find among top tokens. label: text to find among notes, None: not asked. limits: (column,
    comparison, value), all of which must hold."""

    tokens: str
    label: str | None
    limits: list[tuple[str, str, float]]

    def holds(self, columns: Callable[[str], np.ndarray], d_sae: int) -> np.ndarray:
        """Bool per feature: whether all limits hold."""
        found = np.ones(d_sae, bool)
        for column, sign, value in self.limits:
            found &= _COMPARE[sign](np.asarray(columns(column)), value)
        return found


def parse(line: str) -> Query:
    """A line as a query. ValueError where a limit is no number."""
    limits = [(column.lower(), sign, _number(column, value)) for column, sign, value in _CONDITION.findall(line)]
    rest = _CONDITION.sub(" ", line)
    labels = [quoted or plain for quoted, plain in _LABEL.findall(rest)]
    return Query(_LABEL.sub(" ", rest).strip(), " ".join(labels) if labels else None, limits)


def _number(column: str, text: str) -> float:
    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(
            f"{column} is compared with a number, got {text!r}: write for instance density>0.001 or density>0.1%"
        ) from None
