"""Every call on a real server against the same call here."""

import copy

import numpy as np
import pytest
import torch

import sae_lab as sl
from tests.remote.conftest import PROMPTS, SITE, same

pytestmark = pytest.mark.remote
SOURCE, BASE = "The dog sat on the mill", "The fox ran over the hill"


def test_reading_at_every_kind_of_site(far, near):
    sites = [sl.Site(kind, None if kind == "embed" else 1) for kind in near.kinds]
    sites += [sl.Site("attn_z", 2, head=3), sl.Site("model.layers.0.mlp.up_proj")]
    there, here = far.read(PROMPTS, sites), near.read(PROMPTS, sites)
    assert torch.equal(there.mask, here.mask) and len(here) == len(sites)
    for site in sites:
        same(there[site], here[site])


def test_logits_and_losses(far, near):
    real = near.tokenize(PROMPTS).mask
    same(far.logits(PROMPTS)[real], near.logits(PROMPTS)[real])
    same(far.loss(PROMPTS, per_token=True), near.loss(PROMPTS, per_token=True))
    assert float(far.loss(PROMPTS)) == pytest.approx(float(near.loss(PROMPTS)), rel=1e-5)


def edits_of(coder):
    return [
        sl.Steer(coder, 3, strength=2.0), sl.Clamp(coder, [1, 2], value=2.0, positions=slice(1, 4)),
        sl.Scale(coder, range(40), 3.0, positions=" fox"), sl.Ablate(coder, range(20)),
        sl.Ablate(coder, range(20), to="mean", reference=PROMPTS),
        sl.Ablate(coder, range(20), to="resample", reference=PROMPTS), sl.Patch(coder, SOURCE),
        sl.Patch(coder, SOURCE, error="patch"), sl.Splice(coder), sl.Project(coder, [4, 5]),
        sl.Steer(coder, 3, strength=2.0, error="drop", positions=lambda text: "o" in text),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["topk", "batchtopk", "gated", "switch"])
def test_edits(name, far, near, coders):
    """Each kind of edit on one family; on the others together those that keep the error, and those that drop it."""
    edits = edits_of(coders[name])
    together = [[e for e in edits if (e.error == "drop") == drop] for drop in (False, True)]
    for few in [[e] for e in edits] if name == "topk" else together:
        clean, here = near.logits(BASE), near.logits(BASE, edits=few)
        assert not torch.equal(clean, here), few
        same(far.logits(BASE, edits=few), here)


def test_edits_of_several_coders_and_sites(far, near, coders):
    """Groups, and which tokens count: by what stands there before the first edit, or by a pass without edits."""
    early = sl.TopK(coders["topk"].d_in, 96, k=8, seed=3)
    early.reads = early.writes = (sl.Site("resid_post", 0),)
    early.f_scale.fill_(1.0)
    norms = near.read(PROMPTS, SITE)[SITE].norm(dim=-1)[:, 1:]
    mask = sl.TokenMask((), True, {SITE.key: 1.2 * float(norms.max())})
    limited = [copy.deepcopy(coders[name]) for name in ("topk", "gated")]
    for coder in limited:
        coder.meta = {"mask": mask.to_dict()}
    topk, gated = limited
    one_site = [sl.Steer(topk, 3, 60.0), sl.Clamp(topk, [4, 3], value=2.0, positions=slice(3, None)),
                sl.Steer(gated, 5, strength=2.0), sl.Scale(topk, range(40), 2.0)]  # fmt: skip
    for edits in (one_site, [sl.Steer(early.eval(), 7, 80.0), *one_site[1:]]):
        here = near.logits(BASE, edits=edits)
        assert not torch.equal(here, near.logits(BASE, edits=edits[:2]))
        same(far.logits(BASE, edits=edits), here)
        assert far.generate(PROMPTS, edits, max_new_tokens=5) == near.generate(PROMPTS, edits, max_new_tokens=5)


def test_edits_in_a_raw_trace_on_the_server(server, far, near, coders):
    """nnsight alone, with the functions that edits give."""
    steer = sl.Steer(coders["topk"], 3, strength=2.0)
    patch = sl.Patch(coders["gated"], SOURCE)
    one, two, ids, model = steer.inside(far, BASE), patch.inside(far, BASE), far.tokenize(BASE).ids, far._nn
    logits = None
    with model.trace(ids, remote=server.url):
        model.model.layers[1].output = two(one(model.model.layers[1].output))
        logits = model.output.logits.save()
    same(logits, near.logits(BASE, edits=[steer, patch]))


def test_an_edit_that_changes_nothing_leaves_logits_bit_equal_there(far, coders):
    clean = far.logits(PROMPTS)
    for edit in (sl.Steer(coders["topk"], 3, strength=0.0), sl.Scale(coders["topk"], 3, 1.0)):
        assert torch.equal(far.logits(PROMPTS, edits=[edit]), clean)


def test_generation(far, near, coders):
    steps = [sl.Steer(coders["topk"], 3, strength=3.0, steps=slice(2, None))]
    for edits in ([], [*steps, sl.Ablate(coders["gated"], range(9), rows=1)]):
        there, here = (lm.generate(PROMPTS, edits=edits, max_new_tokens=7) for lm in (far, near))
        assert there == here
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 5}
    assert far.generate(PROMPTS, **settings) == near.generate(PROMPTS, **settings)
    pieces = list(far.stream(BASE, edits=steps, max_new_tokens=6))
    assert pieces == list(near.stream(BASE, edits=steps, max_new_tokens=6))


def test_vectors_and_conditions(far, near, coders):
    """What a condition has seen in the prompt is known in the passes of the new tokens."""
    text = sl.load_text([SOURCE, BASE, *PROMPTS] * 3)
    there, here = (sl.Vector.difference(lm, SITE, PROMPTS, [SOURCE], text=text) for lm in (far, near))
    same(there.direction, here.direction)
    assert there.f_scale == pytest.approx(here.f_scale, rel=1e-4)
    vector = here.calibrated(far, text)  # its model's name there
    x = near.read(PROMPTS, SITE)[SITE]
    code = coders["topk"].encode(x)[..., 3] / coders["topk"].f_scale[3]
    for what, most in ((vector, float((x[:, 1:] @ vector.unit).max() - vector.centre) / vector.f_scale),
                       ((coders["topk"], 3), float(code[:, 1:].max()))):  # fmt: skip
        for scope in ("token", "so far", "prompt"):
            edits = [sl.Push(vector, 6.0, when=(what, 0.5 * most, scope))]
            local = [sl.Push(here, 6.0, when=(here if what is vector else what, 0.5 * most, scope))]
            same(far.logits(BASE, edits=edits), near.logits(BASE, edits=local))
            assert far.generate(PROMPTS, edits, max_new_tokens=6) == near.generate(PROMPTS, local, max_new_tokens=6)
            assert repr(edits[0].firing(far, PROMPTS)) == repr(local[0].firing(near, PROMPTS))


def test_a_stream_can_be_left(far, near):
    stream = far.stream(BASE, max_new_tokens=40)
    assert next(stream) == next(near.stream(BASE, max_new_tokens=1))
    stream.close()
    same(far.logits(BASE), near.logits(BASE))


def test_comparison(far, near, coders):
    edits = [sl.Steer(coders["topk"], 3, strength=2.0)]
    there, here = far.compare(BASE, edits), near.compare(BASE, edits)
    same(there.kl, here.kl, 1e-4)  # of small differences
    same(there.logprob_edited, here.logprob_edited)
    assert list(there.features) == list(here.features)


def test_patching_and_attribution(far, near, coders):
    metric = sl.circuits.logit_difference(near, " the", " sea")
    pair = [BASE, PROMPTS[0]], [SOURCE, SOURCE]
    there, here = (sl.circuits.patching(lm, *pair, metric, positions=[2, 5]) for lm in (far, near))
    same(there.values, here.values, 1e-4)  # shares of a difference of means
    there, here = (sl.circuits.attribution(lm, coders["topk"], *pair, metric, steps=2, check=6) for lm in (far, near))
    same(there.effects, here.effects, 1e-4)
    same(list(there.true_effects.values()), list(here.true_effects.values()), 1e-4)


def test_a_metric_of_ones_own(far, near):
    def surprise(logits, tokens):
        return -logits[:, -1].log_softmax(-1).max(-1).values

    there, here = (
        sl.circuits.patching(lm, [BASE], [SOURCE], surprise, kinds=["mlp_out"], positions=[6]) for lm in (far, near)
    )
    same(there.values, here.values, 1e-4)


def test_the_ways_in_and_out(far, near):
    for site in (SITE, sl.Site("attn_z", 1), sl.Site("attn_z", 1, head=2)):
        x = torch.randn(5, near.width(site), generator=torch.Generator().manual_seed(0))
        same(far.lens(x, site), near.lens(x, site))
    ids = torch.tensor([3, 500, 40000])
    same(far.embedding(ids), near.embedding(ids))
    assert far.lens(torch.zeros(1, near.width("layers.1")), sl.Site("mlp_in", 1)) is None


def test_harvest(far, near, small_text, tmp_path):
    """Bytes of a store are the same: kept tokens, their activations at two sites, scales and mask."""
    sites = [SITE, sl.Site("mlp_out", 0)]
    stores = [sl.harvest(lm, sites, small_text, 3000, path=tmp_path / name, context=64)
              for lm, name in ((far, "far"), (near, "near"))]  # fmt: skip
    there, here = stores
    assert len(there) == len(here) and len(there.manifest["shards"]) == len(here.manifest["shards"])
    assert there.mask.max_norm == pytest.approx(here.mask.max_norm, rel=1e-5)
    assert there.manifest["scales"] == here.manifest["scales"] and there.excluded == here.excluded
    rows = np.arange(len(here))
    for key in ("token", "position", "document", "context"):
        assert torch.equal(there.rows(rows, key), here.rows(rows, key))
    for site in sites:
        same(there.rows(rows, site.key), here.rows(rows, site.key), 1e-3)  # half precision


def test_an_index_from_codes_is_the_index(far, near, coders, small_text, tmp_path):
    """Codes are made on the server, and the index is the same as from a store made here."""
    coder = coders["topk"]
    there, here = (
        sl.index_features(
            coder, lm, sl.harvest(lm, SITE, small_text, 2500, path=tmp_path / name, context=64, coder=coder),
            path=tmp_path / f"index-{name}",
        )
        for lm, name in ((far, "far"), (near, "near"))
    )  # fmt: skip
    same(there.density, here.density, 2e-3)  # rounding may change which feature is a token's k-th
    same(there.mean, here.mean, 1e-3)
    whole = sl.index_features(coder, near, sl.harvest(near, SITE, small_text, 2500, path=tmp_path / "whole", context=64,
                                                      mask=near.mask()), path=tmp_path / "index-whole")  # fmt: skip
    assert abs(whole.density - there.density).mean() < 0.01 * there.density.mean()  # that store is in half precision
    feature = int(np.argmax(here.density))
    assert [t for t, _ in there[feature].promoted] == [t for t, _ in here[feature].promoted]
    with pytest.raises(ValueError, match="holds the codes of coder"):
        sl.train(sl.TopK(48, 96, k=4), there.store, sl.TrainConfig(steps=1))
    with pytest.raises(ValueError, match="holds codes of coder"):
        sl.index_features(coders["gated"], far, there.store, path=tmp_path / "wrong")


def test_features_finding_dosing_and_evals(far, near, coders, small_text):
    coder = coders["batchtopk"]
    there, here = (sl.features(lm, coder, PROMPTS) for lm in (far, near))
    assert torch.equal(there.feature, here.feature) and there.left_out == here.left_out
    same(there.value, here.value)
    texts = ["The fox ran", "A fox sat", "Foxes run", "The fox slept", "A cat sat", "The cat ran", "Cats run", "A cat"]
    found = [sl.find_features(lm, coder, texts[:4], texts[4:]).to_pandas() for lm in (far, near)]
    assert found[0].round(4).equals(found[1].round(4))
    settings = {"target": " the", "prompts": [BASE], "text": [SOURCE, PROMPTS[2]], "strengths": [0.0, 1.0]}
    doses = [sl.dose_response(lm, coder, 3, **settings).to_pandas().select_dtypes("number") for lm in (far, near)]
    assert np.allclose(doses[0], doses[1], atol=1e-4, equal_nan=True)
    held_out = small_text.held_out
    evals = [sl.evals.reconstruction(coder, lm, held_out, tokens=300) for lm in (far, near)]
    for name in ("l0", "fvu", "ce_clean", "ce_delta", "ce_delta_zero_ablation", "pca_ce_delta"):
        assert getattr(evals[0], name) == pytest.approx(getattr(evals[1], name), rel=1e-4, abs=1e-5), name


def test_the_bundled_model(server, lm):
    """SmolLM2 itself, deployed by the server: reading, edits and generation."""
    far = sl.LM(remote=server.url, deadline=180)
    coder = sl.load("smollm2-135m/resid_post-8")
    text = "I went to the market and bought"
    edits = [sl.Steer(coder, int(coder.f_scale.argmax()), strength=1.0)]
    same(far.logits(text, edits=[sl.Splice(coder)]), lm.logits(text, edits=[sl.Splice(coder)]))  # 21 MB of weights
    same(far.read(text, coder.site)[coder.site], lm.read(text, coder.site)[coder.site])
    # The strongest feature of all: rounding, which differs with the threads, grows over 21 layers (to 1.02e-5).
    same(far.logits(text, edits=edits), lm.logits(text, edits=edits), tolerance=3e-5)
    assert far.generate(text, edits=edits, max_new_tokens=8) == lm.generate(text, edits=edits, max_new_tokens=8)
    assert far.id == lm.id and far.n_layers == lm.n_layers and "remote=" in repr(far)
