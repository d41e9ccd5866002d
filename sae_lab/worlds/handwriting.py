"""Handwritten digits: the 1,797 images of scikit-learn, with splits drawn by a seed of their own."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from sae_lab.arguments import as_annotated

TAG = 0x444947495453  # part of every seed, as in ``dictionaries``
SHARES = {"train": 0.5, "select": 0.25, "measure": 0.25}


@as_annotated
@dataclass(frozen=True, repr=False)
class Digits:
    """Images of digits and the three parts that they are divided into.

    Attributes:
        images: from 0 (paper) to 1 (ink), 8 x 8. labels: the digit that each shows.
        train, select, measure: numbers of the images of each part.
    """

    images: Float[np.ndarray, "images 8 8"]
    labels: Int[np.ndarray, " images"]
    train: Int[np.ndarray, " train"] = field(compare=False)
    select: Int[np.ndarray, " select"] = field(compare=False)
    measure: Int[np.ndarray, " measure"] = field(compare=False)
    seed: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, part)):,} to {part}" for part in SHARES)
        return f"Digits({len(self):,} images of 8 x 8: {sizes}, seed {self.seed})"


@as_annotated
def digits(seed: int = 0) -> Digits:
    """``sl.worlds.digits(seed=1)``: scikit-learn's handwritten digits, half of each digit to train on, a quarter to
    select on, a quarter to measure on. The seed draws the parts."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # one image in a row, from 0 to 16
    labels = np.asarray(labels, np.int64)
    rng = np.random.default_rng(np.random.SeedSequence([TAG, seed]))
    ends = np.cumsum(list(SHARES.values()))[:-1]
    by_digit = [np.split(own, np.round(ends * len(own)).astype(int)) for own in _shuffled(labels, rng)]
    parts = [np.sort(np.concatenate(some)) for some in zip(*by_digit, strict=True)]
    return Digits((np.asarray(pixels, np.float32) / 16).reshape(-1, 8, 8), labels, *parts, seed=seed)


def _shuffled(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The numbers of each digit's images, in random order."""
    return [rng.permutation(np.flatnonzero(labels == digit)) for digit in np.unique(labels)]
