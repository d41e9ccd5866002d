"""Results: figures with their controls, as a table in a terminal and in a notebook.

Only this module makes HTML of text that comes from checkpoints, tokenizers or documents.
"""

import html as _html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from numbers import Number
from operator import attrgetter
from string import Formatter
from typing import Any, NamedTuple, TypeVar, dataclass_transform
from unicodedata import combining

import numpy as np

from sae_lab.arguments import as_annotated

# Code points that draw nothing, move a terminal's cursor or turn the direction of reading; halves of surrogate pairs,
# which no file can hold. The widgets have the same list, in widgets/src/shared/visible.ts.
HIDDEN = (
    "0000-001F 007F-00A0 00AD 034F 061C 115F-1160 17B4-17B5 180B-180F 200B-200F 2028-202E 2060-206F 3164 D800-DFFF "
    "FE00-FE0F FEFF FFA0 FFF0-FFFB 1BCA0-1BCA3 1D173-1D17A E0000-E0FFF"
)
_NOT_IN_SCRIPT = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
# A mark of an emoji's form, or a join of two, behind an emoji: the only hidden ones that draw something.
_EMOJI = "[\u203c\u2049\u2122-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff]"
_JOINS = "\ufe0f\u200d" + "".join(map(chr, range(0x1F3FB, 0x1F400)))
LONGEST, MOST_TITLE = 40, 10_000  # characters of a short name, and of the whole that is shown
GLYPHS = {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
_HIDDEN = re.compile(
    f"(?!(?:(?<={_EMOJI})|(?<={_EMOJI}\ufe0f))[\ufe0f\u200d])["
    + re.sub("[0-9A-F]+", lambda m: f"\\U{m[0]:0>8}", HIDDEN).replace(" ", "") + "]"
)


def visible(text: object) -> str:
    """A text with a mark in place of each character that is invisible, or changes how others look: ↵ for a line break,
    U+001B for an escape."""
    return _HIDDEN.sub(lambda found: GLYPHS.get(found[0]) or f"U+{ord(found[0]):04X}", str(text))


def visible_lines(text: str) -> str:
    """``visible``, of a text whose line breaks are meant."""
    return "\n".join(map(visible, text.split("\n")))


def counted(number: int, noun: str) -> str:
    """``1 feature``, ``1,024 features``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


class Html(str):
    """Text that is HTML already, made by ``tag`` and ``joined``. Otherwise joined it is plain text, and escaped."""


class Name(str):
    """A name that people gave, in one line of at most ``LONGEST`` characters; ``whole`` has all of it. In HTML it is
    set apart from the direction of the text around it, and says the whole to who points at it."""

    whole: str

    def __new__(cls, whole: str, longest: int = LONGEST) -> "Name":
        line, end = " ".join(whole.split()), longest - 1
        while 0 < end < len(line) and (line[end] in _JOINS or line[end - 1] == "\u200d" or combining(line[end])):
            end -= 1  # no character is torn from its marks
        self = super().__new__(cls, line if len(line) <= longest else f"{line[:end].rstrip()}…")
        self.whole = whole
        return self


class Beside(str):
    """Texts one behind the other, names among them, as one cell of a table."""

    html: "Html"

    def __new__(cls, *parts: str, between: str = "") -> "Beside":
        self = super().__new__(cls, between.join(parts))
        self.html = joined(parts, between)
        return self


def joined(parts: Iterable[object], between: object = "") -> Html:
    """Parts one behind the other, each escaped and made visible unless it is ``Html``."""
    return Html(escaped(between).join(map(escaped, parts)))


def escaped(part: object) -> Html:
    if isinstance(part, Name) and part:
        return tag("bdi", str(part), **({} if part == part.whole else {"title": part.whole[:MOST_TITLE]}))
    if isinstance(part, Beside):
        return part.html
    return part if isinstance(part, Html) else Html(_html.escape(visible(part)))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element around its children."""
    given = "".join(f' {key}="{escaped(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def in_script(value: Any) -> str:
    """A value as JSON in which no tag or comment can begin or end, without halves of surrogate pairs."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _NOT_IN_SCRIPT.sub(lambda found: f"\\u{ord(found[0]):04x}", data)


def html_table(
    rows: Sequence[Sequence[object]], footer: str = "", align: str = "<", wraps: bool = False, header: str = ""
) -> Html:
    """Rows as a table, the first its head, and lines above and below it.

    align: "<" or ">" for each column; the last holds for all that follow. Unless it ``wraps``, only the last column,
    which has words, may break into lines. Each cell says its side: Jupyter aligns all to the right.
    """
    sides = ["right" if side == ">" else "left" for side in align.ljust(len(rows[0]), align[-1])]
    one_line = "" if wraps else ";white-space:nowrap"
    styles = [f"text-align:{side}{one_line}" for side in sides[:-1]] + [f"text-align:{sides[-1]}"]
    lines = [
        tag("tr", *(tag("td" if i else "th", cell, style=style) for cell, style in zip(row, styles, strict=True)))
        for i, row in enumerate(rows)
    ]
    above, below = ([tag("p", joined(text.split("\n"), Html("<br>")))] if text else [] for text in (header, footer))
    return joined([*above, tag("table", *lines), *below])


def text_table(rows: Sequence[Sequence[object]], footer: str = "", align: str = "<", gap: str = "  ") -> str:
    """The same in columns of characters."""
    cells = [[visible(cell) for cell in row] for row in rows]
    sides = align.ljust(len(cells[0]), align[-1])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [gap.join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, visible_lines(footer)]).rstrip()


def frame_rows(frame: Any, digits: str = ".3f", empty: str = "NaN") -> list[tuple[str, ...]]:
    """A pandas table as rows of text, its head first. digits: how its broken numbers are written."""
    import pandas as pd

    def text(value: object) -> str:
        if value is pd.NA or (isinstance(value, float | np.floating) and math.isnan(value)):
            return empty
        return format(value, digits) if isinstance(value, float | np.floating) else str(value)

    if frame.columns.empty:
        return [("no rows",)]
    columns = [[text(value) for value in frame.iloc[:, i]] for i in range(frame.shape[1])]
    return [tuple(map(str, frame.columns)), *zip(*columns, strict=True)]


def by_column(names: str, rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
    """Rows as columns of these names, also if there are no rows."""
    listed = list(rows)
    return {name: [row[i] for row in listed] for i, name in enumerate(names.split())}


class Shown:
    """Base of what prints as a table. A subclass gives its rows, the first of them the head, and the lines around it:
    ``_above`` and ``_below``, texts in which "{tokens:,}" stands for an attribute."""

    _above = _below = ""
    _align, _gap = "<", "  "  # _align: as for ``html_table``

    def __init_subclass__(cls) -> None:
        as_annotated(cls)

    def _rows(self) -> list[tuple[str, ...]]:
        raise NotImplementedError

    def _header(self) -> str:
        return filled(self._above, self)

    def _footer(self) -> str:
        """The data of the measurement: tokens, documents, seeds, mask."""
        return filled(self._below, self)

    def __repr__(self) -> str:
        table = text_table(self._rows(), self._footer(), self._sides(), self._gap)
        return f"{visible_lines(header)}\n{table}" if (header := self._header()) else table

    def _repr_html_(self) -> Html:
        return html_table(self._rows(), self._footer(), self._sides(), header=self._header())

    def _sides(self) -> str:
        return self._align


class _Numbers(Formatter):
    def vformat(self, format_string: str, args: Any, kwargs: Any) -> str:
        parts, one = [], False
        for words, name, spec, conversion in self.parse(format_string):
            parts.append(_COUNTED.sub(_singular, words) if one else words)
            if name is None:
                continue
            value = self.convert_field(self.get_field(name, args, kwargs)[0], conversion)
            one = isinstance(value, int | np.integer) and value == 1
            parts.append(self.format_field(value, spec or ""))
        return "".join(parts)

    def get_value(self, key: Any, args: Any, kwargs: Any) -> Any:
        return args[0][key] if isinstance(args[0], Mapping) else getattr(args[0], key)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return len(value) if conversion == "n" else super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        return UNDEFINED if isinstance(value, float) and math.isnan(value) else format(value, format_spec)


# What a number counts: the plural right behind it, or behind one of these words.
_COUNTED = re.compile(
    "^( (?:(?:active|confounded|kept|live|matched|other|random|test|training) )?)"
    r"([a-z]{2,}?)(ies|(?<=ss)es|(?<![asu])s)\b"
)


def _singular(found: re.Match[str]) -> str:
    return found[1] + found[2] + "y" * (found[3] == "ies")


def filled(text: str, values: Any) -> str:
    """A text with values in place of the names in braces: a mapping's entries, or an object's attributes. NaN reads
    "undefined", an error of NaN is left out with its ±, "{names!n}" is the number of names, and behind a number that is
    1 the plural loses its ending: "{tokens:,} tokens" gives "1 token"."""
    return _Numbers().vformat(text, (values,), {}).replace(f" ± {UNDEFINED}", "")


T = TypeVar("T")
UNDEFINED = "undefined"  # what a table shows for NaN


class Figure(NamedTuple):
    """One measured number, with its control.

    error: its standard error. control: the same measure on data without the effect, NaN without a control;
    control_name: what was shuffled, drawn or left out. meaning: a few words, with units. best: "high" or "low", "" if
    neither. digits: after the point, or a format such as ".1%". key: the field of the result that holds the value.
    """

    measure: str
    value: float
    error: float = math.nan
    control: float = math.nan
    control_name: str = ""
    meaning: str = ""
    best: str = ""
    digits: int | str = 3
    key: str = ""

    @property
    def text(self) -> str:
        """The value, with its standard error if it has one."""
        value = number(self.value, self.digits)
        return value if math.isnan(self.error) else f"{value} ± {number(self.error, self.digits)}"

    @property
    def control_text(self) -> str:
        """The control and its name; "" without a control."""
        return "" if math.isnan(self.control) else f"{number(self.control, self.digits)} {self.control_name}".strip()


def figure(
    measure: str, meaning: str = "", *, error: str = "", control: str = "", control_name: str = "", best: str = "",
    digits: int | str = 3,
) -> Any:  # fmt: skip
    """A field of a ``Result`` that is a figure: ``novel: float = figure("novel", "share of features")``.

    error, control: the fields that hold them; the error is "<field>_se" where such a field exists. In meaning and
    control_name "{tokens:,}" stands for an attribute. The rest as for ``Figure``.
    """
    return field(metadata={"figure": Figure(measure, math.nan, math.nan, math.nan, control_name, meaning, best, digits),
                           "error": error, "control": control})  # fmt: skip


def number(value: float, digits: int | str = 3) -> str:
    """A number for a table: "undefined" for NaN, thousands marked from 10,000 on. digits: as for ``Figure``."""
    if math.isnan(value):
        return UNDEFINED
    if isinstance(digits, str):
        return format(value, digits)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{digits}f}"


@dataclass_transform(frozen_default=True, field_specifiers=(field, figure))
def result(cls: type[T]) -> type[T]:
    """``@result`` on a ``Result``: a frozen dataclass, whose fields may be figures."""
    return dataclass(frozen=True, repr=False)(cls)


class Result(Shown):
    """Base of what measurements return. Its fields say all that it shows:

        @result
        class Novelty(Result):
            novel: float = figure("novel", "share of features", control="novel_random", control_name="random rows")
            novel_se: float
            novel_random: float
            tokens: int
            _below = "{tokens:,} tokens"

    A result without figures is a table of records: ``_records`` names the field or property that holds them (a list of
    NamedTuples or dicts, a dict of columns, or results of one row each: a list, or a dict by the index), or the fields
    that are its columns ("name=names": the column "name" is the field ``names``). ``to_pandas`` gives them; the first
    ``_shown`` rows of ``_printed`` are printed. ``_columns`` are texts by heading, such as {"L0": "{l0:.1f} ±
    {l0_se:.1f}"}: each record is printed in them, whether there are figures or not. "{mark}" is ``_mark`` in the record
    number ``best_index``, "{index}" the index of the table.
    """

    _records: str | tuple[str, ...] = ""
    _shown, _digits, _align = 20, ".3f", ""
    _columns: dict[str, str] = {}  # noqa: RUF012
    _mark = _sorted = ""  # _sorted: the column whose largest sizes are printed first

    def figures(self) -> list[Figure]:
        """The figures of this result, in the order of the fields."""
        named = {f.name for f in fields(self)}  # type: ignore[arg-type]
        return [self._figure(f, named) for f in fields(self) if "figure" in f.metadata]  # type: ignore[arg-type]

    def _figure(self, f: Any, named: set[str]) -> Figure:
        told: Figure = f.metadata["figure"]
        error = f.metadata["error"] or f"{f.name}_se" * (f"{f.name}_se" in named)
        control = f.metadata["control"]
        return told._replace(
            key=f.name, value=getattr(self, f.name), meaning=filled(told.meaning, self),
            control_name=filled(told.control_name, self), error=getattr(self, error) if error else math.nan,
            control=attrgetter(control)(self) if control else math.nan,
        )  # fmt: skip

    def figure(self, key: str) -> Figure:
        """The figure of a field: ``found.figure("fvu")``. KeyError with the known keys."""
        known = {one.key: one for one in self.figures()}
        if key not in known:
            raise KeyError(f"{type(self).__name__} has no figure {key!r}; it has: {', '.join(known)}")
        return known[key]

    def _rows(self) -> list[tuple[str, ...]]:
        if self._columns:
            best, records = getattr(self, "best_index", -1), self.to_pandas().reset_index().to_dict("records")
            told = [record | {"mark": self._mark * (i == best)} for i, record in enumerate(records)]
            cells = [tuple(filled(text, record) for text in self._columns.values()) for record in told]
            return [tuple(self._columns), *cells]
        if found := self.figures():
            return [("", "value", "control", ""), *((f.measure, f.text, f.control_text, f.meaning) for f in found)]
        table = self.to_pandas()
        shown = self._printed(table).head(self._shown) if len(table) else table
        said = ["name", "label"] if "feature" in shown else []  # what people call features
        if said and "name" in shown and not any(shown["name"]):
            shown = shown.drop(columns="name")
        head, *rows = frame_rows(shown, self._digits, "")
        return [head, *(tuple(Name(c) if h in said else c for h, c in zip(head, row, strict=True)) for row in rows)]

    def _sides(self) -> str:
        return self._align or ("<" if self._columns or self.figures() else ">")

    def _printed(self, table: Any) -> Any:
        """The table of ``to_pandas`` in the order in which it is printed."""
        return table.sort_values(self._sorted, key=abs, ascending=False) if self._sorted else table

    def to_pandas(self):
        """One row a record; of a result without records one row, with a column for each number and text."""
        import pandas as pd

        if isinstance(self._records, str) and self._records:
            records = getattr(self, self._records)
            named = records if isinstance(records, dict) else dict(enumerate(records))
            if any(isinstance(one, Result) for one in named.values()):
                return pd.concat({name: one.to_pandas() for name, one in named.items()}).droplevel(1)
            return pd.DataFrame(records if isinstance(records, dict) else list(named.values()))
        if self._records:
            named = (column.partition("=") for column in self._records)
            return pd.DataFrame({column: getattr(self, name or column) for column, _, name in named})
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]
        return pd.DataFrame([{name: v for name, v in plain.items() if isinstance(v, Number | str)}])

    def plot(self, **settings: Any) -> Any:
        """``sl.plot(self, **settings)``."""
        return import_module("sae_lab").plot(self, **settings)
