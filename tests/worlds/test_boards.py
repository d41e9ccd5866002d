"""Othello on bitboards against a slow board of lists, and what games say of themselves."""

import numpy as np
import pytest

from sae_lab.worlds.boards import (
    KINDS,
    after_passes,
    board_properties,
    legal_bits,
    othello,
    play,
    square_name,
    start_board,
    unpack,
)


class Slow:
    """The rules written down once more, a square at a time, on a dictionary of discs."""

    def __init__(self, size):
        m = size // 2
        self.size, self.player = size, "B"
        self.discs = {(m - 1, m - 1): "W", (m, m): "W", (m - 1, m): "B", (m, m - 1): "B"}

    def turned(self, row, column, player):
        """Discs that a move would turn."""
        found = []
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                line, r, c = [], row + down, column + right
                while self.discs.get((r, c), player) != player:
                    line.append((r, c))
                    r, c = r + down, c + right
                if line and (r, c) in self.discs:
                    found += line
        return found

    def moves(self, player=None):
        squares = [(r, c) for r in range(self.size) for c in range(self.size) if (r, c) not in self.discs]
        return [s for s in squares if self.turned(*s, player or self.player)]

    def play(self, row, column):
        for square in [*self.turned(row, column, self.player), (row, column)]:
            self.discs[square] = self.player
        self.player = "W" if self.player == "B" else "B"

    def copy(self):
        other = Slow(self.size)
        other.discs, other.player = dict(self.discs), self.player
        return other


def perft(size, depth):
    """How many sequences of moves there are, by length. No pass is possible in so few moves."""
    mine, theirs = (np.array([board]) for board in start_board(size))
    counts = []
    for _ in range(depth):
        rows, squares = unpack(legal_bits(mine, theirs, size), size**2).nonzero()
        mine, theirs = play(mine[rows], theirs[rows], squares, size)
        counts.append(len(mine))
    return counts


def test_perft_of_the_usual_board():
    assert perft(8, 7) == [4, 12, 56, 244, 1396, 8200, 55092]  # known numbers


@pytest.mark.parametrize("size", [4, 6])
def test_perft_against_slow_rules(size):
    boards, counts = [Slow(size)], []
    for _ in range(4):
        after = []
        for board in boards:
            for move in board.moves():
                after.append(board.copy())
                after[-1].play(*move)
        boards = after
        counts.append(len(boards))
    assert perft(size, 4) == counts
    assert counts[:2] == [4, 12]


@pytest.mark.parametrize("size", [4, 6, 8])
def test_games_follow_the_slow_rules(size):
    """Every move, board, list of legal moves, pass and end of random games; small boards pass often."""
    games = othello(size, games=30, seed=3)
    boards, legal = games.boards(), games.legal_moves()
    passes = early = 0
    for g in range(len(games)):
        slow = Slow(size)
        for t in range(games.lengths[g]):
            assert divmod(int(games.moves[g, t]), size) in slow.moves()
            slow.play(*divmod(int(games.moves[g, t]), size))
            other = "W" if slow.player == "B" else "B"
            if not slow.moves() and slow.moves(other):
                slow.player, passes = other, passes + 1
            assert games.black[g, t] == (slow.player == "B")
            want = np.zeros((size, size), int)
            for square, player in slow.discs.items():
                want[square] = 1 if player == slow.player else -1
            assert (boards[g, t].reshape(size, size) == want).all()
            assert {divmod(int(s), size) for s in legal[g, t].nonzero()[0]} == set(slow.moves())
        assert not slow.moves() and not slow.moves("B") and not slow.moves("W")
        early += games.lengths[g] < size**2 - 4
        assert (games.moves[g, games.lengths[g] :] == -1).all()
    assert passes > 0
    assert size != 4 or early > 0


def test_a_pass_by_hand():
    """One row of a 4x4 board, x o . o: o has taken nothing that o could turn, x may go to c1."""
    mine, theirs = np.array([0b1010], np.uint64), np.array([0b0001], np.uint64)  # to move: o at b1 and d1; x at a1
    new_mine, new_theirs, legal, passed = after_passes(mine, theirs, 4)
    assert passed.tolist() == [True]
    assert (new_mine.tolist(), new_theirs.tolist(), legal.tolist()) == ([0b0001], [0b1010], [0b0100])
    after = play(new_mine, new_theirs, np.array([2]), 4)  # x x x o, as o sees it
    assert (after[0].tolist(), after[1].tolist()) == ([0b1000], [0b0111])


def test_nothing_wraps_round_the_edge():
    """d1 theirs, a2 mine: neighbours in number only, so c1 turns nothing."""
    mine, theirs = np.array([1 << 4], np.uint64), np.array([1 << 3], np.uint64)
    assert legal_bits(mine, theirs, 4).tolist() == [0]
    assert legal_bits(np.array([1 << 1], np.uint64), np.array([1 << 2], np.uint64), 4).tolist() == [1 << 3]


def test_games_are_drawn_from_their_seed():
    few, many = othello(6, games=50, seed=5), othello(6, games=200, seed=5)
    assert (many.moves[:50] == few.moves).all() and (many[:50].mine == few.mine).all()
    assert (othello(6, games=50, seed=6).moves != few.moves).mean() > 0.5


def test_moves_are_uniform_over_the_legal_ones():
    """All four first moves in a quarter of games each, within four standard errors (0.0069 each)."""
    first = np.bincount(othello(6, games=4000).moves[:, 0], minlength=36) / 4000
    assert sorted(first.nonzero()[0]) == [8, 13, 22, 27]
    assert abs(first[first > 0] - 0.25).max() < 0.028


def test_shapes_masks_and_text():
    games = othello(6, games=40, seed=1)
    assert games.moves.shape == games.black.shape == (40, 32) and games.boards().shape == (40, 32, 36)
    assert (games.real.sum(1) == games.lengths).all()
    rows, last = np.arange(40), games.lengths - 1
    assert not games.going_on[rows, last].any() and (games.going_on.sum(1) == last).all()
    assert (games.boards()[~games.real] == 0).all()
    words = games.text(0).split()
    assert len(words) == games.lengths[0] and words[0] == square_name(int(games.moves[0, 0]), 6)
    assert square_name(0, 6) == "a1" and square_name(7, 6) == "b2" and square_name(35, 6) == "f6"
    assert "40 of 6x6 Othello" in repr(games)
    discs = (games.boards() != 0).sum(-1)
    assert (discs == np.where(games.real, np.arange(32) + 5, 0)).all()  # a move adds one disc


def test_properties_of_boards():
    games = othello(6, games=10)
    labels, names = board_properties(games)
    assert labels.shape == (10, 32, 144) and len(names) == 144
    assert names[0] == "mine a1" and names[36] == "theirs a1" and names[107] == "empty f6" and names[-1] == "legal f6"
    state = labels[games.real][:, :108].reshape(-1, 3, 36)
    assert (state.sum(1) == 1).all()  # each square is one of the three
    assert (labels[..., 108:] == games.legal_moves()).all()
    moved = labels[np.arange(10), 0, 36 + games.moves[:, 0].astype(int)]
    assert moved.all()  # the disc just placed is the opponent's of who moves next
    assert len(KINDS) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 5}, "size must be one of 4, 6, 8 squares a side, got 5"),
        ({"size": 10}, "size must be one of 4, 6, 8"),
        ({"games": 0}, "games must be at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        othello(**settings)
