"""Effects of one feature on the features of later coders."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated, check_least
from sae_lab.circuits.metric import ROWS, plus
from sae_lab.circuits.pairs import copied, kept
from sae_lab.lm.model import LM
from sae_lab.noting import Names
from sae_lab.results import Result, by_column, counted, result
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch, Write

FAR = 3.0  # the size from which a z-score is counted as far
LEAST = 3  # controls that a standard deviation is taken over


@result
class DownstreamEffects(Result):
    """Result of ``circuits.effects_of``: changes of mean codes over the tokens that count. Its table has one row a
    later feature that changed, the largest |z| first.

    Attributes:
        feature, site: the feature that was ablated, or steered by ``strength``, and its site.
        changes, z: {later site: " d_sae"}: change of each later feature, and its z-score among the controls' changes.
        before: mean codes without the change. control_mean, control_sd: of the controls' changes.
        against: the kind of controls; controls: the features, if they were features.
        beyond, largest: how many later features have |z| > 3, and the largest |z|. beyond_controls, largest_controls:
            the same for each control, scored among the other controls: the level of chance.
        names: of features, by site.
    """

    feature: int
    site: Site
    strength: float | None
    changes: dict[Site, Tensor]
    z: dict[Site, Tensor]
    before: dict[Site, Tensor]
    control_mean: dict[Site, Tensor]
    control_sd: dict[Site, Tensor]
    against: str
    controls: tuple[int, ...]
    beyond: int
    largest: float
    beyond_controls: tuple[int, ...]
    largest_controls: tuple[float, ...]
    names: dict[Site, Names] = field(default_factory=lambda: defaultdict(Names))

    _records, _shown, _digits = "_changed", 8, ".4f"

    def _header(self) -> str:
        what = "ablated" if self.strength is None else f"steered by {self.strength:g}"
        counts = sorted(self.beyond_controls)
        beaten = sum(one >= self.largest for one in self.largest_controls)
        reached = f"{counted(beaten, 'control')} reach{'es' * (beaten == 1)} it"
        return (
            f"feature {self.names[self.site].numbered(self.feature)} of {self.site.key} {what}: "
            f"{counted(self.beyond, 'later feature')} with |z| > {FAR:g} (the controls, {len(counts)} "
            f"{self.against}: median {counts[len(counts) // 2]}), the largest {self.largest:.1f} "
            f"({reached}); the strongest:"
        )

    @property
    def _changed(self) -> dict[str, list[Any]]:
        columns = (self.before, self.changes, self.control_mean, self.control_sd, self.z)
        rows = [
            (s.key, f, self.names[s][f], *(float(column[s][f]) for column in columns))
            for s, change in self.changes.items()
            for f in change.nonzero().flatten().tolist()
        ]
        names = "site feature name before change control_mean control_sd z"
        return by_column(names, sorted(rows, key=lambda row: -abs(row[-1])))


@as_annotated
def effects_of(
    lm: LM,
    coder: SparseCoder,
    feature: int,
    prompts: Sequence[str] | str,
    later: Sequence[SparseCoder],
    *,
    strength: float | None = None,
    against: str = "features",
    controls: int = 30,
    seed: int = 0,
) -> DownstreamEffects:
    """``effects_of(lm, sae_8, 2681, prompts, [sae_16])``: change one feature, and find the features of later coders
    that depend on it. ("Causal Graphs of GPT-2-Small's Residual Stream", LessWrong 2024, does so for every
    feature; the controls are added here.)

    The feature's part of the activation is subtracted wherever it fires (``strength=None``), or strength·f_scale·W_dec
    is added at every token that the mask keeps; the coder's error stays. A later feature j's change c_j is the mean
    change of its code over the kept tokens, and

        z_j = (c_j - mean_g c_gj) / max(sd_g c_gj, s0_j)

    over controls g. s0_j is the median of the non-zero standard deviations over the same coder's features (of codes
    times the norms of their decoder rows, divided by j's norm), so that a feature which no control moved gets a finite
    score. Controls: "features" ablates other features active on these prompts whose part has a norm (root of its sum of
    squares over tokens) within a factor of two of the feature's, or the nearest if these are too few; when steering, it
    makes the same change along other active features' directions. "directions" makes a change of the same norm in a
    random direction at every token.

    Args:
        coder: an SAE, or a transcoder (it is changed where it writes). later: coders that read sites computed later.
        prompts: of any lengths. strength: None ablates; a number steers, in units of f_scale.
        controls: how many, at least 3.

    Raises ValueError for a feature that is silent on the prompts (ablation) or has no f_scale (steering), a later coder
    that reads too early, two later coders of one site, and too few controls.
    """
    feature, prompts = coder.feature(feature), [prompts] if isinstance(prompts, str) else list(prompts)
    at = coder.writes[0] if coder.writes else coder.site
    by_site = _later(lm, at, later)
    check_least(LEAST, controls=controls)
    if against not in ("features", "directions"):
        raise ValueError(f"against must be 'features' or 'directions', got {against!r}")
    batch = lm.tokenize(prompts)
    x = lm.run(batch, [coder.site, *by_site], logits=False)[0]
    keep = kept(lm, [coder, *later], (batch, x))
    with torch.no_grad():
        change = _change(coder, feature, x[coder.site], keep, strength)
        chosen, others = _controls(coder, feature, x[coder.site], keep, change, strength, against, controls, seed)
        before = {s: _mean(c.encode(x[s]), keep)[0] for s, c in by_site.items()}
        found = _changes(lm, batch, at, torch.stack([change, *others]), by_site, keep, before)
    norms = {s: c.W_dec.detach().norm(dim=1).cpu() for s, c in by_site.items()}
    z = {s: _z(one[0], one[1:], norms[s]) for s, one in found.items()}
    beyond, largest = _extent(z)
    chance = [
        _extent({s: _z(one[g], torch.cat([one[1:g], one[g + 1 :]]), norms[s]) for s, one in found.items()})
        for g in range(1, 1 + len(others))
    ]
    return DownstreamEffects(
        feature=feature, site=at, strength=strength, changes={s: one[0] for s, one in found.items()}, z=z,
        before={s: b.cpu() for s, b in before.items()}, control_mean={s: one[1:].mean(0) for s, one in found.items()},
        control_sd={s: one[1:].std(0) for s, one in found.items()}, against=against, controls=chosen, beyond=beyond,
        largest=largest, beyond_controls=tuple(n for n, _ in chance), largest_controls=tuple(z for _, z in chance),
        names={s: Names(c) for s, c in {**by_site, at: coder}.items()},
    )  # fmt: skip


def _later(lm: LM, at: Site, later: Sequence[SparseCoder]) -> dict[Site, SparseCoder]:
    if not later:
        raise ValueError("later needs at least one coder: pass those whose features are to be read")
    for coder in later:
        if lm._sites.when(coder.site) <= lm._sites.when(at):
            raise ValueError(
                f"later coders read what is computed after the change at {at}, and {coder.site} is not: leave it out, "
                "or change a feature of an earlier coder"
            )
    if len({coder.site for coder in later}) < len(later):
        raise ValueError("later takes one coder a site, two of these share one: call effects_of once for each")
    return {coder.site: coder.eval() for coder in later}


def _change(
    coder: SparseCoder, feature: int, x: Tensor, keep: Tensor, strength: float | None
) -> Float[Tensor, "batch pos d"]:
    """The change of the activations by ablating or steering the feature."""
    z = coder.eval().encode(x)[..., feature] * keep.to(x)
    if strength is None:
        if not bool(z.any()):
            raise ValueError(
                f"feature {feature} is silent on these prompts, so that ablating it changes nothing: take prompts on "
                "which it fires (sl.features shows them), or steer it with strength="
            )
        return _part(coder, feature, x, -z)
    if not strength or not bool(coder.f_scale[feature] > 0):
        raise ValueError(
            f"strength is in units of f_scale and not 0: got {strength}, and feature {feature} has f_scale "
            f"{float(coder.f_scale[feature]):g}: take a feature that fires in training, or sae.calibrate(...)"
        )
    return _part(coder, feature, x, strength * coder.f_scale[feature] * keep.to(x))


def _part(coder: SparseCoder, feature: int, x: Tensor, codes: Tensor) -> Float[Tensor, "batch pos d"]:
    part = coder.write_of(codes.reshape(-1, 1), [feature], x.reshape(-1, x.shape[-1]))
    return part.reshape(*codes.shape, -1)


def _controls(
    coder: SparseCoder, feature: int, x: Tensor, keep: Tensor, change: Tensor, strength: float | None, against: str,
    count: int, seed: int,
) -> tuple[tuple[int, ...], list[Tensor]]:  # fmt: skip
    """(the control features, the change that each control makes)."""
    generator = torch.Generator().manual_seed(seed)
    norms = change.norm(dim=-1, keepdim=True)
    if against == "directions":
        drawn = torch.randn(count, change.shape[-1], generator=generator).to(change)
        return (), [norms * one / one.norm() for one in drawn]
    z = coder.encode(x) * keep.unsqueeze(-1).to(x)
    sizes = coder.strengths(z, x).square().sum((0, 1)).sqrt().cpu()
    sizes[feature] = 0.0
    active = sizes.argsort(descending=True)[: int(sizes.count_nonzero())]  # so that a draw depends on size
    if len(active) < count:
        raise ValueError(
            f"{count} controls need {count} other features active on the prompts, there are {len(active)}: pass more "
            "prompts, fewer controls, or against='directions'"
        )
    if strength is not None:
        chosen = active[torch.randperm(len(active), generator=generator)[:count]].tolist()
        units = coder.directions()[chosen] * (1 if strength > 0 else -1)
        return tuple(chosen), [norms * unit for unit in units]
    far = (sizes[active] / change.norm().cpu()).log().abs()
    near = active[far < torch.tensor(2.0).log()]
    if len(near) >= count:
        chosen = near[torch.randperm(len(near), generator=generator)[:count]].tolist()
    else:
        chosen = active[far.argsort()[:count]].tolist()
    return tuple(chosen), [_part(coder, g, x, -z[..., g]) for g in chosen]


def _mean(codes: Tensor, keep: Tensor) -> Float[Tensor, "copies d_sae"]:
    """Mean over the tokens that count, of each copy of the batch."""
    weights = keep.to(codes)
    rows = codes.unflatten(0, (-1, len(keep)))
    return torch.einsum("cbpf,bp->cf", rows, weights) / weights.sum()


def _changes(
    lm: LM, batch: TokenBatch, at: Site, added: Tensor, later: dict[Site, SparseCoder], keep: Tensor,
    before: dict[Site, Tensor],
) -> dict[Site, Float[Tensor, "changes d_sae"]]:  # fmt: skip
    """Changes of the mean codes at every later site, for each of the changes added at ``at``."""
    found: dict[Site, list[Tensor]] = {s: [] for s in later}
    for part in added.split(max(1, ROWS // len(batch.ids))):
        rows = part.flatten(0, 1)
        write = Write(at, partial(plus, by=rows))
        acts = lm.run(copied(batch, len(part)), list(later), [write], logits=False)[0]
        for s, coder in later.items():
            found[s].append(_mean(coder.encode(acts[s]), keep) - before[s])
    return {s: torch.cat(parts).cpu() for s, parts in found.items()}


def _z(change: Tensor, controls: Tensor, norms: Tensor) -> Tensor:
    """z-scores among the controls' changes; the standard deviation is at least its median over moved features. Codes
    are multiplied by the norms of decoder rows, so that features of one coder compare in any unit of their codes."""
    change, controls = change * norms, controls * norms
    sd = controls.std(0)
    moved = sd[sd > 0]
    if not len(moved):
        raise ValueError("no control moved any later feature, so nothing has a z-score: pass more prompts or controls")
    return (change - controls.mean(0)) / sd.clamp_min(float(moved.median()))


def _extent(z: dict[Site, Tensor]) -> tuple[int, float]:
    """How many |z| are above 3, and the largest |z|."""
    sizes = torch.cat(list(z.values())).abs()
    return int((sizes > FAR).sum()), float(sizes.max())
