"""The cost of a call. Each room with long work estimates its ``cost`` from a short trial of that work, for
``sl.estimate``. Here are the type of the answer, the clock, and the meter of memory."""

import ctypes
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
ROOMS: dict[Any, Callable[..., "Cost"]] = {}  # what else ``sl.estimate`` knows: (function, what estimates its cost)
TRIAL_SECONDS = 5  # how long passes and steps are tried, at least one pass and three steps


class Cost(NamedTuple):
    """The cost of a call.

    trial: the work that was tried, in words. seconds: of all the work that is left. disk: bytes, the most that the call
    adds at any moment. ram, vram: bytes above those in use, at the peak. parts: further figures, by name and unit.
    """

    trial: str
    seconds: float = 0.0
    disk: int = 0
    ram: int = 0
    vram: int = 0
    parts: Mapping[str, float] = MappingProxyType({})


def cuda_devices() -> range:
    """The CUDA devices that may be in use. Without CUDA at work there are none: asking it would take its memory."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def now() -> float:
    """Seconds on a clock, read when the GPUs have finished their work."""
    for device in cuda_devices():
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(function: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T, float]:
    """(the function's result, seconds it took)."""
    start = now()
    result = function(*args, **kwargs)
    return result, now() - start


@dataclass
class Peak:
    """Bytes in use before a block of code, and the most above them while it ran."""

    ram_before: int
    vram_before: int
    ram: int = 0
    vram: int = 0


def in_use() -> tuple[int, int]:
    """Bytes in use: (RAM, VRAM of all devices)."""
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide what comes next
    return _ram(), sum(torch.cuda.memory_allocated(device) for device in cuda_devices())


@contextmanager
def peak() -> Iterator[Peak]:
    """Meters the memory that the block takes. RAM is read every two milliseconds."""
    found = Peak(*in_use())
    for device in cuda_devices():
        torch.cuda.reset_peak_memory_stats(device)
    most = found.ram_before
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, _ram())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.ram = max(most, _ram()) - found.ram_before
        found.vram = sum(torch.cuda.max_memory_allocated(device) for device in cuda_devices()) - found.vram_before


def _ram() -> int:
    """Bytes of this process without the pages of files; where the system does not tell, the most it ever had."""
    try:
        with open("/proc/self/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
        return (resident - shared) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
