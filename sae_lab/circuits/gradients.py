"""Gradients at several sites in one pass, and their mean over points between two runs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sae_lab.circuits.metric import Metric
from sae_lab.circuits.pairs import require_here
from sae_lab.lm.model import LM
from sae_lab.lm.passes import put, read, value_of
from sae_lab.nets.net import Net
from sae_lab.types import Site, TokenBatch

Values = Callable[[dict[Site, Tensor], Tensor], Sequence[Tensor]]


def gradients(lm: LM, batch: TokenBatch, at: Sequence[Site], values: Values) -> list[dict[Site, Tensor]]:
    """The gradient of each number that ``values(activations, logits)`` gives, with respect to every site's activations.

    One pass forward, one backward for each number. activations: {site: "batch pos d" float32} as the model computes
    them. A gradient at a site goes through the whole model after the site, later sites of ``at`` included; it is 0 for
    a number that does not depend on the site.
    """
    import nnsight

    require_here(lm, "a gradient at several sites")
    order = sorted(at, key=lm._sites.when)
    inputs: dict[str, Any] = {"input_ids": batch.ids.to(lm.device), "use_cache": False}
    with lm._lock, torch.enable_grad(), lm._nn.trace(inputs):
        acts, probes = {}, {}
        for s in order:
            place = lm._sites.place(s)
            if place.less:
                raise ValueError(f"{s} is a difference of two tensors in this model: there is no gradient of it")
            there: Any = read(lm._nn, place, batch.ids.shape[1])
            here = value_of(there, place, {})
            # A leaf of zeros added to the activation has the activation's gradient and cuts nothing off.
            probes[s] = torch.zeros_like(here, requires_grad=True)
            here = here + probes[s]
            put(lm._nn, place, there, value_of(there, place, {}), here)
            there = here
            acts[s] = there.float()
        wanted = values(acts, lm._nn.output.logits.float())
        zeros = [probes[s] for s in order]
        found = nnsight.save([torch.autograd.grad(v, zeros, retain_graph=True, materialize_grads=True) for v in wanted])
    return [dict(zip(order, (g.float() for g in one), strict=True)) for one in found]


def mean_gradient(
    lm: LM | Net, batch: Any, site: Site, metric: Metric, x: Tensor, across: Tensor, steps: int
) -> Float[Tensor, "batch pos d"]:
    """Integrated gradients: the metric's gradient at a site, its mean over ``steps`` midpoints from x to x + across."""
    total = torch.zeros_like(x)
    for step in range(steps):
        total += lm.gradient(batch, site, metric, x + (step + 0.5) / steps * across) / steps
    return total


def require_slope(lm: LM | Net, metric: Metric, batch: TokenBatch) -> None:
    """ValueError for a metric without a gradient."""
    answer = torch.zeros(*batch.ids.shape, lm.vocab_size) if isinstance(lm, LM) else lm.run(batch)[1]
    with torch.enable_grad():
        value = metric(tree_map_only(Tensor, lambda t: t.detach().float().requires_grad_(), answer), batch)
    if not (isinstance(value, Tensor) and value.requires_grad):
        raise ValueError(
            "an estimate by gradient needs a metric that is differentiable in the logits, and this one is not: leave "
            "out argmax, comparisons, .item() and .detach(), or use circuits.patching, which needs none"
        )
