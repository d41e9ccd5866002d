"""n patched directions against patches by hand; edges against what the model does."""

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab import circuits
from sae_lab.types import Site, Write
from tests.edits.test_edit import LONGER, OTHER, PROMPT, make

SITE = Site("resid_post", 1)
PROMPTS = [PROMPT, "The ship went down the road to the sea", "The boat went down the river to the sea", OTHER]
SOURCES = [OTHER, "The horse went down the road to the town", "The boat went up the river to the town", PROMPT]
ALL = 10_000


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


@pytest.fixture(scope="module")
def sae(lm):
    return make(lm)


@pytest.fixture(scope="module")
def pca(lm):
    reading = lm.read([PROMPT, LONGER, OTHER, *SOURCES], SITE)
    return circuits.principal_axes(reading[SITE][reading.mask & (reading.batch.positions > 0)])


@pytest.fixture(scope="module")
def curves(lm, sae, pca):
    return circuits.patched_directions(lm, sae, PROMPTS, SOURCES, bases={"PCA": pca}, numbers=[1, 4, 16, ALL])


def scored(seed=0):
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    return order[:2].sort().values.tolist(), order[2:].sort().values.tolist()


def both(lm, row):
    x, given = (lm.read(t, SITE)[SITE][0] for t in (PROMPTS[row], SOURCES[row]))
    return x, given


def kl_by_hand(lm, row, x):
    """KL(source ‖ patched) at the last token, x standing at the site in the prompt's run."""
    theirs = lm.logits(SOURCES[row])[0, -1].double().log_softmax(-1)
    batch = lm.tokenize(PROMPTS[row])
    ours = lm.run(batch, writes=[Write(SITE, lambda _, tokens: x[None])])[1][0, -1].double().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum())


def test_all_directions_of_a_basis_are_the_activation(curves, lm, sae):
    _, rows = scored()
    for i, row in enumerate(rows):
        x, given = both(lm, row)
        whole = given.clone()
        whole[0] = x[0]
        right = kl_by_hand(lm, row, whole)
        for name in ("PCA", "neurons", "random", "features and error"):
            assert curves.kl[name][i, -1] == pytest.approx(right, abs=1e-4, rel=1e-5), name
            assert curves.edit[name][i, -1] == pytest.approx(1.0, abs=1e-3)
        x_hat = x + sae(given).x_hat - sae(x).x_hat
        x_hat[0] = x[0]
        assert curves.kl["features"][i, -1] == pytest.approx(kl_by_hand(lm, row, x_hat), abs=1e-4, rel=1e-5)
        assert abs(curves.kl["features"][i, -1] - right) > 1e-3  # the error, which stays, matters here
    assert curves.numbers == [0, 1, 4, 16, ALL] and curves.ranked == 2


def test_none_is_the_prompt_or_the_error_alone(curves, lm, sae):
    _, rows = scored()
    for i, row in enumerate(rows):
        x, given = both(lm, row)
        for name in ("features", "PCA", "neurons", "random"):
            assert curves.kl[name][i, 0] == pytest.approx(kl_by_hand(lm, row, x), abs=1e-4, rel=1e-5)
        error = x + (given - sae(given).x_hat) - (x - sae(x).x_hat)
        error[0] = x[0]
        assert curves.kl["features and error"][i, 0] == pytest.approx(kl_by_hand(lm, row, error), abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("name", ["features", "neurons"])
def test_the_best_direction_is_that_of_the_ranking_half(curves, lm, sae, name):
    """Integrated gradients by hand, with torch's own gradient of the last norm and the unembedding left to lm."""
    ranking, rows = scored()
    directions = sae.W_dec.detach() if name == "features" else torch.eye(48)
    scores = torch.zeros(len(directions))
    for row in ranking:
        x, given = both(lm, row)
        batch, log_p = lm.tokenize(PROMPTS[row]), lm.logits(SOURCES[row])[:, -1].log_softmax(-1)
        code = sae.encode if name == "features" else lambda t: t
        change = (code(given) - code(x)).detach()
        change[0] = 0
        for share in (np.arange(8) + 0.5) / 8:
            between = x + float(share) * (given - x)
            between[0] = x[0]
            metric = lambda out, tokens, p=log_p: (p.exp() * (p - out[:, -1].log_softmax(-1))).sum(-1)  # noqa: E731
            scores -= (change * (lm.gradient(batch, SITE, metric, between[None])[0] @ directions.T)).sum(0)
    best = int(scores.argmax())
    for i, row in enumerate(rows):
        x, given = both(lm, row)
        code = sae.encode if name == "features" else lambda t: t
        change = (code(given) - code(x))[:, best, None] * directions[best]
        change[0] = 0
        assert curves.kl[name][i, 1] == pytest.approx(kl_by_hand(lm, row, x + change), abs=1e-3)


def test_each_position_on_its_own(lm, sae):
    each = circuits.patched_directions(lm, sae, PROMPTS, SOURCES, numbers=[1, ALL], each_position=True)
    whole = circuits.patched_directions(lm, sae, PROMPTS, SOURCES, numbers=[1, ALL])
    for name in each.kl:
        assert np.allclose(each.kl[name][:, -1], whole.kl[name][:, -1], atol=1e-4)
        assert each.directions[name] >= whole.directions[name]
    assert each.directions["neurons"] == 8 * 48 and whole.directions["neurons"] == 48  # all begin with "The"
    assert (each.edit["neurons"][:, 1] <= whole.edit["neurons"][:, 1] + 1e-6).any()


def test_positions(lm, sae):
    """Only the last position patched: a whole basis there is that position's activation."""
    some = circuits.patched_directions(lm, sae, PROMPTS, SOURCES, numbers=[ALL], positions=[9])
    for i, row in enumerate(scored()[1]):
        x, given = both(lm, row)
        x = torch.cat([x[:9], given[9:]])
        assert some.kl["random"][i, 1] == pytest.approx(kl_by_hand(lm, row, x), abs=1e-4, rel=1e-5)


def test_differences_span_the_ranking_half(lm, sae):
    """With both halves the same pairs, all axes of the differences together are the activation; else they are not."""
    same = circuits.patched_directions(lm, sae, PROMPTS[:1] * 4, SOURCES[:1] * 4, numbers=[ALL])
    assert np.allclose(same.kl["differences"][:, 1], same.kl["random"][:, 1], atol=1e-4)
    assert same.edit["differences"][:, 1] == pytest.approx(1, abs=1e-3) and same.directions["differences"] <= 9
    other = circuits.patched_directions(lm, sae, PROMPTS, SOURCES, numbers=[ALL])
    assert other.edit["differences"][:, 1].min() < 0.99  # the other pair was ranked on, turned round


def planted(n=3):
    kl = {"good": np.array([[4.0, 2.0, 1.0, 0.0]] * n), "bad": np.array([[4.0, 4.0, 2.0, 0.0]] * n)}
    kl["bad"][0, 1] = 1.0  # one prompt of three says the opposite
    edit = {name: np.array([[0.0, 0.25, 0.5, 1.0]] * n) for name in kl}
    return circuits.DirectionCurves(kl, edit, [0, 1, 2, 4], {"good": 4, "bad": 4}, SITE, 4)


def test_areas_by_hand():
    curves = planted()
    found = curves.area_difference("good", "bad")  # mean bad is 3, 2, 0 at n = 1, 2, 4, equal steps on a log axis
    assert found.value == pytest.approx((1.5 + 0.5) / 2 - (2.5 + 1.0) / 2)
    assert found.low < found.value < found.high and found.prompts == 3
    assert curves.area_difference("bad", "good").value == pytest.approx(-found.value)
    far = circuits.DirectionCurves(curves.kl, {"good": curves.edit["good"], "bad": curves.edit["bad"] + 2},
                                   [0, 1, 2, 4], {}, SITE, 4)  # fmt: skip
    assert np.isnan(far.area_difference("good", "bad", against="edit").value)
    same = curves.area_difference("good", "good")
    assert same.value == same.low == same.high == 0
    by_edit = curves.area_difference("good", "bad", against="edit").value  # 4 at 0 for both
    assert by_edit == pytest.approx((0.75 + 0.375 + 0.25) - (0.875 + 0.625 + 0.5), abs=1e-2)
    table = curves.to_pandas()
    assert len(table) == 8 and table[(table.method == "bad") & (table.n == 1)].kl.item() == 3.0
    assert "ranked on 4 others" in repr(curves) and "nats" in repr(found)


def test_principal_axes():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9, 1, 1, 4, 1]) + 5
    axes = circuits.principal_axes(x)
    assert torch.allclose(axes @ axes.T, torch.eye(6), atol=1e-5)
    assert float(axes[0, 1].abs()) > 0.99 and float(axes[1, 4].abs()) > 0.98
    assert circuits.principal_axes(x[:3], uncentred=True).shape == (3, 6)
    assert circuits.principal_axes(x[[0, 1, 1]]).shape == (1, 6)


REFUSED = [
    ({"prompts": PROMPTS[:3], "sources": SOURCES[:3]}, "at least 4, got 3"),
    ({"numbers": [0, 1]}, "numbers must be at least 1"),
    ({"steps": 0}, "steps must be at least 1"),
    ({"positions": [12]}, "position 12 is beyond"),
    ({"bases": {"random": torch.eye(48)}}, "'random' is measured anyway"),
    ({"bases": {"other": torch.eye(12)}}, "must be 'n d' with d=48"),
    ({"bases": {"other": 2 * torch.eye(48)}}, "must have orthonormal rows"),
    ({"coder": sl.Transcoder(48, 64, d_out=48, k=3)}, "writes where it reads"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_refused(change, words, lm, sae):
    given = {"coder": sae, "prompts": PROMPTS, "sources": SOURCES} | change
    with pytest.raises(ValueError, match=words):
        circuits.patched_directions(lm, **given)


def test_refused_by_results():
    with pytest.raises(ValueError, match="no method 'best' was measured"):
        planted().area_difference("good", "best")
    with pytest.raises(ValueError, match="'number' or 'edit'"):
        planted().area_difference("good", "bad", against="size")
    with pytest.raises(ValueError, match="at least two rows"):
        circuits.principal_axes(torch.ones(1, 4))
