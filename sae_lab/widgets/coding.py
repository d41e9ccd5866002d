"""The Python behind a view: what "copy as code" gives."""

import sys
from pathlib import Path
from typing import Any

from sae_lab.edits.edit import Edit
from sae_lab.lm import bundled
from sae_lab.lm.model import LM
from sae_lab.saes.base import SparseCoder


def name_of(thing: Any, otherwise: str) -> str:
    """The notebook's variable that holds this object, else ``otherwise``."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()  # type: ignore[attr-defined]
    names = getattr(shell, "user_ns", None) or {}
    return next((n for n, value in names.items() if value is thing and not n.startswith("_")), otherwise)


def lm_line(lm: LM, name: str = "lm") -> str:
    """The line that loads the model again; a comment for a model that was handed over."""
    if lm._server is not None:
        return f"{name} = sl.LM({lm.id!r}, remote={lm._server.asked!r})"
    if lm.id == bundled.HUB_ID:
        return f"{name} = sl.LM()"
    if "/" not in lm.id and not Path(lm.id).exists():  # the class of a model that was handed over
        return f"# {name}: your {lm.id}, {name} = sl.LM(module, tokenizer=...)"
    return f"{name} = sl.LM({lm.id!r})"


def coder_line(coder: SparseCoder, name: str = "sae") -> str:
    """The line that loads the coder again; a comment for a coder that was not saved."""
    if coder.path is None:
        return f"# {name}: your {type(coder).__name__}, not saved yet: {name}.save(path), then {name} = sl.load(path)"
    return f"{name} = sl.load({coder.path!r})"


def header(lm: LM | None = None, **coders: SparseCoder) -> list[str]:
    """The first lines of all code: import, model, coders."""
    lines = ["import sae_lab as sl", ""]
    lines += [lm_line(lm)] if lm is not None else []
    return [*lines, *(coder_line(coder, name) for name, coder in coders.items())]


def expression(edit: Edit, coder: str = "sae") -> str:
    """An edit as the call that makes it: ``sl.Steer(sae, 7, strength=2.0)``."""
    settings = dict(edit._settings())
    first = [repr(settings.pop("feature"))] if "feature" in settings else []
    if callable(settings.get("positions")):
        settings["positions"] = "..."  # a function cannot be written down
    return f"sl.{type(edit).__name__}({', '.join([coder, *first, *(f'{k}={v!r}' for k, v in settings.items())])})"
