"""The model's most likely continuations when a feature's direction replaces a word."""

from collections.abc import Sequence
from dataclasses import field, replace
from typing import NamedTuple, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated, check_least
from sae_lab.explain.prompts import check_coder
from sae_lab.explain.selfexplain import MEANING, SCALES, Implant, implants
from sae_lab.lm.model import LM
from sae_lab.results import Figure, Result, figure, result
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site


class Branch(NamedTuple):
    """A next token. probability: given the tokens before; branches: the tokens that may follow."""

    token: str
    probability: float
    branches: tuple["Branch", ...]


@result
class DefinitionTree(Result):
    """Result of ``definition_tree``: the most likely continuations when the direction replaces a word.

    Attributes:
        branches: the next tokens. scale: the c chosen, in units of the site's norm; similarity: the self-similarity
            with it. random_branches: of a random direction of equal norm, the control; overlap: the probability that
            the next token's distribution shares with the random direction's, Σ min(p, q).
    """

    feature: int
    branches: tuple[Branch, ...]
    scale: float
    similarity: float = figure("self-similarity", "at scale {scale:g}")
    overlap: float = figure("overlap", "next-token probability shared with a random direction", best="low")
    random_branches: tuple[Branch, ...] = field(repr=False)
    prompt: str = field(repr=False)

    @property
    def best(self) -> str:
        """The continuation of the most likely next token each time."""
        text, branches = "", self.branches
        while branches:
            text, branches = text + branches[0].token, branches[0].branches
        return text

    def figures(self) -> list[Figure]:
        shown = Figure("covered", covered(self.branches), control=covered(self.random_branches),
                       control_name="a random direction", meaning="probability of the continuations shown")  # fmt: skip
        return [shown, *super().figures()[::-1]]

    def _footer(self) -> str:
        def lines(branches: tuple[Branch, ...], depth: int) -> list[str]:
            found = []
            for branch in branches:
                found.append(f"{'  ' * depth}{branch.probability:.2f} {branch.token!r}")
                found += lines(branch.branches, depth + 1)
            return found

        return "\n".join([f"feature {self.feature}: {self.prompt}...", *lines(self.branches, 1)])


@as_annotated
def definition_tree(
    sae: SparseCoder, lm: LM, feature: int, *, width: int = 3, depth: int = 3, prompt: str = MEANING,
    placeholder: str = "X", at: Site | str | None = None, scales: Sequence[float] = SCALES, seed: int = 0,
) -> DefinitionTree:  # fmt: skip
    """``definition_tree(sae, lm, 812)``: replace a word by a feature's direction, and branch over the ``width`` most
    likely next tokens, ``depth`` times.

    The direction's size is chosen by self-similarity, as in ``self_explain``; one pass a level. Control: a random
    direction of equal norm. "Definition trees" of Watkins 2024 (see ``token_list``).

    Raises ValueError for a width or depth below 1, a width^depth above 1,000, and as ``self_explain``.
    """
    check_coder(sae, lm)
    feature = sae.feature(feature)
    check_least(1, width=width, depth=depth)
    if width**depth > 1000:
        raise ValueError(f"width^depth must be at most 1000, got {width} and {depth}")
    made = implants(sae, lm, [feature], 1, prompt, placeholder, at, None, scales, seed)
    ids = lm.tokenize(prompt).ids[0].tolist()
    (tree, first), (other, other_first) = (_grow(lm, ids, made.edit, row, width, depth) for row in range(2))
    return DefinitionTree(
        feature=feature, branches=tree, scale=float(made.scale[0]), similarity=float(made.similarity[0]), prompt=prompt,
        overlap=float(torch.minimum(first, other_first).sum()), random_branches=other,
    )  # fmt: skip


def _grow(lm: LM, ids: list[int], edit: Implant, row: int, width: int, depth: int) -> tuple[tuple[Branch, ...], Tensor]:
    """(the tree, the distribution of its first token), one batch a level."""
    levels, ways, first = [], [ids], torch.zeros(0)
    for level in range(depth):
        batch = lm.tokenize(ways)
        writes = replace(edit, vectors=edit.vectors[row].expand(len(ways), -1)).writes(lm, batch)
        form = Float[Tensor, f"{len(ways)} {lm.vocab_size}"]
        probabilities = lm.run(batch, writes=writes, logits=next_probabilities, form=form)[1].cpu()
        first = probabilities[0] if not level else first
        top = probabilities.topk(width, dim=-1)
        levels.append((top.values.tolist(), top.indices.tolist()))
        ways = [[*way, token] for way, row in zip(ways, top.indices.tolist(), strict=True) for token in row]

    def node(level: int, way: int) -> tuple[Branch, ...]:
        if level == depth:
            return ()
        values, tokens = levels[level][0][way], levels[level][1][way]
        pairs = enumerate(zip(tokens, values, strict=True))
        return tuple(Branch(lm.vocabulary[t], p, node(level + 1, way * width + i)) for i, (t, p) in pairs)

    return node(0, 0), first


@no_type_check
def next_probabilities(logits, tokens):
    """Probabilities of the token after the last, "batch vocab", of rows of one length."""
    return logits[:, -1].float().softmax(-1)


def covered(branches: tuple[Branch, ...]) -> float:
    """The probability of all continuations of a tree together."""
    return sum(b.probability * (covered(b.branches) if b.branches else 1.0) for b in branches)
