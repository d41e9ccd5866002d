"""What a feature says without any text: the tokens that its direction promotes, and how sharply it does."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import Count, as_annotated
from sae_lab.explain.prompts import Source, check_coder, check_features, top_examples
from sae_lab.feature_index.directions import kurtosis
from sae_lab.feature_index.index import FeatureIndex
from sae_lab.lm.model import LM
from sae_lab.results import Figure, Result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import mean_and_error
from sae_lab.types import Site

ROWS = 64  # of logits held at once
RANDOM = 256  # random directions, the control


@as_annotated
def token_features(
    sae: SparseCoder, lm: LM, source: Source, features: Sequence[int] | None = None, share: float = 0.8, n: Count = 10
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
        return rate(self.hits, self.words)[0]

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
            Figure("word promoted", *rate(self.hits, self.words), control=rate(self.random_hits, self.words)[0],
                   control_name="random directions", meaning=f"in the top {self.k}, of {words} features", best="high"),
        ]  # fmt: skip
        if self.input_hits:
            found.append(
                Figure("word read", *rate(self.input_hits, self.words),
                       control=rate(self.random_input_hits, self.words)[0], control_name="random directions",
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


@as_annotated
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

    Of the token features of ``smollm2-135m/resid_post-8`` one in seventy promotes its own token, and none reads it by
    that product: layers stand between. ``token_list`` runs them, and finds it for four in five (benchmarks/methods.py).

    "Understanding SAE features with the logit lens" (Bloom & Lin 2024, LessWrong).

    Args: features: None, all. words: of features that fire on one token, that token (``token_features`` finds them).
    Raises ValueError where the site is not written to the residual stream.
    """
    check_coder(sae, lm)
    chosen = list(range(sae.d_sae)) if features is None else check_features(sae, features)
    site = sae.writes[0] if sae.writes else sae.site
    k = check_k(k, lm)
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


def check_k(k: int, lm: LM) -> int:
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


def rate(values: Sequence[float], words: Sequence[str]) -> tuple[float, float]:
    """(mean, standard error) over the features with a word."""
    chosen = np.array([v for v, word in zip(values, words, strict=True) if word], dtype=float)
    error = float(chosen.std(ddof=1) / math.sqrt(len(chosen))) if len(chosen) > 1 else math.nan
    return (float(chosen.mean()) if len(chosen) else math.nan), error
