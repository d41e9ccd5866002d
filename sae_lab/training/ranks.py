"""One coder over several processes (ranks), which torchrun starts: each holds rows of every batch, or features.

    torchrun --nproc-per-node 4 script.py      # script.py calls sl.train

Results are those of one process up to rounding where the loss is a mean over rows. PAnneal's weight and Switch's
balance go by each rank's rows.
"""

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from sae_lab import processes
from sae_lab.activations.store import Harvested, Rows
from sae_lab.activations.streaming import Stream
from sae_lab.saes import kernels
from sae_lab.saes.base import SparseCoder
from sae_lab.training.process import Process
from sae_lab.types import Batch, Codes, Output

# Families whose features meet only in x_hat, in the choice of the largest and in a penalty that is a sum over features.
SHARDED = ("TopK", "BatchTopK", "Transcoder", "SkipTranscoder", "L1", "SqrtL1", "SmoothL0", "ProLU", "JumpReLU")
FEATURE_AXIS = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "threshold": 0, "f_scale": 0, "idle": 0}
SLACK = 1.25  # a rank first offers this multiple of its even share of the largest entries: it seldom has more


class Ranks(Process, kernels.Selector):
    """One of several processes that train a coder together."""

    def require(self, coder: SparseCoder, batch_size: int) -> None:
        if self.feature_shares > 1 and type(coder).__name__ not in SHARDED:
            family = type(coder).__name__
            raise ValueError(f"shard='features' can divide {', '.join(SHARDED)}, got {family}: use shard='batch'")
        shared = {"batch": ("batch_size", batch_size, "share it"), "features": ("d_sae", coder.d_sae, "hold features")}
        name, number, what = shared[self.shard]
        if number % (n := self.size):
            more = -(-number // n) * n
            raise ValueError(f"{name} must be a multiple of the {n} ranks that {what}, got {number}: try {more}")

    def over_rows(self, t: Tensor) -> Tensor:
        return _sum(t) if self.row_shares > 1 else t

    def over_features(self, t: Tensor) -> Tensor:
        return _sum(t) if self.feature_shares > 1 else t

    def share_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        """Average gradients over ranks with different rows; over ranks with different features, sum those of tensors
        that every rank holds whole."""
        for name, p in parameters.items():
            if self.shard == "features":
                if self._axis(name, p) is not None:
                    continue
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if p.grad is not None:
                _in_place(dist.all_reduce, p.grad)
                p.grad.div_(self.row_shares)

    def batch(self, rows: Harvested | Rows, step: int, batch_size: int, seed: int) -> Batch:
        """This rank's rows of a batch: the shares of all ranks are the rows of a batch of one process."""
        if isinstance(rows, Stream):
            return rows.share(step, batch_size, seed, self.rank % self.row_shares, self.row_shares)
        return rows.batch(step * self.row_shares + self.rank % self.row_shares, batch_size // self.row_shares, seed)

    @contextmanager
    def choosing(self, coder: SparseCoder) -> Iterator[None]:
        """While open, a coder that every rank holds whole chooses among the rows of all ranks."""
        if self.row_shares > 1:
            coder.select = self
        try:
            yield
        finally:
            if self.row_shares > 1:
                del coder.select

    def of_batch(self, pre: Tensor, k: float) -> Codes:
        n = round(k * len(pre) * self.row_shares)
        offered = min(pre.numel(), int(SLACK * n / self.size) + 64)
        while True:
            mine = kernels.top_of_batch(pre, offered)
            chosen, certain = self._chosen(mine.values[None], n)
            if offered == pre.numel() or bool(certain):
                return _keep(mine, chosen[0])
            offered = min(pre.numel(), 2 * offered)

    def per_row(self, pre: Tensor, k: int) -> Codes:
        if self.feature_shares == 1:
            return super().per_row(pre, k)
        return self._largest(kernels.top_per_row(pre, min(k, pre.shape[1])), k)

    def among(self, pre: Tensor, features: Tensor, k: int) -> Codes | None:
        if self.feature_shares == 1:
            return super().among(pre, features, k)
        k = min(k, int(_sum(torch.tensor(len(features), device=pre.device))))
        mine = super().among(pre, features, k) or kernels.above(pre, torch.inf)
        return self._largest(mine, k) if k else None

    def everywhere(self, values: Tensor) -> Tensor:
        if self.feature_shares == 1:
            return values
        most = int(self.gather(torch.tensor(len(values), device=values.device)).max())
        everyone = self.gather(F.pad(values, (0, most - len(values)))).flatten()
        return everyone[everyone > 0]

    def _largest(self, mine: Codes, k: int) -> Codes:
        """Of the k largest entries of each row over all ranks, those of this one. mine: its own largest, as many in
        each row, k if it has them."""
        rows = len(mine.offsets) - 1
        values = mine.values.reshape(rows, len(mine.values) // rows)
        padded = F.pad(values, (0, k - values.shape[1]), value=-torch.inf)
        return _keep(mine, self._chosen(padded, k)[0][:, : values.shape[1]].reshape(-1))

    def _chosen(self, values: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """(which of this rank's values are among the n largest of their row over all ranks; whether that is certain: a
        rank whose every value was chosen may hold back others). Of equal values the lower rank's are chosen."""
        offered = self.gather(values)  # rank, row, value
        least = offered.transpose(0, 1).flatten(1).topk(n).values.amin(1)[:, None]
        above, equal = ~(offered <= least), offered == least  # NaN counts as large, and shows in the loss
        left = n - above.sum((0, 2)) - equal[: self.rank].sum((0, 2))
        here = equal[self.rank]
        certain = ~above.all(2).any() | least.isnan().any()
        return above[self.rank] | (here & (here.cumsum(1) <= left[:, None])), certain

    def gather(self, t: Tensor) -> Tensor:
        """Every rank's tensor of the same shape, stacked."""
        return processes.gather(t)

    def texts(self, text: str) -> list[str]:
        """Every rank's text."""
        return processes.texts(text, self.device)

    def from_first(self, facts: dict[str, Any]) -> dict[str, Any]:
        return json.loads(self.texts(json.dumps(facts))[0])

    def require_same(self, facts: dict[str, Any]) -> None:
        """A coder is as random as its seed, and ranks that differ would wait for each other for ever."""
        processes.require_same([json.loads(text) for text in self.texts(json.dumps(facts))], "train")

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        for t in tensors:
            _in_place(lambda flat: dist.broadcast(flat, 0), t.detach())

    def copy_first_state(self, coder: SparseCoder) -> None:
        self.copy_first(t for name, t in coder.state_dict().items() if self._axis(name, t) is None)

    def wait(self) -> None:
        dist.barrier()

    @contextmanager
    def stopping(self) -> Iterator[Callable[[], bool]]:
        """Ctrl-C at any rank is to stop all of them after the same step."""
        came: list[int] = []
        main = threading.current_thread() is threading.main_thread()  # signals reach no other
        before = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if main else None
        try:
            yield lambda: bool(_sum(torch.tensor(len(came), device=self.device)))
        finally:
            if main:
                signal.signal(signal.SIGINT, before)

    def _axis(self, name: str, t: Tensor) -> int | None:
        """The axis along which a tensor is divided; None: every rank holds it whole."""
        return FEATURE_AXIS.get(name.rsplit(".", 1)[-1]) if self.feature_shares > 1 and t.dim() else None

    def part(self, name: str, t: Tensor) -> Tensor:
        """This rank's features of a tensor."""
        axis = self._axis(name, t)
        return t if axis is None else t.chunk(self.size, axis)[self.rank].clone()

    def whole(self, name: str, t: Tensor) -> Tensor:
        """All ranks' features of a tensor, on the CPU: no device ever holds more than another rank's part."""
        axis = self._axis(name, t)
        if axis is None:
            return t
        parts = []
        for rank in range(self.size):
            part = t.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(part, rank)
            parts.append(part.cpu())
        return torch.cat(parts, axis)

    def own_part(self, coder: SparseCoder) -> SparseCoder:
        """The coder that this rank trains: the one given, or a coder of its own features on its own device."""
        if self.feature_shares == 1:
            return coder
        family = type(coder)
        part = object.__new__(type(family.__name__, (_Part, family), {}))
        vars(part).update(vars(coder), select=self, d_sae=coder.d_sae // self.size)
        own = {name: self.part(name, t.detach()).to(self.device, copy=True) for name, t in coder.state_dict().items()}
        part._parameters = {n: None if p is None else nn.Parameter(own[n]) for n, p in coder._parameters.items()}
        part._buffers = {n: own[n] for n in coder._buffers}
        return part

    def rejoin(self, part: SparseCoder, coder: SparseCoder) -> None:
        if part is not coder:
            coder.load_state_dict({name: self.whole(name, t) for name, t in part.state_dict().items()})


class _Part(SparseCoder):
    """Some features of a coder, mixed in before its family; other ranks hold the others. Gradients are summed over
    ranks, so b_dec and W_skip, which every rank holds whole, get theirs from x_hat on the first rank only."""

    select: Ranks

    def _decode(self, codes: Codes | Tensor) -> Tensor:
        return _Sum.apply(super()._decode(codes))

    def _write(self, codes: Codes | Tensor, x: Tensor | None, tokens: Tensor | None) -> Tensor:
        held_whole = self.b_dec
        if self.W_skip is not None and x is not None:
            held_whole = held_whole + x @ self.W_skip
        return self._decode(codes) + (held_whole if self.select.first else held_whole.detach())

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        terms = super().terms(batch, out, progress=progress, dead=dead)
        return {name: _Sum.apply(t) if name == "sparsity" else t for name, t in terms.items()}

    def calibrate(self, blocks: Iterable[Tensor], unseen: Tensor | None = None) -> dict[str, int | float]:
        facts = super().calibrate(blocks, unseen)
        dead, l0 = self.select.gather(torch.tensor([facts["dead"], facts["l0"]], device=self.select.device)).T
        return facts | {"dead": float(dead.mean()), "l0": float(l0.sum())}


class _Sum(torch.autograd.Function):
    """The sum over ranks. Every rank computes the same loss from it, so each rank's term gets the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return _sum(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


def _sum(t: Tensor) -> Tensor:
    t = t.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(t)
    return t


def _in_place(collective: Callable[[Tensor], Any], t: Tensor) -> None:
    """A collective over a tensor whose memory may lie column by column, as W_enc's does."""
    flat = t.T if t.dim() == 2 and not t.is_contiguous() else t
    packed = flat.contiguous()
    collective(packed)
    if packed is not flat:
        flat.copy_(packed)


def _keep(codes: Codes, which: Tensor) -> Codes:
    """Some of the codes, chosen by a bool for each."""
    rows = torch.bincount(codes.rows[which], minlength=len(codes.offsets) - 1)
    offsets = F.pad(rows.cumsum(0), (1, 0))
    return Codes(codes.values[which], codes.features[which], offsets, codes.d_sae)


@contextmanager
def joined(coder: SparseCoder, shard: str) -> Iterator[Ranks]:
    """The ranks that train this coder: those of the process group there is, else of torchrun's environment. With a GPU
    for each rank, the coder moves to its own."""
    if not dist.is_initialized():
        _settle(coder, shard)
    with processes.joined("nccl" if _on_gpus(coder, shard) else "gloo"):
        device = coder.W_dec.device
        if device.type == "cpu" and dist.get_backend() == "nccl":  # only its features are to go there
            device = torch.device("cuda", torch.cuda.current_device())
        yield Ranks(dist.get_rank(), dist.get_world_size(), shard, device)


def _on_gpus(coder: SparseCoder, shard: str) -> bool:
    return coder.W_dec.is_cuda or (shard == "features" and torch.cuda.is_available())


def _settle(coder: SparseCoder, shard: str) -> None:
    """Take this rank's own GPU."""
    if not _on_gpus(coder, shard):
        return
    torch.cuda.set_device(processes.own_gpu())
    if coder.W_dec.is_cuda:
        coder.to(torch.device("cuda", torch.cuda.current_device()))
        torch.cuda.empty_cache()  # what every rank took on the first GPU
