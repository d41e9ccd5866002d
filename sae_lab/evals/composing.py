"""Composed features: decoder rows that are sums of two true directions, as when features fire together."""

import math
from dataclasses import field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.activations.world import World
from sae_lab.arguments import as_annotated
from sae_lab.evals.sampling import share_of
from sae_lab.results import Result, figure, result
from sae_lab.saes.base import SparseCoder

EXPLAINED = 0.8  # least share of a unit row's squared length, for directions that explain it
SMALLER_PART = 1 / 3  # of the larger coefficient: with less, the second direction is no part
_TAG = 0x434F4D504F5345  # sets the control's seeds apart from those with which coders start
_CHUNK = 256


@result
class Composition(Result):
    """Result of ``sl.evals.composition``: shares of live decoder rows. ``one``, ``two``: of every live row, how much of
    its squared length one and two true directions explain; ``pair``: which two."""

    composed: float = figure("composed", "sum of two true directions", control="composed_random",
                             control_name="random rows", best="low")  # fmt: skip
    composed_se: float
    composed_random: float
    single: float = figure("single", "one true direction", best="high")
    neither: float = figure("neither", "not explained by two")
    grouped: float = figure("of one group", "composed rows whose two go together in the world",
                            control="grouped_chance", control_name="any two features")  # fmt: skip
    grouped_chance: float
    rows: int
    dead: int
    one: Float[Tensor, " rows"] = field(repr=False, compare=False)
    two: Float[Tensor, " rows"] = field(repr=False, compare=False)
    pair: Int[Tensor, "rows 2"] = field(repr=False, compare=False)

    _below = "{rows} live rows, {dead} dead; ± binomial"


@as_annotated
@torch.no_grad()
def composition(sae: SparseCoder, world: World) -> Composition:
    """``sl.evals.composition(sae, world)``: the share of live decoder rows that are sums of two true directions.

    For a unit row w: R₁ = max_i cos(w, dᵢ)₊², R₂ = max_{i<j} of the squared length of w's projection on the plane of dᵢ
    and dⱼ, over pairs whose coefficients are both positive and the smaller at least ⅓ of the larger. ``single``: R₁ is
    at least .8; ``composed``: R₁ is below .8 and R₂ at least .8. (Of d₁ + d₂ at right angles R₁ = .5, R₂ = 1.) The
    world's ``labels["group"]`` or, from ``worlds.product``, ``labels["attribute"]`` tell which features fire together.
    Controls: an equal number of random rows; and, for the pairs, the share of all pairs that fire together.

    ValueError for a world of another width or of one feature, and for a decoder of zeros.
    """
    if sae.d_out != world.dictionary.shape[1]:
        raise ValueError(f"the coder writes d_out={sae.d_out}, the world has width {world.dictionary.shape[1]}")
    if len(world.dictionary) < 2:
        raise ValueError("composition needs a world of two features at least, got one")
    W_dec = sae.W_dec.detach().float().cpu()
    live = (sae.f_scale > 0).cpu() if bool((sae.f_scale > 0).any()) else W_dec.norm(dim=1) > 0
    if not bool(live.any()):
        raise ValueError(f"composition needs a decoder row that is not zero, all {len(live)} are: leave it out")
    one, two, pair = explained(W_dec[live], world.dictionary)
    composed = (one < EXPLAINED) & (two >= EXPLAINED)
    draw = np.random.default_rng(np.random.SeedSequence([_TAG]))
    random = torch.from_numpy(draw.standard_normal((len(one), W_dec.shape[1]), dtype=np.float32))
    by_chance = explained(random, world.dictionary)
    if "attribute" in world.labels:  # values of different attributes fire together
        same = world.labels["attribute"][:, None] != world.labels["attribute"]
    else:
        group = world.labels["group"]
        same = (group[:, None] == group) & (group >= 0)[:, None]
    n, share = len(one), float(composed.float().mean())
    return Composition(
        composed=share,
        composed_se=math.sqrt(share * (1 - share) / n),
        composed_random=float(((by_chance[0] < EXPLAINED) & (by_chance[1] >= EXPLAINED)).float().mean()),
        single=float((one >= EXPLAINED).float().mean()),
        neither=float(((one < EXPLAINED) & (two < EXPLAINED)).float().mean()),
        grouped=share_of(same[pair[:, 0], pair[:, 1]], composed),
        grouped_chance=float(same.triu(1).sum()) / math.comb(len(same), 2),
        rows=n,
        dead=int((~live).sum()),
        one=one,
        two=two,
        pair=pair,
    )


def explained(
    rows: Float[Tensor, "rows d"], directions: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Int[Tensor, "rows 2"]]:
    """(R₁, R₂, the pair) of every row, see ``composition``; R₂ is 0 if no pair has such coefficients."""
    rows, directions = (torch.nn.functional.normalize(t, dim=1) for t in (rows, directions))
    overlap = directions @ directions.T
    volume = (1 - overlap**2).clamp_min(1e-6)
    upper = torch.ones_like(overlap, dtype=torch.bool).triu(1)
    ones, twos, pairs = [], [], []
    for part in rows.split(_CHUNK):
        cosine = part @ directions.T
        first, second = cosine[:, :, None], cosine[:, None, :]
        a, b = (first - overlap * second) / volume, (second - overlap * first) / volume  # least squares of two
        fits = (torch.minimum(a, b) >= SMALLER_PART * torch.maximum(a, b)) & (a > 0) & (b > 0) & upper
        best, where = torch.where(fits, a * first + b * second, 0.0).flatten(1).max(1)
        ones.append(cosine.clamp_min(0).max(1).values ** 2)
        twos.append(best)
        pairs.append(torch.stack([where // len(directions), where % len(directions)], dim=1))
    return torch.cat(ones), torch.cat(twos), torch.cat(pairs)
