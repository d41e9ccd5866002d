"""Untrained coders: the baselines with which to compare any score of a trained coder.

sl.evals.report([sae, *sl.saes.baselines(sae, store).values()])
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.families.l1 import L1
from sae_lab.saes.families.topk import TopK

NAMES = ("mean", "identity", "PCA", "random")


@as_annotated
@torch.no_grad()
def baselines(
    sae: SparseCoder, x: Float[Tensor, "rows d_in"], names: Iterable[str] = NAMES, seed: int = 0
) -> dict[str, SparseCoder]:
    """Baseline coders of sae's d_in and site, by name: compare sae's scores with theirs.

    - "mean": no feature ever fires, x_hat is the mean of x: FVU 1, and what mean ablation costs.
    - "identity": 2·d_in features, f = relu(±x), x_hat = x exactly: FVU 0, and not sparse.
    - "PCA": k pairs of features, f = relu(±(x − mean)·V) of the k first components; k is sae's mean L0 on x: the best
      linear code of k numbers, the same k components for every token.
    - "random": d_sae random unit directions, the k strongest of each token, at the one scale that fits x best.

    x: activations at the site, on which mean, components and scale are fitted. The baselines have sae's site, mask and
    model. Raises ValueError for an unknown name and for a coder that does not reconstruct what it reads.
    """
    names = tuple(names)
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"unknown baseline {unknown[0]!r}; known: {', '.join(NAMES)}")
    if sae.transcodes or len(sae.in_shape) > 1:
        raise ValueError(f"baselines need a coder that reconstructs what it reads, a {type(sae).__name__} does not")
    x = x.float().cpu()
    mean = x.mean(0)
    k = max(1, round(len(sae.codes_of(x).values) / len(x)))
    make = {
        "mean": lambda: _linear(torch.zeros(sae.d_in, 1), mean, bias=-1.0),
        "identity": lambda: _linear(torch.eye(sae.d_in), torch.zeros(sae.d_in)),
        "PCA": lambda: _linear(_components(x - mean, min(k, sae.d_in)), mean),
        "random": lambda: _random(x, mean, sae.d_sae, min(k, sae.d_sae), seed),
    }
    made: dict[str, SparseCoder] = {}
    for name in names:
        coder = make[name]()
        facts: dict[str, Any] = {
            k: v for k, v in sae.meta.items() if k in ("model", "model_fingerprint", "prefix_id", "context", "mask")
        }
        coder.reads, coder.writes, coder.meta = sae.reads, sae.writes, facts | {"baseline": name}
        coder.calibrate([x])
        made[name] = coder.to(sae.W_dec.device).eval()
    return made


def _linear(basis: Tensor, mean: Tensor, bias: float = 0.0) -> SparseCoder:
    """f = relu(±(x − mean)·basis + bias), ``basis`` "d n"; x_hat = f·±basisᵀ + mean."""
    d, n = basis.shape
    coder = L1(d, 2 * n)
    coder.W_enc.copy_(torch.cat([basis, -basis], dim=1))
    coder.W_dec.copy_(torch.cat([basis, -basis], dim=1).T)
    coder.b_enc.fill_(bias)
    coder.b_dec.copy_(mean)
    return coder


def _components(centred: Tensor, k: int) -> Tensor:
    """The k first principal components, "d k"."""
    rows = centred.double()
    return torch.linalg.eigh(rows.T @ rows)[1][:, -k:].flip(1).float()


def _random(x: Tensor, mean: Tensor, d_sae: int, k: int, seed: int) -> SparseCoder:
    coder = TopK(x.shape[1], d_sae, k, seed=seed)
    coder.b_dec.copy_(mean)
    fitted = coder(x).x_hat - mean
    scale = float((fitted * (x - mean)).sum() / fitted.pow(2).sum().clamp_min(1e-12))
    coder.W_enc.mul_(scale)
    return coder
