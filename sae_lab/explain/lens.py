"""What a feature says without any text: the tokens its direction promotes, the tokens that fire it, and what the model
writes when the direction stands for a word."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.evals.result import Figure, Result, mean_and_error
from sae_lab.explain.prompts import Source, check_coder, check_features, codes_of, top_examples
from sae_lab.explain.selfexplain import (
    MEANING,
    SCALES,
    Implant,
    choose_scale,
    implant_sites,
    placeholder_position,
    typical_norm,
)
from sae_lab.feature_index.directions import kurtosis
from sae_lab.feature_index.index import FeatureIndex
from sae_lab.lm.model import LM
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site

ROWS = 64  # of logits held at once
RANDOM = 256  # random directions, the control


def token_features(
    sae: SparseCoder, lm: LM, source: Source, features: Sequence[int] | None = None, share: float = 0.8, n: int = 10
) -> dict[int, str]:
    """Features whose n top contexts peak on one token in at least ``share`` of cases, and that token (case kept,
    without spaces at its ends). Those with fewer than n/2 contexts, and tokens without a letter, are left out.

    features: those to look at; None: all of the coder.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie above 0 and not above 1, got {share}")
    check_coder(sae, lm)
    chosen = list(range(sae.d_sae)) if features is None else check_features(sae, features)
    if features is None and isinstance(source, FeatureIndex):
        chosen = source.order("density").tolist()
    found = {}
    for feature, examples in top_examples(sae, lm, chosen, source, n).items():
        if len(examples) < max(1, n / 2):
            continue
        peaks = Counter(lm.vocabulary[example.ids[example.peak]].strip() for example in examples)
        word, count = peaks.most_common(1)[0]
        if count >= share * len(examples) and any(c.isalpha() for c in word):
            found[feature] = word
    return found


# ---------------------------------------------------------------------------------------------- the logit lens


@dataclass(frozen=True, repr=False)
class LensShape(Result):
    """Result of ``lens_shape``: one entry a feature, in the order of ``features``.

    Attributes:
        promoted: the k tokens with the largest logits; none for a row of zeros. kurtosis (excess), skew: of the logits
            over the vocabulary; both 0 for a bell, NaN for zeros. random_kurtosis, random_skew: of random directions,
            the control.
        words: the word of each feature, "" where none was given; ``hits``: whether it is among ``promoted``, case and
            spaces ignored; ``random_hits``: share of random directions that promote it.
        input_hits: whether it is among the k tokens whose embeddings the encoder reads most; empty where the coder is
            not one of the residual stream. random_input_hits: of random directions.
    """

    features: tuple[int, ...]
    promoted: tuple[tuple[str, ...], ...]
    kurtosis: tuple[float, ...]
    skew: tuple[float, ...]
    words: tuple[str, ...]
    hits: tuple[bool, ...]
    random_hits: tuple[float, ...]
    input_hits: tuple[bool, ...]
    random_input_hits: tuple[float, ...]
    random_kurtosis: Float[Tensor, " random"] = field(repr=False, compare=False)
    random_skew: Float[Tensor, " random"] = field(repr=False, compare=False)
    k: int
    site: Site

    @property
    def hit_rate(self) -> float:
        """Share of the features with a word that promote it; NaN where none has one."""
        return _rate(self.hits, self.words)[0]

    @property
    def noise(self) -> float:
        """The kurtosis that 1 % of random directions exceed: below it a lens is probably noise."""
        return float(self.random_kurtosis.quantile(0.99))

    def figures(self) -> list[Figure]:
        sharp = np.array(self.kurtosis) > self.noise
        kurtosis, skew = (mean_and_error([v for v in of if not math.isnan(v)])[0] for of in (self.kurtosis, self.skew))
        words = sum(map(bool, self.words))
        found = [
            Figure("kurtosis", kurtosis, control=float(self.random_kurtosis.mean()),
                   control_name="random directions", meaning="excess, mean over features", best="high"),
            Figure("skew", skew, control=float(self.random_skew.mean()),
                   control_name="random directions", meaning="mean over features"),
            Figure("sharper than noise", float(sharp.mean()), control=0.01, control_name="by definition",
                   meaning=f"share of features with kurtosis > {self.noise:.2f}", best="high"),
            Figure("word promoted", *_rate(self.hits, self.words), control=_rate(self.random_hits, self.words)[0],
                   control_name="random directions", meaning=f"in the top {self.k}, of {words} features", best="high"),
        ]  # fmt: skip
        if self.input_hits:
            found.append(
                Figure("word read", *_rate(self.input_hits, self.words),
                       control=_rate(self.random_input_hits, self.words)[0], control_name="random directions",
                       meaning=f"in the top {self.k} of embedding·W_enc", best="high")
            )  # fmt: skip
        return found

    def to_pandas(self):
        """One row a feature."""
        import pandas as pd

        names = ("words", "promoted", "kurtosis", "skew", "hits", "random_hits", "input_hits", "random_input_hits")
        columns = {name: value for name in names if (value := getattr(self, name))}
        return pd.DataFrame({"feature": self.features} | columns)

    def _footer(self) -> str:
        return f"{len(self.features)} features, lens from {self.site}; ± over features"


@torch.no_grad()
def lens_shape(
    sae: SparseCoder, lm: LM, features: Sequence[int] | None = None, words: Mapping[int, str] | None = None, *,
    k: int = 5, seed: int = 0,
) -> LensShape:  # fmt: skip
    """The logit lens of features, W_dec·diag(gain)·W_U, and the shape of its logits: kurtosis E[z⁴]−3 and skew E[z³] of
    the standardised logits z over the vocabulary.

    A few tokens that stand out make both large; random directions have neither (the control). The lens says what a
    feature *writes*: the token that fires it need not be there. What it *reads* is measured beside it, embedding·W_enc
    over the vocabulary, where the coder sits in the residual stream.

    Of 55 token features of ``smollm2-135m/resid_post-8`` 1 promotes its own token, and none reads it by that product:
    layers stand between. ``token_list`` runs them, and finds it for 52.

    "Understanding SAE features with the logit lens" (Bloom & Lin 2024, LessWrong).

    Args: features: None, all. words: of features that fire on one token, that token (``token_features`` finds them).
    Raises ValueError where the site is not written to the residual stream.
    """
    check_coder(sae, lm)
    chosen = list(range(sae.d_sae)) if features is None else check_features(sae, features)
    site = sae.writes[0] if sae.writes else sae.site
    k = _check_k(k, lm)
    if lm.lens(sae.W_dec[:1].detach(), site) is None:
        raise ValueError(f"no logit lens: {site} is not written to the residual stream")
    shapes, promoted = _lens_of(lm, sae.W_dec[chosen].detach().float().cpu(), site, k)
    random = torch.randn(RANDOM, sae.d_out, generator=torch.Generator().manual_seed(seed))
    random_shapes, random_ids = _lens_of(lm, random, site, k)
    named = ["" if words is None else words.get(f, "").strip() for f in chosen]
    read_ids, random_read_ids = _read_tokens(sae, lm, chosen, named, k, seed)
    mute, deaf = (~rows[chosen].any(1).cpu() for rows in (sae.W_dec.detach(), sae.W_enc.detach().T))
    return LensShape(
        features=tuple(chosen),
        promoted=tuple(
            () if none else tuple(lm.vocabulary[i] for i in row)
            for row, none in zip(promoted.tolist(), mute.tolist(), strict=True)
        ),
        kurtosis=tuple(shapes[:, 0].tolist()),
        skew=tuple(shapes[:, 1].tolist()),
        words=tuple(named),
        hits=_hits(lm, promoted, named, mute),
        random_hits=_share_with(lm, random_ids, named),
        input_hits=() if read_ids is None else _hits(lm, read_ids, named, deaf),
        random_input_hits=() if random_read_ids is None else _share_with(lm, random_read_ids, named),
        random_kurtosis=random_shapes[:, 0],
        random_skew=random_shapes[:, 1],
        k=k,
        site=site,
    )


def _check_k(k: int, lm: LM) -> int:
    if not 1 <= k <= lm.vocab_size:
        raise ValueError(f"k must lie between 1 and the vocabulary's {lm.vocab_size} tokens, got {k}")
    return k


def _lens_of(lm: LM, directions: Tensor, site: Site, k: int) -> tuple[Tensor, Tensor]:
    """(kurtosis and skew "n 2", ids of the top tokens "n k")."""
    shapes, ids = [], []
    for part in directions.split(ROWS):
        logits = lm.lens(part, site)
        shapes.append(torch.stack([kurtosis(logits), skew(logits)], 1))
        ids.append(logits.topk(k).indices)
    return torch.cat(shapes), torch.cat(ids)


@no_type_check
def skew(logits):
    """Third standardised moment over the vocabulary: 0 for noise, positive where a few tokens are promoted."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred.pow(3).mean(-1) / centred.pow(2).mean(-1).pow(1.5)


def _read_tokens(
    sae: SparseCoder, lm: LM, features: list[int], named: list[str], k: int, seed: int
) -> tuple[Tensor | None, Tensor | None]:
    """The k tokens whose embeddings point most along the encoder's column of each feature, and along random columns."""
    if not any(named) or not (sae.site.kind == "embed" or sae.site.kind.startswith("resid")):
        return None, None
    vocabulary = torch.arange(min(lm.vocab_size, len(lm.tokenizer)))
    table = torch.nn.functional.normalize(lm.embedding(vocabulary), dim=1)
    random = torch.randn(RANDOM, sae.d_in, generator=torch.Generator().manual_seed(seed))
    both = [sae.W_enc[:, features].detach().float().cpu().T, random]
    read, by_chance = (torch.cat([(part @ table.T).topk(k).indices for part in rows.split(ROWS)]) for rows in both)
    return read, by_chance


def _hits(lm: LM, ids: Tensor, words: Sequence[str], zeros: Tensor) -> tuple[bool, ...]:
    """zeros: rows without a direction, whose top tokens are the first of a tie."""
    rows = zip(ids.tolist(), words, zeros.tolist(), strict=True)
    return tuple(bool(word) and not none and word.lower() in _plain(lm, row) for row, word, none in rows)


def _share_with(lm: LM, ids: Tensor, words: Sequence[str]) -> tuple[float, ...]:
    rows = [_plain(lm, row) for row in ids.tolist()]
    return tuple(float(np.mean([word.lower() in row for row in rows])) if word else 0.0 for word in words)


def _plain(lm: LM, ids: Sequence[int]) -> set[str]:
    return {lm.vocabulary[i].strip().lower() for i in ids}


def _rate(values: Sequence[float], words: Sequence[str]) -> tuple[float, float]:
    """(mean, standard error) over the features with a word."""
    chosen = np.array([v for v, word in zip(values, words, strict=True) if word], dtype=float)
    error = float(chosen.std(ddof=1) / math.sqrt(len(chosen))) if len(chosen) > 1 else math.nan
    return (float(chosen.mean()) if len(chosen) else math.nan), error


# ---------------------------------------------------------------------------------------------- token lists


@dataclass(frozen=True, repr=False)
class TokenLists(Result):
    """Result of ``token_list``: one entry a feature, in the order of ``features``.

    Attributes:
        top: the k tokens that fire the feature most by themselves, the strongest first (fewer where fewer fire it).
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

    @property
    def hit_rate(self) -> float:
        """Share of the features with a word whose list holds it."""
        return _rate(self.hits, self.words)[0]

    def activations(self, feature: int) -> dict[str, float]:
        """All tokens that fire one of these features, and how strongly, the strongest first."""
        if feature not in self.features:
            raise ValueError(f"feature must be one of those listed, {self.features}, got {feature}")
        column = self.codes.to_dense()[:, self.features.index(feature)]
        order = column.argsort(descending=True)[: int((column > 0).sum())].tolist()
        return {self.tokens[i]: float(column[i]) for i in order}

    def figures(self) -> list[Figure]:
        words = sum(map(bool, self.words))
        none = float(np.mean([not row for row in self.top]))
        return [
            Figure("word in the list", *_rate(self.hits, self.words), control=_rate(self.other_hits, self.words)[0],
                   control_name="other features' lists", meaning=f"top {self.k}, of {words} features", best="high"),
            Figure("tokens that fire", float(np.mean(self.share)), meaning="share of the tokens tried, mean", digits=4),
            Figure("no token fires it", none, meaning="share of features: they need context"),
        ]  # fmt: skip

    def to_pandas(self):
        """One row a feature and token."""
        import pandas as pd

        rows = [(f, token, value) for f, top in zip(self.features, self.top, strict=True) for token, value in top]
        return pd.DataFrame(rows, columns=["feature", "token", "activation"])

    def _footer(self) -> str:
        lines = [
            f"feature {f} {word!r}: {' '.join(f'{t!r} {v:.3g}' for t, v in top) or 'none'}"
            for f, word, top in zip(self.features, self.words, self.top, strict=True)
        ]
        where = f"behind {self.context!r}" if self.context else "behind the prefix"
        return "\n".join([f"{len(self.tokens):,} tokens, each alone {where}; {self.left_out:.1%} masked", *lines])


def token_list(
    sae: SparseCoder, lm: LM, features: Sequence[int], words: Mapping[int, str] | None = None, *,
    tokens: Sequence[int] | None = None, context: str = "", k: int = 5,
) -> TokenLists:  # fmt: skip
    """Which tokens of the vocabulary fire a feature by themselves: each stands once behind the prefix.

    One pass over the tokens to the coder's site, for all features together; the result keeps every activation. "Token
    lists" of Watkins 2024 ("Exploring SAE features in GPT-2 with definition trees and token lists", LessWrong).

    Args:
        words: of features that fire on one token, that token.
        tokens: the ids to try; None: the whole vocabulary but special tokens. context: text before the token.

    Raises ValueError for a model without prefix where no context is given: its masks leave position 0 out.
    """
    check_coder(sae, lm)
    chosen = check_features(sae, features)
    k = _check_k(k, lm)
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
    named = ["" if words is None else words.get(f, "").strip() for f in chosen]
    listed = [{token.strip().lower() for token, _ in row} for row in top]
    hits = [bool(word) and word.lower() in row for word, row in zip(named, listed, strict=True)]
    others = [
        float(np.mean([word.lower() in row for j, row in enumerate(listed) if j != i])) if len(listed) > 1 else math.nan
        for i, word in enumerate(named)
    ]
    return TokenLists(
        features=tuple(chosen), top=tuple(top), share=tuple((codes > 0).float().mean(0).tolist()), words=tuple(named),
        hits=tuple(hits), other_hits=tuple(others), k=k, context=context, left_out=float((~keep).float().mean()),
        tokens=tuple(lm.vocabulary[i] for i in ids.tolist()), codes=codes.to_sparse(),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- definition trees


class Branch(NamedTuple):
    """One way on. token: its text; probability: given what stands before; branches: the ways on from there."""

    token: str
    probability: float
    branches: tuple["Branch", ...]


@dataclass(frozen=True, repr=False)
class DefinitionTree(Result):
    """Result of ``definition_tree``: what the model may write where the direction stands for a word.

    Attributes:
        branches: the ways on. scale: the c chosen, in units of the site's norm; similarity: the self-similarity there.
        random_branches: of a random direction of equal norm, the control; overlap: how much probability the next
            token's distribution shares with the random direction's, Σ min(p, q).
    """

    feature: int
    branches: tuple[Branch, ...]
    scale: float
    similarity: float
    overlap: float
    random_branches: tuple[Branch, ...] = field(repr=False)
    prompt: str = field(repr=False)

    @property
    def best(self) -> str:
        """The most likely way on, token after token."""
        text, branches = "", self.branches
        while branches:
            text, branches = text + branches[0].token, branches[0].branches
        return text

    def figures(self) -> list[Figure]:
        return [
            Figure("covered", covered(self.branches), control=covered(self.random_branches),
                   control_name="a random direction", meaning="probability of the ways shown"),
            Figure("overlap", self.overlap, meaning="next-token probability shared with a random direction",
                   best="low"),
            Figure("self-similarity", self.similarity, meaning=f"at scale {self.scale:g}"),
        ]  # fmt: skip

    def _footer(self) -> str:
        def lines(branches: tuple[Branch, ...], depth: int) -> list[str]:
            found = []
            for branch in branches:
                found.append(f"{'  ' * depth}{branch.probability:.2f} {branch.token!r}")
                found += lines(branch.branches, depth + 1)
            return found

        return "\n".join([f"feature {self.feature}: {self.prompt}...", *lines(self.branches, 1)])


def definition_tree(
    sae: SparseCoder, lm: LM, feature: int, *, width: int = 3, depth: int = 3, prompt: str = MEANING,
    placeholder: str = "X", at: Site | str | None = None, scales: Sequence[float] = SCALES, seed: int = 0,
) -> DefinitionTree:  # fmt: skip
    """Implant a feature's direction in the place of a word, and branch over the ``width`` most likely next tokens.

    The direction's size is chosen by self-similarity, as in ``self_explain``; width^depth ways in all, one pass a
    level. Control: a random direction of equal norm. "Definition trees" of Watkins 2024 (see ``token_list``).

    Raises ValueError for a width or depth below 1, more than 1,000 ways, and what ``self_explain`` refuses.
    """
    check_coder(sae, lm)
    feature = sae.feature(feature)
    if width < 1 or depth < 1 or width**depth > 1000:
        raise ValueError(f"width and depth must be at least 1 and width^depth at most 1000, got {width} and {depth}")
    at, compare = implant_sites(sae, lm, at, None)
    position, norm = placeholder_position(lm, prompt, placeholder), typical_norm(lm, at)
    random = torch.randn(1, sae.d_out, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([sae.W_dec[[feature]].detach().float().cpu(), random])
    vectors = norm * torch.nn.functional.normalize(both, dim=1)
    chosen, similarity = choose_scale(lm, prompt, position, at, compare, vectors, scales)
    ids = lm.tokenize(prompt).ids[0].tolist()
    trees, firsts = [], []
    for vector in chosen[:, None] * vectors:
        branches, first = _grow(lm, ids, position, at, vector, width, depth)
        trees.append(branches)
        firsts.append(first)
    return DefinitionTree(
        feature=feature,
        branches=trees[0],
        scale=float(chosen[0]),
        similarity=float(similarity[0]),
        overlap=float(torch.minimum(*firsts).sum()),
        random_branches=trees[1],
        prompt=prompt,
    )


def _grow(
    lm: LM, ids: list[int], position: int, at: Site, vector: Tensor, width: int, depth: int
) -> tuple[tuple[Branch, ...], Tensor]:
    """(the tree, the distribution of its first token): a level at a time, all its ways in one batch."""
    levels, ways, first = [], [ids], torch.zeros(0)
    for level in range(depth):
        batch = lm.tokenize(ways)
        writes = Implant(at, position, vector.expand(len(ways), -1)).writes(lm, batch)
        probabilities = lm.run(batch, writes=writes, logits=next_probabilities)[1].cpu()
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
    """The probability that all ways of a tree have together."""
    return sum(b.probability * (covered(b.branches) if b.branches else 1.0) for b in branches)
