"""Hidden Markov models: the forward algorithm against a sum over all paths, and draws against their probabilities."""

import itertools

import numpy as np
import pytest

import sae_lab as sl
from sae_lab.worlds.markov import EMISSION, TRANSITION, hidden_markov

SMALL = {"transition": [[0.9, 0.1], [0.3, 0.7]], "emission": [[0.8, 0.2, 0.0], [0.1, 0.3, 0.6]], "start": [0.25, 0.75]}


def slow_belief(world, seen):
    """P(state | tokens before) by the probabilities of all paths of states."""
    n, found = len(world.start), np.zeros(len(world.start))
    for path in itertools.product(range(n), repeat=len(seen) + 1):
        p = world.start[path[0]]
        for t, token in enumerate(seen):
            p *= world.emission[path[t], token] * world.transition[path[t], path[t + 1]]
        found[path[-1]] += p
    return found / found.sum()


def test_beliefs_are_sums_over_all_paths():
    world = hidden_markov(**SMALL, sequences=5, length=6, seed=3)
    beliefs, laws, losses = world.beliefs(), world.laws(), world.losses()
    for g, t in itertools.product(range(5), range(6)):
        want = slow_belief(world, world.tokens[g, :t])
        assert np.allclose(beliefs[g, t], want, atol=1e-12)
        assert np.allclose(laws[g, t], want @ world.emission, atol=1e-12)
        assert np.isclose(losses[g, t], -np.log(laws[g, t, world.tokens[g, t]]))


def test_draws_follow_the_probabilities():
    """Frequencies of starts, transitions and tokens, within five standard errors."""
    world = hidden_markov(sequences=4000, length=10, seed=1)
    states, tokens = world.states, world.tokens
    after = np.zeros((4, 4))
    np.add.at(after, (states[:, :-1], states[:, 1:]), 1)
    given = np.zeros((4, 6))
    np.add.at(given, (states, tokens), 1)
    for counts, law in [(after, TRANSITION), (given, EMISSION), (np.bincount(states[:, 0])[None], [[0.25] * 4])]:
        total, law = counts.sum(1, keepdims=True), np.asarray(law)
        assert (abs(counts / total - law) <= 5 * np.sqrt(law * (1 - law) / total) + 1e-12).all()
    assert after[0, 3] == after[2, 0] == 0  # what has no probability never happens


def test_beliefs_are_calibrated():
    """Among all places where the belief in a state is about p, the state is there in about p of them; shuffled over
    sequences it is not."""
    world = hidden_markov(sequences=4000, length=20, seed=2)
    beliefs = world.beliefs()
    hit = np.eye(4)[world.states]
    near = (beliefs > 0.6) & (beliefs < 0.7)
    assert abs(hit[near].mean() - beliefs[near].mean()) < 0.02
    assert hit[near[::-1]].mean() < 0.5


def test_no_law_has_a_lower_loss():
    world = hidden_markov(sequences=500, length=20, seed=4)
    counts = np.bincount(world.tokens.ravel()) / world.tokens.size
    unigram = -np.log(counts[world.tokens])
    known = -np.log(world.emission[world.states, world.tokens])  # who sees the state predicts better
    assert known.mean() < world.losses().mean() < unigram.mean() < np.log(6)


def test_sequences_are_drawn_from_their_seed():
    few, many = hidden_markov(sequences=20, seed=5), hidden_markov(sequences=100, seed=5)
    assert (many.tokens[:20] == few.tokens).all() and (many.states[:20] == few.states).all()
    assert (hidden_markov(sequences=20, seed=6).tokens != few.tokens).mean() > 0.5
    assert len(few) == 20 and few.tokens.shape == (20, 40)
    assert repr(few) == "MarkovSequences(20 of 40 tokens, 4 states, 6 kinds of token, seed 5)"
    assert sl.worlds.hidden_markov is hidden_markov


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sequences": 0}, "sequences must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"transition": [[0.5, 0.5]]}, r"transition must have shape \(1, 1\) for 1 states, got \(1, 2\)"),
        ({"emission": [[0.5, 0.5]]}, r"emission must have shape \(4, kinds of token\) for 4 states, got \(1, 2\)"),
        ({"start": [0.5, 0.5]}, r"start must have shape \(1, 4\)"),
        ({"start": [0.5, 0.5, 0.5, -0.5]}, r"rows of start must be probabilities that sum to 1, got \[0.5, 0.5, 0.5"),
        ({"transition": [[0.5, 0.4], [0.5, 0.5]], "emission": [[1.0], [1.0]]}, "sum to 1, got .0.5, 0.4"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        hidden_markov(**settings)
