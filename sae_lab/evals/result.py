"""What the results of evals have in common: named fields, a printed table, and figures for ``sl.evals.report``."""

import html
import math
from collections.abc import Sequence
from dataclasses import fields
from numbers import Number
from typing import NamedTuple

import numpy as np


class Figure(NamedTuple):
    """One number that an eval found, with what it has to be read against.

    error: its standard error; control: the same measure where there is nothing to find (``control_name`` says what was
    shuffled, drawn or left out). NaN where there is none. meaning: a few words, with units. best: "high" or "low", or
    "" for what is neither better nor worse. digits: shown after the point.
    """

    measure: str
    value: float
    error: float = math.nan
    control: float = math.nan
    control_name: str = ""
    meaning: str = ""
    best: str = ""
    digits: int = 3

    @property
    def text(self) -> str:
        """The value, with its standard error where there is one."""
        value = number(self.value, self.digits)
        return value if math.isnan(self.error) else f"{value} ± {number(self.error, self.digits)}"

    @property
    def control_text(self) -> str:
        """The control and what it is, "" where there is none."""
        return "" if math.isnan(self.control) else f"{number(self.control, self.digits)} {self.control_name}".strip()


def number(value: float, digits: int = 3) -> str:
    """A number for a table: "undefined" for NaN, thousands marked from 10,000 on."""
    if math.isnan(value):
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{digits}f}"


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(mean, its standard error) of independent values; NaN for none, and the error NaN for one."""
    if not len(values):
        return math.nan, math.nan
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


class Result:
    """Base of the frozen dataclasses (``repr=False``) that evals return. A subclass gives its figures and a footer.

    ``_rows`` may be overridden by a result that is a table of another shape; its first row is the head.
    """

    def figures(self) -> list[Figure]:
        """The numbers this result stands for, in the order they are printed."""
        raise NotImplementedError

    def _footer(self) -> str:
        """On what it was measured: tokens, documents, seeds, mask."""
        return ""

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [(f.measure, f.text, f.control_text, f.meaning) for f in self.figures()]
        return [("", "value", "control", ""), *rows]

    def to_pandas(self):
        """One row, one column a field that is a number or a text."""
        import pandas as pd

        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]
        return pd.DataFrame([{name: v for name, v in plain.items() if isinstance(v, Number | str)}])

    def __repr__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self._footer()]).rstrip()

    def _repr_html_(self) -> str:
        head, *body = self._rows()
        cells = "".join(f"<tr>{_html_row('td', row)}</tr>" for row in body)
        footer = "<br>".join(map(html.escape, self._footer().split("\n")))
        return f"<table><tr>{_html_row('th', head)}</tr>{cells}</table><p>{footer}</p>"


def _html_row(tag: str, row: tuple[str, ...]) -> str:
    """Cells of a row; only the last, which has words, may break into lines."""
    styles = ["text-align:left;white-space:nowrap"] * (len(row) - 1) + ["text-align:left"]
    return "".join(f"<{tag} style='{s}'>{html.escape(cell)}</{tag}>" for s, cell in zip(styles, row, strict=True))
