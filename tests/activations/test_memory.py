"""A harvest where memory runs out: passes of the model are halved, and the store is the same."""

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.activations import sharding
from sae_lab.lm.text import Context

SITE, CONTEXT = sl.Site("resid_post", 1), 32


@pytest.fixture
def cramped(make_tiny, monkeypatch):
    """make(error, most): a model whose layers raise an error for more tokens than fit, and the sizes of its passes."""
    monkeypatch.setattr(sharding, "SHARD_TOKENS", 512)
    monkeypatch.setattr(sharding, "FORWARD_TOKENS", 512)

    def make(error, most):
        lm, passes = make_tiny("llama"), []

        def grow(module, args, kwargs):
            tokens = (kwargs.get("input_ids") if not args else args[0]).numel()
            passes.append(tokens)
            if tokens > most:
                raise error

        lm._module.model.register_forward_pre_hook(grow, with_kwargs=True)  # the model inside, where no trace looks
        return lm, passes

    return make


ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "mps", "cpu"])
def test_passes_are_halved_until_they_fit(error, cramped, make_tiny, small_text, tmp_path, caplog):
    lm, passes = cramped(error, 150)
    found = sl.harvest(lm, SITE, small_text, tokens=1200, path=tmp_path / "cramped", context=CONTEXT)
    known = sl.harvest(make_tiny("llama"), SITE, small_text, tokens=1200, path=tmp_path / "known", context=CONTEXT)
    failed = [tokens for tokens in passes if tokens > 150]
    assert passes[: len(failed)] == failed and len(failed) == 2  # what does not fit is not tried again
    rows = np.arange(len(known))
    assert len(found) == len(known) and torch.equal(found.rows(rows, "token"), known.rows(rows, "token"))
    x, y = (store.rows(rows, SITE.key).float() for store in (found, known))
    assert float((x - y).abs().max()) <= 2e-3 * float(y.abs().max())  # float16, after sums in another order
    assert "at most 256 tokens" in caplog.text and "at most 128 tokens" in caplog.text


def test_a_context_that_does_not_fit(cramped, small_text, tmp_path):
    lm, passes = cramped(ERRORS[0], 10)
    with pytest.raises(ValueError, match="one context of 32 tokens does not fit into the memory of cpu: pass a"):
        sl.harvest(lm, SITE, small_text, tokens=1200, path=tmp_path, context=CONTEXT)
    assert passes[-1] <= CONTEXT  # not before a pass was of one context


def test_any_other_error_is_left_as_it_is(cramped, small_text, tmp_path):
    lm, passes = cramped(RuntimeError("a kernel failed"), 150)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        sl.harvest(lm, SITE, small_text, tokens=1200, path=tmp_path, context=CONTEXT)
    assert len(passes) == 1


def test_a_cut_keeps_the_order_and_counts_padding():
    context = lambda n: Context(list(range(n)), [0] * n)  # noqa: E731
    contexts = [context(n) for n in (3, 3, 8, 2, 2, 2, 2)]
    groups = sharding.in_groups(contexts, 8)
    assert [[len(c.ids) for c in group] for group in groups] == [[3, 3], [8], [2, 2, 2, 2]]
    assert [c for group in groups for c in group] == contexts
