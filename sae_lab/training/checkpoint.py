"""A run on disk: what lets an interrupted one go on to the last bit, and a finished one be opened."""

import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae_lab import cache, files
from sae_lab.files import write_tensors as save_file
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.io import opening

CHECKPOINT = "checkpoint.safetensors"
EARLIER = "checkpoint-before.safetensors"  # the checkpoint before, in case the last one is damaged
RUN = "run.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


# ---- an interrupted run


class Adam(torch.optim.Adam):
    """Fused Adam over a coder's parameters. W_enc's memory lies column by column, and the fused kernel would copy its
    gradient at every step: here it is held as its transpose, which is the same memory."""

    def __init__(self, coder: SparseCoder):
        self.parameters = dict(coder.named_parameters())
        self.held = {n: nn.Parameter(self.as_held(n, p.detach())) for n, p in self.parameters.items()}
        super().__init__(self.held.values(), lr=0.0, fused=True)

    def _turned(self, name: str) -> bool:
        return self.parameters[name].dim() == 2 and not self.parameters[name].is_contiguous()

    def as_held(self, name: str, t: Tensor) -> Tensor:
        """A tensor shaped as the parameter, shaped as it is held."""
        return t.T if self._turned(name) else t

    def as_parameter(self, name: str, t: Tensor) -> Tensor:
        """A tensor shaped as held, shaped as the parameter."""
        return t.T if t.dim() == 2 and self._turned(name) else t

    def update(self, lr: float) -> None:
        """One step, with the gradients that the coder's parameters have."""
        for group in self.param_groups:
            group["lr"] = lr
        for name, p in self.parameters.items():
            held = self.held[name]
            assert held.data_ptr() == p.data_ptr(), f"{name} was given other memory while it is trained"
            held.grad = None if p.grad is None else self.as_held(name, p.grad)
        self.step()


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
    """One file, replaced in one piece; the one that it replaces is kept until the next. kept: for the error where it
    finds no room."""
    (path / EARLIER).unlink(missing_ok=True)
    with cache.atomic(path / CHECKPOINT, kept) as temporary:
        whole = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        save_file(whole, temporary, {"run": json.dumps(header)})
        if (path / CHECKPOINT).exists():
            os.replace(path / CHECKPOINT, path / EARLIER)


def read(
    path: Path, identity: dict[str, Any], take: Callable[[str, Tensor], Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """(header, tensors) of the checkpoint of this run, or None. ``take(name, tensor)``: what is wanted of each."""
    file = next((path / name for name in (CHECKPOINT, EARLIER) if (path / name).exists()), None)
    if file is None:
        return None
    try:
        header, tensors = _read(file, take)
        for key in (*identity, "step", "scale", "history", "left_weights"):
            header[key]
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(
            f"{file} is no checkpoint of sae_lab ({err}); it was not read as anything else. {_remedy(path, file)}"
        ) from err
    _require_same(path, identity, header)
    return header, tensors


def _read(file: Path, take: Callable[[str, Tensor], Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, notes = files.read_tensors(file, take, "MOST_RUN")
    header = files.parse_json(notes["run"], nan=True)
    if not isinstance(header, dict):
        raise ValueError(f"its run is a {type(header).__name__}")
    return {"changes": [], **header}, tensors


def _remedy(path: Path, file: Path | None = None) -> str:
    """What to do about a checkpoint that cannot be read."""
    if file != path / EARLIER:
        with suppress(OSError, ValueError, LookupError, AttributeError):
            header, _ = _read(path / EARLIER, lambda _, t: t)
            return f"Delete it, and the same call goes on from the one before, of step {header['step']} ({EARLIER})"
    return "Delete it to start over"


@contextmanager
def whole_step() -> Iterator[None]:
    """Ctrl-C waits until the block is done. Signals reach the main thread only: elsewhere nothing is to do."""
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


# ---- a finished run


def finish(path: Path, coder: SparseCoder, header: dict[str, Any]) -> None:
    """Save the coder and its history; the checkpoint has served its turn."""
    left = {"left_weights": fingerprint(coder), "left_config": coder.config}
    kept = "the coder in memory is trained: save it elsewhere, or make room and make the same call with a new coder"
    with cache.told(path, kept):
        coder.save(path)
        with cache.atomic(path / RUN) as temporary:
            files.write_json(temporary, header | left)
    remove_checkpoints(path)


def remove_checkpoints(path: Path) -> None:
    """Those of a finished run."""
    for name in (CHECKPOINT, EARLIER):
        (path / name).unlink(missing_ok=True)


def finished(path: Path, identity: dict[str, Any]) -> tuple[SparseCoder, dict[str, Any]] | None:
    """(coder, header) of this run where it is done."""
    file = path / RUN
    if not file.exists():
        return None
    try:
        header = files.read_json(file, nan=True, most="MOST_RUN")
        _, left = header["history"], header["left_weights"]
        header.setdefault("changes", [])
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{file} is no run of sae_lab ({err}): delete it to start over") from err
    _require_same(path, identity, header)
    coder = opening.load(path)
    if fingerprint(coder) != left:
        raise ValueError(f"{path} holds another coder than the one its run.json tells of: pass another path=")
    return coder, header


# ---- is it the same run?


def fingerprint(coder: SparseCoder) -> str:
    """A hash of what training changes step by step; thresholds and scales are fitted afterwards."""
    digest = hashlib.sha256()
    for name, p in sorted(coder.named_parameters()):
        digest.update(name.encode() + p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _require_same(path: Path, identity: dict[str, Any], header: dict[str, Any]) -> None:
    """The run at ``path`` must have this config, data and coder; weights may be the initial or the last ones."""
    known = set()
    if identity["initial_weights"] in (header.get("initial_weights"), header.get("left_weights")):
        known.add("initial_weights")
    if identity["initial_weights"] == header.get("left_weights") and identity["coder"] == _left_coder(header):
        known.add("coder")  # its sparsity was changed while it ran
    if wrong := differences({k: v for k, v in identity.items() if k not in known}, header):
        raise ValueError(f"{path} holds another run; it differs in {wrong}. Pass another path=, or delete it")
    identity |= {key: header[key] for key in known}


def _left_coder(header: dict[str, Any]) -> dict[str, Any]:
    """The coder's family and arguments as the run left them."""
    return {"family": header["coder"]["family"], **(header.get("left_config") or header["coder"])}


def differences(here: dict[str, Any], there: dict[str, Any]) -> str:
    """In words, key by key; empty where all that is here is the same there."""
    found = []
    for key, mine in here.items():
        theirs = there.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            names = [n for n in mine | theirs if mine.get(n) != theirs.get(n)]
            found += [f"{key} {n}: {theirs.get(n)!r} there, {mine.get(n)!r} now" for n in names]
        elif mine != theirs:
            found.append(f"{key}: {theirs!r} there, {mine!r} now")
    return "; ".join(found)
