"""What is measured. Every result has named fields, prints as a table, and has ``.to_pandas()``."""

from sae_lab.evals.reconstruction import Reconstruction, reconstruction

__all__ = ["Reconstruction", "reconstruction"]
