"""What a block adds to the stream, found by plain hooks: fits of tensors to differences of the stream."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from plain_hooks import FITS, Event, Point, run, same
from torch import Tensor, nn


class Part(NamedTuple):
    """What a module adds to the stream: its output at a point, times a factor."""

    point: Point
    factor: float
    added: Tensor


@dataclass
class Layer:
    """One block: the points of the stream before and after it, the tensors there, and what it consists of.

    shape: how the parts are added: "serial" (the stream has a middle), "parallel", "single" (one part alone), or ""
    (the stream is no such sum). middles, attention, mlp: what has the meaning of resid_mid, attn_out and mlp_out; empty
    where nothing has. matrices: weights of softmax attention, "head pos pos"; attends: the modules that return them.
    w_o, mlp_in: what goes into W_O and into the MLP.
    """

    path: str
    start: Point
    end: Point
    pre: Tensor
    post: Tensor
    events: list[Event]
    shape: str = ""
    middles: list[Tensor] = field(default_factory=list)
    attention: list[Part] = field(default_factory=list)
    mlp: list[Part] = field(default_factory=list)
    matrices: list[Tensor] = field(default_factory=list)
    attends: list[str] = field(default_factory=list)
    w_o: list[Event] = field(default_factory=list)
    mlp_in: list[Event] = field(default_factory=list)

    @property
    def number(self) -> int:
        return int(self.path.rsplit(".", 1)[-1])


class Parts:
    """Finds what the blocks of one model consist of."""

    def __init__(self, module: nn.Module, ids: Tensor):
        self.module, self.ids, self.modules = module, ids, dict(module.named_modules())

    def find(self, layer: Layer) -> None:
        """How the stream after the block is made: fits of tensors to differences of the stream, factors allowed."""
        shape, size = layer.pre.shape, layer.pre.norm()
        flat = [(e, e.tensor.reshape(shape)) for e in layer.events
                if e.tensor.shape[-1] == shape[-1] and e.tensor.numel() == layer.pre.numel()]  # fmt: skip
        outs = [(e.point, x) for e, x in flat if e.point.end == "output"]
        self._weights(layer)
        mixes = self._mixing(layer)
        total = layer.post - layer.pre

        def makes(target: Tensor) -> list[Part]:
            found = []
            for point, x in outs:
                c = float((target * x).sum() / x.square().sum().clamp(min=1e-30))
                if c and bool((target - c * x).norm() <= FITS * target.norm() + 1e-6 * size):
                    found.append(Part(point, c, c * x))
            return found

        if alone := makes(total):
            layer.shape = "single"
            mixing = [part for part in alone if mixes(part.point)]
            layer.attention, layer.mlp = (mixing, []) if mixing else ([], alone)
        for _, t in flat if not alone else []:
            first, second = t - layer.pre, layer.post - t
            if min(first.norm(), second.norm()) < FITS * size or any(same(t, m) for m in layer.middles):
                continue
            a, m = makes(first), makes(second)
            if (m or a) and self._goes_on(layer.pre, t, layer.post, flat) and (
                m or self._goes_on(t, layer.post, layer.post, flat)
            ):
                layer.shape = "serial"
                layer.middles.append(t)
                layer.attention += a
                layer.mlp += m
        if not layer.shape:
            self._parallel(layer, outs, total, mixes)
        if layer.matrices:  # what attention adds comes from the module that has the weights, or from within it
            layer.attention = [part for part in layer.attention if self._of_attention(layer, part.point)]
        self._inputs(layer, flat)

    def _weights(self, layer: Layer) -> None:
        for e in layer.events:
            if e.point.end == "output" and _is_attention(e.tensor):
                layer.attends.append(e.point.path)
                if not any(same(e.tensor[0], m) for m in layer.matrices):
                    layer.matrices.append(e.tensor[0])

    def _of_attention(self, layer: Layer, point: Point) -> bool:
        return any(f"{p.path}.".startswith(f"{a}.") for p in self._leading_to(layer, point) for a in layer.attends)

    def _goes_on(self, t: Tensor, later: Tensor, post: Tensor, flat: list[tuple[Event, Tensor]]) -> bool:
        """Whether the stream goes on from t: a later one is c t, modules' outputs with factors, and a constant."""
        streams = (t, later, post)
        others = [x for e, x in flat if e.point.end == "output" and not any(same(x, y, 1e-4) for y in streams)]
        table = torch.stack([t, *others]).double()
        table = (table - table.mean(-2, keepdim=True)).flatten(1).T
        target = (later - later.mean(-2, keepdim=True)).double().flatten().unsqueeze(1)
        c = torch.linalg.lstsq(table, target, driver="gelsd").solution
        return bool((table @ c - target).norm() <= FITS * target.norm()) and abs(float(c[0])) > 1e-2

    def _parallel(self, layer: Layer, outs: list, total: Tensor, mixes: Callable[[Point], bool]) -> None:
        """Two modules' outputs, of which one looks at other tokens, make what the block adds."""
        flat = [(point, x.flatten().double()) for point, x in outs if bool(x.any())]
        target = total.flatten().double()
        for i, (p, x) in enumerate(flat):
            for q, y in flat[i + 1 :]:
                table = torch.stack([x, y])
                gram = table @ table.T
                if float(torch.linalg.det(gram)) < 1e-6 * float(gram[0, 0] * gram[1, 1]):
                    continue
                c = torch.linalg.solve(gram, table @ target)
                if float((c @ table - target).norm()) > FITS * float(target.norm()) or mixes(p) == mixes(q):
                    continue
                layer.shape = "parallel"
                for point, factor, z in ((p, c[0], x), (q, c[1], y)):
                    part = Part(point, float(factor), (factor * z).float().view(layer.pre.shape))
                    (layer.attention if mixes(point) else layer.mlp).append(part)

    def _mixing(self, layer: Layer) -> Callable[[Point], bool]:
        """Whether a tensor depends on earlier tokens, given the block's input at its own: found by changing one."""
        spot = 2
        noise = torch.randn(layer.pre.shape[-1], generator=torch.Generator().manual_seed(9)) * layer.pre.std()

        def change(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, spot] += noise
            return x

        _, events, _ = run(self.module, self.ids, [(layer.start, change)], record=True)
        before = {e.point: e.tensor.reshape(layer.pre.shape)[:, spot + 1 :] for e in layer.events
                  if e.tensor.numel() == layer.pre.numel()}  # fmt: skip
        after = {e.point: e.tensor.reshape(layer.pre.shape)[:, spot + 1 :] for e in events if e.point in before}
        return lambda point: not same(after[point], before[point], 1e-5)

    def _inputs(self, layer: Layer, flat: list[tuple[Event, Tensor]]) -> None:
        """W_O with its input, and the MLP's input."""

        def inputs(point: Point) -> list[Event]:
            return [e for e in layer.events if e.point[:2] == (point.path, "input") and e.point.call == point.call]

        for part in layer.attention if layer.matrices else []:
            for point in self._leading_to(layer, part.point):
                takes, weight = inputs(point), getattr(self.modules[point.path], "weight", None)
                linear = weight is not None and weight.dim() == 2 and self._within(point.path, layer.attends)
                if linear and len(takes) == 1 and not any(takes[0].point == e.point for e in layer.w_o):
                    layer.w_o.append(takes[0])
        modules = [point for part in layer.mlp for point in self._leading_to(layer, part.point)]
        takes = [e for point in modules if not self.leaf(point.path) for e in inputs(point)]
        whole = [e for e in takes if e.tensor.numel() == layer.pre.numel()]
        new = [e for e in whole if not _known(e.tensor.reshape(layer.pre.shape), layer)]
        layer.mlp_in += new or whole
        for middle in layer.middles:  # also where no module is the whole MLP: what a norm makes of the middle
            for e, x in flat:
                if e.point.end == "input" and self.leaf(e.point.path) and same(x, middle):
                    out = e.point.path, "output", e.point.call
                    made = [y for f, y in flat if (*f.point[:2], f.point.call) == out]
                    layer.mlp_in += [f for f, z in flat if f.point.end == "input" and f.when > e.when
                                     and any(same(y, z) for y in made) and not _known(z, layer)]  # fmt: skip

    def leaf(self, path: str) -> bool:
        return not any(True for _ in self.modules[path].children())

    def _within(self, path: str, parents: list[str]) -> bool:
        return any(f"{path}.".startswith(f"{parent}.") for parent in parents)

    def _leading_to(self, layer: Layer, point: Point) -> list[Point]:
        """The module at a point, those whose output it hands on, and those before a norm (few weights, one input)."""
        outs = [e for e in layer.events if e.point.end == "output"]
        found, waiting = [point], [point]
        while waiting:
            here = waiting.pop()
            mine = [e.tensor for e in outs if e.point == here]
            weight = getattr(self.modules[here.path], "weight", None)
            if self.leaf(here.path) and (weight is None or weight.dim() < 2):
                mine += [e.tensor for e in layer.events
                         if e.point[:2] == (here.path, "input") and e.point.call == here.call]  # fmt: skip
            for e in outs:
                if e.point not in found and any(
                    e.tensor.numel() == x.numel() and same(e.tensor.flatten(), x.flatten()) for x in mine
                ):
                    found.append(e.point)
                    waiting.append(e.point)
        return found


def _known(x: Tensor, layer: Layer) -> bool:
    return any(same(x, y) for y in (layer.pre, layer.post, *layer.middles))


def _is_attention(x: Tensor) -> bool:
    """Weights of softmax attention: "batch head pos pos", none above the diagonal, each row at most 1 in all."""
    if x.dim() != 4 or x.shape[-1] != x.shape[-2] or x.shape[0] != 1:
        return False
    rows = x.sum(-1)
    return bool(x.min() >= 0) and not bool(x.triu(1).any()) and bool(rows.max() <= 1.001) and bool(rows.min() > 0)
