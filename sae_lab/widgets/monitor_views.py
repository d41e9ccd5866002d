"""What a TrainingMonitor says without scripts, and as code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sae_lab.activations.store import Harvested, Rows, Store
from sae_lab.results import Html, counted, tag
from sae_lab.saes import FAMILIES
from sae_lab.saes.base import SparseCoder
from sae_lab.training import checkpoint
from sae_lab.training.config import TrainConfig
from sae_lab.training.control import Change, Control
from sae_lab.training.run import Run

from .coding import name_of
from .static_html import block, figure, table

NAMES = {"loss": "loss", "fvu": "FVU", "fvu_held_out": "FVU, held-out", "l0": "L0", "l0_held_out": "L0, held-out",
         "ce_delta": "ΔCE, held-out", "dead": "dead", "threshold": "threshold", "cosine": "decoder cosine",
         "lr": "learning rate", "coefficient": "coefficient"}  # fmt: skip


@dataclass
class Watched:
    """One training that the monitor watches; ``arguments``: those of its coder at the start."""

    label: str
    family: str
    arguments: dict[str, Any]
    path_of_coder: str | None
    control: Control
    config: TrainConfig
    data: Harvested | Rows
    path: Path | None
    step: int = 0
    sent: int = 0  # how many points the screen has
    over: bool = False


def html_of(status: Mapping[str, Any], curves: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> Html:
    """The state, the last value of each measure and coder, and the changes."""
    at = f": step {status['step']:,} of {status['steps']:,}, {counted(status['tokens'], 'token')}"
    steps = at if status["steps"] else ""
    known = [name for name in NAMES if any(v is not None for line in curves.values() for v in line[name])]
    rows = [[label, *(_last(line, name) for name in known)] for label, line in curves.items()]
    made = [[c["coder"], f"{c['step']:,}", c["what"], *(figure(c[k], ".4g") for k in ("old", "new"))] for c in changes]
    return block(
        tag("p", tag("b", "Training"), f" {status['state']}{steps}"),
        tag("p", status["why"]) if status["why"] else None,
        table(["coder", *(NAMES[name] for name in known)], rows),
        table(["coder", "step", "changed", "from", "to"], made),
    )


def _last(line: Mapping[str, Sequence[float | None]], name: str) -> str:
    beside = line[name.removesuffix("_held_out")]  # of the batch
    for value, batch in zip(reversed(line[name]), reversed(beside), strict=True):
        if value is not None:
            gap = f" (gap {value - batch:+.2g})" if name.endswith("_held_out") and batch is not None else ""
            return f"{figure(100 * value)} %" if name == "dead" else figure(value) + gap
    return "–"


def code_of(watched: list[Watched], opened: Run | None, task: tuple[Any, ...], initial: str) -> str:
    """A call of ``sl.train`` for each coder. watched: the trainings; opened: a run that was complete before; task: what
    ``start`` trains; initial: the fingerprint of its coder's first weights."""
    coder, data, config, path = task
    lines = ["import sae_lab as sl", ""]
    if not watched and coder is None:
        return "\n".join([*lines, "# nothing was trained yet: sl.train(sae, store, config, callbacks=[monitor])"])
    if not watched:
        changes = opened.changes if opened is not None else []
        name, source = _data(data, data)
        made = _coder(type(coder).__name__, arguments_before(coder, changes), None, initial)
        return "\n".join([*lines, *source, *made, _call("sae", name, config, changes, path, "run")])
    several = len(watched) > 1
    known: dict[int, str] = {}
    for number, w in enumerate(watched):
        suffix = f"_{number}" if several else ""
        if id(w.data) not in known:
            known[id(w.data)], source = _data(w.data, data, f"_{len(known)}" if known else "")
            lines += source
        lines += _coder(w.family, w.arguments, w.path_of_coder, "" if several else initial, f"sae{suffix}")
        lines += [_call(f"sae{suffix}", known[id(w.data)], w.config, w.control.changes, w.path, f"run{suffix}")]
        lines += [""] * several
    return "\n".join(lines).rstrip()


def arguments_before(coder: SparseCoder, changes: Sequence[Change]) -> dict[str, Any]:
    """A coder's arguments as they were before these changes."""
    return coder.config | {c["what"]: c["old"] for c in reversed(changes) if c["what"] == coder.sparsity_name}


def _data(data: Any, given: Any, suffix: str = "") -> tuple[str, list[str]]:
    """(the variable of the activations, the lines that make it). data: what training reads; given: what the user
    passed, None if unknown."""
    if not isinstance(data, Store):
        name = name_of(given, "x") if given is not None else "x"
        return name + suffix, [f"# {name}{suffix}: the activations that you trained on"]
    rows = "" if data._rows == int(data._starts[-1]) else f", rows={data._rows}"
    opened = f"sl.Store({str(data.path)!r}{rows})"
    if data.reads != data.writes or len(data.reads) > 1:
        reads, writes = ([f"sl.{site!r}" for site in sites] for sites in (data.reads, data.writes))
        opened += f".view([{', '.join(reads)}], [{', '.join(writes)}])"
    elif len(data.sites) > 1 and data.reads:
        opened += f".at(sl.{data.reads[0]!r})"
    return f"store{suffix}", [f"store{suffix} = {opened}"]


def _coder(family: str, arguments: Mapping[str, Any], path: str | None, initial: str, name: str = "sae") -> list[str]:
    """The lines that make the coder as it was before training. initial: the fingerprint of its first weights, "" if
    unknown."""
    if path is not None:
        return [f"{name} = sl.load({path!r})"]
    call = f"{name} = sl.{family}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
    if family not in FAMILIES or (initial and checkpoint.fingerprint(FAMILIES[family](**arguments)) != initial):
        return [f"# {name}: your {family} as it was before training: {call} does not give its first weights"]
    return [call]


def _call(coder: str, data: str, config: TrainConfig, changes: Sequence[Change], path: Any, name: str) -> str:
    settings = ", ".join(f"{f.name}={getattr(config, f.name)!r}" for f in fields(config)
                         if getattr(config, f.name) != f.default)  # fmt: skip
    call = f"{name} = sl.train({coder}, {data}, sl.TrainConfig({settings})"
    if path is not None:
        call += f", path={str(path)!r}"
    if not changes:
        return call + ")"
    kept = [{k: change[k] for k in ("step", "what", "new")} for change in changes]
    listed = [f"    {change!r}," for change in kept]
    return "\n".join([call + ", changes=[", *listed, "])"])
