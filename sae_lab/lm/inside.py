"""A model's own module with edits inside it, for tools that run the module themselves: see ``LM.edited``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sae_lab.lm import passes
from sae_lab.types import TokenBatch


@contextmanager
def edited(lm: Any, edits: Sequence[Any]) -> Iterator[nn.Module]:
    """See ``LM.edited``."""
    if lm.remote:
        raise ValueError("the module is on the server: edits run there in lm.logits, lm.loss and lm.generate")
    for edit in edits:
        if named := [name for name in ("rows", "steps") if getattr(edit, name, None) is not None]:
            said = f"{named[0]}={getattr(edit, named[0])}"
            raise ValueError(f"another tool chooses the rows and the passes: leave out {said} of {edit}")
    inside = _Inside(lm, edits)
    module = lm._module
    handles = [
        module.register_forward_pre_hook(inside.begin, with_kwargs=True, prepend=True),
        module.register_forward_hook(inside.end, always_call=True),
    ]
    try:
        yield module
    finally:
        for handle in handles + inside.handles:  # of the inside: where Ctrl-C ended a pass
            handle.remove()


class _Inside:
    """The edits of one ``LM.edited``. Each pass of the module hooks the modules at which its writes act."""

    def __init__(self, lm: Any, edits: Sequence[Any]):
        self.lm, self.edits = lm, edits
        self.steps: list[Any] = []  # of the prompts that are going on
        self.rows, self.number = 0, 0
        self.handles: list[Any] = []

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.lm._lock._is_owned():  # a pass of the library's own, which has its own edits
            return
        batch, seen = self._batch(args, kwargs)
        if not seen:
            room = max(0, self.lm.max_length - batch.ids.shape[1])
            self.steps = self.lm._steps([], self.lm._writes(self.edits, batch, room), None)
            self.rows, self.number = len(batch.ids), 0
        elif len(batch.ids) != self.rows:
            raise ValueError(
                f"a pass goes on with {len(batch.ids)} rows of a cache, after {self.rows} prompts: run the prompts "
                "themselves in this block, with as many rows"
            )
        else:
            self.number += 1
            batch = TokenBatch(batch.ids, batch.mask, batch.positions, step=self.number)
        tokens, held, ends = batch.plain(), {}, {}
        for step in self.steps:
            ends.setdefault((step.place.path, step.place.end), []).append(step)
        for (path, end), steps in ends.items():
            at = passes.envoy_at(module, path)
            act = _Act(steps, tokens, held)
            if end == "input":
                self.handles.append(at.register_forward_pre_hook(act.before, with_kwargs=True))
            else:
                self.handles.append(at.register_forward_hook(act.after))

    def end(self, *_: Any) -> None:
        if not self.lm._lock._is_owned():
            while self.handles:
                self.handles.pop().remove()

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[TokenBatch, int]:
        """(the tokens of a pass, how many a cache holds before them)."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError("edits need to know the tokens: call the module with input_ids, not with inputs_embeds")
        past: Any = kwargs.get("past_key_values")
        seen = 0 if past is None else past.get_seq_length()
        mask = kwargs.get("attention_mask")
        mask = torch.ones(len(ids), seen + ids.shape[1]) if mask is None else mask
        if mask.dim() != 2 or mask.shape[1] != seen + ids.shape[1]:
            raise ValueError(
                f"edits read positions from an attention_mask of shape {(len(ids), seen + ids.shape[1])}, got "
                f"{tuple(mask.shape)}"
            )
        if not bool(mask[:, 0].all()):
            raise ValueError("edits take rows that are padded on the right: set tokenizer.padding_side = 'right', or "
                             "run one prompt at a time")  # fmt: skip
        positions = (mask.cpu().long().cumsum(1) - 1)[:, seen:]
        return TokenBatch(ids.cpu(), mask[:, seen:].cpu().bool(), positions), seen


class _Act:
    """The steps at one end of a module, as hooks. held: what earlier steps have read, by name."""

    def __init__(self, steps: Sequence[Any], tokens: Any, held: dict[str, Tensor]):
        self.steps = [(step, SimpleNamespace(**{**vars(step.place), "path": "at"})) for step in steps]
        self.tokens, self.held = tokens, held

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = None if args else next(iter(kwargs))
        at = SimpleNamespace(input=args[0] if name is None else kwargs[name])
        self._take(at)
        return ((at.input, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: at.input})

    def after(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        at = SimpleNamespace(output=output)
        self._take(at)
        return at.output

    def _take(self, at: SimpleNamespace) -> None:
        root, length = SimpleNamespace(at=at), self.tokens.ids.shape[1]
        for step, place in self.steps:
            there = passes.read(root, place, length)
            x = passes.value_of(there, place, self.held)
            if step.change is None:
                self.held[step.name] = x.to(torch.float32, copy=True)
                continue
            new = step.change(x.detach(), self.tokens, *[self.held[name].detach() for name in step.needs])
            passes.put(root, place, there, x, x + (new.to(x) - x.detach()) if x.requires_grad else new)
