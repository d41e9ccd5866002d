"""Coders as plans: what travels to a server equals the coder, in every family, and needs torch alone."""

import ast
import builtins
import inspect
from functools import partial
from importlib import import_module

import pytest
import torch

import sae_lab as sl
from sae_lab.lm import remote

# The check of what may travel, without a server.
from sae_lab.lm.model import _require_travelling
from sae_lab.saes import FAMILIES, kernels, portable

D, F, VOCAB = 12, 48, 20
MORE = {"Tokenized": {"vocab": VOCAB}, "MatrixSAE": {"rows": 3}, "Switch": {"experts": 4}, "L1": {"drop": 0.2}}
ALONE = [name for name in FAMILIES if name != "Crosscoder"]


def trained(name, **more):
    """A coder of the family whose every weight matters."""
    family = FAMILIES[name]
    few = {"k": 4} if "k" in inspect.signature(family).parameters else {}
    coder = family(D, F, **few, **MORE.get(name, {}), **more)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, D, generator=generator)
    with torch.no_grad():
        for weight in coder.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    coder.calibrate([x])
    return coder.eval(), x


def assert_same(coder, x):
    plan, ids = coder.portable(), torch.arange(len(x)) % VOCAB
    with torch.no_grad():
        out = coder(x, ids)
        codes = portable.encode(plan, x)
        assert int((out.f > 0).sum()) > len(x) / 2  # something to compare
        assert torch.allclose(codes, out.f, atol=1e-5 * float(out.f.max()))
        x_hat = portable.decode(plan, codes, x, ids)
        assert torch.allclose(x_hat, out.x_hat, atol=1e-5 * float(out.x_hat.abs().max()))
        change = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(2))
        for whole in (True, False):
            few = coder.portable([1, 5, 9], whole)
            z = portable.some(few, portable.encode(few, x))
            assert torch.allclose(z, out.f[:, [1, 5, 9]], atol=1e-5 * float(out.f.max()))
            wrote = portable.write_of(few, change, x)
            assert torch.allclose(wrote, coder.write_of(change, [1, 5, 9], x), atol=1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_a_plan_does_what_its_coder_does(name):
    assert_same(*trained(name))


@pytest.mark.parametrize("input_norm", ["layer", "length"])
def test_a_plan_normalises_as_its_coder(input_norm):
    coder, x = trained("TopK")
    coder.input_norm = input_norm
    assert_same(coder, 3 * x + 1)


def test_a_plan_of_a_transcoder_with_a_skip():
    coder, x = trained("BatchTopK", d_out=7, skip=True)
    assert coder.W_skip is not None
    assert_same(coder, x)


def test_every_family_names_a_function_that_travels():
    for name in ALONE:
        act = trained(name)[0].portable()["act"]
        assert act is not portable.by_itself and act.__module__ == portable.__name__, name


def test_a_family_that_names_none_works_here_and_is_refused_on_a_server(tiny_lm):
    class Mine(sl.TopK):
        def act(self, pre):
            return kernels.top_per_row(pre, self.k)

        def eval_act(self):
            return sl.SparseCoder.eval_act(self)

    coder = Mine(tiny_lm.width("layers.1"), 96, k=4)
    coder.reads = coder.writes = (sl.Site("layers.1"),)
    coder.calibrate([torch.randn(500, coder.d_in)])
    x = torch.randn(50, coder.d_in)
    assert torch.allclose(portable.encode(coder.portable(), x), coder.encode(x), atol=1e-5)
    writes = sl.Ablate(coder, 3).writes(tiny_lm, tiny_lm.tokenize("The sea"))
    with pytest.raises(ValueError, match="a Mine does not say how its codes are made without this library"):
        _require_travelling(writes)


def test_a_family_without_a_way_to_make_codes_is_told_so():
    class Empty(sl.SparseCoder):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define act, eval_act or both"):
        Empty(D, F, {})(torch.randn(2, D))


def test_a_family_without_annotations_takes_whole_numbers_only():
    class Plain(sl.SparseCoder):
        def __init__(self, d_in, d_sae):
            super().__init__(d_in, d_sae, {})

    for width in ("8", 8.5, True):
        with pytest.raises(ValueError, match="d_in must be a whole number, got"):
            Plain(width, F)


def test_a_crosscoder_is_refused():
    with pytest.raises(ValueError, match="reads several sites at once"):
        sl.saes.Crosscoder(D, F, layers=2, k=4).portable()


ROOMS = [import_module(name) for name in remote.TRAVELLING]


@pytest.mark.parametrize("module", ROOMS, ids=lambda m: m.__name__)
def test_what_travels_uses_torch_and_what_travels(module):
    """Of each function marked for travel: the names it takes from its module must be torch, plain Python, or functions
    that travel too."""
    own = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    functions = [f for f in own if getattr(f, "__no_type_check__", False)]
    assert functions
    for function in functions:
        tree = ast.parse(inspect.getsource(function))
        [node] = tree.body
        bound = {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
        bound |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        bound |= {a.name for n in ast.walk(node) if isinstance(n, ast.Import) for a in n.names}
        used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        for name in used - bound - {"no_type_check"} - set(dir(builtins)):
            value = vars(module)[name]
            travels = getattr(value, "__no_type_check__", False) and value.__module__ in remote.TRAVELLING
            assert travels or value is torch or getattr(value, "__module__", "") == "types", (function.__name__, name)


def test_edits_are_plain_data(tiny_lm):
    """An edit's write is made of functions that travel, tensors, and plain Python: no class of this library."""
    coder, _ = trained("TopK")
    coder = sl.TopK(tiny_lm.width("layers.1"), 96, k=4)
    coder.reads = coder.writes = (sl.Site("layers.1"),)
    coder.calibrate([torch.randn(500, coder.d_in)])
    texts = "The sea", "The sun"
    edits = [
        sl.Steer(coder, 1), sl.Clamp(coder, 1), sl.Scale(coder, 1, 2.0), sl.Ablate(coder, 1), sl.Splice(coder),
        sl.Ablate(coder, 1, to="mean", reference=texts), sl.Ablate(coder, [1, 2], to="resample", reference=texts),
        sl.Patch(coder, texts[1]), sl.Patch(coder, texts[1], error="patch"), sl.Project(coder, 1, positions=" sea"),
        sl.Steer(coder, 1, positions=lambda text: "s" in text),
    ]  # fmt: skip

    def plain(value):
        if isinstance(value, partial):
            return plain(value.func) and not value.args and plain(value.keywords)
        if isinstance(value, dict):
            return all(plain(v) for v in value.values())
        if isinstance(value, list | tuple):
            return all(plain(v) for v in value)
        if inspect.isfunction(value):
            return value.__module__ in remote.TRAVELLING and getattr(value, "__no_type_check__", False)
        return value is None or type(value) in (torch.Tensor, int, float, str, bool, slice)

    for edit in edits:
        [write] = edit.writes(tiny_lm, tiny_lm.tokenize(texts[0]))
        assert plain(write.fn), edit
        assert not any(t.requires_grad for t in write.fn.keywords["change"].keywords.values() if torch.is_tensor(t))
