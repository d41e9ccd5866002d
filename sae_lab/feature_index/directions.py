"""What a feature's direction says by itself: its logit lens and its nearest neighbours among the others."""

from typing import no_type_check

import numpy as np
import torch

from sae_lab.feature_index import chunks
from sae_lab.lm.model import LM
from sae_lab.lm.network import Network
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site

NEIGHBOURS = 8
RANDOM = 256  # random directions, the control of the lens


@torch.no_grad()
def lens(coder: SparseCoder, lm: Network, site: Site) -> dict[str, np.ndarray]:
    """Promoted and suppressed tokens of every unit direction, and its sharpness: the logits' kurtosis, with that of
    random directions beside it. Empty where the site is not written to the residual stream."""
    if not isinstance(lm, LM) or lm.lens(coder.W_dec[:1], site, of=extremes) is None:
        return {}
    rows = chunks.rows_at_a_time(4 * lm.vocab_size)
    found = [lm.lens(chunk, site, of=extremes) for chunk in coder.directions().split(rows)]
    random = torch.randn(RANDOM, coder.W_dec.shape[1], generator=torch.Generator().manual_seed(0)).to(coder.W_dec)
    control = [lm.lens(part, site, of=kurtosis) for part in random.split(rows)]
    tables = {f"lens_{name}": torch.cat([part[name] for part in found]).numpy() for name in found[0]}
    return tables | {"lens_random": torch.cat(control).numpy()}


@no_type_check
def extremes(logits):
    """The tokens that directions promote and suppress most, and the logits' kurtosis: functions of torch alone, see
    ``saes.portable``."""
    up, down = logits.topk(10), logits.topk(10, largest=False)
    return {
        "up": up.values, "up_ids": up.indices.int(), "down": down.values, "down_ids": down.indices.int(),
        "kurtosis": kurtosis(logits),
    }  # fmt: skip


@no_type_check
def kurtosis(logits):
    """Excess kurtosis over the vocabulary: near 0 for noise, large where a few tokens stand out."""
    found = []
    for few in logits.split(8):  # they stay in the cache
        squares = (few - few.mean(-1, keepdim=True)).square_()
        variance = squares.mean(-1)
        found.append(squares.square_().mean(-1) / variance.square() - 3)
    return torch.cat(found)


@torch.no_grad()
def neighbours(coder: SparseCoder) -> dict[str, np.ndarray]:
    """The nearest decoder rows by cosine."""
    rows = coder.directions()
    n = min(NEIGHBOURS, coder.d_sae - 1)
    cosines, ids = [], []
    size = chunks.rows_at_a_time(4 * coder.d_sae)
    for start in range(0, coder.d_sae, size):
        part = rows[start : start + size] @ rows.T
        part[torch.arange(len(part)), torch.arange(start, start + len(part))] = -2.0  # not itself
        top = part.topk(n)
        cosines.append(top.values.cpu())
        ids.append(top.indices.int().cpu())
    return {"neighbours": torch.cat(ids).numpy(), "cosines": torch.cat(cosines).numpy()}
