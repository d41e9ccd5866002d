"""Hidden Markov models: sequences of tokens from hidden states, with the exact belief about the state and the exact law
of the next token, which no model of the tokens can beat."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from sae_lab.arguments import Count, as_annotated, check_least

TAG = 0x4D41524B4F56  # part of every seed, as in ``dictionaries``

# The model of Markovian Circuit Tracing (2026, arXiv:2605.20824), as its code has it: three states that stay, and one
# that leaves for any other. Tokens tell the states apart in part only.
TRANSITION = [[0.70, 0.20, 0.10, 0.00], [0.10, 0.60, 0.20, 0.10], [0.00, 0.20, 0.70, 0.10], [0.25, 0.25, 0.25, 0.25]]
EMISSION = [
    [0.45, 0.35, 0.05, 0.05, 0.05, 0.05], [0.05, 0.05, 0.65, 0.10, 0.10, 0.05],
    [0.05, 0.05, 0.05, 0.35, 0.25, 0.25], [0.20, 0.15, 0.15, 0.15, 0.20, 0.15],
]  # fmt: skip


@as_annotated
@dataclass(frozen=True, repr=False)
class MarkovSequences:
    """Sequences of a hidden Markov model. Entry [g, t] is the token that the state at time t of sequence g gave.

    Attributes:
        transition: P(next state | state). emission: P(token | state). start: P(first state).
        tokens, states: what was seen and what was hidden.
    """

    transition: Float[np.ndarray, "n n"]
    emission: Float[np.ndarray, "n vocab"]
    start: Float[np.ndarray, " n"]
    tokens: Int[np.ndarray, "sequences length"]
    states: Int[np.ndarray, "sequences length"] = field(compare=False)
    seed: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        sizes = f"{self.tokens.shape[1]} tokens, {len(self.start)} states, {self.emission.shape[1]} kinds of token"
        return f"MarkovSequences({len(self):,} of {sizes}, seed {self.seed})"

    def beliefs(self) -> Float[np.ndarray, "sequences length n"]:
        """P(state at t | tokens before t), by the forward algorithm: all that the past tells of the future."""
        found = np.empty((*self.tokens.shape, len(self.start)))
        belief = np.broadcast_to(self.start, (len(self), len(self.start)))
        for t, seen in enumerate(self.tokens.T):
            found[:, t] = belief
            after = belief * self.emission[:, seen].T
            belief = after / after.sum(1, keepdims=True) @ self.transition
        return found

    def laws(self) -> Float[np.ndarray, "sequences length vocab"]:
        """P(token at t | tokens before t): what a perfect model predicts."""
        return self.beliefs() @ self.emission

    def losses(self) -> Float[np.ndarray, "sequences length"]:
        """-log P(token at t | tokens before t), in nats: no model's mean loss can be lower but by chance."""
        return -np.log(np.take_along_axis(self.laws(), self.tokens[..., None], -1)[..., 0])


@as_annotated
def hidden_markov(
    transition: Float[np.ndarray, "before after"] | None = None,
    emission: Float[np.ndarray, "states vocab"] | None = None,
    *,
    start: Float[np.ndarray, " first"] | None = None,
    sequences: int = 1000,
    length: int = 40,
    seed: int = 0,
) -> MarkovSequences:
    """``sl.worlds.hidden_markov(sequences=1000, length=40)``: sequences whose hidden states are known.

    The state follows P(next | state) = transition[state], and at each time gives a token by emission[state].

    Args:
        transition, emission: rows of probabilities, one row a state; None: those of Markovian Circuit Tracing
            (arXiv:2605.20824), 4 states and 6 kinds of token.
        start: probabilities of the first state; None: all alike.
        sequences, length: how many, and how many tokens each; the first of many are those of a smaller number.

    Raises ValueError for rows that are no probabilities, or that are not one for each state.
    """
    check_least(1, sequences=sequences, length=length)
    rows = np.asarray(TRANSITION if transition is None else transition)
    n = len(rows)
    matrices = {
        "transition": _probabilities("transition", rows, n, n),
        "emission": _probabilities("emission", np.asarray(EMISSION if emission is None else emission), n),
        "start": _probabilities("start", np.full((1, n), 1 / n) if start is None else start[None], 1, n)[0],
    }
    rng = np.random.default_rng(np.random.SeedSequence([TAG, seed]))
    chances = rng.random((sequences, length, 2))
    tokens, states = np.empty((2, sequences, length), np.int64)
    law = np.broadcast_to(matrices["start"], (sequences, n))
    for t in range(length):
        states[:, t] = _drawn(law, chances[:, t, 0])
        tokens[:, t] = _drawn(matrices["emission"][states[:, t]], chances[:, t, 1])
        law = matrices["transition"][states[:, t]]
    return MarkovSequences(**matrices, tokens=tokens, states=states, seed=seed)


def _probabilities(name: str, rows: np.ndarray, n: int, columns: Count | None = None) -> Float[np.ndarray, "n columns"]:
    """Rows that sum to 1 in float64, or a refusal."""
    if rows.shape != (n, columns or rows.shape[1]):
        wanted = f"({n}, {columns})" if columns else f"({n}, kinds of token)"
        raise ValueError(f"{name} must have shape {wanted} for {n} states, got {rows.shape}: give one row a state")
    sums = rows.astype(np.float64).sum(1, keepdims=True)
    if not (rows >= 0).all() or not (abs(sums - 1) < 1e-4).all():
        at = int(np.argmax((rows < 0).any(1) | ~(abs(sums[:, 0] - 1) < 1e-4)))
        raise ValueError(
            f"rows of {name} must be probabilities that sum to 1, got {rows[at].tolist()}: divide by the sum"
        )
    return rows / sums


def _drawn(laws: np.ndarray, chances: np.ndarray) -> Int[np.ndarray, " rows"]:
    """One draw from each row of probabilities."""
    return (chances[:, None] >= laws.cumsum(1)[:, :-1]).sum(1)
