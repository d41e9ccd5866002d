"""Several processes (ranks) that work together. torchrun starts them, or whatever else sets its environment (RANK,
WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or makes a process group of torch.distributed before it calls us.

    torchrun --nproc-per-node 4 script.py

``Peers`` exchange texts and tensors in main memory. How ranks share the steps of a training is in ``training.ranks``.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

MEETING = timedelta(minutes=10)  # how long ranks wait for each other at the start
ROUND = timedelta(hours=1)  # and between two exchanges. A rank that dies ends it at once, a machine that vanishes not
HOW = "start the script with torchrun --nproc-per-node N script.py"
OTHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # srun and mpirun set them, and no RANK
log = logging.getLogger(__name__)
_joins = count()


def started() -> int:
    """The number of processes that work together: 1 without an engine that started several. ValueError for an
    environment that speaks of several without saying how they meet."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    if "RANK" not in os.environ:
        _warn_of_others()
        return 1
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdigit() or int(said) < 1:
        raise ValueError(f"WORLD_SIZE must be the number of processes, got {said!r}: {HOW}, or unset RANK")
    if (size := int(said)) == 1:
        return 1
    if not dist.is_available():
        raise ValueError(
            f"WORLD_SIZE={size} speaks of {size} processes, and this PyTorch has no torch.distributed: install one "
            "that has it, or unset RANK and start one process"
        )
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise ValueError(
            f"WORLD_SIZE={size} speaks of {size} processes, and {' and '.join(missing)} must say where they meet: "
            f"{HOW}, or unset RANK to work alone"
        )
    return size


@cache
def _warn_of_others() -> None:
    for name in OTHERS:
        if (said := os.environ.get(name, "1")) != "1":
            log.warning("%s=%s: several processes run this script, and none knows of the others: %s", name, said, HOW)


def own_gpu() -> str:
    """The CUDA device of this process: each of several takes its own, as far as there are enough."""
    if started() == 1:
        return "cuda"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def join(backend: str) -> None:
    """Make the process group of all ranks. ValueError if they do not meet."""
    size, place = started(), f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=MEETING))  # type: ignore[attr-defined]
        # torchrun's store outlives a group and a restart, and would tell the next where the last one was.
        prefix = f"sae_lab-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{next(_joins)}"
        store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as err:
        why = str(err).partition("\n")[0]
        raise ValueError(
            f"{size} processes were to meet at {place} within {MEETING}, and did not ({why}): "
            f"{HOW}, or unset RANK to work alone"
        ) from err


@contextmanager
def joined(backend: str = "gloo") -> Iterator[None]:
    """Within, there is a process group: the one that the script made, else one of ours."""
    made = not dist.is_initialized()
    if made:
        join(backend)
    yield
    if made:  # after a failure the engine ends all ranks; waiting for the others here could take for ever
        dist.destroy_process_group()


@contextmanager
def peers(patience: timedelta = ROUND) -> Iterator["Peers"]:
    """All ranks, to work together within the block. Every rank must come here. patience: how long one waits for what
    another has to tell."""
    with joined():
        group: Any = dist.new_group(backend="gloo", timeout=patience)
        yield Peers(dist.get_rank(), dist.get_world_size(), group)
        dist.destroy_process_group(group)


class Peers:
    """The ranks. rank: of this process. What they exchange goes through main memory, apart from all else."""

    def __init__(self, rank: int, size: int, group: Any):
        self.rank, self.size, self._group = rank, size, group

    @property
    def first(self) -> bool:
        """Whether this process writes what all share, and shows progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        self.tell({})

    def tell(self, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each rank says, in their order."""
        return [json.loads(text) for text in texts(json.dumps(facts, default=float), group=self._group)]

    def by_first(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``work`` gives on the first rank; the others wait for it. Its error is raised on all."""
        said: dict[str, Any] = {}
        failure = None
        if self.first:
            try:
                said = {"done": work()}
            except (ValueError, OSError) as err:
                said, failure = {"error": str(err)}, err
        said = json.loads(self._bytes(json.dumps(said).encode(), 0))
        raise_for([said], failure)
        return said["done"]

    def sent(self, t: Tensor, rank: int) -> Tensor:
        """One rank's tensor, of which the others know nothing but the dtype of ``t``. On the CPU."""
        t = t.detach().cpu().contiguous()
        shape = torch.zeros(8, dtype=torch.long)
        if self.rank == rank:
            shape[: t.dim() + 1] = torch.tensor([t.dim(), *t.shape])
        dist.broadcast(shape, rank, self._group)
        if self.rank != rank:
            t = torch.empty(shape[1 : 1 + int(shape[0])].tolist(), dtype=t.dtype)
        if t.numel():
            dist.broadcast(t.view(-1).view(torch.uint8), rank, self._group)
        return t

    def shared(self, made: tuple[dict[str, np.ndarray], dict[str, Any]] | Exception | None, rank: int) -> Any:
        """(arrays, facts) that one rank has made, on all of them; the others pass None. Its error is raised on all."""
        said: dict[str, Any] = {}
        whole = b""
        if isinstance(made, Exception):
            said = {"error": str(made)}
        elif made is not None:
            arrays, facts = made
            said = {"arrays": [(name, a.dtype.str, a.shape) for name, a in arrays.items()], "facts": facts}
            whole = b"".join(a.tobytes() for a in arrays.values())
        said = json.loads(self._bytes(json.dumps(said).encode(), rank))
        if "error" in said:
            raise made if isinstance(made, Exception) else failed(rank, said["error"])
        whole, found, at = self._bytes(whole, rank), {}, 0
        for name, dtype, shape in said["arrays"]:
            found[name] = np.frombuffer(whole, dtype, math.prod(shape), at).reshape(shape)
            at += found[name].nbytes
        return found, said["facts"]

    def _bytes(self, raw: bytes, rank: int) -> bytes:
        return self.sent(torch.frombuffer(bytearray(raw or b" "), dtype=torch.uint8), rank).numpy().tobytes()

    def require_same(self, facts: Mapping[str, Any], doing: str) -> None:
        """ValueError on every rank if one of them has other facts. doing: what they do with them."""
        require_same(self.tell(facts), doing)


def raise_for(told: list[dict[str, Any]], failure: BaseException | None) -> None:
    """Raise if any rank told of an error. failure: this rank's own."""
    if failure is not None:
        raise failure
    for rank, said in enumerate(told):
        if "error" in said:
            raise failed(rank, said["error"])


def failed(rank: int, error: str) -> ValueError:
    """What the other ranks raise."""
    return ValueError(f"rank {rank} failed, and all ranks stop: {error}")


def require_same(told: list[dict[str, Any]], doing: str) -> None:
    """ValueError unless all ranks told the same: those that differ would wait for each other for ever."""
    first, *others = told
    for rank, other in enumerate(others, 1):
        if wrong := differences(other, first):
            raise ValueError(
                f"rank {rank} and rank 0 {doing} with different settings: {wrong}. Every rank must run the same "
                "script, with fixed seeds and folders that all of them see"
            )


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """The entries of ``here`` that ``there`` does not have alike, in words; "" if all are alike."""
    found = []
    for key, mine in here.items():
        theirs = there.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            names = [n for n in mine | theirs if mine.get(n) != theirs.get(n)]
            found += [f"{key} {n}: {theirs.get(n)!r} there, {mine.get(n)!r} now" for n in names]
        elif mine != theirs:
            found.append(f"{key}: {theirs!r} there, {mine!r} now")
    return "; ".join(found)


def gather(t: Tensor, group: Any = None) -> Tensor:
    """Every rank's tensor of the same shape, stacked."""
    flat = t.detach().reshape(-1)
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, flat, group)
    return torch.stack(everyone).view(len(everyone), *t.shape)


def texts(text: str, device: torch.device | str = "cpu", group: Any = None) -> list[str]:
    """Every rank's text. device: where the group's tensors are."""
    raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    lengths = gather(torch.tensor(len(raw), device=device), group).tolist()
    padded = gather(F.pad(raw, (0, max(lengths) - len(raw))), group).cpu()
    return [row[:n].numpy().tobytes().decode() for row, n in zip(padded, lengths, strict=True)]
