"""A gridworld of two rooms, with a planner that solves it and cues that can only be known by heart."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int, Int8

from sae_lab.arguments import as_annotated, check_least

TAG = 0x47524944  # part of every seed, as in ``dictionaries``
BITS = 32
MOVES = np.array([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0]])  # up, down, left, right, use

States = Int[np.ndarray, "episodes 4"]


@as_annotated
@dataclass(frozen=True, repr=False)
class Gridworld:
    """Episodes of a gridworld. A state is (row, column, has the key, door is open) of every episode.

    Attributes:
        start, key, goal: squares (row, column). door: its row in the wall between the rooms.
        cued: episodes that do not show their goal. cue: bits, -1 or 1, that they show instead; of others 0.
    """

    start: Int[np.ndarray, "episodes 2"]
    key: Int[np.ndarray, "episodes 2"]
    door: Int[np.ndarray, " episodes"]
    goal: Int[np.ndarray, "episodes 2"]
    cued: Bool[np.ndarray, " episodes"]
    cue: Int8[np.ndarray, "episodes bits"]
    size: int = 7
    seed: int = 0

    def __len__(self) -> int:
        return len(self.door)

    def __repr__(self) -> str:
        said = f"{len(self):,} episodes of {self.size}x{self.size}, {self.cued.sum():,} cued"
        return f"Gridworld({said}, seed {self.seed})"

    def __getitem__(self, rows: slice | np.ndarray) -> "Gridworld":
        """Some of the episodes."""
        parts = ("start", "key", "door", "goal", "cued", "cue")
        return replace(self, **{name: getattr(self, name)[rows] for name in parts})

    def first(self) -> States:
        """The states in which the episodes begin."""
        return np.concatenate([self.start, np.zeros_like(self.start)], 1)

    def done(self, states: States) -> Bool[np.ndarray, " episodes"]:
        """Whether the goal is reached."""
        return (states[:, :2] == self.goal).all(1)

    def observe(self, states: States) -> Float[np.ndarray, "episodes channels"]:
        """What is seen: row and column, one-hot, of agent, key (until it is taken) and goal (unless cued), the door's
        row, whether the key is held and the door open, and the cue."""
        one, keyless, shown = np.eye(self.size), 1 - states[:, 2:3], 1 - self.cued[:, None]
        squares = [one[states[:, :2]], one[self.key] * keyless[..., None], one[self.goal] * shown[..., None]]
        seen = [*(s.reshape(len(self), 2 * self.size) for s in squares), one[self.door], states[:, 2:], self.cue]
        return np.concatenate(seen, 1, dtype=np.float32)

    def expert(self, states: States) -> Int[np.ndarray, " episodes"]:
        """The number of the action, in ``MOVES``, on a shortest way: to the key, to the door, to the goal; along the
        column first, but straight through the door."""
        held, opened, at_row = states[:, 2] > 0, states[:, 3] > 0, states[:, 0] == self.door
        by_door = np.stack([self.door, np.full(len(self), self.size // 2 - 1)], 1)
        left = opened & (states[:, 1] <= self.size // 2)  # the door is still to be gone through
        to = np.where((opened & (at_row | ~left))[:, None], self.goal, by_door)
        down, right = (np.where(held[:, None], to, self.key) - states[:, :2]).T
        sideways = np.where(right == 0, 4, np.where(right < 0, 2, 3))
        return np.where((down == 0) | (left & at_row), sideways, np.where(down < 0, 0, 1))

    def after(self, states: States, actions: Int[np.ndarray, " episodes"]) -> States:
        """The states that actions lead to. "use" takes the key on the agent's square, or opens the door next to it with
        the key; walls, and a closed door, stop a move; an episode that is done stays as it is."""
        to, wall = np.clip(states[:, :2] + MOVES[actions], 0, self.size - 1), self.size // 2
        stopped = (to[:, 1] == wall) & ~((to[:, 0] == self.door) & (states[:, 3] > 0))
        by_door = (states[:, 0] == self.door) & (states[:, 1] == wall - 1)
        opened = states[:, 3] | ((actions == 4) & (states[:, 2] > 0) & by_door)
        held = states[:, 2] | ((actions == 4) & (states[:, :2] == self.key).all(1))
        found = np.column_stack([np.where(stopped[:, None], states[:, :2], to), held, opened])
        return np.where(self.done(states)[:, None], states, found)

    def play(
        self, policy: Callable[[np.ndarray, int], np.ndarray] | None = None, steps: int = 40
    ) -> tuple[Int[np.ndarray, "steps_1 episodes 4"], Int[np.ndarray, "steps episodes"]]:
        """(states, actions) when ``policy(observations, step)`` gives the actions; None: the expert's."""
        states, actions = [self.first()], []
        for step in range(steps):
            acts = self.expert(states[-1]) if policy is None else policy(self.observe(states[-1]), step)
            actions.append(np.asarray(acts))
            states.append(self.after(states[-1], actions[-1]))
        return np.stack(states), np.stack(actions)


@as_annotated
def gridworld(episodes: int = 100, *, cued: float = 0.0, size: int = 7, seed: int = 0) -> Gridworld:
    """``sl.worlds.gridworld(episodes=100, cued=0.2)``: two rooms; take the key, open the door, reach the goal.

    A share ``cued`` of the episodes, the first ones, does not show the goal but a cue of its own, random bits: who
    goes straight to the goal there knows the episode by heart. ``size`` is odd. ValueError for sizes below 5 or even.
    """
    check_least(1, episodes=episodes)
    check_least(5, size=size)
    if size % 2 == 0 or not 0 <= cued <= 1:
        raise ValueError(f"size must be odd and cued a share from 0 to 1, got size={size} and cued={cued}")
    rng = np.random.default_rng(np.random.SeedSequence([TAG, seed]))
    left, half = size // 2, np.arange(episodes) < round(cued * episodes)
    start, key = (rng.integers(0, [size, left], (episodes, 2)) for _ in range(2))
    goal = rng.integers([0, left + 1], [size, size], (episodes, 2))
    door = rng.integers(0, size, episodes)
    numbers = rng.choice(2**BITS, episodes, replace=False)
    cue = (2 * (numbers[:, None] >> np.arange(BITS) & 1) - 1) * half[:, None]
    return Gridworld(start, key, door, goal, half, cue.astype(np.int8), size, seed)
