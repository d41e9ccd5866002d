"""evals.pathological_errors on coders whose errors are noise, nothing, or worse than noise."""

import math

import pytest
import torch

import sae_lab as sl
from sae_lab.activations.contexts import spread_contexts
from sae_lab.evals.errors import NOISES, equal_norm_noises, kl_from_first, pathological_errors
from sae_lab.lm.tokens import pad
from sae_lab.types import Site, TokenMask, Write

SITE = Site("resid_post", layer=1)
SMALL = {"tokens": 300, "context": 24}


def wired(coder, site=SITE):
    coder.reads = coder.writes = (site,)
    return coder.eval()


def identity(d=48, site=SITE):
    coder = sl.L1(d, 2 * d)
    with torch.no_grad():
        coder.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)], dim=1))
        coder.W_dec.copy_(coder.W_enc.T)
    return wired(coder, site)


class Noisy(sl.L1):
    """The identity with noise a tenth as long as x: its errors are what they are compared with."""

    def forward(self, x, tokens=None):
        out = super().forward(x, tokens)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(99))
        noise = torch.nn.functional.normalize(noise, dim=-1) * 0.1 * x.norm(dim=-1, keepdim=True)
        return out._replace(x_hat=x + noise)


# ---- formulas


def test_kl_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]], [[0.5, 0.5]]])) + 3.0
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_from_first(logits, None).tolist() == [[pytest.approx(by_hand, rel=1e-5)], [pytest.approx(0, abs=1e-7)]]


def test_noises_have_the_length_of_the_error_and_their_own_law():
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([4.0, 1.0, 1.0, 0.1])
    x = torch.randn(20_000, 4, generator=generator) * scales + 3
    error = torch.randn(20_000, 4, generator=generator) * scales.flip(0)
    kept = torch.ones(20_000, dtype=torch.bool)
    kept[:5] = False
    noises = equal_norm_noises(x, error, kept)
    assert tuple(noises) == NOISES
    for name, v in noises.items():
        torch.testing.assert_close(v.norm(dim=-1), error.norm(dim=-1), rtol=1e-4, atol=1e-5, msg=name)
    shares = {name: v[kept].pow(2).sum(0) / v[kept].pow(2).sum() for name, v in noises.items()}
    own = error[kept].pow(2).sum(0) / error[kept].pow(2).sum()
    assert shares["isotropic"] == pytest.approx(torch.full((4,), 0.25), abs=0.02)
    # Brought to given lengths, a Gaussian keeps its axes; of their shares the largest shrinks. Measured: .70 for .89.
    assert shares["error_covariance"] == pytest.approx(own, abs=0.2)
    assert float(shares["error_covariance"][3]) > 0.6
    assert float(shares["activation_covariance"][0]) > 0.6 and float(own[0]) < 0.02
    assert (noises["shuffled"][kept] != error[kept]).any(1).all()
    moved = torch.nn.functional.normalize(noises["shuffled"][kept], dim=-1)
    assert float((moved * torch.nn.functional.normalize(error[kept], dim=-1)).sum(-1).mean()) == pytest.approx(
        0, abs=0.05
    )
    x_hat, other = x + error, x + noises["same_angle"]
    torch.testing.assert_close(other.norm(dim=-1), x_hat.norm(dim=-1), rtol=1e-4, atol=1e-4)
    again = equal_norm_noises(x, error, kept)
    assert all(torch.equal(noises[name], again[name]) for name in NOISES)
    assert not torch.equal(noises["isotropic"], equal_norm_noises(x, error, kept, seed=1)["isotropic"])


# ---- known answers


def test_the_identity_has_no_errors(tiny_lm, small_text):
    r = pathological_errors(identity(), tiny_lm, small_text, **SMALL)
    assert r.kl == 0.0 and all(v == 0.0 for v in r.kl_noise.values()) and r.relative_error == 0.0
    assert all(math.isnan(v) for v in r.ratio.values()) and math.isnan(r.exponents[0])
    assert "undefined" in repr(r)


def test_noise_is_as_bad_as_noise(tiny_lm, small_text):
    coder = Noisy(48, 96)
    with torch.no_grad():
        coder.W_enc.copy_(torch.cat([torch.eye(48), -torch.eye(48)], dim=1))
        coder.W_dec.copy_(coder.W_enc.T)
    r = pathological_errors(wired(coder), tiny_lm, small_text, tokens=900, context=24)
    assert r.relative_error == pytest.approx(0.1, abs=1e-4)
    for name in ("isotropic", "error_covariance", "shuffled", "same_angle"):  # measured: .93 to 1.04
        assert r.ratio[name] == pytest.approx(1.0, abs=0.2), name
        assert r.low[name] < r.ratio[name] < r.high[name]


def test_errors_along_what_matters_are_worse_than_noise(tiny_lm, small_text):
    """Ablating the directions that the logits read most does more than noise: the last layer's output goes to the head
    through its norm alone, and of its top right singular directions little is random."""
    site = Site("resid_post", layer=2)
    head = tiny_lm._module.get_output_embeddings().weight.float() * tiny_lm._module.model.norm.weight.float()
    top = torch.linalg.eigh(head.T @ head)[1]
    ratios = []
    for directions in (top[:, -4:], top[:, :4]):
        coder = sl.L1(48, 96)
        keep = torch.eye(48) - 0.3 * directions @ directions.T
        with torch.no_grad():
            coder.W_enc.copy_(torch.cat([torch.eye(48), -torch.eye(48)], dim=1))
            coder.W_dec.copy_(torch.cat([keep, -keep]))
        ratios.append(pathological_errors(wired(coder, site), tiny_lm, small_text, **SMALL).ratio["isotropic"])
    assert ratios[0] > 1.1 * ratios[1], ratios


def test_kl_is_that_of_a_run_by_itself(any_lm, small_text):
    """All variants in one pass give what one run a variant gives; left-out tokens pass unchanged."""
    site = Site("resid_post", layer=1)
    coder = sl.TopK(48, 96, k=8)
    coder.meta = {"mask": TokenMask(any_lm.mask().special_ids).to_dict(), "context": 24}
    coder = wired(coder, site)
    r = pathological_errors(coder, any_lm, small_text, tokens=60, context=24, alphas=(0.5,))
    found = []
    for alpha in (1.0, 0.5):
        kls = []
        for c in spread_contexts(any_lm, small_text, 60, 24):
            batch = pad([c.ids])
            clean = any_lm.run(batch)[1]

            def write(x, t, alpha=alpha):
                keep = (coder.mask or any_lm.mask()).keep(t.ids, t.positions, {site: x})
                return torch.where(keep[..., None], x + alpha * (coder(x).x_hat.detach() - x), x)

            changed = any_lm.run(batch, writes=[Write(site, write)])[1]
            p, q = (v[0].float().log_softmax(-1) for v in (clean, changed))
            keep = (coder.mask or any_lm.mask()).keep(batch.ids, batch.positions)[0]
            kls.append((p.exp() * (p - q)).sum(-1)[keep])
            if alpha < 1:
                break  # the curve is measured on the first quarter of the contexts
        found.append(float(torch.cat(kls).double().mean()))
    assert r.kl == pytest.approx(found[0], rel=1e-3)
    assert r.curve[0] == pytest.approx(found[1], rel=1e-3)


def test_small_errors_are_quadratic(tiny_lm, small_text):
    """Near x, KL grows with the square of the distance, in any direction."""
    coder = identity()
    with torch.no_grad():
        coder.W_dec.mul_(0.999)
    p, p_noise = pathological_errors(coder, tiny_lm, small_text, **SMALL).exponents
    assert p == pytest.approx(2.0, abs=0.3) and p_noise == pytest.approx(2.0, abs=0.3)


def test_the_result(tiny_lm, small_text):
    r = pathological_errors(wired(sl.TopK(48, 96, k=8)), tiny_lm, small_text, **SMALL)
    assert len(r.to_pandas()) == len(NOISES) and len(r.figures()) == 2 + len(NOISES)
    assert r.token_kl.shape == (1 + len(NOISES), r.tokens) and len(r.token_documents) == r.tokens
    assert float(r.token_kl[0].double().mean()) == pytest.approx(r.kl, rel=1e-5)
    assert r.kl_se > 0 and "95 %" in repr(r) and r.curve[-1] > 0 and r.edges[0] == 1
    assert r == pathological_errors(wired(sl.TopK(48, 96, k=8)), tiny_lm, small_text, **SMALL)


def test_what_it_refuses(tiny_lm, small_text):
    with pytest.raises(ValueError, match=r"alphas must be increasing shares between 0 and 1, got \(0.5, 1.0\)"):
        pathological_errors(identity(), tiny_lm, small_text, alphas=(0.5, 1.0))
    with pytest.raises(ValueError, match="context must lie between 2 and the 256 tokens"):
        pathological_errors(identity(), tiny_lm, small_text, context=1)
    with pytest.raises(ValueError, match="tokens must be positive, got 0"):
        pathological_errors(identity(), tiny_lm, small_text, tokens=0)
    with pytest.raises(ValueError, match="the mask leaves one token"):
        pathological_errors(identity(), tiny_lm, [" one"], tokens=10)
