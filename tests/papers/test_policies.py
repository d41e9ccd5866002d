"""What notebooks/papers/policies.ipynb takes for granted: measures of recurrence, scores of events, matches."""

import numpy as np
import pytest
import torch

import sae_lab as sl

from .scripts import script

made = script("policies")


def test_recurrence_by_hand():
    episode = np.repeat([0, 1], [4, 6])
    z = np.zeros((10, 3))
    z[[0, 1, 3], 0] = 1, 4, 2  # in one episode: sets in twice, on for 3 of 4 steps
    z[[3, 4], 1] = 2  # in both; an episode's end ends a run
    found = made.recurrence(z, episode)
    assert found[0] == pytest.approx([0.5, 2, 1, 1.5 / 4])
    assert found[1] == pytest.approx([1, 1, 1, (1 / 4 + 1 / 6) / 2])
    assert found[2].tolist() == [0, 0, 0, 0]


def test_what_new_cues_take_away():
    z = np.array([[2.0, 0, 1], [2, 1, 0]])
    assert made.lost(z, z).tolist() == [0, 0, 0]
    assert made.lost(z, np.array([[1.0, 9, 0], [0, 0, 0]])) == pytest.approx([0.75, 1, 1])  # new activation is no help


@pytest.mark.parametrize("at", [0, 2, 3, 6])
def test_templates_are_of_mean_zero_and_norm_one(at):
    q = made.templates(3, at)
    assert q.shape == (3, 7) and abs(q.sum(1)).max() < 1e-9
    norms = np.linalg.norm(q, axis=1)
    assert norms == pytest.approx([1, 1, 1] if at else [1, 0, 0]) and q[0].argmax() == at
    assert (q[1] == -q[2]).all()


def test_scores_find_pulses_and_steps_and_no_constants():
    z = np.zeros((20, 4))
    z[9, 0], z[9:, 1], z[:9, 2], z[:, 3] = 1, 1, 1, 5
    scores = made.event_score(z, 9, 3)
    assert (scores[:3] > 0.5).all() and scores[3] == 0
    assert made.event_score(z, 15, 3)[:2].max() < 1e-9  # far from the event
    assert made.event_score(z, 19, 3).shape == (4,)  # the window is shifted into the episode


def test_keyframes_are_uses_and_clusters_are_their_kinds():
    world = made.fresh(0, 40)
    seen, episode, step, states = made.rows(world)
    assert len(seen) == len(episode) and (np.diff(episode) >= 0).all() and step[0] == 0
    at = made.keyframes(states, episode)
    assert (world.play()[1][step[at], episode[at]] == 4).all() and len(at) == 80
    kind = made.clusters(states, episode, step, at)
    assert len({(k, h) for k, h in zip(kind, states[at, 2], strict=True)}) == 2
    z = np.zeros((len(seen), 2))
    z[at, 0], z[at[::2] + 3, 1] = 1, 1
    assert made.event_ranking(z, episode, at, kind, 2).argmax() == 0


def test_matches_are_near_and_other_features():
    random = np.random.default_rng(0)
    z = random.random((500, 40)) * (random.random((500, 40)) < np.repeat([0.02, 0.5], 20))
    top = np.array([1, 2, 30])
    found = made.matched(top, z, np.ones(40), 3, random)
    assert len(set(found)) == 3 and not set(found) & set(top.tolist())
    assert ((found < 20) == (top < 20)).all()
    assert made.density(z, np.array([25, 26])) > 0.4 and made.norm(2 * z, np.ones(40), top) == pytest.approx(1, abs=0.2)


def test_a_class_that_can_be_told_is_told():
    random, truth = np.random.default_rng(0), np.arange(100) < 40
    assert made.class_f1(10.0 * truth[:, None], truth, random) == 1
    assert made.class_f1(random.normal(size=(100, 1)), truth, random) < 0.8


def test_files_keep_a_policy_and_its_coder(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "LIMIT", 4)
    monkeypatch.setattr(made, "DATA", tmp_path)
    policy, coder = made.Policy(83), sl.TopK(made.WIDTH, made.FEATURES, k=made.K)
    made.save(tmp_path / "cued-1.safetensors", policy, coder)
    net, again = made.load(1)
    seen = torch.tensor(made.fresh(0, 5).observe(made.fresh(0, 5).first()))
    assert torch.allclose(net.output(seen), policy(seen), atol=1e-2)
    assert torch.allclose(again.W_dec, coder.W_dec, atol=1e-2)
    assert made.success(made.fresh(0, 5), net, [sl.Ablate(again, 0)]).shape == (5,)


def test_new_cues_are_new_and_only_for_cued_episodes():
    world = made.demos(0)[:60]
    other = made.recued(world, 5)
    assert (other.cue[world.cued] != world.cue[world.cued]).any(1).all() and (other.cue[~world.cued] == 0).all()
    assert (other.goal == world.goal).all()
