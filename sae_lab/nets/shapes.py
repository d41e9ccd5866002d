"""Which tensors a network's modules take and give, and which of their axes is which.

One pass with hooks writes down every module's shapes, visit by visit. The channel, the axis that a coder reads as one
vector, is told by the modules whose kind says it, the last before a tensor to give one of its shape and the first after
it to take one (they must agree): convolutions, their norms and pools have it on axis 1; linear maps, layer norms,
attention and recurrent networks on the last axis. The batch is the axis that grows with the inputs' axis 0; a second
pass checks that one more input, put before the others, leaves their activations as they were.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_lab.lm.passes import first_tensor
from sae_lab.nets.inputs import Call

SAME = 1e-3  # of the largest value: another batch size sums in another order
_FIRST = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Upsample, nn.PixelShuffle,
)  # fmt: skip
_LAST = (
    nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase, nn.modules.rnn.RNNCellBase, nn.Bilinear,
)  # fmt: skip
_NAMES = {
    (2, -1): "batch channel", (3, -1): "batch position channel", (4, -1): "batch height width channel",
    (2, 1): "batch channel", (3, 1): "batch channel position", (4, 1): "batch channel height width",
    (5, 1): "batch channel depth height width",
}  # fmt: skip


class Visit(NamedTuple):
    """A tensor at one end of a module in one of its calls. when: the order of all such tensors in the pass. channel:
    its axis, 1 or -1, or None where no module tells. parts: the keys of a mapping, if the module gives one."""

    when: int
    shape: tuple[int, ...]
    channel: int | None
    parts: tuple[str, ...] = ()


Key = tuple[str, str, str | None]  # a module's path, the end, the key in a mapping
Table = dict[Key, list[Visit]]


class Kept(NamedTuple):
    """What a pass with hooks saw: the visits, and the tensors that were asked for."""

    table: Table
    values: dict[Key, Tensor]


def watch(module: nn.Module, call: Call, keep: Iterable[Key] = ()) -> Kept:
    """Run a network once and write down its modules' tensors. keep: of these the first visit's value."""
    table: Table = {}
    values: dict[Key, Tensor] = {}
    told: list[tuple[int, str, tuple[int, ...], int]] = []  # when a module gave or took a tensor, its shape and channel
    wanted, clock = set(keep), iter(range(1 << 60))

    def note(path: str, end: str, value: Any, kind: int | None) -> None:
        when = next(clock)
        parts = {str(k): v for k, v in value.items()} if isinstance(value, dict) else {}
        for part, x in [(None, first_tensor(value)), *((k, first_tensor(v)) for k, v in parts.items())]:
            if x is None or not x.is_floating_point() or not x.dim():
                continue
            if kind is not None and part is None:
                told.append((when, end, tuple(x.shape), kind if x.dim() > 2 else -1))
            key = path, end, part
            visit = Visit(when, tuple(x.shape), None, tuple(parts) if part is None else ())
            table.setdefault(key, []).append(visit)
            if key in wanted and key not in values:
                values[key] = x.detach().clone()

    def before(path: str, kind: int | None) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(path, "input", args[0] if args else next(iter(kwargs.values()), None), kind)

        return hook

    def after(path: str, kind: int | None) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            note(path, "output", out, kind)

        return hook

    handles: list[Any] = []
    try:
        for path, part in module.named_modules():
            if not path:
                continue
            handles.append(part.register_forward_pre_hook(before(path, _kind(part)), with_kwargs=True))
            handles.append(part.register_forward_hook(after(path, _kind(part))))
        with torch.no_grad():
            module(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for visits in table.values():
        visits[:] = [v._replace(channel=_channel(v, told)) for v in visits]
    return Kept(table, values)


def _channel(visit: Visit, told: list[tuple[int, str, tuple[int, ...], int]]) -> int | None:
    """The axis of the channel, told by the last module that gave such a tensor and the first that took one after it."""
    gave = [axis for when, end, shape, axis in told if (end, shape) == ("output", visit.shape) and when <= visit.when]
    took = [axis for when, end, shape, axis in told if (end, shape) == ("input", visit.shape) and when >= visit.when]
    said = {*gave[-1:], *took[:1]}
    return said.pop() if len(said) == 1 else None


def _kind(module: nn.Module) -> int | None:
    """The axis of the channel in a module's output; None where its kind does not say."""
    return 1 if isinstance(module, _FIRST) else -1 if isinstance(module, _LAST) else None


def named(axes: str, visit: Visit, path: str) -> tuple[str, ...]:
    """A user's names of a tensor's axes, checked. ValueError for names that do not fit it."""
    names = tuple(axes.split())
    if len(names) != len(visit.shape) or len(set(names)) < len(names) or "channel" not in names:
        raise ValueError(
            f"axes={axes!r} of {path!r} must name each axis of its tensor once, one of them 'channel'; its shape is "
            f"{visit.shape}"
        )
    return names


def found(path: str, visit: Visit, more: Visit | None) -> tuple[str, ...]:
    """The names of a tensor's axes, told from its shape. more: the same with one more input. ValueError where they
    cannot be told."""
    shape, channel = visit.shape, -1 if len(visit.shape) <= 2 else visit.channel
    like = _NAMES.get((len(shape), channel or 1), "batch channel ...")
    ask = f"name them, sl.Net(module, axes={{{path!r}: {like!r}}})"
    if len(shape) == 1:
        raise ValueError(f"{path!r} gives a tensor of one axis, {shape}: a site has a vector for each input or place")
    names = _NAMES.get((len(shape), channel or 0))
    if names is None:
        raise ValueError(f"which axis of {path!r} is the channel cannot be told from the shape {shape}: {ask}")
    if more is None or len(more.shape) != len(shape):
        raise ValueError(f"which axis of {path!r} is the batch cannot be told (shape {shape}): {ask}")
    grown = [i for i, (a, b) in enumerate(zip(shape, more.shape, strict=True)) if b == a + 1]
    others = [name for name in names.split() if name not in ("batch", "channel")]
    at = len(shape) - 1 if channel == -1 else 1
    if len(grown) != 1 or grown[0] == at:
        raise ValueError(f"no axis of {path!r} (shape {shape}) grows by one with one more input: {ask}")
    left = iter(others)
    return tuple("channel" if i == at else "batch" if i == grown[0] else next(left) for i in range(len(shape)))


def one_more(call: Call) -> Call | None:
    """The same call with its last input once more, before the others; None where the tensors share no axis 0."""
    if not call.size:
        return None
    return call.mapped(lambda t: torch.cat([t[-1:], t]))


def require_apart(path: str, names: tuple[str, ...], alone: Tensor, more: Tensor) -> None:
    """ValueError unless the inputs of a batch leave each other's activations as they are. more: with one input more,
    put before the others."""
    batch = names.index("batch")
    rest = more.narrow(batch, 1, alone.shape[batch])
    off = float((rest.float() - alone.float()).abs().max())
    if off > SAME * max(float(alone.abs().max()), 1e-12):
        raise ValueError(
            f"the inputs of a batch change each other's activations at {path!r} (by {off:.3g}), so axis {batch} is not "
            f"the batch, or the module is in train mode: name the axes, sl.Net(module, axes={{{path!r}: ...}})"
        )
