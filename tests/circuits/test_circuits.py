"""Patching against the model run by hand; estimates by gradient against patches."""

import pytest
import torch

import sae_lab as sl
from sae_lab import circuits
from sae_lab.types import Site, Write
from tests.conftest import ARCHITECTURES
from tests.edits.test_edit import OTHER, PROMPT, make

SITE = Site("resid_post", 1)


def metric_of(lm, right=" the", wrong=" sea"):
    return circuits.logit_difference(lm, right, wrong)


def by_hand(lm, prompt, source, site, position):
    """The logit difference with one activation of the source's run, by a plain edit of the array."""
    given = lm.read(source, site)[site][0]
    batch = lm.tokenize(prompt)

    def write(x, tokens):
        x = x.clone()
        x[0, position] = given[position]
        return x

    logits = lm.run(batch, writes=[Write(site, write)])[1][0, -1]
    ids = [lm.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in (" the", " sea")]
    return float(logits[ids[0]] - logits[ids[1]])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_patching_against_patches_by_hand(name, tiny):
    lm = tiny[name]
    grid = circuits.patching(lm, [PROMPT], [OTHER], metric_of(lm))
    assert grid.values.shape == (3, lm.n_layers, 9) and grid.positions == list(range(1, 10))
    for i, j, p in ((0, 0, 2), (1, 1, 8), (2, 2, 5), (0, 2, 8)):
        raw = by_hand(lm, PROMPT, OTHER, Site(grid.kinds[i], grid.layers[j]), grid.positions[p])
        assert float(grid.values[i, j, p]) == pytest.approx((raw - grid.base) / (grid.source - grid.base), abs=2e-3)
    assert float(grid.values[0, -1, -1]) == pytest.approx(1.0, abs=1e-3)  # the last stream decides alone
    assert float(grid.values[0, -1, :-1].abs().max()) == pytest.approx(0.0, abs=1e-3)


def test_patching_many_prompts_is_the_mean_over_them(tiny_lm):
    prompts, sources = [PROMPT, OTHER], [OTHER, PROMPT]
    metric = circuits.logit_difference(tiny_lm, [" the", " sea"], [" sea", " the"])
    both = circuits.patching(tiny_lm, prompts, sources, metric, kinds=["attn_out"], layers=[1], positions=[3, 9])
    raw = both.values * (both.source - both.base) + both.base
    one = [
        circuits.patching(
            tiny_lm, [p], [s], circuits.logit_difference(tiny_lm, a, b), kinds=["attn_out"], layers=[1],
            positions=[3, 9],
        )
        for p, s, a, b in ((PROMPT, OTHER, " the", " sea"), (OTHER, PROMPT, " sea", " the"))
    ]  # fmt: skip
    alone = [g.values * (g.source - g.base) + g.base for g in one]
    assert torch.allclose(raw, (alone[0] + alone[1]) / 2, atol=1e-4)
    assert len(both.to_pandas()) == 2 and "strongest patches" in repr(both)
    assert both.tokens[0] == (tiny_lm.tokens(PROMPT)[3].label, tiny_lm.tokens(OTHER)[3].label)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("kind", ["resid_post", "attn_z", "mlp_out", "resid_mid"])
def test_gradients_against_differences(name, kind, tiny):
    lm, site = tiny[name], Site(kind, 1)
    batch, metric = lm.tokenize(PROMPT), metric_of(lm)
    x = lm.run(batch, [site], logits=False)[0][site]
    gradient = lm.gradient(batch, site, metric, x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-2 * float(x.norm() / direction.norm())

    def at(share):
        writes = [Write(site, lambda _, tokens: x + share * direction)]
        return float(metric(lm.run(batch, writes=writes)[1], batch))

    slope = (at(step) - at(-step)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.02, abs=1e-3)


@pytest.fixture(scope="module")
def attributed(make_tiny):
    lm = make_tiny("llama")
    sae = make(lm)
    return lm, sae, circuits.attribution(lm, sae, [PROMPT], [OTHER], metric_of(lm), steps=16, check=20)


def test_estimates_are_near_the_truth(attributed):
    """On a tiny model, whose logits bend little: estimates and patches agree closely; error nodes are among them."""
    _, _, result = attributed
    table = result.to_pandas()
    assert (table.feature == -1).sum() == 9 and len(table) > 20
    assert result.agreement()["pearson"] > 0.95 and result.agreement()["nodes"] == len(table)
    assert not table.truth.isna().any() and "integrated gradients, 16 steps" in repr(result)


def test_estimates_add_up(attributed):
    """Integrated gradients: what all nodes are said to do together is what the whole patch does."""
    lm, sae, result = attributed
    base = float(metric_of(lm)(lm.logits(PROMPT), lm.tokenize(PROMPT)))
    patched = lm.logits(PROMPT, edits=[sl.Patch(sae, OTHER, error="patch")])
    whole = float(metric_of(lm)(patched, lm.tokenize(PROMPT))) - base
    together = float(result.effects.sum() + result.error.sum())
    assert together == pytest.approx(whole, rel=0.05) and result.base == pytest.approx(base, abs=1e-4)


def test_a_true_effect_is_that_of_the_edit(attributed):
    lm, sae, result = attributed
    metric, batch = metric_of(lm), lm.tokenize(PROMPT)
    (position, feature), effect = next((node, e) for node, e in result.true_effects.items() if node[1] >= 0)
    edited = lm.logits(PROMPT, edits=[sl.Patch(sae, OTHER, feature, positions=[position])])
    assert effect == pytest.approx(float(metric(edited, batch)) - result.base, abs=1e-3)


def test_without_an_effect_the_table_is_empty():
    nothing = circuits.Attribution(torch.zeros(2, 4), torch.zeros(2), {}, 1.0, 1.0, 1)
    assert nothing.to_pandas().shape == (0, 5) and repr(nothing).endswith("truth") and "truth" in nothing._repr_html_()


def test_silent_nodes_have_no_effect(attributed):
    lm, sae, result = attributed
    z, theirs = (sae.encode(lm.read(p, SITE)[SITE][0]) for p in (PROMPT, OTHER))
    assert (result.effects[(z == 0) & (theirs == 0)] == 0).all() and (result.effects[0] == 0).all()


def test_pictures(tiny_lm, attributed):
    grid = circuits.patching(tiny_lm, [PROMPT], [OTHER], metric_of(tiny_lm), positions=[2, 9])
    figure = sl.plot(grid)
    maps = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in maps] == list(grid.kinds)
    for axis, values in zip(maps, grid.values, strict=True):
        assert torch.equal(torch.as_tensor(axis.images[0].get_array()), values)
    assert next(t.get_text() for t in maps[0].get_xticklabels()) == f"{grid.tokens[0][0]} ← {grid.tokens[0][1]}"
    (axis,) = sl.plot(attributed[2]).axes
    shown = sum(len(points.get_offsets()) for points in axis.collections)
    assert shown == len(attributed[2].true_effects)
    with pytest.raises(ValueError, match="at least three true effects"):
        circuits.attribution(tiny_lm, attributed[1], [PROMPT], [OTHER], metric_of(tiny_lm)).agreement()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda lm, sae, m: circuits.patching(lm, [PROMPT], ["A red fox"], m), r"prompt 0 has 10, source 0 has 4"),
        (lambda lm, sae, m: circuits.patching(lm, [PROMPT, "A"], [OTHER] * 2, m), "prompt 0 has 10, prompt 1 has 2"),
        (lambda lm, sae, m: circuits.patching(lm, [PROMPT], [OTHER, OTHER], m), "got 1 prompt and 2 sources"),
        (lambda lm, sae, m: circuits.patching(lm, [PROMPT], [OTHER], m, positions=[10]), "position 10 is beyond"),
        (lambda lm, sae, m: circuits.patching(lm, [PROMPT], [OTHER], lambda out, _: out), "one number for each row, 1"),
        (lambda lm, sae, m: circuits.patching(lm, [PROMPT], [OTHER], lambda out, _: 3.0), "this one gave float"),
        (lambda lm, sae, m: circuits.logit_difference(lm, " the old", " sea"), "an answer is one token"),
        (lambda lm, sae, m: circuits.attribution(lm, sae, [PROMPT], [OTHER], m, steps=0), "steps must be at least 1"),
        (
            lambda lm, sae, m: circuits.attribution(lm, sl.Transcoder(48, 64, d_out=48, k=3), [PROMPT], [OTHER], m),
            "attribution takes a coder that writes where it reads",
        ),
    ],
)
def test_refused(call, words, tiny_lm, attributed):
    with pytest.raises(ValueError, match=words):
        call(tiny_lm, attributed[1], metric_of(tiny_lm))
