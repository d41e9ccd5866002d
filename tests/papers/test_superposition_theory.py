"""What holds by construction in notebooks/papers/superposition_theory.ipynb; the functions are the notebook's own."""

import json
import math
from pathlib import Path

import pytest
import torch

import sae_lab as sl

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "superposition_theory.ipynb"


@pytest.fixture(scope="module")
def own():
    """Its names: those of the plan, the imports and the cells tagged `method`."""
    code = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict = {}
    for number, cell in enumerate(code):
        if number == 2 or {"plan", "method"} & set(cell["metadata"].get("tags", [])):  # the third imports
            exec("".join(cell["source"]), names)
    return names


def bilinear(seed, n=3, hidden=4, d=5):
    stream = torch.Generator().manual_seed(seed)
    shapes = [(n, hidden, d), (n, hidden, d), (n, hidden), (n,)]
    return [torch.randn(shape, generator=stream, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(("features", "d"), [(9, 8), (40, 8), (256, 16)])
def test_no_frame_is_below_welchs_bound(own, features, d):
    for seed in range(5):
        assert own["nearest"](own["frame"](features, d, seed)) >= own["welch"](features, d)


def test_a_simplex_reaches_welchs_bound(own):
    d = 8
    simplex = torch.eye(d + 1) - 1 / (d + 1)  # d + 1 directions in the d dimensions that sum to 0
    assert own["nearest"](torch.nn.functional.normalize(simplex, dim=1)) == pytest.approx(
        own["welch"](d + 1, d), rel=1e-5
    )


def test_without_crosstalk_reading_is_exact_and_another_frame_reads_nothing(own):
    axes = torch.eye(32)
    assert own["exact"](axes, axes, 3, 50, seed=0) == 1
    assert own["exact"](axes, axes.roll(1, 0), 3, 50, seed=0) == 0
    assert own["linear_error"](axes, 3, 50, seed=0)[0] == 0


def test_a_neurons_template_has_distance_nought_and_another_location_one(own):
    w = torch.zeros(own["NEURONS"], own["N"])
    votes = torch.ones(own["NEURONS"])
    w[0, :2] = torch.tensor([1.0, 1.0])
    w[1, :2], votes[1] = torch.tensor([2.0, -2.0]), -1.0
    w[2, :2] = torch.tensor([1.0, -1.0])  # signs of one that votes no, on one that votes yes
    found = own["distance"]([w, torch.zeros_like(votes), votes, torch.zeros(1)])
    assert found[:2, 0].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert found[:2, 1:].unique().tolist() == [1.0] and found[2, 0] == 1


def test_similarity_ignores_order_scale_and_sides_of_hidden_units(own):
    p = bilinear(0)
    order, scale = torch.randperm(4), torch.tensor([0.5, -2.0, 3.0, 1.5], dtype=torch.float64)
    same = [p[0][:, order] * scale[:, None], p[1][:, order], p[2][:, order] / scale, p[3]]
    assert own["similarity"](p, same).tolist() == pytest.approx([1, 1, 1])
    assert own["similarity"](p, [p[1], p[0], *p[2:]]).tolist() == pytest.approx([1, 1, 1])
    negative = [*p[:2], -p[2], -p[3]]
    assert own["similarity"](p, negative).tolist() == pytest.approx([-1, -1, -1])
    inputs = [p[0].flip(2), *p[1:]]  # the control: another order of the inputs of one side
    assert own["similarity"](p, inputs).abs().max() < 0.95


def test_similarity_is_that_of_outputs_on_gaussian_inputs(own):
    one, two = bilinear(1), bilinear(2)
    x = torch.randn(200_000, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sampled = torch.cosine_similarity(own["answers"](one, x), own["answers"](two, x))
    assert own["similarity"](one, two).tolist() == pytest.approx(sampled.tolist(), abs=0.02)


def test_a_decoder_reads_a_code_book_as_it_was_written(own):
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    book = sl.VQ(6, 20)
    with torch.no_grad():
        wrote = book.encode(x).argmax(1)
        assert torch.equal(
            wrote, torch.cdist(x - book.b_dec, book.W_dec).argmin(1)
        )  # mode of words with Gaussian noise
        book.W_dec.copy_(torch.nn.functional.normalize(book.W_dec, dim=1))
    wrote, reads, _ = own["channel"](book, x)
    assert torch.equal(wrote, reads)
    wrote, reads, _ = own["channel"](book, x, book.W_dec.flip(0))
    assert (wrote == reads).float().mean() < 0.2


def test_disagreement_is_bounded_by_the_variational_gap():
    """For any encoder q(i|x) and decoder posterior p(j|x). Let i be drawn from q, and ask whether another draw differs:
    it does with probability 1 − Σq² if that is drawn from q too, and 1 − Σqp if it is drawn from p. The divergence of
    the two mean probabilities is at most the mean of KL(q‖p)."""
    stream = torch.Generator().manual_seed(0)
    for sharp in (0.1, 1.0, 5.0):
        q, p = ((sharp * torch.randn(40, 8, generator=stream, dtype=torch.float64)).softmax(1) for _ in range(2))
        same, other = (float((1 - (q * of).sum(1)).mean()) for of in (q, p))
        divergence = same * math.log(same / other) + (1 - same) * math.log((1 - same) / (1 - other))
        assert 0 < divergence <= float((q * (q / p).log()).sum(1).mean())
