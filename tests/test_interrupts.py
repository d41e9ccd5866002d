"""Ctrl-C at any moment: whatever it stops leaves the model, the coder, edits and panels as they were."""

import os
import random
import signal
import time

import pytest
import torch
from batteries.writers import Writers

import sae_lab as sl
from sae_lab.explain.sage import sage_explain
from sae_lab.explain.scripted import ScriptedAgent

MOMENTS = 6
ONE, OTHER = "the cat sat on a mat", "the mat sat on a cat"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Writers(tmp_path_factory.mktemp("made") / "made")


@pytest.fixture
def calls(made, monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_LAB_CACHE", str(tmp_path / "cache"))
    lm, coder = made.lm, made.coder()
    live = int(coder.f_scale.argmax())
    text = sl.load_text([f"{a} {b} sat on a mat. " * 12 for a in "abcdefgh" for b in "ijkl"])
    grid = sl.PatchingGrid(lm, ONE, OTHER, answers=("a", "b"))
    report = lambda: sl.evals.report(  # noqa: E731
        coder, lm, text, evals=["reconstruction", "errors", "codes"], tokens=600, lm_tokens=200
    )
    return lm, coder, grid, {
        "grid.run": lambda: grid.run(OTHER, ONE),
        "grid.patch": lambda: grid.patch(),
        "find_features": lambda: sl.find_features(lm, coder, [ONE, "a cat", "cats"] * 2, [OTHER, "a mat", "on"] * 2),
        "dose_response": lambda: sl.dose_response(lm, coder, live, [ONE], "a", [OTHER], strengths=(0.0, 1.0, 2.0)),
        "sage": lambda: sage_explain(coder, lm, list(text)[:8], live, ScriptedAgent(), rounds=3),
        "report": report,
    }  # fmt: skip


def state(module, lm, coder, grid):
    """What an interruption must leave."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [*module.modules(), *coder.modules()]
    return {
        "hooks": [len(getattr(m, name)) for m in modules for name in hooks],
        "forwards": ["forward" in vars(m) for m in modules],
        "training": [m.training for m in modules],
        "gradients": [(p.requires_grad, p.grad is None) for m in modules for p in m.parameters(recurse=False)],
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "attention": module.config._attn_implementation,
        "coder": (coder.fingerprint(), coder.in_raw_units, coder.scratch),
        "progress": grid.progress,
        "handler": signal.getsignal(signal.SIGINT),
        "logits": lm.logits([ONE]).tolist(),
    }


@pytest.fixture(autouse=True)
def gradients_are_on():
    """For the tests that follow: an interruption may end torch's no_grad between its lines, and it stays in force."""
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("name", ["grid.run", "grid.patch", "find_features", "dose_response", "sage", "report"])
def test_ctrl_c_leaves_everything_usable(made, calls, tmp_path, name):
    lm, coder, grid, them = calls
    call, draw = them[name], random.Random(0)
    before = state(made.module, lm, coder, grid)
    first = call()
    begin = time.perf_counter()
    if name != "report":  # which keeps what it found
        grid._on.true, grid.truth = {}, []
        call()  # the first takes longer
    seconds = time.perf_counter() - begin if name != "report" else 1.0
    assert state(made.module, lm, coder, grid) == before
    interrupted = cut = 0
    handler = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        for number in range(MOMENTS):
            grid._on.true, grid.truth = {}, []
            if name == "report":
                sl.cache.clear("evals"), sl.cache.clear("stores")
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-3, (number + draw.random()) / MOMENTS * seconds))
                call()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
                cut += not torch.is_grad_enabled()
                torch.set_grad_enabled(True)
            assert state(made.module, lm, coder, grid) == before, number
            assert not [f for f in (tmp_path / "cache").rglob("*") if f.name.startswith(".")]
            assert grid.view["prompt"] == grid._on.prompt and grid.truth == grid._on.truth()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert cut <= 1, "gradients stay off only where Ctrl-C falls between the lines of torch's no_grad, which is rare"
    assert interrupted, "none came in time, so nothing was tried"
    assert repr(call()) == repr(first) or name == "report"
