"""Evaluations of coders. Every result has named fields, prints as a table, and has ``.to_pandas()``."""

from sae_lab.activations.reconstructing import Reconstruction, reconstruction
from sae_lab.evals.absorbing import Absorption, absorption
from sae_lab.evals.agreement import Consistency, Pair, Transfer, consistency, transfer
from sae_lab.evals.choosing import L0Choice, choose_l0
from sae_lab.evals.claims import Claim, Verdicts, claim, verdicts
from sae_lab.evals.codelength import DescriptionLength, description_length
from sae_lab.evals.composing import Composition, composition
from sae_lab.evals.concept_cones import Cones, cones
from sae_lab.evals.errors import Errors, pathological_errors
from sae_lab.evals.fitting import Probe, fit_probe
from sae_lab.evals.games import BoardGames, BoardScores, board_games, othello_gpt, untrained_twin
from sae_lab.evals.hesitation import Question, Uncertainty, synthetic_qa, uncertainty
from sae_lab.evals.injection import Injection, token_injection
from sae_lab.evals.known_parents import PlantedAbsorption, planted_absorption
from sae_lab.evals.monosemantic import Monosemanticity, monosemanticity
from sae_lab.evals.position_features import Positional, positional
from sae_lab.evals.positions import ByPosition, Hill, by_position, hill
from sae_lab.evals.probe_sets import DEFAULT_SETS, ProbeData, ProbeSet, available_sets, probe_set, read_probe_sets
from sae_lab.evals.probes import Probing, probing
from sae_lab.evals.reporting import Report, report
from sae_lab.evals.sections import SECTIONS
from sae_lab.evals.stitches import Stitching, stitching
from sae_lab.results import Figure, Result
from sae_lab.spelling import no_attribute

__all__ = [
    "DEFAULT_SETS", "SECTIONS", "Absorption", "BoardGames", "BoardScores", "ByPosition", "Claim", "Composition",
    "Cones", "Consistency", "DescriptionLength", "Errors", "Figure", "Hill", "Injection", "L0Choice", "Monosemanticity",
    "Pair", "PlantedAbsorption", "Positional", "Probe", "ProbeData", "ProbeSet", "Probing", "Question",
    "Reconstruction", "Report", "Result", "Stitching", "Transfer", "Uncertainty", "Verdicts", "absorption",
    "available_sets", "board_games", "by_position", "choose_l0", "claim", "composition", "cones", "consistency",
    "description_length", "fit_probe", "hill", "monosemanticity", "othello_gpt", "pathological_errors",
    "planted_absorption", "positional", "probe_set", "probing", "read_probe_sets", "reconstruction", "report",
    "stitching", "synthetic_qa", "token_injection", "transfer", "uncertainty", "untrained_twin", "verdicts",
]  # fmt: skip

__getattr__ = no_attribute(__name__, __all__)
