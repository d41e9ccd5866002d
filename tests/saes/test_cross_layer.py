"""Cross-layer transcoders: by hand, against plain formulas in float64, and from published files, whose function is
written out in plain torch."""

import json

import pytest
import torch
from safetensors.torch import save_file

import sae_lab as sl
from sae_lab.saes import base
from sae_lab.types import Batch, Codes, Site
from tests.saes.conftest import normal
from tests.saes.test_exchange import close
from tests.saes.test_releases import hub as hub
from tests.saes.test_releases import put
from tests.saes.test_tracer_sets import config

L, D, OUT, W = 3, 8, 5, 10  # layers, widths, features of a layer


def small(activation="batchtopk", **more):
    """A CLT with weights off their symmetric start."""
    clt = sl.CrossLayerTranscoder(D, L * W, L, k=6, activation=activation, d_out=OUT, skip=True, **more)
    with torch.no_grad():
        for i, p in enumerate(clt.parameters()):
            p += 0.2 * normal(*p.shape, seed=i + 1)
        clt.project()
        if activation == "jumprelu":
            clt.threshold.copy_(0.3 + normal(L * W, seed=9).abs() / 10)
    clt.calibrate([normal(300, L, D, seed=8)])
    return clt


def plain(clt, x, on):
    """(pre, codes, output) in float64 with these features on. Each parameter by name, with a gradient."""
    p = {n: t.detach().double().requires_grad_() for n, t in clt.named_parameters()}
    x = x.double()
    pre = torch.cat([x[:, n] @ p["W_enc"][:, n * W : (n + 1) * W] for n in range(L)], 1) + p["b_enc"]
    f = (pre * on).relu()
    y = torch.einsum("bi,ito->bto", f, p["W_dec"].view(L * W, L, OUT)) + p["b_dec"].view(L, OUT)
    return p, pre, f, y + torch.einsum("btd,tdo->bto", x, p["W_skip"])


def test_by_hand():
    clt = sl.CrossLayerTranscoder(1, 4, layers=2, k=2, activation="topk")
    with torch.no_grad():
        clt.W_enc.copy_(torch.tensor([[1.0, -1.0, 2.0, 3.0]]))
        clt.W_dec.copy_(torch.tensor([[5.0, 7.0], [0.0, 1.0], [0.0, 11.0], [0.0, 13.0]]))
    out = clt(torch.tensor([[[2.0], [10.0]]]))
    # Layer 0 makes 2 and −2, layer 1 20 and 30, each keeps its largest: 2·5 at layer 0, 2·7 + 30·13 at layer 1.
    assert out.f.tolist() == [[2.0, 0.0, 0.0, 30.0]] and out.x_hat.tolist() == [[[10.0], [404.0]]]
    assert clt.rows(0, 1, [1, 0]).tolist() == [[1.0], [7.0]] and clt.rows(1, 1, [1]).tolist() == [[13.0]]
    one = clt.layer(1)
    assert one.encode(torch.tensor([[10.0]])).tolist() == [[0.0, 30.0]] and one.W_dec.tolist() == [[11.0], [13.0]]


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu"])
def test_plain_formulas(activation, tmp_path):
    clt, x = small(activation), normal(24, L, D, seed=2)
    out = clt(x)
    _, pre, f, y = plain(clt, x, out.f > 0)
    close(out.f, f.float())
    close(out.x_hat, y.float())
    close(out.pre, pre.float())
    assert 0.05 < float((out.f > 0).float().mean()) < 0.6
    if activation == "topk":
        assert bool(((out.f.view(24, L, W) > 0).sum(-1) <= 2).all())
    blocks = clt.W_dec.view(L, W, L, OUT)
    assert all(not blocks[n, :, t].any() for n in range(L) for t in range(n)), "no feature writes before its layer"
    assert torch.equal(clt.encode(x.view(2, 12, L, D)).flatten(0, 1), out.f) and clt.encode(x[0]).shape == (L * W,)
    close(clt.decode(out.f) + torch.einsum("btd,tdo->bto", x, clt.W_skip), out.x_hat)
    assert isinstance(clt.codes_of(x), Codes) and torch.equal(clt.codes_of(x).dense(), out.f.detach())
    for n in range(L):
        part = clt.layer(n)
        close(part.encode(x[:, n]), out.f[:, n * W : (n + 1) * W])
        assert part.W_enc.data_ptr() == clt.W_enc[:, n * W :].data_ptr(), "it shares memory"
        for t in range(n, L):
            close(clt.rows(n, t, torch.arange(W)), blocks[n, :, t])
    clt.reads = tuple(Site("mlp_in", n) for n in range(L))
    clt.writes = tuple(Site("mlp_out", n) for n in range(L))
    back = sl.load(clt.save(tmp_path / "clt"))
    assert type(back) is sl.CrossLayerTranscoder and back.fingerprint() == clt.fingerprint() and back.is_saved
    assert (back.reads, back.writes) == (clt.reads, clt.writes) and torch.equal(back(x).x_hat, out.x_hat)
    few = sl.load(clt.as_set().save(tmp_path / "few", bits=8))
    close(few.W_dec, clt.W_dec, 0.01)
    assert all(not few.W_dec.view(L, W, L, OUT)[n, :, t].any() for n in range(L) for t in range(n))


@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
def test_loss_and_gradients_are_those_of_plain_formulas(activation):
    clt, x = small(activation).train(), normal(24, L, D, seed=3)
    batch, dead = Batch(x, normal(24, L, OUT, seed=4)), torch.zeros(L * W, dtype=torch.bool)
    on = clt.encode(x) > 0
    for name in ("none dead", "some dead"):
        dead[[1, 12, 25]] = name == "some dead"
        clt.zero_grad()
        loss = sum(clt.loss(batch, progress=1.0, dead=dead).values())
        loss.backward()
        p, pre, _, y = plain(clt, x, on)
        expected = (batch.target - y).square().flatten(1).sum(1).mean()
        if bool(dead.any()):
            residual = (batch.target - y).detach().flatten(1)
            fitted = (pre * dead).relu() @ p["W_dec"]
            expected = expected + (residual - fitted).square().sum(1).mean() / 32
        expected.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        for parameter, q in clt.named_parameters():
            close(q.grad, p[parameter].grad.float())


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
def test_thresholds_learn_as_those_of_jumprelu(sparse_below, monkeypatch):
    """A CLT whose features write to their own layer alone is a JumpReLU for each layer: losses add up, gradients are
    theirs."""
    monkeypatch.setattr(base, "SPARSE_BELOW", sparse_below)
    clt = sl.CrossLayerTranscoder(D, L * W, L, activation="jumprelu", d_out=OUT, sparsity=0.3, start=0.2).train()
    blocks = clt.W_dec.data.view(L, W, L, OUT)
    blocks.mul_(torch.eye(L)[:, None, :, None])
    clt.b_enc.data += 0.3 * normal(L * W, seed=1)
    x, y, dead = normal(40, L, D, seed=2), normal(40, L, OUT, seed=3), torch.zeros(L * W, dtype=torch.bool)
    whole = clt.loss(Batch(x, y), progress=1.0, dead=dead)
    sum(whole.values()).backward()
    total = 0.0
    for n in range(L):
        at, one = slice(n * W, (n + 1) * W), sl.JumpReLU(D, W, sparsity=0.3, start=0.2, d_out=OUT).train()
        for name, tensor in (("W_enc", clt.W_enc[:, at]), ("b_enc", clt.b_enc[at]), ("W_dec", blocks[:, :, n][n])):
            getattr(one, name).data.copy_(tensor)
        part = one.loss(Batch(x[:, n], y[:, n]), progress=1.0, dead=dead[:W])
        sum(part.values()).backward()
        total += float(part["mse"].detach() + part["sparsity"].detach())
        assert one.threshold.grad.abs().max() > 0.1
        close(clt.threshold.grad[at], one.threshold.grad)
        close(clt.W_enc.grad[:, at], one.W_enc.grad)
        close(clt.W_dec.grad.view(L, W, L, OUT)[n, :, n], one.W_dec.grad)
    assert total == pytest.approx(float(whole["mse"].detach() + whole["sparsity"].detach()), rel=1e-5)
    clt.threshold.data -= 1.0
    clt.project()
    assert not clt.threshold.any(), "never below 0"


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_training_of_the_other_activations(activation):
    x = normal(600, L, D, seed=6)
    y = torch.einsum("bld,ldo->blo", x.relu(), normal(L, D, OUT, seed=7)).cumsum(1)
    clt = sl.CrossLayerTranscoder(D, L * 32, L, k=4 * L, activation=activation, d_out=OUT, sparsity=0.05, seed=1)
    sl.train(clt, Batch(x, y), sl.TrainConfig(steps=150, batch_size=100, lr=3e-3))
    fvu = float((clt(x).x_hat.detach() - y).square().sum() / (y - y.mean(0)).square().sum())
    assert fvu < 0.6 and 1 < float((clt.encode(x) > 0).sum(1).float().mean()) < 40
    assert clt.threshold.isfinite().all() == (activation == "jumprelu")


@pytest.mark.parametrize("scales", [(3.7, 3.7), (torch.tensor([5.0, 0.2, 1.0]), torch.tensor([2.0, 0.5, 9.0]))])
def test_fold(scales):
    clt, x = small(), normal(24, L, D, seed=5)
    into, out = (torch.as_tensor(s).expand(L)[:, None] for s in scales)
    before = clt(into * x)
    clt.fold(*scales)
    after = clt(x)
    assert torch.equal(after.f > 0, before.f > 0)
    close(out * after.x_hat, before.x_hat)


def test_training_from_a_store_of_all_layers(make_tiny, small_text, tmp_path, caplog):
    """``sl.train`` finds what each MLP reads and writes, and leaves a coder that serves raw activations."""
    lm = make_tiny("llama")
    sites = [f"{kind}-{n}" for n in (1, 0, 2) for kind in ("mlp_out", "mlp_in")]
    store = sl.harvest(lm, sites, small_text, tokens=2_000)
    clt = sl.CrossLayerTranscoder(48, 3 * 64, layers=3, k=24)
    run = sl.train(clt, store, sl.TrainConfig(steps=40, batch_size=128))
    assert clt.reads == tuple(Site("mlp_in", n) for n in range(3)) and run is not None
    assert clt.writes == tuple(Site("mlp_out", n) for n in range(3)) and not clt.training
    acts = lm.read("The river rose in March and the fox ran away", [*clt.reads, *clt.writes])
    x, y = (torch.stack([acts[s][0, 1:] for s in sites], 1) for sites in (clt.reads, clt.writes))
    error = (clt(x).x_hat - y).square().sum((0, 2)) / (y - y.mean(0)).square().sum((0, 2))
    plain_error = (clt.b_dec.view(3, -1) - y).square().sum((0, 2)) / (y - y.mean(0)).square().sum((0, 2))
    assert bool((error < 0.95 * plain_error).all()), "each layer is better than its bias alone"
    assert float((clt.encode(x) > 0).sum(1).float().mean()) == pytest.approx(24, rel=0.5)
    found = clt.check(lm.read("The river rose in March and the fox ran away", [*clt.reads, *clt.writes]))
    assert [found[n]["fvu"] for n in range(3)] == pytest.approx(error.tolist(), rel=1e-4)
    assert found[0]["tokens"] == len(x)
    l0 = float((clt.encode(x) > 0).sum(1).float().mean())
    assert sum(one["l0"] for one in found.values()) == pytest.approx(l0)
    assert clt.as_set().check(acts).keys() == found.keys() and "does not fit" not in caplog.text
    clt.b_dec.data += 100.0
    clt.check(acts)
    assert "FVU is above 1 in layers [0, 1, 2]" in caplog.text
    clt.b_dec.data -= 100.0
    assert sl.load(clt.as_set().save(tmp_path / "clt")).fingerprint() == clt.fingerprint(), "whole, not layer by layer"
    graph = sl.circuits.trace(lm, clt, "The river rose in March")
    assert graph.check(graph.top(1)[0]).error < 1e-4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sl.CrossLayerTranscoder(8, 30, layers=1), "at least 2 layers, got 1: else use sl.Transcoder"),
        (lambda: sl.CrossLayerTranscoder(8, 31, layers=3), "d_sae must be a multiple of 3, got 31"),
        (lambda: sl.CrossLayerTranscoder(8, 30, layers=3, activation="relu"), "one of batchtopk, topk, jumprelu, got"),
        (lambda: sl.CrossLayerTranscoder(8, 30, layers=3, k=7, activation="topk"), "k=7 must be a multiple"),
        (lambda: sl.CrossLayerTranscoder(8, 30, layers=3, k=31), "k must be an integer from 1 to d_sae=30, got 31"),
        (lambda: small().rows(2, 1, [0]), "features write to their layer and later of 3, got 2 and 1"),
        (lambda: small().rows(1, 2, [0, 10]), r"features of a layer go from 0 to 9, got \[0, 10\]"),
        (lambda: small().layer(3), "layer must be from 0 to 2, got 3"),
        (lambda: small()(normal(4, D)), r"x must end in \(3, 8\), got shape \(4, 8\)"),
        (lambda: small().portable(), "reads several sites at once"),
        (lambda: small().choose_sites([Site("mlp_in", 0), Site("mlp_out", 0)]), "layers=3: it needs a store with what"),
        (lambda: sl.CrossLayerTranscoder(8, 30, layers=3, activation="jumprelu", sparsity=-1.0), "must be a number"),
        (lambda: sl.saes.realign(small(), Batch(normal(9, L, D), normal(9, L, OUT))), "write before their own layer"),
    ],
)  # fmt: skip
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- published files

X = normal(9, L, D, seed=1)
HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}


def clt_tensors(layer, threshold=True):
    t = {"W_enc": normal(W, D, seed=layer), "b_enc": normal(W, seed=layer + 10), "b_dec": normal(D, seed=layer + 20)}
    return t | ({"threshold": normal(W, seed=layer + 30).abs()} if threshold else {})


def tracer_clt(folder, threshold=True, dtype=torch.float32, **more):
    """circuit-tracer's files; returns what its CrossLayerTranscoder makes of X: (codes, output)."""
    config(folder, model_kind="cross_layer_transcoder", **{**HOOKS, **more})
    y, codes = torch.zeros(len(X), L, D), []
    for n in range(L):
        t, W_dec = clt_tensors(n, threshold), normal(W, L - n, D, seed=n + 40).to(dtype)
        save_file({f"{name}_{n}": v for name, v in t.items()}, folder / f"W_enc_{n}.safetensors")
        save_file({f"W_dec_{n}": W_dec}, folder / f"W_dec_{n}.safetensors")
        f = (X[:, n] @ t["W_enc"].T + t["b_enc"]).relu()
        codes.append(f * (f > t["threshold"]) if threshold else f)
        y[:, n:] += torch.einsum("bf,fto->bto", codes[-1], W_dec.float())
        y[:, n] += t["b_dec"]
    return torch.cat(codes, 1), y


@pytest.mark.parametrize(
    ("threshold", "dtype"), [(True, torch.float32), (False, torch.bfloat16), (True, torch.float16)]
)
def test_circuit_tracers_files(tmp_path, threshold, dtype):
    f, y = tracer_clt(tmp_path, threshold, dtype)
    clt = sl.CrossLayerTranscoder.load(tmp_path)
    close(clt.encode(X), f)
    close(clt(X).x_hat, y)
    close(clt.decode(f), y)
    assert clt.reads == tuple(Site("resid_mid", n) for n in range(L)) and clt.meta["model"] == "Qwen/Qwen3-4B"
    assert clt.writes == tuple(Site("mlp_out", n) for n in range(L)) and len(clt.W_dec) == 0, "it stays in its files"
    assert bool(clt.layer(1).W_dec.isnan().all())
    for call in (sl.load, sl.TranscoderSet.load):
        with pytest.raises(ValueError, match=r"sl.CrossLayerTranscoder.load"):
            call(tmp_path)


@pytest.mark.parametrize("by", ["config", "itself"])
def test_gemma_scope_2s_clt(tmp_path, hub, by):
    """Named by a config of mwhanna, whose hub has the addresses of Google's files; or Google's folder by itself."""
    root, asked = hub
    inside, y, codes = "clt/width_262k_l0_medium_affine", torch.zeros(len(X), L, D), []
    for n in range(L):
        t = clt_tensors(n)
        t |= {"w_enc": t.pop("W_enc").T, "w_dec": normal(W, L, D, seed=n + 40)}
        t["affine_skip_connection"] = normal(D, D, seed=n)
        put(root, "google/gemma-scope-2-1b-pt", inside, {f"params_layer_{n}.safetensors": t})
        f = (X[:, n] @ t["w_enc"] + t["b_enc"]).relu()
        codes.append(f * (f > t["threshold"]))
        y[:, n:] += torch.einsum("bf,fto->bto", codes[-1], t["w_dec"][:, n:])
        y[:, n] += t["b_dec"] + X[:, n] @ t["affine_skip_connection"]
    uris = [f"hf://google/gemma-scope-2-1b-pt/{inside}/params_layer_{n}.safetensors" for n in range(L)]
    config(root / "mwhanna/gemma-scope-2-1b-pt" / inside, "google/gemma-3-1b-pt", model_kind="cross_layer_transcoder",
           transcoders=uris, **{**HOOKS, "feature_input_hook": "mlp.hook_in"})  # fmt: skip
    clt = sl.CrossLayerTranscoder.load(f"{'google' if by == 'itself' else 'mwhanna'}/gemma-scope-2-1b-pt", inside)
    assert sorted(n.rsplit("/", 1)[-1] for n in asked if n.endswith("tensors")) == [u.rsplit("/", 1)[-1] for u in uris]
    close(clt.encode(X), torch.cat(codes, 1))
    close(clt(X).x_hat, y)
    assert clt.reads[2] == Site("mlp_in", 2) and clt.meta["model"] == "google/gemma-3-1b-pt"


def sparsify_clt(folder, **change):
    """EleutherAI's files (clt-training, ``coalesce_topk`` "concat"), and what its runner makes of X."""
    k, codes, written = 3, [], []
    (folder / "config.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model": "HuggingFaceTB/SmolLM2-135M"}))
    for n in range(L):
        cfg = {"activation": "topk", "num_latents": W, "k": k, "d_in": D, "transcode": True, "skip_connection": True,
               "n_targets": L - n, "n_sources": n + 1, "normalize_io": True, "post_encoder_scale": True,
               "coalesce_topk": "concat", "topk_coalesced": False, **change}  # fmt: skip
        t = {"encoder.weight": normal(W, D, seed=n), "encoder.bias": normal(W, seed=n + 10) + 1,
             "W_dec": normal(W, D, seed=n + 20), "b_dec": normal(D, seed=n + 30), "W_skip": normal(D, D, seed=n + 40),
             "in_norm": torch.tensor([1.5 + n]), "out_norm": torch.tensor([0.7 + n])}  # fmt: skip
        t |= {f"post_encs.{i}": normal(W, seed=50 + 5 * n + i) / 3 for i in range(L - n)}
        t |= {f"post_enc_scales.{i}": normal(W, seed=70 + 5 * n + i) for i in range(L - n)}
        home = folder / f"layers.{n}.mlp"
        home.mkdir(exist_ok=True)
        (home / "cfg.json").write_text(json.dumps(cfg))
        save_file(t, home / "sae.safetensors")
        written.append(t)
        x = X[:, n] * D**0.5 / t["in_norm"]
        pre = (x @ t["encoder.weight"].T + t["encoder.bias"]).relu()
        top = pre.topk(k)
        codes.append(torch.zeros_like(pre).scatter(1, top.indices, top.values))
    y = []
    for t in range(L):
        w, total = written[t], 0
        for n in range(t + 1):
            f = codes[n] + written[n][f"post_encs.{t - n}"] * (codes[n] > 0)
            total = total + (f * written[n][f"post_enc_scales.{t - n}"]) @ w["W_dec"]
        total = total + w["b_dec"] + X[:, t] * D**0.5 / w["in_norm"] @ w["W_skip"].T
        y.append(total * w["out_norm"] / D**0.5)
    return torch.cat(codes, 1), torch.stack(y, 1)


def test_eleuthers_files(tmp_path):
    f, y = sparsify_clt(tmp_path)
    clt = sl.CrossLayerTranscoder.load(tmp_path)
    close(clt.encode(X), f)
    close(clt(X).x_hat, y)
    assert clt.reads[1] == Site("mlp_in", 1) and clt.writes[1] == Site("mlp_out", 1)
    assert clt.meta["model"] == "HuggingFaceTB/SmolLM2-135M" and not clt.as_set().linear


def test_what_needs_whole_decoders_refuses_those_in_files(tmp_path):
    tracer_clt(tmp_path)
    clt = sl.CrossLayerTranscoder.load(tmp_path)
    batch = Batch(X, normal(9, L, D))
    calls = [
        lambda: clt.strengths(clt.encode(X), X), lambda: clt.codes_of(X, strengths=True), clt.directions,
        lambda: clt.fold(2.0), lambda: sl.train(clt, batch, sl.TrainConfig(steps=1)), lambda: clt.save(tmp_path / "a"),
        lambda: sl.saes.inform(clt, batch), lambda: sl.saes.unsuppress(clt, batch),
        lambda: sl.saes.optimise_codes(clt, batch), lambda: sl.meta_sae(clt, 8, 2, sl.TrainConfig(steps=1)),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=r"W_dec of this coder lies in files \(.*\): clt.rows reads some rows"):
            call()


@pytest.mark.parametrize("change", ["resample", "inform"])
def test_features_are_replaced_within_their_layers(change):
    clt, x = small(), normal(200, L, D, seed=4)
    batch, before = Batch(x, normal(200, L, OUT, seed=5)), small()
    if change == "resample":
        sl.saes.resample(clt, batch, torch.arange(L * W) % 7 == 0)
    else:
        sl.saes.inform(clt, batch)
    blocks = clt.W_dec.view(L, W, L, OUT)
    assert all(not blocks[n, :, t].any() for n in range(L) for t in range(n))
    new = (torch.arange(L * W) % 7 == 0) if change == "resample" else torch.ones(L * W, dtype=torch.bool)
    assert bool(((clt.W_dec - before.W_dec).abs().amax(1) > 0.01).eq(new).all())
    close(clt.W_dec.norm(dim=1)[new], torch.ones(int(new.sum())))
    assert bool(((clt.W_enc - before.W_enc).abs().amax(0) > 0.01).eq(new).all())


def remove(name):
    return lambda folder: (folder / name).unlink()


def rewrite(name, **tensors):
    return lambda folder: save_file(tensors, folder / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("W_enc_1.safetensors"), "has 2 files W_enc_….safetensors, and none of layer 1"),
        (remove("W_dec_2.safetensors"), r"W_dec_2.safetensors is no whole safetensors file"),
        (rewrite("W_dec_0.safetensors", W_dec_0=normal(W, 2, D)), r"must hold W_dec_0 of shape \(10, 3, 8\), it has"),
        (rewrite("W_dec_0.safetensors", W_dec_0=torch.ones(W, L, D, dtype=torch.int32)), "holds I32, not floats"),
        (rewrite("W_enc_0.safetensors", W_enc_0=normal(W, D)), r"missing or surplus: \['b_dec_0', 'b_enc_0'"),
        (rewrite("W_enc_0.safetensors", W_enc_0=normal(W, D), b_enc_0=normal(W), b_dec_0=normal(D)), "hold the same"),
        (rewrite("W_enc_0.safetensors", W_enc_0=normal(W, D), b_enc_0=normal(W), b_dec_0=normal(D),
                 threshold_0=-torch.ones(W)), "a threshold below 0 lets codes be negative"),
        (rewrite("W_enc_0.safetensors", W_enc_0=normal(W, D), b_enc_0=normal(W), b_dec_0=normal(D) / 0,
                 threshold_0=torch.ones(W)), "holds NaN or Inf"),
        (remove("config.yaml"), "no cross-layer transcoder in .*: supported are circuit-tracer's"),
    ],
)  # fmt: skip
def test_files_that_nobody_understands(tmp_path, change, words):
    tracer_clt(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=words):
        sl.CrossLayerTranscoder.load(tmp_path)


def test_other_kinds(tmp_path):
    tracer_clt(tmp_path, feature_input_hook="ln2.hook_normalized", model=None)
    with pytest.raises(ValueError, match="whose site depends on the model: pass model="):
        sl.CrossLayerTranscoder.load(tmp_path)
    clt = sl.CrossLayerTranscoder.load(tmp_path, model="google/gemma-2-2b")
    assert clt.reads[0] == Site("resid_mid", 0) and clt.input_norm == "length"
    z = X / X.square().mean(-1, keepdim=True).sqrt()
    f = torch.cat([(z[:, n] @ t["W_enc"].T + t["b_enc"]).relu() for n in range(L) for t in [clt_tensors(n)]], 1)
    close(clt.encode(X), f * (f > clt.threshold))
    config(tmp_path)
    with pytest.raises(ValueError, match=r"which is a transcoder for each layer: load it with sl.TranscoderSet.load"):
        sl.CrossLayerTranscoder.load(tmp_path)
    for change, words in (({"coalesce_topk": "none"}, "layer 0 has coalesce_topk 'none'; supported is 'concat'"),
                          ({"activation": "batchtopk"}, "has activation 'batchtopk'; supported is 'topk'"),
                          ({"topk_coalesced": True}, "has topk_coalesced True; supported is False"),
                          ({"n_targets": 0}, "must have n_targets of at least 1, got 0")):  # fmt: skip
        sparsify_clt(tmp_path / "eleuther", **change)
        with pytest.raises(ValueError, match=words):
            sl.CrossLayerTranscoder.load(tmp_path / "eleuther")


def test_a_graph_reads_only_the_rows_that_are_active(make_tiny, tmp_path):
    """A CLT in files gives the graph that the same one in memory gives."""
    lm = make_tiny("llama")
    clt = sl.CrossLayerTranscoder(48, 3 * 16, layers=3, k=48, activation="jumprelu", seed=2).eval()
    with torch.no_grad():
        clt.threshold.fill_(0.8)
    clt.reads = tuple(Site("mlp_in", n) for n in range(3))
    clt.writes = tuple(Site("mlp_out", n) for n in range(3))
    config(tmp_path, model_kind="cross_layer_transcoder", feature_input_hook="mlp.hook_in")
    for n in range(3):
        at = slice(16 * n, 16 * n + 16)
        t = {"W_enc": clt.W_enc[:, at].T, "b_enc": clt.b_enc[at], "b_dec": clt.b_dec.view(3, -1)[n],
             "threshold": clt.threshold[at]}  # fmt: skip
        save_file({f"{k}_{n}": v.detach().contiguous() for k, v in t.items()}, tmp_path / f"W_enc_{n}.safetensors")
        W_dec = clt.W_dec.detach().view(48, 3, 48)[at, n:].contiguous()
        save_file({f"W_dec_{n}": W_dec}, tmp_path / f"W_dec_{n}.safetensors")
    one, other = (sl.circuits.trace(lm, c, "The river") for c in (clt, sl.CrossLayerTranscoder.load(tmp_path)))
    assert one.counts[0] > 10 and one.nodes == other.nodes
    close(other.effects, one.effects)
    assert other.check(other.top(1)[0]).error < 1e-4
