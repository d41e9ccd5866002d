"""Kernels on sparse codes: a step costs one dense product (x·W_enc); all else touches active features only.

Nothing of size active x d is ever made. Gradients of weights are sums of rows by feature, which ``embedding_bag`` over
codes sorted by feature does in one pass; gradients of code values are inner products at given places, which is what
``sampled_addmm`` computes.
"""

import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae_lab.types import Codes, rows_of

T = TypeVar("T", Codes, Tensor)
GROUPS = (4, 4, 4)  # the maximum of each 4 entries of a row is looked at first; of these maxima, that of each 4 again
PIECE = 1 << 22  # entries of pre that are looked at together: their temporaries then stay in the CPU's cache


class Memory:
    """Buffers of a training step: pre, and gradients of matrices. On a CPU allocating a large tensor costs more than
    writing to it, since the system hands out its memory page by page."""

    def __init__(self, rows: int, width: int, device: torch.device):
        self._pre = torch.empty(rows, width, device=device)
        self._gradients: list[Tensor] = []
        self._given = 0

    def pre(self, rows: int, width: int) -> Float[Tensor, "rows width"] | None:
        """The one buffer for pre; None where it is too small."""
        fits = rows <= len(self._pre) and width == self._pre.shape[1]
        return self._pre[:rows] if fits else None

    def gradient(self, rows: int, width: int) -> Float[Tensor, "rows width"]:
        """A matrix that was not handed out since ``rewind``; a view, so that autograd keeps it without a copy."""
        place, size = self._given, rows * width
        self._given += 1
        if place == len(self._gradients):
            self._gradients.append(self._pre.new_empty(size))
        if self._gradients[place].numel() < size:
            self._gradients[place] = self._pre.new_empty(size)
        return self._gradients[place][:size].view(rows, width)

    def rewind(self) -> None:
        """All gradients may be handed out again."""
        self._given = 0


def _pieces(pre: Tensor) -> tuple[Tensor, ...]:
    """Some rows of a matrix at a time, so that no temporary is large (see ``Memory``). On a GPU, whose allocator keeps
    memory, the whole at once."""
    return pre.split(max(1, PIECE // pre.shape[1])) if pre.device.type == "cpu" else (pre,)


def _largest(pre: Tensor, k: int, groups: tuple[int, ...] = GROUPS) -> tuple[Tensor, Tensor]:
    """(values, places) of the k largest entries of each row. They lie in the k groups with the largest maxima, so that
    a wide row is selected from in a few narrow ones."""
    rows, width = pre.shape
    if not groups or (count := width // groups[0]) < 2 * k:
        return pre.topk(k, sorted=False)
    body = pre[:, : groups[0] * count].view(rows, groups[0], count)  # strided groups: maxima run along memory
    _, best = _largest(body.amax(1), k, groups[1:])
    members = (best.unsqueeze(1) + count * torch.arange(groups[0], device=pre.device)[:, None]).flatten(1)
    if rest := width - groups[0] * count:
        last = torch.arange(width - rest, width, device=pre.device).expand(rows, -1)
        members = torch.cat([members, last], 1)
    values, chosen = pre.gather(1, members).topk(k, sorted=False)
    return values, members.gather(1, chosen)


def top_per_row(pre: Float[Tensor, "batch d_sae"], k: int) -> Codes:
    """The k largest entries of each row."""
    tops = (_largest(part, k) for part in _pieces(pre))
    values, features = (torch.cat(parts) for parts in zip(*tops, strict=True))
    return equal_rows(values, features, pre.shape[1])


def top_among(pre: Float[Tensor, "batch d_sae"], features: Int[Tensor, " some"], k: int) -> Codes:
    """The k largest entries of each row, among some features."""
    tops = (_largest(part.index_select(1, features), k) for part in _pieces(pre))
    values, among = (torch.cat(parts) for parts in zip(*tops, strict=True))
    return equal_rows(values, features[among], pre.shape[1])


def equal_rows(values: Float[Tensor, "batch k"], features: Int[Tensor, "batch k"], d_sae: int) -> Codes:
    """Codes of rows that all have k entries."""
    offsets = torch.arange(0, values.numel() + 1, values.shape[1], device=values.device)
    return Codes(values.flatten(), features.flatten(), offsets, d_sae)


STRIDE = 127  # one entry in 127 is sampled; a prime, so that the sample covers all features


def top_of_batch(pre: Float[Tensor, "batch d_sae"], n: int) -> Codes:
    """The n largest entries of the whole matrix. A strided sample bounds the candidates, so that the exact selection
    sorts a few per cent of the entries."""
    flat = pre.reshape(-1)
    sample = flat[::STRIDE]
    bound = sample.topk(min(len(sample), int(1.3 * n / STRIDE) + 64), sorted=False).values.min()
    places = _true_places(part > bound for part in _pieces(pre))
    if len(places) < n:  # the sample's bound was too high
        places = torch.arange(len(flat), device=pre.device)
    places = places[flat[places].topk(min(n, len(places)), sorted=False).indices].sort().values
    return _from_places(pre, places)


def above(pre: Float[Tensor, "batch d_sae"], threshold: Tensor | float) -> Codes:
    """The entries above a threshold (a number, or one per feature)."""
    return _from_places(pre, _true_places(part > threshold for part in _pieces(pre)))


def where(pre: Float[Tensor, "batch d_sae"], chosen: Bool[Tensor, "batch d_sae"]) -> Codes:
    """The chosen entries."""
    return _from_places(pre, _true_places(_pieces(chosen)))


def _true_places(pieces: Iterable[Tensor]) -> Int[Tensor, " chosen"]:
    """Ascending flat places of the true entries of a matrix, given some rows at a time."""
    places, before = [], 0
    for piece in pieces:
        flat = piece.reshape(-1)
        # numpy's is three times as fast where few are true
        found = torch.from_numpy(np.flatnonzero(flat.numpy())) if flat.device.type == "cpu" else flat.nonzero()[:, 0]
        places.append(found + before)
        before += piece.numel()
    return torch.cat(places)


def _from_places(pre: Tensor, places: Tensor) -> Codes:
    """Codes at ascending flat places of a matrix."""
    rows, d_sae = pre.shape
    offsets = torch.searchsorted(places, d_sae * torch.arange(rows + 1, device=pre.device))
    return Codes(pre.reshape(-1)[places], places % d_sae, offsets, d_sae)


def product(a: Float[Tensor, "n m"], b: Float[Tensor, "m k"], precision: str) -> Float[Tensor, "n k"]:
    """a·b. precision: "bf16" multiplies numbers of bfloat16, and gives a sum of 3 digits in float32, as
    ``torch.autocast`` would; so do its gradients. Any other is that of float32 tensors."""
    return (a.bfloat16() @ b.bfloat16()).float() if precision == "bf16" else a @ b


def affine(
    x: Float[Tensor, "batch d_in"], W: Tensor, bias: Tensor, precision: str, out: Tensor | None = None
) -> Float[Tensor, "batch d_sae"]:
    """x·W + bias. precision: of the product, see ``product``."""
    if precision == "bf16":
        return torch.add(product(x, W, precision), bias, out=out)
    return torch.addmm(bias, x, W, out=out)


class Selector:
    """How a coder chooses the largest pre-activations. Processes that train one coder together put a selector of their
    own into ``coder.select``, which looks at the values of all."""

    def per_row(self, pre: Float[Tensor, "batch d_sae"], k: int) -> Codes:
        """The k largest of each row."""
        return top_per_row(pre, k)

    def of_batch(self, pre: Float[Tensor, "batch d_sae"], k: float) -> Codes:
        """The k·rows largest of the whole batch."""
        return top_of_batch(pre, round(k * len(pre)))

    def among(self, pre: Float[Tensor, "batch d_sae"], features: Int[Tensor, " some"], k: int) -> Codes | None:
        """The k largest of each row among ``features`` (all of them if they are fewer); None without features."""
        return top_among(pre, features, min(k, len(features))) if len(features) else None

    def everywhere(self, values: Float[Tensor, " some"]) -> Float[Tensor, " all"]:
        """These values and, of a coder split over ranks, those of the other ranks."""
        return values


def positive(codes: Codes | Float[Tensor, "batch d_sae"]) -> Codes:
    """The codes above 0."""
    if isinstance(codes, Codes) and bool((codes.values > 0).all()):
        return codes
    return above(codes.dense() if isinstance(codes, Codes) else codes, 0.0)


def joined(parts: Sequence[Codes], d_sae: int) -> Codes:
    """Codes of rows after one another, from those of some rows each; on the CPU."""
    none = torch.zeros(0)
    values = torch.cat([none, *(part.values.cpu() for part in parts)])
    features = torch.cat([none.long(), *(part.features.cpu() for part in parts)])
    counts = torch.cat([none.new_zeros(1).long(), *(part.offsets.diff().cpu() for part in parts)])
    return Codes(values, features, counts.cumsum(0), d_sae)


def feature_rows(codes: Codes) -> Any:
    """The codes of each feature over the rows: scipy's sparse matrix "d_sae rows"."""
    from scipy import sparse

    arrays = (part.detach().cpu().numpy() for part in codes[:3])
    return sparse.csr_matrix(tuple(arrays), shape=(len(codes.offsets) - 1, codes.d_sae)).T.tocsr()


def encode_at(
    codes: T,
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"] | None,
    memory: Memory | None = None,
    precision: str = "float32",
) -> T:
    """The same codes with gradients: values are ((x - b_dec)·W_enc + b_enc) at the chosen places; None subtracts
    nothing. A matrix of pre-activations gets gradients at all places: for batches in which most codes are on.
    memory: for the gradients of the matrices, here and in ``decode``. precision: of dense products, see ``product``."""
    if isinstance(codes, Tensor):
        return _Encode.apply(codes, x, W_enc, b_enc, b_dec, None, memory, precision)
    order = codes.by_feature or ByFeature(codes, memory)
    values = _Encode.apply(codes.values, x, W_enc, b_enc, b_dec, order, memory, precision)
    return codes._replace(values=values, by_feature=order)


def decode(codes: Codes, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "batch d_out"]:
    """Sum of the active features' rows of W_dec, weighted by their codes."""
    return _Decode.apply(codes.values, W_dec, codes.by_feature or ByFeature(codes))


class ByFeature:
    """The places of codes in the order of features, sorted when first needed: gradients of W_dec and of W_enc are both
    sums by feature."""

    def __init__(self, codes: Codes, memory: Memory | None = None):
        self.features, self.offsets, self.d_sae = codes.features, codes.offsets, codes.d_sae
        self.memory = memory

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor, Tensor]:
        ordered, order = self.features.int().sort(stable=True)  # half the bytes, twice as fast
        starts = torch.searchsorted(ordered, torch.arange(self.d_sae + 1, device=ordered.device))
        return order, starts, rows_of(self.offsets, len(self.features))[order]

    def sum(
        self, weights: Float[Tensor, " active"], table: Float[Tensor, "batch d"], out: Tensor | None = None
    ) -> Float[Tensor, "d_sae d"]:
        """Row i is the sum over the rows b where feature i is active of weight · table[b]."""
        order, starts, rows = self._order
        if out is None and self.memory is not None:
            out = self.memory.gradient(self.d_sae, table.shape[1])
        if out is None:
            return weighted_rows(weights[order], rows, starts, table)
        # mm would make zeros of this size first
        return torch.addmm(out, _csr(starts, rows, weights[order], len(table)), table, beta=0.0, out=out)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values, x, W_enc, b_enc, b_dec, order, memory, precision):
        ctx.save_for_backward(x, W_enc, b_dec)
        ctx.order, ctx.memory, ctx.precision = order, memory, precision
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, g: Tensor):  # type: ignore[override]
        (x, W_enc, b_dec), order = ctx.saved_tensors, ctx.order
        grad_x = None
        if order is None:
            by_feature, total = _product_into(ctx.memory, g.T, x, ctx.precision), g.sum(0)  # sums of g·x; of g
            if ctx.needs_input_grad[1]:
                grad_x = product(g, W_enc.T, ctx.precision)
        else:
            by_feature = order.sum(g, x)
            total = torch.zeros(W_enc.shape[1], device=g.device, dtype=g.dtype).index_add_(0, order.features, g)
            if ctx.needs_input_grad[1]:
                grad_x = weighted_rows(g, order.features, order.offsets, W_enc.T)
        if b_dec is None:
            return None, grad_x, by_feature.T, total, None, None, None, None
        return None, grad_x, by_feature.addr_(total, b_dec, alpha=-1).T, total, -(W_enc @ total), None, None, None


def _product_into(memory: Memory | None, a: Tensor, b: Tensor, precision: str) -> Tensor:
    """a·b in a buffer of the memory, if there is one."""
    if memory is None:
        return product(a, b, precision)
    out = memory.gradient(a.shape[0], b.shape[1])
    return torch.mm(a, b, out=out) if precision != "bf16" else out.copy_(product(a, b, precision))


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values, W_dec, order):
        ctx.save_for_backward(values, W_dec)
        ctx.order = order
        return weighted_rows(values, order.features, order.offsets, W_dec)

    @staticmethod
    def backward(ctx: Any, g: Tensor):  # type: ignore[override]
        (values, W_dec), order = ctx.saved_tensors, ctx.order
        g = g.contiguous()
        grad_values = inner_products(g, W_dec, order.features, order.offsets) if ctx.needs_input_grad[0] else None
        grad_W = order.sum(values, g) if ctx.needs_input_grad[1] else None
        return grad_values, grad_W, None


def weighted_rows(weights: Tensor, features: Tensor, offsets: Tensor, table: Tensor) -> Float[Tensor, "batch d"]:
    """Row b is the sum over b's active features of weight · table[feature]."""
    return F.embedding_bag(
        features, table.contiguous(), offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def inner_products(
    left: Float[Tensor, "batch d"],
    right: Float[Tensor, "d_sae d"],
    features: Int[Tensor, " active"],
    offsets: Int[Tensor, " rows_plus_one"],
) -> Float[Tensor, " active"]:
    """left[row]·right[feature] for every active place."""
    pattern = _csr(offsets, features, left.new_zeros(len(features)), len(right))
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


def _csr(offsets: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """A matrix of compressed rows, as torch's kernels take it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        shape = (len(offsets) - 1, width)
        return torch.sparse_csr_tensor(offsets, columns, values, shape, check_invariants=False)
