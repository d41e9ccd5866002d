"""Arguments of public functions, converted to their annotations or refused in one sentence: rule, value, remedy.

``@as_annotated`` on a public function or class:

- makes a list of one item (a str, an edit, a coder) where a list of such items is annotated;
- takes numbers and arrays of numpy and torch for numbers, lists or tensors, lists of numbers for tensors, and 1e6 for
  an int; a bool or NaN is no number;
- compares a tensor's dtype and number of axes with jaxtyping's annotation, and refuses floats with NaN or Inf;
- refuses all other values, and says which two arguments are swapped.

Rules beyond the type (``k`` at most ``d_sae``) are checked by each function.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import lru_cache, wraps
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from sae_lab.spelling import near

F = TypeVar("F", bound=Callable[..., Any])

Count = Annotated[int, "at least 0"]
_NO = object()  # in place of a value that does not fit
_MANY = (list, tuple, Sequence, Iterable)
SAID: dict[Any, str] = {}  # words for long unions
_SIMPLE = {None: "None", type(None): "None", int: "a whole number", float: "a number", bool: "True or False",
           Count: "a whole number of at least 0"}  # fmt: skip
_QUOTED = {"str": str, "int": int, "float": float, "bool": bool, "None": None, "Any": Any}


def as_annotated(fn: F) -> F:
    """A public function that first converts its arguments to their annotations; of a class, its constructor and public
    methods. ValueError for a value that does not fit; TypeError for an unknown name, with a similar one."""
    if isinstance(fn, type):
        for name, member in list(vars(fn).items()):
            method = getattr(member, "__func__", member)
            public = name in ("__init__", "__getitem__") or not name.startswith("_")
            if public and inspect.isfunction(method) and not hasattr(method, "as_annotated"):
                made = as_annotated(method)
                setattr(fn, name, made if method is member else type(member)(made))  # type: ignore[call-arg]
        return typing.cast(F, fn)
    signature = inspect.signature(fn)
    signature = signature.replace(parameters=[q for p in signature.parameters.values() for q in _spelt_out(p)])
    named = [p for p in signature.parameters.values() if p.annotation is not p.empty and p.kind is not p.VAR_KEYWORD]
    counts = {int: Count, int | None: Union[Count, None]}  # noqa: UP007 (a seed is never negative)
    hints = {p.name: counts.get(p.annotation, p.annotation) if p.name == "seed" else p.annotation for p in named}
    more = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    several = {p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL}

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
            for other in bound.arguments.get(more, ()):
                if near(other, hints, 0.8):
                    raise TypeError(f"got an unexpected keyword argument '{other}'")
        except TypeError as err:  # names the missing or unknown argument
            unknown = re.search("unexpected keyword argument '(.*)'", str(err))
            meant = near(unknown[1], signature.parameters) if unknown else ""
            raise TypeError(f"{_takes(fn, signature, args)}: {err}{meant}") from None
        for name, value in bound.arguments.items():
            hint = hints.get(name, Any)
            made = [fit(v, hint) for v in value] if name in several else [fit(value, hint)]
            if any(m is _NO for m in made):
                raise ValueError(f"{_takes(fn, signature, args)}: {_refusal(hints, bound.arguments, name)}") from None
            bound.arguments[name] = tuple(made) if name in several else made[0]
        return fn(*bound.args, **bound.kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.as_annotated = True  # type: ignore[attr-defined]
    return typing.cast(F, call)


def _spelt_out(p: inspect.Parameter) -> list[inspect.Parameter]:
    """The arguments in ``**more: Unpack[...]``, one by one."""
    if p.kind is not p.VAR_KEYWORD or get_origin(p.annotation) is not typing.Unpack:
        return [p]
    named = typing.get_type_hints(get_args(p.annotation)[0])
    return [inspect.Parameter(n, p.KEYWORD_ONLY, default=None, annotation=hint) for n, hint in named.items()]


def fit(value: Any, hint: Any, lone: bool = True) -> Any:
    """The value, converted to the annotation if need be; ``_NO`` if it does not fit. lone: whether one item may stand
    for a list of one."""
    kinds = _kinds(hint)
    for way in (_as_it_is, _read_as):
        for kind in kinds:
            if (found := way(value, kind, kinds, lone)) is not _NO:
                return found
    return _NO


def words(hint: Any) -> str:
    """An annotation in words."""
    if isinstance(hint, Hashable) and hint in SAID:
        return SAID[hint]
    said = list(dict.fromkeys(_words(kind) for kind in _kinds(hint)))
    return " or ".join(([", ".join(said[:-1])] if said[:-1] else []) + said[-1:])


@lru_cache(maxsize=4096)
def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union. Quoted names of classes stay names."""
    if isinstance(hint, str):
        return tuple(_QUOTED.get(part, part) for part in hint.split(" | "))
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for part in get_args(hint) for kind in _kinds(part))
    return (hint,)


def _as_it_is(value: Any, kind: Any, *_: Any) -> Any:
    origin = get_origin(kind)
    if kind is None or kind is type(None):
        return value if value is None else _NO
    if kind in (int, float, Count):
        number = type(value) is int or (kind is float and type(value) is float)
        return value if number and value == value and (kind is not Count or value >= 0) else _NO  # NaN is not itself
    if isinstance(kind, str):
        return value if "[" in kind or any(kind == c.__name__ for c in type(value).__mro__) else _NO
    if origin is Literal:
        return value if isinstance(value, type(get_args(kind)[0])) else _NO
    if origin is Callable or kind is Callable:
        return value if callable(value) else _NO
    if origin in _MANY and origin is not tuple:
        lists = isinstance(value, origin) and not isinstance(value, str | bytes | Mapping | Tensor | np.ndarray)
        return _each(value, get_args(kind)) if lists else _NO
    if origin is tuple:
        items = get_args(kind)
        found = _each(value, items[:1]) if items[1:] == (...,) and isinstance(value, tuple | list) else value
        return found if isinstance(found, tuple | list) else _NO
    if origin in (dict, Mapping) and get_args(kind)[1] in (int, float, str) and isinstance(value, Mapping):
        return value if all(fit(v, get_args(kind)[1]) is not _NO for v in value.values()) else _NO
    if kind is Tensor or hasattr(kind, "array_type"):
        return _array(value, kind) if isinstance(value, getattr(kind, "array_type", Tensor)) else _NO
    kind = origin or kind
    if kind is Any or not isinstance(kind, type):
        return value  # annotations that this module does not know are not checked
    return value if isinstance(value, kind) else _NO


def _each(values: Any, item: tuple[Any, ...]) -> Any:
    """A list, each item converted. An iterable that can be read only once is returned as it is."""
    if not isinstance(values, list | tuple) or len(item) != 1 or item[0] is Any:
        return values
    made = [fit(v, item[0], lone=False) for v in values]
    if any(m is _NO for m in made):
        return _NO
    return values if all(m is v for m, v in zip(made, values, strict=True)) else made


def _array(value: Any, kind: Any) -> Any:
    """A tensor or array, if its dtype and axes are those of the annotation (jaxtyping's, or any)."""
    named, axes = _dtypes(kind), getattr(kind, "dim_str", "...").split()
    if named and str(value.dtype).removeprefix("torch.") not in named:
        return _NO
    if value.ndim != len(axes) and not any(a[0] in "*." for a in axes):
        return _NO
    tensor = isinstance(value, Tensor)
    return _NO if tensor and (value.is_complex() or ("float32" in named and not is_finite(value))) else value


def _dtypes(kind: Any) -> tuple[str, ...]:
    """The names of jaxtyping's dtypes; () for any."""
    return named if isinstance(named := getattr(kind, "dtypes", ()), tuple) else ()


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds no NaN or Inf, told from its extremes without a copy."""
    return x.is_meta or not x.numel() or bool(torch.stack(torch.aminmax(x.detach())).isfinite().all())


def check_least(least: int, **values: float) -> None:
    """ValueError for the first argument below ``least``."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _read_as(value: Any, kind: Any, kinds: tuple[Any, ...], lone: bool) -> Any:
    if kind in (int, float, Count) and _is_scalar(value):
        return _number(value, kind)
    if kind is Tensor or kind is np.ndarray or hasattr(kind, "array_type"):
        return _as_array(value, kind)
    origin, item = get_origin(kind), get_args(kind)
    if origin not in _MANY or origin is tuple or len(item) != 1 or item[0] is Any:
        return _NO
    if hasattr(value, "tolist") and not _is_scalar(value):
        return _as_it_is(value.tolist(), kind)
    if not lone or (_is_scalar(value) and any(k is str or get_args(k) == (str,) for k in kinds)):
        return _NO  # beside words, a single number is more likely a mistake than a token id
    one = fit(value, item[0], lone=False)
    return _NO if one is _NO else [one]


def _as_array(value: Any, kind: Any) -> Any:
    """An array or a list of numbers as the annotated tensor or array; floats of a list become float32."""
    try:
        array = np.asarray(value if isinstance(value, np.ndarray | list | tuple) else _NO)
    except (ValueError, TypeError, OverflowError):  # lists of several lengths
        return _NO
    if array.dtype.kind not in "biuf" or not array.size:
        return _NO
    if isinstance(value, list | tuple) and (array.dtype == np.float64 or "float32" in _dtypes(kind)):
        if array.dtype == bool:
            return _NO
        array = array.astype(np.float32)
    if kind is np.ndarray:
        return array
    return _array(array if getattr(kind, "array_type", Tensor) is np.ndarray else torch.as_tensor(array), kind)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0)


def _number(value: Any, kind: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool) or not isinstance(plain, int | float) or plain != plain:
        return _NO
    if kind is float:
        return plain
    whole = not isinstance(plain, float) or plain.is_integer()
    return int(plain) if whole and (kind is int or plain >= 0) else _NO


def _takes(fn: Any, signature: inspect.Signature, args: tuple[Any, ...]) -> str:
    """A call in words; of a method that is inherited, with the class of its object."""
    parameters = signature.parameters
    names = [n for n, p in parameters.items() if p.kind <= p.POSITIONAL_OR_KEYWORD and n not in ("self", "cls")][:4]
    inherited = "self" in parameters and args and hasattr(type(args[0]), fn.__name__)
    said = f"{type(args[0]).__name__}.{fn.__name__}" if inherited else fn.__qualname__
    return f"{said.removesuffix('.__init__')}({', '.join(names)}{', ...' * (len(parameters) > 4)})"


def _refusal(hints: dict[str, Any], given: Mapping[str, Any], name: str) -> str:
    value, wrong = given[name], [o for o in given if o != name and fit(given[o], hints.get(o, Any)) is _NO]
    fits = [o for o in wrong if fit(value, hints[o]) is not _NO and fit(given[o], hints[name]) is not _NO]
    remedy = f"{name} and {fits[0]} are swapped" if fits else _remedy(value, hints[name])
    said = f"{name} must be {words(hints[name])}, got {_got(value, hints[name])}"
    return f"{said}: {remedy}" if remedy else said


def _remedy(value: Any, hint: Any) -> str:
    """How to write the value instead, or ""."""
    kinds = _kinds(hint)
    if isinstance(value, str) and any(k in (int, float) for k in kinds) and re.fullmatch(r"-?\d+\.?\d*", value):
        return f"write {value}, without quotes"
    if isinstance(value, Mapping) and (made := [k for k in kinds if isinstance(k, type) and is_dataclass(k)]):
        return f"write sl.{made[0].__name__}(**it)"
    floats = any("float32" in _dtypes(kind) for kind in kinds)
    if floats and isinstance(value, Tensor) and not value.is_floating_point():
        return "these look like token ids; x.float() makes them floats"
    return getattr(type(value), "INSTEAD", "")


def _words(kind: Any) -> str:
    origin, item = get_origin(kind), get_args(kind)
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    if isinstance(kind, str):
        return _article(kind)
    if origin is Literal:
        return " or ".join(map(repr, item))
    if origin is Callable or kind is Callable:
        return "a function"
    if origin in _MANY:
        named = {int: "whole numbers", float: "numbers"}
        items = (named.get(k) or re.sub("^an? ", "", _words(k)) for k in _kinds(item[0])) if item else ()
        return "a list" if not item or item[0] is Any else f"a list of {' or '.join(items)}"
    if getattr(kind, "array_type", None) is not None:
        return f"{_article(kind.array_type.__name__)} of {kind.__name__.split('[')[0].lower()}s ({kind.dim_str})"
    return getattr(kind, "IN_WORDS", None) or _article(getattr(origin or kind, "__name__", str(kind)))


def _article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOUaeiou' or name[:2] in ('LM', 'SA') else 'a'} {name}"


def _got(value: Any, hint: Any = Any) -> str:
    if isinstance(value, str | bytes | int | float | None):
        return said if len(said := repr(value)) < 80 else said[:76] + "..."
    if isinstance(value, list | tuple) and value:
        items = [get_args(kind)[0] for kind in _kinds(hint) if get_origin(kind) in _MANY and get_args(kind)]
        odd = next((v for v in value if all(fit(v, item, lone=False) is _NO for item in items)), value[0])
        return f"a {type(value).__name__} with {_got(odd)}"
    if isinstance(value, Tensor | np.ndarray):
        bad = isinstance(value, Tensor) and value.is_floating_point() and not is_finite(value)
        said = f"{str(value.dtype).removeprefix('torch.')}, shape {tuple(value.shape)}{', with NaN or Inf' * bad}"
        return f"{_article(type(value).__name__)} ({said})"
    return _article(type(value).__name__)
