"""Names that were meant, and text that can be written."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

REPAIR = 'text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'


def near(name: str, known: Iterable[str], alike: float = 0.6) -> str:
    """What may be meant by a name that is none, for the end of a message."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=alike)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def no_attribute(module: str, names: Iterable[str]) -> Callable[[str], Any]:
    """A module's ``__getattr__``: AttributeError with a near name."""

    def missing(name: str) -> Any:
        raise AttributeError(f"module {module!r} has no attribute {name!r}{near(name, names)}")

    return missing


def check_text(text: str, what: str) -> None:
    """ValueError for half a surrogate pair: no tokenizer, file or page takes one. (Cut emoji and damaged JSON hold
    them.)"""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise ValueError(
            f"{what} holds half a surrogate pair at character {err.start} ({text[err.start]!a}), which is no "
            f"character: repair it with {REPAIR}"
        ) from None
