"""sl.features: which features are active at each token of a prompt. Needs a coder and a model, no index."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sae_lab.activations.reading import read_codes, require_fits
from sae_lab.arguments import as_annotated
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompts, Token
from sae_lab.results import Result, result
from sae_lab.saes.base import SparseCoder


@result
class FeatureTable(Result):
    """Active features, one entry each, strongest first within a token.

    prompt, position, feature: int tensors; value: float tensor (activations). tokens: the tokens of each prompt;
    left_out: (prompt, position) of tokens that the coder's mask leaves out, which have no features.
    """

    prompt: Tensor
    position: Tensor
    feature: Tensor
    value: Tensor
    tokens: list[list[Token]]
    left_out: set[tuple[int, int]]

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

    _records = ("prompt", "position", "token", "feature", "value")
    _align = "><"

    def _rows(self) -> list[tuple[str, ...]]:
        """(token, its features) for every token."""
        entries: dict[tuple[int, int], list[str]] = {}
        columns = (self.prompt, self.position, self.feature, self.value)
        for b, p, f, v in zip(*(c.tolist() for c in columns), strict=True):
            entries.setdefault((b, p), []).append(f"{f} ({v:.1f})")
        rows = [
            (repr(token.label), "left out" if (b, p) in self.left_out else "  ".join(entries.get((b, p), ["-"])))
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
    return FeatureTable(prompt[rows], position[rows], found, values, tokens, left_out)
