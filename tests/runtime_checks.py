"""Types and shapes of every function of the library, checked when a test calls it: jaxtyping's hook, made cheaper.

jaxtyping's own decorator binds the arguments of each call, keeps a memo of axes for each, and has beartype look at the
arguments once before the call and once more after it: two fifths of the time of a small training. Nine in ten of the
functions name no axes. Those get beartype alone; the others get beartype inside jaxtyping's context, which holds the
names of axes from the arguments to what is returned. What is refused is the same.
"""

import inspect
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial, wraps
from types import FunctionType
from typing import Any

import jaxtyping

WHOLE = jaxtyping.jaxtyped  # jaxtyping's own
AXES: Any = WHOLE("context")  # keeps no state of its own, so that one serves every call


def jaxtyped(fn: Any = None, *, typechecker: Any = None) -> Any:
    """In the place of ``jaxtyping.jaxtyped``."""
    if fn is None:
        return partial(jaxtyped, typechecker=typechecker)
    if typechecker is None or fn == "context":
        return WHOLE(fn)
    if isinstance(fn, type):
        if is_dataclass(fn) and _plain(vars(fn).get("__init__")):  # else it is checked already, or inherited
            fn.__init__ = _checked(fn.__init__, typechecker)
        return fn
    # What a generator yields, or what stands behind another decorator, is jaxtyping's own matter.
    if not _plain(fn) or inspect.isgeneratorfunction(fn) or inspect.iscoroutinefunction(fn):
        return WHOLE(fn, typechecker=typechecker)
    return _checked(fn, typechecker)


def _plain(fn: Any) -> bool:
    return isinstance(fn, FunctionType) and not hasattr(fn, "__wrapped__")


def _checked(fn: FunctionType, typechecker: Callable[[FunctionType], Any]) -> Any:
    hints = {name: _read(hint, fn.__globals__) for name, hint in fn.__annotations__.items()}
    if not hints:
        return fn
    copy = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__, copy.__qualname__, copy.__annotations__ = fn.__kwdefaults__, fn.__qualname__, hints
    checked = typechecker(copy)
    if not any(_names_axes(hint) for hint in hints.values()):
        return wraps(fn)(checked) if checked is not copy else fn

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with AXES:
            return checked(*args, **kwargs)

    return call


def _read(hint: Any, names: dict[str, Any]) -> Any:
    """The annotation; one in quotes is read, and Any where it names what does not exist yet, as jaxtyping has it."""
    if not _quoted(hint):
        return hint
    holder = type("", (), {"__annotations__": {"value": hint}})
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["value"]
    except Exception:  # whatever a name stands for
        return Any


def _quoted(hint: Any) -> bool:
    return isinstance(hint, str | typing.ForwardRef) or any(map(_quoted, _parts(hint)))


def _names_axes(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_names_axes, _parts(hint)))


def _parts(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return []
    return [p for part in typing.get_args(hint) for p in (part if isinstance(part, list) else [part])]
