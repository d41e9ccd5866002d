"""How a model's state is carried from token to token in generation: by the cache that the model returns.

Families keep their state under different names and in different objects (keys and values, a convolution's window, a
recurrent state). A first pass runs with ``use_cache`` and without a state. The state is what the model returns and its
forward also takes; it goes into the next pass. ``Continuing.of`` tries this once on a short text: if the logits differ
from those of one pass over the whole text, every pass of a generation reads the whole text.
"""

import inspect
import logging
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

LENGTH, STEPS = 12, 3  # of the short text, and how many of its tokens are read one by one
_NO_STATE = ("logits", "loss", "hidden_states", "attentions", "input_ids", "labels", "inputs_embeds")


@dataclass
class State:
    """The state of one generation. held: by the names of the model's arguments; empty before the first pass."""

    positions: bool
    names: frozenset[str]
    held: dict[str, Any] = field(default_factory=dict)

    def inputs(self, positions: Tensor) -> dict[str, Any]:
        """The arguments of the model's forward besides the token ids."""
        inputs: dict[str, Any] = {"use_cache": True, **self.held}
        if "logits_to_keep" in self.names:
            inputs["logits_to_keep"] = 1
        if self.positions and "position_ids" in self.names:
            inputs["position_ids"] = positions
        return inputs

    def keep(self, out: Any) -> None:
        """Take the state from what the model returned. ValueError if it returned none."""
        pairs = out.items() if hasattr(out, "items") else ()
        self.held = {k: v for k, v in pairs if k in self.names and k not in _NO_STATE and v is not None}
        if not self.held:
            raise ValueError("this model returns no state that its forward takes")


@dataclass(frozen=True)
class Continuing:
    """Whether a model carries its state, and whether it must be told the positions of new tokens."""

    carries: bool
    positions: bool = True
    names: frozenset[str] = frozenset()

    def state(self) -> State | None:
        """A new generation's state; None if every pass reads the whole text."""
        return State(self.positions, self.names) if self.carries else None

    @classmethod
    @torch.no_grad()
    def of(cls, module: Any, device: torch.device) -> "Continuing":
        """Tries a model on a short text."""
        names = frozenset(inspect.signature(module.forward).parameters)
        vocab = module.config.get_text_config().vocab_size
        ids = ((torch.arange(LENGTH) * 7919 + 11) % vocab)[None].to(device)
        whole = module(input_ids=ids, use_cache=False).logits[0].float()
        for positions in (True, False) if "position_ids" in names else (False,):
            found = cls(True, positions, names)
            if why := found._differs(module, ids, whole):
                log.debug("carrying the state (positions told: %s): %s", positions, why)
            else:
                return found
        log.info("this model's state cannot be carried from token to token: each pass reads the whole text")
        return cls(False)

    def _differs(self, module: Any, ids: Tensor, whole: Tensor) -> str | None:
        """How the logits differ from those of one pass, in words; None if only by rounding."""
        state, ends = State(self.positions, self.names), [0, *range(LENGTH - STEPS, LENGTH + 1)]
        tolerance = 1e-3 if whole.dtype == module.dtype else 0.05
        for start, end in pairwise(ends):
            positions = torch.arange(start, end, device=ids.device)[None]
            try:
                out = module(input_ids=ids[:, start:end], **state.inputs(positions))
                state.keep(out)
            except Exception as err:  # transformers' own, of any kind: this way is not for this model
                return f"{type(err).__name__}: {err}"
            off = (out.logits[0, -1].float() - whole[end - 1]).abs().max() / whole[end - 1].abs().max()
            if not off <= tolerance:
                return f"logits differ by {float(off):.1%} at token {end - 1}"
        return None
