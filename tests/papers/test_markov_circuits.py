"""What holds by construction in notebooks/papers/markov_circuits.ipynb, on an untrained model."""

from pathlib import Path

import pytest
import torch

import sae_lab as sl
from sae_lab.types import Write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "papers"))
    import markov_circuits

    return markov_circuits


@pytest.fixture
def lm(script):
    return sl.LM(script.make_model(0), tokenizer=script.make_tokenizer(), device="cpu")


def patched(lm, layer, value):
    """Predictions at position 5 of several sequences whose activation there is replaced."""
    ids = sl.worlds.hidden_markov(sequences=6, length=5, seed=1).tokens
    batch = lm.tokenize([[lm.prefix_id, *row] for row in ids.tolist()])

    def put(x, tokens):
        return x if value is None else torch.cat([x[:, :-1], value.expand(len(x), 1, -1)], 1)

    return lm.run(batch, writes=[Write(sl.Site("resid_post", layer), put)])[1][:, -1].softmax(-1)


def test_after_the_last_block_a_patch_alone_makes_the_prediction(lm):
    value = torch.randn(64, generator=torch.Generator().manual_seed(0))
    last, first, none = patched(lm, 1, value), patched(lm, 0, value), patched(lm, 1, None)
    assert torch.allclose(last, last[:1].expand_as(last), atol=1e-6)
    assert (first - first[:1]).abs().max() > 1e-3  # the second block still reads earlier tokens
    assert (none - none[:1]).abs().max() > 1e-3


def test_a_model_sees_the_tokens_before_the_one_it_predicts(script, lm):
    world = sl.worlds.hidden_markov(sequences=2, length=6, seed=3)
    ids, targets = script.as_ids(world)
    assert ids[:, 0].tolist() == [lm.prefix_id] * 2 == [6, 6]
    assert torch.equal(ids[:, 1:], targets[:, :-1]) and torch.equal(targets, torch.from_numpy(world.tokens))
    assert lm.tokenize("a b f").ids.tolist() == [[6, 0, 1, 5]]


def test_the_easy_setting_is_near_the_published_one(script):
    """Exact loss 1.497, best guess of the state 55.7 %, published means over five seeds of 160 sequences."""
    world = sl.worlds.hidden_markov(None, torch.tensor(script.EASY).numpy(), sequences=1000, seed=5)
    assert abs(world.losses().mean() - 1.497) < 0.03
    assert abs((world.beliefs().argmax(-1) == world.states).mean() - 0.557) < 0.02
