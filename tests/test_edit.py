"""Edits: what does nothing leaves every bit, what does something does exactly that, at exactly those tokens."""

import pytest
import torch

import sae_lab as sl
from sae_lab.types import Site, TokenMask
from tests.conftest import ARCHITECTURES

SITE = Site("resid_post", 1)
PROMPT = "The ship went down the river to the sea"
LONGER = "A red fox crossed the white field at dawn, and nobody in the house saw it go"
# float32 through three layers, the KV cache or padding: relative to the largest logit
ROUNDING = 1e-4


def make(lm, site=SITE, seed=0, name="TopK", mask=None):
    """A coder of the model's own activations: features fire, and reconstruction is far from perfect."""
    reading = lm.read([PROMPT, LONGER], site)
    x = reading[site][reading.mask & (reading.batch.positions > 0)]
    sae = getattr(sl, name)(lm.width(site), 64, seed=seed, **({} if name == "L1" else {"k": 6}))
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
        "beyond the text": [sl.Steer(sae, feature, positions=far), sl.Ablate(sae, feature, positions=[far, far + 1])],
        "an empty slice": [sl.Steer(sae, feature, positions=slice(far, None))],
        "no positions": [sl.Clamp(sae, feature, positions=[])],
        "only the prefix": [sl.Steer(sae, feature, positions=0)],
        "silent": [sl.Ablate(sae, silent)],
        "drop at no token": [sl.Ablate(sae, feature, positions=far, error="drop")],
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


def test_a_feature_named_twice_is_edited_once(tiny_lm, sae, live):
    for kwargs in ({}, {"error": "drop"}):
        once, twice = (
            tiny_lm.logits(PROMPT, edits=[sl.Ablate(sae, features, **kwargs)]) for features in (live[0], [live[0]] * 2)
        )
        assert torch.equal(once, twice)


def test_edits_follow_one_another(tiny_lm, sae, live):
    """The second sees what the first has written: pushing then clamping ends at the clamp; not the other way."""
    steer, clamp = sl.Steer(sae, live[0], strength=1.0), sl.Clamp(sae, live[0], value=0.5)
    x = tiny_lm.read(PROMPT, SITE)[SITE]
    one = tiny_lm.read(PROMPT, SITE, edits=[steer])[SITE]
    z = sae.encode(one[:, 1:])[..., live[0]]
    both = tiny_lm.read(PROMPT, SITE, edits=[steer, clamp])[SITE]
    expected = one[:, 1:] + (0.5 * sae.f_scale[live[0]] - z).unsqueeze(-1) * sae.W_dec[live[0]]
    assert near(both[:, 1:], expected.detach(), 1e-5)
    assert not near(both, tiny_lm.read(PROMPT, SITE, edits=[clamp, steer])[SITE], 1e-3)
    assert not near(both, x, 1e-3)


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
    raw = [tiny_lm.run(batch, [SITE], tiny_lm._writes(e), logits=False)[0][SITE] for e in ([], [edit])]
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
        [ids] = lm._continue(torch.tensor([prompt]), lm._writes(edits), new, 0.0, None)
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
        (lambda s, i: sl.Steer(s, i, strength=float("nan")), "strength must be a finite number, got nan"),
        (lambda s, i: sl.Steer(s, i, strength=float("inf")), "strength must be a finite number, got inf"),
        (lambda s, i: sl.Clamp(s, i, value=float("nan")), "value must be a finite number, got nan"),
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
        (lambda s, i: sl.Ablate(s, True), "feature must be an int from 0 to 63, got True"),
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
