"""sl.Stream: what training gets from a stream is what a store of the same call gives, and nothing lies on disk."""

import logging
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

import sae_lab as sl
from sae_lab.activations import sharding

A, B = sl.Site("resid_post", 0), sl.Site("resid_post", 1)
HALF = 256  # rows of half a buffer here
SMALL = {"batch_size": 64, "lr": 3e-3, "checkpoint_every": 10, "dead_after": 500}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Many small shards in place of few large ones, so that the text does not lie whole in the first."""
    monkeypatch.setattr(sharding, "SHARD_TOKENS", 256)
    monkeypatch.setattr(sharding, "FORWARD_TOKENS", 128)


@pytest.fixture
def stream(tiny_lm, small_text):
    def call(sites=A, text=small_text, lm=tiny_lm, buffer=2 * HALF, context=32, **kwargs):
        return sl.Stream(lm, sites, text, buffer=buffer, context=context, **kwargs)

    return call


@pytest.fixture
def store(tiny_lm, small_text, tmp_path):
    return sl.harvest(tiny_lm, [A, B], small_text, 10**6, path=tmp_path / "store", context=32)


@pytest.fixture
def passes(monkeypatch):
    """(thread, tokens, contexts) of each pass of a model."""
    seen, run = [], sl.LM.run

    def noted(lm, batch, *args, **kwargs):
        contexts = [tuple(ids[real].tolist()) for ids, real in zip(batch.ids, batch.mask, strict=True)]
        seen.append((threading.current_thread().name, int(batch.mask.sum()), contexts))
        return run(lm, batch, *args, **kwargs)

    monkeypatch.setattr(sl.LM, "run", noted)
    return seen


def config(**kwargs):
    return sl.TrainConfig(**SMALL | kwargs)


def coder(seed=0):
    return sl.TopK(48, 96, k=4, seed=seed)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a)


def wait():
    """Until no model reads for a stream."""
    for thread in threading.enumerate():
        if "streams" in thread.name:
            thread.join()


def count(x):
    """How often each row is there."""
    return Counter(row.tobytes() for row in x.numpy())


# ---- as a store


def test_it_holds_what_a_store_holds(stream, store):
    both, one = stream([A, B]), stream()
    assert both.sites == store.sites and both.chosen == store.chosen and one.site == A and one.width == 48
    view, of_store = both.at(A), store.at(A)
    assert view.shapes == of_store.shapes and view.mask == store.mask
    assert {key: both.identity[key] for key in both.identity} == store.identity
    first = sl.Store(store.path, rows=len(view)).at(A)
    rows = np.arange(len(view))
    for key in (A.key, B.key, "token", "position"):
        assert torch.equal(both.rows(rows, key), first.rows(rows, key))
    assert torch.equal(torch.cat([x for _, x in view.blocks()]), torch.cat([x for _, x in first.blocks()]))
    # Of documents 4, 9 and 14, as in the whole store; ``first`` has fewer documents, and counts them.
    reserved = first.rows(rows[first.rows(rows, "document").numpy() % 5 == 4], A.key)
    whole = count(store.at(A).reserved(10**6))
    assert len(reserved) > 40 and not count(reserved) - whole and torch.equal(view.reserved(10**6), reserved)
    assert torch.equal(view.unseen(50).x, reserved[:50])
    assert view.watched is not None and torch.equal(view.watched.x, reserved)
    assert torch.equal(view.at(B).watched.x, both.at(B).watched.x)  # a view of a view that has been read
    assert 0 < view.excluded < 0.1


def test_fingerprints_tell_streams_apart(stream, tiny_lm, make_tiny, small_text):
    ways = [
        stream(), stream(B), stream(buffer=4 * HALF), stream(context=16), stream(lm=make_tiny("llama", seed=1)),
        stream(text=small_text[:12]), stream([A, B]).view([A], [B]), stream([A, B]).at(A),
    ]  # fmt: skip
    assert len({one.fingerprint for one in ways}) == len(ways)
    assert stream().fingerprint == stream().fingerprint


@pytest.mark.parametrize("keep", [None, "disk"])
def test_every_training_row_is_served_once(stream, store, keep, tmp_path):
    """Within the first pass over the text: rows of whole halves all come, none twice, and none that is reserved."""
    rows = stream(keep=keep, path=tmp_path / "kept" if keep else None)
    training = store.at(A).training_rows
    steps = (training - 4 * HALF) // 64
    served = torch.cat([rows.batch(step, 64).x for step in range(steps)])
    of_store = torch.cat([store.at(A).batch(step, 64).x for step in range(training // 64)])
    if keep:  # else passes without reserved contexts round differently in the last bit
        assert not count(served) - count(torch.cat([of_store, store.at(A).batch(training // 64, 64).x]))
        whole = (steps * 64 // HALF - 1) * HALF  # rows of halves whose three rounds are over
        # training rows in the order of the text, which batches do not show
        first = store.rows(store._split[0][np.arange(whole)], A.key)
        assert whole > 4 * HALF and not count(first) - count(served)
    else:
        near = torch.cdist(served, torch.cat([x for _, x in store.at(A).blocks()])).min(1).values
        assert near.max() < 0.02 * served.norm(dim=1).mean()
    assert len(count(served)) > 0.95 * len(served)  # contexts that begin alike have rows alike


def test_rows_are_mixed(stream, store, tmp_path):
    """Rows of a batch stand far from each other in the text, as the buffer is wide."""
    rows, text = stream(keep="disk", path=tmp_path / "kept"), store.at(A)
    place = {row.tobytes(): i for i, row in enumerate(torch.cat([x for _, x in text.blocks()]).numpy())}
    known = [[place[row.tobytes()] for row in rows.batch(step, 64).x.numpy()] for step in range(16)]
    assert np.mean([np.std(found) for found in known]) > 0.75 * HALF / 12**0.5  # that of evenly spread rows
    assert all(np.abs(np.diff(found)).mean() > HALF / 6 for found in known)


def test_batches_come_again(stream):
    rows, others = stream(), stream()
    first = [rows.batch(step, 64).x for step in range(12)]
    again = [rows.batch(step, 64).x for step in (0, 5, 11, 3)]  # backwards and ahead
    assert all(torch.equal(first[step], x) for step, x in zip((0, 5, 11, 3), again, strict=True))
    assert torch.equal(others.batch(11, 64).x, first[11])
    assert not torch.equal(stream().batch(0, 64, seed=1).x, first[0])
    assert torch.equal(torch.cat(first[:4]), stream().batch(0, 256).x)  # the order does not depend on the size


def test_bfloat16_where_float16_would_overflow(stream, make_tiny, tmp_path):
    lm = make_tiny("llama")
    loud = lm.tokenizer(" the", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        lm._module.model.embed_tokens.weight[loud] *= 1e6
    rows = stream(sl.Site("embed"), lm=lm, mask=sl.TokenMask(skip_first=False))
    batches = [rows.batch(step, 64) for step in range(20)]
    x, tokens = torch.cat([b.x for b in batches]), torch.cat([b.tokens for b in batches])
    expected = lm._module.model.embed_tokens.weight[tokens].detach()
    assert (tokens == loud).any() and ((x - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()


# ---- training


def test_fvu_is_that_of_a_store(stream, store):
    """At equal tokens, on the same held-out rows."""
    held_out, found = store.at(A).unseen(2000).x, []
    for rows in (store.at(A), stream()):
        sae = coder()
        sl.train(sae, rows, config(tokens=20_000, batch_size=128))
        x_hat = sae(held_out).x_hat.detach()
        found.append(float((held_out - x_hat).square().sum() / (held_out - held_out.mean(0)).square().sum()))
    assert abs(found[0] - found[1]) < 0.005, found


def test_a_run_and_its_coder(stream, tiny_lm, small_text):
    sae, rows = coder(), stream()
    run = sl.train(sae, rows, config(steps=20), watch=(tiny_lm, small_text.held_out))
    assert sae.site == A and sae.mask == rows.mask and sae.meta["text"] == small_text.name
    assert {"fvu_held_out", "l0_held_out"} <= run.history[-1].keys() and "passes" not in run.history[-1]
    assert "1,280 tokens: last batch" in repr(run)
    assert sl.evals.reconstruction(sae, tiny_lm, small_text.held_out, tokens=100, context=32).tokens > 0


def test_the_model_reads_while_the_coder_steps(stream, passes):
    rows = stream()
    sl.train(coder(), rows, config(steps=20))
    assert {name.split("_")[0] for name, *_ in passes} == {"MainThread", "sae"}  # the start; all that follows
    wait()
    many = len(passes)
    assert rows.watched is not None and rows.reserved(50) is not None  # these rows are still there
    assert len(passes) == many


def test_reserved_documents_cost_no_reading(stream, small_text, passes):
    """Past the start of the text, whose held-out rows are needed."""
    rows = stream()
    contexts = small_text.contexts(rows.lm.tokenizer, rows.lm.prefix_id, 32)
    reserved = {tuple(c.ids) for c in contexts if c.documents[0] % 5 == 4}
    list(rows.blocks())
    assert reserved & {ids for *_, read in passes for ids in read}
    passes.clear()
    for step in range(40):
        rows.batch(step, 64)
    read = {ids for *_, read in passes for ids in read}
    assert len(read) > 60 and not reserved & read


def test_several_coders_and_sites_share_one_pass(stream, passes):
    one = stream()
    sl.train(coder(), one, config(steps=20))
    wait()
    alone = sum(tokens for _, tokens, _ in passes)
    passes.clear()
    sweep = sl.sweep({"TopK": {"k": [2, 4]}}, stream([A, B]), config(steps=20), d_sae=96)
    assert sum(tokens for _, tokens, _ in passes) < 1.2 * alone + 3 * 256
    assert len(sweep.coders) == 4 and {row["site"] for row in sweep.rows} == {A.key, B.key}
    for sae, row in zip(sweep.coders, sweep.rows, strict=True):
        mine = sl.TopK(48, 96, k=row["k"])
        sl.train(mine, stream([A, B]).at(row["site"]), config(steps=20))
        assert same(mine, sae)
    assert sweep.tokens > 0 and all(0 < row["fvu"] < 1 for row in sweep.rows)


def test_transcoders_and_crosscoders(stream, store):
    for make in (lambda: sl.Transcoder(48, 96, k=4), lambda: sl.Crosscoder(48, 96, layers=2, k=4)):
        sae, rows = make(), stream([A, B])
        sl.train(sae, rows, config(steps=10))
        assert {*sae.reads, *sae.writes} == {A, B} and (sae.f_scale > 0).any()
    batch = stream([A, B]).view([A], [B]).batch(0, 64)
    x = torch.cat([x for _, x in store.at(A).blocks()])
    rows = [int((x == row).all(1).nonzero()[0]) for row in batch.x]
    found = store.view([A], [B]).unseen(1)  # the form
    assert batch.target.shape[1:] == found.target.shape[1:]
    other = store.rows(np.array(rows), B.key)
    alike = [int((x == row).all(1).sum()) == 1 for row in batch.x]  # rows that are there once
    assert sum(alike) > 40 and torch.equal(batch.target[alike], other[alike])
    assert torch.equal(batch.tokens[alike], store.rows(np.array(rows), "token")[alike])


def test_a_model_in_bfloat16(stream, make_tiny, tokenizer, make_module):
    lm = sl.LM(make_module("llama", len(tokenizer)).bfloat16(), tokenizer=tokenizer)
    rows = stream(lm=lm)
    sae = coder()
    run = sl.train(sae, rows, config(steps=20))
    assert sae.W_dec.dtype == torch.float32 and run.history[-1]["fvu"] < run.history[0]["fvu"]


def test_memory_is_flat(stream):
    rows = stream()
    rows.batch(0, 64)
    tracemalloc.start()
    found = []
    for step in range(1, 201):
        rows.batch(step, 64)
        if step % 50 == 0:
            found.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    # Half of the rows that were served between; what the model has read ahead goes up and down by 15 % of them.
    assert found[-1] - found[0] < 150 * 64 * 48 * 2 / 2, found


# ---- interrupted


@pytest.mark.parametrize("stop, total, keep", [(7, 40, None), (25, 40, "disk"), (60, 90, None)])  # last: second pass
def test_a_resumed_run_is_an_unbroken_one(stream, tmp_path, stop, total, keep):
    def made(folder):
        return stream(keep=keep, path=tmp_path / folder if keep else None)

    def interrupt(event):
        if event.kind == "step" and event.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sl.train(coder(), made("kept"), config(steps=total), path=tmp_path / "run", callbacks=[interrupt])
    resumed, unbroken = coder(), coder()
    run = sl.train(resumed, made("kept"), config(steps=total), path=tmp_path / "run")
    assert run.history == sl.train(unbroken, made("other"), config(steps=total)).history
    assert same(resumed, unbroken)


def test_a_resumed_sweep_is_an_unbroken_one(stream, tmp_path):
    def interrupt(event):
        if event.kind == "step" and event.step == 15:
            raise KeyboardInterrupt  # the others are at step 14

    def sweep(**kwargs):
        return sl.sweep({"TopK": {"k": [2, 4]}}, stream([A, B]), config(steps=20), d_sae=96, **kwargs).coders

    with pytest.raises(KeyboardInterrupt):
        sweep(path=tmp_path, callbacks=[interrupt])
    assert all(same(a, b) for a, b in zip(sweep(path=tmp_path), sweep(), strict=True))


def train_own(folder, callbacks=()):
    """A training that a process of its own can make as well."""
    lm = sl.LM(tiny_models.build("llama"), tokenizer=tiny_models.tokenizer(), device="cpu")
    text = sl.load_text([document[:1200] for document in sl.load_text()[:18]])
    sae, stream = coder(), sl.Stream(lm, A, text, buffer=2 * HALF, context=32)
    sl.train(sae, stream, config(steps=40), path=folder, callbacks=callbacks)
    return sae


KILLED = """
import os, signal, sys
import torch
from activations import test_streaming as here
torch.set_num_threads(int(sys.argv[2]))
here.sharding.SHARD_TOKENS, here.sharding.FORWARD_TOKENS = 256, 128
def die(event):
    if event.kind == "step" and event.step == 27:
        os.kill(os.getpid(), signal.SIGKILL)
here.train_own(sys.argv[1], [die])
"""


def test_killed_and_called_again(tmp_path):
    run = str(tmp_path / "run")
    called = [sys.executable, "-c", KILLED, run, str(torch.get_num_threads())]
    killed = subprocess.run(called, cwd=Path(__file__).parents[1], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps = []
    again = train_own(run, [lambda event: steps.append(event.step) if event.kind == "step" else None])
    assert steps[0] == 21 and same(again, train_own(tmp_path / "other"))


def test_a_checkpoint_without_a_place_in_the_text_is_refused(stream):
    with pytest.raises(ValueError, match="four whole numbers"):
        stream().resume({"half": 1, "epoch": -1, "shard": 0, "row": 0})


# ---- keep="disk"


def test_it_writes_the_store_as_it_goes(stream, store, small_text, tmp_path, passes, caplog):
    rows = stream([A, B], keep="disk", path=tmp_path / "kept")
    sl.train(coder(), rows.at(A), config(steps=20))
    kept = rows.store
    assert 20 * 64 < len(kept) < len(store)
    first = np.arange(len(kept))
    assert kept.mask == store.mask and torch.equal(kept.rows(first, B.key), store.rows(first, B.key))
    wait()
    passes.clear()
    again = stream([A, B], keep="disk", path=tmp_path / "kept")
    assert torch.equal(again.at(A).batch(0, 64).x, rows.at(A).batch(0, 64).x) and not passes  # it lies there
    sl.train(coder(), again.at(A), config(steps=100))  # more than the text has
    whole = sl.harvest(again.lm, [A, B], small_text, 10**6, path=tmp_path / "kept", context=32)
    assert len(whole) == len(store) and torch.equal(whole.rows(np.arange(len(whole)), A.key), everything(store))
    assert "asked for" in caplog.text  # it is known to be complete


def everything(store):
    return store.rows(np.arange(len(store)), A.key)


def test_a_stream_without_keep_writes_nothing(stream, cache_folder):
    before = sorted(cache_folder.rglob("*"))
    rows = stream()
    sl.train(coder(), rows, config(steps=10))
    assert sorted(cache_folder.rglob("*")) == before
    with pytest.raises(ValueError, match="keeps nothing"):
        rows.store  # noqa: B018


# ---- what cannot be


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"keep": "memory"}, "keep must be 'disk' or None, got 'memory'"),
        ({"path": "here"}, "without keep: pass keep='disk'"),
        ({"buffer": 10}, "buffer must be at least 64, got 10"),
        ({"sites": "resid_post-9"}, "9"),
        ({"context": 10**6}, "longer than the"),
        ({"text": [""]}, "empty"),
    ],
)
def test_arguments_that_are_refused(stream, arguments, words):
    with pytest.raises(ValueError, match=words):
        stream(**arguments)


def test_trainings_that_are_refused(stream, small_text, tiny_lm):
    with pytest.raises(ValueError, match=r"must be said: pass sl.TrainConfig\(tokens="):
        sl.train(coder(), stream())
    with pytest.raises(ValueError, match=r"two batches, got 512 rows for batch_size=300: pass sl.Stream\(..., buffer="):
        sl.train(coder(), stream(), config(steps=1, batch_size=300))
    short = stream(text=["A fox jumps over the dog, and it runs. " * 8], buffer=4096)
    with pytest.raises(ValueError, match=r"ends before a batch is full: it has \d+ training rows, batch_size is 512"):
        sl.train(coder(), short, config(steps=1, batch_size=512))
    with pytest.raises(ValueError, match="less than one context"):
        sl.train(coder(), stream(text=["A fox."]), config(steps=1))
    with pytest.raises(ValueError, match="d_in=12, the activations have width 48"):
        sl.train(sl.TopK(12, 24, k=2), stream(), config(steps=1))
    with pytest.raises(ValueError, match="no token of the text is left to train on"):
        sl.train(coder(), stream(mask=sl.TokenMask(max_norm={A.key: 0.0})), config(steps=1))
    with pytest.raises(ValueError, match=r"has no Site.*; it has"):
        stream().at(B)


def test_a_text_too_short_to_hold_any_out_is_told_of(stream, caplog):
    rows = stream(text=["A fox jumps over the dog, and it runs away. " * 10], buffer=512)
    with caplog.at_level(logging.WARNING):
        run = sl.train(coder(), rows, config(steps=5, batch_size=16))
    assert "no token of this text is held out (it is too short)" in caplog.text
    assert "the text has ended: training goes on from its start again" in caplog.text
    assert "fvu_held_out" not in run.history[-1]


def test_a_model_that_fails_fails_the_training(stream, monkeypatch):
    rows, run = stream(), sl.LM.run
    rows.watched  # noqa: B018 (the start is read)

    def fails(*args, **kwargs):
        raise RuntimeError("the model is broken")

    monkeypatch.setattr(sl.LM, "run", fails)
    with pytest.raises(RuntimeError, match="the model is broken"):
        sl.train(coder(), rows, config(steps=20))
    monkeypatch.setattr(sl.LM, "run", run)
    sl.train(coder(), rows, config(steps=20))  # the same stream serves again


# ---- estimates


def test_an_estimate(stream, tmp_path):
    short, long = (sl.estimate(sl.train, coder(), stream(), config(tokens=t)) for t in (10_000, 1_000_000))
    assert long.minutes > 10 * short.minutes > 0 and long.parts["minutes of the model"] > 0
    wide = sl.estimate(sl.train, coder(), stream(buffer=200_000), config(tokens=10_000))
    assert wide.ram - short.ram > 200_000 * 96 and short.disk == 0
    kept = sl.estimate(sl.train, coder(), stream(keep="disk", path=tmp_path / "s"), config(tokens=10_000))
    assert kept.disk > 0 and not (tmp_path / "s").exists()  # the trial wrote elsewhere
