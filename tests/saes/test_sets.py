"""Transcoders of one model, one a layer."""

import json

import pytest
import torch

import sae_lab as sl


def transcoder(layer, d_sae=24, skip=False, reads="mlp_in", **meta):
    coder = sl.Transcoder(d_in=8, d_sae=d_sae, k=3, seed=layer, skip=skip)
    coder.reads, coder.writes = (sl.Site(reads, layer),), (sl.Site("mlp_out", layer),)
    coder.threshold.fill_(0.5)
    coder.meta |= meta
    return coder.eval()


def test_a_set_is_in_the_order_of_layers_and_may_have_holes():
    coders = sl.TranscoderSet([transcoder(3), transcoder(0, 16, skip=True), transcoder(1)])
    assert coders.layers == [0, 1, 3] and len(coders) == 3 and 2 not in coders and 3 in coders
    assert [coder.d_sae for coder in coders] == [16, 24, 24]
    assert repr(coders) == "TranscoderSet(Transcoder, layers 0-1, 3, 16 to 24 features a layer)"
    with pytest.raises(ValueError, match=r"no transcoder of layer 2: it has layers 0-1, 3"):
        coders[2]
    assert coders.to("cpu") is coders


def test_a_set_comes_back_from_its_folder(tmp_path):
    coders = sl.TranscoderSet([transcoder(0, skip=True), transcoder(2, reads="resid_mid")])
    back = sl.TranscoderSet.load(coders.save(tmp_path / "set"))
    assert back.layers == [0, 2]
    for one, other in zip(coders, back, strict=True):
        assert one.fingerprint() == other.fingerprint() and one.reads == other.reads and other.is_saved
    x = torch.randn(5, 8)
    assert torch.equal(coders[0](x).x_hat, back[0](x).x_hat)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index | {"version": 2}, "version 2"),
        (lambda index: index | {"layers": {"0": "../elsewhere"}}, "its folders are named layer_0"),
        (lambda index: index | {"layers": {"1": "layer_1"}}, "no coder in"),
        (lambda index: {"format": "x"}, "no set that this version can read"),
    ],
)
def test_files_that_are_no_set(tmp_path, change, words):
    folder = sl.TranscoderSet([transcoder(0)]).save(tmp_path / "set")
    index = json.loads((folder / "set.json").read_text())
    index.pop("checksum")
    (folder / "set.json").write_text(json.dumps(change(index)))
    with pytest.raises(ValueError, match=words):
        sl.TranscoderSet.load(folder)
    with pytest.raises(ValueError, match=r"it has no config.yaml; circuit-tracer's have one"):
        sl.TranscoderSet.load(tmp_path)


def test_a_folder_whose_coder_is_of_another_layer(tmp_path):
    folder = sl.TranscoderSet([transcoder(0)]).save(tmp_path / "set")
    transcoder(1).save(folder / "layer_0")
    with pytest.raises(ValueError, match=r"holds a transcoder of layer 1, set.json says 0"):
        sl.TranscoderSet.load(folder)


def wired(reads, writes):
    coder = transcoder(0)
    coder.reads, coder.writes = reads, writes
    return coder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: [], "at least one transcoder, got none"),
        (lambda: [sl.TopK(8, 16, k=2)], "a set takes transcoders, got a TopK without d_out"),
        (lambda: [transcoder(1), transcoder(1)], "one transcoder a layer, got two of layer 1"),
        (lambda: [wired((), ())], "reads one site and writes one"),
        (lambda: [wired((sl.Site("mlp_in", 0),), (sl.Site("mlp_out", 1),))], "writes mlp_out of the same layer"),
        (lambda: [wired((sl.Site("attn_z", 0),), (sl.Site("mlp_out", 0),))], "reads mlp_in, resid_mid, resid_pre"),
        (lambda: [transcoder(0, needs_gain=True)], r"without the gain of the norm before it: pass model="),
        (lambda: [transcoder(0, model="a/b"), transcoder(1, model="a/c")], "layer 0 has model a/b, layer 1 has a/c"),
        (
            lambda: [transcoder(0, model_fingerprint="1"), transcoder(1, model_fingerprint="2")],
            "layer 0 has model_fingerprint 1, layer 1 has 2",
        ),
    ],
)
def test_what_is_no_set(make, words):
    with pytest.raises(ValueError, match=words):
        sl.TranscoderSet(make())


def test_one_model_may_have_several_names():
    one = transcoder(0, model="a/b", model_fingerprint="1")
    assert len(sl.TranscoderSet([one, transcoder(1, model="/a/folder", model_fingerprint="1")])) == 2
    assert len(sl.TranscoderSet([one, transcoder(1, model="unknown")])) == 2
