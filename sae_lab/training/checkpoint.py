"""A run on disk: an interrupted one goes on to the weights of an unbroken one, bit by bit; a finished one is opened.

A run has an id. Its files hold the id, the config, a fingerprint of the data, and the arguments and the fingerprint of
the coder it began with. A coder that an interrupted run leaves notes the id and its fingerprint in
``meta["left_by"]``: the same call with it, as with a fresh coder, goes on.
"""

import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sae_lab import cache, files
from sae_lab.files import write_tensors as save_file
from sae_lab.processes import differences
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.io import opening
from sae_lab.training.adam import Adam

CHECKPOINT = "checkpoint.safetensors"
EARLIER = "checkpoint-before.safetensors"  # the checkpoint before, in case the last one is damaged
RUN = "run.json"
LEFT = "left_by"  # in a coder's meta
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Found(NamedTuple):
    """A checkpoint."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]


def pack(coder: SparseCoder, adam: Adam, idle: Tensor) -> dict[str, Tensor]:
    """All that changes from step to step, by name."""
    tensors = {f"coder.{n}": t for n, t in coder.state_dict().items()} | {"idle": idle}
    for name, held in adam.held.items():
        tensors |= {f"adam.{key}.{name}": adam.as_parameter(name, t) for key, t in adam.state[held].items()}
    return tensors


def unpack(path: Path, tensors: dict[str, Tensor], coder: SparseCoder, adam: Adam, idle: Tensor) -> None:
    """What ``pack`` packed, back in its places."""
    try:
        coder.load_state_dict({n.removeprefix("coder."): t for n, t in tensors.items() if n.startswith("coder.")})
        idle.copy_(tensors["idle"])
        for name, held in adam.held.items():
            if f"adam.step.{name}" in tensors:
                state = {key: tensors[f"adam.{key}.{name}"].to(held.device) for key in ("step", *_MOMENTS)}
                if wrong := [key for key in _MOMENTS if state[key].shape != adam.parameters[name].shape]:
                    raise KeyError(f"{' and '.join(wrong)} of {name} have another shape than {name}")
                adam.state[held] = state | {key: adam.as_held(name, state[key]).contiguous() for key in _MOMENTS}
    except (RuntimeError, KeyError) as err:
        raise ValueError(f"{path}/{CHECKPOINT} is damaged ({err}). {_remedy(path)}") from err


def write(path: Path, header: dict[str, Any], tensors: Mapping[str, Tensor], kept: str) -> None:
    """Write a checkpoint; the one before is kept until the next. kept: what a full disk leaves, for the error."""
    (path / EARLIER).unlink(missing_ok=True)
    with cache.atomic(path / CHECKPOINT, kept) as temporary:
        whole = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        save_file(whole, temporary, {"run": json.dumps(header)})
        if (path / CHECKPOINT).exists():
            os.replace(path / CHECKPOINT, path / EARLIER)


def read(
    path: Path, identity: dict[str, Any], coder: SparseCoder, take: Callable[[str, Tensor], Tensor]
) -> Found | None:
    """The checkpoint of this run, if there is one. ``take(name, tensor)``: the part of a tensor that is wanted."""
    file = next((path / name for name in (CHECKPOINT, EARLIER) if (path / name).exists()), None)
    if file is None:
        return None
    try:
        found = _read(file, take)
        for key in (*identity, "run", "trained_from", "step", "scale", "history", "changes"):
            found.header[key]
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(
            f"{file} is no checkpoint of sae_lab ({err}); it was not read as anything else. {_remedy(path, file)}"
        ) from err
    _require_same(path, identity, found.header, coder.meta.get(LEFT) == left(coder, found.header["run"]))
    return found


def _read(file: Path, take: Callable[[str, Tensor], Tensor]) -> Found:
    tensors, notes = files.read_tensors(file, take, "MOST_RUN")
    header = files.parse_json(notes["run"], nan=True)
    if not isinstance(header, dict):
        raise ValueError(f"its run is a {type(header).__name__}")
    return Found(header, tensors)


def _remedy(path: Path, file: Path | None = None) -> str:
    """What to do about a checkpoint that cannot be read."""
    if file != path / EARLIER:
        with suppress(OSError, ValueError, LookupError, AttributeError):
            step = _read(path / EARLIER, lambda _, t: t).header["step"]
            return f"Delete it, and the same call goes on from the one before, of step {step} ({EARLIER})"
    return "Delete it to start over"


@contextmanager
def whole_step() -> Iterator[None]:
    """Within, Ctrl-C waits for the end of the block. On a thread, which gets no signals, this does nothing."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    waiting: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *which: waiting.append(which))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        before(*waiting[0])


def finish(path: Path, coder: SparseCoder, header: dict[str, Any]) -> None:
    """Save the coder and its history, and remove the checkpoints."""
    kept = "the coder in memory is trained: save it elsewhere, or make room and make the same call with a new coder"
    with cache.told(path, kept):
        coder.save(path)
        with cache.atomic(path / RUN) as temporary:
            files.write_json(temporary, header | {LEFT: left(coder, header["run"])})
    remove_checkpoints(path)


def remove_checkpoints(path: Path) -> None:
    for name in (CHECKPOINT, EARLIER):
        (path / name).unlink(missing_ok=True)


def finished(
    path: Path, identity: dict[str, Any], coder: SparseCoder
) -> tuple[SparseCoder, dict[str, Any]] | None:
    """(the trained coder, header) of this run, if it is finished."""
    file = path / RUN
    if not file.exists():
        return None
    try:
        header = files.read_json(file, nan=True, most="MOST_RUN")
        run, there, *_ = (header[key] for key in ("run", LEFT, "history", "changes"))
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{file} is no run of sae_lab ({err}): delete it to start over") from err
    _require_same(path, identity, header, left(coder, run) == there)
    done = opening.load(path)
    if left(done, run) != there:
        raise ValueError(f"{path} holds another coder than the one its run.json tells of: pass another path=")
    return done, header


def fingerprint(coder: SparseCoder) -> str:
    """A hash of what training changes step by step; thresholds and scales are fitted afterwards."""
    digest = hashlib.sha256()
    for name, p in sorted(coder.named_parameters()):
        digest.update(name.encode() + p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def arguments(coder: SparseCoder) -> dict[str, Any]:
    """What the coder is built with."""
    return {"family": type(coder).__name__, **coder.config}


def left(coder: SparseCoder, run: str) -> dict[str, Any]:
    """What tells the coder that a run left from any other."""
    return {"run": run, "weights": fingerprint(coder), "coder": arguments(coder)}


def _require_same(path: Path, identity: dict[str, Any], header: dict[str, Any], left_by_it: bool) -> None:
    """ValueError unless the run at ``path`` has this config, this data, and began with this coder or left it; then
    ``identity`` gets the coder that the run began with."""
    if left_by_it:
        identity |= {key: header[key] for key in ("coder", "initial_weights")}
    if isinstance(header["config"], dict):  # runs of before there was a choice
        before = {"precision": "float32", "objective": "reconstruction", "share": 0.5, "downstream": []}
        header = header | {"config": before | header["config"]}
    if wrong := differences(identity, header):
        raise ValueError(f"{path} holds another run; it differs in {wrong}. Pass another path=, or delete it")
