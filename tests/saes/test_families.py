"""Every family once by hand: numbers that follow from its equation on paper, and what is peculiar to it."""

from math import exp, log
from types import SimpleNamespace

import pytest
import torch

import sae_lab as sl
from sae_lab.saes import FAMILIES, losses
from sae_lab.saes.families.batchtopk import widest_gap
from sae_lab.types import Batch
from tests.saes.conftest import make, normal, tokens_for

ALIVE = torch.zeros(3, dtype=torch.bool)


def by_hand(cls, third=-1.0, **config):
    """d_in 2, d_sae 3: features along e1, e2 and their sum, to whose pre ``third`` is added. b_dec is (1, 0)."""
    coder = cls(2, 3, **config)
    with torch.no_grad():
        if not coder.tied:
            coder.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
        coder.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        coder.b_enc.copy_(torch.tensor([0.0, 0.0, third]))
        coder.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return coder


# x - b_dec is (2, 1) and (-1, 3); pre is x1, x2, x1 + x2 - 1
X = torch.tensor([[3.0, 1.0], [0.0, 3.0]])
PRE = torch.tensor([[2.0, 1.0, 2.0], [-1.0, 3.0, 1.0]])
# x - b_dec is (4, 1) and (-8, 9); pre is (4, 1, 4) and (-8, 9, 0): squares, of sums 9 and 9, roots' sums 5 and 3
SQUARES = torch.tensor([[5.0, 1.0], [-7.0, 9.0]])


def terms_of(coder, x=X, progress=1.0, **batch):
    return coder.loss(Batch(x, x, **batch), progress=progress, dead=ALIVE)


def close(tensor, expected, tolerance=2e-6):
    return torch.allclose(tensor, torch.tensor(expected), rtol=0, atol=tolerance)


def test_every_family_is_done_by_hand_here():
    from tests.saes import test_wiring  # what reads one place and writes another, or several, is done there

    done = {**globals(), **vars(test_wiring)}
    assert {name for name in FAMILIES if f"test_{name.lower()}" in done} == set(FAMILIES)


# ---- a ReLU and a penalty


def test_l1():
    coder = by_hand(sl.L1, sparsity=0.5)
    out = coder(X)
    assert torch.equal(out.pre, PRE)
    assert torch.equal(out.f, PRE.clamp_min(0))
    # Row 1: 2·(1,0) + 1·(0,1) + 2·(.6,.8) + (1,0) = (4.2, 2.6); row 2: 3·(0,1) + 1·(.6,.8) + (1,0) = (1.6, 3.8)
    assert close(out.x_hat, [[4.2, 2.6], [1.6, 3.8]])
    terms = terms_of(coder)
    # Errors (1.2, 1.6) and (1.6, .8): squares 4.0 and 3.2, mean 3.6. Codes sum to 5 and 4: 0.5 · 4.5.
    assert terms["mse"].item() == pytest.approx(3.6, rel=1e-6)
    assert terms["sparsity"].item() == pytest.approx(2.25, rel=1e-6)


@pytest.mark.parametrize("name", ["L1", "Gated", "JumpReLU"])
def test_penalties_warm_up(name):
    """Over the first 5 % of training the weight rises from 0."""
    coder = by_hand(FAMILIES[name], sparsity=0.5)
    full = terms_of(coder)["sparsity"].item()
    weights = [terms_of(coder, progress=p)["sparsity"].item() for p in (0.0, 0.025, 0.05, 0.5)]
    assert weights == pytest.approx([0.0, full / 2, full, full], rel=1e-5)


def test_tied():
    coder = by_hand(sl.Tied, sparsity=0.0)
    assert {name for name, _ in coder.named_parameters()} == {"W_dec", "b_enc", "b_dec"}
    x = X[:1]
    out = coder(x)
    # x - b_dec = (2, 1); the third feature reads (.6, .8): 1.2 + .8 - 1 = 1
    assert close(out.pre, [[2.0, 1.0, 1.0]])
    assert close(out.x_hat, [[3.6, 1.8]])  # 2·(1,0) + (0,1) + (.6,.8) + (1,0)
    # The error is (.6, .8). Row 2 of the matrix as a decoder: 2·f·error = (1.2, 1.6); as an encoder:
    # 2·(error·row)·(x - b_dec) = 1.6·(2, 1). It gets both.
    terms_of(coder, x)["mse"].backward()
    assert close(coder.W_dec.grad[1], [4.4, 3.2])


def test_sqrtl1():
    terms = terms_of(by_hand(sl.SqrtL1, sparsity=0.5), SQUARES)
    assert terms["sparsity"].item() == pytest.approx(0.5 * (5 + 3) / 2, rel=1e-6)


def test_roots_are_flat_near_zero():
    """√f has an infinite slope at 0: below 1e-3 a code counts as √.001 and is not pushed."""
    f = torch.tensor([[1e-4, 4.0, 0.0]], requires_grad=True)
    value = losses.lp(f, 0.5)
    value.backward()
    assert value.item() == pytest.approx(0.001**0.5 + 2, rel=1e-6)
    assert close(f.grad, [[0.0, 0.25, 0.0]])  # 1 / 2√4


@pytest.mark.parametrize("name", ["L1", "SqrtL1", "PAnneal", "Hoyer", "SmoothL0", "Tied", "ProLU"])
def test_drop_removes_weak_codes_in_eval(name):
    coder = by_hand(FAMILIES[name], drop=1.05)
    trained = coder(X).f
    assert ((trained > 0) & (trained < 1.05)).any(), "training keeps them: they must have a gradient"
    kept = coder.eval()(X).f
    expected = torch.where(trained > 1.05, trained, 0.0)
    assert torch.equal(kept, expected) and 0 < (kept > 0).sum() < (trained > 0).sum()
    # Codes are in units of activations, and so is what is dropped: trained on 2x, the weights serve x from .525 on.
    coder.fold(2.0)
    assert coder.floor.item() == pytest.approx(0.525)
    assert torch.equal(coder(X / 2).f, expected / 2)


def test_panneal():
    coder = by_hand(sl.PAnneal, sparsity=1.0, p_end=0.5)
    # Σf is 9 in both rows, Σ√f is 5 and 3. While p is 1 this is L1.
    assert terms_of(coder, SQUARES, progress=0.1)["sparsity"].item() == pytest.approx(9.0)
    # p falls to 1/2: the mean of 5 and 3 is 4, and the weight rises by 9/4, so that the penalty does not jump.
    assert terms_of(coder, SQUARES, progress=0.9)["sparsity"].item() == pytest.approx(9.0)
    assert coder.p_weight.item() == pytest.approx(2.25)
    # The weight then stays: the first row alone costs 2.25·5.
    assert terms_of(coder, SQUARES[:1], progress=1.0)["sparsity"].item() == pytest.approx(11.25)


def test_panneal_schedule():
    coder, seen = by_hand(sl.PAnneal, p_end=0.2), {}
    for progress in (0.0, 0.1, 0.14, 0.3, 0.5, 0.7, 0.9, 1.0):
        terms_of(coder, progress=progress)
        seen[progress] = coder.p.item()
    # From 1 to .2 between a tenth and nine tenths: .8 · (progress - .1) / .8, in 20 steps of .04.
    expected = {0.0: 1.0, 0.1: 1.0, 0.14: 0.96, 0.3: 0.8, 0.5: 0.6, 0.7: 0.4, 0.9: 0.2, 1.0: 0.2}
    assert seen == pytest.approx(expected)
    terms_of(coder, progress=0.511)
    assert coder.p.item() == pytest.approx(0.6), "between two steps p stands still"


def test_hoyer():
    coder = by_hand(sl.Hoyer, sparsity=0.5)
    # Codes (2, 1, 2) and (0, 3, 1): 25/9 and 16/10.
    assert terms_of(coder)["sparsity"].item() == pytest.approx(0.5 * (25 / 9 + 1.6) / 2, rel=1e-6)
    alike = torch.tensor([[7.0, 7.0, 0.0]])
    assert losses.hoyer(alike).item() == 2.0, "of codes alike it is their number"
    assert losses.hoyer(torch.cat([alike, 0 * alike])).item() == 1.0, "a row of zeros counts 0"
    # Of f = (2, 1, 2), with a = 5 and b = 9: 2a/b - 2a²f/b² = 10/9 - 50·f/81. Along f itself that is 0.
    f = torch.tensor([[2.0, 1.0, 2.0]], requires_grad=True)
    losses.hoyer(f).backward()
    assert close(f.grad, [[-10 / 81, 40 / 81, -10 / 81]])


def test_smoothl0():
    coder = by_hand(sl.SmoothL0, sparsity=0.5, width=1.0)
    # Codes (2, 1, 2) and (0, 3, 1): five are on; the count says 5 less these.
    missing = 2 * exp(-2) + exp(-0.5) + exp(-4.5) + exp(-0.5)
    assert terms_of(coder)["sparsity"].item() == pytest.approx(0.5 * (5 - missing) / 2, rel=1e-6)
    # Half-way the width is √3 and f²/2w² is f²/6; at the start it is 3 and f²/18.
    half = 2 * exp(-4 / 6) + exp(-1 / 6) + exp(-9 / 6) + exp(-1 / 6)
    assert terms_of(coder, progress=0.5)["sparsity"].item() == pytest.approx(0.5 * (5 - half) / 2, rel=1e-6)
    start = 2 * exp(-4 / 18) + exp(-1 / 18) + exp(-9 / 18) + exp(-1 / 18)
    assert coder.penalty(PRE.relu(), 0.0).item() == pytest.approx((5 - start) / 2, rel=1e-6)


def test_prolu():
    coder = by_hand(sl.ProLU, sparsity=0.5)
    with torch.no_grad():
        coder.b_enc[0] = 2.0
    # m is (2, 1, 3) and (-1, 3, 2); m + b is (4, 1, 2) and (1, 3, 1). Codes are m, the bias only switches; it cannot
    # switch on what is below 0.
    out = coder(X)
    assert torch.equal(out.f, torch.tensor([[2.0, 1.0, 3.0], [0.0, 3.0, 2.0]]))
    # 2·(1,0) + (0,1) + 3·(.6,.8) + (1,0) = (4.8, 3.4); 3·(0,1) + 2·(.6,.8) + (1,0) = (2.2, 4.6)
    assert close(out.x_hat, [[4.8, 3.4], [2.2, 4.6]])
    # Errors (1.8, 2.4) and (2.2, 1.6): 9 and 7.4. Codes sum to 6 and 5.
    terms = terms_of(coder)
    assert terms["mse"].item() == pytest.approx(8.2) and terms["sparsity"].item() == pytest.approx(0.5 * 5.5)
    out.f.sum().backward()
    assert coder.b_enc.grad.tolist() == [1.0, 2.0, 2.0], "for each row where the feature is on, as in a ReLU"


def test_gated():
    coder = by_hand(sl.Gated, sparsity=0.5)
    with torch.no_grad():
        coder.r_mag[0] = log(2)
        coder.b_mag.copy_(torch.tensor([0.0, -1.5, 0.5]))
    # The gate is open where (2, 1, 2) and (-1, 3, 1) are above 0. Without the gate's bias: m = (2, 1, 3), (-1, 3, 2).
    # Strength is 2m, m - 1.5, m + .5: (4, -.5, 3.5) and (-2, 1.5, 2.5).
    out = coder(X)
    assert close(out.f, [[4.0, 0.0, 3.5], [0.0, 1.5, 2.5]])
    # 4·(1,0) + 3.5·(.6,.8) + (1,0) = (7.1, 2.8); 1.5·(0,1) + 2.5·(.6,.8) + (1,0) = (2.5, 3.5)
    assert close(out.x_hat, [[7.1, 2.8], [2.5, 3.5]])
    terms = terms_of(coder)
    # Errors (4.1, 1.8) and (2.5, .5): 20.05 and 6.5. The other two see the open gates as L1 sees its codes.
    assert {n: t.item() for n, t in terms.items()} == pytest.approx({"mse": 13.275, "sparsity": 2.25, "gate": 3.6})


def test_who_teaches_the_gate():
    """The penalty and the gate's own error never touch strengths nor the decoder; the true error never the gate."""
    for name, untouched in {
        "mse": ("b_enc",),
        "sparsity": ("r_mag", "b_mag", "W_dec"),
        "gate": ("r_mag", "b_mag", "W_dec"),
    }.items():
        coder = by_hand(sl.Gated)
        terms_of(coder)[name].backward()
        for parameter in untouched:
            gradient = coder.get_parameter(parameter).grad
            assert gradient is None or not gradient.any(), (name, parameter)
        assert coder.W_enc.grad.any()


def jumping(bandwidth):
    coder = by_hand(sl.JumpReLU, sparsity=0.5, bandwidth=bandwidth)
    with torch.no_grad():
        coder.threshold.copy_(torch.tensor([1.5, 1.0, 1.5]))
    return coder


def test_jumprelu():
    coder = jumping(1.25)
    # pre is (2, 1, 2) and (-1, 3, 1): what exceeds the threshold passes whole, what equals it does not.
    out = coder(X)
    assert torch.equal(out.f, torch.tensor([[2.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    # 2·(1,0) + 2·(.6,.8) + (1,0) = (4.2, 1.6); 3·(0,1) + (1,0) = (1, 3)
    assert close(out.x_hat, [[4.2, 1.6], [1.0, 3.0]])
    terms = terms_of(coder)
    # Errors (1.2, .6) and (1, 0): 1.8 and 1. Two features and one: 0.5 · 1.5.
    assert terms["mse"].item() == pytest.approx(1.4) and terms["sparsity"].item() == pytest.approx(0.75)


def test_the_gradient_of_a_threshold():
    """−θ/ε·∂loss/∂f and −1/ε where |pre − θ| < ε/2, whichever side; 0 elsewhere."""

    def gradient(bandwidth, name):
        coder = jumping(bandwidth)
        terms_of(coder)[name].backward()
        return coder.threshold.grad

    # pre - θ is (.5, 0, .5) and (-2.5, 2, -.5). With ε/2 = .625 the first row and the last of the second are near: one,
    # one and two of the three features. An active feature costs .5 / 2 rows, and 1/ε is .8.
    assert close(gradient(1.25, "sparsity"), [-0.2, -0.2, -0.4])
    # ∂mse/∂f = error·row of W_dec (2 from the square, 1/2 from the rows): (1.2, .6, 1.2) and (1, 0, .6).
    # θ·.8 times what is near: 1.5·.8·1.2, 1·.8·.6, 1.5·.8·(1.2 + .6).
    assert close(gradient(1.25, "mse"), [-1.44, -0.48, -2.16])
    # With ε/2 = .25 only the 1 that equals its threshold is near; 1/ε is 2.
    assert close(gradient(0.5, "sparsity"), [0.0, -0.5, 0.0])
    assert close(gradient(0.5, "mse"), [0.0, -1.2, 0.0])


def test_a_threshold_never_falls_below_zero():
    coder = jumping(1.0)
    with torch.no_grad():
        coder.threshold[0] = -0.3
    coder.project()
    assert coder.threshold.tolist() == [0.0, 1.0, 1.5]


# ---- the k largest. With third=-.5 pre is (2, 1, 2.5) and (-1, 3, 1.5)


def test_topk():
    coder = by_hand(sl.TopK, third=-0.5, k=1)
    out = coder(X)
    assert torch.equal(out.f, torch.tensor([[0.0, 0.0, 2.5], [0.0, 3.0, 0.0]]))
    # 2.5·(.6,.8) + (1,0) = (2.5, 2.0); 3·(0,1) + (1,0) = (1, 3)
    assert close(out.x_hat, [[2.5, 2.0], [1.0, 3.0]])
    # Errors (-.5, 1) and (1, 0): 1.25 and 1.
    assert terms_of(coder, progress=0.0)["mse"].item() == pytest.approx(1.125, rel=1e-6)


def test_multi_topk():
    terms = terms_of(by_hand(sl.TopK, third=-0.5, k=1, multi=2))
    assert terms["mse"].item() == pytest.approx(1.125)
    # The two largest: 2·(1,0) + 2.5·(.6,.8) + (1,0) = (4.5, 2), 3·(0,1) + 1.5·(.6,.8) + (1,0) = (1.9, 4.2).
    # Errors (1.5, 1) and (1.9, 1.2): 3.25 and 5.05, mean 4.15, an eighth of it.
    assert terms["multi"].item() == pytest.approx(4.15 / 8)
    assert "multi" not in terms_of(by_hand(sl.TopK, k=1))
    # More than there is means all: (4.5, 3) and (1.9, 4.2), errors 2.25 + 4 and 5.05.
    everything = terms_of(by_hand(sl.TopK, third=-0.5, k=2, multi=2))["multi"]
    assert everything.item() == pytest.approx((6.25 + 5.05) / 2 / 8)


def test_topk_never_writes_negative_codes():
    coder = by_hand(sl.TopK, k=3)
    f = coder(X).f
    assert torch.equal(f, PRE.clamp_min(0)), "-1 is among the three largest and still no activation"


def test_leakytopk():
    coder = by_hand(sl.LeakyTopK, third=-0.5, k=1, leak=0.2)
    # At the start a fifth of the others passes: (.4, .2, 2.5) and (0, 3, .3).
    # .4·(1,0) + .2·(0,1) + 2.5·(.6,.8) + (1,0) = (2.9, 2.2); 3·(0,1) + .3·(.6,.8) + (1,0) = (1.18, 3.24).
    # Errors (-.1, 1.2) and (1.18, .24): 1.45 and 1.45.
    assert terms_of(coder, progress=0.0)["mse"].item() == pytest.approx(1.45, rel=1e-6)
    assert close(coder(X).f, [[0.4, 0.2, 2.5], [0.0, 3.0, 0.3]])
    terms_of(coder, progress=0.5)
    assert close(coder(X).f, [[0.2, 0.1, 2.5], [0.0, 3.0, 0.15]])
    assert close(coder.eval()(X).f, [[0.0, 0.0, 2.5], [0.0, 3.0, 0.0]]), "eval mode is TopK, however far training is"
    assert terms_of(coder.train(), progress=1.0)["mse"].item() == pytest.approx(1.125, rel=1e-6), "and so is its end"


def test_batchtopk():
    coder = by_hand(sl.BatchTopK, k=1)
    with torch.no_grad():
        coder.b_enc[0] = 0.5  # pre: (2.5, 1, 2), (-.5, 3, 1)
    # Training: the two largest of the batch, 3 and 2.5. With the second row tripled, both are its own.
    assert torch.equal(coder(X).f, torch.tensor([[2.5, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    loud = torch.stack([X[0], torch.tensor([-2.0, 9.0])])  # pre of the second row: (-2.5, 9, 5)
    assert torch.equal(coder(loud).f, torch.tensor([[0.0, 0.0, 0.0], [0.0, 9.0, 5.0]]))
    # Threshold: of both blocks' codes 9, 5, 3, 2.5, 2.5, 2 ... the four largest. The fourth is the fifth's equal: they
    # fall together, and the threshold lies between them and 3.
    coder.calibrate([X, loud])
    assert coder.threshold.item() == pytest.approx(2.75)
    assert torch.equal(coder.encode(loud), torch.tensor([[0.0, 0.0, 0.0], [0.0, 9.0, 5.0]]))
    assert torch.equal(coder.encode(X), torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    # Of the second block alone 9 and 5, and halfway from 5 to 2.5; however the rows are cut.
    for blocks in ([loud], [loud[:1], loud[1:]], [loud[1:], loud[:1]]):
        coder.calibrate(blocks)
        assert coder.threshold.item() == pytest.approx(3.75)


def test_the_widest_gap():
    values = torch.tensor([0.5, 4.0, 1.0, 3.5, 2.0, 1.9])  # in order .5, 1, 1.9, 2, 3.5, 4
    for n, spare, middle in (
        (1, 0, 3.75), (2, 0, 2.75), (3, 0, 1.95), (5, 0, 0.75),
        (3, 1, 2.75),  # between 2 and 3.5 rather than 1.9 and 2
        (4, 1, 1.45), (3, 9, 2.75), (2, 1, 2.75),
        (6, 0, 0.0), (7, 0, 0.0), (7, 2, 0.0),  # all stay on
    ):  # fmt: skip
        assert float(widest_gap(values, n, spare)) == pytest.approx(middle), (n, spare)
    assert float(widest_gap(torch.tensor([2.0, 3.0, 2.0, 2.0]), 2, 0)) == 2.5, "equal codes fall together"
    assert float(widest_gap(torch.tensor([2.0, 2.0, 2.0]), 2, 0)) == 2.0, "and so do all"


@pytest.mark.parametrize("family", ["BatchTopK", "Crosscoder", "Transcoder", "Matryoshka"])
def test_other_rounding_turns_no_code_on_or_off(family):
    """The sums in another order, one by one and in float64, and of few rows, whose codes lie further apart, with
    activations and weights of float16: the same codes stand above the threshold. The control is a threshold at the
    least code chosen, where the paper puts it."""
    coder, x = make(family), tokens_for(family, 4096, seed=1)
    coder.calibrate(x.split(1000))
    weights, bias, rows = coder.W_enc.detach(), coder.read_bias().detach(), x.flatten(1)
    here = coder.codes(x).dense() > 0
    assert int(here.sum()) == pytest.approx(4 * 4096, rel=1e-3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    others = {
        "order": rows[:, order] @ weights[order] + bias,
        "one by one": sum(rows[:, i : i + 1] * weights[i] for i in range(16)) + bias,
        "float64": rows.double() @ weights.double() + bias.double(),
    }
    for name, pre in others.items():
        assert torch.equal(pre > coder.threshold, here), name
    least = (rows @ weights + bias)[here].min()
    assert any(bool((pre > least).ne(here).any()) for pre in others.values()), "the control"
    few = x[:12]
    coder.calibrate([few])
    in_half = few.flatten(1).half().float() @ weights.half().float() + bias.half().float()
    assert torch.equal(in_half > coder.threshold, coder.codes(few).dense() > 0)
    assert not torch.equal(in_half, few.flatten(1) @ weights + bias), "it does round otherwise"


def test_batchtopk_fits_its_threshold_on_what_training_never_saw():
    coder = by_hand(sl.BatchTopK, k=1)
    coder.calibrate([X], unseen=torch.tensor([[11.0, 0.0], [21.0, 0.0]]))  # pre: (10, 0, 9), (20, 0, 19)
    assert coder.threshold.item() == 14.5  # halfway from 19 to 10
    assert coder.f_scale.tolist() == [0.0, 0.0, 0.0], "scales come from the training rows, on which nothing fires now"


def test_batchtopk_keeps_its_l0_on_new_rows():
    coder = make("BatchTopK")
    coder.calibrate([normal(4096, 16, seed=1)])
    l0 = float((coder.encode(normal(4096, 16, seed=2)) > 0).sum(1).float().mean())
    assert abs(l0 - 4) < 0.05 * 4  # the standard error of 4096 rows is about .03


# Two features a token, chosen over the batch: 3, 2.5, 2 and 1.5, so (2, 0, 2.5) and (0, 3, 1.5). What prefixes leave:
# one feature:  2·(1,0) + (1,0) = (3, 0) and (1, 0): errors (0, -1), (1, -3): 1 and 10, mean 5.5
# two:          (3, 0) and 3·(0,1) + (1,0) = (1, 3): 1 and 1, mean 1
# three:        (4.5, 2) and (1.9, 4.2), as in multi-TopK above: mean 4.15


def test_matryoshka():
    coder = by_hand(sl.Matryoshka, third=-0.5, k=2, prefixes=(1, 3))
    assert close(coder(X).f, [[2.0, 0.0, 2.5], [0.0, 3.0, 1.5]])
    assert terms_of(coder)["mse"].item() == pytest.approx((5.5 + 4.15) / 2, rel=1e-6)
    assert sl.Matryoshka(2, 32).prefixes == (2, 4, 8, 16, 32)


def test_ordered():
    coder = by_hand(sl.Ordered, third=-0.5, k=2)
    assert terms_of(coder)["mse"].item() == pytest.approx((5.5 + 1 + 4.15) / 3, rel=1e-6)


def test_ordered_starts_with_more_features():
    coder = by_hand(sl.Ordered, k=1, k_start=3)
    kept = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        terms_of(coder, progress=progress)
        kept.append(len(coder.codes(X).values))  # of two rows
    assert kept == [6, 4, 2, 2]
    coder.progress = 0.0
    coder.calibrate([X])
    assert (coder.encode(X) > 0).sum() < 6, "eval mode has its threshold"
    assert sl.Ordered(2, 64, k=8).k_start == 32 and sl.Ordered(2, 20, k=8).k_start == 20


def test_spline():
    coder = by_hand(sl.Spline, third=-0.5, k=1, knots=3, span=2.0)
    assert torch.equal(coder(X).f, by_hand(sl.TopK, third=-0.5, k=1)(X).f), "it starts as TopK"
    with torch.no_grad():
        coder.bend[0, 2] = 1.0
        coder.bend[1] = torch.tensor([0.0, 1.0, -1.0])
    # Knots at -2, 0 and 2. h(2) = 2 + 1 of the first feature. Of the second h(1) = 1 + (1 - 1)/2 and, past the last
    # knot, h(3) = 3 - 1. The third is straight: (3, 1, 2.5) and (-1, 2, 1.5), so another feature wins than in TopK.
    f = coder(X).f
    assert torch.equal(f, torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    f.sum().backward()
    assert coder.bend.grad.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    with torch.no_grad():
        coder.bend[0] = torch.tensor([0.0, 4.0, 1.0])
    # x - b_dec = (1.5, 0): a quarter of the hat at 0 and three of the one at 2 (and 1 for the third, which is straight)
    assert coder(torch.tensor([[2.5, 0.0]])).f.tolist() == [[1.5 + 4 / 4 + 3 / 4, 0.0, 0.0]]


def switching():
    """Two experts of two features along e1 and e2. A token with x1 = 2 goes to the first with probability 3/4, one
    with x1 = 0 to the second with as much: logits log 3·(x1 - 1) and 0."""
    coder = sl.Switch(2, 4, k=1, experts=2, balance=0.5)
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(2).repeat(1, 2))
        coder.W_dec.copy_(torch.eye(2).repeat(2, 1))
        coder.W_router.copy_(torch.tensor([[log(3), 0.0], [0.0, 0.0]]))
        coder.b_router.copy_(torch.tensor([1.0, 7.0]))
    return coder


def test_switch():
    coder, x = switching(), torch.tensor([[2.0, 5.0], [0.0, 3.0]])
    out = coder(x)
    assert torch.equal(out.pre, torch.tensor([[2.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]])), "only one expert's part"
    assert close(out.f, [[0.0, 3.75, 0.0, 0.0], [0.0, 0.0, 0.0, 2.25]])
    terms = terms_of(coder, x)
    # Errors (-2, -1.25) and (0, -.75): 5.5625 and .5625. The experts share alike, and so do the mean probabilities:
    # 2 experts · (1/2·1/2 + 1/2·1/2) = 1, times .5 for each of 2 dimensions.
    assert terms["mse"].item() == pytest.approx(3.0625) and terms["balance"].item() == pytest.approx(1.0)
    # All to the first, with mean probabilities 3/4 and 1/4: 2·(1·3/4)
    assert terms_of(coder, x[:1])["balance"].item() == pytest.approx(1.5)


def test_the_router_of_a_switch_starts_at_the_geometric_median():
    """Of x, of which it is taken: three of these points lie at (4, 4). What is set stays."""
    x, y = torch.tensor([[4.0, 4.0]] * 3 + [[9.0, -5.0]]), torch.tensor([[1.0, 2.0, 3.0]] * 4)
    for coder, target in ((sl.Switch(2, 4, k=1, experts=2), x), (sl.Switch(2, 4, k=1, experts=2, d_out=3), y)):
        coder.begin(Batch(x, target))
        assert torch.allclose(coder.b_router, torch.tensor([4.0, 4.0]), atol=1e-3)
        assert torch.allclose(coder.b_dec, target[0], atol=1e-3)
    coder = switching()
    coder.begin(Batch(x, x))
    assert coder.b_router.tolist() == [1.0, 7.0]


def test_tokenized():
    coder = by_hand(sl.Tokenized, third=-0.5, k=1, vocab=3)
    lookup = torch.tensor([[0.0, 0.0], [1.0, -1.0], [10.0, 10.0]])
    with torch.no_grad():
        coder.lookup.copy_(lookup)
    ids = torch.tensor([1, 0])
    out = coder(X, ids)
    # The two largest, 3 and 2.5, are those of TopK, and so are (2.5, 2) and (1, 3); token 1 adds (1, -1).
    assert close(out.x_hat, [[3.5, 1.0], [1.0, 3.0]])
    assert torch.equal(coder.encode(X), out.f), "codes know nothing of tokens"
    # Errors (.5, 0) and (1, 0)
    terms = terms_of(coder, tokens=ids)
    assert terms["mse"].item() == pytest.approx(0.625)
    terms["mse"].backward()
    assert close(coder.lookup.grad, [[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])


def test_tokenized_begins_with_the_mean_of_each_token():
    coder = by_hand(sl.Tokenized, k=1, vocab=3)
    rows = torch.tensor([[3.0, 1.0], [0.0, 3.0], [6.0, 5.0]])
    coder.begin(Batch(rows, rows, torch.tensor([1, 1, 0])))
    # Less b_dec: (2, 1), (-1, 3) and (5, 5). Sums by token, over one more than their number.
    assert close(coder.lookup, [[2.5, 2.5], [1 / 3, 4 / 3], [0.0, 0.0]])
    coder.begin(Batch(rows, rows, torch.tensor([2, 2, 2])))
    assert not coder.lookup[2].any(), "what is set stays"


# ---- other shapes


def test_matrixsae():
    coder = sl.MatrixSAE(6, 2, rows=2, k=1)
    assert coder.V.shape == (2, 2) and coder.W.shape == (2, 3)
    with torch.no_grad():
        coder.V.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
        coder.W.copy_(torch.tensor([[0.0, 0.0, 1.0], [0.8, 0.6, 0.0]]))
        coder.W_enc.copy_(coder.W_dec.T)
    # v⊗w, row by row: the first atom stands at row 0, column 2; the second is .6 and .8 times (.8, .6, 0).
    assert close(coder.W_dec, [[0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [0.48, 0.36, 0.0, 0.64, 0.48, 0.0]])
    x = torch.tensor([[0.0, 0.0, 2.0, 0.0, 0.0, 5.0], [4.8, 3.6, 1.0, 6.4, 4.8, 0.0]])
    out = coder(x)
    assert close(out.f, [[2.0, 0.0], [0.0, 10.0]])
    assert close(out.x_hat, [[0.0, 0.0, 2.0, 0.0, 0.0, 0.0], [4.8, 3.6, 0.0, 6.4, 4.8, 0.0]], 1e-5)
    assert coder.loss(Batch(x, x), progress=1.0, dead=ALIVE[:2])["mse"].item() == pytest.approx((25 + 1) / 2)
    with torch.no_grad():
        coder.V *= 3
    coder.project()
    assert close(coder.V, [[1.0, 0.0], [0.6, 0.8]])


def quantising():
    coder = sl.VQ(2, 3)
    with torch.no_grad():
        coder.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
        coder.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return coder


def test_vq():
    coder = quantising()
    out = coder(X)
    # From (2, 1) the words are 2, 5 and 10 away, squared; from (-1, 3) 13, 2 and 17.
    assert torch.equal(out.f, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert torch.equal(out.x_hat, torch.tensor([[2.0, 0.0], [1.0, 2.0]]))
    # pre = (x - b)·w - ‖w‖²/2, with ‖w‖² = 1, 4, 25; so ‖x - b‖² - 2·pre are the distances above: 5 - 2·1.5 = 2, ...
    assert torch.equal(out.pre, torch.tensor([[1.5, 0.0, -2.5], [-1.5, 4.0, -3.5]]))
    terms = terms_of(coder)
    assert terms["mse"].item() == 2.0  # errors (-1, -1) and (1, -1)
    terms["mse"].backward()
    assert coder.W_dec.grad.tolist() == [[-1.0, -1.0], [1.0, -1.0], [0.0, 0.0]], "each word is drawn to its tokens"
    coder.project()
    assert coder.W_dec.norm(dim=1).tolist() == [1.0, 2.0, 5.0], "words keep their length"
    coder.fold(2.0)
    assert torch.equal(coder(X / 2).f, out.f) and torch.equal(coder(X / 2).x_hat, out.x_hat / 2)


def test_vq_begins_with_tokens():
    coder, rows = sl.VQ(4, 10), normal(50, 4)
    coder.begin(Batch(rows, rows))
    nearest = torch.cdist(coder.W_dec + coder.b_dec, rows).min(1)
    assert nearest.values.max() < 1e-6 and len(nearest.indices.unique()) > 5


def test_a_trained_code_book_is_kept():
    """``begin`` runs again where a trained coder is trained on."""
    coder = quantising()
    book = coder.W_dec.detach().clone()
    coder.begin(Batch(X, X))
    assert torch.equal(coder.W_dec, book)


# ---- what several share


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


@pytest.mark.parametrize("name", FAMILIES)
def test_help_begins_with_a_call_that_works(name):
    lm = SimpleNamespace(tokenizer=range(20))
    call = FAMILIES[name].__doc__.removeprefix("``").split("``")[0]
    with torch.device("meta"):  # shapes alone
        coder = eval(call, {"sl": sl, "lm": lm})
    assert type(coder).__name__ == name and coder.d_sae == 4608
    assert "f = " in FAMILIES[name].__doc__ or "f as of" in FAMILIES[name].__doc__
