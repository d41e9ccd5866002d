"""Comparing: the measures of a comparison, and which items of two sequences differ."""

import itertools
import random

import pytest
import torch

from sae_lab.lm.comparing import Comparison, differing


def common(before, after):
    """The longest common subsequence by trying all of them."""
    for n in range(len(before), -1, -1):
        theirs = set(itertools.combinations(after, n))
        if any(part in theirs for part in itertools.combinations(before, n)):
            return n
    return 0


@pytest.mark.parametrize(
    ("before", "after", "left", "right"),
    [
        ("", "", "", ""),
        ("abc", "abc", "...", "..."),
        ("abc", "", "xxx", ""),
        ("abc", "axc", ".x.", ".x."),
        ("abcd", "bcde", "x...", "...x"),
        ("aab", "ab", "x..", ".."),
    ],
)
def test_differing_by_hand(before, after, left, right):
    found = differing(before, after)
    assert ["".join("x" if d else "." for d in side) for side in found] == [left, right]


def test_differing_is_shortest_and_leaves_one_sequence():
    draw = random.Random(0)
    for _ in range(200):
        before, after = ([draw.choice("abc") for _ in range(draw.randint(0, 7))] for _ in range(2))
        left, right = differing(before, after)
        kept = [[x for x, d in zip(*side, strict=True) if not d] for side in ((before, left), (after, right))]
        assert kept[0] == kept[1] and len(kept[0]) == common(before, after)


def test_measures():
    nan = float("nan")
    result = Comparison(
        [], torch.tensor([0.0, 0.5]), torch.tensor([nan, -1.0]), torch.tensor([nan, -3.0]),
        {"resid_post-1 #7": (torch.tensor([0.0, 2.0]), torch.tensor([4.0, 6.0]))},
    )  # fmt: skip
    found = {name: values.tolist() for name, values in result.measures().items()}
    assert found["KL"] == [0.0, 0.5] and found["change of log-probability"][1] == -2.0
    assert found["perplexity with edits"][1] == pytest.approx(20.0855, rel=1e-5)
    assert found["perplexity without"][1] == pytest.approx(2.71828, rel=1e-5)
    assert found["resid_post-1 #7 with edits"] == [4.0, 6.0] and found["resid_post-1 #7 without"] == [0.0, 2.0]
    assert len(found) == 6
