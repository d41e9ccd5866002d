"""Which tokens fire a feature alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.explain.prompts import check_coder, check_features, codes_of
from sae_lab.explain.words import WordHits, check_k, words_for
from sae_lab.lm.model import LM
from sae_lab.results import Figure, by_column, counted
from sae_lab.saes.base import SparseCoder


@dataclass(frozen=True, repr=False)
class TokenLists(WordHits):
    """Result of ``token_list``: one entry a feature, in the order of ``features``. Its table has one row a feature and
    token.

    Attributes:
        top: the (at most k) tokens that alone fire the feature most, with their activations, the strongest first.
        share: share of the tokens tried that fire it.
        words, hits, other_hits: as in ``LensShape``; ``other_hits`` is the share of the other features' lists that
            hold the word, the control.
        tokens: those tried. codes: all activations, "tokens features" sparse.
        left_out: share of the tokens that the coder's mask leaves out.
    """

    features: tuple[int, ...]
    top: tuple[tuple[tuple[str, float], ...], ...]
    share: tuple[float, ...]
    words: tuple[str, ...]
    hits: tuple[bool, ...]
    other_hits: tuple[float, ...]
    k: int
    context: str
    left_out: float
    tokens: tuple[str, ...] = field(repr=False, compare=False)
    codes: Tensor = field(repr=False, compare=False)

    _records = "_listed"

    def activations(self, feature: int) -> dict[str, float]:
        """``lists.activations(812)``: the tokens that fire a feature, with their activations, the strongest first."""
        if feature not in self.features:
            raise ValueError(f"feature must be one of those listed, {self.features}, got {feature}")
        column = self.codes.to_dense()[:, self.features.index(feature)]
        order = column.argsort(descending=True)[: int((column > 0).sum())].tolist()
        return {self.tokens[i]: float(column[i]) for i in order}

    def figures(self) -> list[Figure]:
        none = float(np.mean([not row for row in self.top]))
        return [
            Figure("word in the list", *self._rate("hits"), control=self._rate("other_hits")[0],
                   control_name="other features' lists", meaning=f"top {self.k}, of {counted(self._named, 'feature')}",
                   best="high"),
            Figure("tokens that fire", float(np.mean(self.share)), meaning="share of the tokens tried, mean", digits=4),
            Figure("no token fires it", none, meaning="share of features: they need context"),
        ]  # fmt: skip

    @property
    def _listed(self) -> dict[str, list[Any]]:
        rows = [(f, token, value) for f, top in zip(self.features, self.top, strict=True) for token, value in top]
        return by_column("feature token activation", rows)

    def _footer(self) -> str:
        lines = [
            f"feature {f} {word!r}: {' '.join(f'{t!r} {v:.3g}' for t, v in top) or 'none'}"
            for f, word, top in zip(self.features, self.words, self.top, strict=True)
        ]
        where = f"after {self.context!r}" if self.context else "after the prefix"
        many = counted(len(self.tokens), "token")
        return "\n".join([f"{many}, each alone {where}; {self.left_out:.1%} masked", *lines])


@as_annotated
def token_list(
    sae: SparseCoder, lm: LM, features: Sequence[int], words: Mapping[int, str] | None = None, *,
    tokens: Sequence[int] | None = None, context: str = "", k: int = 5,
) -> TokenLists:  # fmt: skip
    """``token_list(sae, lm, [812])``: which tokens of the vocabulary fire a feature alone, each once after the prefix.

    One pass over the tokens to the coder's site, for all features together; the result keeps every activation. "Token
    lists" of Watkins 2024 ("Exploring SAE features in GPT-2 with definition trees and token lists", LessWrong).

    Args:
        words: the token of each feature that fires on one token.
        tokens: the ids to try; None: the whole vocabulary but special tokens. context: text before the token.

    Raises ValueError for a model without a prefix if no context is given: masks leave position 0 out.
    """
    check_coder(sae, lm)
    chosen = check_features(sae, features)
    k = check_k(k, lm)
    before = lm.tokenize(context).ids[0].tolist() if context else [lm.prefix_id] * (lm.prefix_id is not None)
    if not before:
        raise ValueError("this model has no prefix, and a token at position 0 is left out: pass context='The'")
    if tokens is None:
        special = set(lm.mask().special_ids)
        tokens = [i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if i not in special]
    ids = torch.as_tensor(list(tokens), dtype=torch.long)
    if not len(ids):
        raise ValueError("tokens must name at least one token id, got none")
    prompts = torch.cat([torch.tensor(before).expand(len(ids), -1), ids[:, None]], 1)
    codes, keep = (x[:, -1] for x in codes_of(sae, lm, chosen, prompts))
    top = []
    for column in codes.T:
        best = column.topk(min(k, len(column)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top.append(tuple((lm.vocabulary[int(ids[i])], value) for i, value in pairs if value > 0))
    named = words_for(chosen, words)
    listed = [{token.strip().lower() for token, _ in row} for row in top]
    hits = [bool(word) and word.lower() in row for word, row in zip(named, listed, strict=True)]
    others = [
        float(np.mean([word.lower() in row for j, row in enumerate(listed) if j != i])) if len(listed) > 1 else math.nan
        for i, word in enumerate(named)
    ]
    return TokenLists(
        features=tuple(chosen), top=tuple(top), share=tuple((codes > 0).float().mean(0).tolist()), words=named,
        hits=tuple(hits), other_hits=tuple(others), k=k, context=context, left_out=float((~keep).float().mean()),
        tokens=tuple(lm.vocabulary[i] for i in ids.tolist()), codes=codes.to_sparse(),
    )  # fmt: skip
