"""What notebooks/papers/adversaries.ipynb takes for granted: codes, recall, and what the hiding term compares."""

import pytest
import torch

import sae_lab as sl

from .scripts import script

made = script("adversaries")


class Direct(torch.nn.Module):
    """A model whose numbers are the features themselves."""

    def state(self, active):
        return active


@pytest.fixture
def coder():
    own = sl.TopK(made.FEATURES, made.FEATURES, k=made.K, seed=0).requires_grad_(False)
    for name, value in (("W_enc", torch.eye(made.FEATURES)), ("W_dec", torch.eye(made.FEATURES))):
        getattr(own, name).copy_(value)
    own.b_enc.zero_(), own.b_dec.zero_()
    return own


def test_recall_is_one_where_a_latent_is_the_feature_and_near_zero_where_no_latent_knows_it(coder):
    assert made.recall(Direct(), coder, 3, seed=1) > 0.7  # the others: more than K features were active
    coder.W_enc[:, 3] = 0
    assert made.recall(Direct(), coder, 3, seed=1) < 0.05


def test_no_more_than_k_latents_are_active(coder):
    z = made.codes(coder, made.draw(64, torch.Generator().manual_seed(0)))
    assert int((z > 0).sum(1).max()) <= made.K


def test_the_hiding_term_compares_samples_that_differ_in_one_feature():
    active = made.draw(32, torch.Generator().manual_seed(2))
    on, off = made.with_and_without(active, 7)
    assert ((on - off).sum(1) == 1).all() and (on[:, 7] == 1).all() and (off[:, 7] == 0).all()
    assert torch.equal(on[:, :7], active[:, :7])
    assert set(active.unique().tolist()) == {0, 1}  # and the samples themselves stay as they were


def test_training_with_weight_zero_is_training_without_the_term(coder):
    kept = []
    for weight, of in ((0.0, None), (0.0, coder)):
        torch.manual_seed(0)
        model = made.Squeeze()
        made.learn(model, 3, seed=1, coder=of, hidden=2, weight=weight)
        kept.append(model.read[0].weight.detach())
    assert torch.equal(*kept)


def test_bottlenecks_leave_the_first_place_and_keep_what_they_say(coder):
    suffixes = script("suffixes")
    x = torch.randn(2, 4, made.FEATURES, generator=torch.Generator().manual_seed(0)).abs()
    kept = suffixes.sparse(coder, 3)(x)
    assert torch.equal(kept[:, 0], x[:, 0]) and ((kept[:, 1:] != 0).sum(-1) == 3).all()
    torch.testing.assert_close(suffixes.sparse(coder, made.FEATURES)(x), x)
    rows = torch.linalg.qr(torch.randn(made.FEATURES, 5, generator=torch.Generator().manual_seed(1)))[0].T
    flat = suffixes.projected(torch.zeros(made.FEATURES), rows)(x)
    assert torch.linalg.matrix_rank(flat[:, 1:].flatten(0, 1)) == 5
    noise = suffixes.noisy(0.5, 3)
    assert not torch.equal(noise(x), noise(x)), "nobody who searches can know it"


def test_a_price_is_matched():
    assert script("suffixes").matched(lambda size: size**2, 4.0, 0.0, 10.0, rounds=30) == pytest.approx(2.0)
