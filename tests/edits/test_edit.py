"""Edits: what does nothing leaves every bit, what does something does exactly that, at exactly those tokens."""

import inspect
import re

import pytest
import torch

import sae_lab as sl
from sae_lab.lm.generation import continued
from sae_lab.types import Site, TokenMask
from tests.conftest import ARCHITECTURES

SITE = Site("resid_post", 1)
PROMPT = "The ship went down the river to the sea"
LONGER = "A red fox crossed the white field at dawn, and nobody in the house saw it go"
# float32 through three layers, the KV cache or padding: relative to the largest logit
ROUNDING = 1e-4


def make(lm, site=SITE, seed=0, name="TopK", mask=None, input_norm="none"):
    """A coder of the model's own activations: features fire, and reconstruction is far from perfect."""
    reading = lm.read([PROMPT, LONGER], site)
    x = reading[site][reading.mask & (reading.batch.positions > 0)]
    sae = getattr(sl, name)(lm.width(site), 64, seed=seed, **({} if name == "L1" else {"k": 6}))
    sae.input_norm = input_norm
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
        sae.b_enc += 0.1
    sae.calibrate([x])
    sae.reads = sae.writes = (site,)
    if mask is not None:
        sae.meta = {"mask": mask.to_dict()}
    return sae


def firing(lm, sae):
    """The features that fire on PROMPT, strongest first."""
    f = sae.encode(lm.read(PROMPT, sae.site)[sae.site][0, 1:]).amax(0)
    order = f.argsort(descending=True)
    return order[f[order] > 0].tolist()


@pytest.fixture(scope="module")
def sae(make_tiny):
    return make(make_tiny("llama"))


@pytest.fixture(scope="module")
def live(make_tiny, sae):
    return firing(make_tiny("llama"), sae)


@pytest.fixture(scope="module")
def silent(sae):
    return int((sae.f_scale == 0).nonzero()[0])


def near(a, b, tolerance=ROUNDING):
    assert a.shape == b.shape
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def hooked(lm, module, change, prompts):
    """Logits with a plain torch hook that replaces a module's output by ``change(output)``."""

    def hook(_, __, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return lm._module(input_ids=lm.tokenize(prompts).ids).logits
    finally:
        handle.remove()


def block(lm, layer=1):
    return lm._module.get_submodule(lm._sites.blocks)[layer]


# ---- nothing happens


def no_ops(sae, feature, silent):
    far = 200
    return {
        "empty list": [],
        "strength 0": [sl.Steer(sae, feature, strength=0.0)],
        "an empty slice": [sl.Steer(sae, feature, positions=slice(far, None))],
        "no positions": [sl.Clamp(sae, feature, positions=[])],
        "only the prefix": [sl.Steer(sae, feature, positions=0)],
        "silent": [sl.Ablate(sae, silent)],
        "drop at no token": [sl.Ablate(sae, feature, positions=slice(far, None), error="drop")],
        "scaled by 1": [sl.Scale(sae, feature, factor=1.0)],
        "its own codes": [sl.Patch(sae, PROMPT), sl.Patch(sae, PROMPT, feature)],
        "spliced, error kept": [sl.Splice(sae, error="keep")],
        "no step": [sl.Steer(sae, feature, steps=slice(1, None))],
        "no row": [sl.Steer(sae, feature, rows=[])],
        "several": [sl.Scale(sae, feature, factor=1.0), sl.Ablate(sae, silent), sl.Steer(sae, feature, strength=0.0)],
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_ops_are_equal_to_the_bit(name, tiny):
    lm = tiny[name]
    sae = make(lm)
    feature, silent = firing(lm, sae)[0], int((sae.f_scale == 0).nonzero()[0])
    assert (sae.encode(lm.read(PROMPT, SITE)[SITE])[..., silent] == 0).all()
    clean = lm.logits(PROMPT)
    for what, edits in no_ops(sae, feature, silent).items():
        assert torch.equal(lm.logits(PROMPT, edits=edits), clean), what
    assert not torch.equal(lm.logits(PROMPT, edits=[sl.Steer(sae, feature)]), clean)
    assert not torch.equal(lm.logits(PROMPT, edits=[sl.Ablate(sae, feature)]), clean)


# ---- exactly that happens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ablating_subtracts_the_features_write(name, tiny):
    lm = tiny[name]
    sae = make(lm)
    feature = firing(lm, sae)[0]

    def without(x):
        f = sae.encode(x)
        f[:, 0] = 0  # the prefix is left out
        return x - f[..., feature : feature + 1] * sae.W_dec[feature]

    by_hook = hooked(lm, block(lm), without, PROMPT)
    assert near(lm.logits(PROMPT, edits=[sl.Ablate(sae, feature)]), by_hook)
    assert not near(lm.logits(PROMPT), by_hook, 1e-3)


EDITS = {
    "steer": (lambda sae, i: sl.Steer(sae, i, strength=2.0), lambda z, s: z + 2 * s),
    "clamp": (lambda sae, i: sl.Clamp(sae, i, value=1.5), lambda z, s: torch.ones_like(z) * 1.5 * s),
    "clamp down": (lambda sae, i: sl.Clamp(sae, i, value=-1.0), lambda z, s: torch.ones_like(z) * -s),
    "ablate": (lambda sae, i: sl.Ablate(sae, i), lambda z, s: torch.zeros_like(z)),
    "steer, drop": (lambda sae, i: sl.Steer(sae, i, strength=2.0, error="drop"), lambda z, s: z + 2 * s),
    "clamp, drop": (
        lambda sae, i: sl.Clamp(sae, i, value=1.5, error="drop"),
        lambda z, s: torch.ones_like(z) * 1.5 * s,
    ),
    "ablate, drop": (lambda sae, i: sl.Ablate(sae, i, error="drop"), lambda z, s: torch.zeros_like(z)),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", ["L1", "TopK", "BatchTopK"])
def test_codes_become_what_the_edit_says(name, count, family, tiny_lm):
    sae = make(tiny_lm, name=family)
    features = firing(tiny_lm, sae)[:count]
    edit, rule = EDITS[name]
    before = tiny_lm.read(PROMPT, SITE)[SITE][0]
    after = tiny_lm.read(PROMPT, SITE, edits=[edit(sae, features if count > 1 else features[0])])[SITE][0]
    z = sae.encode(before).detach()
    new = z.clone()
    new[:, features] = rule(z[:, features], sae.f_scale[features])
    expected = sae.decode(new) if "drop" in name else before + (new - z) @ sae.W_dec
    expected[0] = before[0]  # the prefix is left out
    assert near(after, expected.detach(), 1e-5)
    assert torch.equal(after[0], before[0]) and not near(after[1:], before[1:], 1e-3)


@pytest.mark.parametrize("input_norm", ["none", "layer", "length"])
def test_steering_alone_makes_no_codes(input_norm, tiny_lm, sae, live):
    """What it adds is the same for every code: the plan has no encoder, and the result is that of an edit with one."""
    sae = make(tiny_lm, input_norm=input_norm)
    one, two = firing(tiny_lm, sae)[:2]
    steers = [sl.Steer(sae, one, 2.0, positions=slice(3, None)), sl.Steer(sae, [two, one], -1.5)]
    same = sl.Scale(sae, one, 1.0)  # changes no code, and needs codes
    [alone], [coded] = (tiny_lm._writes(edits, tiny_lm.tokenize(PROMPT)) for edits in (steers, [*steers, same]))
    assert "W_enc" in coded.fn.keywords["change"].keywords["plan"]
    assert "W_enc" not in alone.fn.keywords["change"].keywords["plan"]
    logits = tiny_lm.logits(PROMPT, edits=steers)
    assert near(logits, tiny_lm.logits(PROMPT, edits=[*steers, same]), 1e-5)
    assert not near(logits, tiny_lm.logits(PROMPT, edits=steers[:1]), 1e-3)


def test_a_feature_named_twice_is_edited_once(tiny_lm, sae, live):
    for kwargs in ({}, {"error": "drop"}):
        once, twice = (
            tiny_lm.logits(PROMPT, edits=[sl.Ablate(sae, features, **kwargs)]) for features in (live[0], [live[0]] * 2)
        )
        assert torch.equal(once, twice)


def test_edits_at_several_sites(tiny_lm, sae, live):
    """Whatever the order they are given in, each acts in its place."""
    early = make(tiny_lm, Site("resid_pre", 1), seed=1)
    a, b = sl.Steer(early, firing(tiny_lm, early)[0]), sl.Steer(sae, live[0])
    both = tiny_lm.logits(PROMPT, edits=[a, b])
    assert torch.equal(both, tiny_lm.logits(PROMPT, edits=[b, a]))
    assert not near(both, tiny_lm.logits(PROMPT, edits=[a]), 1e-3)


@pytest.mark.parametrize("site", [Site("resid_mid", 1), Site("attn_z", 1, head=2), Site("mlp_out", 0), Site("embed")])
def test_at_other_sites(site, tiny_lm):
    sae = make(tiny_lm, site)
    feature = firing(tiny_lm, sae)[0]
    before, after = (tiny_lm.read(PROMPT, site, edits=e)[site][0] for e in ([], [sl.Ablate(sae, feature)]))
    expected = before - sae.encode(before)[:, feature : feature + 1] * sae.W_dec[feature]
    assert near(after[1:], expected[1:].detach(), 1e-5) and torch.equal(after[0], before[0])
    clean, edited = tiny_lm.logits(PROMPT), tiny_lm.logits(PROMPT, edits=[sl.Ablate(sae, feature)])
    assert not near(edited, clean, 1e-3) and torch.equal(
        tiny_lm.logits(PROMPT, edits=[sl.Steer(sae, feature, 0.0)]), clean
    )


# ---- at exactly those tokens


@pytest.mark.parametrize(
    ("positions", "touched"),
    [(3, {3}), (-0, set()), ([2, 5], {2, 5}), ([5, 2, 2], {2, 5}), (range(3, 6), {3, 4, 5}), (slice(4), {1, 2, 3}),
     (slice(6, None), {6, 7, 8, 9}), (slice(2, 8, 3), {2, 5}), (slice(None), set(range(1, 10))),
     (None, set(range(1, 10)))],
)  # fmt: skip
def test_positions(positions, touched, tiny_lm, sae, live):
    edit = sl.Steer(sae, live[0], positions=positions)
    before, after = (tiny_lm.read(PROMPT, SITE, edits=e)[SITE][0] for e in ([], [edit]))
    assert len(before) == 10
    changed = (before != after).any(-1).nonzero().flatten().tolist()
    assert set(changed) == touched


def test_padding_and_rows(tiny_lm, sae, live):
    """Each row of a batch gets what it gets alone; padding is never touched."""
    for edit in (
        sl.Steer(sae, live[0]),
        sl.Clamp(sae, live[1], positions=slice(3, None)),
        sl.Ablate(sae, live[0], error="drop"),
    ):
        both = tiny_lm.logits([PROMPT, LONGER], edits=[edit])
        for row, prompt in enumerate((PROMPT, LONGER)):
            alone = tiny_lm.logits(prompt, edits=[edit])[0]
            assert near(both[row, : len(alone)], alone)
    batch = tiny_lm.tokenize([PROMPT, LONGER])
    raw = [tiny_lm.run(batch, [SITE], tiny_lm._writes(e, batch), logits=False)[0][SITE] for e in ([], [edit])]
    assert torch.equal(raw[0][~batch.mask], raw[1][~batch.mask]) and (~batch.mask).any()


def test_excluded_tokens(tiny_lm):
    ids = tiny_lm.tokenize(PROMPT).ids[0]
    x = tiny_lm.read(PROMPT, SITE)[SITE][0]
    limit = float(x.norm(dim=-1)[1:].median())
    special = (int(ids[4]),)
    sae = make(tiny_lm, mask=TokenMask(special, False, {SITE.key: limit}))
    for error in ("keep", "drop"):
        after = tiny_lm.read(PROMPT, SITE, edits=[sl.Steer(sae, firing(tiny_lm, sae)[0], error=error)])[SITE][0]
        kept = ~torch.isin(ids, torch.tensor(special)) & (x.norm(dim=-1) <= limit)
        assert torch.equal((after != x).any(-1), kept) and 0 < kept.sum() < len(ids)


# ---- in loss and generation


def test_loss(tiny_lm, sae, live):
    edits = [sl.Steer(sae, live[0], strength=3.0)]
    ids = tiny_lm.tokenize(PROMPT).ids[0]
    losses = torch.nn.functional.cross_entropy(tiny_lm.logits(PROMPT, edits=edits)[0, :-1], ids[1:], reduction="none")
    assert float(tiny_lm.loss(PROMPT, edits=edits)) == pytest.approx(float(losses.mean()), rel=1e-5)
    per_token = tiny_lm.loss(PROMPT, edits=edits, per_token=True)[0]
    clean = tiny_lm.loss(PROMPT, per_token=True)[0]
    assert torch.allclose(per_token[1:], losses, rtol=1e-4)
    assert torch.equal(per_token[1], clean[1]), "what the prefix predicts is not touched"
    assert not torch.allclose(per_token[2:], clean[2:], rtol=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_generation_is_the_argmax_on_the_whole_text(name, tiny):
    """Token by token with a cache, or all at once: the same edits at the same positions."""
    lm = tiny[name]
    sae = make(lm)
    feature = firing(lm, sae)[0]
    prompt = lm.tokenize(PROMPT).ids[0].tolist()
    new = 8
    cases = [
        [sl.Steer(sae, feature, strength=3.0)],
        [
            sl.Steer(sae, feature, strength=3.0, positions=slice(len(prompt) + 2, None)),
            sl.Ablate(sae, feature, positions=4),
        ],
        [sl.Clamp(sae, feature, value=2.0, error="drop")],
    ]
    for edits in cases:
        batch = lm.tokenize(PROMPT)
        writes = lm._writes(edits, batch, new)
        ids = prompt + [t for _, [t] in continued(lm, batch, writes, new, 0.0, None)]
        assert len(ids) == len(prompt) + new
        logits = lm.logits([ids[:-1]], edits=edits)[0]
        assert not near(logits, lm.logits([ids[:-1]])[0], 1e-3), "the edits do something"
        top = logits.topk(2).values
        for at in range(len(prompt) - 1, len(ids) - 1):
            # Where the two best lie within rounding of each other, either may win.
            assert logits[at].argmax() == ids[at + 1] or top[at, 0] - top[at, 1] < ROUNDING * top[at, 0].abs()
        text = lm.generate(PROMPT, edits=edits, max_new_tokens=new)
        assert text == lm.tokenizer.decode(ids, skip_special_tokens=True)
    assert lm.generate(PROMPT, edits=[], max_new_tokens=new) == lm.generate(PROMPT, max_new_tokens=new)


def test_the_main_use(lm):
    """On the bundled model, as a notebook writes it."""
    sae = make(lm, Site("resid_post", 8))
    feature = firing(lm, sae)[0]
    clean = lm.generate(PROMPT, max_new_tokens=2)
    assert lm.generate(PROMPT, edits=[sl.Steer(sae, feature, strength=0.0)], max_new_tokens=2) == clean
    assert lm.generate(PROMPT, edits=[sl.Steer(sae, feature, strength=8.0)], max_new_tokens=2) != clean


# ---- refused


@pytest.mark.parametrize(
    ("make_edit", "words"),
    [
        (lambda s, i: sl.Steer(s, i, strength=float("nan")), "strength must be a number, got nan"),
        (lambda s, i: sl.Steer(s, i, strength=float("inf")), "strength must be a finite number, got inf"),
        (lambda s, i: sl.Clamp(s, i, value=float("nan")), "value must be a number, got nan"),
        (lambda s, i: sl.Ablate(s, i, error="maybe"), "error must be 'keep' or 'drop', got 'maybe'"),
        (
            lambda s, i: sl.Steer(s, i, positions=-1),
            r"positions count from the prefix token \(0\) and are never negative, got -1",
        ),
        (lambda s, i: sl.Steer(s, i, positions=[2, -3]), r"are never negative, got \[2, -3\]"),
        (lambda s, i: sl.Steer(s, i, positions=slice(-4, None)), r"are never negative, got slice\(-4, None, None\)"),
        (
            lambda s, i: sl.Steer(s, i, positions=slice(5, 2, -1)),
            "a slice of positions runs forward, with a step of at le",
        ),
        (lambda s, i: sl.Steer(s, 64), "feature must be an int from 0 to 63, got 64"),
        (lambda s, i: sl.Ablate(s, -1), "feature must be an int from 0 to 63, got -1"),
        (lambda s, i: sl.Ablate(s, [i, 99]), "feature must be an int from 0 to 63, got 99"),
        (lambda s, i: sl.Ablate(s, True), "feature must be a whole number or a list of whole numbers, got True"),
        (lambda s, i: sl.Ablate(s, []), "an edit needs at least one feature"),
    ],
)
def test_edits_that_are_refused_when_made(make_edit, words, sae, live):
    with pytest.raises(ValueError, match=words):
        make_edit(sae, live[0])


def test_a_silent_feature_has_no_scale(tiny_lm, sae, silent):
    for edit in (sl.Steer(sae, silent), sl.Clamp(sae, silent)):
        with pytest.raises(
            ValueError, match=rf"feature {silent} never fired on training text, so it has no scale .*choose"
        ):
            tiny_lm.logits(PROMPT, edits=[edit])
    sae.f_scale[silent] = 1.0
    try:
        assert not torch.equal(tiny_lm.logits(PROMPT, edits=[sl.Steer(sae, silent)]), tiny_lm.logits(PROMPT))
    finally:
        sae.f_scale[silent] = 0.0


def test_another_model(tiny_lm):
    sae = sl.TopK(20, 64, k=3).eval()
    sae.f_scale.fill_(1.0)
    sae.reads = (SITE,)
    for call in (tiny_lm.logits, tiny_lm.loss, tiny_lm.generate):
        with pytest.raises(
            ValueError, match=r"this coder reads width 20 and LM\(.*\) has width 48 at .*: use the model it"
        ):
            call(PROMPT, edits=[sl.Steer(sae, 3)])
    sae.reads = (Site("resid_post", 7),)
    with pytest.raises(ValueError, match="out of range: this model has layers 0 to 2"):
        tiny_lm.logits(PROMPT, edits=[sl.Steer(sae, 3)])
    sae.reads = ()
    with pytest.raises(ValueError, match="this coder does not know its site: train it on a store, or set"):
        tiny_lm.logits(PROMPT, edits=[sl.Steer(sae, 3)])


def test_a_coder_in_training(tiny_lm):
    sae = make(tiny_lm, name="BatchTopK").train()
    with pytest.raises(ValueError, match=r"an edit needs the coder in eval mode.*: call sae.eval\(\)"):
        tiny_lm.logits(PROMPT, edits=[sl.Ablate(sae, 3)])


# ---- codes of other runs


OTHER = "The child came up the hill from the town"


def test_patching_all_positions_is_the_other_run(tiny_lm, sae):
    """With every code and the error: from there on the model computes what it computes for the source."""
    clean, source = tiny_lm.logits(PROMPT)[0], tiny_lm.logits(OTHER)[0]
    patched = tiny_lm.logits(PROMPT, edits=[sl.Patch(sae, OTHER, error="patch")])[0]
    # Attention in later layers sees the prefix alone as it was, and that is the same in both.
    assert near(patched, source) and not near(clean, source, 1e-2)
    codes_only = tiny_lm.logits(PROMPT, edits=[sl.Patch(sae, OTHER)])[0]
    assert not near(codes_only, source, 1e-2) and not near(codes_only, clean, 1e-2)


def test_patched_codes_are_the_sources(tiny_lm, sae, live):
    x, source = (tiny_lm.read(p, SITE)[SITE][0] for p in (PROMPT, OTHER))
    z, theirs = sae.encode(x).detach(), sae.encode(source).detach()
    for kwargs, at in (({}, slice(1, None)), ({"positions": [3, 5]}, [3, 5])):
        after = tiny_lm.read(PROMPT, SITE, edits=[sl.Patch(sae, OTHER, live[:3], **kwargs)])[SITE][0]
        expected = x.clone()
        expected[at] += (theirs - z)[at][:, live[:3]] @ sae.W_dec[live[:3]].detach()
        assert near(after, expected, 1e-5) and not near(after, x, 1e-3)
    dropped = tiny_lm.read(PROMPT, SITE, edits=[sl.Patch(sae, OTHER, error="drop")])[SITE][0]
    assert near(dropped[1:], sae.decode(theirs)[1:].detach(), 1e-5)


def test_each_row_has_its_source(tiny_lm, sae):
    both = tiny_lm.logits([PROMPT, OTHER], edits=[sl.Patch(sae, [OTHER, PROMPT], error="patch")])
    assert near(both[0], tiny_lm.logits(OTHER)[0]) and near(both[1], tiny_lm.logits(PROMPT)[0])
    one = tiny_lm.logits([PROMPT, LONGER], edits=[sl.Patch(sae, OTHER, error="patch", rows=0)])
    length = len(tiny_lm.tokenize(PROMPT).ids[0])
    assert near(one[0, :length], tiny_lm.logits(OTHER)[0]) and near(one[1], tiny_lm.logits(LONGER)[0])


def test_what_the_source_does_not_have_is_not_patched(tiny_lm, sae):
    """Sources of unequal lengths are padded: neither codes nor error come from padding, or from tokens left out."""
    short = "The child came"
    length = len(tiny_lm.tokenize(short).ids[0])
    edit = sl.Patch(sae, [short, LONGER], error="patch", positions=slice(2, None))
    before, after = (tiny_lm.read([PROMPT, OTHER], SITE, edits=e)[SITE] for e in ([], [edit]))
    source = tiny_lm.read(short, SITE)[SITE][0]
    assert near(after[0, 2:length], source[2:], 1e-5) and not near(after[0, 2:length], before[0, 2:length], 1e-3)
    assert near(after[0, length:], before[0, length:], 1e-6)


def test_ablating_to_the_mean_and_to_draws(tiny_lm, sae, live):
    reference = [OTHER, LONGER]
    reading = tiny_lm.read(reference, SITE)
    keep = reading.mask & (reading.batch.positions > 0)
    theirs = sae.encode(reading[SITE][keep]).detach()
    features = (theirs > 0).sum(0).topk(3).indices.tolist()  # those that fire there
    theirs = theirs[:, features]
    x = tiny_lm.read(PROMPT, SITE)[SITE][0]
    z = sae.encode(x).detach()[1:, features]

    def codes_after(**kwargs):
        edit = sl.Ablate(sae, features, reference=reference, **kwargs)
        delta = (tiny_lm.read(PROMPT, SITE, edits=[edit])[SITE][0] - x)[1:]
        return z + torch.linalg.lstsq(sae.W_dec[features].detach().T, delta.T).solution.T

    assert torch.allclose(codes_after(to="mean"), theirs.mean(0).expand_as(z), atol=1e-3)
    drawn = codes_after(to="resample")
    distance = torch.cdist(drawn, theirs).amin(1)
    assert float(distance.max()) < 1e-3 and len(drawn.round(decimals=3).unique(dim=0)) > 1
    assert not torch.allclose(drawn, codes_after(to="resample", seed=1), atol=1e-2)
    edit = sl.Ablate(sae, features, to="resample", reference=reference)
    batch, new = tiny_lm.tokenize(PROMPT), 6
    writes = tiny_lm._writes([edit], batch, new)
    ids = batch.ids[0].tolist() + [t for _, [t] in continued(tiny_lm, batch, writes, new, 0.0, None)]
    whole = tiny_lm.logits([ids[:-1]], edits=[edit])[0]  # a token's draw is its own, in one pass or in many
    assert whole[batch.ids.shape[1] - 1 :].argmax(-1).tolist() == ids[batch.ids.shape[1] :]


def test_projecting_removes_the_direction(tiny_lm, sae, live):
    features = live[:3]
    before, after = (tiny_lm.read(PROMPT, SITE, edits=e)[SITE][0] for e in ([], [sl.Project(sae, features)]))
    directions = sae.W_dec[features].detach()
    assert (after[1:] @ directions.T).abs().max() < 1e-4 * (before @ directions.T).abs().max()
    across = before - (before @ torch.linalg.pinv(directions)) @ directions
    assert near(after[1:], across[1:], 1e-5) and torch.equal(after[0], before[0])


def test_scale(tiny_lm, sae, live):
    x = tiny_lm.read(PROMPT, SITE)[SITE][0]
    after = tiny_lm.read(PROMPT, SITE, edits=[sl.Scale(sae, live[0], factor=3.0)])[SITE][0]
    expected = x + 2 * sae.encode(x)[:, live[:1]] * sae.W_dec[live[0]]
    assert near(after[1:], expected[1:].detach(), 1e-5) and not near(after, x, 1e-3)


def test_splice_is_the_reconstruction(tiny_lm, sae):
    x = tiny_lm.read(PROMPT, SITE)[SITE][0]
    after = tiny_lm.read(PROMPT, SITE, edits=[sl.Splice(sae)])[SITE][0]
    assert near(after[1:], sae(x).x_hat[1:].detach(), 1e-5) and torch.equal(after[0], x[0])


# ---- other coders


def transcoder(lm, reads, writes, skip=False):
    cls = sl.SkipTranscoder if skip else sl.Transcoder
    coder = cls(lm.width(reads), 64, d_out=lm.width(writes), k=6)
    coder.reads, coder.writes = (reads,), (writes,)
    reading = lm.read([PROMPT, LONGER], reads)
    with torch.no_grad():
        if skip:
            coder.W_skip.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    coder.calibrate([reading[reads][reading.mask & (reading.batch.positions > 0)]])
    return coder


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_reads_before_the_mlp_and_acts_behind(skip, tiny_lm):
    reads, writes = Site("mlp_in", 1), Site("mlp_out", 1)
    coder = transcoder(tiny_lm, reads, writes, skip)
    z = coder.encode(tiny_lm.read(PROMPT, reads)[reads][0])
    feature = int(z[1:].sum(0).argmax())
    before = tiny_lm.read(PROMPT, writes)[writes][0]
    kept, dropped = (
        tiny_lm.read(PROMPT, writes, edits=[sl.Ablate(coder, feature, error=error)])[writes][0]
        for error in ("keep", "drop")
    )
    assert near(kept[1:], (before - z[:, [feature]] * coder.W_dec[feature])[1:].detach(), 1e-5)
    x_hat = coder(tiny_lm.read(PROMPT, reads)[reads][0]).x_hat - z[:, [feature]] * coder.W_dec[feature]
    assert near(dropped[1:], x_hat[1:].detach(), 1e-5)
    assert torch.equal(kept[0], before[0]) and not near(kept, before, 1e-3)
    assert torch.equal(tiny_lm.logits(PROMPT, edits=[sl.Splice(coder, error="keep")]), tiny_lm.logits(PROMPT))
    text = tiny_lm.generate(PROMPT, edits=[sl.Steer(coder, feature, 4.0)], max_new_tokens=4)
    assert text != tiny_lm.generate(PROMPT, max_new_tokens=4)


def test_an_edit_that_writes_before_it_reads(tiny_lm):
    coder = transcoder(tiny_lm, Site("mlp_out", 1), Site("mlp_in", 1))
    with pytest.raises(ValueError, match=r"an edit that reads .*mlp_out.* cannot change .*mlp_in.*, which the model"):
        tiny_lm.logits(PROMPT, edits=[sl.Ablate(coder, 3)])


def test_a_coder_that_normalises_each_token(tiny_lm):
    """Its codes are in units of the token's own size, and so is what an edit adds."""
    coder = make(tiny_lm, name="L1")
    coder.input_norm = "layer"
    x = tiny_lm.read(PROMPT, SITE)[SITE][0]
    z = coder.encode(x)
    feature = int(z[1:].sum(0).argmax())
    after = tiny_lm.read(PROMPT, SITE, edits=[sl.Ablate(coder, feature)])[SITE][0]
    f = z.clone()
    f[:, feature] = 0
    size = (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)
    assert near(after[1:], (x + (f - z) @ coder.W_dec * size)[1:].detach(), 1e-5)


# ---- rows, steps, tokens


def test_rows_and_steps(tiny_lm, sae, live):
    edit = sl.Steer(sae, live[0], 4.0, rows=1)
    clean, some = (tiny_lm.read([PROMPT, OTHER], SITE, edits=e)[SITE] for e in ([], [edit]))
    assert torch.equal(some[0], clean[0]) and not torch.equal(some[1], clean[1])
    lengths = [PROMPT, LONGER, OTHER]  # generation takes rows of equal length together
    texts = tiny_lm.generate(lengths, edits=[sl.Steer(sae, live[0], 6.0, rows=[1, 2])], max_new_tokens=5)
    alone = [tiny_lm.generate(p, edits=[sl.Steer(sae, live[0], 6.0)], max_new_tokens=5) for p in lengths]
    assert texts[1:] == alone[1:] and texts[0] == tiny_lm.generate(PROMPT, max_new_tokens=5) != alone[0]
    prompt = len(tiny_lm.tokenize(PROMPT).ids[0])
    for steps, positions in (
        (0, slice(prompt)),
        (slice(2, None), slice(prompt + 1, None)),
        ([1, 3], [prompt, prompt + 2]),
    ):
        by_step, by_position = (
            tiny_lm.generate(PROMPT, edits=[sl.Steer(sae, live[0], 6.0, **where)], max_new_tokens=6)
            for where in ({"steps": steps}, {"positions": positions})
        )
        assert by_step == by_position
    assert by_step != tiny_lm.generate(PROMPT, edits=[sl.Steer(sae, live[0], 6.0)], max_new_tokens=6)


def test_positions_by_token(tiny_lm, sae, live):
    names = [t.lower() for t in tiny_lm.tokens(PROMPT)]
    before = tiny_lm.read(PROMPT, SITE)[SITE][0]
    for positions, wanted in ((" the", lambda t: t == " the"), (lambda t: "e" in t, lambda t: "e" in t)):
        after = tiny_lm.read(PROMPT, SITE, edits=[sl.Steer(sae, live[0], positions=positions)])[SITE][0]
        changed = (before != after).any(-1).tolist()
        assert changed[1:] == [wanted(str(t)) for t in tiny_lm.tokens(PROMPT)][1:] and 1 < sum(changed) < len(names) - 1


def test_a_text_that_no_token_reads(tiny_lm, sae, live):
    """Refused with the tokens that are there; in generation only where no token can come that reads so."""
    for positions in (" nowhere", " pterodactyl", "the", "", lambda t: False):
        edit = sl.Steer(sae, live[0], positions=positions)
        with pytest.raises(ValueError, match=r"no token of these prompts reads as .*'The', ' ship', ' went'.*: give"):
            tiny_lm.logits(PROMPT, edits=[edit])
    sea = sl.Steer(sae, live[0], positions=" sea")
    one, both = tiny_lm.logits(PROMPT, edits=[sea]), tiny_lm.logits([PROMPT, OTHER], edits=[sea])
    assert near(both[0], one[0]) and near(both[1, :9], tiny_lm.logits(OTHER)[0][:9])
    with pytest.raises(ValueError, match="no token of these prompts reads as positions=' sea' says"):
        tiny_lm.logits([PROMPT, OTHER], edits=[sl.Steer(sae, live[0], positions=" sea", rows=1)])
    with pytest.raises(ValueError, match="no token of these prompts reads as positions=' sea' says"):
        tiny_lm.compare(OTHER, [sea])
    assert tiny_lm.generate(OTHER, [sea], max_new_tokens=2) == tiny_lm.generate(OTHER, max_new_tokens=2)
    with pytest.raises(ValueError, match="no token of this model reads as positions=' pterodactyl' says"):
        tiny_lm.generate(OTHER, [sl.Steer(sae, live[0], positions=" pterodactyl")], max_new_tokens=2)


def test_a_text_is_a_token_in_the_middle_of_a_text(make_module):
    """SentencePiece decodes a token by itself without its space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>"])
    pieces.train_from_iterator([PROMPT, LONGER] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", unk_token="<unk>")
    lm = sl.LM(make_module("llama", 200), tokenizer=tokenizer, device="cpu")
    coder = make(lm)
    words = [str(t) for t in lm.tokens(PROMPT)]
    assert words[1:4] == ["The", " ship", " went"] and tokenizer.decode(lm.tokenize(PROMPT).ids[0, 2:3]) == "ship"
    edit = sl.Steer(coder, firing(lm, coder)[0], positions=" the")
    before, after = (lm.read(PROMPT, SITE, edits=e)[SITE][0] for e in ([], [edit]))
    assert (before != after).any(-1).tolist() == [word == " the" for word in words]
    with pytest.raises(ValueError, match="' The', ' ship'"):
        lm.logits(PROMPT, edits=[sl.Steer(coder, 3, 0.0, positions="ship")])


# ---- in words and on disk


def test_an_edit_prints_in_one_line(sae, live):
    edit = sl.Steer(sae, [3, 4], 2.0, positions=slice(2, None), rows=[0])
    assert repr(edit) == f"Steer({SITE!r}, positions=slice(2, None, None), rows=[0], feature=[3, 4], strength=2.0)"
    assert repr(sl.Ablate(sae, 3)) == f"Ablate({SITE!r}, feature=3)"


def test_edits_as_json(tiny_lm, sae, live, tmp_path):
    edits = [
        sl.Steer(sae, live[0], 2.0, positions=slice(3, None), rows=[0], steps=0),
        sl.Clamp(sae, live[:2], value=0.5, positions=[2, 4], error="drop"),
        sl.Scale(sae, live[0], 0.5, positions=" the"), sl.Ablate(sae, live[1], to="mean", reference=[OTHER]),
        sl.Patch(sae, OTHER, live[:2], error="patch"), sl.Splice(sae), sl.Project(sae, live[0]),
    ]  # fmt: skip
    fresh = make(tiny_lm)
    with pytest.raises(ValueError, match=r"was never saved.*sae.save\(path\)"):
        sl.Ablate(fresh, 1).to_json()
    sae.save(tmp_path / "coder")
    for edit in edits:
        for again in (sl.Edit.from_json(edit.to_json()), sl.Edit.from_json(edit.to_json(), coder=sae)):
            assert repr(again) == repr(edit)
            assert torch.equal(tiny_lm.logits(PROMPT, edits=[again]), tiny_lm.logits(PROMPT, edits=[edit]))
    with pytest.raises(ValueError, match="a function of tokens cannot be written down"):
        sl.Ablate(sae, 1, positions=str.isalpha).to_json()
    with pytest.raises(ValueError, match=r"made with a coder of weights .*, this one .* has"):
        sl.Edit.from_json(edits[0].to_json(), coder=make(tiny_lm, seed=1))
    for wrong in ("{}", "nonsense", "[]", '{"edit": "Explode", "coder": {}}', '{"edit": "Ablate", "coder": 3}'):
        with pytest.raises(ValueError, match="this is no edit of sae_lab"):
            sl.Edit.from_json(wrong)
    with pytest.raises(ValueError, match="Ablate knows no colour"):
        sl.Edit.from_json(sl.Ablate(sae, 1).to_json().replace('"feature": 1', '"feature": 1, "colour": 2'), coder=sae)


def test_shift_tab_documents_every_argument():
    for edit in (sl.Steer, sl.Clamp, sl.Scale, sl.Ablate, sl.Patch, sl.Splice, sl.Project, sl.Push):
        names = list(inspect.signature(edit).parameters)
        subject = "vector" if edit is sl.Push else "coder"
        assert {subject, "positions", "rows", "steps", "error", "when"} <= set(names)
        told = re.findall(r"^    (\w+): ", inspect.getdoc(edit) or "", re.MULTILINE)
        assert set(told) == set(names), edit


# ---- streaming and comparing


def test_streaming_says_what_generating_says(tiny_lm, sae, live):
    for edits in ([], [sl.Steer(sae, live[0], 4.0)]):
        for kwargs in ({}, {"temperature": 1.0, "seed": 3}):
            pieces = list(tiny_lm.stream(PROMPT, edits, max_new_tokens=12, **kwargs))
            whole = tiny_lm.generate(PROMPT, edits, max_new_tokens=12, **kwargs)
            assert PROMPT + "".join(pieces) == whole and len(pieces) >= 12
    stream = tiny_lm.stream(PROMPT, max_new_tokens=10**6)
    first = [next(stream) for _ in range(3)]
    stream.close()  # and the model is free again
    assert tiny_lm.generate(PROMPT, max_new_tokens=3).endswith("".join(first))
    with pytest.raises(ValueError, match=r"lm.stream takes one prompt, got several"):
        tiny_lm.stream([PROMPT, OTHER])
    with pytest.raises(ValueError, match="max_new_tokens >= 1"):
        tiny_lm.stream(PROMPT, max_new_tokens=0)


def test_compare(tiny_lm, sae, live):
    edit = sl.Clamp(sae, live[0], value=2.0, positions=slice(4, None))
    result = tiny_lm.compare(PROMPT, [edit])
    p, q = (tiny_lm.logits(PROMPT, edits=e)[0].log_softmax(-1) for e in ([], [edit]))
    assert torch.allclose(result.kl, (p.exp() * (p - q)).sum(-1), atol=1e-5)
    assert (result.kl[:4] == 0).all() and (result.kl[4:] > 0).all()
    ids = tiny_lm.tokenize(PROMPT).ids[0]
    assert torch.allclose(result.logprob_edited[1:], q[:-1].gather(1, ids[1:, None])[:, 0], atol=1e-5)
    assert result.perplexity == pytest.approx(float(tiny_lm.loss(PROMPT).exp()), rel=1e-4)
    assert result.perplexity_edited == pytest.approx(float(tiny_lm.loss(PROMPT, edits=[edit]).exp()), rel=1e-4)
    [(name, (without, with_))] = result.features.items()
    x = tiny_lm.read(PROMPT, SITE)[SITE][0]
    assert name == f"{SITE.key} #{live[0]}" and torch.allclose(without, sae.encode(x)[:, live[0]].detach(), atol=1e-5)
    written = tiny_lm.read(PROMPT, SITE, edits=[edit])[SITE][0]
    assert torch.allclose(with_, sae.encode(written)[:, live[0]].detach(), atol=1e-5), (
        "measured, not what was asked for"
    )
    table = result.to_pandas()
    assert len(table) == len(ids) and list(table)[-1] == f"{name} edited"
    assert "perplexity" in repr(result) and "<table" in result._repr_html_() and "<|" not in result._repr_html_()
    nothing = tiny_lm.compare(PROMPT, [])
    assert float(nothing.kl.abs().max()) == 0 and nothing.features == {}
    with pytest.raises(ValueError, match=r"lm.compare takes one prompt, got several"):
        tiny_lm.compare([PROMPT, OTHER], [edit])


@pytest.mark.parametrize(
    ("make_edit", "words"),
    [
        (lambda s: sl.Steer(s, 3, positions=50), r"position 50 is beyond prompt 0, whose last is 9: count from"),
        (lambda s: sl.Ablate(s, 3, positions=[2, 10]), "position 10 is beyond prompt 0"),
        (
            lambda s: sl.Ablate(s, 3, positions=slice(40, 60)),
            r"positions=slice\(40, 60, None\) holds no position of .* longest of which ends at 9: count",
        ),
        (lambda s: sl.Ablate(s, 3, rows=2), "rows=2 names prompt 2, and there are 1"),
        (lambda s: sl.Patch(s, LONGER), r"prompt 0 has 10 tokens and its source \d+: .* equal token lengths"),
        (
            lambda s: sl.Patch(s, "A red", positions=5),
            "position 5 is beyond the source of prompt 0: it has 3 tokens",
        ),
        (lambda s: sl.Patch(s, [OTHER, OTHER]), "Patch has 2 sources for 1 prompt"),
    ],
)
def test_places_that_are_not_there(make_edit, words, tiny_lm, sae):
    with pytest.raises(ValueError, match=words):
        tiny_lm.logits(PROMPT, edits=[make_edit(sae)])


def test_generated_positions_may_be_named(tiny_lm, sae, live):
    edit = sl.Steer(sae, live[0], 6.0, positions=11)
    assert tiny_lm.generate(PROMPT, [edit], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"position 11 is beyond prompt 0, whose last is 10 \(1 new token counted\)"):
        tiny_lm.generate(PROMPT, [edit], max_new_tokens=1)


@pytest.mark.parametrize(
    ("make_edit", "words"),
    [
        (lambda s: sl.Scale(s, 3, float("nan")), "factor must be a number, got nan"),
        (lambda s: sl.Ablate(s, 3, to="median"), "to must be 'zero', 'mean' or 'resample', got 'median'"),
        (lambda s: sl.Ablate(s, 3, to="mean"), "takes reference=, prompts whose codes replace"),
        (lambda s: sl.Ablate(s, 3, reference=[OTHER]), "takes no reference"),
        (lambda s: sl.Project(s, 3, error="drop"), "error must be 'keep', got 'drop'"),
        (lambda s: sl.Patch(s, OTHER, 64), "feature must be an int from 0 to 63"),
        (lambda s: sl.Steer(s, 3, rows=-1), "rows count the prompts from 0 and are never negative"),
        (lambda s: sl.Steer(s, 3, steps=[-1]), "steps count passes of generation, 0 is the prompt's and are never"),
    ],
)
def test_more_that_is_refused_when_made(make_edit, words, sae):
    with pytest.raises(ValueError, match=words):
        make_edit(sae)


def test_in_a_raw_trace(tiny_lm):
    """nnsight alone, with the function that an edit gives."""
    sae, ids, model = make(tiny_lm), tiny_lm.tokenize([PROMPT, "A fox"]).ids, tiny_lm._nn
    steer = sl.Steer(sae, firing(tiny_lm, sae), strength=2.0)
    here = steer.inside(tiny_lm, [PROMPT, "A fox"])
    with torch.no_grad(), model.trace(ids):
        model.model.layers[1].output = here(model.model.layers[1].output)
        logits = model.output.logits.save()
    assert torch.equal(logits, tiny_lm.logits([PROMPT, "A fox"], edits=[steer]))
    assert not torch.equal(logits, tiny_lm.logits([PROMPT, "A fox"]))
