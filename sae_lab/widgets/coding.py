"""The Python behind a view: what "copy as code" gives."""

import copy
import sys
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from sae_lab import cache
from sae_lab.edits.edit import Edit
from sae_lab.edits.vector import Vector
from sae_lab.lm import bundled
from sae_lab.lm.model import LM
from sae_lab.lm.network import Network
from sae_lab.saes.base import SparseCoder


def name_of(thing: Any, otherwise: str) -> str:
    """The notebook's variable that holds this object, else ``otherwise``."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()  # type: ignore[attr-defined]
    names = getattr(shell, "user_ns", None) or {}
    return next((n for n, value in names.items() if value is thing and not n.startswith("_")), otherwise)


def lm_line(lm: Network, name: str = "lm") -> str:
    """The line that loads the model again; a comment for a model that was handed over."""
    if not isinstance(lm, LM):
        return f"# {name}: your {lm.id}, {name} = sl.Net(module)"
    if lm._server is not None:
        return f"{name} = sl.LM({lm.id!r}, remote={lm._server.asked!r})"
    if lm.id == bundled.HUB_ID:
        return f"{name} = sl.LM()"
    if "/" not in lm.id and not Path(lm.id).exists():  # the class of a model that was handed over
        return f"# {name}: your {lm.id}, {name} = sl.LM(module, tokenizer=...)"
    return f"{name} = sl.LM({lm.id!r})"


def coder_line(coder: SparseCoder | Vector, name: str = "sae") -> str:
    """The line that loads the coder again, as it is now: one that is not saved so is written into the cache. A vector
    stands in the line."""
    if isinstance(coder, Vector):
        return f"{name} = sl.Vector.from_dict({coder.to_dict()!r})"
    path = coder.path
    if not coder.is_saved:
        folder = cache.root() / "coders" / coder.fingerprint()
        path = str(folder if (folder / "config.json").exists() else copy.copy(coder).save(folder))
    return f"{name} = sl.load({path!r})"


def header(lm: LM | None = None, **coders: SparseCoder | Vector) -> list[str]:
    """The first lines of all code: import, model, coders."""
    lines = ["import sae_lab as sl", ""]
    lines += [lm_line(lm)] if lm is not None else []
    return [*lines, *(coder_line(coder, name) for name, coder in coders.items())]


def named(edits: Iterable[Edit]) -> dict[int, tuple[str, Any]]:
    """The coders and vectors of edits, by id: (the name each has in code, the thing)."""
    things = {id(thing): thing for edit in edits for thing in edit.subjects}
    counts = {kind: count() for kind in ("sae", "vector")}
    found = {}
    for key, thing in things.items():
        kind = "vector" if isinstance(thing, Vector) else "sae"
        number = next(counts[kind])
        found[key] = name_of(thing, f"{kind}_{number}" if number else kind), thing
    return found


def index_lines(index: Any) -> list[str]:
    """The lines that open a feature index again, import, model and coder included."""
    name, lm, sae = name_of(index, "index"), name_of(index.lm, "lm"), name_of(index.coder, "sae")
    store, path = name_of(index.store, "store"), repr(str(index.path))
    opened = f"{store} = sl.Store({str(index.store.path)!r}, {len(index.store)}, {index.site.key!r})"
    lines = ["import sae_lab as sl", "", lm_line(index.lm, lm)]
    if index.coder is None:
        return [*lines, opened, f"{name} = sl.FeatureIndex({path}, {store}, {lm})"]
    return [*lines, coder_line(index.coder, sae), opened, f"{name} = sl.index_features({sae}, {lm}, {store}, {path})"]


def expression(edit: Edit, names: Mapping[int, tuple[str, Any]] | None = None) -> str:
    """An edit as the call that makes it: ``sl.Steer(sae, 7, strength=2.0)``. names: as ``named`` gives them."""
    names = named([edit]) if names is None else names
    coder, settings = names[id(edit.subjects[0])][0], dict(edit._settings())
    first = [repr(settings.pop("feature"))] if "feature" in settings else []
    if callable(settings.get("positions")):
        settings["positions"] = "..."  # a function cannot be written down
    told = {name: repr(value) for name, value in settings.items()}
    if edit.condition is not None:
        name, what = names[id(edit.subjects[-1])][0], edit.condition.what
        what = f"({name}, {edit.condition.feature})" if isinstance(what, list | tuple) else what
        what = name if isinstance(what, Vector) else what
        told["when"] = f"({what}, {edit.condition.level!r}, {edit.condition.scope!r})"
    return f"sl.{type(edit).__name__}({', '.join([coder, *first, *(f'{k}={v}' for k, v in told.items())])})"
