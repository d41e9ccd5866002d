"""A model held at one prompt: attention patterns, norms' divisors and gates keep that prompt's values.

What then lies between two sites is linear in the residual stream, up to constants, in any architecture that consists of
attention, norms and linear maps: a function of torch that divides, compares or gates is held, whatever module calls it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions of torch whose results are held, by name: patterns of attention, divisors of norms, and gates above 0. Not
# the activations of an MLP: what they return adds up, so that holding it would turn the prompt's own values into
# constants of the model.
HELD = {"softmax", "rsqrt", "sqrt", "sigmoid", "softplus", "linalg_vector_norm", "vector_norm", "norm"}


class Holding(TorchFunctionMode):
    """``held = Holding()``: in ``with held.recording():`` a pass of the model notes what is held, without a gradient;
    in ``with held.replaying():`` a pass of the same prompt, on other activations, gets the noted values.

    Raises ValueError where a replayed pass asks for more values, or others, than were noted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: list[Tensor] = []
        self._next: int | None = None  # the number of the value that a replayed pass gets; None: they are noted

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._values, self._next = [], None
        with self:
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        self._next = 0
        with self:
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._attended(*args, **kwargs)
        if name in ("layer_norm", "rms_norm"):
            return self._normed(name == "layer_norm", *args, **kwargs)
        if name in HELD or (name in ("pow", "__pow__") and _is_divisor(args)):
            return self._held(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

    def _held(self, compute: Callable[[], Tensor]) -> Tensor:
        if self._next is None:
            self._values.append(compute().detach())
            return self._values[-1]
        if self._next >= len(self._values):
            raise ValueError("this model computes other functions on other activations: it cannot be held at a prompt")
        self._next += 1
        return self._values[self._next - 1]

    def _attended(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """torch's attention, step by step."""
        groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
        key, value = (t if groups == 1 else t.repeat_interleave(groups, dim=-3) for t in (key, value))

        def pattern() -> Tensor:
            scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
            mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril() if is_causal else attn_mask
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            return scores.softmax(-1)

        return self._held(pattern) @ value

    def _normed(
        self, centres: bool, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:  # fmt: skip
        """torch's norms, step by step."""
        axes = tuple(range(-len(shape), 0))
        x = x - x.mean(axes, keepdim=True) if centres else x
        small = torch.finfo(x.dtype).eps if eps is None else eps
        out = x / self._held(lambda: (x.square().mean(axes, keepdim=True) + small).sqrt())
        out = out if weight is None else out * weight
        return out if bias is None else out + bias


def _is_divisor(args: Any) -> bool:
    """Whether a power is a root, or has a negative exponent."""
    exponent = args[1] if len(args) > 1 else None
    return isinstance(exponent, int | float) and (exponent < 0 or exponent == 0.5)
