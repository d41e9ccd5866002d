"""Net: any torch module, read and changed through nnsight traces, with a language model's coders, edits and stores."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.arguments import as_annotated
from sae_lab.lm import passes
from sae_lab.lm.network import Network, listed_edits
from sae_lab.nets.inputs import Call, InputBatch, Inputs, Item, in_batches, positional, stacked
from sae_lab.nets.sites import NetSites
from sae_lab.types import MODULE, Edits, Site, TokenBatch, TokenMask, Write


class Net(Network):
    """Any torch module: ``net = sl.Net(module)``, then ``net.read(x, "blocks.3")``, ``net.output(x, edits=[...])``,
    ``sl.harvest(net, "blocks.3", data)``.

    A site is a module's path, which means the tensor that the module gives (of a tuple, its first):

    - ``"blocks.3@input"``: the tensor that it takes;
    - ``"encoder@hidden"``: one value of the mapping that it gives;
    - ``"cell@2"``: of a module that runs several times in a pass, its third visit alone. Without a number, all visits
      are read and edited, one after another, as places.

    A coder reads the channel axis. The other axes of an input's tensor are its places, numbered from 0 in the tensor's
    order (height before width): they stand where a text has token positions, in ``positions=`` of edits too.

    Args:
        axes: names of a site's axes where they cannot be told from the tensor, "batch channel height width" for all
            sites or by path. One is "channel"; a site without "batch" has one input in each pass (a graph).
        name: of the network, in stores and coders. None: its class.

    Inputs have the batch on axis 0. The module runs in eval mode, without gradients. ValueError where the channel or
    the batch of a site cannot be told, and where the inputs of a batch change each other's activations.
    """

    IN_WORDS = "a Net"

    @as_annotated
    def __init__(self, module: nn.Module, axes: str | Mapping[str, str] | None = None, name: str | None = None):
        import nnsight

        self._module = module.eval()
        self._nn = nnsight.NNsight(module)
        self._lock = threading.RLock()
        self.id = name or type(module).__name__
        self._sites = NetSites(module, axes, self._lock)

    def __repr__(self) -> str:
        return f"Net({self.id!r}, {len(self._sites.paths)} modules, device='{self.device}')"

    @as_annotated
    def site(self, path: Site | str) -> Site:
        """The site of a module's path, as coders and stores name it. ValueError, with paths near it, for a path that is
        not there."""
        site = path if isinstance(path, Site) else Site(MODULE + path.removeprefix(MODULE))
        self._sites.split(site)
        return site

    @as_annotated
    def sites(self, x: Any) -> dict[str, str]:
        """What can be read when the network runs on x: the axes of every module's output, by path."""
        self._batch(x)
        ran = [path for path, end, part in self._sites.table if end == "output" and part is None]
        return {path: self._sites.told(path) for path in ran}

    @as_annotated
    def width(self, site: Site | str) -> int:
        """The number of channels at a site. ValueError before the network has read any inputs."""
        return self._sites.width(self.site(site))

    @as_annotated
    def mask(self, keep: Iterable[int] | None = None, places: int | None = None) -> TokenMask:
        """The mask of a harvest: all places; with ``keep``, the places of these numbers alone, of ``places`` in all
        (``net.mask(keep=[0], places=197)``: the class token of a vision transformer)."""
        if keep is None:
            return TokenMask((), skip_first=False)
        kept = set(keep)
        if places is None or not kept or not kept <= set(range(places)):
            raise ValueError(f"keep names places from 0 to places - 1, got keep={sorted(kept)} and places={places}")
        return TokenMask(tuple(i for i in range(places) if i not in kept), skip_first=False)

    def _batch(self, x: Any, at: Site | None = None, step: int = 0) -> InputBatch:
        """The inputs of a call as a batch, whose places are those of a site. step: the number of the pass in a loop of
        the user's, as ``steps=`` of edits names it."""
        if isinstance(x, list):
            x = tuple(stacked([Call.of(item, self.accepts) for item in x]))
            call = Call(*x)
        else:
            call = Call.of(x, self.accepts)
        call = call.to(self.device)
        if not call.tensors:
            raise ValueError(f"inputs are a tensor, a list of them, a tuple or a mapping of arguments, got {x!r:.60}")
        self._sites.look(call)
        none = torch.zeros(1, 1, dtype=torch.long)
        return self._placed(InputBatch(none, none == 0, none, step=step, args=call.args, kwargs=call.kwargs), at)

    def joined(self, items: Sequence[Call], sites: Sequence[Site]) -> InputBatch:
        """Items of a data set as the batch of a pass, with the places of the sites."""
        call = (stacked(items) if self.batched(sites) else items[0]).to(self.device)
        self._sites.look(call)
        none = torch.zeros(1, 1, dtype=torch.long)
        return self._placed(InputBatch(none, none == 0, none, args=call.args, kwargs=call.kwargs), sites[0])

    def in_batches(self, data: Inputs, sites: Sequence[Site]) -> Iterator[list[Item]]:
        """The items of a data set, those of one shape together as far as a pass has room for their places."""
        batched = self.batched(sites)
        many = ((number, call, self.places(call, sites)) for number, call in enumerate(data))
        return in_batches(Item(list(range(n)), [number] * n, None, call, batched) for number, call, n in many)

    def _passes(self, data: Any, site: Site) -> Iterator[InputBatch]:
        if data is None:
            raise ValueError("a network has no text of its own to measure on: pass text=, the data that it reads")
        for items in self.in_batches(Inputs(data, self.accepts), [site]):
            yield self.joined([item.call for item in items], [site])

    def batched(self, sites: Sequence[Site]) -> bool:
        """Whether a pass reads several items: the axes of a site may have been named without a batch."""
        return all(self._sites.has_batch(site) for site in sites)

    def grid(self, item: Call, site: Site) -> list[int]:
        """The sizes of the axes along which an item's places lie."""
        self.joined([item], [site])
        return list(self._sites.shape(site)[1:-1])

    def places(self, item: Call, sites: Sequence[Site]) -> int:
        """The number of places of an item. ValueError for sites with unequal numbers."""
        self.joined([item], sites)
        many = {site: self._sites.size(site)[1] for site in sites}
        if len(set(many.values())) > 1:
            said = ", ".join(f"{n} at {site.path}" for site, n in many.items())
            raise ValueError(f"sites of one store must have as many places, got {said}: harvest them one by one")
        return many[sites[0]]

    @property
    def accepts(self) -> int:
        """How many positional arguments the module takes."""
        return positional(self._module)

    def _placed(self, batch: InputBatch, at: Site | None) -> InputBatch:
        """The same inputs, with the places of a site."""
        many, places = (1, 1) if at is None else self._sites.size(at)
        ids = torch.arange(places).expand(many, places)
        return replace(batch, ids=ids, positions=ids, mask=torch.ones_like(ids, dtype=torch.bool))

    @as_annotated
    def read(self, x: Any, at: Site | str | Iterable[Site | str], edits: Edits = (), step: int = 0) -> Any:
        """``net.read(x, "conv1")``: activations at a site, float32, "batch height width channel" or whatever its places
        are; at several sites, a dict by site."""
        one = isinstance(at, Site | str)
        wanted = [self.site(s) for s in ([at] if one else cast(Iterable[Any], at))]
        batch = self._batch(x, step=step)
        acts, _ = self.run(batch, wanted, self._writes(edits, batch), logits=False)
        shaped = {s: acts[s].reshape(self._sites.shape(s)) for s in wanted}
        return shaped[wanted[0]] if one else shaped

    @as_annotated
    def output(self, x: Any, edits: Edits = (), step: int = 0) -> Any:
        """What the module returns, with edits inside. step: the number of this pass in a loop of yours (a diffusion
        step, a step of an episode), for edits that name ``steps=``."""
        batch = self._batch(x, step=step)
        return self.run(batch, writes=self._writes(edits, batch))[1]

    @as_annotated
    def run(
        self,
        batch: TokenBatch,
        reads: Iterable[Site] = (),
        writes: Iterable[Write] = (),
        logits: bool | Callable[..., Any] = True,
        after: Callable[..., Any] | Mapping[Site, Callable[..., Any]] | None = None,
        form: Any = None,
        expected: int = 0,
    ) -> tuple[dict[Site, Any], Any]:
        """One pass, as ``LM.run``: (activations "batch place channel" at ``reads``, after the writes there; what the
        module returns, or what the function ``logits`` makes of it, or None)."""
        import nnsight

        batch, reads = cast(InputBatch, batch), list(reads)
        call = Call(batch.args, batch.kwargs)
        self._sites.look(call)
        parts = {s: self._sites.visits(s) for s in reads}
        split = [visit for visits in parts.values() for visit in visits]
        writes = [part for w in writes for part in self._by_visit(w)]
        steps = []
        for site, step in self._in_order(split, writes, passes.whole):
            change = step.change and partial(_at_places, fn=step.change, tokens=self._tokens(batch, site))
            steps.append((self._sites.number(site), passes.plain(step._replace(change=change))))
        nn, tokens, found, held = self._nn, batch.plain(), cast(dict[str, Any], {}), {}
        with self._lock, torch.no_grad(), nn.trace(*call.args, **call.kwargs) as tracer:
            found = nnsight.save({})
            _through(tracer, nn, steps, tokens, found, held)
            if logits is False:
                tracer.stop()
            else:
                found[""] = nn.output
        out = found.get("")
        acts: dict[Site, Any] = {}
        for s, visits in parts.items():
            x = torch.cat([found[v.key] for v in visits], dim=1)
            fn: Any = after.get(s) if isinstance(after, Mapping) else after
            acts[s] = x if fn is None else fn(x, self._placed(batch, s).plain())
        return acts, logits(out, tokens) if callable(logits) else out

    def _by_visit(self, write: Write) -> list[Write]:
        """A write at all visits of a module as one at each."""
        visits = self._sites.visits(write.site)
        if len(visits) == 1:
            return [write]
        others = {s: self._sites.visits(s) for s in (*write.reads, *write.before)}
        if wrong := [s for s, there in others.items() if len(there) not in (1, len(visits))]:
            raise ValueError(
                f"an edit reads {wrong[0]} and writes {write.site}, modules that run {len(others[wrong[0]])} and "
                f"{len(visits)} times: name the visit, as in {write.site.key}@0"
            )

        def pick(sites: Iterable[Site], i: int) -> tuple[Site, ...]:
            return tuple(others[s][i % len(others[s])] for s in sites)

        return [Write(v, write.fn, pick(write.reads, i), pick(write.before, i)) for i, v in enumerate(visits)]

    def _tokens(self, batch: InputBatch, site: Site) -> SimpleNamespace:
        """The places of one visit as the tokens that an edit gets; of a visited module, the visit is the step."""
        many, places = self._sites.size(site)
        visit = self._sites.number(site)
        ids = (torch.arange(places) + visit * places).expand(many, places)
        tokens = self._placed(batch, site).plain()
        tokens.ids = tokens.positions = ids
        tokens.step = visit or batch.step
        return tokens

    def _writes(self, edits: Iterable[Any], batch: TokenBatch, new: int = 0) -> list[Write]:
        """The writes of a list of edits, those of each site with its own places."""
        batch = cast(InputBatch, batch)
        found: list[Write] = []
        by_site: dict[Any, list[Any]] = {}
        for edit in listed_edits(edits):
            by_site.setdefault(getattr(edit, "write_site", None), []).append(edit)
        for site, some in by_site.items():
            here = batch if site is None else self._placed(batch, self.site(site))
            found += super()._writes(some, here)
        return found

    @as_annotated
    def gradient(
        self, batch: TokenBatch, site: Site, metric: Callable[..., Tensor], x: Float[Tensor, "batch place d"]
    ) -> Float[Tensor, "batch place d"]:
        """The gradient of ``metric(output, places)``, summed over the batch, with respect to a site's activations, at
        x."""
        import nnsight

        batch = cast(InputBatch, batch)
        self._sites.look(Call(batch.args, batch.kwargs))
        if len(self._sites.visits(site)) > 1:
            raise ValueError(f"{site} is visited several times: take the gradient of one, as at {site.key}@0")
        place, number = passes.plain(self._sites.place(site)), self._sites.number(site)
        nn, tokens, x, found = self._nn, batch.plain(), x.detach(), cast(Tensor, None)
        with self._lock, torch.enable_grad(), nn.trace(*batch.args, **batch.kwargs) as tracer:
            there = _replaced(tracer, nn, place, number, x)
            found = nnsight.save(_slope(nn.output, tokens, there, metric))
        return found

    def lens(self, directions: Tensor, at: Site | str, of: Any = None) -> None:
        """None: a network that is no language model has no logit lens."""


def _at_places(x: Tensor, _: Any, *read: Tensor, fn: Callable[..., Tensor], tokens: SimpleNamespace) -> Tensor:
    """A write's function with the places of its own site in place of tokens."""
    return fn(x, tokens, *read)


def _through(tracer: Any, root: Any, steps: list[tuple[int, Any]], tokens: Any, found: Any, held: Any) -> None:
    """``passes.through``, with the tracer at the visit of each step."""
    for visit, some in groupby(steps, key=lambda step: step[0]):
        for _ in tracer.iter[visit]:
            passes.through(root, [step for _, step in some], tokens, found, held)


def _replaced(tracer: Any, root: Any, place: Any, visit: int, x: Tensor) -> Tensor:
    """x, put at a site, as a leaf whose gradient is asked for."""
    for _ in tracer.iter[visit]:
        here = passes.read(root, place, 0)
        there = x.to(here).requires_grad_(True)
        passes.write(root, place, there.clone())
    return there


def _slope(out: Any, tokens: Any, there: Tensor, metric: Callable[..., Tensor]) -> Tensor:
    return torch.autograd.grad(metric(out, tokens).sum(), [there])[0].float()
