"""A degenerate coder goes through every eval and gets the score it deserves. (Through sl.evals.report: test_report.py.)

The mean (no feature ever fires), the identity, PCA and random directions of ``sl.saes.baselines``; where it says more,
a coder whose features always fire alike ("constant"), or one that fires and writes zeros ("mute").
"""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab import geometry
from sae_lab.activations.contexts import spread_contexts
from sae_lab.activations.reconstructing import read_and_reconstruct, reconstruction
from sae_lab.evals.absorbing import absorption
from sae_lab.evals.agreement import consistency, transfer
from sae_lab.evals.choosing import choose_l0
from sae_lab.evals.codelength import description_length
from sae_lab.evals.composing import composition
from sae_lab.evals.concept_cones import cones
from sae_lab.evals.errors import NOISES, pathological_errors

# Activations of games as board_games reads them.
from sae_lab.evals.games import _read, board_games, othello_gpt
from sae_lab.evals.hesitation import uncertainty
from sae_lab.evals.injection import token_injection
from sae_lab.evals.known_parents import planted_absorption
from sae_lab.evals.monosemantic import monosemanticity
from sae_lab.evals.position_features import positional
from sae_lab.evals.positions import by_position, hill
from sae_lab.evals.probe_sets import read_probe_sets
from sae_lab.evals.probes import probing
from sae_lab.evals.stitches import stitching
from sae_lab.explain import explain
from sae_lab.explain.lens import lens_shape, token_features
from sae_lab.explain.prompts import evolve_prompts
from sae_lab.explain.selfexplain import self_explain
from sae_lab.types import Site
from sae_lab.worlds.boards import othello

SITE, EMBED = Site("resid_post", layer=1), Site("embed")
CONTEXT, TOKENS, D, K = 24, 300, 48, 8
FIRING = ("identity", "PCA", "random")  # those of the baselines that fire at all

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # what is undefined is so on purpose


def at(coder, site=SITE):
    coder.reads = coder.writes = (site,)
    coder.meta = {"context": CONTEXT}
    return coder.eval()


def baselines(x, site=SITE, k=K, d_sae=2 * D):
    return sl.saes.baselines(at(sl.TopK(x.shape[1], d_sae, k=k), site), x)


def constant(d, d_sae=32, site=SITE):
    """Every feature is 1 on every row."""
    coder = at(sl.L1(d, d_sae), site)
    with torch.no_grad():
        coder.W_enc.zero_()
        coder.b_enc.fill_(1.0)
    return coder


def mute(d, d_sae=32, site=SITE):
    """Features fire on half of all rows and write nothing; x_hat is zero."""
    coder = at(sl.L1(d, d_sae), site)
    with torch.no_grad():
        coder.W_dec.zero_()
        coder.b_dec.zero_()
    return coder


def fitted(lm, contexts):
    """Baselines fitted on the very tokens that evals of these contexts keep: then their scores are exact."""
    read = read_and_reconstruct(at(sl.TopK(D, 2 * D, k=K)), lm, contexts)
    return baselines(read.y[read.kept])


@pytest.fixture(scope="module")
def coders(tiny_lm, small_text):
    return fitted(tiny_lm, spread_contexts(tiny_lm, small_text, TOKENS, CONTEXT))


@pytest.fixture(scope="module")
def world():
    """Sparse sums of 16 directions that are the coordinates, so that the identity's rows are the true ones and their
    opposites."""
    made = sl.worlds.planted(n=16, d=16, l0=3, correlation=0.5, hierarchy=1, samples=4000)
    return dataclasses.replace(made, dictionary=torch.eye(16), x=made.codes.dense())


@pytest.fixture(scope="module")
def of_world(world):
    return baselines(world.x, k=3, d_sae=32)


# ---------------------------------------------------------------------------------------------- through the model


def test_reconstruction(repeater, repeated):
    coders = fitted(repeater, spread_contexts(repeater, repeated, TOKENS, CONTEXT))
    found = {name: reconstruction(c, repeater, repeated, TOKENS, CONTEXT) for name, c in coders.items()}
    mean, identity, pca, random = found.values()
    assert mean.fvu == pytest.approx(1, abs=1e-5) and mean.l0 == 0
    assert mean.ce_recovered == pytest.approx(0, abs=1e-3)  # its mean and the eval's differ in their last bits
    assert mean.ce_delta == pytest.approx(mean.ce_delta_mean_ablation, abs=1e-3)
    assert identity.fvu == identity.fvu_all_tokens == identity.ce_delta == identity.ce_delta_se == 0
    assert identity.ce_recovered == identity.ce_recovered_zero == 1 and identity.l0 == D
    assert pca.l0 == pytest.approx(K) and pca.fvu == pytest.approx(pca.pca_fvu, rel=1e-4)
    assert pca.ce_delta == pytest.approx(pca.pca_ce_delta, abs=1e-2)  # nats of 30
    assert random.pca_fvu < random.fvu < 1 and random.l0 == K  # at its best scale it explains something
    zeros = reconstruction(mute(D), repeater, repeated, TOKENS, CONTEXT)
    assert zeros.fvu >= 1 and zeros.ce_recovered_zero == pytest.approx(0, abs=1e-6)


def test_reconstruction_where_nothing_depends_on_what_is_kept(tiny_lm, small_text, coders):
    """Of two tokens the mask leaves out the first, and nothing is predicted from the second: no ablation costs."""
    found = reconstruction(coders["identity"], tiny_lm, small_text, 20, 2)
    assert found.ce_delta == found.ce_delta_mean_ablation == 0
    assert math.isnan(found.ce_recovered) and math.isnan(found.ce_recovered_zero)


def test_by_position(repeater, repeated):
    contexts = [c for c in spread_contexts(repeater, repeated, 2 * TOKENS, 48) if len(c.ids) == 48]
    found = {
        name: by_position(coder, repeater, repeated, 2 * TOKENS, 48)
        for name, coder in fitted(repeater, contexts).items()
    }
    mean, identity, pca, random = found.values()
    bins = len(mean.edges) - 1
    assert mean.fvu == pytest.approx((1,) * bins, abs=1e-5)
    assert mean.ce_recovered[2:] == pytest.approx((0,) * (bins - 2), abs=1e-2)  # few tokens stand in the second
    assert identity.fvu == identity.ce_delta == (0,) * bins and identity.ce_recovered[2:] == (1,) * (bins - 2)
    assert identity.rise == identity.fvu_rise == 0 and mean.fvu_rise == pytest.approx(0, abs=1e-5)
    assert all(math.isnan(r.ce_recovered[0]) for r in found.values()), "token 1 is predicted from a left-out one"
    assert pca.fvu == pytest.approx(pca.pca_fvu, rel=1e-3)
    assert all(p < r < 1 for p, r in zip(random.pca_fvu[3:], random.fvu[3:], strict=True))  # bins of 6 and more


def test_hill(tiny_lm, small_text, coders):
    """A curve through coders that all recover alike has no L0 at half: not the L0 at which the search stopped."""
    for recovered in (0.0, 1.0, 0.4):
        flat = hill([(k, recovered) for k in (4, 8, 16, 32)])
        assert all(math.isnan(v) for v in (flat.half_l0, flat.half_l0_se, flat.slope, flat.slope_se))
        assert math.isnan(flat.lost_at(8)) and "undefined" in repr(flat)
    mean = reconstruction(coders["mean"], tiny_lm, small_text, TOKENS, CONTEXT)
    with pytest.raises(ValueError, match=r"needs L0 above 0 and numbers for CE recovered, got \(0\.0, .*: leave it"):
        hill([mean, (8, 0.5), (16, 0.9)])
    with pytest.raises(ValueError, match=r"got \(8, nan\): leave it out"):
        hill([(4, 0.2), (8, math.nan), (16, 0.9)])


def test_pathological_errors(tiny_lm, small_text, coders):
    found = {name: pathological_errors(c, tiny_lm, small_text, TOKENS, CONTEXT) for name, c in coders.items()}
    mean, identity, pca, random = found.values()
    assert identity.kl == identity.relative_error == 0 and identity.cosine_xhat == pytest.approx(1)
    assert all(math.isnan(identity.ratio[name]) for name in NOISES), "no error is like noise of no length"
    assert "undefined" in repr(identity)
    # What is lost is in this order, and so is the harm; measured: 10.3, 11.2 and 20.5 nats.
    assert pca.relative_error < random.relative_error < mean.relative_error
    assert 0 < pca.kl <= random.kl < mean.kl
    assert all(math.isfinite(one.ratio[name]) for one in (mean, pca, random) for name in NOISES)
    # Another token's error takes every x away from where it is; the mean's takes all to one place, and is no noise.
    assert mean.ratio["shuffled"] > mean.low["shuffled"] > 1


def test_transfer(tiny_lm, make_tiny, small_text, coders):
    found = {
        name: transfer(c, tiny_lm, small_text, other_text=small_text.held_out, tokens=TOKENS)
        for name, c in coders.items()
    }
    mean, identity, pca, random = found.values()
    # FVU of another text's mean is 1 + the squared distance of both means over the variance.
    assert mean.at_home.fvu == pytest.approx(1, abs=1e-5) and mean.elsewhere.fvu > 1
    assert identity.at_home.fvu == identity.elsewhere.fvu == identity.ce_difference == 0
    assert pca.at_home.fvu == pytest.approx(pca.at_home.pca_fvu, rel=1e-4)
    assert pca.elsewhere.fvu > pca.elsewhere.pca_fvu  # fitted anew, PCA is the best there is
    assert all(r.pca_fvu < r.fvu < 1 for r in (random.at_home, random.elsewhere))
    other = transfer(coders["identity"], tiny_lm, small_text, other_lm=make_tiny("llama", seed=1), tokens=TOKENS)
    assert other.paired and other.ce_difference == other.ce_difference_se == 0


# ---------------------------------------------------------------------------------------------- labelled texts


def two_kinds(n, seed):
    draw = np.random.default_rng(seed)
    words = [["river", "mountain", "forest", "valley", "stone"], ["market", "price", "trade", "money", "bank"]]
    labels = np.arange(n) % 2
    return [" ".join(draw.choice(words[label], 6)) + f" {i}" for i, label in enumerate(labels)], labels


@pytest.fixture(scope="module")
def labelled(tiny_lm):
    """(texts of two vocabularies, the same with labels that know nothing of them, coders of their tokens)."""
    real = {"a": two_kinds(60, 0), "b": two_kinds(80, 1)}
    draw = np.random.default_rng(2)
    noise = {name: (texts, draw.permutation(labels)) for name, (texts, labels) in real.items()}
    read = [read_probe_sets(tiny_lm, SITE, sets, examples=80, tokens=12) for sets in (real, noise)]
    return *read, baselines(torch.cat([one.x for one in read[0].sets]).float())


def test_probing(tiny_lm, labelled):
    real, noise, coders = labelled
    for convention in ("sae_lab", "saebench"):
        mean = probing(coders["mean"], tiny_lm, real, k=(1,), shuffles=1, convention=convention)
        for what in ("accuracy", "auroc", "shuffled_accuracy", "shuffled_auroc"):
            assert mean.mean("features", 1, what) == (0.5, 0)
    with pytest.raises(ValueError, match="k must be integers from 1 to d_sae=2, got 5"):
        probing(coders["mean"], tiny_lm, real, k=(5,))
    for name in FIRING:
        found = probing(coders[name], tiny_lm, real, k=(5,), shuffles=0)
        # Two vocabularies are easily told apart; the identity's features are the neurons' halves. Measured: 1.00, all.
        assert found.mean("features", 5)[0] > 0.8 and abs(found.gain("neurons", 5)[0]) < 0.2
        # 28 test texts: a standard error of .09 by chance, and .25 is nearly three.
        found = probing(coders[name], tiny_lm, noise, k=(5,), shuffles=0)
        assert found.mean("features", 5)[0] == pytest.approx(0.5, abs=0.25)


@pytest.fixture(scope="module")
def spelling_lm(make_tiny):
    """A model whose embedding of a word is the coordinate of its first letter, and a little noise."""
    lm = make_tiny("llama", seed=7)
    table = 0.05 * torch.randn(len(lm.tokenizer), D, generator=torch.Generator().manual_seed(0))
    for i, token in enumerate(lm.tokenizer.convert_ids_to_tokens(list(range(len(lm.tokenizer))))):
        if token[0] == "Ġ" and token[1:2].isascii() and token[1:2].islower():
            table[i, ord(token[1]) - ord("a")] = 1
    with torch.no_grad():
        lm._module.get_input_embeddings().weight.copy_(table)
    return lm


def test_absorption(spelling_lm):
    made = baselines(spelling_lm.embedding(torch.arange(1000, 20_000)).float(), EMBED, k=2)
    found = {name: absorption(c, spelling_lm, words=1600) for name, c in made.items()}
    mean, identity, pca, random = found.values()
    # Nothing is absorbed where nothing fires; that this is no merit say the silence and the F1 of its best feature.
    assert mean.rate == mean.rate_control == mean.k1_f1 == mean.main_features == 0 and mean.silent == 1
    assert identity.k1_f1 > 0.95 and identity.main_features == 1 and identity.silent == identity.rate == 0
    # Two components are four features for more than twenty letters: few letters have one.
    assert pca.k1_f1 < 0.4 and pca.main_features < 1 and pca.silent > 0.5
    assert random.k1_f1 < identity.k1_f1 and random.rate <= random.rate_control + 0.05
    assert all(one.probe_f1 > 0.95 and one.defined > 20 for one in found.values())


def answerable(lm, n=40):
    """(prompts, answers): every second answer is what the model says, whatever the prompt; the others it never says."""
    draw = np.random.default_rng(0)
    words = [" apple", " house", " river", " stone", " light", " paper", " green", " music", " seven", " north"]
    found = []
    for i in range(n):
        prompt = "".join(draw.choice(words, 6))
        likely = lm.logits(prompt)[0, -1].argsort(descending=True).tolist()
        whole = lm.tokenize(prompt).ids[0].tolist()
        for token in likely[:1] if i % 2 == 0 else likely[400:500]:
            answer = lm.tokenizer.decode([token])
            if lm.tokenize(prompt + answer).ids[0].tolist() == [*whole, token]:
                found.append((prompt, answer))
                break
    return zip(*found, strict=True)


def test_uncertainty(tiny_lm, coders):
    """Right and wrong answers take turns, so that nothing at the prompt's last token knows which it will be."""
    prompts, answers = answerable(tiny_lm)
    settings: dict[str, Any] = {"suppress": 0, "splits": 6}
    with pytest.raises(ValueError, match="three features must fire on 5 questions or more, got 0"):
        uncertainty(coders["mean"], tiny_lm, prompts, answers, **settings)
    alike = uncertainty(constant(D), tiny_lm, prompts, answers, **settings)
    assert alike.auroc == alike.auroc_within == 0.5 and alike.live == 32 and not any(alike.features.values())
    for name in FIRING:
        found = uncertainty(coders[name], tiny_lm, prompts, answers, **settings)
        # Two halves of 10 right and 10 wrong answers: standard errors of about .1 (printed), and .3 is three.
        assert found.auroc == pytest.approx(0.5, abs=0.3) and found.auroc_shuffled == pytest.approx(0.5, abs=0.3)
        # Of up to 96 features .3 % have |t| > 3 by chance.
        assert found.pure_uncertainty + found.pure_incorrectness + found.confounded <= 3


# ---------------------------------------------------------------------------------------------- dictionaries


def test_composition(world, of_world):
    for coder, rows in ((of_world["mean"], 2), (mute(16), 32)):
        with pytest.raises(ValueError, match=f"needs a decoder row that is not zero, all {rows} are: leave it out"):
            composition(coder, world)
    identity = composition(of_world["identity"], world)
    # Of a pair of rows one is a true direction and the other its opposite, which no direction explains. The opposites
    # never fire on codes, so they are dead; x has no negative coordinate.
    assert (identity.single, identity.composed, identity.neither) == (1, 0, 0)
    assert identity.rows == identity.dead == 16
    random = composition(of_world["random"], world)
    # Standard error of 32 rows: at most .09.
    assert random.neither > 0.7 and random.composed == pytest.approx(random.composed_random, abs=0.2)
    pca = composition(of_world["PCA"], world)
    assert pca.rows <= 6 and pca.single + pca.composed + pca.neither == pytest.approx(1)


def test_planted_absorption(world, of_world):
    with pytest.raises(ValueError, match="a has no direction to match: all rows are zero"):
        planted_absorption(of_world["mean"], world)
    identity = planted_absorption(of_world["identity"], world)
    assert (identity.recall_alone, identity.recall_given, identity.gap, identity.leak) == (1, 1, 0, 0)
    assert identity.matched_cosine == 1
    pca, random = (planted_absorption(of_world[name], world) for name in ("PCA", "random"))
    # A parent without a feature of its own is never recalled; three components have six rows for eight parents.
    assert pca.recall_alone < 1 and pca.matched_cosine < 0.95
    # A parent's own children silence a random direction no more than those of others do.
    assert random.matched_cosine < 0.8 and random.gap < random.gap_foreign + 0.2 and random.recall_alone < 0.9


def test_stitching(world, of_world):
    for small in of_world.values():
        with pytest.raises(ValueError, match="no feature of the large coder fires on these 4000 rows"):
            stitching(small, of_world["mean"], world.x)
    for name in FIRING:
        coder = of_world[name]
        same = stitching(coder, coder, world.x)
        assert same.novel == 0 and math.isnan(same.novel_help) and same.swap_help == 1
        assert same.fvu_small == same.fvu_novel == same.fvu_large
        # What reconstructs all lacks nothing: any feature beside it raises the error.
        whole = stitching(of_world["identity"], coder, world.x)
        assert whole.fvu_small == 0 and not whole.novel_help > 0 and not whole.known_hurt < 1
        # What knows the mean only lacks every feature.
        empty = stitching(of_world["mean"], coder, world.x)
        assert empty.novel == 1 and empty.fvu_small == pytest.approx(1, abs=1e-5) and empty.known_hurt != 1
    for name in ("PCA", "random"):  # they write beside the same mean
        empty = stitching(of_world["mean"], of_world[name], world.x)
        assert empty.novel_help == 1 and empty.fvu_novel == pytest.approx(empty.fvu_large, rel=1e-4)


def test_consistency(world, of_world):
    for name in FIRING:
        [pair] = consistency(of_world[name], of_world[name], x=world.x).pairs
        assert pair.stability == pytest.approx(1) and pair.shared == 1 and pair.orderedness == pytest.approx(1)
        assert pair.agreement == pytest.approx(1, abs=1e-5)
        with pytest.raises(ValueError, match="b has no direction to match: all rows are zero"):
            consistency(of_world[name], of_world["mean"], x=world.x)
    # Directions that have nothing to do with each other match as random rows do; 32 cosines of about .2 spread.
    [pair] = consistency(of_world["identity"], of_world["random"], x=world.x).pairs
    assert pair.stability == pytest.approx(pair.stability_random, abs=0.15)
    silent = constant(16)
    [pair] = consistency(silent, silent, x=world.x).pairs
    assert math.isnan(pair.agreement) and pair.compared == 0, "what never varies has no correlation"


def test_choose_l0(world, of_world):
    identity, random, pca = (of_world[name] for name in ("identity", "random", "PCA"))
    found = choose_l0([identity, random], world.x)
    where = {id(c): i for i, c in enumerate(found.coders)}
    # Of the 2d(2d − 1)/2 pairs of rows the d opposites have |cos| 1, all others 0.
    assert found.c_dec[where[id(identity)]] == pytest.approx(1 / 31) and found.fvu[where[id(identity)]] == 0
    # 496 cosines, each of standard deviation .15: a standard error of .007.
    assert found.c_dec[where[id(random)]] == pytest.approx(found.c_dec_random, abs=0.03)
    pairs = choose_l0([pca, pca], world.x)
    assert pairs.c_dec == pytest.approx((1 / (pca.d_sae - 1),) * 2) and 0 < pairs.fvu[0] < 1
    # A decoder of zeros would have the least c_dec there can be, and be the one that is chosen.
    for pair in ([of_world["mean"]] * 2, [identity, mute(16)]):
        with pytest.raises(ValueError, match=r"L1\(.*\) has fewer than two not 0: leave it out"):
            choose_l0(pair, world.x)


def test_cones(world, of_world):
    axes = torch.eye(16)
    for coder in (of_world["mean"], mute(16)):
        nothing = cones(coder, axes, world.x)
        for values in (nothing.r2, nothing.held_out, nothing.r2_random, nothing.held_out_random):
            assert values == (0,) * len(nothing.sizes)
        assert all(math.isnan(r) for r in nothing.correlation)
    identity = cones(of_world["identity"], axes, world.x)
    assert identity.r2 == pytest.approx((1,) * 4) and identity.held_out == pytest.approx((1,) * 4, abs=1e-5)
    assert identity.correlation[0] == pytest.approx(1, abs=1e-5) and identity.r2_random[0] < 0.5
    # Of any other direction m coordinates explain the m largest squares.
    other = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    squares = torch.nn.functional.normalize(other, dim=1).square().sort(descending=True).values.cumsum(1)
    found = cones(of_world["identity"], other)
    assert found.r2 == pytest.approx([float(squares[:, m - 1].mean()) for m in found.sizes], abs=1e-5)
    inside = of_world["PCA"].W_dec.detach()[:3]
    outside = axes - axes @ inside.T @ inside
    assert cones(of_world["PCA"], inside).r2[0] == pytest.approx(1, abs=1e-5)
    assert max(cones(of_world["PCA"], outside[:4]).r2) == pytest.approx(0, abs=1e-5)
    # Axes are to random rows what random directions are: 16 values of standard deviation .15, and 64.
    random = cones(of_world["random"], axes)
    assert random.r2[0] == pytest.approx(random.r2_random[0], abs=0.17)


# ---------------------------------------------------------------------------------------------- codes


def test_description_length():
    # On Gaussian rows every coordinate is positive half of the time, which takes a bit to say.
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    made = baselines(x, k=3, d_sae=32)
    found = description_length([*made.values(), constant(16), mute(16)], x)
    mean, identity, pca, random, always, silent = found.bits
    assert mean == pytest.approx(found.dense, rel=1e-4) and found.which[0] == found.values[0] == 0
    assert found.fvu[1] == 0 and found.which[1] == pytest.approx(32, rel=1e-2)
    assert min(identity, pca, random) > found.dense and found.behind[0] == pytest.approx(0, abs=0.01)
    assert "no coder is shorter than the dense code" in repr(found)
    # Three components hold the variance of three coordinates; three random directions chosen anew for each row, more.
    assert found.fvu[2] == pytest.approx(13 / 16, rel=0.05) and found.fvu[3] < found.fvu[2]
    assert always == pytest.approx(found.dense, rel=1e-4), "what is always the same costs nothing, and says nothing"
    assert silent > found.dense, "that it fires is paid for, and helps nobody"
    assert found.residual[5] == pytest.approx(found.dense, rel=1e-4)


def test_monosemanticity(world, of_world):
    with pytest.raises(ValueError, match="no feature fires on 10 of these 4000 rows: give more tokens, or lower least"):
        monosemanticity(of_world["mean"], world.x)
    with pytest.raises(ValueError, match="no feature fires on 10 of these 4000 rows and varies"):
        monosemanticity(constant(16), world.x)
    x = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))
    unrelated = torch.randn(3000, 8, generator=torch.Generator().manual_seed(1))
    made = baselines(x, k=3, d_sae=32)
    identity = monosemanticity(made["identity"], x)
    assert identity.score == pytest.approx(identity.neurons) and identity.p_neurons == pytest.approx(0.5, abs=0.01)
    # Where all directions are alike no coder's are better: random ones score what random ones of equal sparsity do.
    assert identity.score == pytest.approx(identity.random, abs=0.02)
    assert monosemanticity(made["random"], x).score < monosemanticity(made["random"], x).random + 0.02
    for name in FIRING:  # measured: at most .002, two or three standard errors
        assert monosemanticity(made[name], x, unrelated).score == pytest.approx(0, abs=0.01)


def test_positional(tiny_lm, small_text):
    """Embeddings of this model know the token and not where it stands."""
    ids = torch.tensor([i for c in spread_contexts(tiny_lm, small_text, 1000, CONTEXT) for i in c.ids])
    made = baselines(tiny_lm.embedding(ids).float(), EMBED)
    settings = {"tokens": 2000, "bins": 8, "context": CONTEXT}
    with pytest.raises(ValueError, match=r"no feature fires on min_firings=30 of 1,\d+ tokens: read more, or lower it"):
        positional(made["mean"], tiny_lm, small_text, **settings)
    with pytest.raises(ValueError, match=r"no feature fires on min_firings=30 of 1,\d+ tokens and varies"):
        positional(constant(D, site=EMBED), tiny_lm, small_text, **settings)
    for name in FIRING:
        found = positional(made[name], tiny_lm, small_text, **settings)
        # The text itself begins in its own way: measured up to 1.6 times what rotated positions have.
        assert found.strong == 0 and found.mean < 3 * found.mean_shuffled


# ---------------------------------------------------------------------------------------------- an index of tokens


@pytest.fixture(scope="module")
def indexed(tiny_lm, small_text, tmp_path_factory):
    """Coders at the embeddings, where every feature is one of the token alone, and their indexes."""
    folder = tmp_path_factory.mktemp("degenerate")
    store = sl.harvest(tiny_lm, EMBED, small_text, tokens=3000, path=folder / "store", context=32)
    made = baselines(store.rows(np.arange(len(store)), "embed").float(), EMBED, k=4)
    return made, {name: sl.index_features(c, tiny_lm, store, path=folder / name) for name, c in made.items()}


def test_token_injection(tiny_lm, small_text, indexed):
    made, indexes = indexed

    def inject(name, length):
        settings = {"texts": 20, "length": length}
        return token_injection(made[name], tiny_lm, indexes[name], [0, 1], small_text.held_out, **settings)

    with pytest.raises(ValueError, match="feature 0 never fires in the index's store, so it has no top tokens"):
        inject("mean", 2)
    with pytest.raises(ValueError, match="no text leaves feature 0 off: give other text, or a feature that fires less"):
        inject("identity", 24)
    for name in FIRING:  # two tokens leave even the identity's features off now and then
        found = inject(name, 2)
        assert found.activated == found.mean_rate == 1, "a function of the token is activated by its tokens"
    assert inject("random", 2).mean_rate_random < 0.5  # it fires on a twentieth of tokens: some .1 of three


def test_explain(indexed):
    _, indexes = indexed
    with pytest.raises(ValueError, match="a number from 1 to the 0 live ones, got 2"):
        explain(indexes["mean"], 2)
    silent = "it is silent in fewer than two contexts"  # what fires in every passage cannot be detected
    reasons = {"mean": "it fires in fewer than two contexts", "identity": silent, "PCA": silent}
    for name, reason in reasons.items():
        found = explain(indexes[name], [0], measures=["detection"], resume=False)
        assert len(found.failed) == 1 and all(row.failure.startswith(reason) for row in found.rows)
        assert all(math.isnan(row.score.detection) for row in found.rows) and math.isnan(found.figures()[0].value)
    random = explain(indexes["random"], 4, measures=["detection"], resume=False)
    own, other = random.values("detection")
    # Their tokens are some of many: better than another's explanation, which is at chance, and far from 1.
    assert 0.5 < own.mean() < 0.9 and other.mean() == pytest.approx(0.5, abs=0.15)


def test_token_features(tiny_lm, small_text, indexed):
    made, indexes = indexed
    assert token_features(made["mean"], tiny_lm, indexes["mean"]) == {}
    assert token_features(made["mean"], tiny_lm, small_text[:3]) == {}
    for name in ("identity", "random"):  # measured: 3 and 1 of 96, of the commonest words
        assert len(token_features(made[name], tiny_lm, small_text[:3])) < 0.1 * made[name].d_sae


def test_evolve_prompts(tiny_lm, small_text, indexed):
    """Of features of the token alone the best prompt is at least the corpus' best token, and at most any."""
    made, _ = indexed
    settings = {"length": 4, "generations": 4, "children": 12, "population": 4, "ce_weight": 0.0}
    with pytest.raises(ValueError, match="feature 0 never fires in the source: choose live features"):
        evolve_prompts(made["mean"], tiny_lm, small_text[:3], [0], **settings)
    table = tiny_lm._module.get_input_embeddings().weight.detach()
    for name in FIRING:
        found = evolve_prompts(made[name], tiny_lm, small_text[:3], [0], **settings)
        most = float(made[name].encode(table)[:, 0].detach().max())
        assert found.corpus_max[0] * (1 - 1e-5) <= found.activation[0] <= most * (1 + 1e-5)


# ---------------------------------------------------------------------------------------------- directions in the model


def test_lens_shape(tiny_lm, coders):
    """The unembedding is random, so that no direction's logits are anything but noise."""
    first = tiny_lm.vocabulary[2].strip()  # a direction of zeros has only ties, of which the first tokens come first
    nothing = lens_shape(coders["mean"], tiny_lm, words={0: first, 1: "river"})
    assert nothing.promoted == ((), ()) and nothing.hits == nothing.input_hits == (False, False)
    assert all(math.isnan(v) for v in (*nothing.kurtosis, *nothing.skew)) and nothing.hit_rate == 0
    for name in FIRING:
        found = lens_shape(coders[name], tiny_lm, words={0: "river", 1: "bank"})
        sharp = np.mean(np.array(found.kurtosis) > found.noise)
        assert sharp < 0.1 and found.hit_rate == 0  # 1 % by definition: of 96 at most 9, of 16 at most one
        assert np.mean(found.kurtosis) == pytest.approx(float(found.random_kurtosis.mean()), abs=0.02)


def test_self_explain(tiny_lm, coders):
    settings = {"tokens": 2, "controls": 2, "scales": (1.0, 4.0)}
    nothing = self_explain(coders["mean"], tiny_lm, [0, 1], {0: "river", 1: "bank"}, **settings)
    assert nothing.similarity == (0, 0) and nothing.hit_rate == 0 and len(set(nothing.texts)) == 1
    for name in ("identity", "random"):
        found = self_explain(coders[name], tiny_lm, range(12), **settings)
        # Cosines in 48 dimensions have a deviation of .14, and .2 is more than four standard errors of twelve.
        assert np.mean(found.similarity) == pytest.approx(np.mean(found.random_similarity), abs=0.2)


# ---------------------------------------------------------------------------------------------- geometry


def test_clusters(coders):
    for what in (coders["mean"], coders["mean"].sparse_codes(torch.randn(50, D)), mute(D)):
        with pytest.raises(ValueError, match="need at least 20 rows that are not zero, got 0: give more features"):
            geometry.clusters(what)
    # All rows are at right angles or opposite. A shuffle of such coordinates leaves rows of zeros, which are nowhere.
    for name in ("identity", "PCA"):
        assert geometry.clusters(coders[name], min_cluster_size=3).tight == 0
    random = geometry.clusters(coders["random"])
    # Measured: 6 clusters and 6 in random rows, none of them tight.
    assert abs(random.n - random.controls[0].clusters) <= 4 and random.tight <= 2


def test_circular(tiny_lm, coders):
    with pytest.raises(ValueError, match="0 features tell these words apart in too few ways"):
        geometry.circular(coders["mean"], tiny_lm, draws=0)
    for name in ("identity", "PCA"):  # their features fire everywhere, so none is the words' own
        with pytest.raises(ValueError, match="0 features tell these words apart"):
            geometry.circular(coders[name], tiny_lm, draws=0)
    with pytest.raises(ValueError, match="2 features tell these words apart in too few ways"):
        geometry.circular(coders["mean"], tiny_lm, features=[0, 1], draws=0)
    identity = geometry.circular(coders["identity"], tiny_lm, features=range(2 * D), draws=0)
    assert (identity.adjacent, identity.p) == (identity.raw_adjacent, identity.raw_p)
    assert torch.allclose(identity.points.abs(), identity.raw_points.abs(), atol=1e-4)  # axes have no sign
    for name in ("PCA", "random"):  # a random model knows no weekdays
        found = geometry.circular(coders[name], tiny_lm, features=range(coders[name].d_sae), draws=0)
        assert found.p > 0.02 and found.adjacent < 7


def test_patterns():
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    made = baselines(x, k=4, d_sae=32)
    for silent in (made["mean"], constant(16)):
        with pytest.raises(ValueError, match="features that vary over contexts, two of each at least: got 0 that vary"):
            geometry.patterns(silent.sparse_codes(x))
    # Independent coordinates have no pattern but that relu(x) is off where relu(−x) is on: one for each of them, of
    # strength 1 + 1/(π − 1) in units of a feature's variance (the strongest of 16 is some .15 above).
    identity = geometry.patterns(made["identity"].sparse_codes(x), looked=20)
    pca = geometry.patterns(made["PCA"].sparse_codes(x), looked=6)
    assert identity.rank == 16 and pca.rank == 4
    assert float(identity.strength[0]) ** 2 / 4000 == pytest.approx(1 + 1 / (math.pi - 1), rel=0.15)
    random = geometry.patterns(made["random"].sparse_codes(x), looked=20)
    assert random.rank <= 16, "there are no more dimensions than these"


# ---------------------------------------------------------------------------------------------- boards


def test_board_games():
    gpt, games = othello_gpt(), othello(6, games=40, seed=1)
    read = _read(gpt, [SITE], games, gpt.mask())
    made = baselines(read.acts[SITE], k=8, d_sae=256)
    found = {name: board_games(c, gpt, games) for name, c in made.items()}
    mean, identity, pca, random = found.values()
    assert mean.coder.features == mean.coverage == mean.coder.legal == mean.above == mean.reconstruction == 0
    always = board_games(constant(128), gpt, games)
    assert always.coverage == pytest.approx(always.always) and always.above == 0 and always.reconstruction == 0
    # The identity is the coordinates of either sign, which are a control; measured: .54 and .55, .14 and .10.
    basis = identity.controls["basis"]
    assert identity.coverage == pytest.approx(basis.coverage, abs=0.1) and identity.coder.features == 256
    assert identity.reconstruction == pytest.approx(basis.reconstruction, abs=0.15)
    for one in (identity, pca, random):  # the activations hold the board, directions that nobody sought hide it
        assert one.coverage < one.controls["probe"].coverage - 0.1 and one.above == 0
        assert one.reconstruction < one.controls["probe"].reconstruction - 0.3
    # What these tell is how far the game has gone, which other games' boards have too; errors are .02.
    for one in (pca, random):
        assert one.coverage == pytest.approx(one.controls["shuffled"].coverage, abs=0.1)
    assert random.coverage < random.always
