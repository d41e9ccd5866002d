"""The mathematics of coders as functions of torch alone: the classes call them here, and servers run them from source.

A server that runs a language model has torch, and neither this library nor its classes. What an edit or a reading with
a coder needs there is a *plan* (``SparseCoder.portable()``): the weights, and which function here makes codes of
pre-activations. These functions travel as their source, so they may use torch and each other, and nothing else;
``no_type_check`` keeps the type checker of the tests from wrapping them, which a source would not survive.
"""

from typing import no_type_check

import torch

# largest are chosen, ``select(pre, k)`` says by whom: without it here, as dense codes; a class gives its own, which
# returns sparse ones.


@no_type_check
def above(pre, x, own):
    """pre where it is above ``floor``, one number or one a feature."""
    return torch.where(pre > own["floor"], pre, 0.0)


@no_type_check
def strongest(pre, k):
    """relu of the k largest of each row, others 0."""
    top = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())


@no_type_check
def largest(pre, x, own, select=None):
    """The k largest of each row."""
    return (select or strongest)(pre, own["k"])


@no_type_check
def gated(pre, x, own):
    """Strength by one path, where the other opens."""
    strength = (own["r_mag"].exp() * (pre - own["b_enc"]) + own["b_mag"]).relu()
    return torch.where(pre > 0, strength, 0.0)


@no_type_check
def unlowered(pre, x, own):
    """pre without its bias, where pre is on."""
    free = pre - own["b_enc"]
    return torch.where((pre > 0) & (free > own["floor"]), free, 0.0)


@no_type_check
def bend(pre, features, own):
    """The splines of some features at their pre-activations."""
    knots = own["bend"].shape[1]
    place = ((pre + own["span"]) * ((knots - 1) / (2 * own["span"]))).clamp(0, knots - 1)
    left = place.floor().long().clamp_max(knots - 2)
    share = place - left
    flat, at = own["bend"].reshape(-1), features * knots + left
    return pre + (1 - share) * flat[at] + share * flat[at + 1]


@no_type_check
def bent(pre, x, own, select=None):
    """The k largest of each feature's spline of pre."""
    return largest(bend(pre, torch.arange(pre.shape[1], device=pre.device), own), x, own, select)


@no_type_check
def routes(x, own):
    """The probability of each expert, "rows experts"."""
    return ((x - own["b_router"]) @ own["W_router"]).softmax(-1)


@no_type_check
def routed(pre, x, own):
    """The k largest of the part of the dictionary that a router chooses, times its probability."""
    probability, expert = routes(x, own).max(-1)
    part = torch.arange(pre.shape[1], device=pre.device) // (pre.shape[1] // own["experts"])
    inside = part == expert.unsqueeze(-1)
    return largest(pre.masked_fill(~inside, -torch.inf), x, own) * probability.unsqueeze(-1)


@no_type_check
def nearest(pre, x, own):
    """1 for the largest of each row."""
    return torch.zeros_like(pre).scatter_(-1, pre.argmax(-1, keepdim=True), 1.0)


@no_type_check
def by_itself(pre, x, own):
    """The coder's own method, for a family that names no function here: on this machine only."""
    codes = own["coder"]._codes(x)[1]
    return codes.dense() if hasattr(codes, "dense") else codes


ONE_BY_ONE = (above, gated, unlowered)  # a feature's code by these needs no other feature


@no_type_check
def entered(input_norm, x):
    """(normalised rows, mean, size), with x = rows·size + mean; size None where nothing is to undo."""
    if input_norm == "none":
        return x, 0.0, None
    if input_norm == "length":
        size = x.norm(dim=-1, keepdim=True).clamp_min(1e-8) / x.shape[-1] ** 0.5
        return x / size, 0.0, size
    mean = x.mean(-1, keepdim=True)
    size = (x - mean).std(-1, keepdim=True)
    return (x - mean) / (size + 1e-5), mean, size  # as SAELens's layer_norm does and undoes it


@no_type_check
def written(weighted, b_dec, rows, W_skip, ids, lookup):
    """x_hat of codes·W_dec: with the bias, what a skip makes of rows, and what a lookup has for token ids."""
    out = weighted + b_dec
    if W_skip is not None:
        out = out + rows @ W_skip
    return out if lookup is None else out + torch.embedding(lookup, ids.to(out.device))


@no_type_check
def at_home(plan, device):
    """The plan with its tensors on a device; those of a first call stay there."""
    for part in (plan, plan["own"]):
        for name, value in part.items():
            if isinstance(value, torch.Tensor) and value.device != device:
                part[name] = value.to(device)
    return plan


@no_type_check
def encode(plan, x):
    """Dense codes of float rows, "rows d_sae" (fewer where the plan is for some features, and they need no others)."""
    rows = entered(plan["input_norm"], x)[0]
    return plan["act"](torch.addmm(plan["bias"], rows, plan["W_enc"]), rows, plan["own"])


@no_type_check
def some(plan, codes):
    """The codes of the plan's features, of what ``encode`` gave."""
    return codes[:, plan["pick"]]


@no_type_check
def decode(plan, codes, x, ids):
    """What the coder makes of codes of rows x whose tokens are ids."""
    rows, mean, size = entered(plan["input_norm"], x)
    out = written(codes @ plan["W_dec"], plan["b_dec"], rows, plan["W_skip"], ids, plan["lookup"])
    return out if size is None or plan["transcodes"] else out * size + mean


@no_type_check
def write_of(plan, change, x):
    """What the coder makes of rows x changes by when the codes of the plan's features do."""
    write = change @ plan["W_some"]
    size = entered(plan["input_norm"], x)[2]
    return write if size is None or plan["transcodes"] else write * size
