"""sl.train: checks that coder and data fit, and starts the loop in one process or, under torchrun, in several."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_lab import cache, processes
from sae_lab.activations.store import Harvested, Rows, Store
from sae_lab.activations.streaming import Stream
from sae_lab.arguments import as_annotated
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.families.batchtopk import BatchTopK
from sae_lab.training.config import TrainConfig, one_pass
from sae_lab.training.loop import Training
from sae_lab.training.process import ALONE
from sae_lab.training.ranks import joined
from sae_lab.training.run import Event, Run
from sae_lab.types import Batch


@as_annotated
def train(
    coder: SparseCoder,
    data: Store | Stream | Tensor | Batch,
    config: TrainConfig | None = None,
    *,
    path: str | Path | None = None,
    callbacks: Iterable[Callable[[Event], Any]] = (),
    changes: Iterable[Mapping[str, Any]] = (),
    watch: tuple[Any, Any] | None = None,
) -> Run:
    """Train a coder in place: ``run = sl.train(sae, store, sl.TrainConfig(tokens=1_000_000), path="runs/mine")``.
    Returns a ``Run``; the coder is then in eval mode.

    Args:
        data: a store or a stream (a transcoder reads the first of its two sites and writes the second, a crosscoder
            takes all), a (tokens, d_in) or (tokens, layers, d_in) tensor, or a ``Batch`` of all tokens with target or
            token ids.
        config: None is one pass over the data; a stream needs one.
        path: a folder for checkpoints and the finished coder. The same call continues an interrupted run, changes
            included, to the weights of an unbroken one, and opens a finished run. One that was changed or stopped is
            opened by ``changes=`` that name what was done. None: nothing is written.
        callbacks: each gets an ``Event`` at every logged step; ``event.control`` pauses the training, changes the
            learning rate or the sparsity between two steps, or stops it early.
        changes: such changes, planned: ``changes=run.changes`` does again what was done in another run.
        watch: ``(lm, text.held_out)``: now and then the coder is spliced into the model, and ``Run.history`` gets
            ce_delta, CE with it - CE without (nats/token), for at most 2 % of the time: a training of less than some
            hundred passes over 1,024 tokens has none. The weights are the same without it.

    Activations are scaled to norm √d_in while training, and the scale is folded into the biases at the end; b_dec
    starts at the geometric median; decoder rows keep unit norm. Afterwards the coder knows its site, token mask, model,
    threshold, ``f_scale`` and dead features.

    ``torchrun --nproc-per-node N script.py`` trains one coder over N processes, up to rounding to the weights of a
    single one. On a stream each has a model of its own, and they share what the models read. Every rank returns the
    same coder; callbacks run on every rank; the first writes files and shows progress. A run may go on over another
    number of ranks. With ``shard="features"`` build the coder on the CPU; a callback's ``coder`` then has this rank's
    features.

    Raises ValueError for a width that does not fit, a precision that the coder's device lacks, a ``path`` that holds
    another run (the difference is named), changes over several processes, and for NaN or Inf in data or loss (step and
    cause are named; the coder keeps its last good weights).
    """
    rows = rows_for(coder, data)
    config = config or one_pass(rows)
    folder, callbacks = None if path is None else Path(path), tuple(callbacks)
    if folder is not None:
        cache.make_folder(folder)
    with (
        nullcontext(ALONE) if processes.started() == 1 else joined(coder, config.shard) as process,
        _read_together(rows, process.size),
        nullcontext() if folder is None or not process.first else cache.sole_writer(folder),
    ):
        process.wait()  # until the first has the folder for itself
        return Training(coder, rows, config, folder, callbacks, process, changes=changes, watch=watch).run()


@contextmanager
def _read_together(rows: Harvested | Rows, ranks: int) -> Iterator[None]:
    """Within, the ranks share the reading of a stream."""
    if ranks == 1 or not isinstance(rows, Stream):
        yield
        return
    with processes.peers() as peers, rows.shared_by(peers):
        yield


@as_annotated
def meta_sae(coder: SparseCoder, d_sae: int, k: int, config: TrainConfig, *, seed: int = 0) -> Run:
    """Train a BatchTopK on the decoder rows of another coder, each row a token: ``sl.meta_sae(sae, d_sae=512, k=4,
    config=sl.TrainConfig(steps=2000))``. Are its features made of fewer parts? Rows that never fired are left out.
    (Bussmann et al. 2024, "Showing SAE Latents Are Not Atomic Using Meta-SAEs".)

    Args: d_sae: parts to look for, fewer than the rows. k: parts of a row.
    """
    rows = coder.directions()
    live = coder.f_scale > 0
    meta = BatchTopK(coder.d_out, d_sae, k, seed=seed).to(rows.device)
    return train(meta, rows[live] if bool(live.any()) else rows, config)


def rows_for(coder: SparseCoder, data: Store | Stream | Tensor | Batch) -> Harvested | Rows:
    """What serves this coder its batches. ValueError where its sites or widths are not those of the data."""
    if not isinstance(data, Harvested):
        rows = Rows(data)
    elif data.writes != data.reads:  # a view that says what is read and written
        rows = data
    else:
        rows = data.view(*coder.choose_sites(data.chosen))
    if coder.input_norm != "none":
        raise ValueError(
            f"this coder normalises each x (input_norm={coder.input_norm!r}), which training does not: train a fresh "
            "one"
        )
    in_shape, out_shape = rows.shapes
    if isinstance(rows, Rows) and coder.transcodes and not rows.has_target:
        raise ValueError("a transcoder needs a target: pass sl.Batch(x, target), or a store of two sites")
    if in_shape == coder.in_shape and out_shape == coder.out_shape:
        return rows
    if len(in_shape) == len(coder.in_shape) == 1 and in_shape != coder.in_shape:
        width = in_shape[0]
        raise ValueError(f"the coder reads d_in={coder.d_in}, the activations have width {width}: make them equal")
    raise ValueError(
        f"the coder reads {coder.in_shape} and writes {coder.out_shape}, the data holds {in_shape} and {out_shape}: "
        "make them equal"
    )
