"""Reading a model with a coder. Codes are made where the model runs, so that a server sends codes, not activations."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.lm import forms
from sae_lab.lm.network import Network
from sae_lab.lm.passes import counting_tokens
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.portable import at_home, encode, some
from sae_lab.types import Codes, Site, TokenBatch

PASS_TOKENS = 4096  # tokens in one pass of the model


def read_real(
    lm: Network, sites: Sequence[Site], batches: Iterable[TokenBatch]
) -> dict[Site, Float[Tensor, "tokens _"]]:
    """Activations of all real tokens of the batches, one after another, on the CPU."""
    read: dict[Site, list[Tensor]] = {s: [] for s in sites}
    for batch in batches:
        for s, x in lm.run(batch, sites, logits=False)[0].items():
            read[s].append(x[batch.mask.to(x.device)].cpu())
    return {s: torch.cat(parts) for s, parts in read.items()}


def alike(lengths: list[int]) -> list[list[int]]:
    """Texts by number, in groups of like length, each small enough for one pass."""
    groups: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[i] > PASS_TOKENS:
            groups.append([])
        groups[-1].append(i)
    return groups


class Coded(NamedTuple):
    """Codes of the tokens that count, in the order of ``keep.nonzero()``."""

    codes: Codes
    keep: Bool[Tensor, "batch pos"]


def read_codes(lm: Network, coder: SparseCoder, batch: TokenBatch) -> Coded:
    """Codes of the tokens that the coder's mask keeps, in eval mode, at the coder's site."""
    if not lm.remote:
        return coded(lm, coder, batch, lm.run(batch, [coder.site], logits=False)[0][coder.site])
    [found] = read_there(lm, coder, [batch])
    keep = torch.zeros_like(batch.mask)
    keep[batch.mask] = found["keep"]
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), found["counts"].long().cumsum(0)])
    return Coded(Codes(found["values"], found["features"].long(), offsets, coder.d_sae), keep)


def coded(lm: Network, coder: SparseCoder, batch: TokenBatch, x: Float[Tensor, "batch pos d"]) -> Coded:
    """``read_codes`` from activations x that have been read at the coder's site."""
    mask = coder.mask or lm.mask()
    keep = mask.of(batch, {coder.site: x.to(batch.ids.device)})
    return Coded(coder.codes_of(x[keep.to(x.device)]), keep.cpu())


def read_there(lm: Network, coder: SparseCoder, batches: Iterable[TokenBatch]) -> list[dict[str, Tensor]]:
    """``sparse_rows`` of each batch, computed where the model runs, and of the roles that the mask keeps."""
    site, mask = coder.site, coder.mask or lm.mask()
    after = partial(
        sparse_rows, plan=coder.portable(whole=False), special=list(mask.special_ids), skip_first=mask.skip_first,
        limit=mask.max_norm.get(site.key),
    )  # fmt: skip
    return [
        _of_roles(lm.run(b, [site], logits=False, after=after, **sparse_form(b, coder))[0][site], mask.of(b)[b.mask])
        for b in batches
    ]


def _of_roles(found: dict[str, Tensor], counts: Bool[Tensor, " real"]) -> dict[str, Tensor]:
    """What ``sparse_rows`` gave, without tokens that do not count."""
    row = counts[found["keep"]]
    if bool(row.all()):
        return found
    code = torch.repeat_interleave(row, found["counts"].long())
    kept = {"values": found["values"][code], "features": found["features"][code], "counts": found["counts"][row]}
    return kept | {"keep": found["keep"] & counts}


@torch.no_grad()
def read_some(
    lm: Network, coder: SparseCoder, features: Sequence[int], batch: TokenBatch
) -> tuple[Float[Tensor, "batch pos features"], Bool[Tensor, "batch pos"]]:
    """(codes of some features, 0 at padding; which tokens the coder's mask keeps), made where the model runs."""
    site, mask, many = coder.site, coder.mask or lm.mask(), int(batch.mask.sum())
    form = {"codes": Float[Tensor, f"{many} {len(features)}"], "loud": Bool[Tensor, f"{many}"]}
    after = partial(some_codes, plan=coder.portable(features, whole=False), limit=mask.max_norm.get(site.key))
    expected = 4 * many * len(features)
    found = lm.run(batch, [site], logits=False, after=after, form=form, expected=expected)[0][site]
    codes = found["codes"].new_zeros(*batch.mask.shape, len(features))
    codes[batch.mask] = found["codes"]
    keep = mask.of(batch)
    keep[batch.mask] &= ~found["loud"]
    return codes, keep


def require_fits(coder: SparseCoder, lm: Network, writes: bool = True) -> None:
    """ValueError unless the model has the sites that a coder reads, and with ``writes`` those it writes, each with the
    coder's width. ValueError also for a coder without a site."""
    reads = coder.reads or (coder.site,)
    wanted = [("reads", site, coder.in_shape[-1]) for site in reads]
    wanted += [("writes", site, coder.out_shape[-1]) for site in coder.writes or reads] if writes else []
    for verb, site, width in wanted:
        if lm.width(site) != width:
            raise ValueError(
                f"this coder {verb} width {width} and {lm} has width {lm.width(site)} at {site}: "
                f"use the model it was trained on ({coder.meta.get('model', 'unknown')})"
            )


def sparse_form(batch: TokenBatch, coder: SparseCoder) -> dict[str, Any]:
    """The form of what ``sparse_rows`` returns, and its expected bytes, as arguments of ``lm.run``."""
    many, d_sae = int(batch.mask.sum()), coder.d_sae
    parts = {
        "values": Float[Tensor, "codes"], "features": Int[Tensor, "codes"], "counts": Int[Tensor, "kept"],
        "keep": Bool[Tensor, f"{many}"],
    }  # fmt: skip

    def sparse_codes(found: Any) -> bool:
        if not forms.has(found, parts):
            return False
        counts, features = found["counts"], found["features"]
        fits = len(counts) == int(found["keep"].sum()) and int(counts.sum()) == len(features)
        return fits and bool((counts >= 0).all()) and bool(((features >= 0) & (features < d_sae)).all())

    return {"form": sparse_codes, "expected": many * d_sae}  # 8 bytes a code; times answers.SLACK, enough for all codes


@no_type_check
def sparse_rows(x, tokens, plan, special, skip_first, limit):
    """Codes of the real tokens that count: "values" and "features" of all codes, "counts" of codes per token; "keep":
    which real tokens count. A function of torch alone, see ``saes.portable``."""
    real = tokens.mask.to(x.device)
    rows, ids, positions = x[real].float(), tokens.ids[tokens.mask], tokens.positions[tokens.mask]
    keep = counting_tokens(ids, positions, special, skip_first)
    if limit is not None:
        keep &= (rows.norm(dim=-1) <= limit).cpu()
    at_home(plan, x.device)
    values, features, counts = [], [], []
    for part in rows[keep.to(x.device)].split(1024):  # dense codes of all rows would be large
        codes = encode(plan, part)
        on = codes > 0
        counts.append(on.sum(-1).int().cpu())
        features.append(on.nonzero()[:, 1].int().cpu())
        values.append(codes[on].float().cpu())
    empty = torch.zeros(0)
    return {
        "values": torch.cat([empty, *values]), "features": torch.cat([empty.int(), *features]),
        "counts": torch.cat([empty.int(), *counts]), "keep": keep,
    }  # fmt: skip


@no_type_check
def some_codes(x, tokens, plan, limit):
    """For real tokens: "codes" of the plan's features, dense, "tokens features"; "loud": whether the norm is above the
    limit."""
    at_home(plan, x.device)
    rows = x[tokens.mask.to(x.device)].float()
    above = torch.zeros(len(rows), dtype=torch.bool) if limit is None else (rows.norm(dim=-1) > limit).cpu()
    return {"codes": some(plan, encode(plan, rows)).cpu(), "loud": above}
