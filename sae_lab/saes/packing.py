"""Weights in 8 or 4 bits: up to 64 neighbours of a matrix share one scale, a whole number times it is a weight.

A matrix ``W_dec`` becomes two tensors in the file, ``W_dec.int8`` or ``W_dec.int4`` (two numbers a byte) and
``W_dec.scale``. Neighbours belong to one feature: a W_enc, "d_in d_sae", is turned round first. Scales are float16, or
float32 in a matrix some scale of which float16 would round by more than to 3 digits.
"""

import torch
from torch import Tensor

GROUP = 64
BITS = (8, 4)
_HALF = torch.finfo(torch.float16)
_SHRINK = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}  # of the scale: in 4 bits it pays to clip the largest


def packed(name: str, matrix: Tensor, bits: int) -> dict[str, Tensor]:
    """A matrix as the tensors of a file. Each group takes the scale, of a few, that rounds it best."""
    rows = _turned(name, matrix.detach().cpu().float()).flatten(0, -2)
    count, size = _groups(rows.shape[-1])
    groups = torch.nn.functional.pad(rows, (0, count * size - rows.shape[-1])).view(-1, size)
    most = 2 ** (bits - 1) - 1
    largest = groups.abs().amax(1, keepdim=True)
    kind = scale_kind(largest / most)
    best = torch.full_like(largest, torch.inf)
    scale, numbers = torch.zeros_like(largest), torch.zeros_like(groups)
    for shrink in _SHRINK[bits]:
        tried = (largest * shrink / most).to(kind).float()
        rounded = (groups / tried.clamp_min(1e-38)).round().clamp(-most, most)
        error = (groups - rounded * tried).square().sum(1, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
        numbers = torch.where(better, rounded, numbers)
    whole = numbers.to(torch.int8).flatten()
    if bits == 4:
        pairs = torch.nn.functional.pad(whole, (0, len(whole) % 2)).view(-1, 2).view(torch.uint8) & 15
        whole = pairs[:, 0] | pairs[:, 1] << 4
    return {f"{name}.int{bits}": whole, f"{name}.scale": scale.flatten().to(kind)}


def scale_kind(scales: Tensor) -> torch.dtype:
    """float16 where it holds these scales, and half of each, to 3 digits; else float32."""
    used = scales[scales > 0]
    fits = not len(used) or bool(used.min() >= 2 * _HALF.smallest_normal and used.max() <= _HALF.max)
    return torch.float16 if fits else torch.float32


def unpacked(tensors: dict[str, Tensor], shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, with whole matrices. shapes: tensors of the shape that each has. ValueError for parts that
    do not belong together."""
    found = dict(tensors)
    for key in tensors:
        name, _, kind = key.rpartition(".")
        if name not in shapes or shapes[name].dim() < 2 or kind not in ("int8", "int4"):
            continue
        whole, scale = found.pop(key), found.pop(f"{name}.scale", None)
        *rows, width = _turned(name, shapes[name]).shape
        count, size = _groups(width)
        groups = int(torch.Size(rows).numel()) * count
        wanted = (torch.int8, groups * size) if kind == "int8" else (torch.uint8, -(-groups * size // 2))
        if (whole.dtype, whole.numel()) != wanted or scale is None or scale.numel() != groups:
            raise ValueError(f"{key} and {name}.scale do not fit the shape {tuple(shapes[name].shape)} of {name}")
        if kind == "int4":  # half a byte with its sign: a shift to the right brings the sign along
            signed = whole.view(torch.int8)
            whole = torch.stack([(signed << 4) >> 4, signed >> 4], 1).flatten()[: groups * size]
        matrix = whole.view(groups, size) * scale.float().view(groups, 1)
        found[name] = _turned(name, matrix.view(*rows, count * size)[..., :width])
    return found


def _turned(name: str, matrix: Tensor) -> Tensor:
    return matrix.mT if name == "W_enc" else matrix


def _groups(width: int) -> tuple[int, int]:
    """(groups, numbers in each) of a row."""
    count = -(-width // GROUP)
    return count, -(-width // count)
