"""Random games of Othello, many at once on bitboards: sequences whose hidden state, the board, is known.

Square row·size + column is the bit of the same number in a board's uint64. A player who cannot move passes, and a pass
is no move: the other then moves twice, as in the sequences that Othello-GPT is trained on (Li et al. 2022,
arXiv:2210.13382). "Mine" and "theirs" are relative to the player to move, as such models see the board (Nanda et al.
2023, arXiv:2309.00941).
"""

from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Int, Int8, Shaped, UInt64

from sae_lab.arguments import Count, as_annotated, check_least

TAG = 0x4F5448454C4C4F  # part of every seed, as in ``dictionaries``
SIZES = (4, 6, 8)
_DIRECTIONS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]
_CHUNK = 16_384  # games played at once

Bits = UInt64[np.ndarray, "*n"]


@as_annotated
@dataclass(frozen=True, repr=False)
class Games:
    """Games of Othello. Entry [g, t] describes game g just after its move number t; behind its end moves are -1 and
    boards 0.

    Attributes:
        moves: the square each move goes to, ``games length``; length = size² − 4, the most moves a game can have.
        lengths: how many moves each game had.
        mine, theirs: discs of the player to move next and of the other, as bitboards. After a game's last move "mine"
            is the opponent of the player who moved last.
        legal: squares that the player to move may go to, as bitboards; 0 after the last move.
        black: whether the player to move is Black, who began.
    """

    size: int
    moves: Int8[np.ndarray, "games length"]
    lengths: Int[np.ndarray, " games"]
    mine: UInt64[np.ndarray, "games length"] = field(compare=False)
    theirs: UInt64[np.ndarray, "games length"] = field(compare=False)
    legal: UInt64[np.ndarray, "games length"] = field(compare=False)
    black: Bool[np.ndarray, "games length"] = field(compare=False)
    seed: int = 0

    def __len__(self) -> int:
        return len(self.moves)

    def __getitem__(self, rows: slice) -> "Games":
        """Some of the games."""
        parts = {name: getattr(self, name)[rows] for name in ("moves", "lengths", "mine", "theirs", "legal", "black")}
        return replace(self, **parts)

    def __repr__(self) -> str:
        mean = float(self.lengths.mean()) if len(self) else 0.0
        return f"Games({len(self):,} of {self.size}x{self.size} Othello, {mean:.1f} moves on average, seed {self.seed})"

    @property
    def real(self) -> Bool[np.ndarray, "games length"]:
        """True where there was a move."""
        return self.moves >= 0

    @property
    def going_on(self) -> Bool[np.ndarray, "games length"]:
        """True where there was a move and another one follows: where a model has something to predict."""
        return self.legal != 0

    def boards(self) -> Int8[np.ndarray, "games length squares"]:
        """The board after each move, as the player to move sees it: 1 mine, -1 theirs, 0 empty."""
        squares = self.size**2
        return unpack(self.mine, squares).astype(np.int8) - unpack(self.theirs, squares)

    def legal_moves(self) -> Bool[np.ndarray, "games length squares"]:
        """Where the player to move may go, after each move."""
        return unpack(self.legal, self.size**2)

    def text(self, game: Count) -> str:
        """One game's moves by their names: ``d2 c2 b2 ...``."""
        return " ".join(square_name(int(s), self.size) for s in self.moves[game, : self.lengths[game]])


@as_annotated
def square_name(square: Count, size: Count) -> str:
    """A square as players write it: column letter and row number, ``a1`` the top left."""
    return f"{chr(ord('a') + square % size)}{square // size + 1}"


@as_annotated
def othello(size: int = 6, games: int = 1000, seed: int = 0) -> Games:
    """``sl.worlds.othello(6, games=1000)``: games in which every move is drawn uniformly from the legal ones.

    Args: size: 4, 6 or 8 squares a side. games: how many; the first of many games are those of a smaller number.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(map(str, SIZES))} squares a side, got {size}")
    check_least(1, games=games)
    rng = np.random.default_rng(np.random.SeedSequence([TAG, size, seed]))
    length = size**2 - 4
    moves = np.full((games, length), -1, np.int8)
    boards = {name: np.zeros((games, length), np.uint64) for name in ("mine", "theirs", "legal")}
    played = Games(size, moves, np.zeros(games, int), **boards, black=np.zeros((games, length), bool), seed=seed)
    for start in range(0, games, _CHUNK):
        part = played[start : start + _CHUNK]
        _play_out(rng.random(part.moves.shape, dtype=np.float32), part)
    return replace(played, lengths=played.real.sum(1))


def _play_out(chances: np.ndarray, games: Games) -> None:
    """Play games to their ends, a move of all at a time, into their arrays."""
    size, moves = games.size, games.moves
    going = np.arange(len(moves))
    mine, theirs = (np.full(len(moves), board, np.uint64) for board in start_board(size))
    to_move = np.ones(len(moves), bool)
    can = legal_bits(mine, theirs, size)
    for turn in range(moves.shape[1]):
        options = unpack(can, size**2)
        picked = (chances[going, turn] * options.sum(1)).astype(np.int64)  # below the count: chances are below 1
        square = (options.cumsum(1) > picked[:, None]).argmax(1)
        mine, theirs = play(mine, theirs, square, size)
        to_move = ~to_move
        mine, theirs, can, passed = after_passes(mine, theirs, size)
        to_move ^= passed
        for into, value in (
            (moves, square), (games.black, to_move), (games.mine, mine), (games.theirs, theirs), (games.legal, can),
        ):  # fmt: skip
            into[going, turn] = value
        on = can != 0
        going, mine, theirs, can, to_move = going[on], mine[on], theirs[on], can[on], to_move[on]


def start_board(size: int) -> tuple[np.uint64, np.uint64]:
    """(Black's discs, White's) at the start, Black to move: White on the main diagonal of the centre."""
    m = size // 2
    white = (1 << ((m - 1) * size + m - 1)) | (1 << (m * size + m))
    black = (1 << ((m - 1) * size + m)) | (1 << (m * size + m - 1))
    return np.uint64(black), np.uint64(white)


def legal_bits(mine: Bits, theirs: Bits, size: int) -> Bits:
    """Where the player of ``mine`` may go: empty squares from which a line of theirs ends at one of mine."""
    legal = np.zeros_like(mine)
    for direction in _DIRECTIONS:
        line = _shift(mine, direction, size) & theirs
        for _ in range(size - 3):  # a line holds at most size − 2 of theirs
            line |= _shift(line, direction, size) & theirs
        legal |= _shift(line, direction, size)
    return legal & ~(mine | theirs)


def play(mine: Bits, theirs: Bits, square: Int[np.ndarray, "*n"], size: int) -> tuple[Bits, Bits]:
    """(mine, theirs) after a legal move, as the opponent sees them: sides are swapped."""
    move = np.uint64(1) << square.astype(np.uint64)
    flipped = np.zeros_like(mine)
    for direction in _DIRECTIONS:
        line = _shift(move, direction, size) & theirs
        for _ in range(size - 3):
            line |= _shift(line, direction, size) & theirs
        closed = _shift(line, direction, size) & mine
        flipped |= np.where(closed != 0, line, np.uint64(0))
    return theirs & ~flipped, mine | move | flipped


def after_passes(mine: Bits, theirs: Bits, size: int) -> tuple[Bits, Bits, Bits, Bool[np.ndarray, "*n"]]:
    """(mine, theirs, legal, passed): sides are swapped where who is to move has no move and the other has one."""
    can, other = legal_bits(mine, theirs, size), legal_bits(theirs, mine, size)
    passed = (can == 0) & (other != 0)
    mine, theirs = np.where(passed, theirs, mine), np.where(passed, mine, theirs)
    return mine, theirs, np.where(passed, other, can), passed


def unpack(bits: Bits, squares: int) -> Bool[np.ndarray, "*n squares"]:
    """Bitboards as arrays of squares."""
    little = np.ascontiguousarray(bits).astype("<u8")[..., None].view(np.uint8)
    return np.unpackbits(little, axis=-1, count=squares, bitorder="little").astype(bool)


def _shift(bits: np.ndarray, direction: tuple[int, int], size: int) -> np.ndarray:
    """Every disc one step in a direction, without those that leave the board."""
    row, column = direction
    step = row * size + column
    moved = bits << np.uint64(step) if step > 0 else bits >> np.uint64(-step)
    return moved & _LANDS[size, column]


# Squares that a step to a side can end on: all but the column that a step over the edge would wrap round to.
_LANDS = {
    (size, side): np.uint64(sum(1 << s for s in range(size**2) if s % size != {1: 0, -1: size - 1}.get(side)))
    for size in SIZES
    for side in (-1, 0, 1)
}


@as_annotated
def board_properties(games: Games) -> tuple[Shaped[np.ndarray, "games length properties"], list[str]]:
    """(labels, names): for every square "mine", "theirs", "empty" and "legal" (a move may go there).

    Squares are in their order, all of one kind after another: property kind·size² + square.
    """
    board = games.boards()
    labels = np.concatenate([board == 1, board == -1, board == 0, games.legal_moves()], -1)
    squares = range(games.size**2)
    return labels, [f"{kind} {square_name(s, games.size)}" for kind in KINDS for s in squares]


KINDS = ("mine", "theirs", "empty", "legal")
