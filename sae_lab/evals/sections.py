"""The evals of ``sl.evals.report``: what each takes of a coder, and which of its figures stand in the table."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sae_lab.activations.harvesting import harvest
from sae_lab.activations.reconstructing import reconstruction, said_of
from sae_lab.activations.store import Store
from sae_lab.evals.absorbing import absorption
from sae_lab.evals.codelength import description_length
from sae_lab.evals.errors import pathological_errors
from sae_lab.evals.monosemantic import monosemanticity
from sae_lab.evals.position_features import positional
from sae_lab.evals.positions import by_position
from sae_lab.evals.probe_sets import read_probe_sets
from sae_lab.evals.probes import probing
from sae_lab.lm.model import LM
from sae_lab.lm.text import Text
from sae_lab.results import Figure
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site


@dataclass
class Inputs:
    """What the sections of one coder are measured on. ``shared``: what coders of one report have in common."""

    coder: SparseCoder
    lm: LM
    text: Text
    tokens: int
    lm_tokens: int
    seed: int
    sites: tuple[Site, ...]
    shared: dict[Any, Any]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What an earlier section, or another coder, made under this key."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    @property
    def store(self) -> Store:
        """``tokens`` tokens of the text at the site that the coder reads; one pass serves the sites of all coders."""
        whole: Store = self.once("store", lambda: harvest(self.lm, self.sites, self.text, self.tokens))
        return whole.at(self.coder.reads[0]) if len(self.sites) > 1 else whole


def _reconstruction(given: Inputs) -> list[Figure]:
    found = reconstruction(given.coder, given.lm, given.text.held_out, given.lm_tokens)
    pca = f"PCA {found.pca_rank}"
    of = said_of("mean ablation", found.ce_delta_mean_ablation, found.ce_delta_mean_ablation_se)
    return [
        Figure("L0", found.l0, meaning="active features per token", digits=1),
        Figure("FVU", found.fvu, control=found.pca_fvu, control_name=pca, meaning="variance unexplained", best="low"),
        Figure("dCE", found.ce_delta, found.ce_delta_se, found.pca_ce_delta, pca,
               f"nats/token, clean {found.ce_clean:.2f}", "low"),
        Figure("CE recovered", found.ce_recovered, math.nan, found.pca_ce_recovered, pca, of, best="high"),
    ]  # fmt: skip


def _by_position(given: Inputs) -> list[Figure]:
    found = by_position(given.coder, given.lm, given.text.held_out, given.lm_tokens)
    return [f for f in found.figures() if f.measure.startswith("rise")]


def _errors(given: Inputs) -> list[Figure]:
    figures = pathological_errors(
        given.coder, given.lm, given.text.held_out, given.lm_tokens, seed=given.seed
    ).figures()
    wanted = ("ratio, isotropic", "ratio, error_covariance", "ratio, same_angle")
    return [f._replace(measure=f"KL {f.measure}") for f in figures if f.measure in wanted]


def _codes(given: Inputs) -> list[Figure]:
    found = positional(given.coder, given.lm, given.store, given.tokens, seed=given.seed)
    share = found.firings / found.tokens
    figures = found.figures()
    return [
        Figure(
            "dead",
            float((share == 0).float().mean()),
            meaning=f"features silent on {found.tokens:,} tokens",
            best="low",
        ),
        Figure(
            "dense",
            float((share > DENSE).float().mean()),
            meaning=f"features on in more than {DENSE:.0%} of tokens",
            best="low",
        ),
        *(f for f in figures if f.measure.startswith(("features of R2", "largest"))),
    ]


def _description_length(given: Inputs) -> list[Figure]:
    found = description_length(given.coder, given.store)
    return [f for f in found.figures() if f.measure == "bits per token"]


def _monosemanticity(given: Inputs) -> list[Figure]:
    figures = monosemanticity(given.coder, given.store, seed=given.seed).figures()
    return [f for f in figures if f.measure != "median"]


def _probing(given: Inputs) -> list[Figure]:
    site = given.coder.site
    data = given.once(("probe sets", site), lambda: read_probe_sets(given.lm, site, seed=given.seed))
    found = probing(given.coder, given.lm, data, seed=given.seed)
    wanted = (
        "features, k 1: accuracy",
        f"features, k {found.best}: accuracy",
        "neurons, k 1: accuracy",
        "dense: accuracy",
        "features less dense",
        "shuffled labels",
    )
    return [f for f in found.figures() if f.measure in wanted]


def _absorption(given: Inputs) -> list[Figure]:
    found = absorption(given.coder, given.lm, seed=given.seed).figures()
    return [f for f in found if f.measure in ("absorption", "probe F1", "k=1 F1")]


DENSE = 0.1  # of tokens: a feature that fires on more of them is called dense
VERSIONS = {"reconstruction": 3}  # of what a section finds, 1 where none: a higher one does not read what was kept
SECTIONS: dict[str, Callable[[Inputs], list[Figure]]] = {
    "reconstruction": _reconstruction,
    "by position": _by_position,
    "errors": _errors,
    "codes": _codes,
    "description length": _description_length,
    "monosemanticity": _monosemanticity,
    "probing": _probing,
    "absorption": _absorption,
}
