"""Synthetic rows whose true features are known, made by ``sae_lab.worlds``: matching and sweeps are tested on them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sae_lab.results import counted
from sae_lab.types import Codes


@dataclass(frozen=True, repr=False)
class World:
    """Data with its true features: ``x = codes · dictionary (+ noise)``. Unpacks as ``x, codes, dictionary, labels``.

    Attributes:
        x: activations, ``samples d``, float32. Rows are independent of each other.
        codes: the true codes, sparse (``codes.dense()`` or ``f``: ``samples n``).
        dictionary: the true directions, ``n d``, unit rows, in descending order of ``labels["probability"]``.
        labels: facts about every feature, each of length n: "probability" (of firing), "parent" (a feature fires only
            if its parent does; -1: no parent), "group" (features of one group fire together; -1: no group); from
            ``product`` also "attribute".
        l0: features active per row, the mean over these samples.
        settings: what ``planted`` or ``product`` was called with.
    """

    x: Float[Tensor, "samples d"]
    codes: Codes
    dictionary: Float[Tensor, "n d"]
    labels: dict[str, Tensor]
    l0: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def f(self) -> Float[Tensor, "samples n"]:
        """The true codes as a dense matrix."""
        return self.codes.dense()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.x, self.codes, self.dictionary, self.labels))

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        s = self.settings
        if "values" in s:
            attributes = " × ".join(map(str, s["values"]))
            return (
                f"World(attributes {attributes} in {counted(s['d'], 'dimension')}; {counted(len(self.x), 'sample')}, "
                f"seed {s['seed']})"
            )
        size = f"{counted(len(self.dictionary), 'feature')} in {counted(self.x.shape[1], 'dimension')}"
        parts = [size, f"{s['law']} law"]
        parts += [f"exponent {s['exponent']}"] if s["law"] == "zipf" else []
        parts += [f"groups of {s['group']} at correlation {s['correlation']}"] if s["correlation"] else []
        parts += [f"{s['hierarchy']} children per parent"] if s["hierarchy"] else []
        parts += [f"noise {s['noise']}"] if s["noise"] else []
        return f"World({', '.join(parts)}; {counted(len(self.x), 'sample')}, L0 {self.l0:.2f}, seed {s['seed']})"
