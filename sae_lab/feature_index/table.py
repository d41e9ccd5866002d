"""sl.features: which features are active at each token of a prompt. Needs a coder and a model, no index."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lab.activations.reading import read_codes, require_fits
from sae_lab.arguments import as_annotated
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompts, Token
from sae_lab.results import Html, html_table, tag
from sae_lab.saes.base import SparseCoder


@as_annotated
@dataclass(frozen=True)
class FeatureTable:
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
        prompt, position, feature, value = (t[keep] for t in (self.prompt, self.position, self.feature, self.value))
        return FeatureTable(prompt, position, feature, value, self.tokens, self.left_out)

    def to_pandas(self):
        """Long form: prompt, position, token, feature, value."""
        import pandas as pd

        where = zip(self.prompt.tolist(), self.position.tolist(), strict=True)
        return pd.DataFrame({
            "prompt": self.prompt.tolist(),
            "position": self.position.tolist(),
            "token": [self.tokens[b][p].label for b, p in where],
            "feature": self.feature.tolist(),
            "value": self.value.tolist(),
        })  # fmt: skip

    def _rows(self) -> list[tuple[str, str]]:
        """(token, its features) for every token."""
        entries: dict[tuple[int, int], list[str]] = {}
        columns = (self.prompt, self.position, self.feature, self.value)
        for b, p, f, v in zip(*(c.tolist() for c in columns), strict=True):
            entries.setdefault((b, p), []).append(f"{f} ({v:.1f})")
        return [
            (token.label, "left out" if (b, p) in self.left_out else "  ".join(entries.get((b, p), ["-"])))
            for b, row in enumerate(self.tokens)
            for p, token in enumerate(row)
        ]

    def __repr__(self) -> str:
        return "\n".join(f"{token!r:>16}  {found}" for token, found in self._rows())

    def _repr_html_(self) -> Html:
        rows = [(tag("code", token), found) for token, found in self._rows()]
        return html_table([("token", "feature (activation)"), *rows], align="><")


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
    rows = codes.rows
    # Strongest first within a row: sort by value, then stably by row.
    by_value = codes.values.argsort(descending=True)
    order = by_value[rows[by_value].sort(stable=True).indices]
    tokens = [
        lm.token_strings(batch.ids[b, batch.mask[b]].tolist(), prefixed=int(batch.ids[b, 0]) == lm.prefix_id)
        for b in range(len(batch.ids))
    ]
    left_out = {(int(b), int(p)) for b, p in (~keep & batch.mask).nonzero().tolist()}
    rows, found, values = rows[order], codes.features[order], codes.values[order]
    return FeatureTable(prompt[rows], position[rows], found, values, tokens, left_out)
