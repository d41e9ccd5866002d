"""Plain PyTorch hooks: every tensor that goes into a module or comes out of one, recorded or changed, in one pass."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SAME = 1e-6  # of the largest entry: the same numbers, up to the last bits
FITS = 1e-4  # of the norm: one tensor is another, or the sum of others, up to rounding


class Point(NamedTuple):
    """Where a tensor goes into a module or comes out: path, "input" or "output", the way into its arguments or its
    output (indices, names), and in which of the module's calls."""

    path: str
    end: str
    slot: tuple
    call: int = 0


class Event(NamedTuple):
    """One tensor at one point: when, and what it was then."""

    when: int
    point: Point
    tensor: Tensor


def tensors(value: Any, slot: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """The floating tensors within tuples, lists and dicts, each with the way to it."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield slot, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, (*slot, key))
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from tensors(part, (*slot, i))


def put(value: Any, slot: tuple, new: Tensor) -> Any:
    """The same value with another tensor in one place."""
    if not slot:
        return new
    head, rest = slot[0], slot[1:]
    if isinstance(value, dict):
        changed = type(value)(value) if type(value) is dict else value
        changed[head] = put(value[head], rest, new)
        return changed
    parts = [put(part, rest, new) if i == head else part for i, part in enumerate(value)]
    return tuple(parts) if isinstance(value, tuple) else parts


def at(value: Any, slot: tuple) -> Tensor:
    for key in slot:
        value = value[key]
    return value


Edits = list[tuple[Point, Callable[[Tensor], Tensor]]]


def run(
    module: nn.Module, ids: Tensor, edits: Edits = (), record: bool = False, grad: bool = False
) -> tuple[Tensor, list[Event], dict]:
    """Logits without a cache, with some tensors changed on the way; and, if asked, every tensor, and when each module
    began and ended: path -> [(begin, end), ...]."""
    events: list[Event] = []
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    begun: dict[str, list[int]] = defaultdict(list)
    calls: dict[str, int] = defaultdict(int)
    clock = iter(range(10**9))

    def change(path: str, end: str, call: int, value: Any) -> Any:
        for point, fn in edits:
            if (point.path, point.end, point.call) == (path, end, call):
                value = put(value, point.slot, fn(at(value, point.slot)))
        return value

    def note(path: str, end: str, call: int, value: Any) -> None:
        for slot, x in tensors(value):
            events.append(Event(next(clock), Point(path, end, slot, call), x.detach().clone()))

    def before(path: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> Any:
            call = calls[path]
            calls[path] += 1
            if record:
                begun[path].append(next(clock))
                note(path, "input", call, (args, kwargs))
            return change(path, "input", call, (args, kwargs)) if edits else None

        return hook

    def after(path: str) -> Callable:
        def hook(_: nn.Module, args: tuple, out: Any) -> Any:
            call = calls[path] - 1
            if record:
                note(path, "output", call, out)
                spans[path].append((begun[path].pop(), next(clock)))
            return change(path, "output", call, out) if edits else None

        return hook

    wanted = {point.path for point, _ in edits}
    hooks = []
    for path, part in module.named_modules():
        if path and (record or path in wanted):
            hooks += [part.register_forward_pre_hook(before(path), with_kwargs=True)]
            hooks += [part.register_forward_hook(after(path))]
    try:
        with torch.set_grad_enabled(grad):
            logits = module(input_ids=ids, use_cache=False).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
    return logits, events, spans


def same(a: Tensor, b: Tensor, limit: float = SAME) -> bool:
    return a.shape == b.shape and float((a.float() - b.float()).abs().max()) <= limit * max(1e-3, float(b.abs().max()))


def adds(by: Tensor) -> Callable[[Tensor], Tensor]:
    """Adds a vector at every token, or what is as large as the tensor."""
    return lambda x: x + (by.reshape(x.shape) if by.numel() == x.numel() else by).to(x)
