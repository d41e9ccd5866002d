"""Comparison: the effect of edits on one prompt, token by token; and which tokens of two texts differ."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.lm.passes import token_losses
from sae_lab.lm.tokens import Token, label
from sae_lab.results import Shown, frame_rows
from sae_lab.types import TokenBatch

SHOWN = 8  # next tokens whose probability changed most


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Result of ``lm.compare``; prints as a table.

    Attributes:
        tokens: the prompt's.
        kl: " pos", nats: KL(without ‖ with) of the next-token distribution after each token.
        logprob, logprob_edited: " pos", nats: of each token given those before it; NaN at position 0.
        features: the edited features by name: (codes without, codes with), " pos" each, measured where the edit reads.
        perplexity, perplexity_edited: exp of the mean loss of the prompt's tokens.
        next: (token, log-probability without, with) of the next tokens whose probability changed most.
    """

    tokens: list[Token]
    kl: Float[Tensor, " pos"]
    logprob: Float[Tensor, " pos"]
    logprob_edited: Float[Tensor, " pos"]
    features: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    perplexity: float = float("nan")
    perplexity_edited: float = float("nan")
    next: list[tuple[str, float, float]] = field(default_factory=list)

    def to_pandas(self):
        """One row a token."""
        import pandas as pd

        table = {
            "token": [t.label for t in self.tokens], "kl": self.kl.tolist(), "logprob": self.logprob.tolist(),
            "logprob_edited": self.logprob_edited.tolist(),
        }  # fmt: skip
        for name, (without, with_) in self.features.items():
            table |= {name: without.tolist(), f"{name} edited": with_.tolist()}
        return pd.DataFrame(table)

    def measures(self) -> dict[str, Float[Tensor, " pos"]]:
        """Measures of each token, by name: "KL" (nats), "change of log-probability" (nats), "perplexity" with and
        without edits (of that token given those before it), and each edited feature's activation."""
        found = {
            "KL": self.kl,
            "change of log-probability": self.logprob_edited - self.logprob,
            "perplexity with edits": torch.exp(-self.logprob_edited),
            "perplexity without": torch.exp(-self.logprob),
        }
        for name, (without, with_) in self.features.items():
            found |= {f"{name} with edits": with_, f"{name} without": without}
        return found

    _align, _gap = ">", " "

    def _rows(self) -> list[tuple[str, ...]]:
        return frame_rows(self.to_pandas())

    def _footer(self) -> str:
        changes = ", ".join(f"{t!r} {a:.2f} → {b:.2f}" for t, a, b in self.next)
        return (
            f"perplexity {self.perplexity:.2f} → {self.perplexity_edited:.2f}; "
            f"mean KL {float(self.kl.mean()):.4f} nats; next token, log-probability: {changes}"
        )


def compared(
    tokens: list[Token], batch: TokenBatch, clean: Float[Tensor, "1 pos vocab"],
    edited: Float[Tensor, "1 pos vocab"], features: dict[str, tuple[Tensor, Tensor]], tokenizer: Any,
) -> Comparison:  # fmt: skip
    """The comparison of one prompt's logits without and with edits."""
    p, q = (logits[0].float().log_softmax(-1).cpu() for logits in (clean, edited))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).clamp_min(0.0)
    before, after = (-token_losses(logits, batch)[0] for logits in (clean, edited))
    change = (q[-1].exp() - p[-1].exp()).abs()
    shown = change.topk(min(SHOWN, len(change))).indices.tolist()
    following = [(label(tokenizer, i), float(p[-1, i]), float(q[-1, i])) for i in shown]
    perplexity, edited_perplexity = (float(torch.exp(-logprob.nanmean())) for logprob in (before, after))
    return Comparison(tokens, kl, before, after, features, perplexity, edited_perplexity, following)


def differing(before: Sequence[Hashable], after: Sequence[Hashable]) -> tuple[list[bool], list[bool]]:
    """A diff: for each item of two sequences, whether it lies outside their longest common subsequence (of several
    longest ones, the one whose items come latest)."""
    n, m = len(before), len(after)
    common = [[0] * (m + 1) for _ in range(n + 1)]  # of the first i and the first j
    for i, item in enumerate(before):
        above, row = common[i], common[i + 1]
        for j, other in enumerate(after):
            row[j + 1] = above[j] + 1 if item == other else max(above[j + 1], row[j])
    left, right = [True] * n, [True] * m
    i, j = n, m
    while i and j:
        if before[i - 1] == after[j - 1]:
            i, j = i - 1, j - 1
            left[i] = right[j] = False
        elif common[i - 1][j] >= common[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return left, right
