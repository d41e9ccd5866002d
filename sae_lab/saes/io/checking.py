"""Does a loaded coder fit these activations? Measured in eval mode, against what the checkpoint states.

A wrong site, scale or orientation loads without an error; FVU and L0 tell.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sae_lab.results import counted
from sae_lab.saes import kernels
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Codes, Site

log = logging.getLogger(__name__)

ROWS, BLOCK = 16_384, 1024
FACTOR = 2.0  # a figure that far from the stated one contradicts it


@torch.no_grad()
def check(coder: SparseCoder, data: Any, rows: int = ROWS) -> dict[str, Any]:
    """FVU, L0 and warnings, kept in ``coder.meta["check"]`` and logged.

    data: activations ``batch d_in``, a pair (x, target) for a transcoder, or a store. ``f_scale``, where the checkpoint
    had none, is fitted on the same rows. Raises ValueError for activations of another width.
    """
    pairs = [(x.float(), y) for x, y in _pairs(data, rows)]
    if not any(len(x) for x, _ in pairs):
        raise ValueError("check needs activations: pass a tensor with rows, or a store that holds some")
    parts: list[Codes] = []
    error, n, target_sum, target_square = 0.0, 0, torch.zeros(coder.d_out, dtype=torch.float64), 0.0
    for x, given in pairs:
        target = given if given is not None else None if coder.transcodes else x
        out = coder(x)
        parts.append(kernels.positive(out.codes))
        n += len(x)
        if target is None:
            continue
        target, x_hat = target.double(), out.x_hat.double()
        if coder.meta.get("centred"):  # its x_hat has no part in the direction that the model's norms take away
            target, x_hat = (t - t.mean(-1, keepdim=True) for t in (target, x_hat))
        error += float((target - x_hat).square().sum())
        target_sum += target.sum(0).cpu()
        target_square += float(target.square().sum())
    spread = target_square - float(target_sum.square().sum()) / n
    fvu = error / spread if spread > 0 else None
    codes = kernels.joined(parts, coder.d_sae)
    found: dict[str, Any] = {"fvu": fvu, "l0": len(codes.values) / n, "tokens": n}
    problems = list(_problems(coder, getattr(data, "site", None), found))
    if coder.meta.get("f_scale") == "unknown":
        coder._fit_scale(codes)
        coder.meta["f_scale"] = f"fitted by check on {counted(n, 'row')}"
    coder.meta["check"] = found | {"problems": problems}
    for problem in problems:
        log.warning("this coder does not fit the activations: %s", problem)
    return coder.meta["check"]


def _pairs(data: Any, rows: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(x, target or None) in blocks."""
    if isinstance(data, tuple) and len(data) == 2:
        yield from zip(data[0][:rows].split(BLOCK), data[1][:rows].split(BLOCK), strict=True)
    elif isinstance(data, Tensor):
        yield from ((x, None) for x in data[:rows].split(BLOCK))
    elif blocks := getattr(data, "blocks", None):
        seen = 0
        for _, x in blocks():
            if seen >= rows:
                return
            yield from ((part, None) for part in x[: rows - seen].split(BLOCK))
            seen += len(x)
    else:
        raise ValueError(f"check takes a tensor, a pair of tensors or a store, got {type(data).__name__}")


def _problems(coder: SparseCoder, site: Site | None, found: dict[str, Any]) -> Iterator[str]:
    """What is absurd in these figures, or contradicts what the checkpoint states."""
    if site is not None and coder.reads and site != coder.reads[0]:
        yield f"they are from {site}, and it reads {coder.reads[0]}"
    if found["fvu"] is not None and found["fvu"] > 1:
        yield f"FVU is {found['fvu']:.2f}: its reconstruction is worse than their mean"
    if found["l0"] == 0:
        yield "L0 is 0: no feature ever fires"
    elif found["l0"] > coder.d_sae / 4:
        yield f"L0 is {found['l0']:.0f}: more than a quarter of its {coder.d_sae} features fire at once"
    for name, said in coder.meta.get("expected", {}).items():
        measured = found.get(name)
        if measured and said and not 1 / FACTOR <= (times := measured / said) <= FACTOR:
            yield f"{name} is {measured:.3g}, {times:.2g} times the {said:.3g} that the checkpoint states"
