"""One case per family that can be done by hand, and what is peculiar to each."""

import pytest
import torch

import sae_lab as sl
from sae_lab.saes import FAMILIES, losses
from sae_lab.types import Batch
from tests.saes.conftest import make, normal

ALIVE = torch.zeros(3, dtype=torch.bool)


def by_hand(cls, **config):
    """d_in 2, d_sae 3: features along e1, e2 and their sum; the third needs 1 before it fires. b_dec is (1, 0)."""
    coder = cls(2, 3, **config)
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
        coder.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        coder.b_enc.copy_(torch.tensor([0.0, 0.0, -1.0]))
        coder.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return coder


# x - b_dec is (2, 1) and (-1, 3); pre is x1, x2, x1 + x2 - 1
X = torch.tensor([[3.0, 1.0], [0.0, 3.0]])
PRE = torch.tensor([[2.0, 1.0, 2.0], [-1.0, 3.0, 1.0]])


def test_every_family_is_done_by_hand_here():
    assert {"L1", "TopK", "BatchTopK"} == set(FAMILIES)


def test_l1():
    coder = by_hand(sl.L1, sparsity=0.5)
    out = coder(X)
    assert torch.equal(out.pre, PRE)
    assert torch.equal(out.f, PRE.clamp_min(0))
    # Row 1: 2·(1,0) + 1·(0,1) + 2·(.6,.8) + (1,0) = (4.2, 2.6); row 2: 3·(0,1) + 1·(.6,.8) + (1,0) = (1.6, 3.8)
    assert torch.allclose(out.x_hat, torch.tensor([[4.2, 2.6], [1.6, 3.8]]), atol=1e-6)
    terms = coder.loss(Batch(X, X), progress=1.0, dead=ALIVE)
    # Errors (1.2, 1.6) and (1.6, .8): squares 4.0 and 3.2, mean 3.6. Codes sum to 5 and 4: 0.5 · 4.5.
    assert terms["mse"].item() == pytest.approx(3.6, rel=1e-6)
    assert terms["sparsity"].item() == pytest.approx(2.25, rel=1e-6)


def test_l1_warms_up():
    """Over the first 5 % of training the weight rises from 0."""
    coder = by_hand(sl.L1, sparsity=0.5)
    weights = [coder.loss(Batch(X, X), progress=p, dead=ALIVE)["sparsity"].item() for p in (0.0, 0.025, 0.05, 0.5)]
    assert weights == pytest.approx([0.0, 1.125, 2.25, 2.25], rel=1e-5)


def test_topk():
    coder = by_hand(sl.TopK, k=1)
    with torch.no_grad():
        coder.b_enc[2] = -0.5  # pre of the third: 2.5 and 1.5
    out = coder(X)
    assert torch.equal(out.f, torch.tensor([[0.0, 0.0, 2.5], [0.0, 3.0, 0.0]]))
    # 2.5·(.6,.8) + (1,0) = (2.5, 2.0); 3·(0,1) + (1,0) = (1, 3)
    assert torch.allclose(out.x_hat, torch.tensor([[2.5, 2.0], [1.0, 3.0]]), atol=1e-6)
    # Errors (-.5, 1) and (1, 0): 1.25 and 1.
    assert coder.loss(Batch(X, X), progress=0.0, dead=ALIVE)["mse"].item() == pytest.approx(1.125, rel=1e-6)


def test_topk_never_writes_negative_codes():
    coder = by_hand(sl.TopK, k=3)
    f = coder(X).f
    assert torch.equal(f, PRE.clamp_min(0)), "-1 is among the three largest and still no activation"


def test_batchtopk():
    coder = by_hand(sl.BatchTopK, k=1)
    with torch.no_grad():
        coder.b_enc[0] = 0.5  # pre: (2.5, 1, 2), (-.5, 3, 1)
    # Training: the two largest of the batch, 3 and 2.5. With the second row tripled, both are its own.
    assert torch.equal(coder(X).f, torch.tensor([[2.5, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    loud = torch.stack([X[0], torch.tensor([-2.0, 9.0])])  # pre of the second row: (-2.5, 9, 5)
    assert torch.equal(coder(loud).f, torch.tensor([[0.0, 0.0, 0.0], [0.0, 9.0, 5.0]]))
    # Threshold: the smallest code chosen in each block, 2.5 and 5, averaged over as many rows.
    coder.calibrate([X, loud])
    assert coder.threshold.item() == pytest.approx(3.75)
    assert torch.equal(coder.encode(loud), torch.tensor([[0.0, 0.0, 0.0], [0.0, 9.0, 5.0]]))
    assert torch.equal(coder.encode(X), torch.zeros(2, 3)), "2.5 and 3 are below 3.75"


def test_batchtopk_fits_its_threshold_on_what_training_never_saw():
    coder = by_hand(sl.BatchTopK, k=1)
    coder.calibrate([X], unseen=torch.tensor([[11.0, 0.0], [21.0, 0.0]]))  # pre: (10, 0, 9), (20, 0, 19)
    assert coder.threshold.item() == 19.0
    assert coder.f_scale.tolist() == [0.0, 0.0, 0.0], "scales come from the training rows, on which nothing fires now"


def test_batchtopk_keeps_its_l0_on_new_rows():
    coder = make("BatchTopK")
    coder.calibrate([normal(4096, 16, seed=1)])
    l0 = float((coder.encode(normal(4096, 16, seed=2)) > 0).sum(1).float().mean())
    assert abs(l0 - 4) < 0.05 * 4  # the standard error of 4096 rows is about .03


def test_losses_by_hand():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    assert losses.mse(a, b).item() == 5.0  # (1 + 9) / 2
    # variance around (1.5, 1.5): 2.25 + .25 + 2.25 + .25 = 5
    assert losses.fvu(a, b).item() == 2.0
    assert losses.l1(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])).item() == 2.0


def test_geometric_median():
    # Of a point held by most of the rows it is that point, however far the others lie; the mean would be (20, 20).
    x = torch.tensor([[0.0, 0.0]] * 4 + [[100.0, 100.0]])
    assert losses.geometric_median(x, steps=60).norm() < 0.1
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]) + 5
    assert torch.allclose(losses.geometric_median(square), torch.tensor([5.0, 5.0]), atol=1e-5)
