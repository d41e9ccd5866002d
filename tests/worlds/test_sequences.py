"""sl.worlds.motifs: motifs stand where it says, and nowhere else by more than chance."""

import numpy as np
import pytest

import sae_lab as sl


def test_motifs_stand_where_it_says():
    world = sl.worlds.motifs(500, 30, kinds=3, size=4, rate=0.1, seed=5)
    inside = world.motif >= 0
    assert ((world.place >= 0) == inside).all() and 0.2 < inside.mean() < 0.45
    assert (world.letters[inside] == world.motifs[world.motif[inside], world.place[inside]]).all()
    begins = np.argwhere(world.place == 0)
    for row, at in begins[:50]:
        assert (world.place[row, at : at + 4] == range(4)).all()
    assert len(begins) * 4 == inside.sum(), "motifs are whole"


def test_the_letters_between_motifs_follow_the_background():
    world = sl.worlds.motifs(4000, 30, seed=1)
    between = world.letters[world.motif < 0]
    shares = np.bincount(between, minlength=20) / len(between)
    assert np.abs(shares - world.background).max() < 4 * np.sqrt(0.25 / len(between))


def test_a_seed_gives_one_world_and_bad_sizes_are_refused():
    one, same, other = (sl.worlds.motifs(20, seed=seed) for seed in (3, 3, 4))
    assert (one.letters == same.letters).all() and not (one.letters == other.letters).all()
    assert repr(one) == "MotifSequences(20 of 40 letters, 8 motifs of 5, seed 3)"
    with pytest.raises(ValueError, match="a motif must fit and rate be a share, got size=9, length=8"):
        sl.worlds.motifs(10, 8, size=9)
