"""Published claims about families, on the bundled model and real text. Small coders, few tokens: what holds at this
size is asserted, and what does not is asserted too, with the number that was measured."""

import pytest
import torch

import sae_lab as sl
from sae_lab.saes import losses

READS, WRITES, STREAM = sl.Site("mlp_in", 8), sl.Site("mlp_out", 8), sl.Site("resid_post", 8)
CONFIG = sl.TrainConfig(tokens=250_000, batch_size=2048)


@pytest.fixture(scope="module")
def store(lm, tmp_path_factory):
    sites = [READS, WRITES, STREAM]
    return sl.harvest(lm, sites, sl.load_text(), tokens=40_000, path=tmp_path_factory.mktemp("text") / "store")


def test_tokenized_gains_nothing_in_the_middle_of_the_model(lm, store):
    """Published: a lookup by token explains more at equal k. After block 8 it does not: FVU .255, without it .253. The
    control, each token's mean alone, leaves .58: what the lookup knows, the features know as well."""
    rows = store.at(STREAM)
    unseen = rows.unseen(16_384)
    vocab, x = len(lm.tokenizer), unseen.x

    def fvu(coder):
        with torch.no_grad():
            return float(losses.fvu(coder(x, unseen.tokens).x_hat, x))

    plain, tokenized = sl.BatchTopK(x.shape[1], 1152, k=32), sl.Tokenized(x.shape[1], 1152, vocab, k=32)
    sl.train(plain, rows, CONFIG)
    sl.train(tokenized, rows, CONFIG)
    sums, counts = torch.zeros(vocab, x.shape[1]), torch.zeros(vocab)
    for step in range(-(-rows.training_rows // 4096)):
        batch = rows.batch(step, 4096)
        sums.index_add_(0, batch.tokens, batch.x)
        counts.index_add_(0, batch.tokens, torch.ones(len(batch.x)))
    means = (sums + sums.sum(0) / counts.sum()) / (counts + 1)[:, None]
    control = float(losses.fvu(means[unseen.tokens], x))
    assert abs(fvu(tokenized) - fvu(plain)) < 0.02
    assert control > fvu(plain) + 0.2


def test_a_transcoder_of_few_tokens_costs_more_than_an_sae(lm, store):
    """Published: within .02 of CE recovered of an SAE on the MLP's output. Trained on 40,000 tokens it costs .031 nats
    more, with a standard error of .008 (paired by token, clustered by document): an SAE copies what it is given, a
    transcoder has to learn what the layer does. Of the zero ablation both recover most. With 4608 features and three
    million tokens of training on 300,000 (too long for a test) the cost falls to .007 nats: CE recovered .836 to the
    SAE's .874 (zero ablation, 11,837 tokens), which is still not within .02."""
    held_out = sl.load_text().held_out
    d = store.at(READS).width
    sae, transcoder = sl.BatchTopK(d, 1152, k=32), sl.Transcoder(d, 1152, k=32)
    transcoder.reads, transcoder.writes = (READS,), (WRITES,)
    sl.train(sae, store.at(WRITES), CONFIG)
    sl.train(transcoder, store, CONFIG)
    assert (transcoder.reads, transcoder.writes) == ((READS,), (WRITES,)) and sae.reads == (WRITES,)
    results = [sl.evals.reconstruction(c, lm, held_out, tokens=1500) for c in (sae, transcoder)]
    difference, error = results[1].minus(results[0])
    assert 2 * error < difference < 0.08, "under two standard errors the claim holds: rejoice and say so"
    assert all(0 < r.ce_delta < 0.6 * r.ce_delta_zero_ablation for r in results)
    with pytest.raises(ValueError, match="not measured on the same tokens: give both evals the same text and tokens"):
        results[0].minus(sl.evals.reconstruction(sae, lm, held_out, tokens=300))
