"""Features without any text: the tokens that a feature's direction promotes, and how sharply."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import Count, as_annotated
from sae_lab.explain.prompts import Source, check_coder, check_features, top_examples
from sae_lab.explain.words import WordHits, check_k, words_for
from sae_lab.feature_index.directions import kurtosis
from sae_lab.feature_index.index import FeatureIndex
from sae_lab.lm.model import LM
from sae_lab.results import Figure, counted
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import mean_and_error
from sae_lab.types import Site

ROWS = 64  # of logits held at once
RANDOM = 256  # random directions, the control


@as_annotated
def token_features(
    sae: SparseCoder, lm: LM, source: Source, features: Sequence[int] | None = None, share: float = 0.8, n: Count = 10
) -> dict[int, str]:
    """``token_features(sae, lm, index)``: features that fire on one token, and that token (case kept, without spaces at
    its ends): at least ``share`` of a feature's n top contexts peak on it.

    Features with fewer than n/2 contexts, and tokens without a letter, are left out. features: None: all of the coder.
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
class LensShape(WordHits):
    """Result of ``lens_shape``: one entry a feature, in the order of ``features``.

    Attributes:
        promoted: the k tokens with the largest logits; () for a row of zeros. kurtosis (excess), skew: of the logits
            over the vocabulary; both 0 for a normal distribution, NaN for zeros. random_kurtosis, random_skew: of
            random directions, the control.
        words: the word of each feature, "" for none; ``hits``: whether it is among ``promoted``, ignoring case and
            spaces; ``random_hits``: share of random directions that promote it.
        input_hits: whether it is among the k tokens whose embeddings the encoder reads most; () for a coder outside the
            residual stream. random_input_hits: of random directions.
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

    _records = "_columns_there"
    _below = "{features!n} features, lens from {site}; ± over features"

    @property
    def noise(self) -> float:
        """The kurtosis that 1 % of random directions exceed: a lens below it is probably noise."""
        return float(self.random_kurtosis.quantile(0.99))

    def figures(self) -> list[Figure]:
        sharp = np.array(self.kurtosis) > self.noise
        kurtosis, skew = (mean_and_error([v for v in of if not math.isnan(v)])[0] for of in (self.kurtosis, self.skew))
        random = partial(Figure, control_name="random directions")
        found = [
            random("kurtosis", kurtosis, control=float(self.random_kurtosis.mean()),
                   meaning="excess, mean over features", best="high"),
            random("skew", skew, control=float(self.random_skew.mean()), meaning="mean over features"),
            Figure("sharper than noise", float(sharp.mean()), control=0.01, control_name="by definition",
                   meaning=f"share of features with kurtosis > {self.noise:.2f}", best="high"),
            random("word promoted", *self._rate("hits"), control=self._rate("random_hits")[0],
                   meaning=f"in the top {self.k}, of {counted(self._named, 'feature')}", best="high"),
        ]  # fmt: skip
        if self.input_hits:
            read, control = self._rate("input_hits"), self._rate("random_input_hits")[0]
            meaning = f"in the top {self.k} of embedding·W_enc"
            found.append(random("word read", *read, control=control, meaning=meaning, best="high"))
        return found

    @property
    def _columns_there(self) -> dict[str, Any]:
        names = ("words", "promoted", "kurtosis", "skew", "hits", "random_hits", "input_hits", "random_input_hits")
        return {"feature": self.features} | {name: value for name in names if (value := getattr(self, name))}


@as_annotated
@torch.no_grad()
def lens_shape(
    sae: SparseCoder, lm: LM, features: Sequence[int] | None = None, words: Mapping[int, str] | None = None, *,
    k: int = 5, seed: int = 0,
) -> LensShape:  # fmt: skip
    """``lens_shape(sae, lm, words=token_features(sae, lm, index))``: the logit lens of features, W_dec·diag(gain)·W_U,
    and the shape of its logits: kurtosis E[z⁴]−3 and skew E[z³] of the standardised logits z over the vocabulary
    ("Understanding SAE features with the logit lens", Bloom & Lin 2024, LessWrong).

    A few tokens with large logits make both large; for random directions (the control) both are small. The lens is what
    a feature *writes*, which need not include the token that fires it. What it *reads* is measured beside it for a
    coder in the residual stream: embedding·W_enc over the vocabulary. Layers between change both: of the token features
    of ``smollm2-135m/resid_post-8`` one in seventy promotes its token, and none reads it by that product, but
    ``token_list``, which runs the layers, finds it for four in five (benchmarks/methods.py).

    Args: features: None, all. words: the token of each feature that fires on one token.
    Raises ValueError for a coder whose site is not written to the residual stream.
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
    named = words_for(chosen, words)
    read_ids, random_read_ids = _read_tokens(sae, lm, chosen, named, k, seed)
    mute, deaf = ((~rows[chosen].any(1)).tolist() for rows in (sae.W_dec.detach(), sae.W_enc.detach().T))
    tops = [tuple(lm.vocabulary[i] for i in row) for row in promoted.tolist()]
    return LensShape(
        features=tuple(chosen), promoted=tuple(() if none else row for row, none in zip(tops, mute, strict=True)),
        kurtosis=tuple(shapes[:, 0].tolist()), skew=tuple(shapes[:, 1].tolist()), words=named,
        hits=_hits(lm, promoted, named, mute), random_hits=_share_with(lm, random_ids, named),
        input_hits=() if read_ids is None else _hits(lm, read_ids, named, deaf),
        random_input_hits=() if random_read_ids is None else _share_with(lm, random_read_ids, named),
        random_kurtosis=random_shapes[:, 0], random_skew=random_shapes[:, 1], k=k, site=site,
    )  # fmt: skip


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
    sae: SparseCoder, lm: LM, features: list[int], named: Sequence[str], k: int, seed: int
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


def _hits(lm: LM, ids: Tensor, words: Sequence[str], zeros: Sequence[bool]) -> tuple[bool, ...]:
    """zeros: whether a row is all zeros, so that its top tokens mean nothing."""
    rows = zip(ids.tolist(), words, zeros, strict=True)
    return tuple(bool(word) and not none and word.lower() in _plain(lm, row) for row, word, none in rows)


def _share_with(lm: LM, ids: Tensor, words: Sequence[str]) -> tuple[float, ...]:
    rows = [_plain(lm, row) for row in ids.tolist()]
    return tuple(float(np.mean([word.lower() in row for row in rows])) if word else 0.0 for word in words)


def _plain(lm: LM, ids: Sequence[int]) -> set[str]:
    return {lm.vocabulary[i].strip().lower() for i in ids}
