"""Worlds with known truth: activations made of chosen features, games, a gridworld, hidden Markov models, sequences
with motifs, and images of digits.

This room imports neither coders nor language models.
"""

from sae_lab.spelling import no_attribute
from sae_lab.worlds.boards import Games, board_properties, othello, square_name
from sae_lab.worlds.dictionaries import LAWS, MAX_PROBABILITY, World, planted, product
from sae_lab.worlds.grids import Gridworld, gridworld
from sae_lab.worlds.handwriting import Digits, digits
from sae_lab.worlds.markov import MarkovSequences, hidden_markov
from sae_lab.worlds.sequences import MotifSequences, motifs

__all__ = [
    "LAWS", "MAX_PROBABILITY", "Digits", "Games", "Gridworld", "MarkovSequences", "MotifSequences", "World",
    "board_properties", "digits", "gridworld", "hidden_markov", "motifs", "othello", "planted", "product",
    "square_name",
]  # fmt: skip

__getattr__ = no_attribute(__name__, __all__)
