"""The gridworld: its planner against a search of all states, its rules by hand, and cues that tell nothing else."""

from collections import deque

import numpy as np
import pytest

import sae_lab as sl
from sae_lab.worlds import gridworld


def shortest(world, episode):
    """The number of steps of a shortest way to the goal, by a search of all states."""
    one = world[episode : episode + 1]
    start = tuple(one.first()[0])
    far, waiting = {start: 0}, deque([start])
    while waiting:
        state = waiting.popleft()
        if one.done(np.array([state]))[0]:
            return far[state]
        for action in range(5):
            to = tuple(one.after(np.array([state]), np.array([action]))[0].tolist())
            if to not in far:
                far[to] = far[state] + 1
                waiting.append(to)
    raise AssertionError("no way")


def test_the_planner_takes_a_shortest_way():
    world = gridworld(12, cued=0.2, seed=3)
    states, actions = world.play()
    assert states.shape == (41, 12, 4) and actions.shape == (40, 12) and world.done(states[-1]).all()
    steps = (~np.stack([world.done(s) for s in states])).sum(0)
    assert steps.tolist() == [shortest(world, i) for i in range(12)]


def test_the_planner_goes_on_from_anywhere():
    """From states that it would not come to itself."""
    world, random = gridworld(200, seed=4), np.random.default_rng(0)
    strayed, _ = world.play(lambda seen, step: random.integers(0, 5, len(seen)), steps=60)
    states = strayed[-1]
    for _ in range(60):
        states = world.after(states, world.expert(states))
    assert world.done(states).all()


def test_walls_doors_and_keys():
    world = gridworld(1, seed=0)
    row, (at, left) = int(world.door[0]), world.key[0]
    here, use, right = np.array([[row, 2, 0, 0]]), np.array([4]), np.array([3])
    assert world.after(here, right).tolist() == here.tolist()  # a closed door
    assert world.after(here, use).tolist() == here.tolist()  # without the key
    opened = world.after(np.array([[row, 2, 1, 0]]), use)
    assert opened.tolist() == [[row, 2, 1, 1]] and world.after(opened, right).tolist() == [[row, 3, 1, 1]]
    assert world.after(np.array([[(row + 1) % 7, 2, 1, 1]]), right)[0, 1] == 2  # a wall
    assert world.after(np.array([[at, left, 0, 0]]), use).tolist() == [[at, left, 1, 0]]
    done = np.array([[*world.goal[0], 1, 1]])
    assert world.done(done)[0] and world.after(done, np.array([0])).tolist() == done.tolist()


def test_what_is_seen():
    world = gridworld(50, cued=0.5, seed=5)
    assert len(world) == 50 and repr(world) == "Gridworld(50 episodes of 7x7, 25 cued, seed 5)"
    seen = world.observe(world.first())
    assert seen.shape == (50, 6 * 7 + 7 + 2 + 32) and seen.dtype == np.float32
    goal, cue = seen[:, 28:42], seen[:, -32:]
    assert (goal[:25] == 0).all() and (goal[25:].sum(1) == 2).all()
    assert (abs(cue[:25]) == 1).all() and (cue[25:] == 0).all() and len({tuple(c) for c in cue[:25]}) == 25
    held = world.first()
    held[:, 2] = 1
    assert (world.observe(held)[:, 14:28] == 0).all()  # a key that is taken is not there


def test_cues_change_nothing_but_what_is_shown():
    cued, plain = gridworld(30, cued=1.0, seed=6), gridworld(30, seed=6)
    assert (cued.play()[0] == plain.play()[0]).all() and not plain.cued.any()
    assert (gridworld(30, seed=7).goal != plain.goal).any() and sl.worlds.gridworld is gridworld
    assert (cued.observe(cued.first())[:, :28] == plain.observe(plain.first())[:, :28]).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"size": 3}, "size must be at least 5, got 3"),
        ({"size": 6}, "size must be odd and cued a share from 0 to 1, got size=6 and cued=0.0"),
        ({"cued": 1.5}, "got size=7 and cued=1.5"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        gridworld(**settings)
