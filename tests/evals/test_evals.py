"""evals.reconstruction on coders whose numbers are known beforehand."""

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import sae_lab as sl
from sae_lab.activations.contexts import spread_contexts
from sae_lab.activations.reconstructing import recovered, said_of
from sae_lab.lm.model import token_losses
from sae_lab.lm.text import as_text
from sae_lab.lm.tokens import pad
from sae_lab.stats import clustered_error
from sae_lab.types import Site, TokenMask, Write

SITE = Site("resid_post", 1)
SMALL = {"tokens": 400, "context": 32}


def at(coder, site=SITE, **meta):
    coder.reads = coder.writes = (site,)
    coder.meta = meta
    return coder.eval()


def weights(d, site=SITE, **meta):
    """A coder whose codes are the positive and the negative parts of x, and whose decoder is still to be filled in."""
    coder = sl.L1(d, 2 * d)
    with torch.no_grad():
        coder.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)], dim=1))
        coder.W_dec.zero_()
    return at(coder, site, **meta)


def identity(d, site=SITE, **meta):
    """relu(x) - relu(-x) is x, to the last bit."""
    coder = weights(d, site, **meta)
    with torch.no_grad():
        coder.W_dec.copy_(coder.W_enc.T)
    return coder


def kept_activations(lm, text, site=SITE, mask=None, tokens=400, context=32):
    contexts = spread_contexts(lm, text, tokens, context)
    mask = mask or lm.mask()
    parts = []
    for c in contexts:
        reading = lm.read([c.ids], site)
        parts.append(reading[site][0][mask.keep(reading.ids, reading.batch.positions, {site: reading[site]})[0]])
    return torch.cat(parts)


def delta_by_hand(lm, text, site, mask, new, tokens=400, context=32):
    """Mean loss with ``new(x)`` at the kept tokens, minus the clean one, one context at a time."""
    deltas = []
    for c in spread_contexts(lm, text, tokens, context):
        batch = pad([c.ids])

        def write(x, t):
            keep = mask.keep(t.ids, t.positions, {site: x})
            return torch.where(keep.unsqueeze(-1), new(x), x)

        clean, changed = (
            token_losses(lm.run(batch, writes=writes)[1], batch)[0, 1:] for writes in ([], [Write(site, write)])
        )
        deltas.append(changed - clean)
    return float(torch.cat(deltas).double().mean())


# ---- known answers


def test_the_identity_loses_nothing(repeater, repeated):
    r = sl.evals.reconstruction(identity(48), repeater, repeated, **SMALL)
    assert r.ce_delta == 0.0 and r.ce_recovered == 1.0 and r.ce_recovered_zero == 1.0
    assert r.fvu == 0.0 and r.fvu_all_tokens == 0.0 and r.explained_variance == 1.0
    assert r.l0 == 48.0, "each x is either positive or negative"
    assert r.ce_delta_mean_ablation > 0.5 and r.ce_delta_zero_ablation > 0.5
    assert "a share of that" not in str(r)


def test_the_identity_is_exact_on_the_bundled_model_too(lm):
    # x is read in the very shape in which it is spliced: in another, rounding alone costs 1e-7 nats.
    r = sl.evals.reconstruction(identity(576, Site("resid_post", 8)), lm, sl.load_text().held_out, tokens=200)
    assert r.ce_delta == 0.0 and r.ce_recovered == 1.0


def test_the_mean_recovers_nothing(repeater, repeated):
    coder = weights(48)
    with torch.no_grad():
        coder.b_dec.copy_(kept_activations(repeater, repeated).double().mean(0))
    r = sl.evals.reconstruction(coder, repeater, repeated, **SMALL)
    assert r.ce_recovered == 0.0 and r.ce_delta == r.ce_delta_mean_ablation
    assert r.fvu == pytest.approx(1.0, abs=1e-4)


def test_zero_recovers_nothing_of_zero(repeater, repeated):
    r = sl.evals.reconstruction(weights(48), repeater, repeated, **SMALL)
    assert r.ce_recovered_zero == pytest.approx(0.0, abs=1e-6) and r.ce_delta == r.ce_delta_zero_ablation
    assert r.fvu > 1 or r.fvu == pytest.approx(1, abs=0.2)


def test_half_of_x(tiny_lm, small_text):
    """x̂ = x/2 leaves a quarter of Σ‖x‖²."""
    coder = identity(48)
    with torch.no_grad():
        coder.W_dec /= 2
    x = kept_activations(tiny_lm, small_text).double()
    r = sl.evals.reconstruction(coder, tiny_lm, small_text, **SMALL)
    assert r.fvu == pytest.approx(float(0.25 * x.pow(2).sum() / (x - x.mean(0)).pow(2).sum()), rel=1e-4)
    by_hand = delta_by_hand(tiny_lm, small_text, SITE, tiny_lm.mask(), lambda x: x / 2)
    assert r.ce_delta == pytest.approx(by_hand, rel=1e-4)


def test_pca_is_the_one_of_scikit_learn(tiny_lm, small_text):
    coder = at(sl.TopK(48, 96, k=5))
    x = kept_activations(tiny_lm, small_text)
    r = sl.evals.reconstruction(coder, tiny_lm, small_text, **SMALL)
    pca = PCA(5, svd_solver="full").fit(x.double().numpy())
    assert r.pca_rank == 5
    assert r.pca_fvu == pytest.approx(1 - pca.explained_variance_ratio_.sum(), rel=1e-4)

    def projected(x):
        rows = pca.inverse_transform(pca.transform(x.reshape(-1, 48).double().numpy()))
        return torch.tensor(rows, dtype=torch.float32).view_as(x)

    by_hand = delta_by_hand(tiny_lm, small_text, SITE, tiny_lm.mask(), projected)
    assert r.pca_ce_delta == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize(
    ("cost", "error", "share", "why"),
    [
        (2.0, 0.1, 0.75, ""),
        (2.0, float("nan"), 0.75, ""),  # of one document no error is known
        (0.31, 0.1, 1 - 0.5 / 0.31, ""),  # more than three of its errors
        (0.29, 0.1, None, "below 3 of its standard errors (0.10)"),
        (0.099, 0.0, None, "below 0.1"),
        (0.0, 0.0, None, "below 0.1"),
        (-2.0, 0.1, None, "below 0.1"),  # ablation helps
        (float("nan"), float("nan"), None, "below 0.1"),  # nothing was predicted
    ],
)
def test_no_share_is_given_of_next_to_nothing(cost, error, share, why):
    found, said = recovered(0.5, cost, error), said_of("mean ablation", cost, error)
    assert np.isnan(found) if share is None else found == pytest.approx(share)
    assert said == f"mean ablation costs {cost:.2f}" + (f", {why}: a share of that says nothing" if why else "")


def test_where_ablation_costs_nothing_no_share_is_printed(tiny_lm, small_text):
    """A model with random weights is no worse without a block."""
    r = sl.evals.reconstruction(identity(48), tiny_lm, small_text, **SMALL)
    assert r.ce_delta == 0.0 and r.ce_delta_mean_ablation < 0.1
    assert np.isnan(r.ce_recovered) and np.isnan(r.ce_recovered_zero) and np.isnan(r.pca_ce_recovered)
    row = next(line for line in str(r).splitlines() if line.startswith("CE recovered "))
    assert row.count("undefined") == 1 and "below 0.1: a share of that says nothing" in row
    assert "a share of that says nothing" in r._repr_html_()


def test_the_error_of_what_ablation_costs(repeater, repeated):
    """Clustered by document, as that of a coder which does what the ablation does."""
    r = sl.evals.reconstruction(weights(48), repeater, repeated, **SMALL)
    assert r.ce_delta_zero_ablation_se == pytest.approx(r.ce_delta_se) and r.ce_delta_se > 0.01
    with torch.no_grad():
        coder = weights(48)
        coder.b_dec.copy_(kept_activations(repeater, repeated).double().mean(0))
    r = sl.evals.reconstruction(coder, repeater, repeated, **SMALL)
    assert r.ce_delta_mean_ablation_se == pytest.approx(r.ce_delta_se, rel=1e-5)


def test_ce_clean_is_the_models_loss(tiny_lm, small_text):
    r = sl.evals.reconstruction(identity(48), tiny_lm, small_text, **SMALL)
    contexts = spread_contexts(tiny_lm, small_text, 400, 32)
    losses = tiny_lm.loss([c.ids for c in contexts], per_token=True)
    assert r.ce_clean == pytest.approx(float(losses.nanmean()), rel=1e-5)
    assert r.tokens == sum(len(c.ids) for c in contexts)
    assert r.documents == len({c.documents[0] for c in contexts})


def test_every_site_of_every_architecture(any_lm, small_text):
    """One pass gives clean, spliced and ablated runs at once; a loop of single runs must agree."""
    sites = [Site(k, None if k == "embed" else 1) for k in any_lm.kinds] + [Site("attn_z", 1, head=2)]
    for site in sites:
        coder = at(sl.TopK(any_lm.width(site), 20, k=4), site)
        r = sl.evals.reconstruction(coder, any_lm, small_text, tokens=40, context=20)
        by_hand = [
            delta_by_hand(any_lm, small_text, site, any_lm.mask(), new, 40, 20)
            for new in (lambda x, coder=coder: coder(x).x_hat.detach(), torch.zeros_like)
        ]
        # The loss is about 11 nats of float32: 1e-4 is ten units of its last place.
        assert [r.ce_delta, r.ce_delta_zero_ablation] == pytest.approx(by_hand, rel=1e-3, abs=1e-4), site
        assert abs(r.ce_delta) > 1e-3, f"{site} is without effect, so nothing was compared"


def test_excluded_tokens_pass_unchanged(tiny_lm, small_text):
    ids = Counter(i for c in spread_contexts(tiny_lm, small_text, 400, 32) for i in c.ids)
    common = tuple(i for i, _ in ids.most_common(40))
    limit = float(kept_activations(tiny_lm, small_text).norm(dim=-1).median())
    for mask in (TokenMask(common), TokenMask((), True, {SITE.key: limit})):
        coder = weights(48, mask=mask.to_dict())
        r = sl.evals.reconstruction(coder, tiny_lm, small_text, **SMALL)
        by_hand = delta_by_hand(tiny_lm, small_text, SITE, mask, torch.zeros_like)
        assert r.ce_delta == pytest.approx(by_hand, rel=1e-4)
        assert r.ce_delta != pytest.approx(delta_by_hand(tiny_lm, small_text, SITE, tiny_lm.mask(), torch.zeros_like))
        kept = len(kept_activations(tiny_lm, small_text, mask=mask))
        assert r.excluded == pytest.approx(1 - kept / r.tokens) and r.excluded > 0.3
        assert str(mask) in str(r)


def test_fvu_over_all_tokens_stands_beside(tiny_lm, small_text):
    mask = TokenMask((), True)
    coder = at(sl.TopK(48, 96, k=5), mask=mask.to_dict())
    r = sl.evals.reconstruction(coder, tiny_lm, small_text, **SMALL)
    everything = kept_activations(tiny_lm, small_text, mask=TokenMask((), False))
    for x, fvu in ((kept_activations(tiny_lm, small_text, mask=mask), r.fvu), (everything, r.fvu_all_tokens)):
        error = (coder(x).x_hat - x).detach().pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        assert fvu == pytest.approx(float(error), rel=1e-3)
    assert r.fvu != r.fvu_all_tokens


# ---- what it says


def test_it_prints_as_a_table(tiny_lm, small_text):
    coder = at(sl.TopK(48, 96, k=5), dead=0.125, dead_tokens=2000)
    r = sl.evals.reconstruction(coder, tiny_lm, small_text, **SMALL)
    text = str(r)
    assert repr(r) == text and "PCA 5" in text
    for name in ("L0", "FVU", "FVU, all tokens", "dCE", "CE recovered ", "CE recovered, zero", "dead"):
        assert any(line.startswith(name) for line in text.splitlines()), name
    assert f"{r.fvu:.3f}" in text and "12.50%" in text and "none of 2,000 training tokens" in text
    assert "left out: 3 special ids, position 0" in text or "special ids, position 0" in text
    html = r._repr_html_()
    assert html.startswith("<table>") and html.count("<tr>") == 8 and f"{r.ce_delta:.3f} ± " in html
    table = r.to_pandas()
    assert len(table) == 1 and table["fvu"][0] == r.fvu and {"l0", "dead", "ce_delta", "ce_recovered"} <= set(table)
    assert r.dead == 0.125 and r.dead_tokens == 2000 and r.l0 <= 5


def test_it_leaves_the_coder_as_it_was(tiny_lm, small_text):
    coder = at(sl.BatchTopK(48, 96, k=5))
    coder.calibrate([torch.randn(500, 48, generator=torch.Generator().manual_seed(0))])
    coder.train()
    r = sl.evals.reconstruction(coder, tiny_lm, small_text, **SMALL)
    assert coder.training
    x = kept_activations(tiny_lm, small_text)
    assert r.l0 == pytest.approx(float((coder.eval().encode(x) > 0).sum()) / len(x), rel=1e-3), "L0 in eval mode"


def test_the_context_is_the_coders(tiny_lm, small_text):
    r = sl.evals.reconstruction(identity(48, context=16), tiny_lm, small_text, tokens=100)
    losses = [len(c.ids) for c in spread_contexts(tiny_lm, small_text, 100, 16)]
    assert max(losses) == 16 and r.tokens == sum(losses)


# ---- which text


def test_contexts_are_spread_over_documents(tiny_lm):
    words = "the cat sat on the mat and looked at the moon while the river went by "
    documents = [words * 40 for _ in range(9)] + ["short one"]
    text = sl.load_text(documents)
    contexts = spread_contexts(tiny_lm, text, 9 * 64, 32)  # 18 contexts' worth of 9 documents
    per_document = Counter(c.documents[0] for c in contexts)
    assert set(per_document) == set(range(9)) and set(per_document.values()) <= {1, 2, 3}
    lengths = [len(c.ids) for c in contexts]
    assert sum(lengths[:-1]) < 9 * 64 <= sum(lengths), "as many as asked for and no more"
    assert [c.ids for c in contexts] == [c.ids for c in spread_contexts(tiny_lm, text, 9 * 64, 32)]
    # A document of one short context leaves its share to the others, and all of a text can be asked for.
    uneven = spread_contexts(tiny_lm, documents[8:], 10**6, 32)
    assert {c.documents[0] for c in uneven} == {0, 1}
    every = list(as_text(documents[8:]).contexts(tiny_lm.tokenizer, tiny_lm.prefix_id, 32))
    assert sorted(map(len, (c.ids for c in uneven))) == sorted(map(len, (c.ids for c in every)))


def test_contexts_are_spread_within_documents(tiny_lm):
    document = " ".join(f"number {i}" for i in range(900))
    chosen = spread_contexts(tiny_lm, [document], 5 * 32, 32)
    every = [c.ids for c in sl.load_text([document]).contexts(tiny_lm.tokenizer, tiny_lm.prefix_id, 32)]
    at = sorted(every.index(c.ids) for c in chosen)
    gaps = np.diff([0, *at, len(every) - 1])
    assert at[0] == 0 and at[-1] == len(every) - 1 and gaps.max() <= len(every) / 4 + 1


def test_clustered_error_by_hand():
    # Mean 3. Residuals -2, -1 | 1 | 2, 0: sums by cluster -3, 1, 2, squares 14; times G/(G-1) = 3/2; √21/5.
    d, clusters = torch.tensor([1.0, 2.0, 4.0, 5.0, 3.0]), torch.tensor([7, 7, 2, 9, 9])
    assert clustered_error(d, clusters) == pytest.approx(21**0.5 / 5)
    assert np.isnan(clustered_error(d, torch.zeros(5)))
    # Each its own cluster: the usual standard error of a mean.
    assert clustered_error(d, torch.arange(5)) == pytest.approx(float(d.std()) / 5**0.5)


# ---- refused


def test_no_text(tiny_lm):
    for text in ([""], []):
        with pytest.raises(ValueError, match="the text is empty: pass at least one document"):
            sl.evals.reconstruction(identity(48), tiny_lm, text)
    with pytest.raises(ValueError, match="evaluation text is empty: it needs a document of at least two tokens"):
        sl.evals.reconstruction(identity(48), tiny_lm, sl.load_text(["a", "b", ""])[2:])


def test_another_model(tiny_lm, small_text):
    with pytest.raises(ValueError, match=r"this coder reads width 20 and LM\(.*\) has width 48 at .*: use the model"):
        sl.evals.reconstruction(identity(20), tiny_lm, small_text)
    with pytest.raises(ValueError, match="this coder does not know its site"):
        sl.evals.reconstruction(sl.TopK(48, 96, k=3), tiny_lm, small_text)
    with pytest.raises(ValueError, match="out of range: this model has layers 0 to 2"):
        sl.evals.reconstruction(identity(48, Site("resid_post", 9)), tiny_lm, small_text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": 0}, "tokens must be positive, got 0"),
        ({"context": 1}, "context must lie between 2 and the 256 tokens this model reads, got 1"),
        ({"context": 300}, "context must lie between 2 and the 256 tokens this model reads, got 300"),
    ],
)
def test_nonsense(tiny_lm, small_text, arguments, words):
    with pytest.raises(ValueError, match=words):
        sl.evals.reconstruction(identity(48), tiny_lm, small_text, **arguments)


def test_a_mask_that_keeps_nothing(tiny_lm, small_text):
    coder = identity(48, mask=TokenMask((), True, {SITE.key: 0.0}).to_dict())
    with pytest.raises(
        ValueError, match=r"the coder's mask leaves out every token .*: evaluate with another mask or text"
    ):
        sl.evals.reconstruction(coder, tiny_lm, small_text, **SMALL)


def test_an_unfitted_coder(tiny_lm, small_text):
    coder = at(sl.BatchTopK(48, 96, k=5)).train()
    with pytest.raises(ValueError, match="no inference threshold yet"):
        sl.evals.reconstruction(coder, tiny_lm, small_text, **SMALL)
    assert coder.training


# ---- coders that read one thing and write another


IN, OUT = Site("mlp_in", 1), Site("mlp_out", 1)
LITTLE = {"tokens": 160, "context": 32}


def wired(coder, reads, writes, x=None, **meta):
    """An untrained coder at these sites, off its symmetric start, with a threshold where it needs one."""
    with torch.no_grad():
        for i, p in enumerate(coder.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    coder.reads, coder.writes, coder.meta = tuple(reads), tuple(writes), meta
    coder.calibrate([x])
    return coder.eval()


def together(lm, text, sites, mask=None, tokens=160, context=32):
    """(kept activations of each site, token ids), one context at a time; one site's mask leaves out at all."""
    mask, xs, ids = mask or lm.mask(), {s: [] for s in sites}, []
    for c in spread_contexts(lm, text, tokens, context):
        reading = lm.read([c.ids], list(sites))
        acts = {s: reading[s] for s in sites}
        keep = mask.keep(reading.ids, reading.batch.positions, acts)[0]
        ids.append(reading.ids[0][keep])
        for s in sites:
            xs[s].append(acts[s][0][keep])
    return {s: torch.cat(x) for s, x in xs.items()}, torch.cat(ids)


def read_and_spliced(coder, lm, text, at, layer, mask=None, tokens=160, context=32):
    """ΔCE with what the coder makes of the clean reads written at ``at``, one context at a time."""
    mask, deltas = mask or lm.mask(), []
    for c in spread_contexts(lm, text, tokens, context):
        batch = pad([c.ids])
        reading = lm.read([c.ids], [*coder.reads, at])
        acts = {s: reading[s] for s in (*coder.reads, at)}
        keep = mask.keep(batch.ids, batch.positions, acts).unsqueeze(-1)
        x = [acts[s][0] for s in coder.reads]
        with torch.no_grad():
            x_hat = coder(x[0] if len(x) == 1 else torch.stack(x, 1), batch.ids[0]).x_hat
        new = x_hat if layer is None else x_hat[:, layer]

        def write(y, _, keep=keep, new=new):
            return torch.where(keep, new[None], y)

        clean, changed = (
            token_losses(lm.run(batch, writes=writes)[1], batch)[0, 1:] for writes in ([], [Write(at, write)])
        )
        deltas.append(changed - clean)
    return float(torch.cat(deltas).double().mean())


def unexplained(y_hat, y):
    return float((y - y_hat.detach()).pow(2).sum() / (y - y.mean(0)).pow(2).sum())


def test_a_perfect_transcoder_loses_nothing(repeater, repeated):
    """A block's output is the next one's input: the identity between these sites is a transcoder, and exact."""
    before, after = Site("resid_post", 0), Site("resid_pre", 1)
    coder = sl.L1(48, 96, d_out=48)
    with torch.no_grad():
        coder.W_enc.copy_(torch.cat([torch.eye(48), -torch.eye(48)], dim=1))
        coder.W_dec.copy_(coder.W_enc.T)
    coder.reads, coder.writes = (before,), (after,)
    r = sl.evals.reconstruction(coder, repeater, repeated, **LITTLE)
    assert r.ce_delta == 0.0 and r.fvu == 0.0 and r.fvu_all_tokens == 0.0 and r.ce_recovered == 1.0 and r.l0 == 48.0
    assert r.ce_delta_mean_ablation > 0.5, "the loss can move"
    # The same weights between sites that are not the same: what they read is not what they should write.
    coder.reads = (Site("embed"),)
    other = sl.evals.reconstruction(coder, repeater, repeated, **LITTLE)
    assert other.fvu > 0.1 and abs(other.ce_delta) > 0.01


@pytest.mark.usefixtures("make_tiny")  # one thread
def test_a_skip_alone_stands_in_for_a_linear_layer(make_module, tokenizer, small_text):
    """No feature fires, and nothing is lost: all of an MLP that is a matrix goes through the skip."""
    module = make_module("llama", len(tokenizer))
    linear = torch.nn.Linear(48, 48)
    with torch.no_grad():
        linear.weight.normal_(0, 48**-0.5, generator=torch.Generator().manual_seed(0))
    module.model.layers[1].mlp = linear
    lm = sl.LM(module, tokenizer=tokenizer)
    coder = sl.SkipTranscoder(48, 64, k=4)
    with torch.no_grad():
        coder.threshold.fill_(1e9)
        coder.W_skip.copy_(linear.weight.T)
        coder.b_dec.copy_(linear.bias)
    coder.reads, coder.writes = (IN,), (OUT,)
    r = sl.evals.reconstruction(coder.eval(), lm, small_text, **LITTLE)
    assert r.l0 == 0 and r.fvu < 1e-10 and abs(r.ce_delta) < 1e-5
    assert abs(r.ce_delta_zero_ablation) > 0.01 and r.pca_rank == 4
    with torch.no_grad():
        coder.W_skip.zero_()
    without = sl.evals.reconstruction(coder, lm, small_text, **LITTLE)
    assert without.fvu > 0.9 and abs(without.ce_delta) > 1e-3, "it was the skip"


@pytest.mark.parametrize("name", ["Transcoder", "SkipTranscoder", "JumpReLU"])
def test_a_transcoder_is_measured_where_it_writes(name, tiny_lm, small_text):
    """FVU of what it should write, and its reconstruction from the clean input; the mask of both sites."""
    x, y = (kept_activations(tiny_lm, small_text, site, **LITTLE) for site in (IN, OUT))
    limits = {IN.key: float(x.norm(dim=-1).quantile(0.8)), OUT.key: float(y.norm(dim=-1).quantile(0.8))}
    arguments = {"sparsity": 0.1, "d_out": 48} if name == "JumpReLU" else {"k": 6}
    for mask in (None, TokenMask((), True, limits)):
        meta = {} if mask is None else {"mask": mask.to_dict()}
        coder = wired(getattr(sl, name)(48, 64, **arguments), [IN], [OUT], x, **meta)
        r = sl.evals.reconstruction(coder, tiny_lm, small_text, **LITTLE)
        acts, _ = together(tiny_lm, small_text, (IN, OUT), mask)
        assert r.fvu == pytest.approx(unexplained(coder(acts[IN]).x_hat, acts[OUT]), rel=1e-3)
        assert r.fvu != pytest.approx(unexplained(coder(acts[IN]).x_hat, acts[IN]), rel=1e-2)
        assert r.l0 == pytest.approx(float((coder.encode(acts[IN]) > 0).sum()) / len(acts[IN]), rel=1e-2)
        assert r.ce_delta == pytest.approx(
            read_and_spliced(coder, tiny_lm, small_text, OUT, None, mask), rel=1e-3, abs=1e-4
        )
        assert abs(r.ce_delta) > 1e-3 and r.excluded == pytest.approx(1 - len(acts[IN]) / r.tokens)
        zero = delta_by_hand(tiny_lm, small_text, OUT, tiny_lm.mask(), torch.zeros_like, **LITTLE)
        assert (r.ce_delta_zero_ablation == pytest.approx(zero, rel=1e-3)) == (mask is None)
    assert r.excluded > 0.2, "the norm at one site leaves a token out at both"
    rank = r.pca_rank  # PCA is of what is written
    values = torch.linalg.eigvalsh(torch.cov(acts[OUT].double().T)).flip(0)
    assert r.pca_fvu == pytest.approx(float(values[rank:].sum() / values.sum()), rel=1e-3)


def test_a_crosscoder_layer_by_layer(tiny_lm, small_text):
    """The last layer unless another is asked for; each with its own FVU, splice and ablations."""
    sites = (Site("resid_post", 0), OUT, Site("resid_post", 2))
    acts, _ = together(tiny_lm, small_text, sites)
    x = torch.stack(list(acts.values()), 1)
    coder = wired(sl.Crosscoder(48, 96, layers=3, k=12), sites, sites, x)
    x_hat = coder(x).x_hat
    results = {s: sl.evals.reconstruction(coder, tiny_lm, small_text, **LITTLE, site=s) for s in sites}
    for layer, (site, r) in enumerate(results.items()):
        assert r.fvu == pytest.approx(unexplained(x_hat[:, layer], x[:, layer]), rel=1e-3)
        by_hand = read_and_spliced(coder, tiny_lm, small_text, site, layer)
        assert r.ce_delta == pytest.approx(by_hand, rel=1e-3, abs=1e-4) and abs(r.ce_delta) > 1e-3
        zero = delta_by_hand(tiny_lm, small_text, site, tiny_lm.mask(), torch.zeros_like, **LITTLE)
        assert r.ce_delta_zero_ablation == pytest.approx(zero, rel=1e-3, abs=1e-4)
    assert len({r.fvu for r in results.values()}) == 3 and len({r.l0 for r in results.values()}) == 1
    default = sl.evals.reconstruction(coder, tiny_lm, small_text, **LITTLE)
    assert str(default) == str(results[sites[2]]) != str(results[sites[0]])
    spelt = sl.evals.reconstruction(coder, tiny_lm, small_text, **LITTLE, site="blocks.1.hook_mlp_out")
    assert str(spelt) == str(results[OUT])


def test_tokens_reach_a_tokenized_coder(tiny_lm, small_text, tokenizer):
    acts, ids = together(tiny_lm, small_text, (SITE,))
    coder = wired(sl.Tokenized(48, 64, vocab=len(tokenizer), k=6), [SITE], [SITE], acts[SITE])
    with torch.no_grad():
        coder.lookup[ids] = acts[SITE] / 2  # a table that matters
    r = sl.evals.reconstruction(coder, tiny_lm, small_text, **LITTLE)
    assert r.fvu == pytest.approx(unexplained(coder(acts[SITE], ids).x_hat, acts[SITE]), rel=1e-3)
    assert r.fvu != pytest.approx(unexplained(coder(acts[SITE], ids.roll(1)).x_hat, acts[SITE]), rel=1e-2)
    assert r.ce_delta == pytest.approx(read_and_spliced(coder, tiny_lm, small_text, SITE, None), rel=1e-3, abs=1e-4)


def test_the_site_of_a_coder_that_has_one(tiny_lm, small_text):
    """For an SAE to name its own site changes nothing."""
    coder = at(sl.TopK(48, 96, k=5))
    before = sl.evals.reconstruction(coder, tiny_lm, small_text, **LITTLE)
    for site in (SITE, "layers.1"):
        assert str(sl.evals.reconstruction(coder, tiny_lm, small_text, **LITTLE, site=site)) == str(before)
    half = at(sl.TopK(48, 96, k=5))
    half.writes = ()  # known where it reads, and so where it writes
    assert str(sl.evals.reconstruction(half, tiny_lm, small_text, **LITTLE)) == str(before)


def test_sites_that_are_no_place_to_splice(tiny_lm, small_text):
    x = torch.randn(50, 48, generator=torch.Generator().manual_seed(0))
    transcoder = wired(sl.Transcoder(48, 64, k=6), [IN], [OUT], x)
    crosscoder = wired(sl.Crosscoder(48, 64, layers=2, k=6), [IN, OUT], [IN, OUT], torch.stack([x, x], 1))
    narrow = wired(sl.Transcoder(48, 64, k=6, d_out=20), [IN], [OUT], x)
    wide = wired(sl.Crosscoder(20, 64, layers=2, k=6), [IN, OUT], [IN, OUT], torch.stack([x, x], 1)[..., :20])
    nowhere = wired(sl.Crosscoder(48, 64, layers=2, k=6), [], [], torch.stack([x, x], 1))
    for coder, site, words in (
        (transcoder, IN, r"this coder writes Site\('mlp_out', layer=1\), got site=Site\('mlp_in', layer=1\)"),
        (crosscoder, SITE, r"this coder writes Site\('mlp_in', layer=1\), Site\('mlp_out', layer=1\), got site="),
        (at(sl.TopK(48, 96, k=5)), "layers.0", r"this coder writes Site\('resid_post', layer=1\), got site="),
        (narrow, None, r"this coder writes width 20 and LM\(.*\) has width 48 at Site\('mlp_out', layer=1\): use"),
        (wide, None, r"this coder reads width 20 and LM\(.*\) has width 48 at Site\('mlp_in', layer=1\): use the"),
        (nowhere, None, "this coder does not know its site"),
    ):
        with pytest.raises(ValueError, match=words):
            sl.evals.reconstruction(coder, tiny_lm, small_text, **LITTLE, site=site)


def test_a_trained_transcoder_is_measured_from_what_it_knows(tiny_lm, small_text, tmp_path):
    """Sites, mask and context travel with it from training to the eval, through a file."""
    store = sl.harvest(tiny_lm, [IN, OUT], small_text, 2000, context=32, path=tmp_path / "store")
    sae = sl.Transcoder(48, 96, k=8)
    sl.train(sae, store, sl.TrainConfig(steps=60, batch_size=128), path=tmp_path / "run")
    loaded = sl.load(tmp_path / "run")
    r = sl.evals.reconstruction(loaded, tiny_lm, small_text.held_out, tokens=200)
    acts, _ = together(tiny_lm, small_text.held_out, (IN, OUT), store.mask, 200)
    assert r.fvu == pytest.approx(unexplained(sae(acts[IN]).x_hat, acts[OUT]), rel=1e-3)
    assert r.mask == str(store.mask) and r.dead == sae.meta["dead"] and r.l0 == pytest.approx(8, rel=0.5)


# ---- edits of such coders


def test_edits_refuse_a_crosscoder_for_what_it_is(tiny_lm):
    """It knows its sites, and has two: that it should be trained on a store is no remedy."""
    x = torch.randn(50, 2, 48, generator=torch.Generator().manual_seed(0))
    coder = wired(sl.Crosscoder(48, 64, layers=2, k=6), [IN, OUT], [IN, OUT], x)
    with pytest.raises(ValueError, match="take an SAE or a transcoder of one of them"):
        tiny_lm.logits("The ship went down the river", edits=[sl.Ablate(coder, 0)])


@pytest.fixture(scope="module")
def tokenized(make_tiny, tokenizer):
    lm = make_tiny("llama")
    reading = lm.read(["The ship went down the river to the sea", "A red fox crossed the field at dawn"], [SITE])
    x = reading[SITE][reading.mask & (reading.batch.positions > 0)]
    coder = wired(sl.Tokenized(48, 64, vocab=len(tokenizer), k=6), [SITE], [SITE], x)
    return coder, int((coder.encode(x) > 0).sum(0).argmax())


def test_dropping_the_error_of_a_tokenized_coder(tiny_lm, tokenized):
    """decode(z') needs each token's own id, whatever stands beside it: padding, the prefix, other rows."""
    coder, feature = tokenized
    prompts = ["The ship went down the river to the sea", "A red fox"]
    edit = sl.Ablate(coder, feature, error="drop")
    clean, edited = tiny_lm.read(prompts, [SITE]), tiny_lm.read(prompts, [SITE], edits=[edit])
    fired = 0
    for row in range(2):
        n = int(clean.mask[row].sum())
        x, ids = clean[SITE][row, :n], clean.ids[row, :n]
        f = coder.encode(x).detach()
        fired += int((f[1:, feature] > 0).sum())
        f[:, feature] = 0
        expected = torch.cat([x[:1], coder.decode(f, ids)[1:]]).detach()  # the prefix is left out, and passes unchanged
        assert torch.allclose(edited[SITE][row, :n], expected, atol=1e-4 * float(expected.abs().max()))
        shifted = coder.decode(f, ids.roll(1)).detach()
        assert not torch.allclose(edited[SITE][row, 1:n], shifted[1:], atol=1e-2 * float(expected.abs().max()))
    assert fired, "the feature that is taken out was there"
    some = sl.Ablate(coder, feature, positions=[2, 5], error="drop")
    part = tiny_lm.read(prompts[:1], [SITE], edits=[some])[SITE][0]
    at, n = torch.tensor([2, 5]), part.shape[0]
    rest = torch.tensor([i for i in range(n) if i not in (2, 5)])
    assert torch.equal(part[rest], clean[SITE][0, :n][rest])
    assert torch.allclose(part[at], edited[SITE][0, :n][at], atol=1e-4 * float(part.abs().max()))


def test_edits_of_a_tokenized_coder_that_keep_the_error(tiny_lm, tokenized):
    """The table has no part in the difference of two decodes."""
    coder, feature = tokenized
    prompt = "The ship went down the river to the sea"
    edit = sl.Steer(coder, feature, strength=2)
    clean, edited = tiny_lm.read(prompt, [SITE])[SITE][0], tiny_lm.read(prompt, [SITE], edits=[edit])[SITE][0]
    step = 2 * coder.f_scale[feature] * coder.W_dec[feature].detach()
    assert torch.allclose(edited[1:] - clean[1:], step.expand_as(clean[1:]), atol=1e-3 * float(step.abs().max()))


def test_a_tokenized_coder_edits_what_is_generated(tiny_lm, tokenized):
    """With the KV cache a step sees one token: its id, not the prompt's, is looked up."""
    coder, feature = tokenized
    edits = [sl.Ablate(coder, feature, error="drop")]
    prompt = "The ship went down"
    ids = tiny_lm.tokenize([prompt]).ids[0].tolist()
    for _ in range(4):
        ids.append(int(tiny_lm.logits([ids], edits=edits)[0, -1].argmax()))
    text = tiny_lm.generate(prompt, max_new_tokens=4, edits=edits)
    assert text.endswith(tiny_lm.tokenizer.decode(ids[-4:]))
    clean = tiny_lm.generate(prompt, max_new_tokens=4)
    assert text != clean


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon:serial", "gpt_bigcode", "zamba2"])
def test_reconstruction_where_a_model_fixes_its_batch_early(name):
    """All but the first make masks or the like for the batch of the embeddings. Costs are those of one row alone."""
    from tiny_models import build, tokenizer

    lm = sl.LM(build(name), tokenizer=tokenizer(), prefix=1, device="cpu")
    coder = at(sl.TopK(lm.width(SITE), 64, k=8))
    texts = ["The river rose in March, and the ice went out.", "No one saw the boats before the bridge gave way."]
    result = sl.evals.reconstruction(coder, lm, texts, tokens=40, context=16)

    def loss(write):
        each = []
        for context in spread_contexts(lm, texts, 40, 16):
            batch = pad([context.ids])
            each.append(lm.run(batch, writes=write, logits=token_losses)[1][0, 1:])
        return float(torch.cat(each).mean())

    def zero(x, tokens):
        return torch.where(tokens.positions[..., None] == 0, x, torch.zeros_like(x))

    assert result.ce_clean == pytest.approx(loss([]), abs=1e-5)
    cost = loss([Write(SITE, zero)]) - loss([])
    assert abs(cost) > 0.01 and result.ce_delta_zero_ablation == pytest.approx(cost, abs=1e-4)
