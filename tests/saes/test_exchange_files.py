"""Files as people have them: moved to folders of other names, of former versions, one file alone, of coders that are
none of ours. What is in them decides, or the load says what they leave open and how to say it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sae_lab as sl
from sae_lab.types import Site
from tests.saes.conftest import D_IN, D_SAE, make, normal
from tests.saes.test_exchange import X, close, dense, fill, jump, jump_tensors, sparse_coder, x_hat_of

UNIT = X * D_IN**0.5 / X.norm(dim=1, keepdim=True)


# ---------------------------------------------------------------------------------------------- Gemma Scope


@pytest.fixture
def archive(tmp_path):
    """Gemma Scope's params.npz in a folder of another name."""
    folder = tmp_path / "downloads" / "17"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{n: t.numpy() for n, t in jump_tensors().items()})
    return folder / "params.npz"


def test_gemma_scope_elsewhere_asks_what_it_is(archive):
    """A transcoder's file has the same tensors as an autoencoder's, and as one it would be silently wrong."""
    for path in (archive, archive.parent):
        with pytest.raises(ValueError, match=r"where its coder reads, nor whether it is a transcoder: pass model= .*w"):
            sl.load(path)
        with pytest.raises(ValueError, match=r"pass model= "):
            sl.load(path, reads="blocks.3.hook_resid_post")
    sae = sl.load(archive, model="google/gemma-2-2b", reads="blocks.3.hook_resid_post")
    f, x_hat = jump(jump_tensors(), X)
    close(sae.encode(X), f)
    close(sae(X).x_hat, x_hat)
    assert not sae.transcodes and sae.site == Site("resid_post", 3) and sae.meta["model"] == "google/gemma-2-2b"
    assert sl.load(archive.parent, model="google/gemma-2-2b", reads=Site("resid_post", 3)).reads == sae.reads

    said = {"reads": "blocks.3.ln2.hook_normalized", "writes": "blocks.3.hook_mlp_out"}
    told = sl.load(archive.parent, model="google/gemma-2-2b", **said)
    f, x_hat = jump(jump_tensors(), UNIT)
    close(told.encode(X), f)
    close(told(X).x_hat, x_hat)
    assert told.transcodes and (told.reads, told.writes) == ((Site("resid_mid", 3),), (Site("mlp_out", 3),))
    with pytest.raises(AssertionError, match="relative error"):  # the control: the two differ
        close(told.encode(X), sae.encode(X), 0.1)
    with pytest.raises(ValueError, match=r"read the MLP's input without the norm's gain: pass reads='blocks.3.ln2"):
        sl.load(archive, model="google/gemma-2-2b", reads="mlp_in-3", writes="mlp_out-3")
    with pytest.raises(ValueError, match=r"'somewhere' names no place: write sl.Site"):
        sl.load(archive, model="google/gemma-2-2b", reads="somewhere")


def test_what_a_caller_says_is_what_the_hubs_name_says(archive, tmp_path):
    """The folder's name is a way to say the same."""
    for name, site, more in (
        ("2b-pt-att/layer_3", "blocks.3.attn.hook_z", {}), ("2b-pt-mlp/layer_3", "mlp_out-3", {}),
        ("2b-pt-transcoders/layer_3", "blocks.3.ln2.hook_normalized", {"writes": "mlp_out-3"}),
        ("2b-pt-res/embedding", "embed", {}),
    ):  # fmt: skip
        folder = tmp_path / f"gemma-scope-{name}/width_16k/average_l0_7"
        folder.mkdir(parents=True)
        (folder / archive.name).write_bytes(archive.read_bytes())
        named = sl.load(folder)
        told = sl.load(archive, model="google/gemma-2-2b", reads="hook_embed" if site == "embed" else site, **more)
        assert told.fingerprint() == named.fingerprint() and told.input_norm == named.input_norm
        assert (told.reads, told.writes, told.meta["model"]) == (named.reads, named.writes, named.meta["model"])


def test_a_scaling_factor_in_gemma_scope_is_not_dropped(archive):
    t = {n: v.numpy() for n, v in jump_tensors().items()}
    for factor, refused in ((1.0, False), (2.0, True)):
        np.savez(archive, **t, scaling_factor=np.full(D_SAE, factor, dtype=np.float32))
        if refused:
            with pytest.raises(ValueError, match="has a scaling_factor that is not 1"):
                sl.load(archive, model="google/gemma-2-2b", reads="resid_post-3")
        else:
            assert sl.load(archive, model="google/gemma-2-2b", reads="resid_post-3").site == Site("resid_post", 3)


def test_gemma_scope_2_by_its_config_alone(tmp_path):
    t = {n.lower(): v for n, v in jump_tensors().items()}
    save_file(t, tmp_path / "params.safetensors")
    with pytest.raises(ValueError, match=r"no config.json that says where its coder reads"):
        sl.load(tmp_path)
    said = sl.load(tmp_path, reads="mlp_in-7", writes="mlp_out-7", model="google/gemma-3-1b-pt")
    into, out = "model.layers.7.pre_feedforward_layernorm.output", "model.layers.7.post_feedforward_layernorm.output"
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": into}
    (tmp_path / "config.json").write_text(json.dumps(config | {"hf_hook_point_out": out}))
    for path in (tmp_path, tmp_path / "params.safetensors", tmp_path / "config.json"):
        sae = sl.load(path)
        assert sae.transcodes and (sae.reads[0], sae.writes[0]) == (Site("mlp_in", 7), Site("mlp_out", 7))
        assert (said.reads, said.writes, said.fingerprint()) == (sae.reads, sae.writes, sae.fingerprint())


# ---------------------------------------------------------------------------------------------- one file alone


def test_qwen_scope_elsewhere(tmp_path):
    t = {"W_enc": normal(D_SAE, D_IN, seed=1), "W_dec": normal(D_IN, D_SAE, seed=2), "b_enc": normal(D_SAE, seed=3),
         "b_dec": normal(D_IN, seed=4)}  # fmt: skip
    for layer in (10, 2):
        torch.save(t, tmp_path / f"layer{layer}.sae.pt")
    with pytest.raises(ValueError, match=r"pass id=, \['layer2.sae.pt', 'layer10.sae.pt'\]"):
        sl.load(tmp_path)
    with pytest.raises(ValueError, match=r"k stands only in its repository's name .*: pass k="):
        sl.load(tmp_path, "layer2.sae.pt")
    pre = X @ t["W_enc"].T + t["b_enc"]
    top = pre.topk(4)
    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    for sae in (sl.load(tmp_path, "layer2", k=4), sl.load(tmp_path / "layer2.sae.pt", k=4)):
        close(sae.encode(X), codes)
        assert sae.site == Site("resid_post", 2) and sae.path == str((tmp_path / "layer2.sae.pt").resolve())
    turned = t | {n: t[n].T.contiguous() for n in ("W_enc", "W_dec")}  # gpt2-small-hook-z has them so
    torch.save(turned, tmp_path / "z.pt")
    with pytest.raises(ValueError, match=r"what it reads stands only in z_cfg.json, which is missing: pass reads="):
        sl.load(tmp_path / "z.pt")
    sae = sl.load(tmp_path / "z.pt", reads="blocks.3.attn.hook_z")
    close(sae.encode(X), ((X - t["b_dec"]) @ turned["W_enc"] + t["b_enc"]).relu())
    assert sae.site == Site("attn_z", 3)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
def test_a_transcoder_of_circuit_tracer(tmp_path, skip, threshold):
    """relu or jump of x W_enc^T + b_enc; W_skip reads x too (circuit-tracer 0.5, single_layer_transcoder.py)."""
    t = {"W_enc": normal(D_SAE, D_IN, seed=1) / 4, "W_dec": normal(D_SAE, D_IN, seed=2), "b_enc": normal(D_SAE, seed=3),
         "b_dec": normal(D_IN, seed=4)}  # fmt: skip
    floor = normal(D_SAE, seed=5).abs()
    t |= {"W_skip": normal(D_IN, D_IN, seed=6)} if skip else {}
    t |= {"activation_function.threshold": floor} if threshold else {}
    save_file(t, tmp_path / "layer_5.safetensors")
    with pytest.raises(ValueError, match=r"stands in config.yaml beside it.*: pass reads= and writes="):
        sl.load(tmp_path / "layer_5.safetensors")
    told = sl.load(tmp_path, reads="mlp_in-5", writes="mlp_out-5", model="Qwen/Qwen3-4B")
    (tmp_path / "config.yaml").write_text(
        "model_name: Qwen/Qwen3-4B\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
    )
    sae = sl.load(tmp_path, "layer_5")
    f = (X @ t["W_enc"].T + t["b_enc"]).relu()
    f = f * (f > floor) if threshold else f
    close(sae.encode(X), f)
    close(sae(X).x_hat, f @ t["W_dec"] + t["b_dec"] + (X @ t["W_skip"].T if skip else 0))
    assert sae.transcodes and (sae.reads[0], sae.writes[0]) == (Site("mlp_in", 5), Site("mlp_out", 5))
    assert (told.reads, told.writes, told.fingerprint()) == (sae.reads, sae.writes, sae.fingerprint())
    if threshold:
        save_file(t | {"activation_function.threshold": -floor}, tmp_path / "layer_5.safetensors")
        with pytest.raises(ValueError, match="a threshold below 0 lets codes be negative"):
            sl.load(tmp_path, "layer_5")


@pytest.mark.parametrize("backup", [False, True])
def test_dictionary_learning_in_the_middle_of_training(tmp_path, backup):
    """``checkpoints/ae_1000.pt`` has no config of its own; the run's lies above. A backup holds its own."""
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE

    theirs = fill(BatchTopKSAE(D_IN, D_SAE, 4))
    theirs.threshold.fill_(0.2)
    trainer = {"dict_class": "BatchTopKSAE", "k": 4, "layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped",
               "submodule_name": "resid_post_layer_3"}  # fmt: skip
    file = tmp_path / "trainer_0" / "checkpoints" / "ae_1000.pt"
    file.parent.mkdir(parents=True)
    if backup:
        torch.save({"step": 1000, "ae": theirs.state_dict(), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
                    "config": trainer, "norm_factor": 2.5}, file)  # fmt: skip
        with torch.no_grad():
            theirs.scale_biases(2.5)
    else:
        torch.save(theirs.state_dict(), file)
        with pytest.raises(ValueError, match=r"fit AutoEncoderTopK and BatchTopKSAE: write config.json"):
            sl.load(file)
        (tmp_path / "trainer_0" / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    for sae in (sl.load(file), sl.load(tmp_path / "trainer_0", "checkpoints/ae_1000"), sl.load(file.parent)):
        close(sae.encode(X), theirs.encode(X))
        close(sae(X).x_hat, theirs(X))
        assert sae.site == Site("resid_post", 3) and sae.meta["model"] == "EleutherAI/pythia-70m-deduped"


# ---------------------------------------------------------------------------------------------- former versions


def test_batchtopk_before_it_had_a_threshold(tmp_path, caplog):
    """Until December 2024 it took the largest of a batch at inference too. A row's codes need a threshold."""
    t = {"encoder.weight": normal(D_SAE, D_IN, seed=1), "encoder.bias": normal(D_SAE, seed=2),
         "decoder.weight": normal(D_IN, D_SAE, seed=3), "b_dec": normal(D_IN, seed=4)}  # fmt: skip
    trainer = {"dict_class": "BatchTopKSAE", "k": 6, "layer": 3, "submodule_name": "resid_post_layer_3"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    for more in ({}, {"k": torch.tensor(6)}):
        torch.save({**t, **more}, tmp_path / "ae.pt")
        sae = sl.load(tmp_path)
        assert "no fitted threshold: call sae.calibrate" in caplog.text
        with pytest.raises(ValueError, match="no inference threshold yet"):
            sae.encode(X)
        sae.calibrate([normal(500, D_IN, seed=8)])
        assert (sae.encode(normal(500, D_IN, seed=8)) > 0).float().sum(1).mean() == pytest.approx(6, abs=0.1)


@pytest.mark.parametrize("name", ["MatryoshkaBatchTopKSAE", "MatroyshkaBatchTopKSAE"])
def test_matryoshka_as_it_was_spelled(tmp_path, name):
    t = jump_tensors() | {"threshold": torch.tensor(0.3), "k": torch.tensor(4), "group_sizes": torch.tensor([10, 30])}
    torch.save(t, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": 4}}))
    sae = sl.load(tmp_path)
    pre = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    close(sae.encode(X), pre * (pre > 0.3))
    assert sae.prefixes == (10, 40)


def test_dictionary_learning_from_input_to_output(tmp_path):
    """Its transcoders have an autoencoder's tensors; the buffer's config tells."""
    t = {"encoder.weight": normal(D_SAE, D_IN, seed=1), "encoder.bias": normal(D_SAE, seed=2),
         "decoder.weight": normal(D_IN, D_SAE, seed=3), "decoder.bias": normal(D_IN, seed=4)}  # fmt: skip
    torch.save(t, tmp_path / "ae.pt")
    config = {"trainer": {"dict_class": "AutoEncoderNew", "layer": 3}, "buffer": {"io": "in_and_out"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="from a module's input to its output: pass reads= and writes="):
        sl.load(tmp_path)
    sae = sl.load(tmp_path, reads="mlp_in-3", writes="mlp_out-3")
    assert sae.transcodes and sae.reads == (Site("mlp_in", 3),) and sae.writes == (Site("mlp_out", 3),)
    close(sae.encode(X), (X @ t["encoder.weight"].T + t["encoder.bias"]).relu())


@pytest.fixture
def sparsify():
    return pytest.importorskip("sparsify")


def of_2024(theirs, folder, run=None):
    """As sparsify wrote it before "transcode" stood in cfg.json."""
    theirs.save_to_disk(folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["transcode"], cfg["activation"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    if run is not None:
        (folder.parent / "config.json").write_text(json.dumps(run))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("seeds", [False, True])
def test_sparsify_transcoders_of_2024(sparsify, tmp_path, skip, seeds):
    """"transcode" stood in the run's config only, and b_dec was subtracted. A run of seeds has a folder for each."""
    theirs = sparse_coder(sparsify, skip_connection=skip)  # not a transcoder there: b_dec is subtracted
    run = {"transcode": True, "model": "org/SmolLM2-135M", "ctx_len": 64}
    folder = tmp_path / "layers.5.mlp" / "seed1" if seeds else tmp_path / "layers.5.mlp"
    of_2024(theirs, folder)
    (tmp_path / "config.json").write_text(json.dumps(run))
    for path in (folder, folder / "sae.safetensors", folder / "cfg.json"):
        sae = sl.load(path)
        close(sae.encode(X), dense(theirs, X))
        close(sae(X).x_hat, x_hat_of(theirs, X))
        assert sae.transcodes and (sae.reads, sae.writes) == ((Site("mlp_in", 5),), (Site("mlp_out", 5),))
        assert sae.meta["model"] == "org/SmolLM2-135M" and sae.meta["context"] == 64


def test_sparsify_of_2024_without_its_run(sparsify, tmp_path):
    """Only an autoencoder's decoder was kept at norm 1, whatever the config says."""
    theirs, folder = sparse_coder(sparsify), tmp_path / "layers.5.mlp"
    of_2024(theirs, folder)
    assert sl.load(folder).writes == (Site("mlp_out", 5),) and sl.load(folder).transcodes
    with torch.no_grad():
        theirs.set_decoder_norm_to_unit_norm()
        theirs.W_dec += 1e-3 * normal(D_SAE, D_IN)  # a step of Adam later
    of_2024(theirs, folder)
    sae = sl.load(folder)
    assert not sae.transcodes and sae.reads == sae.writes == (Site("mlp_out", 5),)
    close(sae(X).x_hat, x_hat_of(theirs, X))
    of_2024(sparse_coder(sparsify, skip_connection=True), folder)
    assert sl.load(folder).transcodes, "an autoencoder with a skip would only copy"
    of_2024(sparse_coder(sparsify, normalize_decoder=False), folder)
    with pytest.raises(ValueError, match=r"only its run's config.json says whether it is a transcoder"):
        sl.load(folder)
    assert sl.load(folder, reads="mlp_in-5", writes="mlp_out-5").transcodes
    assert not sl.load(folder, reads="mlp_out-5", writes="mlp_out-5").transcodes


def test_signed_codes_of_sparsify_are_refused(sparsify, tmp_path):
    sparse_coder(sparsify).save_to_disk(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    for signed in (False, True):
        (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "signed": signed}))
        if signed:
            with pytest.raises(ValueError, match=r"keeps their signs \(signed\): that is not supported"):
                sl.load(tmp_path)
        else:
            assert sl.load(tmp_path).k == 4


# ---------------------------------------------------------------------------------------------- no coders of one place


ENC, DEC = normal(2, D_IN, D_SAE), normal(D_SAE, 2, D_IN)
LAYERED = {
    "dictionary_learning": (
        {"ae.pt": {"encoder.weight": ENC, "encoder.bias": normal(D_SAE), "decoder.weight": DEC.permute(1, 0, 2),
                   "decoder.bias": normal(2, D_IN)}}, "crosscoder"),
    "its hub's": ({"model.safetensors": {"encoder.weight": ENC, "decoder.weight": DEC.permute(1, 0, 2)}}, "crosscoder"),
    "model diffing": ({"cc_weights.pt": {"W_enc": ENC, "W_dec": DEC}}, "crosscoder"),
    "SAELens's": ({"sae_weights.safetensors": {"W_enc": ENC, "W_dec": DEC}, "cfg.json": {"d_in": D_IN}}, "crosscoder"),
    "SAELens by name": (
        {"sae_weights.safetensors": jump_tensors(), "cfg.json": {"architecture": "crosscoder"}}, "crosscoder"),
    "Language-Model-SAEs": (
        {"sae_weights.safetensors": jump_tensors(), "config.json": {"sae_type": "crosscoder"}}, "crosscoder"),
    "Gemma Scope 2's": (
        {"params.safetensors": {"w_enc": normal(D_IN, D_SAE), "w_dec": DEC}}, r"cross-layer transcoder \(CLT\)"),
    "Gemma Scope 2's set": (
        {f"params_layer_{n}.safetensors": {"w_enc": normal(D_IN, 4)} for n in (0, 1)}, "crosscoder or a cross-layer"),
    "circuit-tracer": (
        {f"W_{part}_{n}.safetensors": {f"W_{part}_{n}": normal(4, 3)} for part in ("enc", "dec") for n in (0, 1)},
        r"cross-layer transcoder \(CLT\)"),
    "sparsify's": (
        {"sae.safetensors": {"encoder.weight": normal(D_SAE, D_IN), "W_decs.0": normal(D_SAE, D_IN)},
         "cfg.json": {"d_in": D_IN, "k": 4}}, r"cross-layer transcoder \(CLT\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", LAYERED)
def test_crosscoders_and_cross_layer_transcoders_are_refused_by_name(tmp_path, what):
    files, word = LAYERED[what]
    for name, content in files.items():
        if name.endswith(".json"):
            (tmp_path / name).write_text(json.dumps(content))
        elif name.endswith(".pt"):
            torch.save({n: t.contiguous() for n, t in content.items()}, tmp_path / name)
        else:
            save_file({n: t.contiguous() for n, t in content.items()}, tmp_path / name)
    with pytest.raises(ValueError, match=rf"holds a {word}.*: sl.load takes coders that read one place and wri"):
        sl.load(tmp_path)


def test_a_folder_of_many_says_what_it_holds(tmp_path):
    """Also where coders lie deeper, of several formats, and where a folder is empty."""
    make("TopK").save(tmp_path / "a" / "mine")
    make("TopK").save(tmp_path / "b", format="saelens")
    torch.save({"x": normal(2)}, tmp_path / "layer3.sae.pt")
    with pytest.raises(ValueError, match=r"pass id=, \['a/mine', 'b', 'layer3.sae.pt'\]"):
        sl.load(tmp_path)
    with pytest.raises(ValueError, match=r"holds one \(ids here: a/mine, b, layer3.sae.pt\)"):
        sl.load(tmp_path, "c")
    assert sl.load(tmp_path, "a/mine").k == sl.load(tmp_path, "b/sae_weights.safetensors").k == 4
