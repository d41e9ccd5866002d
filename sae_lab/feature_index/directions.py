"""What a feature's direction says by itself: its logit lens and its nearest neighbours among the others."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.feature_index import chunks
from sae_lab.lm.model import LM
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site

LENS_TOKENS = 10
NEIGHBOURS = 8
RANDOM = 256  # random directions, the control of the lens


@torch.no_grad()
def lens(coder: SparseCoder, lm: LM, site: Site) -> dict[str, np.ndarray]:
    """Promoted and suppressed tokens of every direction, and its sharpness: the logits' kurtosis, with that of random
    directions beside it. Empty where the site is not written to the residual stream."""
    one = lm.lens(coder.W_dec[:1], site)
    if one is None:
        return {}
    rows = chunks.rows_at_a_time(4 * one.shape[1])
    found: dict[str, list[Tensor]] = {"up": [], "up_ids": [], "down": [], "down_ids": [], "kurtosis": []}
    for chunk in coder.W_dec.split(rows):
        logits = lm.lens(chunk, site)
        assert logits is not None
        for name, largest in (("up", True), ("down", False)):
            top = logits.topk(LENS_TOKENS, largest=largest)
            found[name].append(top.values)
            found[f"{name}_ids"].append(top.indices.int())
        found["kurtosis"].append(_kurtosis(logits))
    random = torch.randn(RANDOM, coder.W_dec.shape[1], generator=torch.Generator().manual_seed(0)).to(coder.W_dec)
    control = [_kurtosis(logits) for part in random.split(rows) if (logits := lm.lens(part, site)) is not None]
    tables = {f"lens_{name}": torch.cat(parts).numpy() for name, parts in found.items()}
    return tables | {"lens_random": torch.cat(control).numpy()}


def _kurtosis(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
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
    rows = torch.nn.functional.normalize(coder.W_dec, dim=1)
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
