"""What a network reads: the arguments of one call, and data of many items, each read once and alone or in batches."""

import inspect
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from sae_lab.results import counted
from sae_lab.types import TokenBatch


@dataclass(frozen=True)
class InputBatch(TokenBatch):
    """The inputs of one call of a network. Its places at a site stand where a text has tokens: ids and positions are
    their numbers."""

    args: tuple[Any, ...] = ()
    kwargs: Any = None


class Call(NamedTuple):
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, x: Any, accepts: int) -> "Call":
        """From what a user gives: a tensor, a mapping of keyword arguments, or a tuple of positional ones, of which the
        first ``accepts`` are taken: data sets give (image, label)."""
        if isinstance(x, Mapping):
            return cls((), dict(x))
        return cls(tuple(x)[:accepts], {}) if isinstance(x, tuple) else cls((x,), {})

    def to(self, device: torch.device) -> "Call":
        return self.mapped(lambda t: t.to(device))

    def mapped(self, fn: Any) -> "Call":
        """The same with a function of each tensor."""
        args, kwargs = _pytree.tree_map_only(Tensor, fn, (self.args, self.kwargs))
        return Call(args, kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in _pytree.tree_leaves(tuple(self)) if isinstance(leaf, Tensor)]

    @property
    def form(self) -> tuple[Any, ...]:
        """Equal for calls whose modules pass on tensors of equal shapes: the shapes, and the arguments that are no
        tensors."""
        leaves, tree = _pytree.tree_flatten(tuple(self))
        said = [(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else repr(v) for v in leaves]
        return (str(tree), *said)

    @property
    def size(self) -> int | None:
        """The length of axis 0, where all tensors share it."""
        sizes = {t.shape[0] if t.dim() else None for t in self.tensors}
        return sizes.pop() if len(sizes) == 1 else None


def positional(module: nn.Module) -> int:
    """How many positional arguments a module's forward takes."""
    kinds = [p.kind for p in inspect.signature(type(module).forward).parameters.values()]  # of an instance, nnsight's
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 1 << 16
    return sum(k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds) - 1


PLACES = 4096  # of the items in one pass


class Inputs:
    """Items for a network, in a fixed order: a tensor (items on axis 0), a list or a data set of items, or a
    ``DataLoader``, whose batches are taken apart. An item is a tensor, a tuple of arguments or a mapping of them.

    ValueError for an iterator, which can be read once only, and for a loader that shuffles.
    """

    def __init__(self, data: Any, accepts: int, name: str | None = None):
        if isinstance(data, Iterator) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
            raise ValueError(
                f"data is read more than once, and a {type(data).__name__} cannot be: pass a tensor, a list, a data "
                "set or a DataLoader"
            )
        sampler = getattr(data, "sampler", None)
        if isinstance(sampler, torch.utils.data.RandomSampler):
            raise ValueError("this DataLoader shuffles, and items are found again by number: pass shuffle=False")
        self.data: Any = data
        self._accepts = accepts
        self.batched = isinstance(data, torch.utils.data.DataLoader)
        self.name = name or type(getattr(data, "dataset", data)).__name__

    def __iter__(self) -> Iterator[Call]:
        """The items, one by one, without an axis of the batch."""
        for x in self._given():
            call = Call.of(x, self._accepts)
            if not self.batched:
                yield call
                continue
            if call.size is None:
                raise ValueError("the tensors of a DataLoader's batch must share axis 0, the batch: pass single items")
            yield from (call.mapped(lambda t, i=i: t[i]) for i in range(call.size))

    def _given(self) -> Iterator[Any]:
        if hasattr(self.data, "__len__") and not self.batched:  # a data set need not be iterable
            return (self.data[i] for i in range(len(self.data)))
        return (tuple(x) if self.batched and isinstance(x, list) else x for x in self.data)  # as loaders join tuples

    @property
    def first(self) -> Call:
        """The first item. ValueError where there is none."""
        for call in self:
            return call
        raise ValueError(f"the data {self.name!r} is empty: pass at least one item")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all items."""
        value = items = 0
        for call in self:
            value, items = crc(call, value), items + 1
        return f"{value:08x}-{items}"

    def __len__(self) -> int:
        return int(self.fingerprint.rsplit("-", 1)[1])

    def __repr__(self) -> str:
        return f"Inputs({self.name!r}, {counted(len(self), 'item')})"


def crc(call: Call, value: int = 0) -> int:
    """A hash of a call's arguments, that goes on from an earlier one."""
    value = zlib.crc32(repr(call.form).encode(), value)
    for t in call.tensors:
        value = zlib.crc32(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def stacked(calls: Sequence[Call]) -> Call:
    """Items as one call, the batch on axis 0. ValueError for items of unequal shape."""
    forms = {c.form for c in calls}
    if len(forms) > 1:
        shapes = sorted({str([tuple(t.shape) for t in c.tensors]) for c in calls})[:3]
        raise ValueError(
            f"inputs of one call must have one shape, got {' and '.join(shapes)}: pad them, or call for each"
        )
    leaves = [_pytree.tree_leaves(tuple(c)) for c in calls]
    joined = [torch.stack(list(vs)) if isinstance(vs[0], Tensor) else vs[0] for vs in zip(*leaves, strict=True)]
    return Call(*_pytree.tree_unflatten(joined, _pytree.tree_structure(tuple(calls[0]))))


class Item(NamedTuple):
    """An item, in the form of a ``Context``: its places, and its number for each. batched: whether a pass may read it
    with others."""

    ids: list[int]
    documents: list[int]
    roles: None
    call: Call
    batched: bool


def in_batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items one after another in passes, each of one shape and of at most PLACES places."""
    some: list[Item] = []
    for item in items:
        full = some and (len(some) + 1) * len(item.ids) > PLACES
        if some and (full or not item.batched or item.call.form != some[0].call.form):
            yield some
            some = []
        some.append(item)
    if some:
        yield some
