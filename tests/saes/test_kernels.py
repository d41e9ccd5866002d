"""The sparse kernels against dense autograd in float64, where 1e-12 tells a wrong formula from rounding."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lab.activations.store import Rows
from sae_lab.saes import BatchTopK, Crosscoder, Matryoshka, Ordered, TopK, Transcoder, kernels, losses
from sae_lab.saes.base import AUX_WEIGHT
from sae_lab.training.config import TrainConfig
from sae_lab.training.loop import Training
from sae_lab.types import Batch, Codes, Output
from tests.saes.conftest import make, normal

ROWS, D_IN, D_SAE = 7, 5, 11


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).detach().abs().max() <= tolerance * b.detach().abs().max().clamp_min(1.0)


def weights():
    """x, W_enc, b_enc, b_dec, W_dec in float64, all leaves."""
    shapes = [(ROWS, D_IN), (D_IN, D_SAE), (D_SAE,), (D_IN,), (D_SAE, D_IN)]
    return [normal(*s, seed=i).double().requires_grad_() for i, s in enumerate(shapes)]


def places(*rows: list[int]) -> Codes:
    """Codes of value 0 at given features of each row, in the order given."""
    flat = torch.tensor([f for row in rows for f in row], dtype=torch.long)
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return Codes(torch.zeros(len(flat), dtype=torch.double), flat, offsets, D_SAE)


# Unsorted features, an empty row at the start, in the middle and at the end; feature 10 everywhere, 3 nowhere.
SOME = places([], [10, 2, 0], [10], [], [1, 10, 9, 4], [10, 5, 6, 7, 8], [])


def mask_of(codes: Codes) -> Tensor:
    return codes._replace(values=torch.ones_like(codes.values)).dense().bool()


# ---- selection


@pytest.mark.parametrize("k", [1, 3, D_SAE])
def test_top_per_row(k):
    pre = normal(ROWS, D_SAE).double()
    codes = kernels.top_per_row(pre, k)
    smallest = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
    close(codes.dense(), torch.where(pre >= smallest, pre, 0.0))
    assert codes.offsets.tolist() == list(range(0, ROWS * k + 1, k))


@pytest.mark.parametrize("rows", [0, 1, 600])
@pytest.mark.parametrize("width", [40, 43, 303])  # 43: three entries stand in no group; 303: groups of groups of groups
@pytest.mark.parametrize("k", [2, 5, 30])  # 30: too many to select groups first
def test_top_of_wide_rows(rows, width, k):
    pre = normal(rows, width, seed=5)
    assert torch.equal(kernels.top_per_row(pre, k).dense(), dense_top(pre, k))
    some = torch.arange(0, 2 * width, 2)
    among = kernels.top_among(torch.stack([pre, pre + 100], 2).flatten(1), some, k)
    assert torch.equal(among.dense()[:, some], dense_top(pre, k))


def dense_top(pre: Tensor, k: int) -> Tensor:
    top = pre.topk(k)
    return torch.zeros_like(pre).scatter(1, top.indices, top.values)


def exact(pre: Tensor, n: int) -> Tensor:
    flat = torch.zeros(pre.numel(), dtype=pre.dtype)
    top = pre.flatten().topk(n)
    flat[top.indices] = top.values
    return flat.view_as(pre)


@pytest.mark.parametrize("shape", [(1, 3), (7, 11), (64, 200)])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.7, 1.0])
def test_top_of_batch(shape, share):
    pre = normal(*shape, seed=3)
    n = max(1, int(share * pre.numel()))
    codes = kernels.top_of_batch(pre, n)
    assert torch.equal(codes.dense(), exact(pre, n)) and len(codes.values) == n
    assert codes.offsets[0] == 0 and codes.offsets[-1] == n


def test_top_of_batch_with_an_unlucky_sample():
    """Everything that the sample (every 31st entry) sees is larger than nearly all else: its bound is too high."""
    pre = normal(100, 62, seed=4)
    pre.view(-1)[::31] += 100
    n = 1000
    codes = kernels.top_of_batch(pre, n)
    assert len(codes.values) == n > (pre > 50).sum()
    assert torch.equal(codes.dense(), exact(pre, n))


def test_top_of_batch_asks_for_more_than_there_is():
    pre = normal(4, 6)
    codes = kernels.top_of_batch(pre, 99)
    assert torch.equal(codes.dense(), pre)


def test_top_of_batch_with_ties():
    codes = kernels.top_of_batch(torch.ones(8, 9), 10)
    assert len(codes.values) == 10 and (codes.values == 1).all()
    assert len({(int(r), int(f)) for r, f in zip(codes.rows, codes.features, strict=True)}) == 10, "no place twice"


@pytest.mark.parametrize("threshold", [-9.0, 0.3, 9.0, torch.linspace(-1, 1, D_SAE)])
def test_above(threshold):
    pre = normal(ROWS, D_SAE)
    codes = kernels.above(pre, threshold)
    assert torch.equal(codes.dense(), torch.where(pre > threshold, pre, 0.0))
    assert torch.equal(codes.offsets.diff(), (pre > threshold).sum(1))


def test_no_rows_at_all():
    for codes in (kernels.above(torch.zeros(0, D_SAE), 0.0), kernels.top_per_row(torch.zeros(0, D_SAE), 2)):
        assert codes.dense().shape == (0, D_SAE)
        assert kernels.decode(codes, normal(D_SAE, D_IN)).shape == (0, D_IN)


def test_many_rows_are_selected_from_a_few_at_a_time(monkeypatch):
    """The codes are those of all rows at once."""
    pre, some = normal(64, 200, seed=12), torch.arange(0, 200, 3)
    select = [
        lambda: kernels.above(pre, torch.linspace(-1, 1, 200)),
        lambda: kernels.where(pre, pre > 1),
        lambda: kernels.top_of_batch(pre, 300),
        lambda: kernels.top_per_row(pre, 3),
        lambda: kernels.top_among(pre, some, 3),
    ]
    at_once = [chosen().dense() for chosen in select]
    monkeypatch.setattr(kernels, "PIECE", 3 * 200)  # three rows
    for chosen, codes in zip(select, at_once, strict=True):
        assert torch.equal(chosen().dense(), codes)


def test_the_most_of_a_batch_are_k_for_each_row():
    """16 rows: k·rows is neither k nor k/rows."""
    pre = normal(16, 40)
    assert torch.equal(kernels.Selector().of_batch(pre, 2.5).dense(), exact(pre, 40))


def test_positive_codes_of_either_form():
    pre = normal(ROWS, D_SAE)
    for codes in (pre, kernels.where(pre, torch.ones_like(pre, dtype=torch.bool))):
        found = kernels.positive(codes)
        assert torch.equal(found.dense(), pre.relu()) and torch.equal(found.offsets.diff(), (pre > 0).sum(1))
    assert kernels.positive(found) is found


def test_joined_codes_are_those_of_all_rows_at_once():
    pre = normal(ROWS, D_SAE)
    whole = kernels.above(pre, 0.3)
    found = kernels.joined([kernels.above(part, 0.3) for part in pre.split(3)], D_SAE)
    for ours, theirs in zip(found[:3], whole[:3], strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert kernels.joined([], D_SAE).dense().shape == (0, D_SAE)


def test_rows_of_each_feature():
    codes = kernels.above(normal(ROWS, D_SAE), 0.3)
    learnt = codes._replace(values=codes.values.clone().requires_grad_())
    assert torch.equal(torch.from_numpy(kernels.feature_rows(learnt).toarray()), codes.dense().T)


# ---- gradients


@pytest.mark.parametrize("form", ["some places", "all places"])
@pytest.mark.parametrize("centred", [True, False])  # whether b_dec is subtracted
@pytest.mark.parametrize("in_memory", [True, False])
def test_every_form_of_encode_at_has_the_gradients_of_autograd(form, centred, in_memory):
    """Buffers are float32: sums of 5 or 7 products are exact to 1e-5 there."""
    dtype, tolerance = (torch.float32, 1e-5) if in_memory else (torch.double, 1e-12)
    mine, theirs = ([w.detach().to(dtype).requires_grad_() for w in weights()[:4]] for _ in range(2))
    x, W_enc, b_enc, b_dec = theirs
    pre = (x - b_dec if centred else x) @ W_enc + b_enc
    chosen = mask_of(SOME) if form == "some places" else torch.ones(ROWS, D_SAE, dtype=torch.bool)
    dense = torch.where(chosen, pre, 0.0)
    given = SOME._replace(values=pre.detach()[SOME.rows, SOME.features]) if form == "some places" else pre.detach()
    memory = kernels.Memory(ROWS, D_SAE, torch.device("cpu")) if in_memory else None
    x, W_enc, b_enc, b_dec = mine
    codes = kernels.encode_at(given, x, W_enc, b_enc, b_dec if centred else None, memory)
    codes = codes.dense() if isinstance(codes, Codes) else codes
    close(codes, dense, tolerance)
    g = normal(ROWS, D_SAE, seed=20).to(dtype)
    (codes * g).sum().backward()
    (dense * g).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            close(a.grad, b.grad, tolerance)


def test_bf16_rounds_what_is_multiplied():
    """Small whole numbers are exact in bfloat16; 2^-10 beside 1 is lost, which float32 keeps."""
    x, W, bias = (
        torch.randint(-3, 4, s, generator=torch.Generator().manual_seed(6)).float() for s in [(4, 5), (5, 6), (6,)]
    )
    little = torch.where(x == 0, 0.0, 2**-10 * x.sign())
    for precision, lost in (("bf16", True), ("float32", False)):
        out = kernels.affine(x + little, W, bias, precision)
        assert torch.equal(out, x @ W + bias) == lost and out.dtype == torch.float32
        codes = x.new_zeros(4, 6)  # gradients of encode_at are such products too
        learnt = [t.clone().requires_grad_() for t in (x + little, W)]
        kernels.encode_at(codes, *learnt, bias, None, None, precision).sum().backward()
        assert torch.equal(learnt[1].grad, x.T @ torch.ones(4, 6)) == lost
        assert torch.equal(learnt[0].grad, torch.ones(4, 6) @ W.T)


def test_encode_at():
    x, W_enc, b_enc, b_dec, _ = mine = weights()
    theirs = [p.detach().clone().requires_grad_() for p in mine]
    pre = (theirs[0] - theirs[3]) @ theirs[1] + theirs[2]
    dense = torch.where(mask_of(SOME), pre, 0.0)
    chosen = SOME._replace(values=pre.detach()[SOME.rows, SOME.features])
    codes = kernels.encode_at(chosen, x, W_enc, b_enc, b_dec)
    close(codes.dense(), dense)
    g = normal(ROWS, D_SAE, seed=20).double()
    (codes.dense() * g).sum().backward()
    (dense * g).sum().backward()
    for a, b in zip(mine[:4], theirs[:4], strict=True):
        close(a.grad, b.grad)
    assert not mine[1].grad[:, 3].any() and not mine[0].grad[0].any(), "an unused feature, an empty row"
    assert mine[0].grad[1].any()


def test_decode():
    *_, W_dec = weights()
    W = W_dec.detach().clone().requires_grad_()
    values = normal(len(SOME.features), seed=21).double().requires_grad_()
    v = values.detach().clone().requires_grad_()
    out = kernels.decode(SOME._replace(values=values), W_dec)
    reference = SOME._replace(values=v).dense() @ W
    close(out, reference)
    g = normal(ROWS, D_IN, seed=22).double()
    (out * g).sum().backward()
    (reference * g).sum().backward()
    close(values.grad, v.grad)
    close(W_dec.grad, W.grad)
    assert not W_dec.grad[3].any() and not out[0].any()


def test_gradients_of_a_sum_reach_decode_expanded():
    """A gradient without memory of its own (from .sum()) must not upset the kernels."""
    *_, W_dec = weights()
    values = torch.ones(len(SOME.features), dtype=torch.double, requires_grad=True)
    kernels.decode(SOME._replace(values=values), W_dec).sum().backward()
    close(values.grad, W_dec.detach().sum(1)[SOME.features])


def test_no_code_is_active():
    x, W_enc, b_enc, b_dec, W_dec = mine = weights()
    nothing = places(*([[]] * ROWS))
    codes = kernels.encode_at(nothing, x, W_enc, b_enc, b_dec)
    out = kernels.decode(codes, W_dec)
    assert torch.equal(out, torch.zeros(ROWS, D_IN, dtype=torch.double))
    (out.sum() + codes.values.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in mine)


def test_float32_too():
    """What training runs: the same kernels in single precision (1e-5: a few hundred roundings of 6e-8)."""
    pre, W_dec = normal(32, 200, seed=5), normal(200, 16, seed=6).requires_grad_()
    W = W_dec.detach().double().requires_grad_()
    codes = kernels.top_per_row(pre, 9)
    values = codes.values.clone().requires_grad_()
    g = normal(32, 16, seed=7)
    (kernels.decode(codes._replace(values=values), W_dec) * g).sum().backward()
    (codes.dense().double() @ W * g.double()).sum().backward()
    close(W_dec.grad.double(), W.grad, 1e-5)
    close(values.grad.double(), (g.double() @ W.detach().T)[codes.rows, codes.features], 1e-5)


# ---- AuxK


@pytest.mark.parametrize("asleep", [[2, 5, 6, 30], list(range(20, 40))])
def test_auxk_equals_a_dense_reference(asleep):
    coder = make("TopK", k_aux=6)
    x = normal(24, 16, seed=9)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[asleep] = True
    out = coder(x)
    coder.auxk(Batch(x, x), out, dead, coder.k_aux)["auxk"].backward()
    p = {n: t.detach().double().requires_grad_() for n, t in coder.named_parameters()}
    pre = (x.double() - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    masked = pre.masked_fill(~dead, float("-inf"))
    chosen = masked >= masked.topk(min(6, len(asleep)), dim=1).values[:, -1:]
    fitted = torch.where(chosen, pre, 0.0).relu() @ p["W_dec"]
    residual = (x - out.x_hat.detach()).double()
    (AUX_WEIGHT * (fitted - residual).pow(2).sum(1).mean()).backward()
    for name, q in coder.named_parameters():
        assert q.grad.abs().max() > 1e-6, f"{name} gets no gradient"
        close(q.grad.double(), p[name].grad, 1e-5)
    assert not coder.W_enc.grad[:, ~dead].any() and not coder.W_dec.grad[~dead].any(), "only the dead are revived"


def test_no_auxk_while_nothing_is_dead():
    coder, x = TopK(16, 40, k=4), normal(24, 16)
    alive = torch.zeros(40, dtype=torch.bool)
    assert coder.loss(Batch(x, x), progress=0.5, dead=alive).keys() == {"mse"}
    assert coder.loss(Batch(x, x), progress=0.5, dead=~alive).keys() == {"mse", "auxk"}


def test_dense_codes_are_refused_nowhere():
    """Output.f is the dense view of either form of codes."""
    codes = kernels.top_per_row(normal(3, D_SAE), 2)
    out = Output(torch.zeros(3, D_IN), codes, torch.zeros(3, D_SAE))
    assert torch.equal(out.f, codes.dense()) and torch.equal(out._replace(codes=codes.dense()).f, out.f)


# ---- memory


def test_memory_gives_each_gradient_numbers_of_its_own():
    memory = kernels.Memory(4, 6, torch.device("cpu"))
    first, second = memory.gradient(2, 3).fill_(1), memory.gradient(2, 3).fill_(2)
    assert (first == 1).all() and (second == 2).all()
    memory.rewind()
    assert memory.gradient(2, 2).data_ptr() == first.data_ptr(), "a smaller one fits"
    assert memory.gradient(5, 7).shape == (5, 7), "a larger one does not"
    assert memory.pre(3, 6).shape == (3, 6) and memory.pre(4, 6).data_ptr() == memory.pre(3, 6).data_ptr()
    assert memory.pre(5, 6) is None and memory.pre(4, 5) is None


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, other than in the memory of ``known``."""

    def __init__(self, known: Tensor):
        super().__init__()
        self.known, self.numbers, self.by = known.untyped_storage().data_ptr(), 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and t.layout == torch.strided and t.untyped_storage().data_ptr() != self.known:
                stored = t.untyped_storage().nbytes() // 4
                if stored > self.numbers:
                    self.numbers, self.by = stored, str(function)
        return result


CODERS = [
    lambda d, f: TopK(d, f, k=8, multi=4),
    lambda d, f: BatchTopK(d, f, k=8),
    lambda d, f: Matryoshka(d, f, k=8),
    lambda d, f: Ordered(d, f, k=8),
    lambda d, f: Transcoder(d, f, k=8),
    lambda d, f: Crosscoder(d // 2, f, k=8, layers=2),
]


@pytest.mark.parametrize("make_coder", CODERS)
def test_gradients_in_reused_memory(make_coder):
    """The same as in fresh memory, step after step: AuxK, several terms and all matrices get a part of their own."""
    coder, twin = make_coder(16, 64), make_coder(16, 64)
    twin.scratch = kernels.Memory(32, 64, torch.device("cpu"))
    dead = torch.arange(64) % 2 == 0
    for step in range(3):
        x = normal(32, *coder.in_shape, seed=step)
        batch = Batch(x, normal(32, *coder.out_shape, seed=step + 9) if coder.transcodes else x)
        twin.scratch.rewind()
        for c in (coder, twin):
            c.zero_grad()
            sum(c.loss(batch, progress=0.5, dead=dead).values()).backward()
        for name, p in coder.named_parameters():
            assert torch.allclose(p.grad, twin.get_parameter(name).grad, atol=1e-6), name
    assert len({g.data_ptr() for g in twin.scratch._gradients}) == len(twin.scratch._gradients) >= 2


@pytest.mark.parametrize("make_coder", CODERS)
def test_a_step_makes_nothing_as_large_as_its_codes_times_d(make_coder, monkeypatch):
    """One buffer for pre, reused; all else is smaller than (batch·k)·d, half of the features dead or not."""
    batch, d, d_sae = 512, 16, 2048
    monkeypatch.setattr(kernels, "PIECE", 1 << 13)
    monkeypatch.setattr(losses, "CHUNK", 1 << 13)
    coder = make_coder(d, d_sae)
    x = normal(batch, *coder.in_shape)
    rows = Rows(Batch(x, normal(batch, *coder.out_shape, seed=1)) if coder.transcodes else x)
    training = Training(coder, rows, TrainConfig(steps=9, batch_size=batch, dead_after=1), None, ())
    training.begin()
    training.one_step()  # Adam's moments are made
    training.idle[::2] = 1000
    due = rows.batch(1, batch)
    memory = coder.scratch
    with Largest(memory.pre(batch, d_sae)) as largest:
        training.one_step(due)
    assert "auxk" in training.history[-1]
    assert largest.numbers < batch * 8 * d, largest.by
    coder.scratch = None  # the control: without the buffer a fresh one is made
    with Largest(memory.pre(batch, d_sae)) as largest:
        training.one_step(due)
    assert largest.numbers == batch * d_sae
