"""sl.features: which features are active at each token of a prompt. Needs a coder and a model, no index."""

from collections.abc import Sequence
from dataclasses import field, replace

import numpy as np
import torch
from torch import Tensor

from sae_lab.activations.reading import read_codes, require_fits
from sae_lab.arguments import as_annotated
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompts, Token
from sae_lab.noting import Names
from sae_lab.results import Beside, Name, Result, result
from sae_lab.saes.base import SparseCoder

WORDS = 24  # letters of a name between two numbers


@result
class FeatureTable(Result):
    """Active features, one entry each, strongest first within a token.

    prompt, position, feature: int tensors; value: float tensor (activations). tokens: the tokens of each prompt;
    left_out: (prompt, position) of tokens that the coder's mask leaves out, which have no features. names: what the
    features are called.
    """

    prompt: Tensor
    position: Tensor
    feature: Tensor
    value: Tensor
    tokens: list[list[Token]]
    left_out: set[tuple[int, int]]
    names: Names = field(default_factory=Names, repr=False)

    def top(self, n: int = 5) -> "FeatureTable":
        """Only the n strongest features of each token."""
        if n < 1:
            raise ValueError(f"top needs n >= 1, got {n}")
        key = self.prompt * (int(self.position.max()) + 1 if len(self.position) else 1) + self.position
        first = torch.searchsorted(key, key)  # where each token's entries begin
        keep = torch.arange(len(key)) - first < n
        return replace(self, **{name: getattr(self, name)[keep] for name in ("prompt", "position", "feature", "value")})

    @property
    def token(self) -> list[str]:
        """The token of each entry."""
        return [self.tokens[b][p].label for b, p in zip(self.prompt.tolist(), self.position.tolist(), strict=True)]

    @property
    def name(self) -> list[str]:
        """The feature's name of each entry, "" where it has none."""
        found = self.names.of(self.feature.unique().tolist())
        return [found.get(f, "") for f in self.feature.tolist()]

    _records = ("prompt", "position", "token", "feature", "name", "value")
    _align = "><"

    def _rows(self) -> list[tuple[str, ...]]:
        """(token, its features) for every token."""
        entries: dict[tuple[int, int], list[str]] = {}
        columns = [c.tolist() for c in (self.prompt, self.position, self.feature, self.value)]
        for b, p, f, v, name in zip(*columns, self.name, strict=True):
            named = [f"{f}", Name(name, WORDS), f"({v:.1f})"]
            entries.setdefault((b, p), []).append(Beside(*filter(None, named), between=" "))
        left_out = {place: ["left out"] for place in self.left_out}
        rows = [
            (repr(token.label), Beside(*(left_out | entries).get((b, p), ["-"]), between="  "))
            for b, row in enumerate(self.tokens)
            for p, token in enumerate(row)
        ]
        return [("token", "feature (activation)"), *rows]


@as_annotated
def features(lm: LM, coder: SparseCoder, prompts: Prompts | Sequence[str]) -> FeatureTable:
    """The features active at each token of the prompts, as a token x feature table.

    ``.top(5)`` keeps the strongest of each token; ``.to_pandas()`` is the long form. Tokens that the coder's mask
    leaves out have none. Raises ValueError when the coder's site has another width in this model.
    """
    require_fits(coder, lm, writes=False)
    batch = lm.tokenize(prompts)
    codes, keep = read_codes(lm, coder, batch)
    prompt, position = keep.nonzero(as_tuple=True)
    order = torch.from_numpy(np.lexsort((-codes.values.numpy(), codes.rows.numpy())))  # strongest first in each row
    tokens = [
        lm.token_strings(batch.ids[b, batch.mask[b]].tolist(), prefixed=int(batch.ids[b, 0]) == lm.prefix_id)
        for b in range(len(batch.ids))
    ]
    left_out = {(int(b), int(p)) for b, p in (~keep & batch.mask).nonzero().tolist()}
    rows, found, values = codes.rows[order], codes.features[order], codes.values[order]
    return FeatureTable(prompt[rows], position[rows], found, values, tokens, left_out, Names(coder))
