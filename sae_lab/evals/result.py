"""Where Figure and Result stood before ``sae_lab.results``."""

from sae_lab.results import Figure as Figure
from sae_lab.results import Result as Result
from sae_lab.results import mean_and_error as mean_and_error
from sae_lab.results import number as number
