"""The evals of ``sl.evals.report``: the inputs of each, and the figures that it adds to the table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sae_lab.activations.harvesting import harvest
from sae_lab.activations.reconstructing import reconstruction
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
from sae_lab.results import Figure, Result, counted
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site

DENSE = 0.1  # of tokens: a feature that fires on more of them is called dense


@dataclass
class Inputs:
    """The inputs of one coder's sections. ``shared``: results that all coders of one report share."""

    coder: SparseCoder
    lm: LM
    text: Text
    tokens: int
    lm_tokens: int
    seed: int
    sites: tuple[Site, ...]
    shared: dict[Any, Any]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value under this key, made on the first call by any section of any coder."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    @property
    def store(self) -> Store:
        """``tokens`` tokens of the text at the site that the coder reads; one pass serves the sites of all coders."""
        whole: Store = self.once("store", lambda: harvest(self.lm, self.sites, self.text, self.tokens))
        return whole.at(self.coder.reads[0]) if len(self.sites) > 1 else whole

    @property
    def spliced(self) -> tuple[SparseCoder, LM, Text, int]:
        """The arguments of evals that splice the coder into the model."""
        return self.coder, self.lm, self.text.held_out, self.lm_tokens


def _some(found: Result, *keys: str) -> list[Figure]:
    return [found.figure(key) for key in keys]


def _errors(given: Inputs) -> list[Figure]:
    found = pathological_errors(*given.spliced, seed=given.seed)
    ratios = _some(found, "ratio isotropic", "ratio error_covariance", "ratio same_angle")
    return [ratio._replace(measure=f"KL {ratio.measure}") for ratio in ratios]


def _codes(given: Inputs) -> list[Figure]:
    found = positional(given.coder, given.lm, given.store, given.tokens, seed=given.seed)
    share = found.firings / found.tokens
    dead, dense = (float(which.float().mean()) for which in (share == 0, share > DENSE))
    return [
        Figure("dead", dead, meaning=f"features silent on {counted(found.tokens, 'token')}", best="low", key="dead"),
        Figure("dense", dense, meaning=f"features on in more than {DENSE:.0%} of tokens", best="low", key="dense"),
        *_some(found, "strong", "largest"),
    ]


def _probing(given: Inputs) -> list[Figure]:
    site = given.coder.site
    data = given.once(("probe sets", site), lambda: read_probe_sets(given.lm, site, seed=given.seed))
    found = probing(given.coder, given.lm, data, seed=given.seed)
    accuracies = (f"accuracy {probe}" for probe in ("features 1", f"features {found.best}", "neurons 1", "dense all"))
    return _some(found, *accuracies, "less dense", "shuffled")


VERSION = 4  # of the sections: cached figures of another version are measured again
SECTIONS: dict[str, Callable[[Inputs], list[Figure]]] = {
    "reconstruction": lambda of: _some(reconstruction(*of.spliced), "l0", "fvu", "ce_delta", "ce_recovered"),
    "by position": lambda of: _some(by_position(*of.spliced), "rise", "fvu_rise"),
    "errors": _errors,
    "codes": _codes,
    "description length": lambda of: _some(description_length(of.coder, of.store), "bits"),
    "monosemanticity": lambda of: _some(
        monosemanticity(of.coder, of.store, seed=of.seed), "score", "neurons", "random"
    ),
    "probing": _probing,
    "absorption": lambda of: _some(absorption(of.coder, of.lm, seed=of.seed), "rate", "probe_f1", "k1_f1"),
}
