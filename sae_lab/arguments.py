"""What callers pass, made what the annotation says or refused in one sentence: rule, value, remedy.

``@as_annotated`` stands on public functions, ``check_fields`` in ``__post_init__`` of dataclasses. Both go by
annotations:

- One item where a list of such items is meant is a list of one: a str, an edit, a coder.
- Numbers of numpy and torch are numbers, their arrays lists or tensors, and 1e6 is an int. A bool is no number, nor is
  NaN.
- What is of another kind is refused, and where two arguments stand in each other's place, it says which.

What an argument may be beyond its kind (``k`` at most ``d_sae``) is for the function to say.
"""

import inspect
import operator
import re
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache, wraps
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

REPAIR = 'text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
_NO = object()  # "this value is not of that kind"
_MANY = (list, tuple, Sequence, Iterable)
_SAID: dict[Any, str] = {}
_PLAIN = (str, int, float, bool, type(None))


def as_annotated(fn: F) -> F:
    """A public function whose arguments are first made what their annotations say. ValueError where they cannot be."""
    signature = inspect.signature(fn)
    named = [p for p in signature.parameters.values() if p.annotation is not p.empty and p.kind is not p.VAR_KEYWORD]
    hints = {p.name: p.annotation for p in named}
    several = {p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL}

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)  # a TypeError names what is missing or unknown
        for name, value in bound.arguments.items():
            hint = hints.get(name, Any)
            made = [fit(v, hint) for v in value] if name in several else [fit(value, hint)]
            if any(m is _NO for m in made):
                raise ValueError(_refusal(fn, signature, hints, bound.arguments, name))
            bound.arguments[name] = tuple(made) if name in several else made[0]
        return fn(*bound.args, **bound.kwargs)

    call.as_annotated = True  # type: ignore[attr-defined]
    return typing.cast(F, call)


def check_fields(made: Any) -> None:
    """The same for the fields of a dataclass, in its ``__post_init__``."""
    for f in fields(made):
        value = fit(getattr(made, f.name), f.type)
        if value is _NO:
            said = f"{f.name} must be {words(f.type)}, got {_got(getattr(made, f.name), f.type)}"
            raise ValueError(f"{type(made).__name__}: {said}")
        object.__setattr__(made, f.name, value)


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


# ---- values and kinds


def fit(value: Any, hint: Any, lone: bool = True) -> Any:
    """The value as the annotation means it: itself, or what it can be read as; ``_NO`` where it is of another kind.

    lone: whether one item may stand for a list of one.
    """
    kinds = _kinds(hint)
    for kind in kinds:
        found = _as_it_is(value, kind)
        if found is not _NO:
            return found
    for kind in kinds:
        found = _read_as(value, kind, kinds, lone)
        if found is not _NO:
            return found
    return _NO


def say(hint: Any, in_words: str) -> None:
    """How ``words`` puts a long union."""
    _SAID[hint] = in_words


def words(hint: Any) -> str:
    """An annotation in words."""
    if isinstance(hint, Hashable) and hint in _SAID:
        return _SAID[hint]
    said = list(dict.fromkeys(_words(kind) for kind in _kinds(hint)))
    return " or ".join(([", ".join(said[:-1])] if said[:-1] else []) + said[-1:])


@lru_cache(maxsize=4096)
def _kinds(hint: Any) -> tuple[Any, ...]:
    """What a union is one of."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for part in get_args(hint) for kind in _kinds(part))
    return (hint,)


def _as_it_is(value: Any, kind: Any) -> Any:
    origin = get_origin(kind)
    if kind is None or kind is type(None):
        return value if value is None else _NO
    if kind is int or kind is float:
        number = type(value) is int or (kind is float and type(value) is float)
        return value if number and value == value else _NO  # NaN is not itself
    if origin is Literal:
        return value if isinstance(value, type(get_args(kind)[0])) else _NO
    if origin is Callable or kind is Callable:
        return value if callable(value) else _NO
    if origin in _MANY and origin is not tuple:
        lists = isinstance(value, origin) and not isinstance(value, str | bytes | Mapping | Tensor | np.ndarray)
        return _each(value, get_args(kind)) if lists else _NO
    if origin is tuple:
        return value if isinstance(value, tuple | list) else _NO
    if (array := getattr(kind, "array_type", None)) is not None:  # jaxtyping's
        return value if isinstance(value, array) else _NO
    kind = origin or kind
    if kind is Any or not isinstance(kind, type):
        return value  # nor what is not known here
    return value if isinstance(value, kind) else _NO


def _each(values: Any, item: tuple[Any, ...]) -> Any:
    """A list, each item made what it must be. What can be read once only stays as it is."""
    if not isinstance(values, list | tuple) or len(item) != 1 or item[0] is Any:
        return values
    made = [fit(v, item[0], lone=False) for v in values]
    if any(m is _NO for m in made):
        return _NO
    return values if all(m is v for m, v in zip(made, values, strict=True)) else made


def _read_as(value: Any, kind: Any, kinds: tuple[Any, ...], lone: bool) -> Any:
    if (kind is int or kind is float) and _is_scalar(value):
        return _number(value, kind)
    if isinstance(value, np.ndarray) and (kind is Tensor or getattr(kind, "array_type", None) is Tensor):
        return torch.as_tensor(value) if value.dtype.kind in "biuf" else _NO
    origin, item = get_origin(kind), get_args(kind)
    if origin not in _MANY or origin is tuple or len(item) != 1 or item[0] is Any:
        return _NO
    if hasattr(value, "tolist") and not _is_scalar(value):
        return _as_it_is(value.tolist(), kind)
    if not lone or (_is_scalar(value) and any(k is str or get_args(k) == (str,) for k in kinds)):
        return _NO  # where words are meant, a number is hardly one token
    one = fit(value, item[0], lone=False)
    return _NO if one is _NO else [one]


def _is_scalar(value: Any) -> bool:
    array = isinstance(value, Tensor | np.ndarray | np.generic)
    return (array and value.ndim == 0) or isinstance(value, int | float)


def _number(value: Any, kind: type) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool) or not isinstance(plain, int | float) or plain != plain:
        return _NO
    if kind is float:
        return plain
    return operator.index(int(plain)) if not isinstance(plain, float) or plain.is_integer() else _NO


# ---- in words


def _refusal(fn: Any, signature: inspect.Signature, hints: dict[str, Any], given: Mapping[str, Any], name: str) -> str:
    in_order = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in signature.parameters.values() if p.kind in in_order and p.name != "self"]
    value, wrong = given[name], [o for o in given if o != name and fit(given[o], hints.get(o, Any)) is _NO]
    fits = [o for o in wrong if fit(value, hints[o]) is not _NO and fit(given[o], hints[name]) is not _NO]
    swapped = f": {name} and {fits[0]} are swapped" if fits else ""
    called = fn.__qualname__.removesuffix(".__init__")
    takes = f"{called}({', '.join(names[:4])}{', ...' if len(signature.parameters) > 4 else ''})"
    return f"{takes}: {name} must be {words(hints[name])}, got {_got(value, hints[name])}{swapped}"


def _words(kind: Any) -> str:
    origin, item = get_origin(kind), get_args(kind)
    if kind is None or kind is type(None):
        return "None"
    if kind in (int, float, bool):
        return {int: "a whole number", float: "a number", bool: "True or False"}[kind]
    if origin is Literal:
        return " or ".join(map(repr, item))
    if origin is Callable or kind is Callable:
        return "a function"
    if origin in _MANY:
        return "a list" if not item or item[0] is Any else f"a list of {_plural(item[0])}"
    if getattr(kind, "array_type", None) is not None:
        return f"{_article(kind.array_type.__name__)} ({kind.dim_str})"
    return getattr(kind, "IN_WORDS", None) or _article(getattr(origin or kind, "__name__", str(kind)))


def _plural(kind: Any) -> str:
    named = {int: "whole numbers", float: "numbers", Any: "anything"}
    return " or ".join(named.get(k) or re.sub("^an? ", "", _words(k)) for k in _kinds(kind))


def _article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOUaeiou' or name[:2] in ('LM', 'SA') else 'a'} {name}"


def _got(value: Any, hint: Any = Any) -> str:
    if isinstance(value, _PLAIN):
        said = repr(value)
        return said if len(said) < 80 else said[:76] + "..."
    if isinstance(value, list | tuple) and value:
        items = [get_args(kind)[0] for kind in _kinds(hint) if get_origin(kind) in _MANY and get_args(kind)]
        odd = next((v for v in value if all(fit(v, item, lone=False) is _NO for item in items)), value[0])
        return f"a {type(value).__name__} with {_got(odd)}"
    return _article(type(value).__name__)
