"""What to look for among features, as one line: ``war density>0.1% norm<20 label:weapons``."""

import math
import operator
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from sae_lab.results import Name
from sae_lab.spelling import near

COLUMNS = ("density", "norm", "max", "mean", "count")
_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(rf"(?:^|(?<=\s))({'|'.join(COLUMNS)})\s*(>=|<=|>|<)\s*(\S+)", re.IGNORECASE)
_LABEL = re.compile(r"(?:^|(?<=\s))label:(?:\"([^\"]*)(?:\"|$)|(\S*))", re.IGNORECASE)
# Looks like a condition, but no column has that name.
_UNKNOWN = re.compile(r"(?:^|(?<=\s))([a-z_]+)(?:\s*(?:>=|<=|>|<|==?)\s*[\d.]+%?|(:)\S+)(?=\s|$)", re.IGNORECASE)


MOST_WORDS = 3
MOST_SAID = 400  # characters of a sentence that are said again
RULE = f"one to {MOST_WORDS} words, or a sentence of more words or in quotation marks; density>0.1%, label:word"
# From a quotation mark at the beginning of a word to the last one, or to the end of what is not typed to its end yet.
_QUOTED = re.compile(r"(?:^|(?<=\s))[\"“](.*?)(?:[\"”](?=[^\"”]*$)|$)", re.DOTALL)


class Query(NamedTuple):
    """kind: whether ``text`` is "words", or a "sentence" for the model; "" for neither. label: text to find among
    notes, None: not asked. limits: (column, comparison, value), all of which must hold."""

    kind: Literal["words", "sentence", ""]
    text: str
    label: str | None
    limits: list[tuple[str, str, float]]

    def holds(self, columns: Callable[[str], np.ndarray], d_sae: int) -> np.ndarray:
        """Bool per feature: whether all limits hold."""
        found = np.ones(d_sae, bool)
        for column, sign, value in self.limits:
            found &= _COMPARE[sign](np.asarray(columns(column)), value)
        return found

    def __str__(self) -> str:
        """What is searched, in words."""
        conditions = [f"{column} {sign} {value:g}" for column, sign, value in self.limits]
        conditions += [f"label with “{Name(self.label)}”"] if self.label is not None else []
        asked = {"words": "words: ", "sentence": "sentence: "}.get(self.kind, "") + Name(self.text, MOST_SAID)
        return "; ".join(filter(None, [asked, ", ".join(conditions)]))


def parse(line: str) -> Query:
    """A line as a query. What is left beside the conditions is a sentence where it has more than MOST_WORDS words, or
    stands in quotation marks, in which no condition is looked for. ValueError where a limit is no number, and for what
    looks like a misspelled condition."""
    labels = [quoted or plain for quoted, plain in _LABEL.findall(line)]
    rest = _LABEL.sub(" ", line)
    found = _QUOTED.search(rest)
    around = rest[: found.start()] + " " + rest[found.end() :] if found else rest
    if found and _CONDITION.sub(" ", around).strip():  # a quotation within what is typed
        found, around = None, rest
    limits = [(column.lower(), sign, _number(column, value)) for column, sign, value in _CONDITION.findall(around)]
    around = _CONDITION.sub(" ", around)
    for name, colon in _UNKNOWN.findall(around):
        if meant := near(name.lower(), ["label"] if colon else COLUMNS, 0.75):
            raise ValueError(
                f"conditions are {', '.join(COLUMNS)} with >, <, >= or <= and a number, and label:word, got "
                f"{name + colon!r}{meant} (A text with such a sign stands in quotation marks.)"
            )
    text = (found[1] if found else around).strip()
    kind = "" if not text else "sentence" if found or len(text.split()) > MOST_WORDS else "words"
    return Query(kind, text, " ".join(labels) if labels else None, limits)


def _number(column: str, text: str) -> float:
    try:
        number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ValueError(
            f"{column} is compared with a number, got {text[:40]!r}: write for instance density>0.001 or density>0.1%"
        )
    return number
