"""A feature linearised through an MLP: for each token, the direction before the MLP that moves the feature."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.circuits.gradients import gradients
from sae_lab.circuits.metric import plus
from sae_lab.circuits.pairs import kept, require_linear
from sae_lab.lm.model import LM
from sae_lab.results import Result, result
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch, Write

BEHIND = ("mlp_in", "mlp_out", "resid_post")  # sites after an MLP or its norm


@result
class PulledBack(Result):
    """Result of ``circuits.pull_back``. Its table has one row per size: size, r, slope, and the r of three controls.

    Attributes:
        directions: "batch pos d": the pulled-back direction at each token; 0 at tokens that the mask leaves out.
        feature, site, at: the feature, the site that its coder reads, the site of the directions.
        sizes: of a change, as a share of the way to another token's activation.
        r: Pearson's correlation of predicted and true change of the pre-activation, by size. slope: of the true change
            on the predicted one, by least squares through 0; 1 if the prediction is right.
        mean_direction: r with the mean direction used at every token. random: r with a random direction of the same
            norm at each token. other_token: r with the direction of another token.
        changes: the number of changes in each r.
    """

    directions: Float[Tensor, "batch pos d"]
    feature: int
    site: Site
    at: Site
    sizes: tuple[float, ...]
    r: tuple[float, ...]
    slope: tuple[float, ...]
    mean_direction: tuple[float, ...]
    other_token: tuple[float, ...]
    random: tuple[float, ...]
    changes: int

    _records = ("size=sizes", "r", "slope", "mean_direction", "other_token", "random")
    _above = (
        "feature {feature} of {site.key} pulled back to {at.key}: predicted against true change of its "
        "pre-activation, {changes} changes:"
    )


@as_annotated
def pull_back(
    lm: LM,
    coder: SparseCoder,
    feature: int,
    prompts: Sequence[str] | str,
    *,
    at: str = "mlp_in",
    sizes: Sequence[float] = (0.01, 0.1, 1.0),
    draws: int = 4,
    seed: int = 0,
) -> PulledBack:
    """``pull_back(lm, sae, 2681, prompts)``: a feature's encoder direction pulled back through the MLP, at each token:

        d_t = J(x_t)ᵀ·W_enc[:, feature],     pre(x_t + δ) ≈ pre(x_t) + d_t·δ

    J(x_t): the Jacobian of the coder's input at x_t, the activation at ``at`` of the same layer and token, all else
    fixed ("Case Studies in Reverse-Engineering Sparse Autoencoder Features by Using MLP Linearization", Dunefsky et
    al. 2024, Alignment Forum). d_t is exact for small δ; its error for larger ones is measured with δ = s·(x_u - x_t),
    u another token drawn at random, for each size s.

    Args:
        coder: reads mlp_out or resid_post of a layer; or, with ``at="resid_mid"``, its mlp_in, as transcoders do (then
            only the norm lies between). From mlp_in to resid_post only the MLP's part changes; from resid_mid the
            stream also changes, which is linear, so that r says less about the MLP.
        at: "mlp_in", or "resid_mid", the stream before the MLP's norm.
        prompts: of any lengths. sizes: s above. draws: other tokens for each token. seed: of these and of the controls.

    Raises ValueError for a coder that reads other sites, or normalises what it reads, and for too few tokens.
    """
    feature = coder.feature(feature)
    site = coder.site
    if at not in ("mlp_in", "resid_mid"):
        raise ValueError(f"at must be 'mlp_in' or 'resid_mid', got {at!r}")
    require_linear(coder, "pull_back")
    if site.kind not in BEHIND or (site.kind, at) == ("mlp_in", "mlp_in"):
        raise ValueError(
            f"pull_back takes a coder that reads mlp_out or resid_post of a layer (or mlp_in, with at='resid_mid'), "
            f"this one reads {site}, with at={at!r}"
        )
    before = Site(at, site.layer)
    if not sizes or min(sizes) <= 0 or draws < 1:
        raise ValueError(f"sizes must be above 0 and draws at least 1, got {list(sizes)} and {draws}")
    batch = lm.tokenize([prompts] if isinstance(prompts, str) else list(prompts))
    acts = lm.run(batch, [before, site], logits=False)[0]
    keep = kept(lm, [coder], (batch, acts))
    if int(keep.sum()) < 3:
        raise ValueError(f"pull_back compares at least three tokens, these prompts have {int(keep.sum())}: pass more")
    w = coder.W_enc[:, feature].detach()
    counted = keep.unsqueeze(-1).to(w)
    # Between these sites no token sees another, so one backward pass of the sum gives each token's derivative.
    (found,) = gradients(lm, batch, [before, site], lambda read, _: [((read[site] * counted) @ w).sum()])
    directions = found[before] * counted
    r, slope, mean, other, random = _compared(lm, batch, acts, before, site, w, directions, keep, sizes, draws, seed)
    changes = draws * int(keep.sum())
    return PulledBack(directions, feature, site, before, tuple(sizes), r, slope, mean, other, random, changes)


def _compared(
    lm: LM, batch: TokenBatch, acts: dict[Site, Tensor], at: Site, site: Site, w: Tensor, directions: Tensor,
    keep: Tensor, sizes: Sequence[float], draws: int, seed: int,
) -> list[tuple[float, ...]]:  # fmt: skip
    """r, slope, and r with the mean direction, another token's and a random one, each by size."""
    generator = torch.Generator().manual_seed(seed)
    x, own, pre = acts[at][keep], directions[keep], (acts[site][keep]).double() @ w.double()
    drawn = torch.randn(own.shape, generator=generator).to(own)
    candidates = {
        "own": own,
        "mean": own.mean(0).expand_as(own),
        "other": own.roll(1 + int(torch.randint(len(own) - 1, (), generator=generator)), 0),
        "random": drawn * own.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True),
    }
    shifts = (1 + torch.randint(len(own) - 1, (draws, len(own)), generator=generator)).to(x.device)
    others = (torch.arange(len(own), device=x.device) + shifts) % len(own)  # never the token itself
    rows: list[tuple[float, ...]] = []
    for size in sizes:
        steps = [size * (x[other] - x) for other in others]
        true = torch.cat([_read_after(lm, batch, at, site, keep, step) @ w.double() - pre for step in steps])
        said = {n: torch.cat([(d * step).sum(-1).double() for step in steps]) for n, d in candidates.items()}
        slope = float((true @ said["own"]) / said["own"].square().sum())
        r = {n: float(torch.corrcoef(torch.stack([true, p]))[0, 1]) for n, p in said.items()}
        rows.append((r["own"], slope, r["mean"], r["other"], r["random"]))
    return list(zip(*rows, strict=True))


def _read_after(
    lm: LM, batch: TokenBatch, at: Site, site: Site, keep: Tensor, step: Float[Tensor, "tokens d"]
) -> Float[Tensor, "tokens d_in"]:
    """The coder's input at the tokens that count, each changed by its step."""
    by = step.new_zeros(*keep.shape, step.shape[-1])
    by[keep] = step
    return lm.run(batch, [site], [Write(at, partial(plus, by=by))], logits=False)[0][site][keep].double()
