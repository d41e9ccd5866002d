"""What circuit work asks of a model: a metric of its answers, and prompts that pair up token by token."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.lm.model import LM
from sae_lab.types import TokenBatch, Write

ROWS = 32  # prompts, or copies of them, that go through the model together
Metric = Callable[[Tensor, TokenBatch], Tensor]  # (logits "batch pos vocab", tokens) -> a number for each row


def logit_difference(lm: LM, right: Sequence[str] | str, wrong: Sequence[str] | str) -> Metric:
    """The metric of most circuit work: at each prompt's last token, logit of the right answer less that of the wrong.

    Args: right, wrong: an answer for all rows, or one for each; each one token.
    """
    ids = [_answers(lm, side) for side in (right, wrong)]

    def metric(logits: Tensor, tokens: TokenBatch) -> Tensor:
        rows = tokens.row_numbers
        last = logits[torch.arange(len(rows)), tokens.mask.sum(1) - 1]
        a, b = (one.expand(int(rows.max()) + 1) if len(one) == 1 else one for one in ids)
        at = torch.arange(len(rows))
        return last[at, a[rows].to(last.device)] - last[at, b[rows].to(last.device)]

    return metric


def _answers(lm: LM, answers: Sequence[str] | str) -> Tensor:
    found = []
    for answer in [answers] if isinstance(answers, str) else answers:
        ids = lm.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"an answer is one token, {answer!r} is {len(ids)}: take its first, or another")
        found += ids
    return torch.tensor(found)


def copied(batch: TokenBatch, times: int) -> TokenBatch:
    """The batch several times over; copies keep their rows' numbers."""
    ids, mask, positions = (t.repeat(times, 1) for t in (batch.ids, batch.mask, batch.positions))
    return TokenBatch(ids, mask, positions, rows=batch.row_numbers.repeat(times))


def paired(lm: LM, prompts: Sequence[str], sources: Sequence[str]) -> tuple[TokenBatch, TokenBatch]:
    """Both as tokens. ValueError where they do not pair up token by token."""
    prompts, sources = ([one] if isinstance(one, str) else list(one) for one in (prompts, sources))
    if len(prompts) != len(sources) or not prompts:
        raise ValueError(f"give one source for each prompt: got {len(prompts)} prompts and {len(sources)} sources")
    lengths = [len(lm.tokenize(p).ids[0]) for p in [*prompts, *sources]]
    if odd := [i for i, n in enumerate(lengths) if n != lengths[0]]:
        which = f"prompt {odd[0]}" if odd[0] < len(prompts) else f"source {odd[0] - len(prompts)}"
        raise ValueError(
            f"patching needs prompts of equal token lengths, since a patch goes to the same position: prompt 0 has "
            f"{lengths[0]}, {which} has {lengths[odd[0]]} (lm.tokens(prompt) shows them)"
        )
    return lm.tokenize(prompts), lm.tokenize(sources)


def measured(lm: LM, batch: TokenBatch, metric: Metric, writes: Sequence[Write] = ()) -> Float[Tensor, " batch"]:
    logits = lm.run(batch, writes=writes)[1]
    assert logits is not None
    return numbers(metric(logits.float(), batch), batch).cpu()


def numbers(value: Any, batch: TokenBatch) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (len(batch.ids),):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"a metric gives one number for each row, {len(batch.ids)} here, this one gave {shape}")
    return value
