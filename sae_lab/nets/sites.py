"""Where the sites of a network lie: paths of modules, with the end, the value and the visit that a site names."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any, cast

from torch import nn

from sae_lab.lm import passes
from sae_lab.nets import shapes
from sae_lab.nets.inputs import Call
from sae_lab.nets.shapes import Key
from sae_lab.spelling import near
from sae_lab.types import MODULE, Site


class NetSites:
    """The sites of a module. ``look`` learns the shapes of the tensors that its modules pass on for some inputs;
    ``place`` and the like then speak of these inputs, in the same thread. lock: held by whoever runs the module, which
    a trace of another thread has changed."""

    def __init__(self, module: nn.Module, axes: str | Mapping[str, str] | None, lock: AbstractContextManager[Any]):
        self.module, self._lock = module, lock
        self.paths = [path for path, _ in module.named_modules() if path]
        self._given: Mapping[str, str] = axes if isinstance(axes, Mapping) else {}
        self._for_all = axes if isinstance(axes, str) else None
        for path in self._given:
            self.split(Site(MODULE + path))
        self._names: dict[Key, tuple[str, ...]] = {}
        self._tables: dict[Any, shapes.Table] = {}
        self._now = threading.local()  # a harvest cuts its data into passes in a thread of its own

    def look(self, call: Call) -> None:
        """Speak of these inputs from now on."""
        table = self._tables.get(call.form)
        if table is None:
            if len(self._tables) > 64:
                self._tables.clear()
            table = self._tables[call.form] = self._watch(call).table
        self._now.call, self._now.table = call, table

    def _watch(self, call: Call, keep: Sequence[Key] = ()) -> shapes.Kept:
        with self._lock:
            return shapes.watch(self.module, call, keep)

    @property
    def table(self) -> shapes.Table:
        if not hasattr(self._now, "call"):
            raise ValueError("a network's sites have no known width before it has read inputs: net.read(x, path) first")
        return self._now.table

    def split(self, site: Site) -> tuple[str, str, str | None, int | None]:
        """(path, "input" or "output", the key in a mapping, the visit) that a site names."""
        path, *more = str(site.path).split("@")
        if site.kind != "module":
            raise ValueError(f"a site of a network is a module's path, net.site('blocks.3'), got {site}")
        if path not in self.paths:
            raise ValueError(
                f"this network has no module {path!r}{near(path, self.paths) or ', its modules: '}"
            )
        end, part, visit = "output", None, None
        for word in more:
            if word.isdigit():
                visit = int(word)
            elif word == "input":
                end = "input"
            else:
                part = word
        return path, end, part, visit

    def _seen(self, site: Site) -> tuple[Key, list[shapes.Visit]]:
        path, end, part, _ = self.split(site)
        key = path, end, part
        visits = self.table.get(key)
        if visits is None:
            whole = self.table.get((path, end, None))
            parts = whole[0].parts if whole else ()
            why = f"its values are {', '.join(parts)}" if parts else "it did not run, or it gives something else"
            raise ValueError(f"{site.path!r} gives no tensor of floating-point numbers on these inputs: {why}")
        if len(parts := visits[0].parts) > 1:
            raise ValueError(f"{path!r} gives a mapping of {', '.join(parts)}: name one of them, {path}@{parts[0]}")
        return key, visits

    def names(self, site: Site) -> tuple[str, ...]:
        """The names of a site's axes."""
        key, visits = self._seen(site)
        if key not in self._names:
            self._names[key] = self._found(key, visits)
        names = self._names[key]
        if wrong := [v.shape for v in visits if len(v.shape) != len(names)]:
            raise ValueError(f"{site.path!r} has the axes {' '.join(names)}, and now a tensor of the shape {wrong[0]}")
        return names

    def has_batch(self, site: Site) -> bool:
        """Whether a site's tensor has an axis of the batch, as it must unless the user named its axes."""
        names = self._given.get(self.split(site)[0], self._for_all)
        return names is None or "batch" in names.split()

    def _found(self, key: Key, visits: list[shapes.Visit]) -> tuple[str, ...]:
        path, call = key[0], self._now.call
        if given := self._given.get(path, self._for_all):
            return shapes.named(given, visits[0], path)
        bigger = shapes.one_more(call)
        try:
            more = self._watch(bigger, [key]) if bigger else None
        except (RuntimeError, ValueError, IndexError, TypeError):
            more = None  # it does not run with one input more
        names = shapes.found(path, visits[0], more.table[key][0] if more and key in more.table else None)
        if more:
            shapes.require_apart(path, names, self._watch(call, [key]).values[key], more.values[key])
        return names

    def visits(self, site: Site) -> list[Site]:
        """The site itself, or one for each visit of its module."""
        _, visits = self._seen(site)
        visit = self.split(site)[3]
        if visit is not None and visit >= len(visits):
            raise ValueError(f"{site.path!r} names visit {visit}, and the module runs {len(visits)} times, from 0 on")
        if visit is not None or len(visits) == 1:
            return [site]
        return [Site(f"{MODULE}{site.path}@{i}") for i in range(len(visits))]

    def number(self, site: Site) -> int:
        """The visit that a site names, 0 if none."""
        return self.split(site)[3] or 0

    def _visit(self, site: Site) -> shapes.Visit:
        return self._seen(site)[1][self.number(site)]

    def place(self, site: Site) -> passes.Place:
        """How a site is read and written."""
        path, end, part, _ = self.split(site)
        names = self.names(site)
        others = [i for i, name in enumerate(names) if name not in ("batch", "channel")]
        batch = names.index("batch") if "batch" in names else -1
        return passes.Place(path, end, part=part, axes=(batch, *others, names.index("channel")))

    def shape(self, site: Site) -> tuple[int, ...]:
        """The shape of a site's activations, "batch \\*places channel"; with several visits an axis of them after the
        batch."""
        shape, axes = self._visit(site).shape, cast(tuple[int, ...], self.place(site).axes)
        many, visits = (shape[axes[0]] if axes[0] >= 0 else 1), len(self.visits(site))
        return (many, *((visits,) if visits > 1 else ()), *(shape[a] for a in axes[1:]))

    def size(self, site: Site) -> tuple[int, int]:
        """(inputs in the batch, places of each over all visits that the site means)."""
        shape = self.shape(site)
        return shape[0], prod(shape[1:-1])

    def width(self, site: Site) -> int:
        return self.shape(site)[-1]

    def when(self, site: Site) -> int:
        """When the network computes a site: sites come in the order of this number."""
        return self._visit(site).when

    def told(self, path: str) -> str:
        """The axes of a module's output, with their sizes, or why they are not known."""
        site = Site(MODULE + path)
        try:
            names = self.names(site)
        except ValueError as err:
            return str(err)
        visits = self._seen(site)[1]
        sizes = " ".join(f"{name}={n}" for name, n in zip(names, visits[0].shape, strict=True))
        return sizes + (f", {len(visits)} visits" if len(visits) > 1 else "")
