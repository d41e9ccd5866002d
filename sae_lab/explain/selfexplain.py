"""The model explains a feature: the feature's direction replaces a word, and the model continues the text."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated, check_least
from sae_lab.explain.prompts import check_coder, check_features
from sae_lab.explain.words import WordHits, words_for
from sae_lab.lm.model import LM
from sae_lab.results import Figure, counted
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch, Write

MEANING = 'The meaning of the word "X" is "'
REPEAT = "cat -> cat; 135 -> 135; hello -> hello; X ->"  # the few-shot prompt of Patchscopes for a token's identity
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
NORM_OF = "The history of the city begins with the old market by the river, where people came to trade."


@dataclass(frozen=True)
class Implant:
    """``lm.generate(prompts, edits=[Implant(site, 3, vectors)])``: an edit that replaces one token's activation.

    position: of the token (0 is the prefix); vectors: "rows d", one for each prompt.
    """

    site: Site
    position: int
    vectors: Float[Tensor, "rows d"]

    def writes(self, lm: LM, batch: TokenBatch, new: int = 0) -> list[Write]:
        """The changes of activations that this edit makes."""
        return [Write(self.site, partial(implanted, position=self.position, vectors=self.vectors))]


@no_type_check
def implanted(x, tokens, position, vectors):
    """x with each row's own vector at one position. A function of torch alone, see ``saes.portable``."""
    here = (tokens.positions == position).to(x.device).unsqueeze(-1)
    return torch.where(here, vectors.to(x)[tokens.row_numbers.to(x.device)].unsqueeze(1), x)


@dataclass(frozen=True, repr=False)
class SelfExplanations(WordHits):
    """Result of ``self_explain``: one entry a feature, in the order of ``features``.

    Attributes:
        texts: what the model wrote after the prompt; ``random_texts``: with random vectors, several a feature.
        scale: the chosen c, in units of the norm of activations at the site; ``similarity``: the self-similarity with
            it; ``random_similarity``: of the random vectors, mean.
        words: the word of each feature, "" for none; ``hits``: whether the text holds it; ``random_hits``: share of its
            random vectors' texts that do; ``other_hits``: share of the other features' texts.
    """

    features: tuple[int, ...]
    texts: tuple[str, ...]
    scale: tuple[float, ...]
    similarity: tuple[float, ...]
    random_similarity: tuple[float, ...]
    words: tuple[str, ...]
    hits: tuple[bool, ...]
    random_hits: tuple[float, ...]
    other_hits: tuple[float, ...]
    random_texts: tuple[tuple[str, ...], ...] = field(repr=False)
    prompt: str
    site: Site
    norm: float

    _records = ("feature=features", "scale", "similarity", "texts", "words", "hits", "random_hits", "other_hits",
                "random_texts")  # fmt: skip

    @property
    def random_hit_rate(self) -> float:
        """The same of random vectors of equal norms, the control."""
        return self._rate("random_hits")[0]

    @property
    def other_hit_rate(self) -> float:
        """The share of the other features' texts that hold a feature's word, the second control."""
        return self._rate("other_hits")[0]

    def figures(self) -> list[Figure]:
        found = self._rate("hits")
        return [
            Figure("the word is named", *found, self.random_hit_rate, "random vectors",
                   f"share of {counted(self._named, 'feature')} with a word", "high"),
            Figure("and not another's", *found, self.other_hit_rate, "other features' texts",
                   "share of texts with the feature's word", "high"),
            Figure("self-similarity", float(np.mean(self.similarity)), control=float(np.mean(self.random_similarity)),
                   control_name="random vectors", meaning="cosine of the last token and the direction"),
        ]  # fmt: skip

    def _footer(self) -> str:
        rows = zip(self.features, self.words, self.scale, self.texts, strict=True)
        lines = [f"feature {f} {word!r} at {scale:g}: {text!r}" for f, word, scale, text in rows]
        head = f"prompt {self.prompt!r}, implanted at {self.site} (norm {self.norm:.3g}); ± over features"
        return "\n".join([head, *lines])


@as_annotated
def self_explain(
    sae: SparseCoder,
    lm: LM,
    features: Sequence[int],
    words: Mapping[int, str] | None = None,
    *,
    prompt: str = MEANING,
    placeholder: str = "X",
    at: Site | str | None = None,
    scales: Sequence[float] = SCALES,
    compare: Site | str | None = None,
    tokens: int = 20,
    controls: int = 2,
    seed: int = 0,
) -> SelfExplanations:
    """``self_explain(sae, lm, [812])``: replace a placeholder's activation by c·d, d a feature's decoder direction, and
    let the model continue the prompt.

    c = s·(median norm of activations at that site), with the s of ``scales`` of the largest self-similarity: the cosine
    of d and the last prompt token's activation at ``compare``. Generation is greedy. Controls: random directions of
    equal norms, with their s chosen in the same way; and each word in the other features' texts.

    Chen et al. 2024 (SelfIE, arXiv:2403.10949), Ghandeharioun et al. 2024 (Patchscopes, arXiv:2401.06102); c is chosen
    as in "Self-explaining SAE features" (2024, LessWrong), without its entropy of the next token. These used models of
    billions of parameters. The bundled model of 135M named 2 of 12 token features of ``smollm2-135m/resid_post-8``, and
    none by random vectors (benchmarks/methods.py).

    Args:
        words: the token of each feature that fires on one token (``token_features`` finds them): a hit is a text that
            holds it as a word, case ignored.
        prompt: a text with the placeholder, which must be one token.
        at: an early site; None: the stream after the second block.
        compare: a later site in the same space as d; None: the coder's, or if that is not later, the stream after the
            last block.
        tokens: how many to generate. controls: random vectors a feature.

    Raises ValueError for a placeholder that is no token of the prompt, sites in the wrong order or of another width,
    and settings out of range.
    """
    check_coder(sae, lm)
    features = check_features(sae, features)
    check_least(1, tokens=tokens, controls=controls)
    made = implants(sae, lm, features, controls, prompt, placeholder, at, compare, scales, seed)
    whole = lm.generate([prompt] * len(made.scale), [made.edit], max_new_tokens=tokens)
    texts, n = [text[len(prompt) :] for text in whole], len(features)
    own, others = texts[:n], texts[n:]
    by_chance = [tuple(others[i * controls : (i + 1) * controls]) for i in range(n)]
    named = words_for(features, words)
    return SelfExplanations(
        features=tuple(features), texts=tuple(own), scale=tuple(made.scale[:n].tolist()), words=named,
        similarity=tuple(made.similarity[:n].tolist()),
        random_similarity=tuple(made.similarity[n:].reshape(-1, controls).mean(1).tolist()),
        hits=tuple(holds(text, word) for text, word in zip(own, named, strict=True)),
        random_hits=tuple(share(texts, word) for texts, word in zip(by_chance, named, strict=True)),
        other_hits=tuple(share([*own[:i], *own[i + 1 :]], word) for i, word in enumerate(named)),
        random_texts=tuple(by_chance), prompt=prompt, site=made.edit.site, norm=made.norm,
    )  # fmt: skip


class Implants(NamedTuple):
    """Directions of features, then of random controls, as edits of the prompt, with the scale chosen for each."""

    edit: Implant
    scale: Float[Tensor, " n"]
    similarity: Float[Tensor, " n"]
    norm: float


def implants(
    sae: SparseCoder, lm: LM, features: Sequence[int], controls: int, prompt: str, placeholder: str,
    at: Site | str | None, compare: Site | str | None, scales: Sequence[float], seed: int,
) -> Implants:  # fmt: skip
    at, compare = implant_sites(sae, lm, at, compare)
    position, norm = placeholder_position(lm, prompt, placeholder), typical_norm(lm, at)
    random = torch.randn(controls * len(features), sae.d_out, generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([sae.W_dec[list(features)].detach().float().cpu(), random])
    vectors = norm * torch.nn.functional.normalize(rows, dim=1)
    scale, similarity = choose_scale(lm, prompt, position, at, compare, vectors, scales)
    return Implants(Implant(at, position, scale[:, None] * vectors), scale, similarity, norm)


def choose_scale(
    lm: LM, prompt: str, position: int, at: Site, compare: Site, vectors: Float[Tensor, "n d"], scales: Sequence[float]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """(the scale with the largest self-similarity, that similarity) of each vector."""
    if not scales or min(scales) <= 0 or not all(math.isfinite(s) for s in scales):
        raise ValueError(f"scales must be at least one positive number, got {list(scales)}")
    grid = torch.tensor(scales, dtype=torch.float32)
    found = []
    for part in vectors.split(max(1, 128 // len(scales))):
        rows = (grid[None, :, None] * part[:, None]).flatten(0, 1)
        batch = lm.tokenize([prompt] * len(rows))
        writes = Implant(at, position, rows).writes(lm, batch)
        last = lm.run(batch, [compare], writes, logits=False)[0][compare][:, -1].float().cpu()
        cosines = torch.cosine_similarity(last.reshape(len(part), len(scales), -1), part[:, None], dim=-1)
        found.append(cosines)
    best = torch.cat(found).max(1)
    return grid[best.indices], best.values


def implant_sites(sae: SparseCoder, lm: LM, at: Site | str | None, compare: Site | str | None) -> tuple[Site, Site]:
    """(the site to implant at, the site to compare at). ValueError for a wrong order or another width."""
    last = lm.n_layers - 1
    at = Site.of(at) if at is not None else Site("resid_post", min(1, last - 1)) if last else Site("embed")
    own = sae.writes[0] if sae.writes else sae.site
    if compare is None:
        later = own.kind.startswith("resid") and (own.layer or 0) > _depth(at)
        compare = own if later else Site("resid_post", last)
    compare = Site.of(compare)
    if _depth(compare) <= _depth(at):
        raise ValueError(f"self-similarity needs a later layer than the implant's: compare={compare}, at={at}")
    for site in (at, compare):
        if lm.width(site) != sae.d_out:
            raise ValueError(f"directions are {sae.d_out} wide, {lm} is {lm.width(site)} at {site}: take another site")
    return at, compare


def _depth(site: Site) -> int:
    return -1 if site.layer is None else site.layer


def placeholder_position(lm: LM, prompt: str, placeholder: str) -> int:
    """The position of the prompt's last token that is the placeholder."""
    places = [i for i, token in enumerate(lm.tokens(prompt)) if token.strip() == placeholder]
    if not placeholder.strip() or not places:
        labels = [t.label for t in lm.tokens(prompt)]
        raise ValueError(f"placeholder must be a token of the prompt, got {placeholder!r}; its tokens are {labels}")
    return places[-1]


def typical_norm(lm: LM, site: Site, text: str = NORM_OF) -> float:
    """The median norm of activations at a site on a plain sentence, its first token left out."""
    return float(lm.read(text, site)[site][0, 1:].norm(dim=-1).median())


def holds(text: str, word: str) -> bool:
    """Whether a text holds a word, case ignored, and not as part of a longer one; False for ""."""
    return bool(word) and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def share(texts: Sequence[str], word: str) -> float:
    """Share of texts that hold a word; NaN for no texts."""
    return float(np.mean([holds(text, word) for text in texts])) if texts else math.nan
