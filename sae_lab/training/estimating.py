"""sl.estimate: what a harvest, a training or an index will take, from a short probe of the real work."""

import copy
import ctypes
import inspect
import json
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lab import cache
from sae_lab.activations import harvesting
from sae_lab.activations.harvesting import harvest
from sae_lab.activations.store import Rows, Store
from sae_lab.arguments import as_annotated
from sae_lab.feature_index import build, chunks, directions
from sae_lab.feature_index.build import index_features
from sae_lab.feature_index.cofiring import DENSE_BYTES, cofiring
from sae_lab.feature_index.labels import Labels
from sae_lab.feature_index.summaries import readability, strongest_first, summarise
from sae_lab.lm.model import LM
from sae_lab.lm.text import Context, Documents, Text, as_text
from sae_lab.lm.tokens import pad
from sae_lab.saes.base import CALIBRATION_ROWS, SPARSE_BELOW, SparseCoder
from sae_lab.saes.families.topk import TopK
from sae_lab.training.loop import CALIBRATION_TOKENS, CHECKPOINT, TrainConfig, Training, one_pass, rows_for, train
from sae_lab.types import Batch, Site, TokenMask, as_sites

PROBE_SECONDS = 5  # passes and steps are tried about so long, but one pass and three steps at least
DOCUMENTS = 100  # a harvest cuts so many into contexts at a time
TRIAL_ROWS = 256  # a batch of steps that only tell how soon a coder without k is sparse: what counts is their number
TRIAL_STEPS = 500
CELLS = 1 << 26  # pairs of features whose co-firing is tried
PAIR_SECONDS = 16e-9  # a product of sparse matrices, by pairs of features that fire on a token: as measured
BYTES_A_CODE = 64  # while calibration sorts codes: value and feature twice over, and five numbers of eight bytes


@dataclass(frozen=True, repr=False)
class Estimate:
    """What a call will take. Made by ``sl.estimate``; prints as a table.

    Attributes:
        what: the function's name.
        minutes: on this machine, as busy as it is now.
        disk: bytes, the most that the call adds at any moment: a checkpoint is there twice while it is replaced.
        ram: bytes above what is in use now, at the peak. Activations that are read from a store count: they stay in
            memory until it is needed for something else.
        vram: the same of CUDA devices; 0 without.
        probe: what was run to tell.
        parts: more figures, by names that say their unit.
    """

    what: str
    minutes: float
    disk: int
    ram: int
    vram: int
    probe: str
    parts: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        rows = {
            "time": f"{_figure(self.minutes)} min" + (f" ({self.minutes / 60:.1f} h)" if self.minutes > 120 else ""),
            "disk": _size(self.disk),
            "RAM": f"{_size(self.ram)} above what is in use now",
            "VRAM": _size(self.vram),
        }
        rows |= {name: _figure(value) for name, value in self.parts.items()}
        width = max(map(len, rows))
        return "\n".join([f"{self.what}: {self.probe}", *(f"  {name:<{width}}  {row}" for name, row in rows.items())])


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.1f}"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{_figure(size / 1e6)} MB"


@as_annotated
def estimate(what: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Estimate:
    """Minutes, disk and memory of a call of ``sl.harvest``, ``sl.train`` or ``sl.index_features``, before it is made.

        sl.estimate(sl.harvest, lm, site, text, tokens=2_000_000)

    The arguments are the call's own. A probe of some seconds does the real work on a small piece, with a copy of the
    coder and in a folder that is deleted, and is scaled up. What is there already (a store, a run, an index, or part of
    one) costs nothing. Meant to hold within a factor of 1.5 while the machine stays as busy as it is.

    Not known beforehand: how many features die, which slows steps down as AuxK revives them (the table says how much);
    and of a family without k, which begins with half of its features active, what L0 it ends with: some seconds of
    training on small batches tell how soon it is sparse, and its L0 then is taken for the rest. Callbacks are left out,
    and ranks: this is for one process.

    Raises ValueError for another function, and else what the call itself would raise before its work begins.
    """
    estimators = {harvest: _harvest, train: _train, index_features: _index}
    found = next((estimator for function, estimator in estimators.items() if function is what), None)
    if found is None:
        names = ", ".join(f"sl.{function.__name__}" for function in estimators)
        raise ValueError(
            f"estimate knows {names}, got {getattr(what, '__name__', repr(what))}: pass one of them and its arguments"
        )
    try:
        call = inspect.signature(what).bind(*args, **kwargs)
    except TypeError as err:
        raise TypeError(f"{what.__name__}() {err}") from None
    call.apply_defaults()
    with torch.random.fork_rng(_cuda_devices()):
        return found(**call.arguments)


def _nothing(what: str, why: str) -> Estimate:
    return Estimate(what, 0.0, 0, 0, 0, why)


# ---------------------------------------------------------------------------------------------- clock and memory


def _cuda_devices() -> range:
    """Those that can be in use: asking more of CUDA before anything else does would take memory there."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def _now() -> float:
    for device in _cuda_devices():
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """(what it returns, seconds)."""
    start = _now()
    result = function(*args, **kwargs)
    return result, _now() - start


@dataclass
class _Peak:
    """Bytes in use before, and the most above them."""

    ram_before: int
    vram_before: int
    ram: int = 0
    vram: int = 0


@contextmanager
def _peak() -> Iterator[_Peak]:
    """The most memory that is in use while the block runs. RAM is looked at every two milliseconds."""
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide what the block takes
    for device in _cuda_devices():
        torch.cuda.reset_peak_memory_stats(device)
    peak = _Peak(_ram(), sum(torch.cuda.memory_allocated(device) for device in _cuda_devices()))
    most = peak.ram_before
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, _ram())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.ram = max(most, _ram()) - peak.ram_before
        peak.vram = sum(torch.cuda.max_memory_allocated(device) for device in _cuda_devices()) - peak.vram_before


def _ram() -> int:
    """Bytes of this process, pages of files left out; where the system does not tell, the most it ever had."""
    try:
        with open("/proc/self/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
        return (resident - shared) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def _no_bars() -> Iterator[None]:
    """A harvest's bar would tell of the probe as if it were the work."""
    import tqdm.auto

    shown = tqdm.auto.tqdm
    tqdm.auto.tqdm = partial(shown, disable=True)  # type: ignore[misc]
    try:
        yield
    finally:
        tqdm.auto.tqdm = shown  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------- harvest


class _Head(Text):
    """The first contexts of a text: a shard of them, or fewer where the model is slow. They are cut, and the model is
    warm, before the first is given out: the clock from ``given_at`` on is the shard's alone."""

    def __init__(self, text: Text, lm: LM, sites: list[Site]):
        vars(self).update(vars(text))
        self.text, self.lm, self.sites = text, lm, sites
        self.cut_tokens, self.given_tokens, self.cut_short = 0, 0, False

    def passes(
        self, tokenizer: Any, prefix: int | None, length: int, pack: bool = False, tokens: int = 0
    ) -> Iterator[list[Context]]:
        start = _now()
        first = self.text[:DOCUMENTS]
        assert isinstance(first, Text)
        ready = list(first.passes(tokenizer, prefix, length, pack, tokens))
        self.cut_seconds, self.cut_tokens = _now() - start, sum(map(_tokens, ready))
        if not ready:  # harvest says what is wrong
            return
        shortest = min(ready, key=_tokens)[:1]
        _, cold = _timed(self.lm.run, pad([c.ids for c in shortest]), self.sites, logits=False)
        _, warm = _timed(self.lm.run, pad([c.ids for c in shortest]), self.sites, logits=False)
        self.warming_seconds = cold + warm
        shard = max(harvesting.SHARD_TOKENS, length)
        enough = max(length, PROBE_SECONDS / warm * _tokens(shortest))
        for contexts in ready:
            if self.given_tokens >= min(shard, enough):
                self.cut_short = self.given_tokens < shard
                return
            self.given_tokens += _tokens(contexts)
            self.given_at = _now()
            yield contexts


def _tokens(contexts: list[Context]) -> int:
    return sum(len(c.ids) for c in contexts)


def _harvest(
    lm: LM, sites: Site | str | Iterable[Site | str], text: Documents, tokens: int,
    path: str | Path | None, context: int, pack: bool, mask: TokenMask | None, coder: SparseCoder | None,
) -> Estimate:  # fmt: skip
    text = as_text(text)
    wanted = as_sites(sites)
    head = _Head(text, lm, wanted)
    with tempfile.TemporaryDirectory() as scratch, _peak() as peak, _no_bars():
        start = _now()
        settings: dict[str, Any] = {"context": context, "pack": pack, "mask": mask, "coder": coder}
        probe = harvest(lm, wanted, head, min(tokens, 1), path=scratch, **settings)
        end = _now()
        manifest_bytes = (probe.path / "manifest.json").stat().st_size
    [shard] = probe.manifest["shards"]
    seconds = (end - head.given_at) / head.given_tokens  # by token read, kept or not
    once = head.given_at - start - head.cut_seconds - head.warming_seconds
    kept = shard["rows"] / head.given_tokens
    shard_rows = kept * max(harvesting.SHARD_TOKENS, context) if head.cut_short else shard["rows"]

    folder = Path(path).expanduser() if path is not None else harvesting._default_path(probe.identity)
    there = _rows_there(harvesting._Harvest(lm, wanted, text, folder, probe.identity, mask, coder))
    in_text = kept * head.cut_tokens * max(1.0, _documents(text) / DOCUMENTS)
    if there >= min(tokens, in_text):
        return _nothing("harvest", f"{folder} holds these tokens")
    rows = min(-((there - tokens) // shard_rows) * shard_rows, in_text - there)  # whole shards
    cut = min(-(-(there + rows) // (kept * head.cut_tokens)) * head.cut_tokens, in_text / kept)
    return Estimate(
        what="harvest",
        minutes=(once + cut * head.cut_seconds / head.cut_tokens + rows / kept * seconds) / 60,
        disk=manifest_bytes + int(rows * shard["bytes"] / shard["rows"]),
        ram=peak.ram,
        vram=peak.vram,
        probe=f"{head.given_tokens:,} tokens harvested in {end - head.given_at:.1f} s",
        parts={
            "tokens to harvest": rows,
            "tokens per second": kept / seconds,
            "bytes per token": shard["bytes"] / shard["rows"],
        },
    )


def _documents(text: Text) -> float:
    """How many there are, as far as is known."""
    try:
        return len(text)
    except TypeError:  # a stream
        return float("inf")


def _rows_there(call: harvesting._Harvest) -> float:
    """Rows of whole shards, by size (to read them takes a while); infinite where the text was read to its end."""
    if not (call.folder / "manifest.json").exists():
        return 0
    manifest = call._open()
    sizes = {file.name: file.stat().st_size for file in call.folder.iterdir()}
    whole = [shard["rows"] for shard in manifest["shards"] if sizes.get(shard["file"]) == shard["bytes"]]
    return float("inf") if manifest["complete"] and len(whole) == len(manifest["shards"]) else sum(whole)


# ---------------------------------------------------------------------------------------------- train


class _Files(NamedTuple):
    """What a training writes: seconds, the most bytes there are at once, and the bytes that stay."""

    seconds: float = 0.0
    most: int = 0
    kept: int = 0


def _train(
    coder: SparseCoder, data: Store | Tensor | Batch, config: TrainConfig | None, path: str | Path | None,
    callbacks: Any, changes: Any,
) -> Estimate:  # fmt: skip
    rows = rows_for(coder, data)
    config = config or one_pass(rows)
    fresh, coder = coder, copy.deepcopy(coder)
    begun = _steps_done(coder, rows, config, Path(path), changes) if path is not None else 0
    if begun is None:
        return _nothing("train", f"{path} holds the finished run")
    steps = config.total_steps - begun
    longer = replace(config, tokens=None, steps=config.total_steps + 100)  # the probe may take more than there are
    with tempfile.TemporaryDirectory() as scratch, _peak() as peak:
        training, preparing = _timed(Training, coder, rows, longer, None, ())
        _, beginning = _timed(training.begin)
        first = [_timed(training.one_step)[1] for _ in range(3)]
        while len(first) < 20 and sum(first) < PROBE_SECONDS:
            first.append(_timed(training.one_step)[1])
        files = _files(training, Path(scratch), config, steps) if path is not None else _Files()
    dense = later = statistics.median(first[1:])  # the very first is slow
    slow = 0
    if "k" not in coder.config:
        slow = _steps_until_sparse(training, fresh, config.total_steps)
        later = statistics.median(_timed(training.one_step)[1] for _ in range(3))
    with_dead = _step_with_dead(training)
    calibrating, ram, vram, l0 = _calibration(training, peak)

    slow = min(steps, max(0, slow - begun))
    stepping = slow * dense + (steps - slow) * later
    seconds = preparing + beginning + stepping + files.seconds + calibrating
    parts = {"tokens per second": steps * config.batch_size / max(stepping, 1e-9), "L0 taken for the end": l0}
    if with_dead is not None:
        late = config.total_steps - max(begun, config.dead_after // config.batch_size)
        parts["minutes if a tenth of the features die"] = (seconds + max(0, late) * max(0.0, with_dead - dense)) / 60
    if path is not None:
        parts["MB that stay on disk"] = files.kept / 1e6
    return Estimate(
        what="train",
        minutes=seconds / 60,
        disk=files.most,
        ram=max(peak.ram, ram) + _mapped(rows),
        vram=max(peak.vram, vram),
        probe=f"{len(first)} of {steps:,} steps taken in {sum(first):.1f} s",
        parts=parts,
    )


def _steps_done(coder: SparseCoder, rows: Store | Rows, config: TrainConfig, path: Path, changes: Any) -> int | None:
    """The step of the checkpoint; None where the run is finished."""
    training = Training(coder, rows, config, path, (), changes=changes)
    if training.finished():
        return None
    found = training._read_checkpoint()
    return found[0]["step"] if found else 0


def _steps_until_sparse(training: Training, fresh: SparseCoder, total: int) -> int:
    """After how many of the steps a step is about as cheap as it gets. A copy of the coder goes through the whole
    schedule in fewer steps, on small batches; ``training`` goes on from its weights."""
    steps, coder = min(total, TRIAL_STEPS), copy.deepcopy(fresh)
    config = replace(training.config, steps=steps, batch_size=TRIAL_ROWS, log_every=1)
    trial = Training(coder, training.rows, config, None, ())
    trial.begin()
    start, counts = time.perf_counter(), []
    while len(counts) < steps and (len(counts) < 10 or time.perf_counter() - start < PROBE_SECONDS):
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
        times.append(_timed(training.one_step)[1])
    return min(times) if "auxk" in training.history[-1] else None


def _files(training: Training, folder: Path, config: TrainConfig, steps: int) -> _Files:
    training.path = folder
    _, checkpointing = _timed(training.keep)
    _, saving = _timed(training.coder.save, folder / "coder")
    training.path = None
    row = len(json.dumps(training.history[-1])) + 2 if training.history else 0
    history = row * (config.total_steps // config.log_every)
    checkpoint = (folder / CHECKPOINT).stat().st_size + history
    kept = sum(file.stat().st_size for file in (folder / "coder").iterdir()) + history
    times = steps // config.checkpoint_every + 1
    # The last two checkpoints are kept, and go when the coder is saved.
    return _Files(times * checkpointing + saving, min(times, 2) * checkpoint + kept, kept)


@torch.no_grad()
def _calibration(training: Training, steps: _Peak) -> tuple[float, int, int, float]:
    """Of what follows the last step: seconds, the peak of RAM and of VRAM above what there was before the first, and
    the L0 this goes for."""
    training._fold()
    coder, rows = training.coder, training.rows
    device = coder.W_dec.device
    whole = min(len(rows), -(-CALIBRATION_TOKENS // 8192) * 8192)
    unseen = min(CALIBRATION_TOKENS, len(rows) - rows.training_rows)
    (_, x), reading = _timed(next, rows.blocks(2048))
    x = x.to(device)
    few = rows.reserved(-(-unseen * len(x) // whole))
    with _peak() as block:
        found, calibrating = _timed(coder.calibrate, [x], None if few is None else few.to(device))
    larger = min(CALIBRATION_ROWS, whole) / len(x)  # the real parts
    held = (unseen + (whole if isinstance(rows, Store) else 0)) * x[0].numel() * 4  # all that is calibrated on
    l0 = float(found["l0"])
    codes = int(whole * l0) * BYTES_A_CODE
    # Gradients and Adam's moments are still there, and so is all that was loaded on the way.
    ram = block.ram_before - steps.ram_before + int(larger * block.ram) + codes
    vram = block.vram_before - steps.vram_before + int(larger * block.vram)
    seconds = (reading + calibrating) * whole / len(x)
    return (seconds, ram, vram + held, l0) if device.type == "cuda" else (seconds, ram + held, vram, l0)


def _mapped(rows: Store | Rows) -> int:
    """Bytes of a store's activations, which stay in memory once they are read."""
    if not isinstance(rows, Store):
        return 0
    return len(rows) * sum(rows._tensor(0, site.key)[0].nbytes for site in {*rows.reads, *rows.writes})


# ---------------------------------------------------------------------------------------------- index


def _index(coder: SparseCoder, lm: LM, store: Store, path: str | Path | None, rebuild: bool = False) -> Estimate:
    _, once = _timed(build._check, coder, lm, store)
    identity = {"coder": coder.fingerprint(), "store": store.fingerprint}
    folder = Path(path) if path is not None else cache.root() / "indexes" / "-".join(identity.values())
    if build._is_done(folder, identity, rebuild):
        return _nothing("index_features", f"{folder} holds it")
    coder = copy.deepcopy(coder).eval()
    first = Store(store.path, min(len(store), build.BLOCK), store.site)
    coder.sparse_codes(first.rows(np.arange(min(len(first), 256)), store.site.key).to(coder.W_dec.device))  # warm
    few, more = _first_features(coder, 2 * directions.RANDOM), _first_features(coder, 2048)
    tried = min(coder.d_sae, max(1, CELLS // coder.d_sae))
    with tempfile.TemporaryDirectory() as scratch, _peak() as peak:
        with coder.reusing(build._rows_at_once(coder)):
            block, coding = _timed(build._block, coder, first, Path(scratch), 0)
        counts = np.bincount(block["features"], minlength=coder.d_sae)
        offsets = np.concatenate([[0], counts.cumsum()])
        (rows, values), placing = _timed(build._place, Path(scratch), 1, offsets)
        stats, counting = _timed(summarise, first, offsets, rows, values)
        _, sorting = _timed(strongest_first, counts, block["values"])
        labels, decoding = _timed(Labels.decode, lm)
        labels.write(Path(scratch) / "labels.json")
        busiest = stats["top_tokens"][np.argsort(-counts)[: few.d_sae]]
        _, judging = _timed(readability, lm, labels, busiest)
        together, meeting = _timed(cofiring, offsets, rows, len(first), tried)
        lens, looking = _timed(directions.lens, few, lm, coder.writes[0] if coder.writes else store.site)
        near, comparing = _timed(directions.neighbours, more)
        words = (Path(scratch) / "labels.json").stat().st_size

    d_sae, blocks = coder.d_sae, len(store) / len(first)
    done = [] if rebuild else list(folder.glob("block-*.safetensors"))
    left = max(0.0, blocks - len(done))
    live = int((counts > 0).sum())
    alive = live if blocks == 1 else d_sae  # more text wakes more of them
    pairs = float((np.bincount(block["rows"]).astype(float) ** 2).sum()) * blocks
    seconds = (
        once + left * coding + blocks * (placing + sorting) + decoding
        + counting * alive / max(1, live) + judging * alive / len(busiest)
        + meeting * d_sae / tried + PAIR_SECONDS * pairs
        + looking * (d_sae + directions.RANDOM) / (few.d_sae + directions.RANDOM)
        + comparing * (d_sae / more.d_sae) ** 2
    )  # fmt: skip
    codes = int(len(block["values"]) * blocks)
    parts = stats | together | near | {name: table for name, table in lens.items() if name != "lens_random"}
    kept = 8 * codes + words + d_sae * (16 + sum(table[0].nbytes for table in parts.values()))  # 16: _build's own
    cosines = d_sae * coder.W_dec.shape[1] * 4 + chunks.CHUNK_BYTES
    met = 9 * codes + min(DENSE_BYTES, 4 * d_sae**2) + min(chunks.CHUNK_BYTES, 20 * d_sae**2)
    on_gpu = coder.W_dec.device.type == "cuda"
    at_once = max(peak.ram, met, cosines * (not on_gpu), 65 * len(store))  # 65: finding the token of every row
    return Estimate(
        what="index_features",
        minutes=seconds / 60,
        disk=kept + int(12 * codes * left / blocks),  # the blocks are there until the end
        ram=min(_mapped(store), build.READ_BYTES) + 8 * codes + at_once,
        vram=max(peak.vram, cosines * on_gpu),
        probe=f"{len(first):,} of {len(store):,} tokens coded in {coding:.1f} s",
        parts={"tokens per second": len(first) / coding, "L0": codes / len(store), "MB that stay on disk": kept / 1e6},
    )


def _first_features(coder: SparseCoder, most: int) -> TopK:
    """A coder of the first features, for what looks at W_dec alone."""
    directions = coder.W_dec.detach()[:most]
    few = TopK(coder.d_in, len(directions), k=1, d_out=directions.shape[1]).to(directions.device)
    few.W_dec.data.copy_(directions)
    few.writes = coder.writes
    return few
