"""Releases and repositories, through the real huggingface_hub client, from a small hub on this machine.

Where sae-lens knows the release too, its own ``from_pretrained`` loads the same files from the same hub, as oracle.
"""

import functools
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sae_lab as sl
from sae_lab.saes.io import releases
from sae_lab.types import Site
from tests.saes.conftest import D_IN, D_SAE, normal
from tests.saes.test_exchange import OLD, X, close, fill, jump_tensors, sparse_coder

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a model hub: a repository's tree, and files with their etag and commit."""

    protocol_version = "HTTP/1.1"

    def __init__(self, root, asked, *args):
        self.root, self.asked = root, asked
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def _send(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._tree(self.root / parts[2] / parts[3])
        if len(parts) < 2:  # whether the hub is there at all
            return self._send(200)
        repo, file = self.root / parts[0] / parts[1], self.root.joinpath(*parts[:2], *parts[4:])
        if not repo.is_dir():
            return self._send(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if not file.is_file():
            return self._send(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        body = file.read_bytes()
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):  # sae-lens reads headers so
            body = body[int(match[1]) : int(match[2]) + 1]
            return self._send(206, body)
        if self.command == "GET":
            self.asked.append("/".join(parts[4:]))
        self._send(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

    do_HEAD = do_GET

    def _tree(self, repo):
        if not repo.is_dir():
            return self._send(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        files = [str(f.relative_to(repo)) for f in repo.rglob("*") if f.is_file()]
        tree = [{"type": "file", "path": f, "size": (repo / f).stat().st_size, "oid": "0" * 40} for f in files]
        self._send(200, json.dumps(tree).encode(), Content_Type="application/json")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """(folder of repositories, names of the files asked for)"""
    root, asked = tmp_path / "hub", []
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, root, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _point_at(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    yield root, asked
    server.shutdown()


def _point_at(monkeypatch, endpoint, cache):
    """What HF_ENDPOINT and HF_HUB_CACHE do at the start of a process."""
    from huggingface_hub import constants, file_download, hf_api

    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download, hf_api):
        for name, value in (("ENDPOINT", endpoint), ("HUGGINGFACE_CO_URL_TEMPLATE", template)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def put(root, repo, path, tensors=None, **texts):
    """Files of a checkpoint: {name: tensors} by ending, and name=dict as JSON."""
    folder = root / repo / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (tensors or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".npz"):
            np.savez(folder / name, **{n: t.numpy() for n, t in content.items()})
        elif name.endswith(".safetensors"):
            save_file({n: t.contiguous() for n, t in content.items()}, folder / name)
        else:
            torch.save(content, folder / name)
    for name, content in texts.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def plain():
    return {n: t for n, t in jump_tensors().items() if n != "threshold"}


@pytest.fixture(scope="module")
def sae_lens():
    return pytest.importorskip("sae_lens")


def agree(ours, theirs):
    f = theirs.encode(X.to(theirs.dtype))
    assert 0 < (f > 0).float().mean() < 0.95
    close(ours.encode(X), f)
    close(ours(X).x_hat, theirs(X.to(theirs.dtype)))


def sized(sae_lens, loader, **cfg):
    """sae-lens's loader of releases whose widths it takes from their names, for a smaller model."""
    from sae_lens.loading import pretrained_sae_loaders

    load = getattr(pretrained_sae_loaders, loader)

    def run(cfg_overrides, **kwargs):
        return load(cfg_overrides={**cfg_overrides, "d_in": D_IN, "d_sae": D_SAE, **cfg}, **kwargs)

    return run


# ---------------------------------------------------------------------------------------------- releases


def test_our_table_is_that_of_saelens(sae_lens):
    """Every id that SAELens lists of a release that we know goes to the same place."""
    directory = sae_lens.loading.pretrained_saes_directory.get_pretrained_saes_directory()
    ids = 0
    for name, release in releases.RELEASES.items():
        theirs = directory[name]
        assert theirs.repo_id == release.repo
        assert {i: release.path(i) for i in theirs.saes_map} == theirs.saes_map, name
        scales = {i: s for i in theirs.saes_map if (s := release.facts_of.get(i, {}).get("scale"))}
        assert release.format != "saelens" or scales == theirs.norm_scaling_factor, name
        kwargs = (theirs.config_overrides or {}).get("model_from_pretrained_kwargs", {})
        assert bool(release.facts.get("centred")) == kwargs.get("center_writing_weights", False), name
        assert all(release.path(i) for i in release.known()), name
        ids += len(theirs.saes_map)
    listed = sum(len(theirs.saes_map) for theirs in directory.values())
    assert (ids, listed) == (13_828, 13_857), "99.8 % are loaded by name"
    for name in directory.keys() - releases.RELEASES.keys():  # and the rest are refused by it
        for asked in (name, directory[name].repo_id):
            with pytest.raises(ValueError, match=r"(temporal SAEs|cross-layer transcoder).*: sl.load takes coders t"):
                sl.load(asked, next(iter(directory[name].saes_map)))


# How SAELens reads a release, and how we do. Its own format has no name there.
CONVERSIONS = {
    None: "saelens", "gemma_2": "gemma_scope", "gemma_2_transcoder": "gemma_scope", "gemma_3": "gemma_scope_2",
    "llama_scope": "llama_scope", "llama_scope_r1_distill": "lm_saes", "dictionary_learning_1": "dictionary_learning",
    "deepseek_r1": "file", "qwen_scope": "file", "goodfire": "file", "mwhanna_transcoder": "file",
    "connor_rob_hook_z": "file",
}  # fmt: skip


def test_every_release_is_read_as_saelens_reads_it(sae_lens):
    """Each of these formats is compared with SAELens's own reading of the same files below, or in test_exchange."""
    directory = sae_lens.loading.pretrained_saes_directory.get_pretrained_saes_directory()
    for name, release in releases.RELEASES.items():
        assert CONVERSIONS[directory[name].conversion_func] == release.format, name


def test_gemma_scope_canonical(hub, sae_lens):
    root, asked = hub
    put(root, "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", {"params.npz": jump_tensors()})
    ours = sl.load("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
    assert asked == ["layer_20/width_16k/average_l0_71/params.npz"], "nothing else is downloaded"
    theirs = sae_lens.SAE.from_pretrained(
        "gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical",
        converter=sized(sae_lens, "gemma_2_sae_huggingface_loader"),
    )  # fmt: skip
    agree(ours, theirs)
    assert ours.site == Site("resid_post", 20) and ours.meta["model"] == "google/gemma-2-2b"
    assert ours.meta["expected"] == {"l0": 71.0} and ours.mask is None and ours.meta["f_scale"] == "unknown"
    agree(sl.load("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"), theirs)


def test_gemma_scope_2(hub, sae_lens):
    root, asked = hub
    t = {n.lower(): v for n, v in jump_tensors().items()} | {"affine_skip_connection": normal(D_IN, D_IN, seed=6) / 4}
    said = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "affine_connection": True,
            "hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output",
            "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output"}  # fmt: skip
    id = "transcoder/layer_9_width_16k_l0_small_affine"
    put(root, "google/gemma-scope-2-270m-pt", id, {"params.safetensors": t}, config=said)
    ours = sl.load("gemma-scope-2-270m-pt-transcoders", id)
    assert sorted(asked) == [f"{id}/config.json", f"{id}/params.safetensors"]
    agree(ours, sae_lens.SAE.from_pretrained("gemma-scope-2-270m-pt-transcoders", id))
    assert (ours.reads[0], ours.writes[0]) == (Site("mlp_in", 9), Site("mlp_out", 9))
    assert ours.meta["model"] == "google/gemma-3-270m"


@pytest.mark.parametrize("norms", [{"in": 6.0, "out": 6.0}, {"in": 30.0, "out": 30.0}])
def test_llama_scope(hub, sae_lens, norms):
    """Norms are folded as its authors fold them. sae-lens computes in bfloat16 unless told otherwise."""
    root, _ = hub
    said = {"d_model": D_IN, "d_sae": D_SAE, "act_fn": "jumprelu", "jump_relu_threshold": 0.4,
            "dataset_average_activation_norm": norms, "hook_point_in": "blocks.15.hook_resid_post",
            "hook_point_out": "blocks.15.hook_resid_post"}  # fmt: skip
    t = plain()
    t = {
        "encoder.weight": t["W_enc"].T,
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T,
        "decoder.bias": t["b_dec"],
    }
    folder = "Llama3_1-8B-Base-L15R-8x"
    put(root, "fnlp/Llama3_1-8B-Base-LXR-8x", folder, {"checkpoints/final.safetensors": t}, hyperparams=said)
    ours = sl.load("llama_scope_lxr_8x", "l15r_8x")
    theirs = sae_lens.SAE.from_pretrained("llama_scope_lxr_8x", "l15r_8x", dtype="float32")
    # its table has the factor of the real coder; ours comes from the files
    said_there = sae_lens.loading.pretrained_saes_directory.get_norm_scaling_factor("llama_scope_lxr_8x", "l15r_8x")
    theirs.fold_activation_norm_scaling_factor(D_IN**0.5 / norms["in"] / said_there)
    agree(ours, theirs)
    s = D_IN**0.5 / norms["in"]
    authors = X @ t["encoder.weight"].T + t["encoder.bias"] / s  # raw units, the threshold as it is written
    close(ours.encode(X), s * authors * (authors > 0.4))
    assert ours.site == Site("resid_post", 15) and ours.meta["model"] == "meta-llama/Llama-3.1-8B"


def test_qwen_scope_and_goodfire(hub, sae_lens):
    root, asked = hub
    t = plain()
    put(root, "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "",
        {"layer3.sae.pt": {n: v.T if n.startswith("W_") else v for n, v in t.items()}})  # fmt: skip
    with pytest.raises(ValueError, match="k must be from 1 to d_sae=40, got 50"):
        sl.load("qwen-scope-3-1.7b-base-w32k-l50", "layer3")
    wide = {
        "W_enc": normal(D_IN, 90, seed=1) / 4,
        "W_dec": normal(90, D_IN, seed=2),
        "b_enc": normal(90),
        "b_dec": t["b_dec"],
    }
    put(root, "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "",
        {"layer4.sae.pt": {n: v.T if n.startswith("W_") else v for n, v in wide.items()}})  # fmt: skip
    ours = sl.load("qwen-scope-3-1.7b-base-w32k-l50", "layer4")
    converter = sized(sae_lens, "qwen_scope_sae_huggingface_loader", d_sae=90)
    agree(ours, sae_lens.SAE.from_pretrained("qwen-scope-3-1.7b-base-w32k-l50", "layer4", converter=converter))
    assert ours.site == Site("resid_post", 4) and ours.meta["model"] == "Qwen/Qwen3-1.7B-Base" and ours.k == 50

    linear = {"encoder_linear.weight": t["W_enc"].T, "encoder_linear.bias": t["b_enc"],
              "decoder_linear.weight": t["W_dec"].T, "decoder_linear.bias": t["b_dec"]}  # fmt: skip
    stem = "Llama-3.1-8B-Instruct-SAE-l19"
    put(root, f"Goodfire/{stem}", "", {f"{stem}.pth": linear})
    ours = sl.load("goodfire-llama-3.1-8b-instruct", "layer_19")
    converter = sized(sae_lens, "get_goodfire_huggingface_loader")
    agree(ours, sae_lens.SAE.from_pretrained("goodfire-llama-3.1-8b-instruct", "layer_19", converter=converter))
    assert ours.site == Site("resid_post", 19) and ours.meta["model"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert ours.meta["expected"] == {"l0": 91.0}
    assert set(asked) == {"layer3.sae.pt", "layer4.sae.pt", f"{stem}.pth"}

    put(root, "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "", {"layer10.sae.pt": {}})
    with pytest.raises(ValueError, match=r"has no coder at 'its top': pass id=, one of 3, such as 'layer3.sae.pt', "):
        sl.load("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50")
    same = sl.load("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "layer4")
    assert same.site == Site("resid_post", 4) and same.k == 50


def test_gpt2_small_res_jb(hub, sae_lens):
    """Its files do not say that the stream was centred; the release, and so its repository, is known to be."""
    root, asked = hub
    repo, id = "jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre"
    cfg = {**OLD, "hook_point": id}
    sparsity = {"sparsity": torch.full((D_SAE,), -1.0)}
    put(root, repo, id, {"sae_weights.safetensors": plain(), "sparsity.safetensors": sparsity}, cfg=cfg)
    theirs = sae_lens.SAE.from_pretrained("gpt2-small-res-jb", id)
    asked.clear()
    for ours in (sl.load("gpt2-small-res-jb", id), sl.load(repo, id)):
        x = X - X.mean(1, keepdim=True)
        close(ours.encode(X), theirs.encode(x))
        close(ours(X).x_hat, theirs(x))
        assert ours.site == Site("resid_pre", 8) and ours.meta["model"] == "gpt2" and ours.meta["centred"]
        assert ours.meta["expected"]["l0"] == pytest.approx(4)
    assert asked == [], "the client's cache has all of it"


def test_other_releases_in_saelens_format(hub, sae_lens):
    root, _ = hub
    put(root, "ctigges/pythia-70m-deduped__res-sm_processed", "e-res-sm", {"sae_weights.safetensors": plain()},
        cfg={**OLD, "hook_point": "blocks.0.hook_resid_pre", "model_name": "pythia-70m-deduped"})  # fmt: skip
    ours = sl.load("pythia-70m-deduped-res-sm", "blocks.0.hook_resid_pre")
    agree(ours, sae_lens.SAE.from_pretrained("pythia-70m-deduped-res-sm", "blocks.0.hook_resid_pre"))
    assert ours.site == Site("resid_pre", 0) and ours.meta["model"] == "EleutherAI/pythia-70m-deduped"

    put(root, "tommmcgrath/gpt2-small-mlp-out-saes", "sae_group_gpt2_blocks.8.hook_mlp_out_24576:v1",
        {"sae_weights.safetensors": plain()},
        cfg={**OLD, "hook_point": "blocks.8.hook_mlp_out", "normalize_activations": True})  # fmt: skip
    ours = sl.load("gpt2-small-mlp-tm", "blocks.8.hook_mlp_out")
    theirs = sae_lens.SAE.from_pretrained("gpt2-small-mlp-tm", "blocks.8.hook_mlp_out")
    close(ours.encode(X), theirs.encode(X - X.mean(1, keepdim=True)))
    assert "scale" not in ours.meta

    put(root, "JoshEngels/Mistral-7B-Residual-Stream-SAEs", "mistral_7b_layer_8", {"sae_weights.safetensors": plain()},
        cfg={**OLD, "hook_point": "blocks.8.hook_resid_pre", "model_name": "mistral-7b"})  # fmt: skip
    ours = sl.load("mistral-7b-res-wg", "blocks.8.hook_resid_pre")
    agree(ours, sae_lens.SAE.from_pretrained("mistral-7b-res-wg", "blocks.8.hook_resid_pre"))
    assert ours.input_norm == "length"


@pytest.mark.parametrize(
    ("release", "id", "name"),
    [
        ("sae_bench_gemma-2-2b_topk_width-2pow12_date-1109", "blocks.12.hook_resid_post__trainer_0", "AutoEncoderTopK"),
        ("sae_bench_gemma-2-2b_topk_width-2pow14_date-1109", "blocks.12.hook_resid_post__trainer_0_step_146",
         "AutoEncoderTopK"),
        ("sae_bench_gemma-2-2b_vanilla_width-2pow12_date-1109", "blocks.5.hook_resid_post__trainer_2", "AutoEncoder"),
        ("sae_bench_pythia70m_sweep_gated_ctx128_0730", "blocks.3.hook_resid_post__trainer_4", "GatedAutoEncoder"),
        ("saebench_gemma-2-2b_width-2pow16_date-0107", "blocks.12.hook_resid_post__trainer_0",
         "MatryoshkaBatchTopKSAE"),
    ],
)  # fmt: skip
def test_dictionary_learning_releases(hub, sae_lens, release, id, name):
    """SAEBench's and its forerunner's, finished and in the middle of training."""
    pytest.importorskip("dictionary_learning")
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import matryoshka_batch_top_k, top_k

    made = {
        "AutoEncoderTopK": lambda: top_k.AutoEncoderTopK(D_IN, D_SAE, 4),
        "MatryoshkaBatchTopKSAE": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D_IN, D_SAE, 4, [5, 15, 20]),
    }
    theirs = fill(made.get(name, lambda: getattr(dictionary, name)(D_IN, D_SAE))())
    with torch.no_grad():
        if name == "AutoEncoder":  # of other norms than 1, its own loader and SAELens's do not agree
            theirs.decoder.weight /= theirs.decoder.weight.norm(dim=0)
        if name.startswith("Matryoshka"):
            theirs.threshold.fill_(0.4)
    tensors = dict(theirs.state_dict())
    if name == "AutoEncoderTopK":  # in 2024 neither was in the file
        del tensors["k"], tensors["threshold"]
    layer = int(id.split(".")[1])
    trainer = {"dict_class": name, "layer": layer, "lm_name": "google/gemma-2-2b", "k": 4, "activation_dim": D_IN,
               "dict_size": D_SAE, "submodule_name": f"resid_post_layer_{layer}"}  # fmt: skip
    found = releases.locate(release, id)
    put(hub[0], found.repo, found.path, {"ae.pt": tensors}, config={"trainer": trainer, "buffer": {"ctx_len": 128}})
    ours = sl.load(release, id)
    agree(ours, sae_lens.SAE.from_pretrained(release, id))
    assert ours.site == Site("resid_post", layer) and ours.meta["model"] == "google/gemma-2-2b"


@pytest.mark.parametrize("norm", [1.1955922842025757, 20.0])
def test_llama_scope_r1_distill(hub, sae_lens, norm):
    """The mean norm stands beside the weights. SAELens has its factor in its directory."""
    root, asked = hub
    t, hook = plain(), "blocks.0.hook_resid_post"
    w_dec = t["W_dec"] / t["W_dec"].norm(dim=1, keepdim=True)  # as its authors publish them
    weights = {
        "encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "decoder.weight": w_dec.T,
        "decoder.bias": t["b_dec"], "log_jumprelu_threshold": jump_tensors()["threshold"].log(),
        f"dataset_average_activation_norm.{hook}": torch.tensor(norm),
    }  # fmt: skip
    said = {"sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": D_IN, "expansion_factor": 2.5,
            "act_fn": "jumprelu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}  # fmt: skip
    folder = "800M-Slimpajama-0-OpenR1-Math-220k/L0R"
    put(root, "fnlp/Llama-Scope-R1-Distill", folder, {"sae_weights.safetensors": weights}, config=said)
    ours = sl.load("llama_scope_r1_distill", "l0r_800m_slimpajama")
    assert sorted(asked) == [f"{folder}/config.json", f"{folder}/sae_weights.safetensors"]
    theirs = sae_lens.SAE.from_pretrained(
        "llama_scope_r1_distill", "l0r_800m_slimpajama",
        converter=sized(sae_lens, "llama_scope_r1_distill_sae_huggingface_loader"),
    )  # fmt: skip
    listed = sae_lens.loading.pretrained_saes_directory.get_norm_scaling_factor(
        "llama_scope_r1_distill", "l0r_800m_slimpajama"
    )
    s = D_IN**0.5 / norm
    assert norm == 20 or listed == pytest.approx(4096**0.5 / norm), "a factor of the directory is what its file says"
    theirs.fold_activation_norm_scaling_factor(s / listed)
    agree(ours, theirs)
    assert ours.site == Site("resid_post", 0)
    assert ours.meta["model"] == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"

    weights["decoder.weight"] = t["W_dec"].T  # of other norms, what is compared with the threshold counts them in
    put(root, "me/other", "", {"sae_weights.safetensors": weights}, config=said)
    other = sl.load(root / "me/other", model="meta-llama/Llama-3.1-8B")
    pre = s * X @ t["W_enc"] + t["b_enc"]
    codes = pre * (pre * t["W_dec"].norm(dim=1) > jump_tensors()["threshold"])
    close(other.encode(X), codes)
    close(other(X).x_hat, (codes @ t["W_dec"] + t["b_dec"]) / s)
    with pytest.raises(AssertionError):  # the control
        close(pre * (pre > jump_tensors()["threshold"]), codes, 0.01)
    del weights[f"dataset_average_activation_norm.{hook}"]
    put(root, "me/other", "", {"sae_weights.safetensors": weights}, config=said)
    with pytest.raises(ValueError, match="by a factor that its files do not say: pass scale="):
        sl.load(root / "me/other")
    close(sl.load(root / "me/other", scale=s).encode(X), codes)
    for more, words in (({"act_fn": "topk"}, "act_fn 'topk'"), ({"sae_type": "crosscoder"}, "holds a crosscoder"),
                        ({"sae_type": "clt"}, "holds a cross-layer transcoder")):  # fmt: skip
        put(root, "me/other", "", config={**said, **more})
        with pytest.raises(ValueError, match=words):
            sl.load(root / "me/other")


def test_transcoders_of_mwhanna(hub, sae_lens):
    root, asked = hub
    t = {"W_enc": normal(D_SAE, D_IN, seed=1) / 4, "W_dec": normal(D_SAE, D_IN, seed=2), "b_enc": normal(D_SAE, seed=3),
         "b_dec": normal(D_IN, seed=4)}  # fmt: skip
    for repo in ("mwhanna/qwen3-4b-transcoders", "someone/transcoders"):
        put(root, repo, "", {"layer_7.safetensors": t})
        (root / repo / "config.yaml").write_text(
            "model_name: Qwen/Qwen3-4B\nmodel_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n"
            "feature_output_hook: mlp.hook_out\n"
        )
        (root / repo / "wandb-config.yaml").write_text(
            f"d_model: {{value: {D_IN}}}\nd_feature: {{value: {D_SAE}}}\nbatch_size: {{value: 64}}\n"
        )
    ours = sl.load("mwhanna-qwen3-4b-transcoders", "layer_7")
    assert asked == ["layer_7.safetensors"], "the release knows the rest"
    theirs = sae_lens.SAE.from_pretrained("mwhanna-qwen3-4b-transcoders", "layer_7")
    agree(ours, theirs)
    hooks = (theirs.cfg.metadata.hook_name, theirs.cfg.metadata.hook_name_out)
    assert hooks == ("blocks.7.mlp.hook_in", "blocks.7.hook_mlp_out")
    assert (ours.reads[0], ours.writes[0]) == (Site("mlp_in", 7), Site("mlp_out", 7))
    assert ours.meta["model"] == "Qwen/Qwen3-4B" == theirs.cfg.metadata.model_name
    for id in ("layer_7", "layer_7.safetensors"):  # a set that no directory lists: its config.yaml tells
        other = sl.load("someone/transcoders", id)
        assert other.reads == ours.reads and other.writes == ours.writes and other.meta["model"] == "Qwen/Qwen3-4B"
        close(other.encode(X), ours.encode(X))
    with pytest.raises(ValueError, match=r"has no coder at 'layer_8': pass id=, one of 1, such as 'layer_7.safet"):
        sl.load("someone/transcoders", "layer_8")


def test_gpt2_small_hook_z(hub, sae_lens):
    root, asked = hub
    repo, path, *_ = releases.locate("gpt2-small-hook-z-kk", "blocks.5.hook_z")
    put(root, repo, "", {path: plain()})
    about = {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.5.attn.hook_z"}
    put(root, repo, "", **{path.removesuffix(".pt") + "_cfg": about})
    ours = sl.load("gpt2-small-hook-z-kk", "blocks.5.hook_z")
    assert asked == [path]
    theirs = sae_lens.SAE.from_pretrained("gpt2-small-hook-z-kk", "blocks.5.hook_z")
    z = X.reshape(32, 4, D_IN // 4)
    close(ours.encode(X), theirs.encode(z))
    close(ours(X).x_hat, theirs(z).flatten(1))
    assert ours.site == Site("attn_z", 5) and ours.meta["model"] == "gpt2"
    for same in (sl.load(repo, path), sl.load(root / repo / path)):
        assert same.site == ours.site and same.fingerprint() == ours.fingerprint()


# ---------------------------------------------------------------------------------------------- any repository


def test_any_repository(hub, tmp_path):
    """What its files are is seen from the listing; only what is needed is downloaded."""
    sparsify = pytest.importorskip("sparsify")
    root, asked = hub
    for layer in (23, 24):
        sparse_coder(sparsify, layer).save_to_disk(root / f"EleutherAI/sae-llama-3-8b-32x/layers.{layer}")
    put(root, "EleutherAI/sae-llama-3-8b-32x", "", config={"model": "meta-llama/Meta-Llama-3-8B", "ctx_len": 2048})
    ours = sl.load("EleutherAI/sae-llama-3-8b-32x", "layers.24")
    assert ours.site == Site("resid_post", 24) and ours.meta["model"] == "meta-llama/Meta-Llama-3-8B"
    assert sorted(asked) == ["config.json", "layers.24/cfg.json", "layers.24/sae.safetensors"]

    with pytest.raises(
        ValueError, match=r"no coder at 'layers.25': pass id=, one of 2, such as 'layers.24', 'layers.23'"
    ):
        sl.load("EleutherAI/sae-llama-3-8b-32x", "layers.25")
    with pytest.raises(ValueError, match=r"no coder at 'its top': pass id=, one of 2"):
        sl.load("EleutherAI/sae-llama-3-8b-32x")

    mine = sl.TopK(D_IN, D_SAE, k=4)
    mine.save(root / "me/coders/first")
    assert sl.load("me/coders", "first").fingerprint() == mine.fingerprint()
    mine.save(root / "me/coder")
    assert sl.load("me/coder").fingerprint() == mine.fingerprint()
    put(root, "me/nothing", "", readme={})
    with pytest.raises(ValueError, match="but it seems to hold none"):
        sl.load("me/nothing")


def test_a_pickle_from_the_hub(hub, tmp_path, monkeypatch):
    from tests.saes.test_exchange import Bomb

    monkeypatch.chdir(tmp_path)
    root, _ = hub
    put(root, "me/evil", "x", {"ae.pt": {"a": Bomb()}})
    with pytest.raises(ValueError, match="can run code and is never opened"):
        sl.load("me/evil", "x")
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    ("name", "id", "words"),
    [
        ("gemma-scope-2b-pt-res-canonica", "x", "; names like it: gemma-scope-2b-pt-res-canonical"),
        ("gpt2-small-res-jbb", None, "; names like it: gpt2-small-res-jb"),
        ("zzz", None, "one that comes with the library: smollm2-135m/attn_z-8, "),
        (
            "gemma-scope-2b-pt-res-canonical",
            "layer_20/width_17k/canonical",
            "near ones are 'layer_20/width_16k/canonical'",
        ),
        (
            "gemma-scope-2b-pt-res-canonical",
            None,
            "has no coder with the id None: near ones are 'layer_0/width_16k/can",
        ),
        ("llama_scope_lxr_8x", "l15m_8x", "ids look like 'l15r_8x'"),
        ("gpt2-small-res-jb", "blocks.9.hook_resid_pre", "has no file .*blocks.9.hook_resid_pre/cfg.json"),
        ("google/nothing-there", "x", "the hub has no repository for google/nothing-there"),
    ],
)
def test_names_that_are_nothing(hub, name, id, words):
    (hub[0] / "jbloom/GPT2-Small-SAEs-Reformatted").mkdir(parents=True)
    with pytest.raises(ValueError, match=words):
        sl.load(name, id)


def test_a_hub_that_does_not_answer(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _point_at(monkeypatch, f"http://127.0.0.1:{port}", tmp_path / "cache")
    begun = time.monotonic()
    for name, id in (("gpt2-small-res-jb", "blocks.8.hook_resid_pre"), ("user/repo", "folder")):
        with pytest.raises(
            ValueError, match=r"the hub could not be asked for .*check the network and HF_ENDPOINT, or d"
        ):
            sl.load(name, id)
    with pytest.raises(ValueError, match="; names like it: jbloom/GPT2-Small-SAEs-Reformatted"):
        sl.load("jbloom/GPT2-Small-SAEs-Reformated", "blocks.8.hook_resid_pre")
    assert time.monotonic() - begun < 10, "the client alone waits 23 s for each"


def test_a_downloaded_coder_needs_no_network(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    root, _ = hub
    put(
        root,
        "jbloom/GPT2-Small-SAEs-Reformatted",
        "blocks.8.hook_resid_pre",
        {"sae_weights.safetensors": plain()},
        cfg=OLD,
    )
    before = sl.load("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sl.load("gpt2-small-res-jb", "blocks.8.hook_resid_pre").fingerprint() == before.fingerprint()
