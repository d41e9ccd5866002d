"""Forms: the names and shapes that a server's result must have."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import jaxtyped
from torch import Tensor


def has(found: Any, form: Any) -> bool:
    """Whether a value has a form: a jaxtyping annotation, a mapping of names to forms (those names and no others), a
    function that returns a bool, or None for anything. A size of one name is the same in all annotations."""
    with jaxtyped("context"):
        return _has(found, form)


def _has(found: Any, form: Any) -> bool:
    if form is None:
        return True
    if isinstance(form, Mapping):
        return isinstance(found, dict) and set(found) == set(form) and all(_has(found[k], f) for k, f in form.items())
    return isinstance(found, form) if isinstance(form, type) else bool(form(found))


def said(value: Any) -> str:
    """A form, or a value that does not have the form, in a few words."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{str(k)[:80]!r}: {said(v)}" for k, v in list(value.items())[:8]) + "}"
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, type) or callable(value):
        return str(getattr(value, "__name__", "what its function makes"))
    return "anything" if value is None else f"a {type(value).__name__}"
