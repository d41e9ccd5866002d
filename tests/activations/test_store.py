"""harvest and Store: what is on disk is what the model computes, whatever happens in between."""

import json
import logging
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.activations import dealing, sharding

# One step of a harvest by itself: what a first shard fixes.
from sae_lab.activations.sharding import Harvest
from sae_lab.activations.store import ReadAhead, Rows, Store, permute
from sae_lab.types import Batch, Site, TokenMask

A, B, Z = Site("resid_post", 1), Site("mlp_out", 0), Site("attn_z", 1, head=2)
# float16 keeps 11 bits: half a unit in the last place of values at most as large as the largest.
HALF = 2.0**-11


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Many small shards in place of few large ones; all else is as it is."""
    monkeypatch.setattr(sharding, "SHARD_TOKENS", 256)
    monkeypatch.setattr(sharding, "FORWARD_TOKENS", 128)


@pytest.fixture
def harvest(tiny_lm, small_text):
    """sl.harvest of the tiny model on the small text, with short contexts."""

    def call(site=A, text=small_text, tokens=1000, lm=tiny_lm, context=32, **kwargs):
        return sl.harvest(lm, site, text, tokens, context=context, **kwargs)

    return call


def files(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.is_file()}


def everything(store, key):
    return store.rows(np.arange(len(store)), key)


@contextmanager
def passes(lm):
    """Counts forward passes."""
    count = []
    hook = lm._module.get_input_embeddings().register_forward_hook(lambda *_: count.append(1))
    try:
        yield count
    finally:
        hook.remove()


# ---- what is in it


def check_against_read(lm, store, text, sites, context):
    """Every row's value, id, document and position against lm.read on the documents cut by hand."""
    room, pieces = context - 1, set()
    for number, document in enumerate(text):
        ids = lm.tokenizer(document, add_special_tokens=False)["input_ids"]
        pieces |= {(number, start, *ids[start : start + room]) for start in range(0, len(ids), room)}
    row, number = 0, 0
    while row < len(store):
        reading = lm.read([store.context_ids(number).tolist()], sites)
        positions = torch.arange(reading.ids.shape[1])
        kept = store.mask.keep(reading.ids[0], positions, {s: reading[s][0] for s in sites})
        n = min(int(kept.sum()), len(store) - row)
        rows = np.arange(row, row + n)
        documents = store.rows(rows, "document").unique().tolist()
        piece = next(p for p in pieces if p[0] == documents[0] and list(p[2:]) == reading.ids[0, 1:].tolist())
        pieces.remove(piece)  # each is read once
        assert reading.ids[0, 0] == lm.prefix_id and len(documents) == 1
        assert torch.equal(store.rows(rows, "token"), reading.ids[0][kept][:n])
        assert torch.equal(store.rows(rows, "position"), positions[kept][:n])
        for site in sites:
            # The model's own noise under other batch-mates (1e-5) comes on top of float16's.
            error = (store.rows(rows, site.key) - reading[site][0][kept][:n]).abs().max()
            assert error <= (HALF + 1e-4) * everything(store, site.key).abs().max()
        row, number = row + n, number + 1


def test_rows_are_what_the_model_reads(harvest, tiny_lm, small_text, tmp_path):
    store = harvest([A, B, Z], path=tmp_path / "s")
    assert len(store) == 1000
    check_against_read(tiny_lm, store, small_text, [A, B, Z], 32)


def test_rows_of_the_bundled_model(lm, small_text, tmp_path):
    site = Site("resid_post", 4)
    store = sl.harvest(lm, site, small_text, 100, context=64, path=tmp_path / "s")
    check_against_read(lm, store, small_text, [site], 64)
    assert (everything(store, "position") > 0).all(), "the attention sink is left out"
    # Kept tokens have no massive norm; and what is left out is little (1.3 % measured, 1/63 of it position 0).
    assert everything(store, site.key).norm(dim=-1).max() <= store.mask.max_norm[site.key]
    assert 0 < store.excluded < 0.1


def test_sites_share_one_mask(harvest, tmp_path):
    store = harvest([A, B], path=tmp_path / "s")
    assert set(store.mask.max_norm) == {A.key, B.key}
    a, b = store.at(A), store.at("blocks.0.hook_mlp_out")
    assert torch.equal(a.batch(3, 16).tokens, b.batch(3, 16).tokens)
    assert not torch.equal(a.batch(3, 16).x, b.batch(3, 16).x)
    with pytest.raises(ValueError, match=r"several sites .*choose with store.at\(site\)"):
        store.batch(0, 4)
    with pytest.raises(ValueError, match=r"this store has no Site\('embed'\); it has Site\('resid_post', layer=1\)"):
        store.at("embed")


def test_a_token_left_out_at_one_site_is_left_out_at_all(harvest, make_tiny, tmp_path):
    lm = make_tiny("llama", seed=1)
    loud = lm.tokenizer(" the", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        lm._module.model.embed_tokens.weight[loud] *= 50  # beyond 4 medians at embed; its mlp_out reads a norm's output
    both = harvest([Site("embed"), B], lm=lm, path=tmp_path / "both")
    alone = harvest(B, lm=lm, path=tmp_path / "alone")
    assert loud in everything(alone, "token")
    assert loud not in everything(both, "token")


def test_the_mask_of_the_user(harvest, tmp_path):
    store = harvest(mask=TokenMask(special_ids=(28,), skip_first=False), path=tmp_path / "s")
    assert 28 not in everything(store, "token") and (everything(store, "position") == 0).any()
    assert store.mask == TokenMask((28,), False)


def test_what_it_says_of_itself(harvest, tiny_lm, tmp_path):
    store = harvest(path=tmp_path / "s")
    assert (store.site, store.sites, store.width, len(store)) == (A, [A], 48, 1000)
    assert "Store(1,000 tokens of 'list', LlamaForCausalLM" in repr(store) and "% left out" in repr(store)
    identity = json.loads((tmp_path / "s" / "manifest.json").read_text())["identity"]
    assert identity["model_fingerprint"] == tiny_lm.fingerprint()
    assert (identity["sites"], identity["prefix_id"], identity["context"]) == (["resid_post-1"], 1, 32)


def test_contexts(harvest, tmp_path):
    store = harvest(path=tmp_path / "s")
    rows = np.arange(len(store))
    contexts = store.contexts(rows)
    for context in (0, 7, int(contexts[-1])):
        ids = store.context_ids(context)
        mine, positions = store.context_rows(context)
        assert ids[0] == 1 and len(ids) <= 32
        assert (store.contexts(mine[mine < len(store)]) == context).all()
        assert (ids[positions] == everything(Store(store.path), "token").numpy()[mine]).all()


def test_packed(harvest, small_text, tmp_path):
    store = harvest(pack=True, path=tmp_path / "s")
    assert all(len(store.context_ids(c)) == 32 for c in range(5))
    assert len(everything(store, "document").unique()) > 1


# ---- how much


def test_tokens_is_exact_and_grows(harvest, tiny_lm, tmp_path):
    path = tmp_path / "s"
    first = everything(harvest(tokens=300, path=path), A.key)
    assert len(first) == 300
    with passes(tiny_lm) as count:
        more = harvest(tokens=1500, path=path)
    assert len(more) == 1500 and torch.equal(everything(more, A.key)[:300], first)
    whole = harvest(tokens=1500, path=tmp_path / "whole")
    assert files(path) == files(tmp_path / "whole")
    with passes(tiny_lm) as count:
        assert len(harvest(tokens=300, path=path)) == 300
    assert not count, "fewer tokens than there are need no model"
    assert whole.fingerprint == more.fingerprint != harvest(tokens=300, path=path).fingerprint


def test_a_second_call_runs_no_model(harvest, tiny_lm, cache_folder):
    first = harvest(tokens=700)
    assert first.path.parent == cache_folder / "stores"
    with passes(tiny_lm) as count:
        second = harvest(tokens=700)
    assert not count and second.path == first.path
    assert any(e.kind == "stores" and e.path == first.path for e in sl.cache.list())
    assert harvest(B, tokens=700).path != first.path


def test_more_tokens_than_the_text_has(harvest, tiny_lm, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        store = harvest(tokens=10**6, path=tmp_path / "s")
    assert 1000 < len(store) < 10**5
    assert f"asked for 1000000 tokens, the text has {len(store)}" in caplog.text
    with passes(tiny_lm) as count:
        assert len(harvest(tokens=10**6, path=tmp_path / "s")) == len(store)
    assert not count


# ---- what is refused


def test_another_harvest_is_refused(harvest, make_tiny, small_text, tmp_path):
    path = tmp_path / "s"
    harvest(path=path)
    before = files(path)
    other = make_tiny("llama", seed=5)
    for kwargs, words in [
        ({"lm": other}, "model_fingerprint: '.*' there, '.*' now"),
        ({"site": B}, r"sites: \['resid_post-1'\] there, \['mlp_out-0'\] now"),
        ({"text": small_text[:4]}, r"text: 'list' there, 'list\[:4\]' now; text_fingerprint"),
        ({"context": 16}, "context: 32 there, 16 now"),
        ({"lm": make_tiny("llama", prefix=0)}, "prefix_id: 1 there, 0 now"),
        ({"mask": TokenMask()}, "mask: 'default' there"),
    ]:
        with pytest.raises(ValueError, match=f"holds another harvest; it differs in .*{words}.*Pass another path="):
            harvest(path=path, **kwargs)
    assert files(path) == before


def test_nonsense_is_refused_before_anything_is_written(harvest, tmp_path):
    path = tmp_path / "s"
    for kwargs, words in [
        ({"tokens": 0}, "needs tokens >= 1 and context >= 2, got tokens=0"),
        ({"context": 1}, "got tokens=1000, context=1"),
        ({"context": 300}, "context=300 is longer than the 256 tokens this model reads"),
        ({"site": Site("resid_post", 3)}, "out of range: this model has layers 0 to 2"),
        ({"text": []}, "the text is empty"),
    ]:
        with pytest.raises(ValueError, match=words):
            harvest(path=path, **kwargs)
    assert not path.exists()


def test_too_little_text(harvest, small_text, tmp_path):
    with pytest.raises(ValueError, match=r"the text holds 7 tokens, less than one context of 32: .*context=7"):
        harvest(text=["a b c", "held out"], path=tmp_path / "s")
    with pytest.raises(ValueError, match="is empty: pass at least one document"):
        harvest(text=small_text[100:], path=tmp_path / "t")


def test_activations_that_are_not_finite(harvest, make_tiny, tmp_path):
    lm = make_tiny("llama")  # deeper than the embedding, attention spreads it over the context
    token = lm.tokenizer(" the", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        lm._module.model.embed_tokens.weight[token, 3] = float("inf")
    with pytest.raises(
        ValueError, match=rf"not finite \(token id {token} at position \d+\): load the model in float32"
    ):
        harvest(Site("embed"), lm=lm, path=tmp_path / "s")
    assert not list((tmp_path / "s").glob("*.safetensors"))


def test_no_permission(harvest, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"cannot write to the folder .*: pass path= to a folder you own"):
            harvest(path=path)
    monkeypatch.setenv("SAE_LAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="or set SAE_LAB_CACHE to one"):
        harvest()


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Bomb()), b"", b"[]", b"null", b'{"format": "other", "version": 1}', b'{"version": 1}',
        b'{"format": "sae_lab store", "version": 99}', b'{"format": "sae_lab store", "version": 1}',
        b'{"format": "sae_lab store", "version": "new"}',
    ],
)  # fmt: skip
def test_hostile_manifests(harvest, tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "s"
    harvest(tokens=100, path=path)
    (path / "manifest.json").write_bytes(content)
    for call in (lambda: Store(path), lambda: harvest(tokens=100, path=path)):
        with pytest.raises(
            ValueError, match=r"is not a manifest that this version can read .*: delete the folder and harvest again"
        ):
            call()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("header", [b"[]", b"{}", b'{"x": 5}', b'{"x": {"dtype": "F16"}}', b'{"x": {"dtype": "F16", '
    b'"shape": [9], "data_offsets": [0, 18]}}', b"\xff", pickle.dumps(Bomb())])  # fmt: skip
def test_hostile_shards(harvest, tmp_path, header, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = harvest(tokens=100, path=tmp_path / "s")
    (store.path / "000000.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"000000.safetensors is damaged .*call sl.harvest again"):
        Store(store.path).batch(0, 4)
    assert not (tmp_path / "exploded").exists()


def test_no_store(tmp_path):
    with pytest.raises(ValueError, match=r"is no store \(no manifest.json\): make one with sl.harvest"):
        Store(tmp_path)


def test_rows_out_of_range(harvest, tmp_path):
    store = harvest(tokens=100, path=tmp_path / "s")
    for rows, words in (([100], "100 to 100"), ([-1, 5], "-1 to 5"), ([], "none")):
        with pytest.raises(ValueError, match=f"this store has rows 0 to 99, asked for {words}"):
            store.rows(np.array(rows, dtype=np.int64), "token")


# ---- what can happen on the way


@pytest.fixture
def unbroken(harvest, tmp_path):
    """The files of a harvest to which nothing happened."""
    harvest(tokens=3000, path=tmp_path / "unbroken")
    return files(tmp_path / "unbroken")


def test_interrupted_by_the_keyboard(harvest, tiny_lm, unbroken, tmp_path):
    path, calls = tmp_path / "s", []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt

    hook = tiny_lm._module.model.layers[0].register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            harvest(tokens=3000, path=path)
    finally:
        hook.remove()
    assert 0 < len(list(path.glob("*.safetensors"))) < len(unbroken) - 1
    assert len(Store(path)) > 0, "what is whole can be read"
    harvest(tokens=3000, path=path)
    assert files(path) == unbroken


KILLED = """
import sys, time, json, torch
import sae_lab as sl
from sae_lab.activations import dealing, sharding
torch.set_num_threads(1)
sharding.SHARD_TOKENS, sharding.FORWARD_TOKENS = 256, 128
model, path, documents = sys.argv[1:]
lm = sl.LM(model)
lm._module.model.layers[0].register_forward_hook(lambda *_: time.sleep(0.05))  # time to be killed in
sl.harvest(lm, "layers.1", json.load(open(documents)), 3000, context=32, path=path)
"""


def test_killed_and_called_again(make_module, tokenizer, small_text, harvest, tmp_path):
    model, path, documents = tmp_path / "model", tmp_path / "s", [*small_text, *small_text.held_out]
    make_module("llama", len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    command = [sys.executable, "-c", KILLED, str(model), str(path), str(tmp_path / "documents.json")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while len(list(path.glob("0*.safetensors"))) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must have been running"
    torch.set_num_threads(1)
    lm, text = sl.LM(str(model)), documents
    harvest(lm=lm, text=text, tokens=3000, path=tmp_path / "unbroken")
    whole = files(tmp_path / "unbroken")
    there = files(path)
    assert 4 <= sum(name.endswith(".safetensors") for name in there) < len(whole) - 1, (
        "killed too late to mean anything"
    )
    (path / ".000009.safetensors.abc.tmp").mkdir()  # what a kill in mid-write leaves
    (path / ".000009.safetensors.abc.tmp" / "000009.safetensors").write_bytes(b"half")
    with passes(lm) as count:
        harvest(lm=lm, text=text, tokens=3000, path=path)
    assert files(path) == whole
    with passes(lm) as all_passes:
        harvest(lm=lm, text=text, tokens=3000, path=tmp_path / "again")
    assert 0 < len(count) < len(all_passes), "the whole shards were not made again"


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "emptied"])
def test_a_damaged_shard_is_named_and_made_again(harvest, unbroken, tiny_lm, tmp_path, caplog, damage):
    path = shutil.copytree(tmp_path / "unbroken", tmp_path / "s")
    shard = path / "000003.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "gone":
        shard.unlink()
    elif damage == "flipped":
        content[-7] ^= 1
        shard.write_bytes(content)
    else:
        shard.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    with caplog.at_level(logging.WARNING), passes(tiny_lm) as count:
        store = harvest(tokens=3000, path=path)
    assert f"shard 000003.safetensors of {path} is damaged and is harvested again" in caplog.text
    assert files(path) == unbroken
    assert 0 < len(count) <= 3, "only that shard was made again"
    assert len(store) == 3000


def test_a_damaged_shard_behind_the_tokens_asked_for(harvest, unbroken, tmp_path):
    path = shutil.copytree(tmp_path / "unbroken", tmp_path / "s")
    (path / "000009.safetensors").write_bytes(b"")
    store = harvest(tokens=300, path=path)
    assert store.batch(0, 8).x.shape == (8, 48)
    assert files(path) == unbroken


@contextmanager
def largest_file(size):
    """The operating system refuses files over ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_leaves_a_usable_store(harvest, unbroken, tmp_path):
    path = tmp_path / "s"
    first = everything(harvest(tokens=600, path=path), A.key)
    with largest_file(5000), pytest.raises(OSError, match=r"could not write .*make room and call harvest again"):
        harvest(tokens=3000, path=path)
    assert torch.equal(everything(Store(path), A.key)[:600], first)
    harvest(tokens=3000, path=path)
    assert files(path) == unbroken


def test_a_full_disk_leaves_a_usable_store(harvest, unbroken, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small disk can only be mounted by root; the test above stands in for it")
    try:
        with pytest.raises(OSError, match=r"could not write .*No space left.* holds [\d,]+ whole tokens: make room"):
            harvest(tokens=3000, path=disk / "s")
        store = Store(disk / "s")
        assert 0 < len(store) < 3000 and store.batch(0, 8).x.isfinite().all()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        del store
        harvest(tokens=3000, path=disk / "s")
        assert files(disk / "s") == unbroken
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_bfloat16_where_float16_would_overflow(harvest, make_tiny, caplog, tmp_path):
    lm = make_tiny("llama")
    loud = lm.tokenizer(" the", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        lm._module.model.embed_tokens.weight[loud] *= 1e6
    with caplog.at_level(logging.WARNING):
        store = harvest(Site("embed"), lm=lm, mask=TokenMask(skip_first=False), path=tmp_path / "s")
    assert "overflow float16: this shard is kept in bfloat16" in caplog.text
    tokens, x = everything(store, "token"), everything(store, "embed")
    assert (tokens == loud).any() and x.isfinite().all()
    expected = lm._module.model.embed_tokens.weight[tokens].detach()
    # bfloat16 keeps 8 bits; float16, in shards without the loud token, more.
    assert ((x - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()
    assert store.batch(0, 16).x.dtype == torch.float32


def test_the_scale_keeps_small_and_large_activations(harvest, make_tiny, tmp_path):
    for factor in (1e-6, 1e6):
        lm = make_tiny("llama")
        with torch.no_grad():
            lm._module.model.embed_tokens.weight.mul_(factor)
        store = harvest(Site("embed"), lm=lm, tokens=200, path=tmp_path / f"{factor}")
        expected = lm._module.model.embed_tokens.weight[everything(store, "token")].detach()
        assert (everything(store, "embed") - expected).abs().max() <= HALF * expected.abs().max()


# ---- batches


def asked(store, call):
    """The rows of activations that a call reads, and what it returns."""
    seen, read = [], store.rows
    store.rows = lambda rows, key: (seen.extend(rows.tolist()) if key == A.key else None, read(rows, key))[1]
    try:
        result = call()
    finally:
        store.rows = read
    return seen, result


def test_every_pass_sees_each_training_row_once(harvest, tmp_path):
    store = harvest(tokens=500, path=tmp_path / "s")
    n = store.training_rows
    assert 0.7 * 500 < n < 500, "about one row in five is reserved"
    (one, batch), (two, _) = (asked(store, lambda step=step: store.batch(step, n, seed=3)) for step in range(2))
    reserved, x = asked(store, lambda: store.reserved(500))
    assert torch.equal(batch.x, everything(store, A.key)[one]) and torch.equal(x, everything(store, A.key)[reserved])
    for rows in (one, two):
        assert sorted(rows + reserved) == list(range(500)), "a pass and what is reserved are all rows, each once"
        assert sorted(rows) != rows, "not in the order of the text"
    assert one != two, "each pass has an order of its own"


def test_batches_are_seeded_and_stateless(harvest, tmp_path):
    store = harvest(tokens=500, path=tmp_path / "s")
    batches = [store.batch(step, 50, seed=3) for step in range(8)]
    assert torch.equal(Store(store.path, 500).batch(7, 50, seed=3).x, batches[7].x)
    assert not torch.equal(store.batch(7, 50, seed=4).x, batches[7].x)
    assert torch.equal(torch.cat([b.x for b in batches]), store.batch(0, 400, seed=3).x), "one stream, however cut"
    rows, first = asked(store, lambda: store.batch(0, 50, seed=3))
    assert first.target is first.x
    assert torch.equal(first.tokens, everything(store, "token")[rows])
    assert torch.equal(first.positions, everything(store, "position")[rows])


def test_whole_documents_are_reserved(harvest, tmp_path):
    documents = [f"Number {i} went home at {i % 12} o'clock and read of ships and stars." for i in range(45)]
    store = harvest(text=documents, tokens=10**6, context=16, path=tmp_path / "s")
    document = everything(store, "document")
    reserved, trained = (
        set(document[asked(store, call)[0]].tolist())
        for call in (lambda: store.reserved(10**6), lambda: store.batch(0, store.training_rows))
    )
    assert len(reserved) == 9 and not reserved & trained
    assert reserved | trained == set(document.tolist())


def test_blocks_are_the_rows_in_order(harvest, tmp_path):
    store = harvest(tokens=500, path=tmp_path / "s")
    blocks = list(store.blocks(128))
    assert np.array_equal(np.concatenate([r for r, _ in blocks]), np.arange(500))
    assert torch.equal(torch.cat([x for _, x in blocks]), everything(store, A.key))


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 4097])
def test_permute_is_a_bijection(n):
    out = permute(np.arange(n), n, key=5)
    assert np.array_equal(np.sort(out), np.arange(n))
    part = np.arange(n)[:: max(1, n // 7)]
    assert np.array_equal(permute(part, n, key=5), out[part]), "a value does not depend on what is asked beside it"


def test_permute_looks_random():
    n = 4096
    out = permute(np.arange(n), n, key=1)
    # |r| of two independent orders is about 1/sqrt(n) = .016; five times that is no accident.
    assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 5 / n**0.5
    assert abs(np.corrcoef(out, permute(np.arange(n), n, key=2))[0, 1]) < 5 / n**0.5
    assert (np.diff(out) == 1).mean() < 0.01


def test_a_batch_may_span_passes():
    rows = Rows(torch.arange(10.0)[:, None])  # too few to reserve any
    seen = torch.cat([rows.batch(step, 4, seed=0).x for step in range(5)]).flatten()
    assert rows.reserved(10) is None
    assert torch.equal(seen[:10].sort().values, torch.arange(10.0))
    assert torch.equal(seen[10:].sort().values, torch.arange(10.0))
    assert sorted(rows.batch(0, 30, seed=1).x.flatten().tolist()) == sorted(list(range(10)) * 3)


def test_reserved_rows_of_a_tensor_are_in_no_batch():
    n = 5200  # 40 blocks of 128 and a rest: every fifth block is reserved
    rows = Rows(torch.arange(float(n))[:, None])
    reserved = rows.reserved(n).flatten().int().tolist()
    assert len(reserved) == 8 * 128 == n - rows.training_rows
    seen = rows.batch(0, rows.training_rows, seed=2).x.flatten().int().tolist()
    assert sorted(seen + reserved) == list(range(n))
    assert rows.reserved(5).flatten().int().tolist() == reserved[:5]


# ---- plain tensors


def test_tensors_serve_batches_like_a_store():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    rows = Rows(x.half())
    assert (len(rows), rows.shapes, rows.mask, rows.sites) == (100, ((4,), (4,)), None, ())
    epoch = torch.cat([rows.batch(step, 20, seed=1).x for step in range(5)])
    assert epoch.dtype == torch.float32 and torch.equal(epoch.sort(0).values, x.half().float().sort(0).values)
    assert torch.equal(torch.cat([b for _, b in rows.blocks(30)]), x.half().float())
    assert [b.data_ptr() for _, b in Rows(x).blocks(30)] == [x[i:].data_ptr() for i in range(0, 100, 30)], "no copies"
    assert rows.fingerprint == Rows(x.half()).fingerprint != Rows(x.half() + 1).fingerprint


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(0, 4), torch.zeros(3, 4, dtype=torch.int64)])
def test_tensors_that_are_refused(x):
    expected = r"must be a float tensor \(tokens, d_in\) or \(tokens, layers, d_in\), got \("
    with pytest.raises(ValueError, match=expected):
        Rows(x)


# ---- several sites in one batch, and rows that no batch holds


def test_views(harvest, tmp_path):
    """x from some sites, target from others, of the same tokens; several are stacked as layers in the order given."""
    store = harvest([A, B], path=tmp_path / "s")
    a, b = (everything(store, site.key) for site in (A, B))
    for reads, writes, x, target in [
        ([A], [B], a, b),
        ([B], [A], b, a),
        ([B], [B], b, b),
        ([A, B], [A, B], torch.stack([a, b], 1), torch.stack([a, b], 1)),
        ([B, A], [A], torch.stack([b, a], 1), a),
    ]:
        view = store.view(reads, writes)
        assert len(view) == len(store) and view.training_rows == store.at(A).training_rows
        seen, read = [], view.rows
        view.rows = lambda rows, key, read=read, seen=seen: seen.append(rows.tolist()) or read(rows, key)
        batch = view.batch(3, 50, seed=1)
        rows = seen[0]
        assert torch.equal(batch.x, x[rows]) and torch.equal(batch.target, target[rows])
        assert (batch.target is batch.x) == (reads == writes), "what is the same is read once"
        assert all(other == rows for other in seen)
        assert len(seen) == len(reads) + (len(writes) if writes != reads else 0) + 2  # and ids and positions
        assert torch.equal(batch.tokens, everything(store, "token")[rows])
        assert view.shapes == (tuple(x.shape[1:]), tuple(target.shape[1:]))
        assert (view.reads, view.writes, list(view.chosen)) == (tuple(reads), tuple(writes), reads)
        assert torch.equal(view.reserved(30), view.unseen(30).x), "reserved is of what is read"
        assert torch.equal(torch.cat([block for _, block in view.blocks(300)]), x)
    assert torch.equal(store.view([A], [A]).batch(3, 50).x, store.at(A).batch(3, 50).x)


def test_fingerprints_tell_views_apart(harvest, tmp_path):
    store = harvest([A, B], path=tmp_path / "s")
    views = [([A], [A]), ([B], [B]), ([A], [B]), ([B], [A]), ([A, B], [A, B]), ([B, A], [B, A])]
    prints = [store.view(*v).fingerprint for v in views]
    assert len(set(prints)) == len(views) and store.fingerprint not in prints[2:]
    assert prints == [Store(store.path, 1000).view(*v).fingerprint for v in views]
    assert store.at(A).fingerprint == prints[0]
    assert Store(store.path, 900).view([A], [B]).fingerprint != prints[2]
    assert len(Store(store.path, 900).view([A], [B])) == 900, "a view sees as many rows as its store"


def test_views_that_are_refused(harvest, tmp_path):
    store = harvest([A, B, Z], path=tmp_path / "s")
    for reads, writes in (([Site("embed")], [A]), ([A], [Site("embed")])):
        with pytest.raises(
            ValueError, match=r"this store has no Site\('embed'\); it has Site\('resid_post', layer=1\)"
        ):
            store.view(reads, writes)
    assert store.view([A], [Z]).shapes == ((48,), (12,)), "x and target may be of different widths"
    with pytest.raises(ValueError, match=r"sites that are stacked as layers must be equally wide, got \{.*48.*12\}"):
        _ = store.view([A, Z], [A, Z]).shapes


def test_unseen_rows_of_a_store(harvest, tmp_path):
    store = harvest([A, B], tokens=500, path=tmp_path / "s").view([A], [B])
    rows, unseen = asked(store, lambda: store.unseen(10**6))
    trained, _ = asked(store, lambda: store.batch(0, store.training_rows))
    assert sorted(rows + trained) == list(range(500)) and torch.equal(unseen.x, store.reserved(10**6))
    assert torch.equal(unseen.target, everything(store, B.key)[rows])
    assert torch.equal(unseen.tokens, everything(store, "token")[rows])
    some = store.unseen(7)
    assert torch.equal(some.x, unseen.x[:7]) and len(some.tokens) == 7


def test_unseen_rows_of_a_store_too_small_to_reserve_any(harvest, tmp_path):
    store = harvest(text=["The ship went down the river to the sea " * 9], tokens=40, path=tmp_path / "s")
    assert store.reserved(5) is None and store.training_rows == len(store)
    assert torch.equal(store.unseen(3).x, everything(store, A.key)[-3:])
    assert len(store.unseen(10**6).x) == len(store)


def test_a_batch_of_all_tokens_serves_batches():
    """Target and ids stay beside their row, in batches, in what is reserved, and in what is unseen."""
    n = 5200
    x = torch.arange(float(n))[:, None].expand(n, 3)
    whole = Batch(x, (torch.arange(n) % 7)[:, None, None].expand(n, 2, 4).half(), torch.arange(n).int())
    rows = Rows(whole)
    assert rows.shapes == ((3,), (2, 4)) and rows.has_target and len(rows) == n
    for batch in (rows.batch(2, 100, seed=5), rows.unseen(200)):
        number = batch.x[:, 0]
        assert torch.equal(batch.target, (number % 7)[:, None, None].expand(-1, 2, 4))
        assert torch.equal(batch.tokens, number.long()) and batch.target.dtype == torch.float32
    assert torch.equal(rows.unseen(200).x, rows.reserved(200))
    assert torch.equal(rows.batch(2, 100, seed=5).x, Rows(x).batch(2, 100, seed=5).x), "the same rows as of x alone"
    plain = Rows(Batch(x, x, whole.tokens))
    batch = plain.batch(0, 10)
    assert not plain.has_target and batch.target is batch.x and torch.equal(batch.tokens, batch.x[:, 0].long())


def test_fingerprints_of_batches():
    """A run is of its targets and tokens too."""
    g = torch.Generator().manual_seed(0)
    x, y, ids = torch.randn(50, 3, generator=g), torch.randn(50, 3, generator=g), torch.arange(50)
    batches = [Batch(x, x), Batch(x, y), Batch(y, x), Batch(x, x, ids), Batch(x, x, ids.flip(0)), Batch(x, y, ids)]
    prints = [Rows(b).fingerprint for b in batches]
    assert len(set(prints)) == len(batches) and prints == [Rows(b).fingerprint for b in batches]
    assert Rows(x).fingerprint == prints[0] and Rows(Batch(x, x.clone())).fingerprint != prints[0]
    assert Rows(x[::2]).fingerprint == Rows(x[::2].clone()).fingerprint, "of the numbers, not of their memory"


def test_layers_in_a_tensor():
    x = torch.randn(60, 2, 4, generator=torch.Generator().manual_seed(0))
    rows = Rows(x)
    assert rows.shapes == ((2, 4), (2, 4)) and rows.batch(0, 7).x.shape == (7, 2, 4)
    assert torch.equal(torch.cat([b for _, b in rows.blocks(25)]), x)
    assert torch.equal(rows.unseen(5).x, x[-5:]) and rows.reserved(5) is None


# ---- reading ahead


def test_batches_are_read_ahead_by_another_thread():
    read = []

    def batch(step):
        read.append((step, threading.get_ident()))
        return Batch(torch.full((1, 1), float(step)), torch.zeros(1, 1))

    due = ReadAhead(batch, total=5)
    steps = [0, 1, 2, 4, 1]
    assert [int(due(step).x) for step in steps] == steps, "in any order, whatever was read meanwhile"
    mine = {step for step, thread in read if thread == threading.get_ident()}
    assert mine == {0, 4, 1}, "the others were waiting"
    assert max(step for step, _ in read) < 5, "nothing behind the end is read"


def test_what_goes_wrong_in_the_other_thread_is_raised():
    def batch(step):
        if step == 1:
            raise OSError("the disk is gone")
        return Batch(torch.zeros(1, 1), torch.zeros(1, 1))

    due = ReadAhead(batch, total=3)
    due(0)
    with pytest.raises(OSError, match="the disk is gone"):
        due(1)

    def items():
        yield 1
        raise ValueError("no more")

    several = dealing.ahead(items())
    assert next(several) == 1
    with pytest.raises(ValueError, match="no more"):
        next(several)
    assert list(dealing.ahead(range(4))) == [0, 1, 2, 3] and list(dealing.ahead([])) == []


def test_a_text_of_which_no_token_counts(make_tiny, tmp_path):
    """Words that stand alone, each at position 0: the store says so, today and when it is opened again."""
    lm = make_tiny("llama", prefix=None)
    words = r"no token is left in the store .*: its mask leaves out every one of \d+ \(.*position 0.*\): harvest longer"
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            sl.harvest(lm, "resid_post-0", ["a"] * 40, tokens=50, path=tmp_path / "alone", context=16)
    with pytest.raises(ValueError, match=words):
        sl.Store(tmp_path / "alone")
    # By another mask they count.
    store = sl.harvest(
        lm, "resid_post-0", ["a"] * 40, tokens=40, path=tmp_path / "all", context=16, mask=TokenMask((), False)
    )
    assert len(store) >= 36  # of a list, one in ten is held out


def test_a_first_shard_of_which_no_token_counts(make_tiny, tmp_path):
    """The norm limit is then that of all its tokens, not a number of its own, by which later ones would be left out."""
    lm, site = make_tiny("llama"), Site("resid_post", 0)
    x = lm.read("The ship went down the river", site)[site][0]
    some = Harvest(lm, [site], sl.load_text(["a"]), tmp_path, {}, TokenMask((), True, {}))
    for mask in (None, some.mask):
        some.mask, some.manifest = mask, {"mask": None, "scales": {}}
        found = some._fix_mask({site: x}, torch.full((len(x),), 500), torch.zeros(len(x), dtype=torch.long))
        limits = {} if mask else {site.key: pytest.approx(4 * float(x.norm(dim=-1).median()))}
        usual = float(x.norm(dim=-1).median()) / 48**0.5
        assert found.max_norm == limits and 0.5 < usual / some.manifest["scales"][site.key] < 2
