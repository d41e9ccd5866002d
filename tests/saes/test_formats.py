"""Coders on disk: whatever lies there is read as weights or refused, and a save that is killed loses nothing."""

import json
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import sae_lab as sl
from sae_lab import files
from sae_lab.saes import packing
from tests.saes.conftest import make, normal


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """The folder of a calibrated BatchTopK; the working directory is a place where a bomb would leave a trace."""
    monkeypatch.chdir(tmp_path)
    coder = make("BatchTopK")
    coder.calibrate([normal(512, 16)])
    yield coder.save(tmp_path / "coder")
    assert not (tmp_path / "exploded").exists(), "code in a file was executed"


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def rewrite(folder, config=None, tensors=None, both=False):
    """Change config.json, the tensors, or (both) the config in config.json and in the header alike."""
    header = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "sae.safetensors")
    if config:
        config(header)
    if tensors:
        tensors(weights)
    (folder / "config.json").write_text(json.dumps(header))
    if both or tensors:
        save_file(weights, folder / "sae.safetensors", metadata={"config": json.dumps(header)})


# ---- files that are something else


HOSTILE = {
    "pickle": pickle.dumps(Bomb()),
    "empty": b"",
    "zeros": bytes(64),
    "a huge header": (2**62).to_bytes(8, "little") + b"{}",
    "text": b"hello",
}


def torch_pickle(path):
    torch.save({"W_enc": torch.zeros(3), "bomb": Bomb()}, path)
    return path.read_bytes()


@pytest.mark.parametrize("what", [*HOSTILE, "torch.save"])
def test_hostile_weights(saved, tmp_path, what):
    content = HOSTILE.get(what) or (torch_pickle(tmp_path / "x.pt") if what == "torch.save" else b"")
    (saved / "sae.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"sae.safetensors is no whole safetensors file .*not read as anything else"):
        sl.load(saved)


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_configs(saved, what):
    (saved / "config.json").write_bytes(HOSTILE[what])
    with pytest.raises(ValueError, match=r"config.json is not a coder's config that this version can read"):
        sl.load(saved)


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"x"', b"{}", b'{"format": "other", "version": 1}'])
def test_configs_that_are_other_json(saved, content):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json is not a coder's config that this version can read"):
        sl.load(saved)


@pytest.mark.parametrize("inside", ["[]", "null", "{}", "no json", '{"format": "other"}'])
def test_other_json_in_the_header(saved, inside):
    save_file(load_file(saved / "sae.safetensors"), saved / "sae.safetensors", metadata={"config": inside})
    with pytest.raises(ValueError, match=r"sae.safetensors is no whole safetensors file"):
        sl.load(saved)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_weights(saved, share):
    file = saved / "sae.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        sl.load(saved)


def test_truncated_config(saved):
    file = saved / "config.json"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is not a coder's config that this version can read"):
        sl.load(saved)


# ---- coders that are not whole


@pytest.mark.parametrize("name", ["W_enc", "b_dec", "threshold", "f_scale"])
def test_missing_and_surplus_tensors(saved, name):
    rewrite(saved, tensors=lambda w: w.pop(name))
    with pytest.raises(ValueError, match=rf"sae.safetensors must hold .*missing or surplus: \['{name}'\]"):
        sl.load(saved)
    rewrite(saved, tensors=lambda w: w.update({name: torch.zeros(3), "extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"extra|W_enc has shape"):
        sl.load(saved)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [("W_enc", (16, 41), (16, 40)), ("W_dec", (16, 40), (40, 16)), ("b_enc", (1,), (40,)), ("threshold", (1,), ())],
)
def test_wrong_shapes(saved, name, shape, said):
    rewrite(saved, tensors=lambda w: w.update({name: torch.zeros(shape)}))
    with pytest.raises(ValueError) as error:
        sl.load(saved)
    assert f"{name} has shape {shape}, its config says {said}" in str(error.value)


def test_a_config_of_another_width(saved):
    """However large a coder the config names, no memory is taken for it."""
    rewrite(saved, config=lambda c: c["config"].update(d_sae=10**13), both=True)
    with pytest.raises(ValueError, match=r"W_enc has shape \(16, 40\), its config says \(16, 10000000000000\)"):
        sl.load(saved)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "f_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(saved, name, value):
    rewrite(saved, tensors=lambda w: w[name].view(-1)[-1].fill_(value))
    with pytest.raises(ValueError, match=f"{name} holds NaN or Inf; this coder's training failed or the file is dam"):
        sl.load(saved)


@pytest.mark.parametrize("both", [False, True])
def test_a_newer_version(saved, both):
    rewrite(saved, config=lambda c: c.update(version=99), both=both)
    with pytest.raises(ValueError, match="format version 99 is newer than 2: upgrade sae_lab"):
        sl.load(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"family": "Quantum"}, "holds a coder of family 'Quantum'; known here: BatchTopK, Crosscoder"),
        ({"family": ["L1"]}, "its 'family' is list, not str"),
        ({"config": {"d_in": 16, "d_sae": 40, "q": 1}}, "has a config that BatchTopK does not take"),
        ({"config": {"d_in": 16, "d_sae": 40, "k": 41}}, "k must be an integer from 1 to d_sae=40, got 41"),
        ({"config": [1]}, "its 'config' is list, not dict"),
        ({"reads": None}, "its 'reads' is NoneType, not list"),
        ({"reads": ["nowhere"]}, "unknown site 'nowhere'"),
        ({"meta": []}, "its 'meta' is list, not dict"),
        ({"version": "new"}, "is not a coder's config that this version can read"),
    ],
)
def test_configs_that_name_no_coder(saved, change, words):
    rewrite(saved, config=lambda c: c.update(change), both=True)
    with pytest.raises(ValueError, match=words):
        sl.load(saved)


def test_a_file_of_a_coder_finds_its_folder(saved, monkeypatch):
    """Its own path is what a file dialogue gives."""
    monkeypatch.chdir(saved)
    for path in (saved / "sae.safetensors", saved / "config.json", "sae.safetensors", "./config.json"):
        coder = sl.load(path)
        assert coder.fingerprint() == sl.load(saved).fingerprint() and coder.path == str(saved.resolve())
    coder = sl.load(saved.parent, id=saved.name)
    assert coder.path == str(saved.resolve()), "so that edits with it can be written down"
    with pytest.raises(ValueError, match="was written by sae_lab, which records these: leave out k, reads"):
        sl.load(saved, k=3, reads="resid_post-1")


def test_no_coder_there(saved, tmp_path):
    with pytest.raises(ValueError, match=r"no coder at .*: pass a folder that sae.save wrote"):
        sl.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no coder in .*: it has no config.json \(sae.save writes one\)"):
        sl.load(tmp_path)
    (saved / "sae.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no coder in .*: it has no sae.safetensors"):
        sl.load(saved)
    with pytest.raises(ValueError, match="with id 'layer_8'"):
        sl.load(saved, id="layer_8")


def test_the_weights_know_their_config(saved, caplog):
    """config.json is for people: where it differs, what was saved with the weights is right."""
    rewrite(saved, config=lambda c: c["config"].update(k=9))
    with caplog.at_level(logging.WARNING):
        assert sl.load(saved).k == 4
    assert "differs from the config inside sae.safetensors, which is used" in caplog.text


def test_weights_without_a_config_inside(saved):
    save_file(load_file(saved / "sae.safetensors"), saved / "sae.safetensors")
    assert sl.load(saved).k == 4


# ---- saving


def test_saving_over_an_old_one(saved):
    other = make("TopK", seed=5)
    other.save(saved)
    assert isinstance(sl.load(saved), sl.TopK) and sl.load(saved).fingerprint() == other.fingerprint()
    assert sorted(f.name for f in saved.iterdir()) == ["config.json", "sae.safetensors"], "nothing is left over"


def test_a_save_that_fails_keeps_the_old_one(saved, monkeypatch):
    from sae_lab import files

    before = sl.load(saved).fingerprint()

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        make("BatchTopK", seed=5).save(saved)
    assert sl.load(saved).fingerprint() == before
    assert sorted(f.name for f in saved.iterdir()) == ["config.json", "sae.safetensors"]


def test_saving_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"cannot write to the folder .*: pass path= to a folder you own"):
            make("TopK").save(path)
    assert (tmp_path / "file").read_text() == "in the way"


# Real processes that save one of two coders over the other without end, each killed at another moment.
KILLED = """
import os, random, signal, sys, time, torch
import sae_lab as sl
from sae_lab import files
torch.set_num_threads(1)
coders = [sl.TopK(64, 2048, k=4, seed=seed) for seed in (1, 2)]
known = {c.fingerprint() for c in coders}
folder = sys.argv[1]
coders[0].save(folder)
half = 0
for kill in range(12):
    child = os.fork()
    if child == 0:
        while True:
            for coder in coders:
                coder.save(folder)
    time.sleep(0.02 + 0.003 * random.Random(kill).random())
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert sl.load(folder).fingerprint() in known
    half += any(name.endswith(".tmp") for name in os.listdir(folder))
print(half)
"""


def test_killed_in_mid_save(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "coder")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no kill fell into a save, so nothing was tried"


# ---- half the disk


def test_float16_rounds_matrices_only(tmp_path):
    coder = make("BatchTopK")
    coder.calibrate([normal(512, 16)])
    whole = coder.save(tmp_path / "whole") / "sae.safetensors"
    half = coder.save(tmp_path / "half", dtype=torch.float16) / "sae.safetensors"
    matrices = 2 * coder.W_enc.numel()
    assert whole.stat().st_size - half.stat().st_size == pytest.approx(2 * matrices, abs=64)
    read = sl.load(tmp_path / "half")
    for name, t in coder.state_dict().items():
        assert read.state_dict()[name].dtype == torch.float32
        limit = 2**-11 * t.abs().max() if t.dim() == 2 else 0  # float16 has 11 bits
        assert (read.state_dict()[name] - t).abs().max() <= limit, name


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["BatchTopK", "Gated", "Transcoder"])
def test_matrices_in_few_bits(tmp_path, family, bits):
    """64 numbers, of one feature, share a scale: rounding loses 1/(2·127) or 1/(2·7) of the largest of them at most."""
    coder = make(family)
    coder.W_enc.data[:, 3] *= 100  # the others must not be rounded by this feature's scale
    if coder.W_enc.stride(0) == 1:
        coder.W_enc.data = coder.W_enc.data.contiguous()  # the same file, however a matrix lies in memory
    packed = coder.save(tmp_path / "packed", bits=bits) / "sae.safetensors"
    half = coder.save(tmp_path / "half", dtype=torch.float16) / "sae.safetensors"
    assert packed.stat().st_size < half.stat().st_size * (bits / 16 + 0.1) + 4_000
    read = sl.load(tmp_path / "packed")
    for name, t in coder.state_dict().items():
        there = read.state_dict()[name]
        if t.dim() < 2:
            assert torch.equal(there.nan_to_num(), t.nan_to_num()), name
            continue
        axis = 0 if name == "W_enc" else 1
        step = t.abs().amax(axis) / (2 ** (bits - 1) - 1)  # each of the 16 numbers is off by half a step at most
        off = (there - t).norm(dim=axis)
        assert bool(off.any()) and bool((off <= 1.001 * step / 2 * 16**0.5).all()), name
    again = sl.load(read.save(tmp_path / "again", bits=8)).state_dict()["W_dec"]
    if bits == 8:
        assert torch.allclose(again, read.W_dec, atol=1e-6), "rounded numbers are rounded to themselves"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(5, 1), (7, 65), (2, 3, 130)])
def test_rows_of_any_width_in_few_bits(shape, bits):
    for name in ("W_enc", "W_skip"):
        # Weights of a coder of large activations are small; float16 would hold no scale for them.
        matrix = normal(*shape) * (1e-9 if name == "W_enc" else 1e9)
        there = packing.unpacked(packing.packed(name, matrix, bits), {name: matrix.to("meta")})
        assert set(there) == {name} and (there[name] - matrix).norm() < {8: 0.01, 4: 0.12}[bits] * matrix.norm()


@pytest.mark.parametrize(("size", "kind"), [(1.0, torch.float16), (1e-4, torch.float32), (1e9, torch.float32)])
def test_scales_take_half_the_room_where_that_costs_nothing(size, kind):
    matrix = size * normal(20, 130)
    matrix[3] = 0.0  # a feature without weights has no scale that float16 must hold
    parts = packing.packed("W_dec", matrix, 8)
    assert parts["W_dec.scale"].dtype == kind
    there = packing.unpacked(parts, {"W_dec": matrix.to("meta")})["W_dec"]
    assert (there - matrix).norm() < 0.006 * matrix.norm() and not there[3].any()


def test_a_damaged_file_of_few_bits(tmp_path):
    coder = make("TopK")
    file = coder.save(tmp_path / "a", bits=4) / "sae.safetensors"
    tensors, notes = files.read_tensors(file)
    for name, tensor in [("W_dec.scale", tensors["W_dec.scale"][:-1]), ("W_dec.int4", tensors["W_dec.int4"][:-32])]:
        files.write_tensors(tensors | {name: tensor}, file, {"config": notes["config"]})
        with pytest.raises(ValueError, match=r"W_dec\.int4 and W_dec\.scale do not fit the shape \(\d+, 16\) of W_dec"):
            sl.load(tmp_path / "a")
    with pytest.raises(ValueError, match="bits must be 8 or 4, in the format 'sae_lab' and without dtype=, got 3"):
        coder.save(tmp_path / "b", bits=3)


def test_a_dtype_that_cannot_hold_the_weights(tmp_path):
    coder = make("TopK")
    coder.W_enc.data[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"torch\.float16 cannot hold W_enc, whose largest number is 1e\+05: save"):
        coder.save(tmp_path / "a", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"torch\.int8 cannot hold W_enc"):
        coder.save(tmp_path / "a", dtype=torch.int8)
    with pytest.raises(ValueError, match=r"only the format 'sae_lab' is written in torch\.float16"):
        coder.save(tmp_path / "b", "saelens", dtype=torch.float16)
    assert not (tmp_path / "a" / "sae.safetensors").exists()
