"""Curves of running trainings, of a limited number of points, with measures that the loop does not take."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sae_lab.activations.contexts import spread_contexts, trained_context
from sae_lab.edits.edit import Splice
from sae_lab.lm.model import LM
from sae_lab.saes.base import SparseCoder
from sae_lab.training.run import Event, Metrics

POINTS = 300  # of a curve, at most
MEASURES = ("loss", "fvu", "l0", "dead", "threshold", "cosine", "lr",
            "fvu_held_out", "l0_held_out", "ce_delta", "coefficient")  # fmt: skip
SAMPLE = 256  # rows of W_dec whose nearest others are looked for
SHARE = 0.005  # of the time, that looking for them may take
CE_TOKENS = 1024
CE_SHARE = 0.02  # of the time, that splicing may take


@torch.no_grad()
def decoder_cosine(coder: SparseCoder, rows: int = SAMPLE, seed: int = 0) -> float:
    """Mean over some rows i of W_dec of max_{j≠i} |cos(W_dec[i], W_dec[j])|: near 1 where features repeat each other.
    rows: how many, drawn with ``seed``, the same at every call. NaN for a coder of one feature."""
    W_dec = torch.nn.functional.normalize(coder.W_dec.detach(), dim=1)
    if len(W_dec) < 2:
        return math.nan
    chosen = torch.randperm(len(W_dec), generator=torch.Generator().manual_seed(seed))[:rows].to(W_dec.device)
    cosines = (W_dec[chosen] @ W_dec.T).abs_()
    cosines[torch.arange(len(chosen)), chosen] = 0.0
    return float(cosines.amax(1).mean())


class CrossEntropy:
    """``sl.train(sae, store, config, watch=(lm, text.held_out))``: {"ce_delta": CE with the coder spliced in - CE
    without, nats/token} of about 1,024 tokens, as often as costs ``CE_SHARE`` of the time, its start included.

    Raises ValueError at the start for a model that the coder is not of, and where a coder cannot be spliced in.
    """

    def __init__(self, watch: tuple[Any, Any], snapshot: Callable[[], SparseCoder]) -> None:
        self.began = time.perf_counter()
        if len(watch) != 2 or not isinstance(watch[0], LM):
            raise ValueError(f"watch is a model and held-out text, watch=(lm, text.held_out), got {watch!r}")
        self.lm, text = watch
        coder = snapshot()
        if self.lm.fingerprint() != coder.meta["model_fingerprint"]:
            raise ValueError(f"watch needs the model of the store, {coder.meta['model']}, got {self.lm}: load that one")
        self.texts = [c.ids for c in spread_contexts(self.lm, text, CE_TOKENS, trained_context(coder))]
        self.clean = self._loss()
        before = time.perf_counter()
        self._loss(Splice(coder))  # what cannot be is refused now, and the cost is known
        now = time.perf_counter()
        self.cost, self.spent = now - before, now - self.began

    def __call__(self, snapshot: Callable[[], SparseCoder]) -> Metrics:
        start = time.perf_counter()
        if self.spent + self.cost > CE_SHARE * (start - self.began):
            return {}
        found = {"ce_delta": self._loss(Splice(snapshot())) - self.clean}
        self.cost = time.perf_counter() - start
        self.spent += self.cost
        return found

    def _loss(self, *edits: Splice) -> float:
        parts = [self.lm.loss(part, edits, per_token=True).flatten() for part in self.texts]
        return float(torch.cat(parts).nanmean())


class Curves:
    """A callback for ``sl.train`` or ``sl.sweep`` that keeps a curve of each measure for each coder.

        curves = Curves()
        sl.train(sae, store, config, callbacks=[curves])

    ``lines`` {label: {"step": [...], "loss": [...], ...}}: at most ``POINTS`` points a curve, each the mean of equally
    many steps and standing at the last of them; None where a measure is not known. Measures: those of ``Run.history``,
    some of which are taken now and then; threshold, of families that have one, in units of activations of norm √d_in;
    cosine, ``decoder_cosine``, taken as often as costs ``SHARE`` of the time.
    """

    def __init__(self) -> None:
        self.lines: dict[str, dict[str, list[Any]]] = {}
        self._sums: dict[str, dict[str, list[float]]] = {}  # label: measure: [sum, count] of the last point
        self._due = 0.0  # when the next cosine may be taken

    def __call__(self, event: Event) -> None:
        if event.kind == "start":
            self.lines[event.label] = self.empty()
            for row in event.history:  # of a run that goes on
                self.add(event.label, row, event.config.total_steps)
        elif event.kind == "step":
            self.add(event.label, event.metrics | self.more(event), event.config.total_steps)

    @staticmethod
    def empty() -> dict[str, list[Any]]:
        return {name: [] for name in ("step", *MEASURES)}

    def more(self, event: Event) -> Metrics:
        """Measures that the loop does not take: threshold and cosine."""
        found: Metrics = {}
        output = event.control.output
        threshold = event.coder.training_threshold(output.codes) if output is not None else None
        if isinstance(threshold, Tensor):
            found["threshold"] = float(threshold)
        start = time.perf_counter()
        if start >= self._due:
            found["cosine"] = decoder_cosine(event.coder)
            cost = time.perf_counter() - start
            self._due = start + cost / SHARE
        return found

    def add(self, label: str, row: Mapping[str, Any], steps: int) -> None:
        """One more row of a history."""
        line, stride = self.lines[label], -(-steps // POINTS)
        ends = line["step"]
        if not ends or (row["step"] - 1) // stride != (ends[-1] - 1) // stride:
            self._sums[label] = {}
            for name in line:
                line[name].append(None)
        ends[-1] = row["step"]
        sums = self._sums[label]
        for name in MEASURES:
            value = row.get(name)
            if value is not None and math.isfinite(value):
                total = sums.setdefault(name, [0.0, 0])
                total[0] += value
                total[1] += 1
                line[name][-1] = float(f"{total[0] / total[1]:.5g}")

    def last(self, label: str, points: int) -> list[list[Any]]:
        """The last points of all curves of a coder: [step, loss, ...] each."""
        line = self.lines[label]
        return [list(point) for point in zip(*(values[-points:] for values in line.values()), strict=True)]
