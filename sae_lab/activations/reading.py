"""Reading a model with a coder. Codes are made where the model runs, so that a server sends codes, not activations."""

from functools import partial
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.lm import forms
from sae_lab.lm.model import LM
from sae_lab.lm.passes import counting_tokens
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.portable import at_home, encode, some
from sae_lab.types import Codes, Site, TokenBatch, TokenMask


class Coded(NamedTuple):
    """Codes of the tokens that count, in the order of ``keep.nonzero()``."""

    codes: Codes
    keep: Bool[Tensor, "batch pos"]


def read_codes(lm: LM, coder: SparseCoder, batch: TokenBatch, site: Site | None = None) -> Coded:
    """Codes of the tokens that the coder's mask keeps, in eval mode, at the coder's site."""
    site, mask = site or coder.site, coder.mask or lm.mask()
    if lm.remote:
        after = partial(sparse_rows, **counting(coder, mask, site))
        found = lm.run(batch, [site], logits=False, after=after, **sparse_form(batch, coder))[0][site]
        keep = torch.zeros_like(batch.mask)
        keep[batch.mask] = found["keep"]
        return Coded(codes_from(found, coder.d_sae), keep)
    return coded(coder, batch, mask, site, lm.run(batch, [site], logits=False)[0][site])


def coded(coder: SparseCoder, batch: TokenBatch, mask: TokenMask, site: Site, x: Float[Tensor, "batch pos d"]) -> Coded:
    """The same, from activations that have been read at the site."""
    keep = mask.keep(batch.ids, batch.positions, {site: x.to(batch.ids.device)}) & batch.mask
    return Coded(coder.codes_of(x[keep.to(x.device)]), keep.cpu())


def counting(coder: SparseCoder, mask: TokenMask, site: Site) -> dict[str, Any]:
    """The settings of ``sparse_rows``."""
    return {
        "plan": coder.portable(whole=False), "special": list(mask.special_ids), "skip_first": mask.skip_first,
        "limit": mask.max_norm.get(site.key),
    }  # fmt: skip


def require_fits(coder: SparseCoder, lm: LM, writes: bool = True) -> None:
    """ValueError unless the model has the sites that a coder reads, and with ``writes`` those it writes, each with the
    coder's width. For a coder without a site too."""
    reads = coder.reads or (coder.site,)
    wanted = [("reads", site, coder.in_shape[-1]) for site in reads]
    wanted += [("writes", site, coder.out_shape[-1]) for site in coder.writes or reads] if writes else []
    for verb, site, width in wanted:
        if lm.width(site) != width:
            raise ValueError(
                f"this coder {verb} width {width} and {lm} has width {lm.width(site)} at {site}: "
                f"use the model it was trained on ({coder.meta.get('model', 'unknown')})"
            )


def codes_from(found: dict[str, Tensor], d_sae: int) -> Codes:
    """What ``sparse_rows`` found as ``Codes``."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), found["counts"].long().cumsum(0)])
    return Codes(found["values"], found["features"].long(), offsets, d_sae)


def sparse_form(batch: TokenBatch, coder: SparseCoder) -> dict[str, Any]:
    """The form of what ``sparse_rows`` makes, and its bytes at most, as arguments of ``lm.run``."""
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

    return {"form": sparse_codes, "expected": many * d_sae}  # 8 bytes a code: answers.SLACK makes it as many as can be


def some_form(batch: TokenBatch, features: int) -> dict[str, Any]:
    """The same of ``some_codes``."""
    many = int(batch.mask.sum())
    form = {"codes": Float[Tensor, f"{many} {features}"], "loud": Bool[Tensor, f"{many}"]}
    return {"form": form, "expected": 4 * many * features}


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
    for part in rows[keep.to(x.device)].split(1024):  # dense codes of all would be large
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
    """Of real tokens: "codes" of the plan's features, dense, "tokens features"; "loud": whether the norm is above the
    limit."""
    at_home(plan, x.device)
    rows = x[tokens.mask.to(x.device)].float()
    above = torch.zeros(len(rows), dtype=torch.bool) if limit is None else (rows.norm(dim=-1) > limit).cpu()
    return {"codes": some(plan, encode(plan, rows)).cpu(), "loud": above}

