"""Conditions: when an edit acts (``when=``), and how often one holds on texts where it should not."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_lab.activations.reading import alike, require_fits
from sae_lab.edits import rules
from sae_lab.edits.vector import Vector
from sae_lab.lm.network import Network
from sae_lab.results import Result, figure, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import clustered_error, share_interval
from sae_lab.types import Site

SCOPES = ("token", "so far", "prompt")


@result
class Firing(Result):
    """Result of ``edit.firing``. Intervals are of 95 % (Wilson); since tokens of a text are not independent, theirs is
    that of as many independent ones as have the same standard error clustered by text."""

    token_rate: float = figure("tokens", "share at which it acts", best="low", digits=".2%")
    text_rate: float = figure("texts", "share in which it acts at all", best="low", digits=".1%")
    token_interval: tuple[float, float]
    text_interval: tuple[float, float]
    tokens: int
    texts: int
    when: str
    _below = (
        "when={when}; 95 % intervals: {token_interval[0]:.2%} to {token_interval[1]:.2%} of {tokens:,} tokens, "
        "{text_interval[0]:.1%} to {text_interval[1]:.1%} of {texts} texts"
    )


class Condition(NamedTuple):
    """``when`` of an edit, understood: a feature's code must exceed ``level`` times its f_scale."""

    coder: SparseCoder
    feature: int
    level: float
    scope: str
    what: Any  # as it was given

    @classmethod
    def of(cls, when: Any, own: SparseCoder | None) -> "Condition":
        """From the argument. own: the edit's coder, whose features may be given by number; None: an edit without."""
        given: Any = when if isinstance(when, list | tuple) and len(when) == 3 else (None, None, None)
        what, level, scope = given
        pair = isinstance(what, list | tuple) and len(what) == 2 and isinstance(what[0], SparseCoder)
        coder, feature = what if pair else (own, what) if type(what) is int else (None, 0)
        coder = what.coder if isinstance(what, Vector) else coder
        number = isinstance(level, int | float) and not isinstance(level, bool) and 0 <= level < math.inf
        if coder is None or not number or scope not in SCOPES:
            raise ValueError(
                "when is (feature, (sae, feature) or vector, level of at least 0 in its f_scale, 'token', 'so far' or "
                f"'prompt'), got {when!r:.120}: e.g. when=((sae, 7), 0.5, 'token')"
            )
        return cls(coder, coder.feature(feature), float(level), scope, what)

    def check(self, lm: Network, at: Site) -> None:
        """ValueError unless the model can decide it before it computes the edit's site ``at``."""
        if isinstance(self.what, Vector):
            self.what.require_fits(lm, measured=True)
        require_fits(self.coder, lm, writes=False)
        require_scale(self.coder, [self.feature])
        if self.coder.training:
            raise ValueError("a condition needs its coder in eval mode, where a token's codes are its own: sae.eval()")
        if lm._sites.when(self.coder.site) > lm._sites.when(at):
            raise ValueError(
                f"a condition is read at the edit's site or before it, got one at {self.coder.site} for an edit at "
                f"{at}, which the model computes first: take a feature or a vector of an earlier site"
            )

    def plain(self, lm: Network) -> dict[str, Any]:
        """As ``rules.holds`` takes it, and its "site"."""
        mask, site = self.coder.mask or lm.mask(), self.coder.site
        looks = {"special": list(mask.special_ids), "skip_first": mask.skip_first, "loud": None}
        looks |= {"limit": mask.max_norm.get(site.key)}
        code = {"plan": self.coder.portable([self.feature], whole=False)}
        code |= {"level": self.level * float(self.coder.f_scale[self.feature])}
        return {**code, "scope": self.scope, "mask": looks, "memory": {}, "site": site}

    def firing(self, lm: Any, texts: Sequence[str]) -> Firing:
        """See ``Edit.firing``."""
        if not texts:
            raise ValueError("texts must be at least one text where the condition should not hold, got none")
        when, parts, places = self.plain(lm), [], []
        site = when.pop("site")  # a server has no such type
        for group in alike([len(lm.tokenize(one).ids[0]) for one in texts]):
            batch = lm.tokenize([texts[i] for i in group])
            form = Bool[Tensor, " ".join(map(str, batch.ids.shape))]
            after = partial(rules.holds, when=when)
            held = lm.run(batch, [site], logits=False, after=after, form=form)[0][site]
            real = (self.coder.mask or lm.mask()).keep(batch.ids, batch.positions) & batch.mask
            parts.append(held[real].float())
            places.append(torch.tensor(group)[real.nonzero()[:, 0]])
        acts, text = torch.cat(parts), torch.cat(places)
        rate, error = float(acts.mean()), clustered_error(acts, text)
        hits = float((torch.zeros(len(texts)).index_add_(0, text, acts) > 0).float().mean())
        independent = min(rate * (1 - rate) / error**2, len(acts)) if error > 0 else len(texts)
        bounds = share_interval(rate, independent), share_interval(hits, len(texts))
        return Firing(rate, hits, *bounds, len(acts), len(texts), repr(self))

    def __repr__(self) -> str:
        what = self.what if isinstance(self.what, Vector | int) else (self.coder.site, self.feature)
        return repr((what, self.level, self.scope))


def require_scale(coder: SparseCoder, features: Sequence[int]) -> None:
    """ValueError for a feature without the scale that strengths and levels are multiples of."""
    if coder.meta.get("f_scale") == "unknown" and not bool(coder.f_scale.any()):
        raise ValueError(
            "this coder's file does not say how strongly its features fire, the unit of edits: load it with "
            "sl.load(..., check=store), or call sae.calibrate([activations])"
        )
    if silent := [f for f in features if not coder.f_scale[f]]:
        raise ValueError(
            f"feature {silent[0]} never fired on training text, so it has no scale to measure strength in: choose "
            f"a live feature, or set sae.f_scale[{silent[0]}] yourself"
        )
