"""What notebooks/papers/proteins.ipynb takes for granted: the writer draws from the reader's model."""

import numpy as np
import torch

import sae_lab as sl

from .scripts import script

made = script("proteins")


def test_the_writer_draws_by_the_readers_scores():
    reader = made.Reader(0).requires_grad_(False).eval()
    noise = torch.from_numpy(np.random.default_rng(0).gumbel(size=(3, 9, made.LETTERS)).astype(np.float32))
    letters = made.Writer(reader)(noise)
    assert letters.shape == (3, 9) and torch.equal(letters[:, 0], noise[:, 0].argmax(-1))
    drawn = (reader(letters)[:, :-1] + noise[:, 1:]).argmax(-1)
    assert torch.equal(letters[:, 1:], drawn)


def test_states_of_the_reader_are_the_visits_of_its_cell():
    reader = made.Reader(1).requires_grad_(False).eval()
    letters = torch.arange(12).view(2, 6)
    states = sl.Net(reader).read(letters, made.SITE)
    assert states.shape == (2, 6, made.WIDTH)
    torch.testing.assert_close(reader.out(states), reader(letters))
