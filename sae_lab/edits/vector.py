"""Vectors: directions in a model's activations that steer, and decide when an edit acts, as a coder's features do."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab import cache, files
from sae_lab.activations.reading import alike
from sae_lab.activations.sharding import MAX_NORM
from sae_lab.arguments import as_annotated, check_least
from sae_lab.edits import rules
from sae_lab.lm.model import LM
from sae_lab.lm.network import Network
from sae_lab.nets.net import Net
from sae_lab.results import counted
from sae_lab.saes.base import QUANTILE, SparseCoder
from sae_lab.saes.families.l1 import L1
from sae_lab.types import Site, TokenMask

TOKENS, CONTEXT = 8192, 128  # read to measure a vector's scale
KIND = "sae_lab vector"  # its note in a file


@as_annotated
@dataclass(frozen=True, init=False, eq=False, repr=False)
class Vector:
    """A direction at a site, which steers by ``sl.Push`` and decides in ``when=``, as a coder's feature does.

        happy = sl.Vector.difference(lm, "resid_post-8", happy_texts, sad_texts, "happy")
        lm.generate("I went to the", edits=[sl.Push(happy, strength=2.0)])

    Also ``sl.Vector.feature(sae, 7)``, ``sl.Vector.pca(lm, site, texts)``, ``sl.fit_probe(...).vector``, and of any
    tensor ``sl.Vector(tensor, site).calibrated(lm)``. ``a + b``, ``a - b``, ``2 * a`` and ``a.project_out(b)`` are
    vectors too. Strengths and levels are multiples of f_scale, in which the code of an activation x is measured:

        code = relu(x·u - centre),  u = direction/norm

    Args:
        direction: of any length; only sums depend on it. site: where it lies. name: for tables and sliders.
        f_scale: 99.9th percentile of the positive codes of a text's tokens: the length of what strength 1 adds. 0: not
            measured yet.
        centre: the mean of x·u over those tokens.
        mask: which tokens an edit may change; None: ``lm.mask()``.
        model: ``lm.id`` of the model that it was made on; "": any of this width.

    Raises ValueError for a direction of length 0, and a negative scale.
    """

    direction: Float[Tensor, " d"]
    site: Site
    name: str
    f_scale: float
    centre: float
    mask: TokenMask | None
    model: str

    def __init__(
        self, direction: Float[Tensor, " d"], site: Site | str, name: str = "", *, f_scale: float = 0.0,
        centre: float = 0.0, mask: TokenMask | None = None, model: str = "",
    ):  # fmt: skip
        direction = direction.detach().float().cpu().clone()
        if not bool(direction.any()):
            raise ValueError("a vector's direction must have a length above 0, got zeros: it points nowhere")
        check_least(0, f_scale=f_scale)
        given = (direction, Site.of(site), name, float(f_scale), float(centre), mask, model)
        for field, value in zip(self.__dataclass_fields__, given, strict=True):
            object.__setattr__(self, field, value)

    @classmethod
    def feature(cls, sae: SparseCoder, feature: int, name: str = "") -> "Vector":
        """``sl.Vector.feature(sae, 7)``: a feature's row of W_dec, where the coder writes; ``sl.Push`` of it is
        ``sl.Steer`` of the feature. Its centre is b_dec·u, and its code is not the feature's: no encoder makes it."""
        i, site = sae.feature(feature), sae.writes[0] if sae.writes else sae.site
        row, bias = sae.W_dec[i].detach().float().cpu(), sae.b_dec.detach().float().cpu()
        if sae.input_norm != "none" and not sae.transcodes:
            raise ValueError(
                f"this coder writes in the size of each token's own activation (input_norm={sae.input_norm!r}), and a "
                "vector is the same at every token: use sl.Steer"
            )
        model, norm = sae.meta.get("model") or "", float(row.norm())
        found = cls(row, site, name or f"feature {i}", mask=sae.mask, model="" if model == "unknown" else model)
        return replace(found, f_scale=float(sae.f_scale[i]) * norm, centre=float(bias @ found.unit))

    @classmethod
    def difference(
        cls, lm: LM | Net, site: Site | str, positive: Any, negative: Any, name: str = "difference", text: Any = None,
    ) -> "Vector":  # fmt: skip
        """``sl.Vector.difference(lm, site, positive, negative)``: mean of positive texts less mean of negative ones
        (Marks and Tegmark 2023, arXiv:2310.06824).

        A text is the mean activation of its tokens that are neither special, nor first, nor of more than 4 median
        norms. text: where the scale is measured, see ``calibrated``. Of a ``sl.Net`` texts are inputs, and all places
        count. ValueError for a text without such a token.
        """
        site = lm.site(site) if isinstance(lm, Net) else Site.of(site)
        above, mask = text_means(lm, [site], positive)
        below, _ = text_means(lm, [site], negative, mask)
        return cls(above.mean(0) - below.mean(0), site, name, mask=mask, model=lm.id).calibrated(lm, text)

    @classmethod
    def pca(
        cls, lm: LM | Net, site: Site | str, texts: Any, component: int = 0, name: str = "", text: Any = None,
    ) -> "Vector":  # fmt: skip
        """``sl.Vector.pca(lm, site, texts)``: a principal component of texts' mean activations (see ``difference``),
        the first is 0; the first text is on its positive side.

        Of texts of two kinds, mixed, the first component is that of Zou et al. 2023 (arXiv:2310.01405) and of CAST.
        ValueError for a component that these texts do not have.
        """
        site = lm.site(site) if isinstance(lm, Net) else Site.of(site)
        means, mask = text_means(lm, [site], texts)
        centred = means - means.mean(0)
        if component >= (most := min(len(texts) - 1, means.shape[1])) or component < 0:
            many = counted(len(texts), "text")
            raise ValueError(f"component must be below {most}, got {component}: give more than {many}")
        axis = torch.linalg.svd(centred, full_matrices=False)[2][component]
        axis = axis if float(centred[0] @ axis) >= 0 else -axis
        return cls(axis, site, name or f"component {component}", mask=mask, model=lm.id).calibrated(lm, text)

    @torch.no_grad()
    def calibrated(self, lm: LM | Net, text: Any = None, tokens: int = TOKENS) -> "Vector":
        """``vector.calibrated(lm)``: the same with ``f_scale`` and ``centre`` measured on a text, as one of this model.

        text: any documents; None: the bundled ones. tokens: at least how many are read. A mask without a largest norm
        at the site gets 4 medians. ValueError for a model of another width, and a text without a token that counts.
        """
        check_least(1, tokens=tokens)
        mine, mask, found, seen = replace(self, model=lm.id), self.mask or lm.mask(), [], 0
        mine.require_fits(lm)
        after = partial(rules.along, direction=self.unit)
        for batch in lm._passes(text, self.site):
            form = Float[Tensor, f"{int(batch.mask.sum())} 2"]
            rows = lm.run(batch, [self.site], logits=False, after=after, form=form)[0][self.site]
            found.append(rows[mask.keep(batch.ids, batch.positions)[batch.mask]])
            if (seen := seen + len(found[-1])) >= tokens:
                break
        if not seen:
            raise ValueError(f"this text has no token that counts ({mask}): give a longer text")
        values, norms = torch.cat(found).unbind(1)
        if isinstance(lm, LM):
            mask = replace(mask, max_norm={self.site.key: MAX_NORM * float(norms.median()), **mask.max_norm})
        values = values[norms <= mask.max_norm.get(self.site.key, math.inf)]
        codes = (values - values.mean()).sort().values
        codes = codes[codes > 0]
        if not len(codes):
            raise ValueError(f"x·u is the same at all {counted(len(values), 'token')} of this text: give a longer text")
        scale = float(codes[int(QUANTILE * (len(codes) - 1))])
        return replace(mine, f_scale=scale, centre=float(values.mean()), mask=mask)

    @property
    def norm(self) -> float:
        """The length of the direction."""
        return float(self.direction.norm())

    @property
    def unit(self) -> Float[Tensor, " d"]:
        """The direction at length 1."""
        return self.direction / self.direction.norm()

    @as_annotated
    def __add__(self, other: "Vector") -> "Vector":
        return self._made(self.direction + self._like(other).direction, f"{self.name} + {other.name}")

    @as_annotated
    def __sub__(self, other: "Vector") -> "Vector":
        return self._made(self.direction - self._like(other).direction, f"{self.name} - {other.name}")

    @as_annotated
    def __mul__(self, factor: float) -> "Vector":
        made = self._made(factor * self.direction, f"{factor:g}·({self.name})")
        return replace(made, f_scale=self.f_scale, centre=self.centre) if factor > 0 else made

    __rmul__ = __mul__

    def __neg__(self) -> "Vector":
        return -1 * self

    def project_out(self, other: "Vector") -> "Vector":
        """``a.project_out(b)``: a without its part along b."""
        along = self._like(other).unit
        return self._made(self.direction - (self.direction @ along) * along, f"{self.name} without {other.name}")

    def _made(self, direction: Tensor, name: str) -> "Vector":
        """A vector of another direction, whose scale is not known."""
        if float(direction.norm()) < 1e-6 * self.norm:  # what rounding leaves of a difference of equal vectors
            raise ValueError(f"{name} has no length: nothing is left of {self}")
        return replace(self, direction=direction, name=name, f_scale=0.0, centre=0.0)

    def _like(self, other: "Vector") -> "Vector":
        both = (self, other)
        alien = len({v.model for v in both if v.model}) > 1
        if alien or other.site != self.site or len(other.direction) != len(self.direction):
            told = [f"{v} of width {len(v.direction)} of {v.model or 'any model'}" for v in both]
            raise ValueError(
                f"vectors of one site, width and model are combined, got {' and '.join(told)}: make both at one site "
                "of one model, or call .calibrated(lm) on both if they mean the same on it"
            )
        return other

    def require_fits(self, lm: Network, measured: bool = False) -> None:
        """ValueError for another model, or another width at the site, and with ``measured`` for a vector without a
        scale."""
        if (width := lm.width(self.site)) != len(self.direction):
            raise ValueError(
                f"{self} has width {len(self.direction)} and {lm} has width {width} there: use the model it was made "
                f"on ({self.model or 'unknown'})"
            )
        if self.model and self.model != lm.id:
            raise ValueError(
                f"{self} was made on {self.model}, this model is {lm.id}, where a direction may mean something else: "
                "if it means the same here, use vector.calibrated(lm)"
            )
        if measured and not self.f_scale:
            raise ValueError(
                f"{self} has no f_scale, the unit of strengths and levels: use vector.calibrated(lm), or give f_scale="
            )

    @cached_property
    def coder(self) -> SparseCoder:
        """The vector as a coder with one feature, 0, for functions that take a coder."""
        coder = L1(len(self.direction), 1)
        with torch.no_grad():
            coder.W_enc[:, 0] = coder.W_dec[0] = self.unit
            coder.b_enc[0], coder.f_scale[0] = -self.centre, self.f_scale
        coder.reads = coder.writes = (self.site,)
        coder.meta = {"model": self.model or None, "mask": self.mask and self.mask.to_dict()}
        coder.in_raw_units = True
        return coder.eval().requires_grad_(False)

    def save(self, path: str | Path) -> Path:
        """``vector.save("happy.safetensors")``: write one file, which ``sl.Vector.load`` reads. Returns the path."""
        with cache.atomic(Path(path)) as temporary:
            files.write_tensors({"direction": self.direction}, temporary, {KIND: json.dumps(self._facts())})
        return Path(path)

    @staticmethod
    def load(path: str | Path) -> "Vector":
        """``sl.Vector.load("happy.safetensors")``. ValueError for a file that ``save`` did not write."""
        try:
            tensors, notes = files.read_tensors(Path(path))
            return _of_facts(tensors["direction"], files.parse_json(notes[KIND]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            raise ValueError(f"{path} holds no vector ({err!r}): give a file that vector.save(path) wrote") from err

    def to_dict(self) -> dict[str, Any]:
        """The whole vector as plain data, for JSON; the direction as base64 of little-endian float32."""
        return {**self._facts(), "direction": base64.b64encode(self.direction.numpy().astype("<f4").tobytes()).decode()}

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> "Vector":
        """What ``to_dict`` gave. ValueError for anything else."""
        try:
            raw = bytearray(base64.b64decode(found["direction"], validate=True))
            return _of_facts(torch.frombuffer(raw, dtype=torch.float32), found)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise ValueError(f"this is no vector of sae_lab ({err!r}): pass what vector.to_dict() returned") from err

    def _facts(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in ("name", "f_scale", "centre", "model")}
        return {**facts, "site": self.site.key, "mask": self.mask and self.mask.to_dict()}

    def __repr__(self) -> str:
        scale = f", f_scale {self.f_scale:.3g}" if self.f_scale else ""
        return f"Vector({self.name!r} at {self.site.key}, norm {self.norm:.3g}{scale})"


def _of_facts(direction: Tensor, facts: Mapping[str, Any]) -> Vector:
    named = {name: facts[name] for name in ("site", "name", "f_scale", "centre", "model")}
    return Vector(direction, **named, mask=TokenMask.from_dict(facts["mask"]) if facts["mask"] else None)


@torch.no_grad()
def text_means(
    lm: LM | Net, sites: Sequence[Site], texts: Any, mask: TokenMask | None = None
) -> tuple[Float[Tensor, "texts d"], TokenMask]:
    """(each text's mean activation at the first site, over the tokens that the mask keeps at all sites; the mask).
    mask: None: the model's, with a largest norm of 4 medians at each site."""
    if isinstance(lm, Net):
        batch = lm._batch(texts, sites[0])
        return lm.run(batch, sites, logits=False)[0][sites[0]].mean(1).cpu(), mask or lm.mask()
    if not texts:
        raise ValueError("there must be at least one text of each kind, got none")
    means: list[Tensor] = [torch.empty(0)] * len(texts)
    for group in alike([len(lm.tokenize(text).ids[0]) for text in texts]):
        batch = lm.tokenize([texts[i] for i in group])
        acts = {s: x.cpu() for s, x in lm.run(batch, sites, logits=False)[0].items()}
        usual = lm.mask().keep(batch.ids, batch.positions) & batch.mask
        limits = {s.key: MAX_NORM * float(x[usual].norm(dim=-1).median()) for s, x in acts.items() if usual.any()}
        mask = replace(lm.mask(), max_norm=limits) if mask is None else mask
        keep = mask.keep(batch.ids, batch.positions, acts) & batch.mask
        for i, x, kept in zip(group, acts[sites[0]], keep, strict=True):
            if not kept.any():
                raise ValueError(f"the mask leaves out every token of {texts[i]!r:.80} ({mask}): give a longer text")
            means[i] = x[kept].mean(0)
    return torch.stack(means), mask or lm.mask()
