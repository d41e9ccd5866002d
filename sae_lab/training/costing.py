"""What a training costs, for ``sl.estimate``: a few of its steps are taken by a copy of the coder."""

import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lab import costs
from sae_lab.activations.store import Harvested, Rows, Store
from sae_lab.activations.streaming import Stream
from sae_lab.costs import TRIAL_SECONDS, Cost, timed
from sae_lab.results import counted
from sae_lab.saes.base import SPARSE_BELOW, SparseCoder, calibration_cost
from sae_lab.training.checkpoint import CHECKPOINT
from sae_lab.training.config import TrainConfig, one_pass
from sae_lab.training.loop import CALIBRATION_TOKENS, Training
from sae_lab.training.start import rows_for
from sae_lab.types import Batch

SMALL_BATCH = 256  # rows of a batch in steps that only tell after how many a coder without k is sparse
SMALL_STEPS = 500
DEAD = "minutes if a tenth of the features die"


def cost(
    coder: SparseCoder, data: Store | Stream | Tensor | Batch, config: TrainConfig | None, path: str | Path | None,
    callbacks: Any, changes: Iterable[Mapping[str, Any]], watch: Any, ranks: int = 1,
) -> Cost:  # fmt: skip
    """What ``train`` will take with these arguments; of several ranks, without the time of their exchange. Tried: up to
    20 steps, a checkpoint and a part of the calibration; of a coder without k, a short training on small batches; of a
    stream, a few passes of the model."""
    rows = rows_for(coder, data)
    config = config or one_pass(rows)
    if config.objective != "reconstruction":
        raise ValueError(
            f"estimate knows objective='reconstruction', got {config.objective!r}: time a few real steps, "
            "sl.TrainConfig(steps=3)"
        )
    fresh, coder = coder, copy.deepcopy(coder)
    begun = 0
    if path is not None:
        there = Training(coder, rows, config, Path(path), (), changes=changes)
        if there.finished():
            return Cost(f"{path} holds the finished run")
        begun = found.header["step"] if (found := there.interrupted()) else 0
    steps, batch_size = config.total_steps - begun, config.batch_size
    if ranks > 1:
        config = _of_one_rank(config, ranks, watch)
    streamed, shared, known, copied = None, False, 0, isinstance(rows, Harvested)
    if isinstance(rows, Stream):
        shared = rows.lm.device == coder.W_dec.device
        streamed, sample, known = rows.cost(steps * batch_size, ranks)
        rows = Rows(sample)
    longer = replace(config, tokens=None, steps=config.total_steps + 100)  # the trial may take more than there are
    with tempfile.TemporaryDirectory() as scratch, costs.peak() as peak:
        training, preparing = timed(Training, coder, rows, longer, None, ())
        _, beginning = timed(training.begin)
        first = [timed(training.one_step)[1] for _ in range(3)]
        while len(first) < 20 and sum(first) < TRIAL_SECONDS:
            first.append(timed(training.one_step)[1])
        writing, disk, kept = _files(training, Path(scratch), config, steps) if path is not None else (0.0, 0, 0)
    dense = later = statistics.median(first[1:])  # the very first is slow
    slow = 0
    if "k" not in coder.config:
        slow = _steps_until_sparse(training, fresh, config.total_steps)
        later = statistics.median(timed(training.one_step)[1] for _ in range(3))
    with_dead = _step_with_dead(training)
    calibrating = _calibration(training, peak, known or len(rows), copied)

    slow = min(steps, max(0, slow - begun))
    stepping = slow * dense + (steps - slow) * later
    ram, trial = max(peak.ram, calibrating.ram), f"{len(first)} of {counted(steps, 'step')} taken in {sum(first):.1f} s"
    if isinstance(rows, Store):
        ram += len(rows) * rows.row_bytes
    if streamed is not None:
        stepping = stepping + streamed.seconds if shared else max(stepping, streamed.seconds)
        ram, disk, trial = ram + streamed.ram, disk + streamed.disk, f"{streamed.trial}, {trial}"
    seconds = preparing + beginning + stepping + writing + calibrating.seconds
    parts = {"tokens per second": steps * batch_size / max(stepping, 1e-9)}
    if ranks > 1:
        parts |= _exchanged(coder, rows, batch_size if streamed is not None else 0, ranks)
    if streamed is not None:
        parts["minutes of the model"] = streamed.seconds / 60
    parts["L0 taken for the end"] = calibrating.parts["L0"]
    if with_dead is not None:
        late = config.total_steps - max(begun, config.dead_after // batch_size)
        parts[DEAD] = (seconds + max(0, late) * max(0.0, with_dead - dense)) / 60
    if path is not None:
        parts["MB that stay on disk"] = kept / 1e6
    return Cost(
        trial,
        seconds=seconds,
        disk=disk,
        ram=ram,
        vram=max(peak.vram, calibrating.vram) + (streamed.vram if streamed else 0),
        parts=parts,
    )


def _of_one_rank(config: TrainConfig, ranks: int, watch: Any) -> TrainConfig:
    """The steps of one of several ranks. ValueError for what they refuse, or what is not known beforehand."""
    if config.shard != "batch":
        raise ValueError(
            f"estimate with ranks={ranks} knows shard='batch', got {config.shard!r}: time a few real steps"
        )
    if config.target_l0 is not None or watch is not None:
        raise ValueError(f"target_l0 and watch need one process, got ranks={ranks}: leave them out, or ranks=1")
    if config.batch_size % ranks:
        more = -(-config.batch_size // ranks) * ranks
        raise ValueError(
            f"batch_size must be a multiple of the {ranks} ranks that share it, got {config.batch_size}: try {more}"
        )
    return replace(config, tokens=None, steps=config.total_steps, batch_size=config.batch_size // ranks)


def _exchanged(coder: SparseCoder, rows: Harvested | Rows, streamed: int, ranks: int) -> dict[str, float]:
    """Megabytes that each rank sends in a step, where sums and broadcasts go round in a ring: gradients, once as they
    are summed and once as the sum goes to all; of a stream (``streamed`` rows a batch) rows, in half precision."""
    gradients = 2 * (ranks - 1) / ranks * sum(p.numel() for p in coder.parameters()) * 4
    width = sum(math.prod(shape) for shape in set(rows.shapes))
    return {"MB that a rank sends in a step": (gradients + streamed * width * 2 * (ranks - 1) / ranks) / 1e6}


def _files(training: Training, folder: Path, config: TrainConfig, steps: int) -> tuple[float, int, int]:
    """What a training writes: (seconds, the most bytes at any moment, the bytes that stay)."""
    training.path = folder
    _, checkpointing = timed(training.keep)
    _, saving = timed(training.coder.save, folder / "coder")
    training.path = None
    row = len(json.dumps(training.history[-1])) + 2 if training.history else 0
    history = row * (config.total_steps // config.log_every)
    checkpoint = (folder / CHECKPOINT).stat().st_size + history
    kept = sum(file.stat().st_size for file in (folder / "coder").iterdir()) + history
    times = steps // config.checkpoint_every + 1
    # The last two checkpoints are kept, and go when the coder is saved.
    return times * checkpointing + saving, min(times, 2) * checkpoint + kept, kept


def _steps_until_sparse(training: Training, fresh: SparseCoder, total: int) -> int:
    """After how many of the steps a step is about as cheap as it gets. A copy of the coder goes through the whole
    schedule in fewer steps, on small batches; ``training`` goes on from its weights."""
    steps, coder = min(total, SMALL_STEPS), copy.deepcopy(fresh)
    config = replace(training.config, steps=steps, batch_size=SMALL_BATCH, log_every=1)
    trial = Training(coder, training.rows, config, None, ())
    trial.begin()
    start, counts = time.perf_counter(), []
    while len(counts) < steps and (len(counts) < 10 or time.perf_counter() - start < TRIAL_SECONDS):
        trial.one_step()
        counts.append(trial.history[-1]["l0"])
    training.coder.load_state_dict(coder.state_dict())
    training.adam.load_state_dict(trial.adam.state_dict())  # the old momentum would lead back
    bound = max(SPARSE_BELOW * coder.d_sae, 1.5 * counts[-1])  # where the sparse path begins, or little is gained
    return next(i for i, l0 in enumerate(counts) if l0 <= bound) * total // steps


def _step_with_dead(training: Training) -> float | None:
    """Seconds of a step while a tenth of the features are dead; None where nothing revives them."""
    training.config = replace(training.config, log_every=1)
    times = []
    for _ in range(2):
        training.idle[::10] = training.config.dead_after + 1
        times.append(timed(training.one_step)[1])
    return min(times) if "auxk" in training.history[-1] else None


@torch.no_grad()
def _calibration(training: Training, steps: costs.Peak, known: int, copied: bool) -> Cost:
    """What follows the last step: memory above what was in use before the first. known: rows, training's and others.
    copied: they are calibrated on as copies."""
    training.fold()
    coder, rows = training.coder, training.rows
    device = coder.W_dec.device
    whole = min(known, -(-CALIBRATION_TOKENS // 8192) * 8192)
    unseen = min(CALIBRATION_TOKENS, known * (len(rows) - (rows.training_rows or 0)) // len(rows))
    block, reading = timed(lambda: next(rows.blocks(2048)))
    x = block[1].to(device)
    few = rows.reserved(-(-unseen * len(x) // whole))
    ram, vram = costs.in_use()  # gradients and Adam's moments are still there, and all that was loaded on the way
    found = calibration_cost(coder, x, None if few is None else few.to(device), whole)
    held = (unseen + whole * copied) * x[0].numel() * 4  # all that is calibrated on
    on_gpu = device.type == "cuda"
    return found._replace(
        seconds=found.seconds + reading * whole / len(x),
        ram=found.ram + ram - steps.ram_before + held * (not on_gpu),
        vram=found.vram + vram - steps.vram_before + held * on_gpu,
    )
