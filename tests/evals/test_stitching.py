"""stitching: every change of the error against the plain loop, what is novel, and the published claim on a world."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import sae_lab as sl
from sae_lab.evals.stitches import stitching
from tests.evals.test_cones import knows

EYE = torch.eye(6)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_changes_are_those_of_the_plain_loop():
    x = noise(300, 6)
    small, large = sl.TopK(6, 5, k=2, seed=1).eval(), sl.TopK(6, 40, k=3, seed=2).eval()
    with torch.no_grad():
        large.W_dec.mul_(0.5 + torch.rand(40, 1, generator=torch.Generator().manual_seed(3)))  # rows of any length
        result = stitching(small, large, x, threshold=0.3)
        f, g = small.encode(x), large.encode(x)
        error = x - small(x).x_hat
        d, c = large.W_dec.detach(), small.W_dec.detach()
    assert result.nearest.unique().numel() < 40  # several large features share a small one
    for j in range(40):
        part, i = g[:, j, None] * d[j], result.nearest[j]
        if not bool(g[:, j].any()):
            assert result.inserted[j].isnan()
            continue
        before = error.pow(2).sum(1).mean()
        inserted = (error - part).pow(2).sum(1).mean() - before
        assert float(result.inserted[j]) == pytest.approx(float(inserted), abs=1e-5)
        if result.cosines[j] < 0.3:
            assert result.swapped[j].isnan()
            continue
        swapped = (error - part + f[:, i, None] * c[i]).pow(2).sum(1).mean() - before
        assert float(result.swapped[j]) == pytest.approx(float(swapped), abs=1e-5)
    cosines = normalize(d, dim=1) @ c.T
    assert torch.allclose(result.cosines, cosines.max(1).values, atol=1e-6)


def test_by_hand():
    # The small coder knows three of six axes. The large one knows all; its first direction is the small one's.
    x = noise(500, 6).abs()
    result = stitching(knows(EYE[:3]), knows(EYE), x)
    assert result.novel == 0.5 and result.cosines.tolist() == [1, 1, 1, 0, 0, 0]
    # Novel: the whole of x² on that axis goes. Known: what was right becomes −x, so that x² comes in.
    second = x.pow(2).mean(0)
    assert torch.allclose(result.inserted, second * torch.tensor([1, 1, 1, -1, -1, -1]), atol=1e-5)
    assert result.novel_help == result.known_hurt == 1 and result.novel_help_se == 0
    assert (
        result.swap_better == result.swap_help == 1 and result.swapped[:3].abs().max() < 1e-5
    )  # like for like changes nothing
    assert result.swap_better_random < 1  # a third of the draws are the nearest
    assert result.fvu_novel == pytest.approx(0, abs=1e-6) and result.fvu_large == pytest.approx(0, abs=1e-6)
    assert result.fvu_small > 0.3


def test_controls_find_nothing():
    x = noise(2000, 6).abs()
    result = stitching(knows(EYE[:3]), knows(EYE), x - x.mean(0))
    assert result.novel_help_shuffled == 0
    # A large coder of random rows: its codes say nothing of the small one's error.
    world = sl.worlds.planted(n=64, d=32, l0=3, samples=4000, seed=2)
    large = sl.TopK(32, 256, k=3, seed=5).eval()
    perfect = knows(world.dictionary)
    with torch.no_grad():
        perfect.b_enc.fill_(-0.4)
    assert stitching(perfect, large, world.x).novel_help < 0.2


@pytest.fixture(scope="module")
def two_sizes():
    """(x, a small and a large BatchTopK trained on it)."""
    world = sl.worlds.planted(n=64, d=32, l0=3, noise=0.05, samples=20_000, law="zipf", seed=1)
    made = []
    for d_sae in (16, 64):
        coder = sl.BatchTopK(32, d_sae, k=3, seed=d_sae)
        sl.train(coder, world.x, sl.TrainConfig(steps=300, batch_size=512))
        made.append(coder)
    return world.x, *made


def test_novel_features_help_on_a_planted_world(two_sizes):
    x, small, large = two_sizes
    result = stitching(small, large, x)
    assert 0.3 < result.novel < 0.9
    assert result.novel_help > 0.8 and result.novel_help - 3 * result.novel_help_se > 0.7, result
    assert result.novel_help_random < 0.2 and result.novel_help_shuffled < 0.2, result
    assert result.known_hurt > 0.8 and result.swap_better > result.swap_better_random + 0.3, result
    # Measured: 61 % novel, of which 87 % help (random directions 6 %); 90 % of the others hurt.
    assert result.fvu_novel < result.fvu_small


def test_the_table(two_sizes):
    x, small, large = two_sizes
    result = stitching(small, large, x, tokens=2000)
    text = repr(result)
    assert "novel, MSE falls" in text and "random directions" in text and "16 and 64 features" in text
    assert len(result.to_pandas()) == 1 and "inserted" not in result.to_pandas()
    # The same coder twice: nothing is novel, and what is undefined says so.
    same = stitching(small, small, x, tokens=2000)
    assert same.novel == 0 and math.isnan(same.novel_help) and same.swap_help > 0 and "undefined" in repr(same)
    assert same.swapped.nan_to_num().abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 2.0}, "threshold is a cosine from -1 to 1, got 2.0"),
        ({"small": sl.TopK(6, 8, k=2)}, "eval mode, got TopK.* in training"),
        ({"large": sl.TopK(6, 8, k=2)}, "eval mode, got TopK.* in training"),
        ({"large": sl.TopK(6, 8, k=2, d_out=6).eval()}, "reconstruct what they read, TopK.* does not"),
        ({"large": sl.TopK(7, 8, k=2).eval()}, "the coders must read the same activations, got widths"),
        ({"x": torch.ones(9, 5)}, "x's last axis must be d_in=6"),
        ({"tokens": 1}, "tokens must be at least 2"),
    ],
)
def test_refusals(change, message):
    given = {"small": knows(EYE[:3]), "large": knows(EYE), "x": noise(50, 6)} | change
    with pytest.raises(ValueError, match=message):
        stitching(given.pop("small"), given.pop("large"), given.pop("x"), **given)


def test_a_silent_large_coder_is_refused():
    silent = knows(EYE)
    with torch.no_grad():
        silent.b_enc.fill_(-100)
    with pytest.raises(ValueError, match="no feature of the large coder fires on these 50 rows"):
        stitching(knows(EYE[:3]), silent, noise(50, 6))
    blank = stitching(silent, knows(EYE), noise(50, 6))  # a silent small one: every large feature is its twin
    assert blank.novel == 0 and blank.known_hurt == 0
