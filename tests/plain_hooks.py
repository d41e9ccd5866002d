"""What a transformers model does, seen by plain PyTorch hooks alone: the judge of what sae_lab says about it.

``Plain(module, ids)`` runs the model once and records every tensor that goes into a module or comes out of one. From
these it finds the blocks (the longest list of modules that hand one tensor on), and in each block which tensor is the
stream, what attention and the MLP add to it, W_O and the head. Nothing here knows a module's name, nor sae_lab.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
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


def run(module: nn.Module, ids: Tensor, edits: Edits = (), record: bool = False) -> tuple[Tensor, list[Event], dict]:
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
        with torch.no_grad():
            logits = module(input_ids=ids, use_cache=False).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
    return logits, events, spans


def same(a: Tensor, b: Tensor, limit: float = SAME) -> bool:
    return a.shape == b.shape and float((a.float() - b.float()).abs().max()) <= limit * max(1e-3, float(b.abs().max()))


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


class Plain:
    """A model by plain hooks.

    layers: its blocks, [] where no list of modules hands a stream of shape "batch pos d" on, for the reason in
    ``why``. causal: whether no token sees a later one. norm: path of the module whose output the head reads.
    """

    def __init__(self, module: nn.Module, ids: Tensor):
        self.module, self.ids, self.why = module, ids, ""
        self.modules = dict(module.named_modules())
        self.logits, self.events, self.spans = run(module, ids, record=True)
        self.causal = self._causal()
        self.layers = self._layers()
        for layer in self.layers:
            self._parts(layer)

    # ---- the model

    def _causal(self) -> bool:
        half = self.ids.shape[1] // 2
        other = self.ids.clone()
        other[:, half:] = (other[:, half:] + 7) % 200 + 4
        return same(run(self.module, other)[0][:, :half], self.logits[:, :half], 1e-4)

    def changed(self, *edits: tuple[Point, Callable[[Tensor], Tensor]]) -> Tensor:
        return run(self.module, self.ids, list(edits))[0]

    def greedy(self, new: int, edits: Edits = ()) -> tuple[list[int], int]:
        """The likeliest tokens, each by a pass over all before it; and how many of them are sure: from the first one
        on whose lead is within rounding, another order of summing may say otherwise."""
        ids, sure, said = self.ids, True, []
        count = 0
        for _ in range(new):
            last = run(self.module, ids, list(edits))[0][0, -1]
            best = last.topk(2).values
            sure = sure and bool(best[0] - best[1] > 1e-3 * max(1.0, float(last.abs().max())))
            count += sure
            said.append(int(last.argmax()))
            ids = torch.cat([ids, last.argmax().view(1, 1)], 1)
        return said, count

    # ---- blocks and the stream

    def _layers(self) -> list[Layer]:
        chains = [chain for path, part in self.modules.items() if isinstance(part, nn.ModuleList)
                  for chain in self._chains([f"{path}.{i}" for i in range(len(part))])]  # fmt: skip
        if not chains:
            self.why = "no list of modules in which one hands its output to the next"
            return []
        took = {id(chain): self.spans[chain[-1][0]][0][1] - self.spans[chain[0][0]][0][0] for chain in chains}
        best = max(chains, key=lambda chain: (len(chain), took[id(chain)]))
        if any(len(self.spans[path]) > 1 for path, _, _ in best):
            self.why = "its blocks run more than once in a pass"
        elif any(len(pairs) > 1 for _, pairs, _ in best[:-1]):
            self.why = "its blocks hand on several streams"
        elif best[0][2].shape[:-1] != self.ids.shape:
            self.why = f"its stream has the shape {tuple(best[0][2].shape)} for {tuple(self.ids.shape)} tokens"
        return [] if self.why else [self._layer(best, i) for i in range(len(best))]

    def _at(self, path: str, end: str) -> list[Event]:
        return [e for e in self.events if e.point.path == path and e.point.end == end and e.point.call == 0]

    def _chains(self, paths: list[str]) -> Iterator[list[tuple[str, list[tuple[Point, Point]], Tensor]]]:
        """Runs of modules of which each hands a tensor that it has changed on to the next: (path, its pairs of points
        (out of it, into the next), the tensor)."""
        called = [path for path in paths if self.spans.get(path)]
        chain: list = []
        for here, then in pairwise(called):
            inputs = [e.tensor for e in self._at(here, "input")]
            pairs = {}
            for out in self._at(here, "output"):
                for into in self._at(then, "input"):
                    if out.tensor.dim() < 3 or any(same(out.tensor, x) for x in inputs):
                        continue  # handed through unchanged: positions, the embeddings
                    handed = out.tensor.shape == into.tensor.shape and torch.equal(out.tensor, into.tensor)
                    if handed and not any(torch.equal(out.tensor, kept.tensor) for kept, _ in pairs.values()):
                        pairs[out.point] = (out, into)
            widest = max((out.tensor.shape[-1] for out, _ in pairs.values()), default=0)
            pairs = {k: v for k, v in pairs.items() if v[0].tensor.shape[-1] == widest}  # what routers hand on is less
            if pairs:
                chain.append((here, [(out.point, into.point) for out, into in pairs.values()],
                              next(iter(pairs.values()))[0].tensor))  # fmt: skip
            if chain and not pairs:
                yield [*chain, (here, [], chain[-1][2])]
                chain = []
        if chain:
            yield [*chain, (called[-1], [], chain[-1][2])]

    def _layer(self, chain: list, i: int) -> Layer:
        path = chain[i][0]
        out, into = (chain[i] if i + 1 < len(chain) else chain[i - 1])[1][0]
        into = chain[i - 1][1][0][1] if i else into
        start, end = into._replace(path=path), out._replace(path=path)
        found = {e.point: e.tensor for e in self.events}
        begin, stop = self.spans[path][0]
        inside = [e for e in self.events if begin < e.when < stop and e.point.path != path]
        return Layer(path, start, end, found[start], found[end], inside)

    # ---- what a block adds

    def _parts(self, layer: Layer) -> None:
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
        takes = [e for point in modules if not self._leaf(point.path) for e in inputs(point)]
        whole = [e for e in takes if e.tensor.numel() == layer.pre.numel()]
        new = [e for e in whole if not _known(e.tensor.reshape(layer.pre.shape), layer)]
        layer.mlp_in += new or whole
        for middle in layer.middles if not whole else []:  # no module is the whole MLP: what a norm makes of the middle
            for e, x in flat:
                if e.point.end == "input" and self._leaf(e.point.path) and same(x, middle):
                    out = e.point.path, "output", e.point.call
                    made = [y for f, y in flat if (*f.point[:2], f.point.call) == out]
                    layer.mlp_in += [f for f, z in flat if f.point.end == "input" and f.when > e.when
                                     and any(same(y, z) for y in made) and not _known(z, layer)]  # fmt: skip

    def _leaf(self, path: str) -> bool:
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
            if self._leaf(here.path) and (weight is None or weight.dim() < 2):
                mine += [e.tensor for e in layer.events
                         if e.point[:2] == (here.path, "input") and e.point.call == here.call]  # fmt: skip
            for e in outs:
                if e.point not in found and any(
                    e.tensor.numel() == x.numel() and same(e.tensor.flatten(), x.flatten()) for x in mine
                ):
                    found.append(e.point)
                    waiting.append(e.point)
        return found

    # ---- the way out

    def head(self) -> tuple[str, str | None] | None:
        """(path of the head, path of the norm whose output it reads, None where there is none). None: the head reads
        something else than the stream of the last block or its norm."""
        last = self.module.get_output_embeddings()
        path = next((p for p, part in self.modules.items() if part is last), None)
        inputs = self._at(path, "input") if path else []
        if not inputs or not self.layers:
            return None
        x, stream = inputs[-1].tensor, self.layers[-1].post
        if x.numel() == stream.numel() and _along(x.flatten(), stream.flatten()):
            return path, None
        for e in reversed(self.events):
            if e.point.end == "output" and e.tensor.numel() == x.numel() and _along(e.tensor.flatten(), x.flatten()):
                takes = [f.tensor for f in self.events if f.point[:2] == (e.point.path, "input")
                         and f.point.call == e.point.call]  # fmt: skip
                if any(same(f, stream) for f in takes if f.shape == stream.shape) and self._is_norm(e.point.path):
                    return path, e.point.path
        return None

    @torch.no_grad()
    def _is_norm(self, path: str) -> bool:
        """Whether a module keeps directions but for one linear map: norm(3x) and norm(-x) lie along norm(x)."""
        norm, x = self.modules[path], self.layers[-1].post[0]
        zero = norm(torch.zeros_like(x))
        plain = (norm(x) - zero).flatten()
        return all(_along(c * (norm(c * x) - zero).flatten(), plain, 1e-4) for c in (3.0, -1.0))

    @torch.no_grad()
    def divides(self, path: str) -> bool:
        """Whether it divides by the size of what it gets, as a norm does, and a linear map does not."""
        norm, x = self.modules[path], self.layers[-1].post[0]
        return same(norm(3 * x), norm(x), 1e-2)

    @torch.no_grad()
    def lens(self, x: Tensor) -> Tensor | None:
        """Logits of directions in the stream, each in a unit of its own: head(norm(x)) - head(norm(0)). None where the
        head does not read the stream through a norm alone."""
        if (way := self.head()) is None:
            return None
        head, norm = self.modules[way[0]], self.modules[way[1]] if way[1] else None
        x = norm(x) - norm(torch.zeros_like(x)) if norm else x
        return (head(x) - head(torch.zeros_like(x))).float()


def _along(a: Tensor, b: Tensor, limit: float = 1e-9) -> bool:
    return bool(torch.cosine_similarity(a.double(), b.double(), dim=0) > 1 - limit)


def _known(x: Tensor, layer: Layer) -> bool:
    return any(same(x, y) for y in (layer.pre, layer.post, *layer.middles))


def _is_attention(x: Tensor) -> bool:
    """Weights of softmax attention: "batch head pos pos", none above the diagonal, each row at most 1 in all."""
    if x.dim() != 4 or x.shape[-1] != x.shape[-2] or x.shape[0] != 1:
        return False
    rows = x.sum(-1)
    return bool(x.min() >= 0) and not bool(x.triu(1).any()) and bool(rows.max() <= 1.001) and bool(rows.min() > 0)
