"""What a transformers model does, seen by plain PyTorch hooks alone: the judge of what sae_lab says about it.

``Plain(module, ids)`` runs the model once and records every tensor that goes into a module or comes out of one. From
these it finds the blocks (the longest list of modules that hand one tensor on), and in each block which tensor is the
stream, what attention and the MLP add to it, W_O and the head. Nothing here knows a module's name, nor sae_lab.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from plain_blocks import Layer, Parts
from plain_hooks import Edits, Event, Point, run, same
from torch import Tensor, nn


class Plain:
    """A model by plain hooks.

    layers: its blocks, [] where no list of modules hands a stream of shape "batch pos d" on, for the reason in
    ``why``. causal: whether no token sees a later one. norm: path of the module whose output the head reads.
    """

    def __init__(self, module: nn.Module, ids: Tensor):
        self.module, self.ids, self.why = module, ids, ""
        self.parts = Parts(module, ids)
        self.modules = self.parts.modules
        self.logits, self.events, self.spans = run(module, ids, record=True)
        self.causal = self._causal()
        self.layers = self._layers()
        for layer in self.layers:
            self.parts.find(layer)

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
