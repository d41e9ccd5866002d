"""Checksums and limits: what is not what was written is refused, and so is what would take the machine down."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae_lab as sl
from sae_lab import files
from sae_lab.training.checkpoint import CHECKPOINT, EARLIER


def flip(file, at, bit=3):
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


TENSORS = {"x": torch.randn(700, 300), "n": torch.arange(700), "empty": torch.zeros(0, 4), "one": torch.tensor(3.0)}


@pytest.fixture
def written(tmp_path):
    files.write_tensors(TENSORS, tmp_path / "t.safetensors", {"config": '{"a": "é\\n"}'})
    return tmp_path / "t.safetensors"


def test_the_same_tensors_give_the_same_bytes_and_come_back(written, tmp_path):
    read, notes = files.read_tensors(written)
    assert all(torch.equal(read[n], t) for n, t in TENSORS.items()) and notes["config"] == '{"a": "é\\n"}'
    assert all(torch.equal(load_file(written)[n], t) for n, t in TENSORS.items()), "it is a plain safetensors file"
    tables = files.map_tensors(written, "make it again")
    assert all((np.asarray(tables[n]) == t.numpy()).all() for n, t in TENSORS.items())
    files.write_tensors(TENSORS, tmp_path / "again", {"config": '{"a": "é\\n"}'})
    assert (tmp_path / "again").read_bytes() == written.read_bytes()


def test_any_flipped_bit_is_seen(written):
    whole = written.read_bytes()
    draw = np.random.default_rng(0)
    places = [*draw.integers(0, 600, 60), *draw.integers(0, len(whole), 30)]  # the header is short: it gets its share
    for at in map(int, places):
        flip(written, at, int(draw.integers(8)))
        try:
            same = all(torch.equal(files.read_tensors(written)[0][n], t) for n, t in TENSORS.items())
            assert same and whole[at] in b" ", "only a blank behind the header may be another"
        except ValueError:
            pass
        written.write_bytes(whole)


def test_a_table_is_checked_where_it_is_read(written):
    places = files.read_header(written)[0]
    flip(written, written.stat().st_size - 1)  # in the last row of the last tensor
    first, last = "n", max(places, key=lambda name: places[name]["data_offsets"])
    tables = files.map_tensors(written, "make it again")
    assert (tables[first][:9] == TENSORS[first].numpy()[:9]).all(), "what is whole can be read"
    assert (tables[last][np.array([0])] == TENSORS[last].numpy()[:1]).all()
    for rows in (-1, slice(650, None), np.array([3, 699]), (np.array([699]), 0)):
        with pytest.raises(ValueError, match=r"t.safetensors is damaged .* from byte \d.*: make it again"):
            tables[last][rows]
    with pytest.raises(ValueError, match=r"t.safetensors is damaged"):
        np.asarray(tables[last])


def test_files_of_others_have_no_checksum(written):
    save_file(TENSORS, written, {"config": "x"})
    assert files.read_tensors(written)[1] == {"config": "x"}
    assert (files.map_tensors(written, "")["n"][5:7] == [5, 6]).all()


def test_json_that_was_changed(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": [1, 2.5, None], "é": {"7": float("nan")}}, indent=1)
    assert str(files.read_json(tmp_path / "a.json", nan=True)) == "{'b': [1, 2.5, None], 'é': {'7': nan}}"
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("2.5", "2.4"))
    with pytest.raises(ValueError, match='it is damaged; if you changed it yourself, remove its line "checksum"'):
        files.read_json(tmp_path / "a.json", nan=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "deeper than 64 .sae_lab.files.MOST_DEPTH"),
        ('{"a":' * 70 + "1" + "}" * 70, "deeper than 64"),
        ('{"a": ' + "9" * 5000 + "}", "more digits than 300"),
        ('{"a": NaN}', "NaN, which is no number"),
        ("[1]", "a JSON object, got a list"),
        (" " * (files.MOST_JSON + 1), r"more bytes than 33,554,432 \(sae_lab.files.MOST_JSON"),
    ],
)
def test_json_has_limits(tmp_path, content, words):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        files.read_json(tmp_path / "a.json")


# ---- coders


@pytest.fixture
def saved(tmp_path):
    coder = sl.TopK(16, 64, k=4).eval()
    coder.meta = {"mask": {"special_ids": [1], "skip_first": True, "max_norm": {"resid_post-1": 2.0}}, "context": 32}
    return coder.save(tmp_path / "coder")


def test_a_flipped_bit_in_a_coder(saved):
    flip(saved / "sae.safetensors", -300)
    with pytest.raises(ValueError, match=r"sae.safetensors is no whole safetensors file \(it is damaged"):
        sl.load(saved)


META = [
    ("context", "32"), ("context", 0), ("context", True), ("model", 3), ("dead", "0.1"), ("train", []), ("mask", [1]),
    ("expected", {"l0": "3"}), ("mask", {"special_ids": ["1"], "skip_first": True, "max_norm": {}}),
    ("mask", {"special_ids": [1], "skip_first": 1, "max_norm": {}}), ("prefix_id", 2.5),
    ("mask", {"special_ids": [1], "skip_first": True, "max_norm": {"resid_post-1": "2"}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), META)
def test_meta_is_checked_by_type(saved, name, value):
    config = json.loads((saved / "config.json").read_text())
    config["meta"][name] = value
    (saved / "config.json").write_text(json.dumps(config))
    save_file(load_file(saved / "sae.safetensors"), saved / "sae.safetensors", {"config": json.dumps(config)})
    with pytest.raises(ValueError, match=rf"config.json is not a coder's config that this version can read: .*{name}"):
        sl.load(saved)


# ---- checkpoints


def stop(event):
    if event.step == 25:
        raise KeyboardInterrupt


def test_a_damaged_checkpoint_offers_the_one_before(tmp_path):
    x, config = torch.randn(2000, 16), sl.TrainConfig(steps=40, batch_size=64, checkpoint_every=10)
    with pytest.raises(KeyboardInterrupt):
        sl.train(sl.TopK(16, 64, k=4), x, config, path=tmp_path, callbacks=[stop])
    flip(tmp_path / CHECKPOINT, -2000)
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is no .* Delete it, .* of step 20 .check"):
        sl.train(sl.TopK(16, 64, k=4), x, config, path=tmp_path)
    (tmp_path / CHECKPOINT).unlink()
    steps = []
    resumed = sl.train(sl.TopK(16, 64, k=4), x, config, path=tmp_path, callbacks=[lambda e: steps.append(e.step)]).coder
    assert steps[0] == 20 and resumed.fingerprint() == sl.train(sl.TopK(16, 64, k=4), x, config).coder.fingerprint()
    assert not (tmp_path / EARLIER).exists(), "a finished run needs none"
