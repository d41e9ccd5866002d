"""Work on features in chunks, so that memory does not grow with their number."""

from collections.abc import Iterator

import numpy as np

CHUNK_BYTES = 64 << 20  # what the largest temporary arrays of a chunk take together
CODES = 1 << 21  # codes that are sorted together


def rows_at_a_time(row_bytes: int) -> int:
    """How many rows make a chunk, each of ``row_bytes`` bytes."""
    return max(1, CHUNK_BYTES // row_bytes)


def by_codes(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of features that have at most CODES codes together; or of one that has more."""
    start = 0
    while start < len(offsets) - 1:
        stop = int(np.searchsorted(offsets, offsets[start] + CODES, side="right")) - 1
        stop = max(start + 1, stop)
        yield start, stop
        start = stop
