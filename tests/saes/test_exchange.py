"""Exchange with the peers, the real packages as oracles: they load what we save, we load what they save.

Codes and reconstructions agree within 1e-5 of the largest. dictionary_learning 0.1.0 pins an old nnsight but needs it
only for its buffers, and imports beside a new one. Its and sparsify's formats are never checked through sae-lens: its
sparsify loader transposes W_dec, takes num_latents 0 for 0 features and guesses wrongly whether b_dec is subtracted.
"""

import json
import logging
import os
import pickle
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae_lab as sl
from sae_lab.saes import FAMILIES
from sae_lab.saes.io.places import place
from sae_lab.types import Site
from tests.saes.conftest import D_IN, D_SAE, make, normal

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
X = 3 * normal(32, D_IN, seed=9) + 0.5
D_OUT = 12


def close(a, b, tolerance=1e-5):
    a, b = a.detach().float(), b.detach().float()
    assert a.shape == b.shape
    error = float((a - b).abs().max() / b.abs().max())
    assert error < tolerance, f"relative error {error:.1e}"


def fill(module, seed=0):
    """Random weights everywhere, so that every part of a coder matters; norms of decoder rows all different."""
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(module.named_parameters())):
            scale = 0.5 if p.dim() == 1 else p.shape[-1] ** -0.5
            p.copy_(scale * normal(*p.shape, seed=100 * seed + i))
            if "threshold" in name:
                p.abs_()
            if name in ("b_enc", "encoder.bias", "gate_bias", "b_gate"):
                p.sub_(0.3)
    return module.eval()


def fitted(name, **config):
    coder = make(name, **config)
    with torch.no_grad():
        coder.b_dec += normal(coder.d_out, seed=5)
    coder.calibrate([normal(512, D_IN, seed=8)])
    return coder.eval()


# ---------------------------------------------------------------------------------------------- SAELens


@pytest.fixture(scope="module")
def sae_lens():
    return pytest.importorskip("sae_lens")


def lens(sae_lens, architecture, **options):
    """A SAELens coder for inference, random."""
    base = {"d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": "transcoder" not in architecture}
    base |= {"k": 4} if architecture == "topk" else {}
    base |= {"d_out": D_OUT} if "transcoder" in architecture else {}
    metadata = {"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_pre", "context_size": 64, "prepend_bos": True}
    sae_class, config = sae_lens.registry.get_sae_class(architecture)
    made = sae_class(config(**{**base, **options}))
    made.cfg.metadata = sae_lens.saes.sae.SAEMetadata(**metadata)
    return fill(made)


LENS = [
    ("standard", {}), ("standard", {"apply_b_dec_to_input": False}),
    ("standard", {"normalize_activations": "layer_norm"}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ("gated", {}), ("gated", {"apply_b_dec_to_input": False}),
    ("jumprelu", {}), ("jumprelu", {"apply_b_dec_to_input": False}),
    ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    ("topk", {}), ("topk", {"rescale_acts_by_decoder_norm": True}), ("topk", {"apply_b_dec_to_input": False}),
    ("topk", {"normalize_activations": "layer_norm", "rescale_acts_by_decoder_norm": True}),
    ("transcoder", {}), ("skip_transcoder", {}), ("jumprelu_transcoder", {}), ("jumprelu_skip_transcoder", {}),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "options"), LENS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_we_load_what_saelens_saves(sae_lens, tmp_path, architecture, options):
    theirs = lens(sae_lens, architecture, **options)
    theirs.save_model(tmp_path)
    ours = sl.load(tmp_path)
    codes = theirs.encode(X)
    assert 0 < (codes > 0).float().mean() < 0.9, "the comparison needs codes on and off"
    close(ours.encode(X), codes)
    close(ours(X).x_hat, theirs(X))
    assert ours.reads == (Site("resid_pre", 1),) and not ours.training
    assert ours.meta["model"] == "gpt2" and ours.meta["context"] == 64 and ours.mask is None
    assert ours.meta["f_scale"] == "unknown" and not ours.f_scale.any()


TRAINING = [("standard", {}), ("gated", {}), ("jumprelu", {}), ("topk", {"k": 4}), ("batchtopk", {"k": 4.0}),
            ("matryoshka_batchtopk", {"k": 4.0, "matryoshka_widths": [5, 20, 40]})]  # fmt: skip


@pytest.mark.parametrize(("architecture", "options"), TRAINING, ids=[a for a, _ in TRAINING])
def test_we_load_what_saelens_trains(sae_lens, tmp_path, architecture, options):
    """Its training classes: a finished coder and the unfinished run, with its scaling factor beside, are the same."""
    sae_class, config = sae_lens.registry.get_sae_training_class(architecture)
    theirs = fill(
        sae_class(config(d_in=D_IN, d_sae=D_SAE, normalize_activations="expected_average_only_in", **options))
    )
    if hasattr(theirs, "topk_threshold"):
        theirs.topk_threshold.fill_(0.4)
    theirs.save_model(tmp_path / "run")
    (tmp_path / "run" / "activation_scaler.json").write_text(
        json.dumps({"scaling_factor": 0.7, "has_whitening": False})
    )
    theirs.fold_activation_norm_scaling_factor(0.7)
    theirs.save_inference_model(tmp_path / "done")
    done = sae_lens.SAE.load_from_disk(tmp_path / "done")
    for name in ("done", "run"):
        ours = sl.load(tmp_path / name)
        close(ours.encode(X), done.encode(X))
        close(ours(X).x_hat, done(X))
    assert type(ours).__name__ == {"batchtopk": "BatchTopK", "matryoshka_batchtopk": "Matryoshka"}.get(
        architecture, type(ours).__name__
    )
    if architecture == "matryoshka_batchtopk":
        assert ours.prefixes == (5, 20, 40)


def test_a_scale_that_no_file_says_is_asked_for(sae_lens, tmp_path):
    """With any scale codes would look like codes."""
    theirs = lens(sae_lens, "standard", normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    with pytest.raises(ValueError, match=r"by a factor that its files do not say: pass scale=, √d_in"):
        sl.load(tmp_path)
    ours = sl.load(tmp_path, scale=0.7)
    theirs.fold_activation_norm_scaling_factor(0.7)
    close(ours.encode(X), theirs.encode(X))
    close(ours(X).x_hat, theirs(X))
    with pytest.raises(ValueError, match=r"scale must be a number above 0, by which activ.* got -1"):
        sl.load(tmp_path, scale=-1)
    lens(sae_lens, "standard").save_model(tmp_path / "raw")
    with pytest.raises(ValueError, match="its files say what scale would: leave that out"):
        sl.load(tmp_path / "raw", scale=0.7)


OLD = {
    "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu", "model_name": "gpt2-small",
    "hook_point": "blocks.1.hook_resid_post", "hook_point_layer": 1, "hook_point_head_index": None, "context_size": 128,
    "normalize_activations": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "tensors"),
    [
        ({}, {}),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}, {}),
        ({"apply_b_dec_to_input": False}, {}),
        ({"architecture": "jumprelu"}, {"threshold": normal(D_SAE, seed=7).abs()}),
        ({"normalize_activations": "layer_norm"}, {"scaling_factor": torch.ones(D_SAE)}),
    ],
)
def test_saelens_before_version_6(sae_lens, tmp_path, more, tensors):
    weights = {n: t.detach() for n, t in lens(sae_lens, "standard").state_dict().items()}
    (tmp_path / "cfg.json").write_text(json.dumps({**OLD, **more}))
    save_file(weights | tensors, tmp_path / "sae_weights.safetensors")
    theirs, ours = sae_lens.SAE.load_from_disk(tmp_path), sl.load(tmp_path, centred=False)
    close(ours.encode(X), theirs.encode(X))
    close(ours(X).x_hat, theirs(X))
    assert ours.reads == (Site("resid_post", 1),) and ours.meta["model"] == "gpt2"


# gpt2-small-res-jb's config has what SAELens's trainer of that time wrote, and nothing of the model's processing.
RES_JB = {
    **OLD, "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8, "dataset_path": "Skylion007/openwebtext",
    "l1_coefficient": 8e-05, "lr": 0.0004, "b_dec_init_method": "geometric_median", "expansion_factor": 32, "seed": 42,
}  # fmt: skip


@pytest.mark.parametrize("path", ["gpt2-small-res-jb/blocks.8.hook_resid_pre", "my-sae"])
def test_whether_the_stream_was_centred(sae_lens, tmp_path, path):
    """Configs until September 2024 do not say, and both were usual: with the wrong one codes are others. No folder's
    name decides it."""
    folder = tmp_path / path
    lens(sae_lens, "standard").save_model(folder)
    theirs = sae_lens.SAE.load_from_disk(folder)
    (folder / "cfg.json").write_text(json.dumps(RES_JB))
    with pytest.raises(ValueError, match=r"does not say whether the stream of gpt2-small was centred: pass centred=Tr"):
        sl.load(folder)
    centred, raw = sl.load(folder, centred=True), sl.load(folder, centred=False)
    x = X - X.mean(1, keepdim=True)
    close(centred.encode(X), theirs.encode(x))
    close(centred(X).x_hat, theirs(x))
    close(raw.encode(X), theirs.encode(X))
    with pytest.raises(AssertionError, match="relative error"):  # the control
        close(raw.encode(X), centred.encode(X), 0.01)
    assert centred.site == Site("resid_pre", 8) and centred.meta["centred"] and "centred" not in raw.meta
    for same in (
        {"model_name": "gemma-2b"},  # no LayerNorm: nothing to centre
        {"hook_point": "blocks.8.attn.hook_z"},  # not of the stream
        {"normalize_activations": "layer_norm"},  # centres by itself
        {"model_from_pretrained_kwargs": {}}, {"model_from_pretrained_kwargs": {"center_writing_weights": False}},
    ):  # fmt: skip
        (folder / "cfg.json").write_text(json.dumps({**RES_JB, **same}))
        assert "centred" not in sl.load(folder).meta
    (folder / "cfg.json").write_text(
        json.dumps({**RES_JB, "model_from_pretrained_kwargs": {"center_writing_weights": True}})
    )
    close(sl.load(folder).encode(X), centred.encode(X))


def test_a_finetuned_scale_goes_into_the_decoder(sae_lens, tmp_path):
    """SAELens 6 no longer reads it; its version 5 multiplied codes by it before the decoder."""
    theirs = lens(sae_lens, "standard")
    scaling = normal(D_SAE, seed=7).abs() + 0.5
    save_file(dict(theirs.state_dict()) | {"scaling_factor": scaling}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(OLD))
    with pytest.raises(ValueError, match="a scaling_factor that its config does not switch on"):
        sl.load(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({**OLD, "finetuning_scaling_factor": True}))
    ours = sl.load(tmp_path, centred=False)
    close(ours.encode(X), theirs.encode(X))
    close(ours(X).x_hat, theirs.decode(theirs.encode(X) * scaling))


def test_attention_heads_side_by_side(sae_lens, tmp_path):
    theirs = lens(sae_lens, "standard", reshape_activations="hook_z")
    theirs.cfg.metadata.hook_name = "blocks.2.attn.hook_z"
    theirs.save_model(tmp_path)
    ours = sl.load(tmp_path)
    z = X.reshape(32, 4, D_IN // 4)
    close(ours.encode(X), theirs.encode(z))
    close(ours(X).x_hat, theirs(z).flatten(1))
    assert ours.reads == (Site("attn_z", 2),)


def test_stated_sparsity(sae_lens, tmp_path):
    lens(sae_lens, "standard").save_model(tmp_path)
    frequency = torch.full((D_SAE,), 0.1)
    frequency[:10] = 0
    save_file({"sparsity": torch.log10(frequency + 1e-10)}, tmp_path / "sparsity.safetensors")
    ours = sl.load(tmp_path)
    assert ours.meta["expected"]["l0"] == pytest.approx(3) and ours.meta["dead"] == pytest.approx(0.25)


WRITTEN = [
    ("L1", {}), ("L1", {"drop": 0.3}), ("Tied", {}), ("SqrtL1", {}), ("PAnneal", {}), ("Hoyer", {}), ("SmoothL0", {}),
    ("Gated", {}), ("JumpReLU", {}), ("TopK", {}), ("BatchTopK", {}), ("Matryoshka", {}), ("Ordered", {}),
]  # fmt: skip
TRANSCODERS = [
    (name, {"d_out": D_OUT, "skip": skip}) for name in ("L1", "JumpReLU", "BatchTopK") for skip in (False, True)
]


@pytest.mark.parametrize("norm", ["none", "layer", "length"])
@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize(("name", "config"), WRITTEN, ids=[f"{n}{'-' if c else ''}{'-'.join(c)}" for n, c in WRITTEN])
def test_saelens_loads_what_we_save(sae_lens, tmp_path, name, config, pre_bias, norm):
    ours = fitted(name, **config)
    ours.pre_bias, ours.input_norm = pre_bias, norm
    ours.reads = ours.writes = (Site("attn_out", 3),)
    _saelens_agrees(sae_lens, tmp_path, ours)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == "blocks.3.hook_attn_out"


@pytest.mark.parametrize(("name", "config"), TRANSCODERS)
def test_saelens_loads_our_transcoders(sae_lens, tmp_path, name, config):
    ours = fitted(name, **config)
    ours.reads, ours.writes = (Site("mlp_in", 3),), (Site("mlp_out", 3),)
    _saelens_agrees(sae_lens, tmp_path, ours)


def _saelens_agrees(sae_lens, folder, ours):
    ours.meta = {"model": "gpt2", "mask": {"special_ids": [0], "skip_first": True, "max_norm": {}}, "context": 64}
    ours.save(folder, format="saelens")
    theirs = sae_lens.SAE.load_from_disk(folder)
    assert 0 < (ours.encode(X) > 0).float().mean() < 0.9
    for one in (theirs, back := sl.load(folder)):
        close(one.encode(X), ours.encode(X))
        close(one(X) if one is theirs else one(X).x_hat, ours(X).x_hat)
    assert back.reads == ours.reads and back.writes == ours.writes and back.mask == ours.mask
    assert theirs.cfg.metadata.model_name == "gpt2" and back.meta["context"] == 64
    back.save(folder / "again")  # and from there into our own format
    assert sl.load(folder / "again").fingerprint() == back.fingerprint()


# ---------------------------------------------------------------------------------------------- sparsify


@pytest.fixture(scope="module")
def sparsify():
    return pytest.importorskip("sparsify")


def dense(theirs, x):
    acts, features, _ = theirs.encode(x)
    return torch.zeros(len(x), theirs.num_latents).scatter_(1, features, acts)


def x_hat_of(theirs, x):
    """Its forward. With multi_topk that returns the read-out of 4k features; without it is the same coder."""
    theirs.cfg.multi_topk = False
    return theirs(x).sae_out


def sparse_coder(sparsify, seed=0, **options):
    options = {"num_latents": D_SAE, "k": 4, **options}
    return fill(sparsify.SparseCoder(D_IN, sparsify.config.SparseCoderConfig(**options), dtype=torch.float32), seed)


SPARSIFY = [{}, {"transcode": True}, {"transcode": True, "skip_connection": True}, {"multi_topk": True},
            {"num_latents": 0, "expansion_factor": 3}, {"normalize_decoder": False}]  # fmt: skip


@pytest.mark.parametrize("options", SPARSIFY, ids=lambda o: "-".join(o) or "plain")
def test_we_load_what_sparsify_saves(sparsify, tmp_path, options):
    theirs = sparse_coder(sparsify, **options)
    theirs.save_to_disk(tmp_path / "layers.2.mlp")
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m", "ctx_len": 64}))
    ours = sl.load(tmp_path, id="layers.2.mlp")
    close(ours.encode(X), dense(theirs, X))
    close(ours(X).x_hat, x_hat_of(theirs, X))
    assert ours.writes == (Site("mlp_out", 2),)
    assert ours.reads == (Site("mlp_in" if "transcode" in options else "mlp_out", 2),)
    assert ours.meta["model"] == "EleutherAI/pythia-70m" and ours.meta["context"] == 64
    assert ours.multi == (4 if "multi_topk" in options else 1)


@pytest.mark.parametrize(
    ("name", "config"),
    [("TopK", {}), ("TopK", {"multi": 4}), ("TopK", {"d_out": D_IN}), ("TopK", {"d_out": D_IN, "skip": True})],
)
def test_sparsify_loads_what_we_save(sparsify, tmp_path, name, config):
    ours = fitted(name, **config)
    if not ours.transcodes:
        ours.pre_bias = False  # sparsify always subtracts b_dec: the bias takes it up
    ours.reads = ours.writes = (Site("resid_post", 2),)
    ours.save(tmp_path, format="sparsify")
    theirs, back = sparsify.SparseCoder.load_from_disk(tmp_path), sl.load(tmp_path)
    close(dense(theirs, X), ours.encode(X))
    close(x_hat_of(theirs, X), ours(X).x_hat)
    close(back(X).x_hat, ours(X).x_hat)
    assert back.reads == ours.reads


def test_a_run_of_sparsify_wants_an_id(sparsify, tmp_path):
    for n in (1, 2):
        sparse_coder(sparsify, n).save_to_disk(tmp_path / f"layers.{n}")
    with pytest.raises(ValueError, match=r"pass id=, \['layers.1', 'layers.2'\]"):
        sl.load(tmp_path)
    with pytest.raises(ValueError, match=r"with id 'layers.3'.*ids here: layers.1, layers.2"):
        sl.load(tmp_path, id="layers.3")
    assert sl.load(tmp_path, id="layers.2").reads == (Site("resid_post", 2),)


# ---------------------------------------------------------------------------------------------- dictionary_learning


@pytest.fixture(scope="module")
def dl():
    """{class name: a factory}, and its own loader."""
    pytest.importorskip("dictionary_learning")
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    names = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder")
    made = {name: partial(getattr(dictionary, name), D_IN, D_SAE) for name in names}
    made["AutoEncoderTopK"] = partial(top_k.AutoEncoderTopK, D_IN, D_SAE, 4)
    made["BatchTopKSAE"] = partial(batch_top_k.BatchTopKSAE, D_IN, D_SAE, 4)
    matryoshka = matryoshka_batch_top_k.MatryoshkaBatchTopKSAE
    made["MatryoshkaBatchTopKSAE"] = partial(matryoshka, D_IN, D_SAE, 4, [5, 15, 20])
    return made


def save_dl(theirs, folder, config=True, **trainer):
    torch.save({k: v.cpu() for k, v in theirs.state_dict().items()}, folder / "ae.pt")
    if config:
        k = {"k": 4} if hasattr(theirs, "k") else {}
        trainer = {
            "dict_class": type(theirs).__name__,
            "layer": 2,
            "lm_name": "EleutherAI/pythia-70m-deduped",
            **k,
            **trainer,
        }
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64, "io": "out"}}))


CLASSES = ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK",
           "BatchTopKSAE", "MatryoshkaBatchTopKSAE"]  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_we_load_what_dictionary_learning_saves(dl, tmp_path, name):
    from dictionary_learning.utils import load_dictionary

    theirs = fill(dl[name]())
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        theirs.threshold.fill_(0.4)
    save_dl(theirs, tmp_path, submodule_name="resid_post_layer_2")
    ours = sl.load(tmp_path)
    loaded = load_dictionary(str(tmp_path), "cpu")[0]  # rescales an AutoEncoder's codes by its decoder's norms
    close(ours.encode(X), loaded.encode(X))
    close(ours(X).x_hat, loaded(X))
    assert ours.reads == (Site("resid_post", 2),) and ours.meta["model"] == "EleutherAI/pythia-70m-deduped"
    if name == "MatryoshkaBatchTopKSAE":
        assert ours.prefixes == (5, 20, 40)
    (tmp_path / "config.json").unlink()  # then the tensors' names must tell
    if name in ("AutoEncoderTopK", "BatchTopKSAE"):
        with pytest.raises(ValueError, match="fit AutoEncoderTopK and BatchTopKSAE: write"):
            sl.load(tmp_path)
    else:
        close(sl.load(tmp_path).encode(X), loaded.encode(X))


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize(("name", "config"), WRITTEN, ids=[f"{n}{'-' if c else ''}{'-'.join(c)}" for n, c in WRITTEN])
def test_dictionary_learning_loads_what_we_save(dl, tmp_path, name, config, pre_bias):
    from dictionary_learning.utils import load_dictionary

    ours = fitted(name, **config)
    ours.pre_bias = pre_bias
    ours.reads = ours.writes = (Site("mlp_out", 2),)
    ours.save(tmp_path, format="dictionary_learning")
    theirs, back = load_dictionary(str(tmp_path), "cpu")[0], sl.load(tmp_path)
    close(theirs.encode(X), ours.encode(X))
    close(theirs(X), ours(X).x_hat)
    close(back(X).x_hat, ours(X).x_hat)
    assert back.reads == ours.reads


def test_a_backup_of_training_in_the_same_file_name(dl, tmp_path):
    """Its biases are still in units of x / norm_factor; the finished file's are not."""
    theirs = fill(dl["BatchTopKSAE"]())
    theirs.threshold.fill_(0.2)
    save_dl(theirs, tmp_path)
    torch.save(
        {"step": 10, "ae": theirs.state_dict(), "optimizer": {}, "config": {}, "norm_factor": 2.5}, tmp_path / "ae.pt"
    )
    with torch.no_grad():
        theirs.scale_biases(2.5)
    ours = sl.load(tmp_path)
    close(ours.encode(X), theirs.encode(X))
    close(ours(X).x_hat, theirs(X))


def test_a_threshold_never_fitted(dl, tmp_path, caplog):
    """dictionary_learning writes -1, and would let every positive pre-activation through."""
    save_dl(fill(dl["BatchTopKSAE"]()), tmp_path)
    ours = sl.load(tmp_path)
    assert "no fitted threshold" in caplog.text
    with pytest.raises(ValueError, match="no inference threshold yet"):
        ours.encode(X)


# ---------------------------------------------------------------------------------------------- Gemma Scope


def jump(t, x):
    """The formula of Gemma Scope's tutorial, in float64."""
    t = {n: v.double() for n, v in t.items()}
    pre = x.double() @ t["W_enc"] + t["b_enc"]
    f = (pre > t["threshold"]) * pre.relu()
    return f, f @ t["W_dec"] + t["b_dec"]


def jump_tensors(d_out=D_IN):
    return {
        "W_enc": normal(D_IN, D_SAE, seed=1) / 4, "W_dec": normal(D_SAE, d_out, seed=2), "b_enc": normal(D_SAE, seed=3),
        "b_dec": normal(d_out, seed=4), "threshold": normal(D_SAE, seed=5).abs(),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "site", "out"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", Site("resid_post", 20), None),
        ("gemma-scope-9b-it-res/layer_9/width_16k/average_l0_71", Site("resid_post", 9), None),
        ("gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_71", Site("mlp_out", 3), None),
        ("gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_71", Site("attn_z", 3), None),
        ("gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_71", Site("resid_mid", 3), Site("mlp_out", 3)),
    ],
)
def test_gemma_scope_1(tmp_path, folder, site, out):
    t, folder = jump_tensors(), tmp_path / folder
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{n: v.numpy() for n, v in t.items()})
    ours = sl.load(folder)
    x = X * D_IN**0.5 / X.norm(dim=1, keepdim=True) if out else X
    f, _ = jump(t, x)
    close(ours.encode(X), f)
    assert ours.reads == (site,) and ours.writes == (out or site,)
    assert ours.meta["expected"] == {"l0": 71.0} and ours.meta["model"].startswith("google/gemma-2-")
    if not out:
        close(ours(X).x_hat, jump(t, X)[1])


def test_gemma_scope_embeddings(tmp_path):
    """Trained on rows of the embedding matrix; at the site, which transformers scales, codes must be the same."""
    t, folder = jump_tensors(), tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{n: v.numpy() for n, v in t.items()})
    ours, scale = sl.load(folder), D_IN**0.5
    f, x_hat = jump(t, X)
    close(ours.encode(scale * X), f)
    close(ours(scale * X).x_hat, scale * x_hat)
    assert ours.reads == (Site("embed"),)


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    ("kind", "into", "out", "sites"),
    [
        ("resid_post_all", "model.layers.7.output", None, ("resid_post", "resid_post")),
        ("attn_out", "model.layers.7.self_attn.o_proj.input", None, ("attn_z", "attn_z")),
        ("mlp_out", "model.layers.7.post_feedforward_layernorm.output", None, ("mlp_out", "mlp_out")),
        (
            "transcoder_all", "model.layers.7.pre_feedforward_layernorm.output",
            "model.layers.7.post_feedforward_layernorm.output", ("mlp_in", "mlp_out"),
        ),
    ],
)  # fmt: skip
def test_gemma_scope_2(tmp_path, kind, into, out, sites, config):
    t, folder = jump_tensors(), tmp_path / "gemma-scope-2-1b-pt" / kind / "layer_7_width_16k_l0_small_affine"
    folder.mkdir(parents=True)
    skip = {"affine_skip_connection": normal(D_IN, D_IN, seed=6)} if out else {}
    save_file({n.lower(): v for n, v in t.items()} | skip, folder / "params.safetensors")
    if config:
        said = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": into, "l0": 60}
        (folder / "config.json").write_text(json.dumps(said | ({"hf_hook_point_out": out} if out else {})))
    ours = sl.load(folder)
    f, x_hat = jump(t, X)
    close(ours.encode(X), f)
    close(ours(X).x_hat, x_hat + (X.double() @ skip["affine_skip_connection"].double() if out else 0))
    assert (ours.reads[0], ours.writes[0]) == tuple(Site(kind, 7) for kind in sites)
    assert ours.meta["model"] == ("google/gemma-3-1b-pt" if config else "unknown")


# ---------------------------------------------------------------------------------------------- sites


@pytest.mark.parametrize(
    ("name", "model", "site"),
    [
        ("blocks.8.hook_resid_pre", "gpt2", Site("resid_pre", 8)),
        ("blocks.8.hook_resid_post", "gpt2", Site("resid_post", 8)),
        ("blocks.8.hook_mlp_in", "gpt2", Site("resid_mid", 8)),
        ("blocks.8.hook_mlp_in", "pythia-70m", Site("resid_pre", 8)),  # attention and MLP in parallel
        ("blocks.8.mlp.hook_in", "qwen3-4b", Site("mlp_in", 8)),
        ("blocks.8.ln2.hook_normalized", "gpt2", Site("resid_mid", 8)),
        ("blocks.8.attn.hook_z", "gpt2", Site("attn_z", 8)),
        ("blocks.8.mlp.hook_post", "gpt2", None),
        ("hook_embed", "gpt2", Site("embed")),
        ("layers.8", "meta-llama/Llama-3.1-8B", Site("resid_post", 8)),
        ("model.layers.8.output", "google/gemma-3-1b-pt", Site("resid_post", 8)),
        ("layers.8.mlp", "meta-llama/Llama-3.1-8B", Site("mlp_out", 8)),
        ("layers.8.mlp", "google/gemma-3-1b-pt", Site("model.layers.8.mlp.down_proj")),  # before the post-norm
        ("layers.8.self_attn", "google/gemma-2-2b", Site("model.layers.8.self_attn.o_proj")),
        ("model.layers.8.post_attention_layernorm", "google/gemma-2-2b", Site("attn_out", 8)),
        ("model.layers.8.post_attention_layernorm", "meta-llama/Llama-3.1-8B", Site("mlp_in", 8)),
        ("h.3.attn", "gpt2", Site("attn_out", 3)),
        ("h.3.mlp.c_fc", "gpt2", Site("transformer.h.3.mlp.c_fc")),
        ("layers.3.mlp.act", "EleutherAI/pythia-70m", Site("gpt_neox.layers.3.mlp.act")),
        ("something.else", None, None),
    ],
)
def test_names_of_places(name, model, site):
    assert place(name, model).site == site


# ---------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def saved(sae_lens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lens(sae_lens, "jumprelu").save_model(tmp_path / "sae")
    yield tmp_path / "sae"
    assert not (tmp_path / "exploded").exists(), "code in a file was executed"


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def rewrite(folder, config=None, tensors=None):
    if config:
        cfg = json.loads((folder / "cfg.json").read_text())
        config(cfg)
        (folder / "cfg.json").write_text(json.dumps(cfg))
    if tensors:
        weights = load_file(folder / "sae_weights.safetensors")
        tensors(weights)
        save_file(weights, folder / "sae_weights.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"config": lambda c: c.update(architecture="temporal")},
            "of architecture 'temporal'; supported: batchtopk, gat",
        ),
        (
            {"config": lambda c: c.update(activation_fn="tanh-relu")},
            "the activation 'tanh-relu'; supported: relu, topk",
        ),
        (
            {"config": lambda c: c.update(normalize_activations="magic")},
            "normalises by 'magic'; supported: none, expec",
        ),
        ({"config": lambda c: c.update(d_in=17)}, r"W_enc has shape \(16, 40\), its config says \(17, 40\)"),
        ({"config": lambda c: c.update(architecture="topk", k=41)}, "surplus: ..threshold"),
        (
            {"config": lambda c: c.update(metadata=["x"])},
            "is no whole saelens checkpoint: its config or tensors are not",
        ),
        (
            {"config": lambda c: c.update(metadata={"hook_name": 3})},
            "is no whole saelens checkpoint: its config or ten",
        ),
        ({"tensors": lambda w: w.pop("threshold")}, r"a SAELens 'jumprelu' must hold .*surplus: \['threshold'\]"),
        ({"tensors": lambda w: w.update(W_dec=w["W_dec"].T.contiguous())}, r"W_dec has shape .16, 40., its conf"),
        ({"tensors": lambda w: w.update(b_enc=torch.zeros(3))}, r"b_enc has shape \(3,\), its config says \(40,\)"),
        ({"tensors": lambda w: w["W_dec"].view(-1)[3:4].fill_(float("nan"))}, "W_dec holds NaN or Inf"),
        ({"tensors": lambda w: w["threshold"][:1].fill_(float("inf"))}, "threshold holds NaN or Inf"),
    ],
)
def test_checkpoints_that_are_no_coder(saved, change, words):
    rewrite(saved, **change)
    with pytest.raises(ValueError, match=words):
        sl.load(saved)


def test_cut_off_and_missing_files(saved):
    weights = saved / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        sl.load(saved)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has cfg.json, but not what belongs to it: .*sae_weights.safetensors"):
        sl.load(saved)
    (saved / "cfg.json").write_text("[]")
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cfg.json is no JSON .*it must hold a JSON object, got a list"):
        sl.load(saved)


HOSTILE = {"pickle": pickle.dumps(Bomb()), "empty": b"", "text": b"hello", "zip": b"PK\x03\x04" + bytes(40)}


@pytest.mark.parametrize("what", [*HOSTILE, "torch.save", "cut off"])
@pytest.mark.parametrize("file", ["ae.pt", "layer3.sae.pt", "params.npz"])
def test_nothing_is_unpickled(saved, tmp_path, file, what):
    path = tmp_path / file
    if what in HOSTILE:
        path.write_bytes(HOSTILE[what])
    elif file == "params.npz":
        np.savez(path, W_enc=np.array([Bomb()], dtype=object))
    else:
        torch.save(
            {"W_enc": torch.zeros(30, 30), "bomb": Bomb()} if what == "torch.save" else {"a": torch.zeros(99)}, path
        )
    if what == "cut off":
        path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"no whole (file of plain tensors|archive of plain arrays)"):
        sl.load(tmp_path if file == "params.npz" else path)


def test_dictionary_learning_named_wrongly(dl, tmp_path):
    save_dl(dl["AutoEncoder"](), tmp_path, dict_class="SuperEncoder")
    with pytest.raises(ValueError, match=r"holds a dictionary_learning 'SuperEncoder'; supported: AutoEncoder, "):
        sl.load(tmp_path)
    save_dl(dl["AutoEncoder"](), tmp_path, dict_class="GatedAutoEncoder")
    with pytest.raises(ValueError, match=r"a GatedAutoEncoder has the tensors .*got .*'bias'"):
        sl.load(tmp_path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"which no format of one file here has; supported: Goodfire"):
        sl.load(tmp_path / "odd.pt")


def test_sparsify_named_wrongly(sparsify, tmp_path):
    sparse_coder(sparsify, activation="groupmax").save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="sparsify's activation 'groupmax'; supported: 'topk'"):
        sl.load(tmp_path)
    sparse_coder(sparsify).save_to_disk(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "num_latents": 41}))
    with pytest.raises(ValueError, match=r"W_enc has shape \(16, 40\), its config says \(16, 41\)"):
        sl.load(tmp_path)


REFUSED = [
    ("BatchTopK", {}, "sparsify", "sparsify holds TopK coders only, not a BatchTopK: save it in format 'sae_lab'"),
    ("TopK", {"d_out": D_OUT}, "sparsify", "d_in 16, d_out 12"),
    ("TopK", {"d_out": D_OUT}, "saelens", "SAELens holds transcoders with ReLU or JumpReLU, not a TopK"),
    (
        "L1",
        {"d_out": D_OUT},
        "dictionary_learning",
        "holds autoencoders on raw activations, not a L1 with another target",
    ),
    ("LeakyTopK", {}, "saelens", "only coders whose inference is ReLU, TopK, a threshold or a gate"),
    ("Crosscoder", {}, "saelens", "only coders whose inference is"),
    ("Switch", {}, "dictionary_learning", "only coders whose inference is"),
    ("Spline", {}, "saelens", "only coders whose inference is"),
    ("Tokenized", {}, "saelens", "only coders whose inference is"),
    ("ProLU", {}, "saelens", "only coders whose inference is"),
    ("TopK", {}, "pytorch", "unknown format 'pytorch'; supported: sae_lab, saelens, sparsify, dictionary_learning"),
]


@pytest.mark.parametrize(("name", "config", "format", "words"), REFUSED)
def test_what_a_format_cannot_hold(tmp_path, name, config, format, words):
    coder = make(name, **config)
    if name == "BatchTopK":
        with pytest.raises(ValueError, match="no inference threshold yet"):
            coder.save(tmp_path / "new", format=format)
        coder.calibrate([normal(99, D_IN)])
    with pytest.raises(ValueError, match=words):
        coder.save(tmp_path / "new", format=format)


def test_every_family_is_written_or_refused(tmp_path):
    """A new family falls into neither by accident."""
    for name in FAMILIES:
        if name in ("Crosscoder", "MatrixSAE", "VQ", "Tokenized"):
            continue
        coder = fitted(name)
        try:
            coder.save(tmp_path / name, format="saelens")
        except ValueError as err:
            assert "save it in format 'sae_lab'" in str(err)
        else:
            close(sl.load(tmp_path / name).encode(X), coder.encode(X))


# ---------------------------------------------------------------------------------------------- our own format, check


def test_our_own_format_keeps_how_x_is_read(tmp_path):
    coder = fitted("L1")
    coder.pre_bias, coder.input_norm = False, "length"
    coder.save(tmp_path)
    back = sl.load(tmp_path)
    assert (back.pre_bias, back.input_norm) == (False, "length")
    close(back(X).x_hat, coder(X).x_hat)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["input_norm"]  # a config that does not say it is none
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not a coder's config that this version can read: 'input_norm'"):
        sl.load(tmp_path)


class Blocks:
    """What check needs of a store."""

    def __init__(self, x, site):
        self.x, self.site = x, site

    def blocks(self):
        for x in self.x.split(10):
            yield None, x


def test_check(tmp_path, caplog):
    """A good load passes and gets its f_scale; a scale, a site and a stated L0 that are off are said loudly."""
    world = normal(12, D_IN, seed=1) / 4
    x = (normal(600, 12, seed=2).relu() > 0.8) * normal(600, 12, seed=3).abs() @ world * 4
    coder = sl.TopK(D_IN, D_SAE, k=4)
    sl.train(coder, x, sl.TrainConfig(steps=120, batch_size=200, lr=3e-3))
    coder.reads = coder.writes = (Site("resid_pre", 1),)
    coder.save(tmp_path, format="saelens")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        good = sl.load(tmp_path, check=Blocks(x, Site("resid_pre", 1)))
    assert not caplog.records and good.meta["check"]["problems"] == []
    assert good.meta["check"]["fvu"] < 0.5 and 0 < good.meta["check"]["l0"] <= 4
    live = good.encode(x).max(0).values > 0
    assert bool((good.f_scale[live] > 0).all()) and good.meta["f_scale"] == "fitted by check on 600 rows"

    wrong = sl.load(tmp_path, check=Blocks(x, Site("resid_post", 1)))
    assert "they are from Site('resid_post', layer=1), and it reads Site('resid_pre', layer=1)" in caplog.text
    assert wrong.meta["check"]["fvu"] == pytest.approx(good.meta["check"]["fvu"])

    sl.load(tmp_path, check=x / 50)
    assert "its reconstruction is worse than their mean" in caplog.text
    rewrite(tmp_path, config=lambda c: c["metadata"].update(training_architecture_details={"k": 40}))
    save_file({"sparsity": torch.zeros(D_SAE)}, tmp_path / "sparsity.safetensors")
    sl.load(tmp_path, check=x)
    assert "times the 40 that the checkpoint states" in caplog.text
    for bad, words in ((torch.zeros(4, 3), "d_in=16"), ("text", "check takes a tensor"), (x[:0], "check needs activ")):
        with pytest.raises(ValueError, match=words):
            sl.load(tmp_path, check=bad)


def test_check_of_a_dense_and_a_dead_coder(tmp_path, caplog):
    coder = fitted("L1")
    for shift, words in ((9.0, "more than a quarter of its 40 features"), (-99.0, "L0 is 0: no feature ever fires")):
        with torch.no_grad():
            coder.b_enc.fill_(shift)
        coder.save(tmp_path)
        caplog.clear()
        sl.load(tmp_path, check=X)
        assert words in caplog.text


def test_a_folder_moved_elsewhere_still_loads(sae_lens, tmp_path):
    """Nothing but the folder's own files decides what it is, and a site that no name tells is left open."""
    theirs = lens(sae_lens, "standard")
    theirs.cfg.metadata.hook_name = None
    theirs.save_model(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert sl.load(tmp_path / "b").reads == ()


@pytest.mark.parametrize("second", ["sae_lab", "saelens", "sparsify", "dictionary_learning"])
@pytest.mark.parametrize("first", ["sae_lab", "saelens", "sparsify", "dictionary_learning"])
def test_one_folder_holds_one_format(first, second, tmp_path):
    """Formats share file names: a second one in the same folder would turn the first into another coder."""
    coder, other = make("TopK").eval(), make("TopK", seed=5).eval()
    coder.save(tmp_path, format=first)
    if first == second:
        other.save(tmp_path, format=second)
        assert torch.allclose(sl.load(tmp_path).W_dec, other.W_dec)
        return
    with pytest.raises(ValueError, match=f"holds a coder in the format {first}: save the format '{second}' into a fol"):
        other.save(tmp_path, format=second)
    assert torch.allclose(sl.load(tmp_path).W_dec, coder.W_dec)


def test_a_refused_save_leaves_nothing(tmp_path):
    with pytest.raises(ValueError):
        make("L1").save(tmp_path / "new", format="sparsify")
    assert not (tmp_path / "new").exists()
