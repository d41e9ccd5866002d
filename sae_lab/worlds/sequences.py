"""Sequences of letters, as proteins are, with planted motifs whose places are known."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from sae_lab.arguments import Count, as_annotated, check_least

TAG = 0x4D4F54494653  # part of every seed, as in ``dictionaries``
LETTERS = 20  # amino acids


@as_annotated
@dataclass(frozen=True, repr=False)
class MotifSequences:
    """Sequences of letters of which some stretches are motifs.

    Attributes:
        letters: from 0 to 19. motif: the number of the motif that a place belongs to, -1 for none; place: which of
            its letters stands there, -1 for none. motifs: their letters. background: P(letter) between motifs.
    """

    letters: Int[np.ndarray, "sequences length"]
    motif: Int[np.ndarray, "sequences length"] = field(compare=False)
    place: Int[np.ndarray, "sequences length"] = field(compare=False)
    motifs: Int[np.ndarray, "motifs size"]
    background: Float[np.ndarray, " letters"]
    seed: int = 0

    def __len__(self) -> int:
        return len(self.letters)

    def __repr__(self) -> str:
        (many, size), length = self.motifs.shape, self.letters.shape[1]
        return f"MotifSequences({len(self):,} of {length} letters, {many} motifs of {size}, seed {self.seed})"


@as_annotated
def motifs(
    sequences: Count = 2000, length: Count = 40, *, kinds: Count = 8, size: Count = 5, rate: float = 0.08, seed: int = 0
) -> MotifSequences:
    """``sl.worlds.motifs(2000, seed=1)``: letters of a skewed background; at any place between motifs one begins with
    probability ``rate``, and runs for ``size`` letters. ValueError for motifs longer than a sequence."""
    check_least(1, sequences=sequences, kinds=kinds, size=size)
    if size > length or not 0 <= rate <= 1:
        raise ValueError(f"a motif must fit and rate be a share, got size={size}, length={length}, rate={rate}")
    rng = np.random.default_rng(np.random.SeedSequence([TAG, seed]))
    background, known = rng.dirichlet(np.full(LETTERS, 3.0)), rng.integers(0, LETTERS, (kinds, size))
    letters = rng.choice(LETTERS, (sequences, length), p=background)
    begins, which = rng.random((sequences, length)) < rate, rng.integers(0, kinds, (sequences, length))
    motif, place = np.full((2, sequences, length), -1)
    for t in range(length - size + 1):
        new = begins[:, t] & (motif[:, t] < 0)
        motif[new, t : t + size], place[new, t : t + size] = which[new, t, None], np.arange(size)
    inside = motif >= 0
    letters[inside] = known[motif[inside], place[inside]]
    return MotifSequences(letters, motif, place, known, background, seed)
