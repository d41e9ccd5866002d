"""What is measured. Every result has named fields, prints as a table, and has ``.to_pandas()``."""

from sae_lab.evals.choosing import L0Choice, choose_l0
from sae_lab.evals.reconstruction import Reconstruction, reconstruction

__all__ = ["L0Choice", "Reconstruction", "choose_l0", "reconstruction"]
