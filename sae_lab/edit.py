"""Edits: change a model through a coder's codes, inside ``lm.logits``, ``lm.loss``, ``lm.generate``, ``lm.read``.

An edit turns codes z into z' for some features. With ``error="keep"`` (SAELens: use_error_term) it adds W_dec of
(z' - z) only, never two decodes, so that what the coder cannot explain stays, and an edit that changes no code leaves
logits bit-equal. With ``error="drop"`` the activation becomes decode(z').
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lab.saes.base import SparseCoder
from sae_lab.types import TokenBatch, TokenMask, Write

if TYPE_CHECKING:
    from sae_lab.lm.model import LM

Positions = int | slice | Sequence[int] | None


@dataclass(frozen=True)
class Edit:
    """Base of all edits.

    Args:
        coder: knows its site and token mask.
        feature: one feature or several.
        positions: where it acts: None, everywhere; an int, a slice or a list of absolute positions (0 is the prefix
            token; stable under padding and generation). Padding and the tokens that the coder's mask leaves out are
            never edited.
        error: "keep" or "drop" what the coder does not reconstruct.
    """

    coder: SparseCoder
    feature: int | Sequence[int]

    def __post_init__(self):
        if not self.features:
            raise ValueError("an edit needs at least one feature")
        if self.error not in ("keep", "drop"):  # type: ignore[attr-defined]
            raise ValueError(f"error must be 'keep' or 'drop', got {self.error!r}")  # type: ignore[attr-defined]
        _check_positions(self.positions)  # type: ignore[attr-defined]

    @property
    def features(self) -> list[int]:
        """The features as a list, each checked, each once."""
        many = self.feature if isinstance(self.feature, Sequence) else [self.feature]
        return list(dict.fromkeys(self.coder.feature(i) for i in many))

    def new_codes(self, z: Float[Tensor, "tokens features"], scale: Float[Tensor, " features"]) -> Tensor:
        """z' from z. ``scale`` is each feature's ``f_scale``."""
        raise NotImplementedError

    def writes(self, lm: "LM") -> list[Write]:
        """What the model must do. ValueError when the coder's site has another width, or a feature has no scale."""
        coder, features = self.coder, self.features
        if len(coder.reads) > 1 or (coder.writes and coder.writes != coder.reads):
            raise ValueError(
                f"edits act where a coder reads and writes the same one site; this one reads {coder.reads} and writes "
                f"{coder.writes}: take an SAE of one of them"
            )
        site = coder.site
        if lm.width(site) != coder.d_in:
            raise ValueError(
                f"this coder reads width {coder.d_in} and {lm} has width {lm.width(site)} at {site}: "
                f"use the model it was trained on ({coder.meta.get('model', 'unknown')})"
            )
        if coder.training:
            raise ValueError("an edit needs the coder in eval mode, where a token's codes are its own: call sae.eval()")
        scale = coder.f_scale[features]
        self._check_scale(scale)
        mask = coder.mask or lm.mask()
        positions, drop = self.positions, self.error == "drop"  # type: ignore[attr-defined]

        def write(x: Tensor, tokens: TokenBatch) -> Tensor:
            keep = _where(x, tokens, mask, site, positions)
            return _apply(x, tokens.ids, keep, coder, features, scale, self.new_codes, drop)

        return [Write(site, write)]

    def _check_scale(self, scale: Tensor) -> None:
        """Edits in units of f_scale need a feature that has fired."""
        if self.coder.meta.get("f_scale") == "unknown" and not bool(self.coder.f_scale.any()):
            raise ValueError(
                "this coder's format does not tell how strongly its features fire, which edits are measured in: load "
                "it with sl.load(..., check=store), or call sae.calibrate([activations])"
            )
        if silent := [f for f, s in zip(self.features, scale.tolist(), strict=True) if s == 0]:
            raise ValueError(
                f"feature {silent[0]} never fired on training text, so it has no scale to measure strength in: choose "
                f"a live feature, or set sae.f_scale[{silent[0]}] yourself"
            )


@dataclass(frozen=True)
class Steer(Edit):
    """z' = z + strength·f_scale: push along a feature's direction. Strength 1 adds the activation that the feature's
    strongest 0.1 % of firings reach; 1-2 steers fluent text, above 4 most text breaks."""

    strength: float = 1.0
    positions: Positions = None
    error: str = "keep"

    def __post_init__(self):
        super().__post_init__()
        _check_number("strength", self.strength)

    def new_codes(self, z: Tensor, scale: Tensor) -> Tensor:
        return z + self.strength * scale


@dataclass(frozen=True)
class Ablate(Edit):
    """z' = 0: take a feature out."""

    positions: Positions = None
    error: str = "keep"

    def new_codes(self, z: Tensor, scale: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def _check_scale(self, scale: Tensor) -> None:
        """Zero needs no unit."""


@dataclass(frozen=True)
class Clamp(Edit):
    """z' = value·f_scale: hold a feature at a level, whatever the text says."""

    value: float = 1.0
    positions: Positions = None
    error: str = "keep"

    def __post_init__(self):
        super().__post_init__()
        _check_number("value", self.value)

    def new_codes(self, z: Tensor, scale: Tensor) -> Tensor:
        return (self.value * scale).expand_as(z)


def _check_number(name: str, value: float) -> None:
    if not torch.tensor(float(value)).isfinite():
        raise ValueError(f"{name} must be a finite number, got {value}")


def _check_positions(positions: Positions) -> None:
    if isinstance(positions, slice) and positions.step is not None and positions.step < 1:
        raise ValueError(f"a slice of positions runs forward, with a step of at least 1, got {positions}")
    numbers = [positions.start, positions.stop] if isinstance(positions, slice) else positions
    numbers = [numbers] if isinstance(numbers, int) else numbers or []
    if any(n is not None and n < 0 for n in numbers):
        raise ValueError(f"positions count from the prefix token (0) and are never negative, got {positions}")


def _where(x: Tensor, tokens: TokenBatch, mask: TokenMask, site, positions: Positions) -> Bool[Tensor, "batch pos"]:
    """The tokens an edit touches."""
    keep = mask.keep(tokens.ids, tokens.positions, {site: x.to(tokens.ids.device)}) & tokens.mask
    at = tokens.positions
    if isinstance(positions, slice):
        stop = positions.stop if positions.stop is not None else torch.inf
        start, step = positions.start or 0, positions.step or 1
        keep &= (at >= start) & (at < stop) & ((at - start) % step == 0)
    elif positions is not None:
        wanted = [positions] if isinstance(positions, int) else list(positions)
        keep &= torch.isin(at, torch.tensor(wanted, dtype=at.dtype))
    return keep.to(x.device)


@torch.no_grad()
def _apply(
    x: Tensor, ids: Tensor, keep: Tensor, coder: SparseCoder, features: list[int], scale: Tensor, new_codes, drop: bool
) -> Tensor:
    """x with the codes of ``features`` replaced at the kept tokens."""
    if not bool(keep.any()):
        return x
    rows = x[keep].float().to(coder.W_dec.device)
    device = rows.device
    f = coder.encode(rows)
    z = f[:, features]
    new = new_codes(z, scale)
    if drop:
        f[:, features] = new
        rows = coder.decode(f, ids[keep.to(ids.device)].to(device))
    else:
        rows = rows + (new - z) @ coder.W_dec[features]
    out = x.clone()
    out[keep] = rows.to(x.device, x.dtype)
    return out
