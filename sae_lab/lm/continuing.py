"""How a model's state is carried from token to token in generation: by the cache that the model returns.

Families keep their state under different names and in different objects (keys and values, a convolution's window, a
recurrent state). A first pass runs with ``use_cache`` and without a state. Whatever the model returns and its forward
also takes is the state, which goes into the next pass. ``empty_state`` tries this once on a short text.
"""

import inspect
import logging
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

LENGTH, STEPS = 12, 3  # of the short text, and how many of its tokens are read one by one
_NO_STATE = ("logits", "loss", "hidden_states", "attentions", "input_ids", "labels", "inputs_embeds")


@dataclass
class State:
    """The state of one generation. positions: whether the model takes the positions of new tokens; names: of its
    forward's arguments; held: the state by these names, empty before the first pass."""

    positions: bool
    names: frozenset[str]
    held: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> "State":
        """An empty state for another generation."""
        return replace(self, held={})

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


@torch.no_grad()
def empty_state(module: Any, device: torch.device) -> State | None:
    """The state before a generation, tried on a short text. None if the logits then differ from those of one pass over
    the whole text: every pass of a generation must read the whole text."""
    names = frozenset(inspect.signature(module.forward).parameters)
    vocab = module.config.get_text_config().vocab_size
    ids = ((torch.arange(LENGTH) * 7919 + 11) % vocab)[None].to(device)
    whole = module(input_ids=ids, use_cache=False).logits[0].float()
    for positions in (True, False) if "position_ids" in names else (False,):
        if not (why := _differs(State(positions, names), module, ids, whole)):
            return State(positions, names)
        log.debug("carrying the state (positions told: %s): %s", positions, why)
    log.info("this model's state cannot be carried from token to token: each pass reads the whole text")
    return None


def _differs(state: State, module: Any, ids: Tensor, whole: Tensor) -> str:
    """How the logits differ from those of one pass, in words; "" if only by rounding."""
    tolerance = 1e-3 if whole.dtype == module.dtype else 0.05
    for start, end in pairwise([0, *range(LENGTH - STEPS, LENGTH + 1)]):
        positions = torch.arange(start, end, device=ids.device)[None]
        try:
            out = module(input_ids=ids[:, start:end], **state.inputs(positions))
            state.keep(out)
        except Exception as err:  # transformers raises any kind: this model's state cannot be carried
            return f"{type(err).__name__}: {err}"
        off = (out.logits[0, -1].float() - whole[end - 1]).abs().max() / whole[end - 1].abs().max()
        if not off <= tolerance:
            return f"logits differ by {float(off):.1%} at token {end - 1}"
    return ""
