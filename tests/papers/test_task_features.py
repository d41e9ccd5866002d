"""What the cleaning of task vectors rests on: one token's way through the blocks, and what a coefficient may be."""

import pytest
import torch

import sae_lab as sl

from .scripts import script

PROMPTS = ["abc ->", "a longer one ->", "x ->"]


@pytest.fixture(scope="module")
def tf():
    return script("task_features")


def last(tf, lm, edits=()):
    return tf.last_of(lm.logits(PROMPTS, edits), lm.tokenize(PROMPTS).mask)


@torch.no_grad()
def test_the_tail_is_the_model(tf, tiny_lm):
    tail = tf.Tail(tiny_lm, PROMPTS, 0)
    torch.testing.assert_close(tail(tail.own), last(tf, tiny_lm), rtol=1e-4, atol=1e-5)
    vectors = torch.randn(2, tail.own.shape[1], generator=torch.Generator().manual_seed(5))
    by_edit = [last(tf, tiny_lm, [tf.AtLast(sl.Site.of("resid_post-0"), vector)]) for vector in vectors]
    torch.testing.assert_close(tail(vectors[:, None]), torch.stack(by_edit), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tail(vectors[0]), tail(tail.own), atol=1e-3)  # the vector does something


def test_at_most_ten_and_none_negative(tf, tiny_lm, monkeypatch):
    monkeypatch.setattr(tf, "STEPS", (3, 3))
    tail = tf.Tail(tiny_lm, PROMPTS, 0)
    sae = sl.BatchTopK(d_in=tail.own.shape[1], d_sae=128, k=8)
    vector = tail.own.mean(0).detach()
    axes = torch.linalg.qr(torch.randn(sae.d_in, sae.d_in, generator=torch.Generator().manual_seed(6))).Q
    monkeypatch.setattr(tf, "CANDIDATES", min(tf.CANDIDATES, sae.d_in))
    directions, starts, numbers = tf.dictionaries(sae, axes, vector, 0)
    w = tf.cleaned(tail, torch.tensor([3, 4, 5]), sae.b_dec.detach(), directions, starts)
    assert ((w != 0).sum(1) <= tf.MOST).all() and (w[[0, 1, 3]] >= 0).all()
    assert set(numbers[1, w[1] != 0].tolist()) <= set(numbers[1, starts[1] != 0].tolist())  # the ten that were drawn
    turned = directions[3] @ directions[3].T  # the turned dictionary has the angles of its features
    own = sae.W_dec[numbers[3]].detach()
    torch.testing.assert_close(turned, own @ own.T, rtol=1e-4, atol=1e-5)


def test_queries_held_out_are_shown_nowhere(tf, lm):
    split = tf.Split(lm, "antonym", 90)
    held_out = {a for a, _ in split.held_out}
    assert not held_out & {a for a, _ in split.shown}
    shown = {line.split(" -> ")[0] for prompt in split.few_out for line in prompt.splitlines()[:-1]}
    assert shown <= {a for a, _ in split.shown} and len(split.few_out) == len(split.held_out)
