"""Sets of transcoders as circuit-tracer has them, from folders and from a hub on this machine: what its code makes of
each file, written out in plain torch, is what ours make of it."""

import pytest
import torch
from safetensors.torch import save_file

import sae_lab as sl
from sae_lab.types import Site
from tests.saes.conftest import D_IN, D_SAE, normal
from tests.saes.test_exchange import X, close
from tests.saes.test_releases import hub as hub
from tests.saes.test_releases import put

HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}


def tensors(layer, skip=False, threshold=False):
    """What a file of one layer holds: W_enc "d_sae d_in"."""
    t = {"W_enc": normal(D_SAE, D_IN, seed=layer) / 4, "W_dec": normal(D_SAE, D_IN, seed=layer + 10),
         "b_enc": normal(D_SAE, seed=layer + 20), "b_dec": normal(D_IN, seed=layer + 30)}  # fmt: skip
    t |= {"W_skip": normal(D_IN, D_IN, seed=layer + 40)} if skip else {}
    return t | ({"activation_function.threshold": normal(D_SAE, seed=layer + 50).abs()} if threshold else {})


def plain(t, x):
    """(codes, output), as circuit-tracer 0.5.0's SingleLayerTranscoder makes them."""
    f = (x @ t["W_enc"].T + t["b_enc"]).relu()
    f = f * (f > t["activation_function.threshold"]) if "activation_function.threshold" in t else f
    return f, f @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if "W_skip" in t else 0)


def config(folder, model="Qwen/Qwen3-4B", **more):
    import yaml

    said = {"model_name": model, "model_kind": "transcoder_set", **HOOKS, **more}
    folder.mkdir(parents=True, exist_ok=True)
    said = {key: value for key, value in said.items() if value is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump(said))
    return folder


@pytest.mark.parametrize(("skip", "threshold"), [(False, False), (True, False), (False, True)])
def test_a_folder_with_a_file_for_each_layer(tmp_path, skip, threshold):
    written = {layer: tensors(layer, skip, threshold) for layer in (0, 2, 10)}
    for layer, t in written.items():
        save_file({n: v.half() if n == "W_dec" else v for n, v in t.items()}, tmp_path / f"layer_{layer}.safetensors")
        t["W_dec"] = t["W_dec"].half().float()
    coders = sl.TranscoderSet.load(config(tmp_path, scan="a-scan"))
    assert coders.layers == [0, 2, 10] and repr(coders).startswith("TranscoderSet(JumpReLU" if threshold else "Trans")
    for layer, t in written.items():
        f, y = plain(t, X)
        close(coders[layer].encode(X), f)
        close(coders[layer](X).x_hat, y)
        assert coders[layer].reads == (Site("mlp_in", layer),) and coders[layer].writes == (Site("mlp_out", layer),)
        assert coders[layer].meta["model"] == "Qwen/Qwen3-4B"
    kept = sl.TranscoderSet.load(coders.save(tmp_path / "ours"))
    assert [c.fingerprint() for c in kept] == [c.fingerprint() for c in coders]


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("hook_resid_mid", "resid_mid"), ("hook_mlp_in", "resid_mid"), ("mlp.hook_in", "mlp_in"),
        ("ln2.hook_normalized", "resid_mid"), ("blocks.{layer}.hook_resid_pre", "resid_pre"),
    ],
)  # fmt: skip
def test_each_reads_the_place_that_its_config_names(tmp_path, hook, site):
    t = tensors(1)
    save_file(t, tmp_path / "layer_1.safetensors")
    coder = sl.TranscoderSet.load(config(tmp_path, feature_input_hook=hook))[1]
    assert coder.reads == (Site(site, 1),)
    x = X / X.square().mean(-1, keepdim=True).sqrt() if "normalized" in hook else X
    close(coder(X).x_hat, plain(t, x)[1])


def test_gemma_scopes_transcoders_by_address(tmp_path, hub):
    """mwhanna's sets name files of other repositories: params.npz of Gemma Scope, params.safetensors of version 2."""
    root, _ = hub
    one = {"W_enc": normal(D_IN, D_SAE, seed=1) / 4, "W_dec": normal(D_SAE, D_IN, seed=2),
           "b_enc": normal(D_SAE, seed=3), "b_dec": normal(D_IN, seed=4), "threshold": normal(D_SAE, seed=5).abs()}
    two = {"w_enc": one["W_enc"], "w_dec": one["W_dec"], "affine_skip_connection": normal(D_IN, D_IN, seed=6)}
    two |= {n: one[n] for n in ("b_enc", "b_dec", "threshold")}
    for n in (0, 1):
        put(root, "google/gemma-scope-2b-pt-transcoders", f"layer_{n}/width_16k/average_l0_5", {"params.npz": one})
        put(root, "google/gemma-scope-2-270m-pt", f"transcoder_all/layer_{n}_small", {"params.safetensors": two})
    old = "hf://google/gemma-scope-2b-pt-transcoders/layer_{}/width_16k/average_l0_5/params.npz?revision=main"
    new = "hf://google/gemma-scope-2-270m-pt/transcoder_all/layer_{}_small/params.safetensors"
    config(root / "mwhanna/gemma-scope-transcoders", "google/gemma-2-2b", feature_input_hook="ln2.hook_normalized",
           transcoders=[old.format(n) for n in (0, 1)])  # fmt: skip
    config(root / "mwhanna/gemma-scope-2-270m-pt" / "all" / "width_16k", "google/gemma-3-270m",
           transcoders=[{"id": "a", "layer": 1, "filepath": new.format(1)}])  # fmt: skip
    coders = sl.TranscoderSet.load("mwhanna/gemma-scope-transcoders")
    z = X / X.square().mean(-1, keepdim=True).sqrt()
    f = z @ one["W_enc"] + one["b_enc"]
    f = f * (f > one["threshold"])
    assert coders.layers == [0, 1] and coders[1].reads == (Site("resid_mid", 1),)
    close(coders[1].encode(X), f)
    close(coders[1](X).x_hat, f @ one["W_dec"] + one["b_dec"])
    coders = sl.TranscoderSet.load("mwhanna/gemma-scope-2-270m-pt", "all/width_16k")
    f = X @ one["W_enc"] + one["b_enc"]
    f = f * (f > one["threshold"])
    assert coders.layers == [1] and coders[1].reads == (Site("mlp_in", 1),)
    assert sl.TranscoderSet.load("mwhanna/gemma-scope-2-270m-pt/all/width_16k").layers == [1]
    close(coders[1](X).x_hat, f @ one["W_dec"] + one["b_dec"] + X @ two["affine_skip_connection"])
    with pytest.raises(ValueError, match=r"it has no config.yaml; pass id=, one of all/width_16k"):
        sl.TranscoderSet.load("mwhanna/gemma-scope-2-270m-pt")
    with pytest.raises(ValueError, match="the hub has no repository for nobody/nothing"):
        sl.TranscoderSet.load("nobody/nothing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_kind": "cross_layer_transcoder"}, r"which is a cross-layer transcoder \(CLT\): load it with sl.Cross"),
        ({"model_kind": "lorsa"}, "has model_kind 'lorsa', known here: transcoder_set, cross_layer_transcoder"),
        ({"feature_input_hook": None}, "does not say where transcoders read and write: it lacks feature_input_hook"),
        ({"feature_input_hook": "hook_resid_post"}, "reads mlp_in, resid_mid, resid_pre of a layer"),
        ({"feature_input_hook": "nowhere"}, "names no place"),
        ({"feature_output_hook": "hook_resid_post"}, "writes mlp_out of the same layer"),
        ({"feature_input_hook": "ln2.hook_normalized", "model_name": None}, "without the gain of the norm before it"),
        ({"transcoders": "layer_0.safetensors"}, "must be a list of files, got 'layer_0.safetensors'"),
        ({"transcoders": ["../layer_0.safetensors"]}, "which must be hf://user/name/file, or a file in its folder"),
        ({"transcoders": ["/etc/layer_0.safetensors"]}, "which must be hf://user/name/file, or a file in its folder"),
        ({"transcoders": ["layer_7.safetensors"]}, "which must be hf://user/name/file, or a file in its folder"),
        ({"transcoders": [{"layer": True, "filepath": "layer_0.safetensors"}]}, "must be a whole number, got 'True'"),
        ({"transcoders": ["layer_0.safetensors"] * 2, "feature_input_hook": "blocks.0.mlp.hook_in",
          "feature_output_hook": "blocks.0.hook_mlp_out"}, "got two of layer 0"),
    ],
)  # fmt: skip
def test_configs_that_nobody_understands(tmp_path, change, words):
    save_file(tensors(0), tmp_path / "layer_0.safetensors")
    config(tmp_path, **{"model": change.pop("model_name")} if "model_name" in change else {}, **change)
    with pytest.raises(ValueError, match=words):
        sl.TranscoderSet.load(tmp_path)


def test_weights_that_nobody_understands(tmp_path):
    config(tmp_path)
    with pytest.raises(ValueError, match=r"holds no layer_0.safetensors, ..., and its config.yaml no"):
        sl.TranscoderSet.load(tmp_path)
    save_file({"W": normal(3, 3)}, tmp_path / "layer_0.safetensors")
    with pytest.raises(ValueError, match=r"holds the tensors \['W'\], which no format of one file here has"):
        sl.TranscoderSet.load(tmp_path)
    save_file(tensors(0) | {"b_enc": normal(7)}, tmp_path / "layer_0.safetensors")
    with pytest.raises(ValueError, match="b_enc has shape"):
        sl.TranscoderSet.load(tmp_path)
    with pytest.raises(ValueError, match=r"no transcoders at \S+nowhere: pass a folder or a hub repository"):
        sl.TranscoderSet.load(tmp_path / "nowhere")


def test_check_tells_coders_at_a_wrong_place(make_tiny, caplog):
    lm = make_tiny("llama")
    made = []
    for layer in (0, 2):
        reads, writes = Site("mlp_in", layer), Site("mlp_out", layer)
        acts = lm.read(["The river rose in March", "a fox"], [reads, writes])
        x, y = (acts[s][acts.mask.to(acts[s].device)] for s in (reads, writes))
        coder = sl.JumpReLU(48, 8, d_out=48, skip=True)
        with torch.no_grad():
            coder.W_skip.copy_(torch.linalg.lstsq(x, y - y.mean(0)).solution)  # the part that is linear
            coder.b_dec.copy_(y.mean(0))
            coder.b_enc -= 100.0
        coder.reads, coder.writes = (reads,), (writes,)
        made.append(coder)
    coders = sl.TranscoderSet(made)
    assert coders.sites == [made[0].reads[0], made[0].writes[0], made[1].reads[0], made[1].writes[0]]
    found = coders.check(lm.read(["The river rose in March", "a fox"], coders.sites))
    assert found.keys() == {0, 2} and found[0] is made[0].meta["check"] and found[2]["fvu"] < 0.7
    assert found[0]["tokens"] == len(acts.mask.nonzero()) - 2
    for coder in made:
        coder.reads = (Site("resid_mid", coder.reads[0].layer),)
        coder.W_skip.data *= 10
    caplog.clear()
    assert coders.check(lm.read("The river rose in March", coders.sites))[0]["fvu"] > 1
    assert "does not fit the activations: FVU is" in caplog.text
