"""What a result shows: figures with their controls, as a table in a terminal and in a notebook.

Text of a checkpoint, a tokenizer or a document becomes HTML here and nowhere else.
"""

import html as _html
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from numbers import Number
from typing import Any, NamedTuple

import numpy as np

from sae_lab.arguments import as_annotated

# ---- text

# What draws nothing, moves a terminal's cursor or turns the direction of reading, in code points; half a surrogate
# pair, which no file holds. The widgets have the same list, in widgets/src/shared/visible.ts.
HIDDEN = (
    "0000-001F 007F-00A0 00AD 034F 061C 115F-1160 17B4-17B5 180B-180F 200B-200F 2028-202E 2060-206F 3164 D800-DFFF "
    "FE00-FE0F FEFF FFA0 FFF0-FFFB 1BCA0-1BCA3 1D173-1D17A E0000-E0FFF"
)
_NOT_IN_SCRIPT = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
GLYPHS = {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
_HIDDEN = re.compile("[" + re.sub("[0-9A-F]+", lambda m: f"\\U{m[0]:0>8}", HIDDEN).replace(" ", "") + "]")


def visible(text: object) -> str:
    """A text with a mark in place of each character that would not be seen, or would change how the rest is seen: ↵ for
    a line break, U+001B for an escape."""
    return _HIDDEN.sub(lambda found: GLYPHS.get(found[0]) or f"U+{ord(found[0]):04X}", str(text))


# ---- HTML


class Html(str):
    """Text that is HTML already. ``tag`` and ``joined`` make it; put together in any other way it is plain text again,
    and gets escaped."""


def joined(parts: Iterable[object], between: object = "") -> Html:
    """Parts one behind the other, each escaped and made visible unless it is ``Html``."""
    return Html(escaped(between).join(map(escaped, parts)))


def escaped(part: object) -> Html:
    return part if isinstance(part, Html) else Html(_html.escape(visible(part)))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element around its children."""
    given = "".join(f' {key}="{escaped(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def in_script(value: Any) -> str:
    """A value as JSON in which no tag and no comment can begin or end, and no half of a surrogate pair stands."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _NOT_IN_SCRIPT.sub(lambda found: f"\\u{ord(found[0]):04x}", data)


# ---- tables

_SIDES = {"<": "left", ">": "right"}


def html_table(
    rows: Sequence[Sequence[object]], footer: str = "", align: str = "<", wraps: bool = False
) -> Html:
    """Rows as a table, the first its head, and lines below. align: "<" or ">" a column, its last for all that follow.

    Unless it ``wraps``, only the last column, which has words, may break into lines. Sides are said for each cell:
    Jupyter aligns all to the right.
    """
    sides = [_SIDES[side] for side in align.ljust(len(rows[0]), align[-1])]
    one_line = "" if wraps else ";white-space:nowrap"
    styles = [f"text-align:{side}{one_line}" for side in sides[:-1]] + [f"text-align:{sides[-1]}"]
    lines = [
        tag("tr", *(tag("td" if i else "th", cell, style=style) for cell, style in zip(row, styles, strict=True)))
        for i, row in enumerate(rows)
    ]
    below = [tag("p", joined(footer.split("\n"), Html("<br>")))] if footer else []
    return joined([tag("table", *lines), *below])


def text_table(rows: Sequence[Sequence[object]], footer: str = "", align: str = "<", gap: str = "  ") -> str:
    """The same in columns of characters."""
    cells = [[visible(cell) for cell in row] for row in rows]
    sides = align.ljust(len(cells[0]), align[-1])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [gap.join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, *map(visible, footer.split("\n"))]).rstrip()


def frame_rows(frame: Any, digits: str = ".3f", empty: str = "NaN") -> list[tuple[str, ...]]:
    """A pandas table as rows of text, its head first. digits: how its broken numbers are written."""
    import pandas as pd

    def text(value: object) -> str:
        if value is pd.NA or (isinstance(value, float | np.floating) and math.isnan(value)):
            return empty
        return format(value, digits) if isinstance(value, float | np.floating) else str(value)

    columns = [[text(value) for value in frame.iloc[:, i]] for i in range(frame.shape[1])]
    return [tuple(map(str, frame.columns)), *zip(*columns, strict=True)]


def frame_text(frame: Any, digits: str = ".3f") -> str:
    """A pandas table as columns of characters."""
    return text_table(frame_rows(frame, digits), align=">", gap=" ")


class Shown:
    """Base of what prints as a table. A subclass gives its rows, the first of them the head, and a footer."""

    _align, _gap = "<", "  "

    def __init_subclass__(cls) -> None:
        as_annotated(cls)

    def _rows(self) -> list[tuple[str, ...]]:
        raise NotImplementedError

    def _footer(self) -> str:
        """On what it was measured: tokens, documents, seeds, mask."""
        return ""

    def __repr__(self) -> str:
        return text_table(self._rows(), self._footer(), self._align, self._gap)

    def _repr_html_(self) -> Html:
        return html_table(self._rows(), self._footer(), self._align)


# ---- results of evals


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


class Result(Shown):
    """Base of the frozen dataclasses (``repr=False``) that evals return. A subclass gives its figures and a footer.

    ``_rows`` may be overridden by a result that is a table of another shape; its first row is the head.
    """

    def figures(self) -> list[Figure]:
        """The numbers this result stands for, in the order they are printed."""
        raise NotImplementedError

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [(f.measure, f.text, f.control_text, f.meaning) for f in self.figures()]
        return [("", "value", "control", ""), *rows]

    def to_pandas(self):
        """One row, one column a field that is a number or a text."""
        import pandas as pd

        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]
        return pd.DataFrame([{name: v for name, v in plain.items() if isinstance(v, Number | str)}])
