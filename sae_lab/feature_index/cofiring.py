"""Which features fire on the same tokens.

    J(i, j) = n_ij / (n_i + n_j - n_ij)

the Jaccard index: n_i is the number of kept tokens on which i fires, n_ij of those on which both do. 1: always
together; 0: never. Counts are exact and over all tokens of the store.

Two products count. Codes of features that fire seldom meet in a product of sparse matrices, which costs the sum over
tokens of (active features)². The few dense ones would make that sum large, since every token has them: their columns
are dense matrices, and a sum of rows counts them against all others at once.
"""

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

from sae_lab.feature_index import chunks

COFIRING = 32
DENSE = 1 / 64  # features on more than this share of tokens are dense: a pair is 30 times as fast, but all pairs count
DENSE_BYTES = 128 << 20  # of the table of counts with dense features, which has room for the densest only


def cofiring(offsets: np.ndarray, rows: np.ndarray, tokens: int, first: int | None = None) -> dict[str, np.ndarray]:
    """Of every feature the COFIRING others with the largest Jaccard index, -1 where there are no more, and the number
    of tokens on which both fire. Of the ``first`` features alone, if that is given.

    ``rows[offsets[i] : offsets[i + 1]]`` are the tokens, 0 to ``tokens`` - 1, on which feature i fires.
    """
    d_sae = len(offsets) - 1
    counts = np.diff(offsets)
    dense = _dense(counts, tokens)
    by_token = _fires(offsets, rows, tokens, np.arange(d_sae), dense, np.int8).T.tocsr()  # 9 bytes a code, the most
    by_token.data = np.ones(by_token.nnz, np.int32)  # a product adds in the type of its factors
    with_dense = _with_dense(offsets, rows, tokens, dense)
    fires = torch.from_numpy(counts).to(with_dense.dtype)
    n, stop = min(COFIRING, d_sae - 1), d_sae if first is None else min(first, d_sae)
    ids, both = np.full((stop, COFIRING), -1, np.int32), np.zeros((stop, COFIRING), np.int32)
    size = chunks.rows_at_a_time(5 * 4 * d_sae)  # a sparse product, and it, its unions and their quotient dense
    for start in range(0, stop, size):
        part = np.arange(start, min(start + size, stop))
        # The tables with dense features are symmetric: their columns serve as their rows.
        product = sparse.csr_array(_fires(offsets, rows, tokens, part, dense, np.int32) @ by_token)
        together = torch.from_numpy(product.toarray()).to(with_dense.dtype)
        together[:, dense] = with_dense[part]
        here = np.flatnonzero(np.isin(part, dense))
        together[here] = with_dense[:, np.searchsorted(dense, part[here])].T
        together[np.arange(len(part)), part] = 0  # not itself
        jaccard = (fires[part][:, None] + fires - together).clamp_min_(1)
        top = torch.div(together, jaccard, out=jaccard).topk(n)
        found = top.values > 0
        ids[part, :n] = torch.where(found, top.indices, -1).numpy()
        both[part, :n] = torch.where(found, together.gather(1, top.indices), 0).numpy()
    return {"cofiring": ids, "cofiring_counts": both}


def _dense(counts: np.ndarray, tokens: int) -> np.ndarray:
    """Features that fire on more than a share of DENSE of the tokens, as many as a table of DENSE_BYTES holds."""
    most = min(DENSE_BYTES // (4 * len(counts)), int((counts > DENSE * tokens).sum()))
    return np.sort(np.argsort(-counts, kind="stable")[:most])


def _fires(
    offsets: np.ndarray, rows: np.ndarray, tokens: int, part: np.ndarray, dense: np.ndarray, kind: type
) -> sparse.csr_array:
    """Ones where a feature of ``part`` fires, "part tokens"; none for the dense ones."""
    seldom = ~np.isin(part, dense)
    counts = np.where(seldom, np.diff(offsets)[part], 0)
    here = np.concatenate([*(rows[offsets[i] : offsets[i + 1]] for i in part[seldom]), np.zeros(0, np.int32)])
    ends = np.concatenate([[0], counts.cumsum()])
    return sparse.csr_array((np.ones(len(here), kind), here, ends), (len(part), tokens))


def _with_dense(offsets: np.ndarray, rows: np.ndarray, tokens: int, dense: np.ndarray) -> Float[Tensor, "d_sae some"]:
    """n_ij of all features with the dense ones: sums over a feature's tokens of rows of "tokens some"."""
    exact = torch.float32 if tokens < 1 << 24 else torch.float64  # whole numbers up to there
    counts = torch.zeros(len(offsets) - 1, len(dense), dtype=exact)
    size = chunks.rows_at_a_time(4 * tokens)
    for first in range(0, len(dense), size):
        some = dense[first : first + size]
        table = torch.zeros(tokens, len(some), dtype=exact)
        for column, feature in enumerate(some):
            table[rows[offsets[feature] : offsets[feature + 1]], column] = 1
        for start, stop in chunks.by_codes(offsets):
            here = torch.from_numpy(rows[offsets[start] : offsets[stop]].astype(np.int64))
            ends = torch.from_numpy(offsets[start : stop + 1] - offsets[start])
            counts[start:stop, first : first + size] = torch.nn.functional.embedding_bag(
                here, table, ends, mode="sum", include_last_offset=True
            )
    return counts
