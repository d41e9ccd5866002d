"""TrainConfig(objective="kl"): the loss through the model with the coder spliced in."""

import logging
from functools import cache

import pytest
import tiny_models
import torch
from saes.conftest import SPECS, make
from torch.nn import functional as F

import sae_lab as sl
from sae_lab.activations import sharding
from sae_lab.saes import FAMILIES
from sae_lab.training import config as configs
from sae_lab.training import through as module
from sae_lab.training.loop import Training
from sae_lab.training.start import rows_for
from sae_lab.training.through import Through

A, B, C = (sl.Site("resid_post", layer) for layer in (0, 1, 2))
SMALL = {"steps": 12, "batch_size": 96, "lr": 3e-3, "checkpoint_every": 5, "dead_after": 2000, "objective": "kl"}
LAYER = {"llama": "model.layers.1", "gpt2": "transformer.h.1", "gpt_neox": "gpt_neox.layers.1"}


@pytest.fixture(autouse=True)
def small_passes(monkeypatch):
    """A batch needs several passes of the model."""
    monkeypatch.setattr(sharding, "SHARD_TOKENS", 256)
    for place in (sharding, module):
        monkeypatch.setattr(place, "FORWARD_TOKENS", 64)


@cache
def model(name="llama"):
    return sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer(), device="cpu")


@pytest.fixture
def small_lm():
    return model()


@pytest.fixture
def stream(small_lm, small_text):
    def call(sites=B, text=small_text, small_lm=small_lm, **kwargs):
        return sl.Stream(small_lm, sites, text, buffer=256, context=32, **kwargs)

    return call


def config(**more):
    return sl.TrainConfig(**SMALL | more)


def coder(seed=0):
    return sl.TopK(48, 96, k=4, seed=seed)


def made(stream, coder, **more):
    return Through(rows_for(coder, stream), coder, config(**more))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a)


# ---- the loss


def plain(small_lm, path, part, rows, objective, later):
    """The loss of one pass by transformers alone, with a hook in which rows stand in place of the kept tokens: (its sum
    over tokens, their number); and of each later layer the distance from the clean pass."""
    inner, ids, seen = small_lm._module, part.tokens.ids, {}
    keep, real = part.keep, part.tokens.mask

    def spliced(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        x = x.masked_scatter(keep[..., None], rows)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def noted(_module, _args, output):
        seen.setdefault("later", []).append(output[0] if isinstance(output, tuple) else output)

    stem, number = path.rsplit(".", 1)
    after = inner.get_submodule(f"{stem}.{int(number) + 1}").register_forward_hook(noted)
    clean = inner(ids).logits.detach()
    hook = inner.get_submodule(path).register_forward_hook(spliced)
    logits = inner(ids).logits
    hook.remove()
    after.remove()
    apart = 0
    if later:
        was, now = (acts[keep] for acts in seen["later"])
        apart = (now - was.detach()).square().sum() / (was - was.mean(0)).square().sum().detach()
    if objective == "kl":
        p, q = clean[real].softmax(-1), logits[real].log_softmax(-1)
        return (p * (p.log() - q)).sum(), int(real.sum()), apart
    pairs = real[:, 1:]
    return F.cross_entropy(logits[:, :-1][pairs], ids[:, 1:][pairs], reduction="sum"), int(pairs.sum()), apart


@pytest.mark.parametrize("name", LAYER)
@pytest.mark.parametrize(("objective", "later"), [("kl", []), ("ce", []), ("kl", [C])])
def test_the_gradient_is_that_of_a_plain_forward(stream, name, objective, later):
    small_lm = model(name)
    loss = made(stream(small_lm=small_lm), coder(), objective=objective, share=1.0, downstream=later)
    x = loss.batch(0, 96).x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x_hat = (x + 0.3 * x.std() * noise).requires_grad_(True)
    found, parts, tokens, kls = 0.0, x_hat.split([int(p.keep.sum()) for p in loss.passes]), 0, 0.0
    assert len(loss.passes) > 1
    for part, rows in zip(loss.passes, parts, strict=True):
        summed, many, apart = plain(small_lm, LAYER[name], part, rows, objective, later)
        kl = plain(small_lm, LAYER[name], part, rows, "kl", [])[0].detach()
        kls, tokens = kls + kl, tokens + many
        found = found + summed + (kl / apart.detach() * apart if later else 0)  # both as large, in each pass
    found = found / tokens
    (wanted,) = torch.autograd.grad(found, x_hat)
    mse = kls / sum(int(p.tokens.mask.sum()) for p in loss.passes) * (2 if later else 1)  # the balance is then 1
    terms, figures = loss.terms(x_hat, {"mse": mse.detach(), "auxk": torch.tensor(7.0)})
    terms["through"].backward()
    # Rounding: the sums go over other groups of tokens.
    assert float((x_hat.grad - wanted).norm()) < 1e-4 * float(wanted.norm())
    assert terms["through"].item() == pytest.approx(found.item(), rel=1e-4)
    assert terms["mse"] == 0 and terms["auxk"] == 7
    if not later:
        assert figures[objective].item() == pytest.approx(found.item(), rel=1e-4)
    assert all(p.requires_grad for p in small_lm._module.parameters())  # as before


def test_the_mse_and_the_kl_are_balanced(stream):
    run = sl.train(coder(), stream(), config(share=0.25))
    for row in run.history:
        assert row["through"] == pytest.approx(row["mse"] / 3, rel=1e-3)  # .25 and .75 of the same size
        assert row["kl"] > 0.01 and row["ce"] > 1


def test_without_a_share_it_is_plain_training_bit_for_bit(stream):
    ended = coder()
    sl.train(ended, stream(), config(share=0.0))
    other = coder()
    rows = rows_for(other, stream())
    training = Training(other, rows, config(objective="reconstruction"), None, ())
    batches = Through(rows, other, config())
    training.begin()
    for step in range(12):
        training.one_step(batches.batch(step, 96))
    training.end()
    assert same(ended, other)
    moved = coder()
    sl.train(moved, stream(), config(share=0.5))
    assert not same(ended, moved)  # the control


def test_a_perfect_reconstruction_loses_nothing(stream):
    loss = made(stream(), coder(), downstream=[C])
    x_hat = loss.batch(0, 96).x.requires_grad_(True)
    terms, figures = loss.terms(x_hat, {"mse": torch.tensor(1.0)})
    terms["through"].backward()
    assert figures["kl"] == 0 and figures["downstream"] == 0 and not x_hat.grad.any()
    both = torch.cat([torch.eye(48), -torch.eye(48)])
    perfect = sl.TopK(48, 96, k=48)
    with torch.no_grad():
        perfect.W_dec.copy_(both)
        perfect.W_enc.copy_(both.T)
    found = sl.train(perfect, stream(), config(steps=1)).history[0]
    # x is scaled and scaled back, which rounds it: a KL goes with the square of that.
    assert found["kl"] < 1e-6 and found["fvu"] < 1e-6


@pytest.mark.parametrize("kind", ["an SAE", "a transcoder"])
def test_it_is_spliced_in_as_an_evaluation_splices(stream, small_lm, kind):
    """Where, and at which tokens: the loss is that of sl.Splice."""
    sites = B if kind == "an SAE" else ["mlp_in-1", "mlp_out-1"]
    sae = coder() if kind == "an SAE" else sl.Transcoder(48, 96, k=4, d_out=48)
    sl.train(sae, stream(sites), config())
    loss = made(stream(sites), sae)
    batch = loss.batch(0, 96)
    _, figures = loss.terms(sae(batch.x).x_hat, {"mse": torch.tensor(1.0)})
    losses = []
    for part in loss.passes:
        for ids, real in zip(part.tokens.ids, part.tokens.mask, strict=True):
            losses.append(small_lm.loss([ids[real].tolist()], [sl.Splice(sae)], per_token=True)[0, 1:])
    assert figures["ce"].item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    clean = [small_lm.loss([i[r].tolist()], per_token=True)[0, 1:] for p in loss.passes
             for i, r in zip(p.tokens.ids, p.tokens.mask, strict=True)]  # fmt: skip
    assert abs(figures["ce"].item() - torch.cat(clean).mean().item()) > 0.01  # the control


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Crosscoder"])
def test_every_family_has_an_mse_that_is_balanced(stream, family):
    own = {"d_out": 48, "vocab": tiny_models.VOCAB, "prefixes": (12, 96)}
    sae = make(family, 48, 96, **{name: value for name, value in own.items() if name in SPECS[family]})
    sites = ["mlp_in-1", "mlp_out-1"] if sae.transcodes else B
    row = sl.train(sae, stream(sites), config(steps=1)).history[0]
    assert row["through"] == pytest.approx(row["mse"], rel=1e-3)


def test_in_bf16_only_the_coder_is_rounded(stream, monkeypatch):
    monkeypatch.setattr(configs, "_multiplies_bfloat16", lambda device: True)  # slowly, on this CPU
    rounded, exact = coder(), coder()
    runs = [sl.train(sae, stream(), config(precision=p)) for sae, p in ((rounded, "bf16"), (exact, "float32"))]
    a, b = (run.history[-1]["kl"] for run in runs)
    assert a != b and a == pytest.approx(b, rel=0.2)


# ---- batches


def test_a_batch_is_whole_contexts_and_has_as_many_rows_as_asked_for(stream, small_lm, small_text):
    rows = rows_for(coder(), stream())
    loss = Through(rows, coder(), config())
    training, held_out = set(), set()
    for context in small_text.contexts(small_lm.tokenizer, small_lm.prefix_id, 32):
        (held_out if context.documents[0] % 5 == 4 else training).add(tuple(context.ids))
    seen = []
    for step in range(6):
        batch = loss.batch(step, 96)
        assert len(batch.x) == len(batch.tokens) == 96 == sum(int(p.keep.sum()) for p in loss.passes)
        contexts = [i[r].tolist() for p in loss.passes for i, r in zip(p.tokens.ids, p.tokens.mask, strict=True)]
        assert all(tuple(ids) in training - held_out for ids in contexts[:-1])
        assert any(one[: len(contexts[-1])] == tuple(contexts[-1]) for one in training)  # the last one is cut
        seen += contexts[:-1]
        first = loss.passes[0].tokens.ids[:1]
        acts = small_lm.read(first.tolist(), B)[B][0]
        kept = loss.passes[0].keep[0]
        assert torch.allclose(batch.x[: int(kept.sum())], acts[: len(kept)][kept], rtol=1e-4, atol=1e-4)
        assert not kept[0] and batch.positions.min() > 0  # position 0 stays as it is
    assert len({tuple(ids) for ids in seen}) > 0.9 * len(seen)  # no context comes twice (some begin alike)


def test_large_tokens_are_left_out(stream, monkeypatch):
    source = stream()
    whole = made(source, coder()).batch(0, 96)
    limit = float(whole.x.norm(dim=1).median())
    source.manifest["mask"]["max_norm"][B.key] = limit
    loss = made(source, coder())
    assert all(len(loss.batch(step, 96).x) == 96 for step in range(3))
    assert float(loss.batch(3, 96).x.norm(dim=1).max()) <= limit < float(whole.x.norm(dim=1).max())


def test_a_text_that_ends_begins_again(stream, small_text, caplog):
    loss = made(stream(text=small_text[:5]), coder())
    first = loss.batch(0, 96)
    with caplog.at_level(logging.WARNING):
        later = [loss.batch(step, 96) for step in range(1, 40)]
    assert caplog.text.count("the text has ended") == 1
    assert any(torch.equal(first.tokens[:20], batch.tokens[i : i + 20]) for batch in later for i in range(70))


# ---- interrupted


@pytest.mark.parametrize(("stop", "total", "short"), [(3, 12, False), (5, 12, False), (30, 34, True)])
def test_a_resumed_run_is_an_unbroken_one(stream, small_text, tmp_path, stop, total, short):
    """After a few steps, at a checkpoint, and in the second pass over a short text."""
    text = small_text[:5] if short else small_text

    def interrupt(event):
        if event.kind == "step" and event.step == stop:
            raise KeyboardInterrupt

    settings = config(steps=total, downstream=[C])
    with pytest.raises(KeyboardInterrupt):
        sl.train(coder(), stream(text=text), settings, path=tmp_path / "run", callbacks=[interrupt])
    resumed, unbroken = coder(), coder()
    run = sl.train(resumed, stream(text=text), settings, path=tmp_path / "run")
    assert run.history == sl.train(unbroken, stream(text=text), settings).history
    assert same(resumed, unbroken)
    assert sl.train(coder(), stream(text=text), settings, path=tmp_path / "run").history == run.history  # finished
    with pytest.raises(ValueError, match="config objective: 'kl' there, 'ce' now"):
        sl.train(coder(), stream(text=text), config(steps=total, downstream=[C], objective="ce"), path=tmp_path / "run")


@pytest.mark.parametrize("state", [None, {}, {"step": 1, "epoch": 0, "shard": -1, "row": 0}, [1, 2, 3, 4]])
def test_a_damaged_place_is_refused(stream, state):
    with pytest.raises(ValueError, match="four whole numbers"):
        made(stream(), coder()).resume(state)


# ---- what it is for


def test_a_finetuned_coder_changes_less_than_one_trained_on(small_text):
    """The head of this model reads 6 of 48 dimensions, so that little of an activation matters to it."""
    module = tiny_models.build("llama")
    basis = torch.linalg.qr(torch.randn(48, 6, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        module.lm_head.weight.copy_(2 * module.lm_head.weight @ basis @ basis.T)
    lm = sl.LM(module, tokenizer=tiny_models.tokenizer(), device="cpu")
    stream = sl.Stream(lm, sl.Site("resid_post", 3), small_text, buffer=1024, context=32)
    held_out = [document[:200] for document in small_text.held_out]
    clean, kls = lm.logits(held_out).log_softmax(-1), {}
    for objective in ("start", "reconstruction", "kl"):
        sae = coder()
        sl.train(sae, stream, config(steps=100, objective="reconstruction"))
        if objective != "start":
            sl.train(sae, stream, config(steps=60, objective=objective))
        spliced = lm.logits(held_out, [sl.Splice(sae)]).log_softmax(-1)
        kls[objective] = float((clean.exp() * (clean - spliced)).sum(-1).mean())
    assert kls["kl"] < 0.9 * min(kls["start"], kls["reconstruction"]), kls


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "logits"}, "objective must be one of reconstruction, kl, ce, got 'logits'"),
        ({"share": 1.5}, r"share must lie between 0 .* got 1.5"),
        ({"share": float("nan")}, "share must be a number, got nan"),
        ({"objective": "reconstruction", "downstream": [C]}, "needs the model: pass objective='kl' too"),
        ({"downstream": ["nowhere"]}, "unknown site 'nowhere'"),
    ],
)
def test_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        config(**settings)


def test_what_cannot_be_is_refused(stream, small_lm, small_text, tmp_path):
    def refused(said, data, sae=None, **more):
        with pytest.raises(ValueError, match=said):
            sl.train(sae or coder(), data, config(**more))

    store = sl.harvest(small_lm, B, small_text, 500, path=tmp_path / "store", context=32)
    refused("objective='kl' runs the model, and a store has none", store)
    refused("objective='ce' runs the model, and a tensor has none", torch.randn(200, 48), objective="ce")
    refused("keep='disk' does not write", stream(keep="disk", path=tmp_path / "kept"))
    refused("a Crosscoder writes 2", stream([A, B]), sl.Crosscoder(48, 96, layers=2, k=4))
    refused("downstream sites come after .* got", stream(), downstream=[A])
    backwards = sl.Transcoder(48, 96, k=4, d_out=48)
    backwards.reads, backwards.writes = (B,), (A,)
    refused("which is earlier", stream([A, B]), backwards)
    refused("the text ends before a batch is full", stream(text=[small_text[0][:300]]), batch_size=2000)
    with pytest.raises(ValueError, match="a sweep trains by reconstruction"):
        sl.sweep({"TopK": {"k": 4}}, stream(), config(), d_sae=96)
    with pytest.raises(ValueError, match="estimate knows objective='reconstruction'"):
        sl.estimate(sl.train, coder(), stream(), config())
