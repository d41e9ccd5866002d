"""A pretend accelerator: the device "elsewhere:0", which refuses what a CUDA device refuses, and computes on the CPU.

    import pretend                     # registers the device, for the whole process
    x = torch.ones(3, device=pretend.DEVICE)
    x + torch.ones(3)                  # RuntimeError: tensors on two devices
    x.numpy()                          # TypeError: it must be moved to the CPU first

It tells whether code asks for the right device at each place. It says nothing about speed, about kernels of a real
accelerator, or about work that goes on while Python runs ahead.

A tensor there (``There``) holds a CPU tensor, and every operation on it runs on the CPU tensors inside. New tensors are
made by kernels of ``torch.library``, which hold in every thread.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class Module:
    """torch.elsewhere: random numbers there are those of the CPU's generator."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        """torch.manual_seed has set it."""

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend("elsewhere", backend_module=Module())
DEVICE = torch.device("elsewhere", 0)

aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy, aten._copy_from}  # they may go from one device to another
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # a CPU index of a tensor there is right
JOINED = {aten.cat, aten.stack}  # a number on the CPU is right everywhere but here
# What an accelerator is waited for: a number of it, or a size that depends on its numbers.
READ = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten.bincount, aten._unique2}
WAITED: list[str] = []  # such operations, in their order


class There(torch.Tensor):
    """A tensor on "elsewhere:0"."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor):
        like: dict[str, Any] = {"strides": inside.stride(), "storage_offset": inside.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=DEVICE, **like)
        made.inside = inside
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"There({self.inside!r})"

    def numpy(self, *_: Any, **__: Any):
        raise TypeError("can't convert elsewhere:0 device type tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self):
        WAITED.append("tolist")
        return self.inside.tolist()

    def data_ptr(self) -> int:
        return self.inside.data_ptr()

    @property
    def data(self):  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, new: "There") -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.inside = new.inside

    def __deepcopy__(self, memo: dict[int, Any]):
        made = self.detach().clone().requires_grad_(self.requires_grad)
        vars(made).update({name: value for name, value in vars(self).items() if name != "inside"})  # as of a Parameter
        memo[id(self)] = made
        return made


class SparseThere(torch.Tensor):
    """A sparse tensor there. torch has no such device for them: this one is a CPU tensor whose parts are there."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return there(func(*args, **(kwargs or {})))


def inside(value: Any) -> Any:
    """The CPU tensor inside a tensor there; all else as it is."""
    return value.inside if isinstance(value, There) else value


def there(value: Any) -> Any:
    """A tensor, taken there; all else as it is."""
    if not isinstance(value, Tensor) or isinstance(value, There | SparseThere):
        return value
    if value.layout == torch.strided:
        return There(value)
    return Tensor._make_subclass(SparseThere, value)


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation, on the CPU tensors inside. RuntimeError where a CUDA device would not take these tensors."""
    given = tree_leaves((args, kwargs))
    given_there = any(isinstance(t, There) for t in given)
    device = kwargs.get("device")
    if given_there:
        _require_one_device(func, args, kwargs, given)
    made_there = given_there if device is None else torch.device(device).type == DEVICE.type
    if made_there:
        _require_no_cpu_generator(func, given)
    named = {name: value for name, value in tree_map(inside, kwargs).items() if name != "pin_memory"} if kwargs else {}
    if device is not None and made_there:
        named["device"] = "cpu"
    if given_there and _waits(func, args, kwargs):
        WAITED.append(str(func.overloadpacket))
    out = func(*tree_map(inside, args), **named)
    if made_there:
        out = tree_map(there, out)
        if given_there and _aliases(func) and not any(isinstance(t, SparseThere) for t in (*given, *tree_leaves(out))):
            out = return_and_correct_aliasing(func, args, kwargs, out)
    for value in given:
        assert not isinstance(value, There) or value.shape == value.inside.shape, f"{func} gave a tensor another shape"
    return out


@cache
def _aliases(func: Any) -> bool:
    """Whether the operation returns one of its arguments, or a view of one."""
    # torch's own list of them; no public name gives it.
    return any(argument.alias_info is not None for argument in func._schema.arguments)


def _waits(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether Python goes on only when the device has come so far."""
    name = func.overloadpacket
    if name is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if name in INDEXED:  # one number for all places that a mask names needs no count of them
        masks = any(isinstance(t, Tensor) and t.dtype == torch.bool for t in args[1])
        return masks and (name is aten.index or args[2].numel() > 1)
    to_cpu = name is aten._to_copy and str(kwargs.get("device")) == "cpu"
    return to_cpu or name in READ or (name is aten.copy_ and not isinstance(args[0], There))


def _require_one_device(func: Any, args: tuple, kwargs: dict[str, Any], given: list[Any]) -> None:
    name = func.overloadpacket
    if name in COPIES:
        return
    if name in INDEXED and isinstance(args[0], There):
        given = tree_leaves((args[0], *args[2:], kwargs))  # without the indices
    numbers_fit = name not in JOINED
    for value in given:
        if not isinstance(value, Tensor) or isinstance(value, There | SparseThere):
            continue
        if not (numbers_fit and value.dim() == 0):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, elsewhere:0 and "
                f"{value.device}! ({func}, {tuple(value.shape)})"
            )


def _require_no_cpu_generator(func: Any, given: list[Any]) -> None:
    for value in given:
        if isinstance(value, torch.Generator) and value.device.type == "cpu":
            raise RuntimeError(f"Expected a 'elsewhere' device type for generator but found 'cpu' ({func})")


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return There(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return There(torch.empty_strided(size, stride, dtype=dtype))


def _arange(*numbers, dtype=None, layout=None, device=None, pin_memory=None):
    return There(torch.arange(*numbers, dtype=dtype))


def _eye(*sizes, dtype=None, layout=None, device=None, pin_memory=None):
    return There(torch.eye(*sizes, dtype=dtype))


def _copy(to: Tensor, what: Tensor, non_blocking: bool = False) -> Tensor:
    inside(to).copy_(inside(what))
    return to


# torch's own arange and eye make an empty tensor and give it another shape; torch.tensor(..., device=) copies past
# ``There.__torch_dispatch__``.
_ATEN = torch.library.Library("aten", "IMPL")
for _name, _kernel in {
    "empty.memory_format": _empty, "empty_strided": _empty_strided, "copy_": _copy,
    "arange": _arange, "arange.start": _arange, "arange.start_step": _arange, "eye": _eye, "eye.m": _eye,
}.items():  # fmt: skip
    _ATEN.impl(_name, _kernel, "PrivateUse1")
