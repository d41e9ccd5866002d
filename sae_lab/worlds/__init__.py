"""Worlds with known truth: activations made of chosen features, to check what a coder finds.

This room imports neither coders nor language models.
"""

from sae_lab.spelling import no_attribute
from sae_lab.worlds.boards import Games, board_properties, othello, square_name
from sae_lab.worlds.dictionaries import LAWS, MAX_PROBABILITY, World, planted, product

__all__ = [
    "LAWS", "MAX_PROBABILITY", "Games", "World", "board_properties", "othello", "planted", "product", "square_name",
]  # fmt: skip

__getattr__ = no_attribute(__name__, __all__)
