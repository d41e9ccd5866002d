"""Kernels on sparse codes: a step costs one dense product (x·W_enc); all else touches active features only.

Nothing of size active x d is ever made. Gradients of weights are sums of rows by feature, which ``embedding_bag`` over
codes sorted by feature does in one pass; gradients of code values are inner products at given places, which is what
``sampled_addmm`` computes.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae_lab.types import Codes


def top_per_row(pre: Float[Tensor, "batch d_sae"], k: int) -> Codes:
    """The k largest entries of each row."""
    values, features = pre.topk(k, sorted=False)
    offsets = torch.arange(0, values.numel() + 1, k, device=pre.device)
    return Codes(values.flatten(), features.flatten(), offsets, pre.shape[1])


def top_of_batch(pre: Float[Tensor, "batch d_sae"], n: int) -> Codes:
    """The n largest entries of the whole matrix. A strided sample bounds the candidates, so that the exact selection
    sorts a few per cent of the entries."""
    flat = pre.reshape(-1)
    stride = 31
    sample = flat[::stride]
    bound = sample.topk(min(len(sample), int(1.3 * n / stride) + 64)).values.min()
    places = (flat > bound).nonzero().flatten()
    if len(places) < n:  # the sample was unlucky
        places = torch.arange(len(flat), device=pre.device)
    places = places[flat[places].topk(min(n, len(places)), sorted=False).indices].sort().values
    return _from_places(pre, places)


def above(pre: Float[Tensor, "batch d_sae"], threshold: Tensor | float) -> Codes:
    """The entries above a threshold (a number, or one per feature)."""
    return _from_places(pre, (pre > threshold).reshape(-1).nonzero().flatten())


def _from_places(pre: Tensor, places: Tensor) -> Codes:
    """Codes at ascending flat places of a matrix."""
    d_sae = pre.shape[1]
    rows, features = places // d_sae, places % d_sae
    offsets = torch.zeros(len(pre) + 1, dtype=torch.long, device=pre.device)
    offsets[1:] = torch.bincount(rows, minlength=len(pre)).cumsum(0)
    return Codes(pre.reshape(-1)[places], features, offsets, d_sae)


def encode_at(
    codes: Codes,
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"] | None,
) -> Codes:
    """The same codes with gradients: values are ((x - b_dec)·W_enc + b_enc) at the chosen places; None subtracts
    nothing."""
    values = _EncodeAt.apply(codes.values, x, W_enc, b_enc, b_dec, codes.features, codes.offsets)
    return codes._replace(values=values)


def decode(codes: Codes, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "batch d_out"]:
    """Sum of the active features' rows of W_dec, weighted by their codes."""
    return _Decode.apply(codes.values, W_dec, codes.features, codes.offsets)


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values, x, W_enc, b_enc, b_dec, features, offsets):
        ctx.save_for_backward(x, W_enc, b_dec, features, offsets)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor):  # type: ignore[override]
        x, W_enc, b_dec, features, offsets = ctx.saved_tensors
        by_feature = _sum_by_feature(g, features, offsets, W_enc.shape[1], x)  # (d_sae, d_in): sum of g·x
        total = torch.zeros(W_enc.shape[1], device=g.device, dtype=g.dtype).index_add_(0, features, g)
        grad_b_dec = None
        if b_dec is not None:
            by_feature.addr_(total, b_dec, alpha=-1)
            grad_b_dec = -(W_enc @ total)
        grad_x = _weighted_rows(g, features, offsets, W_enc.T) if ctx.needs_input_grad[1] else None
        return None, grad_x, by_feature.T, total, grad_b_dec, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values, W_dec, features, offsets):
        ctx.save_for_backward(values, W_dec, features, offsets)
        return _weighted_rows(values, features, offsets, W_dec)

    @staticmethod
    def backward(ctx: Any, g: Tensor):  # type: ignore[override]
        values, W_dec, features, offsets = ctx.saved_tensors
        g = g.contiguous()
        grad_values = inner_products(g, W_dec, features, offsets) if ctx.needs_input_grad[0] else None
        grad_W = _sum_by_feature(values, features, offsets, W_dec.shape[0], g) if ctx.needs_input_grad[1] else None
        return grad_values, grad_W, None, None


def _weighted_rows(weights: Tensor, features: Tensor, offsets: Tensor, table: Tensor) -> Float[Tensor, "batch d"]:
    """Row b is the sum over b's active features of weight · table[feature]."""
    return F.embedding_bag(
        features, table.contiguous(), offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _sum_by_feature(
    weights: Tensor, features: Tensor, offsets: Tensor, d_sae: int, rows_table: Tensor
) -> Float[Tensor, "d_sae d"]:
    """Row i is the sum over the rows b where feature i is active of weight · rows_table[b]."""
    rows = Codes(weights, features, offsets, d_sae).rows
    ordered, order = features.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(d_sae + 1, device=features.device))
    return _weighted_rows(weights[order], rows[order], starts, rows_table)


def inner_products(
    left: Float[Tensor, "batch d"],
    right: Float[Tensor, "d_sae d"],
    features: Int[Tensor, " active"],
    offsets: Int[Tensor, " rows_plus_one"],
) -> Float[Tensor, " active"]:
    """left[row]·right[feature] for every active place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        zeros = left.new_zeros(len(features))
        shape = (len(left), len(right))
        pattern = torch.sparse_csr_tensor(offsets, features, zeros, shape, check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
