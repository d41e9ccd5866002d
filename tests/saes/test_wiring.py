"""What coders read and write: transcoders and crosscoders by hand; units; prefixes; arguments that are refused."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sae_lab as sl
from sae_lab.saes import FAMILIES, losses
from sae_lab.types import Batch, Codes
from tests.saes.conftest import D_IN, D_SAE, SPECS, WIDTHS, ids_for, make, normal, tokens_for
from tests.saes.test_contract import near
from tests.saes.test_families import ALIVE, by_hand, close


def transcoding(cls):
    """From 2 to 3 dimensions, two features: x1 writes (1, 0, 0), x2 - 1 writes (0, .6, .8). b_dec is (1, 1, 0)."""
    coder = cls(2, 2, k=1, d_out=3)
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(2))
        coder.W_dec.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]]))
        coder.b_enc.copy_(torch.tensor([0.0, -1.0]))
        coder.b_dec.copy_(torch.tensor([1.0, 1.0, 0.0]))
    return coder, torch.tensor([[3.0, 1.0], [0.0, 6.0]]), torch.tensor([[4.0, 1.0, 1.0], [1.0, 4.0, 4.0]])


def test_transcoder():
    coder, x, y = transcoding(sl.Transcoder)
    out = coder(x)
    assert torch.equal(out.pre, torch.tensor([[3.0, 0.0], [0.0, 5.0]])), "nothing is subtracted from x"
    assert close(out.x_hat, [[4.0, 1.0, 0.0], [1.0, 4.0, 4.0]])  # 3·(1,0,0) and 5·(0,.6,.8), plus b_dec
    loss = coder.loss(Batch(x, y), progress=1.0, dead=ALIVE[:2])["mse"]
    assert loss.item() == pytest.approx(0.5)  # one number of six is off, by 1, over two rows


def test_skiptranscoder():
    coder, x, y = transcoding(sl.SkipTranscoder)
    assert not coder.W_skip.any(), "it starts without"
    with torch.no_grad():
        coder.W_skip.copy_(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    out = coder(x)
    # x1 is added to the second dimension and x2 to the third; features and all else as before.
    assert close(out.x_hat, [[4.0, 4.0, 1.0], [1.0, 4.0, 10.0]])
    assert close(coder.decode(out.f), [[4.0, 1.0, 0.0], [1.0, 4.0, 4.0]]), "a skip cannot be decoded from codes"
    loss = coder.loss(Batch(x, y), progress=1.0, dead=ALIVE[:2])["mse"]
    assert loss.item() == pytest.approx((9 + 36) / 2)


def test_crosscoder():
    coder = sl.Crosscoder(2, 2, layers=2, k=1)
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, -1.0]]).T)
        coder.W_dec.copy_(torch.tensor([[0.6, 0.0, 0.8, 0.0], [0.0, 0.6, 0.0, 0.8]]))
        coder.b_enc.copy_(torch.tensor([0.0, -1.0]))
        coder.b_dec.copy_(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    x = torch.tensor([[[3.0, 1.0], [1.0, 2.0]], [[1.0, 4.0], [0.0, 1.0]]])
    out = coder(x)
    # Less b_dec, layer beside layer: (2, 1, 1, 1) and (0, 4, 0, 0). The first feature adds the first dimensions of
    # both layers, the second takes the second layer's from the first's, less 1.
    assert torch.equal(out.pre, torch.tensor([[3.0, -1.0], [0.0, 3.0]]))
    # 3·(.6, 0, .8, 0) + b_dec and 3·(0, .6, 0, .8) + b_dec
    assert close(out.x_hat, [[[2.8, 0.0], [2.4, 1.0]], [[1.0, 1.8], [0.0, 3.4]]])
    # Errors (-.2, -1, 1.4, -1) and (0, -2.2, 0, 2.4): 4 and 10.6, the layers' errors added up.
    assert coder.loss(Batch(x, x), progress=1.0, dead=ALIVE[:2])["mse"].item() == pytest.approx(7.3)
    assert close(coder.decoder_norms, [[0.6, 0.8], [0.6, 0.8]])


def two_features():
    """Two layers of one dimension: the first feature writes 1 to the first layer, the second .6 and .8 to both."""
    coder = sl.Crosscoder(1, 2, layers=2, k=1, selection="decoder_norms", norm_penalty=0.5)
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(2))
        coder.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    return coder


def test_crosscoder_by_the_sum_of_decoder_norms():
    # pre is x; times the norms (5, 5.6) and (4.5, 5.6): 5.6 twice, where the codes alone say 5 and 4.5
    coder, x = two_features(), torch.tensor([[[5.0], [4.0]], [[4.5], [4.0]]])
    assert torch.equal(coder(x).f, torch.tensor([[0.0, 4.0], [0.0, 4.0]]))
    plain = sl.Crosscoder(1, 2, layers=2, k=1)
    plain.load_state_dict({n: coder.state_dict()[n] for n in plain.state_dict() if n != "threshold"}, strict=False)
    assert torch.equal(plain(x).f, torch.tensor([[5.0, 0.0], [4.5, 0.0]])), "the control"
    # The penalty: of both rows 4·1.4, half of it.
    terms = coder.loss(Batch(x, x), progress=1.0, dead=ALIVE[:2])
    assert terms["sparsity"].item() == pytest.approx(0.5 * 4 * 1.4)
    assert "sparsity" not in plain.loss(Batch(x, x), progress=1.0, dead=ALIVE[:2])
    terms["sparsity"].backward()
    # d/dW of .5·mean f·(|w1| + |w2|) = .5·4·sign, of the second feature alone
    assert close(coder.W_dec.grad, [[0.0, 0.0], [2.0, 2.0]])
    # The threshold lies halfway between 5.6 and 5, and is a number a feature: 5.3 and 5.3/1.4.
    coder.calibrate([x])
    assert close(coder.threshold, [5.3, 5.3 / 1.4])
    assert torch.equal(coder.encode(x), torch.tensor([[0.0, 4.0], [0.0, 4.0]]))


def test_the_penalty_alone_is_that_of_lindsey_et_al():
    """With k = d_sae all codes above 0 are on: ‖x − x̂‖² + λ·Σ_i f_i·Σ_l ‖W_dec[i, l]‖ of a plain ReLU; and zero blocks
    of W_dec have a gradient of 0."""
    coder = make("Crosscoder", k=40, norm_penalty=0.3, causal=True)
    x = tokens_for("Crosscoder", 24, seed=9)
    terms = coder.loss(Batch(x, x), progress=1.0, dead=torch.zeros(40, dtype=torch.bool))
    f = ((x.flatten(1) - coder.b_dec) @ coder.W_enc + coder.b_enc).relu()
    norms = coder.decoder_norms.sum(1)
    assert terms["sparsity"].item() == pytest.approx(0.3 * (f * norms).sum(1).mean().item(), rel=1e-5)
    error = f @ coder.W_dec + coder.b_dec - x.flatten(1)
    assert terms["mse"].item() == pytest.approx(error.pow(2).sum(1).mean().item())
    sum(terms.values()).backward()
    assert (coder.decoder_norms == 0).any() and bool(coder.W_dec.grad.isfinite().all())


def test_a_crosscoder_by_norms_is_saved_and_loaded(tmp_path):
    coder = make("Crosscoder", selection="decoder_norms", norm_penalty=0.25)
    x = tokens_for("Crosscoder", 512, seed=8)
    coder.calibrate([x])
    coder.fold(torch.tensor([4.0, 0.1]))
    again = sl.load(coder.save(tmp_path / "coder"))
    assert again.config == coder.config and again.selection == "decoder_norms" and again.norm_penalty == 0.25
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in coder.state_dict().items())
    small = x / torch.tensor([4.0, 0.1])[:, None]
    assert torch.equal(again.encode(small), coder.encode(small)) and bool((again.encode(small) > 0).any())
    assert not torch.equal(again.train().encode(small), again.eval().encode(small))
    with torch.no_grad():
        again.threshold.fill_(0)
    again.calibrate([small])  # in raw units it finds what training's units gave
    assert near(again.threshold, coder.threshold)
    assert "selection" not in make("Crosscoder").config, "coders of before have no such words"


def test_causal_crosscoder():
    """Of 3 layers and 6 features, features 0 and 1 read layer 0 and write to all, 2 and 3 read layer 1 and write to 1
    and 2, 4 and 5 read and write layer 2."""
    reads = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    writes = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]).bool()
    coder = sl.Crosscoder(4, 6, layers=3, k=3, causal=True)
    for _ in range(2):
        assert torch.equal(coder.W_enc.detach().view(3, 4, 6).norm(dim=1) > 0, reads)
        assert torch.equal(coder.decoder_norms > 0, writes)
        assert torch.allclose(coder.W_dec.norm(dim=1), torch.ones(6))
        optimizer = torch.optim.Adam(coder.parameters(), lr=0.1)  # whose steps fill every place
        x = normal(20, 3, 4)
        coder.loss(Batch(x, x), progress=1.0, dead=torch.zeros(6, dtype=torch.bool))["mse"].backward()
        optimizer.step()
        assert (coder.decoder_norms > 0).all()
        coder.project()


# ---- units: input and target scaled apart

# What takes d_out and skip: all but those whose encoder is the decoder, or that fix their widths.
WIRED = [name for name in FAMILIES if name not in ("Tied", "VQ", "Crosscoder", "MatrixSAE")]


def wired(name):
    """A transcoder from 16 to 12 dimensions with a skip."""
    return make(name, d_out=12, **({} if name == "SkipTranscoder" else {"skip": True}))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", WIRED)
def test_fold_of_a_transcoder(name, mode):
    """Weights that turn 3.7·x into y/4, folded, turn x into y: the same features, codes in units of y."""
    into, out = 3.7, 0.25
    coder, x = wired(name), normal(64, D_IN, seed=11)
    ids = ids_for(x, coder)
    coder.calibrate([into * normal(512, D_IN, seed=8)])
    coder.train(mode == "train")
    before = coder(into * x, ids)
    coder.fold(into, out)
    after = coder(x, ids)
    assert near(out * after.x_hat, before.x_hat) and near(out * after.f, before.f)
    assert torch.equal(after.f > 0, before.f > 0) and before.f.any()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("how", [{"causal": False}, {"causal": True}, {"selection": "decoder_norms"}])
def test_fold_of_a_crosscoder_with_a_scale_per_layer(how, mode):
    """Codes have one unit, of the layers' mean: the same features, and each layer in its own units."""
    scales, x = torch.tensor([4.0, 0.1]), tokens_for("Crosscoder", 64, seed=11)
    coder = make("Crosscoder", **how)
    coder.calibrate([scales[:, None] * tokens_for("Crosscoder", 512, seed=8)])
    coder.train(mode == "train")
    before = coder(scales[:, None] * x)
    coder.fold(scales)
    after = coder(x)
    assert near(scales[:, None] * after.x_hat, before.x_hat) and torch.equal(after.f > 0, before.f > 0)
    ratio = before.f[before.f > 0] / after.f[before.f > 0]
    assert near(ratio, ratio[:1].expand(len(ratio))) and 0.1 < ratio[0] < 4


@pytest.mark.parametrize("name", FAMILIES)
def test_fold_is_undone_by_its_inverse(name):
    """A trained coder that is trained on goes back into the units of training, where decoder rows have unit norm: else
    the first step would change what it says."""
    coder = make(name)
    coder.calibrate([tokens_for(name, 512, seed=8)])
    before = {n: t.clone() for n, t in coder.state_dict().items()}
    scale = torch.tensor([5.0, 0.2]) if name == "Crosscoder" else 5.0
    coder.fold(scale)
    coder.fold(1 / scale)
    assert all(near(t, before[n]) for n, t in coder.state_dict().items())


def test_the_gate_of_a_transcoder_with_skip_leaves_the_skip_its_part():
    """x_hat = f·W_dec + b_dec + x·W_skip, and so is what the gate alone would say."""
    coder = by_hand(sl.Gated, d_out=2, skip=True)
    with torch.no_grad():
        coder.W_skip.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    # Nothing is subtracted from x: pre is (2, -3, -2), one gate is open: (2, 0) + b_dec (1, 0) + skip (2, 0).
    x, y = torch.tensor([[2.0, -3.0]]), torch.tensor([[5.0, 1.0]])
    terms = coder.loss(Batch(x, y), progress=1.0, dead=ALIVE)
    assert terms["mse"].item() == pytest.approx(1.0)
    assert terms["gate"].item() == pytest.approx(1.0)


# ---- units: each x to one size


def test_input_norm_length():
    coder = by_hand(sl.L1).eval()
    coder.input_norm = "length"
    # ‖(1, 7)‖ = 5√2 is 5 times √d_in, so the coder sees (.2, 1.4), less b_dec (-.8, 1.4): pre (-.8, 1.4, -.4).
    # 1.4·(0,1) + (1,0), five times.
    out = coder(torch.tensor([[1.0, 7.0], [10.0, 70.0]]))
    assert close(out.f, [[0.0, 1.4, 0.0]] * 2), "length makes no difference to codes"
    assert close(out.x_hat, [[5.0, 7.0], [50.0, 70.0]], 1e-5)
    assert torch.equal(coder.encode(torch.tensor([[1.0, 7.0]])), out.f[:1])


def test_input_norm_layer():
    coder = by_hand(sl.L1).eval()
    coder.input_norm = "layer"
    # (1, 3) has mean 2 and deviation √2 (over d - 1), so the coder sees (-h, h), h = √.5, less b_dec (-h - 1, h): one
    # code of h. h·(0,1) + (1,0), times √2, plus 2.
    out = coder(torch.tensor([[1.0, 3.0], [15.0, 35.0]]))
    assert close(out.f, [[0.0, 0.5**0.5, 0.0]] * 2, 1e-5)
    assert close(out.x_hat, [[2 + 2**0.5, 3.0], [25 + 10 * 2**0.5, 35.0]], 1e-4)  # the deviation has 1e-5 added


@pytest.mark.parametrize("norm", ["layer", "length"])
def test_fold_where_inputs_are_normalised(norm):
    """Such a coder serves x at any scale: there is nothing to fold."""
    coder, x = make("L1").eval(), normal(64, D_IN, seed=11)
    coder.input_norm = norm
    before = coder(3.7 * x)
    coder.fold(3.7)
    after = coder(x)
    assert near(3.7 * after.x_hat, before.x_hat, 1e-4) and torch.equal(after.f > 0, before.f > 0)


def test_a_coder_that_normalises_its_input_is_not_trained():
    """Its loss would be in other units than what it says."""
    coder = make("TopK")
    coder.input_norm = "length"
    with pytest.raises(ValueError, match=r"normalises each x \(input_norm='length'\), which training does not"):
        sl.train(coder, normal(64, D_IN), sl.TrainConfig(steps=1, batch_size=8))


# ---- prefixes


def ragged(rows=24, d_sae=60, d=6, seed=0):
    """(codes of 0 to 10 features a row, in no order, rows 3 and the last empty; W_dec; target), both leaves."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 11, (rows,), generator=generator)
    counts[3] = counts[-1] = 0
    features = torch.cat([torch.randperm(d_sae, generator=generator)[:n] for n in counts.tolist()])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    values = normal(len(features), seed=1).abs().requires_grad_()
    return Codes(values, features, offsets, d_sae), normal(d_sae, d, seed=2).requires_grad_(), normal(rows, d, seed=3)


def loop(codes, W_dec, target, weights):
    """The plain loop over prefixes, in float64."""
    f, W_dec, target = codes.dense().double(), W_dec.double(), target.double()
    errors = [losses.mse(f[:, :n] @ W_dec[:n], target) for n in range(1, len(W_dec) + 1)]
    return (torch.stack(errors) * weights.double()).sum()


WEIGHTS = {
    "one": torch.eye(60)[-1],
    "few": torch.eye(60)[[0, 6, 29, 59]].sum(0) * torch.linspace(0.1, 1, 60),
    "more than few": torch.eye(60)[:18].sum(0),
    "all": torch.full((60,), 1 / 60),
    "all, each its own": torch.linspace(0.1, 2, 60),
}


@pytest.mark.parametrize("chunk", [losses.CHUNK, 100])  # numbers in one piece: all rows at once, or a few
@pytest.mark.parametrize("which", WEIGHTS)
def test_prefix_equals_the_loop_over_prefixes(which, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    codes, W_dec, target = ragged()
    target.requires_grad_()
    leaves = (codes.values, W_dec, target)
    fast, slow = losses.prefix(codes, W_dec, target, WEIGHTS[which]), loop(codes, W_dec, target, WEIGHTS[which])
    assert near(fast.double(), slow)
    expected = torch.autograd.grad(3 * slow, leaves)
    for mine, gradient in zip(torch.autograd.grad(3 * fast, leaves), expected, strict=True):
        assert near(mine, gradient) and gradient.any()


@pytest.mark.parametrize("which", ["few", "all"])
def test_prefix_where_nothing_is_active(which):
    """Every prefix then leaves the whole target."""
    codes = Codes(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(3, dtype=torch.long), 60)
    target = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    expected = WEIGHTS[which].sum().item() * 3  # (5 + 1) / 2
    assert losses.prefix(codes, normal(60, 2), target, WEIGHTS[which]).item() == pytest.approx(expected)


class Work(TorchDispatchMode):
    """Counts operations, and the numbers they make; and the largest tensor among them."""

    operations = numbers = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.operations += 1
            self.numbers += result.numel()
            self.largest = max(self.largest, result.numel())
        return result


def work_of_all_prefixes(d_sae, active, rows=200, d=16):
    codes = Codes(
        torch.ones(rows * active, requires_grad=True),
        torch.arange(active).repeat(rows) * (d_sae // active),
        torch.arange(rows + 1) * active,
        d_sae,
    )
    W_dec = normal(d_sae, d).requires_grad_()
    with Work() as work:
        losses.prefix(codes, W_dec, normal(rows, d), torch.full((d_sae,), 1 / d_sae)).backward()
    return work


def test_all_prefixes_cost_what_is_active():
    """Ten times the prefixes: the same operations, none larger, and no number more than the dictionary itself has, a
    few times over (its gradient). Twice the active features: twice the work."""
    few, many, dense = (work_of_all_prefixes(*size) for size in ((80, 4), (800, 4), (80, 8)))
    assert few.operations == many.operations == dense.operations
    assert many.largest <= max(few.largest, 800 * 16), "a loop over prefixes keeps 200·16 numbers of each"
    assert many.numbers - few.numbers < 6 * 720 * 16
    assert 1.5 < dense.numbers / few.numbers < 2.1 and dense.largest < 2 * few.largest


# ---- refused

REFUSED = [
    ("Crosscoder", {"selection": "norms"}, "selection must be one of codes, decoder_norms, got 'norms'"),
    ("Crosscoder", {"norm_penalty": -1.0}, "norm_penalty must be a number of at least 0, got -1.0"),
    *[(name, {"sparsity": -1.0}, "sparsity must be a number of at least 0, got -1.0")
      for name in ("L1", "Tied", "SqrtL1", "PAnneal", "Hoyer", "SmoothL0", "ProLU", "Gated", "JumpReLU")],
    *[(name, {"drop": -0.5}, "drop must be a number of at least 0, got -0.5")
      for name in ("L1", "Tied", "SqrtL1", "PAnneal", "Hoyer", "SmoothL0", "ProLU")],
    *[(name, {"k": 41}, "k must be an integer from 1 to d_sae=40, got 41")
      for name in ("TopK", "LeakyTopK", "BatchTopK", "Matryoshka", "Ordered", "Spline", "Switch", "Tokenized",
                   "Transcoder", "SkipTranscoder", "Crosscoder", "MatrixSAE")],
    ("PAnneal", {"p_end": 0.0}, "p_end must lie in (0, 1], got 0.0"),
    ("PAnneal", {"p_end": 1.1}, "p_end must lie in (0, 1], got 1.1"),
    ("SmoothL0", {"width": 0.0}, "width must be above 0"),
    ("JumpReLU", {"bandwidth": 0.0}, "bandwidth must be a positive number, got 0"),
    ("JumpReLU", {"start": -0.1}, "start must be a number of at least 0, got -0.1"),
    ("TopK", {"multi": 0}, "multi must be at least 1, got 0"),
    ("LeakyTopK", {"leak": 1.0}, "leak must lie in [0, 1), got 1.0"),
    ("LeakyTopK", {"leak": -0.1}, "leak must lie in [0, 1), got -0.1"),
    *[("Matryoshka", {"prefixes": prefixes}, f"prefixes must be rising numbers of features that end with d_sae=40, got "
       f"{prefixes}: try (2, 5, 10, 20, 40)")
      for prefixes in ((), (5, 20), (20, 5, 40), (5, 5, 40), (0, 40), (-5, 40), (20, 40, 60))],
    ("Ordered", {"k_start": 3}, "k_start must lie from k=4 to d_sae=40, got 3"),
    ("Ordered", {"k_start": 41}, "k_start must lie from k=4 to d_sae=40, got 41"),
    ("Spline", {"knots": 1}, "a spline needs knots >= 2 and span > 0, got knots=1"),
    ("Spline", {"span": 0.0}, "a spline needs knots >= 2 and span > 0, got knots=8, span=0.0"),
    ("Switch", {"experts": 3}, "experts must divide d_sae=40, got 3"),
    ("Switch", {"experts": 0}, "experts must divide d_sae=40, got 0"),
    ("Switch", {"k": 4, "experts": 20}, "k=4 is more than the 2 features of one expert"),
    ("Switch", {"balance": -1.0}, "balance must be a number of at least 0, got -1.0"),
    ("Tokenized", {"vocab": 0}, "vocab must be a positive integer, got 0: pass len(lm.tokenizer)"),
    ("Transcoder", {"d_out": 0}, "d_out must be at least 1, got 0"),
    ("SkipTranscoder", {"d_out": 0}, "d_out must be at least 1, got 0"),
    ("L1", {"d_out": -1}, "d_out must be at least 1, got -1"),
    ("Crosscoder", {"layers": 1}, "a crosscoder needs at least 2 layers, got 1: for one layer use BatchTopK"),
    ("Crosscoder", {"layers": 3, "causal": True}, "need d_sae to be a multiple of layers=3, got d_sae=40"),
    ("MatrixSAE", {"rows": 5}, "rows must divide d_in=16, got 5: x is a matrix of rows x (d_in/rows), flat"),
    ("MatrixSAE", {"rows": 0}, "rows must divide d_in=16, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "message"), REFUSED, ids=[f"{n}-{config}" for n, config, _ in REFUSED])
def test_arguments_that_are_refused(name, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FAMILIES[name](WIDTHS.get(name, D_IN), D_SAE, **{**SPECS[name], **config})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_misspelt_argument(name):
    with pytest.raises(TypeError, match="sparsty"):
        FAMILIES[name](WIDTHS.get(name, D_IN), D_SAE, **SPECS[name], sparsty=1.0)


@pytest.mark.parametrize("name", ["Matryoshka", "Ordered", "Spline", "Switch"])
def test_multi_topk_is_refused_where_it_means_nothing(name):
    """Codes of these families are not the largest of pre, or their loss is not that of all features."""
    with pytest.raises((TypeError, ValueError), match="multi"):
        FAMILIES[name](D_IN, D_SAE, **SPECS[name], multi=2)


ONE_STEP = sl.TrainConfig(steps=1, batch_size=8)


@pytest.mark.parametrize("name", ["Transcoder", "SkipTranscoder"])
def test_a_transcoder_without_target(name):
    with pytest.raises(ValueError, match=re.escape("a transcoder needs a target: pass sl.Batch(x, target)")):
        sl.train(make(name), normal(64, D_IN), ONE_STEP)


def test_a_target_of_another_width():
    x, y = normal(64, D_IN), normal(64, 13)
    with pytest.raises(ValueError, match=re.escape("writes (12,), the data holds (16,) and (13,): make them equal")):
        sl.train(make("Transcoder"), Batch(x, y), ONE_STEP)


def test_a_crosscoder_of_other_layers_than_the_data():
    with pytest.raises(ValueError, match=re.escape("reads (2, 8) and writes (2, 8), the data holds (3, 8) and (3, 8)")):
        sl.train(make("Crosscoder"), normal(64, 3, 8), ONE_STEP)


def test_tokenized_without_tokens():
    coder, x = make("Tokenized"), normal(64, D_IN)
    message = "needs token ids: call sae(x, tokens), or train it on a store"
    for call in (coder, lambda x: coder.decode(coder.encode(x)), lambda x: sl.train(coder, x, ONE_STEP)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(x)


@pytest.mark.parametrize("bad", [-1, 7])
def test_tokenized_with_tokens_out_of_range(bad):
    x = normal(64, D_IN)
    ids = torch.full((64,), bad)
    for call in (lambda c: c(x, ids), lambda c: sl.train(c, Batch(x, x, ids), ONE_STEP)):
        with pytest.raises(ValueError, match=f"token ids must lie from 0 to vocab-1=6, got {bad}"):
            call(sl.Tokenized(D_IN, D_SAE, vocab=7, k=4))
