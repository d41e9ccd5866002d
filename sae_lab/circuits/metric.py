"""What circuit work asks of a model: a metric of its answers, and prompts that pair up token by token."""

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import partial
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.lm.model import LM
from sae_lab.types import TokenBatch, Write

ROWS = 32  # prompts, or copies of them, that go through the model together
Metric = Callable[[Tensor, TokenBatch], Tensor]  # (logits "batch pos vocab", tokens) -> a number for each row


@as_annotated
def logit_difference(lm: LM, right: Sequence[str] | str, wrong: Sequence[str] | str) -> Metric:
    """The metric of most circuit work: at each prompt's last token, logit of the right answer less that of the wrong.

    Args: right, wrong: an answer for all rows, or one for each; each one token.
    """
    ids = [_answers(lm, side) for side in (right, wrong)]

    return partial(difference, right=ids[0], wrong=ids[1])


@as_annotated
def log_probability(lm: LM, answer: Sequence[str] | str) -> Metric:
    """log p(answer) after each prompt's last token, nats.

    Args: answer: one for all rows, or one for each; each one token.
    """
    return partial(log_chance, answer=_answers(lm, answer))


@as_annotated
def kl_from(lm: LM, sources: Sequence[str] | str) -> Metric:
    """KL(source ‖ prompt) of the next token after each prompt's last one, nats: 0 where a prompt predicts what its
    source does. It asks for no answer, and counts every change of the prediction.

    Args: sources: one for each row of the prompts.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    form = Float[Tensor, f"{len(sources)} {lm.vocab_size}"]
    return partial(kl_to, given=lm.run(lm.tokenize(sources), logits=final_log_chances, form=form)[1].cpu())


@no_type_check
def difference(logits, tokens, right, wrong):
    """What ``logit_difference`` measures, as a function of torch alone (see ``lm.passes``)."""
    rows = tokens.row_numbers
    last = logits[torch.arange(len(rows)), tokens.mask.sum(1) - 1]
    at, many = torch.arange(len(rows)), int(rows.max()) + 1
    a, b = [one.expand(many)[rows] if len(one) == 1 else one[rows] for one in (right, wrong)]
    return last[at, a.to(last.device)] - last[at, b.to(last.device)]


@no_type_check
def final_log_chances(logits, tokens):
    """Log-probabilities of what follows each row's last token, "batch vocab"."""
    at = torch.arange(len(logits))
    return logits[at, tokens.mask.sum(1) - 1].float().log_softmax(-1)


@no_type_check
def log_chance(logits, tokens, answer):
    """What ``log_probability`` measures."""
    rows = tokens.row_numbers
    at = torch.arange(len(rows))
    last = logits[at, tokens.mask.sum(1) - 1].float().log_softmax(-1)
    ids = answer.expand(int(rows.max()) + 1)[rows] if len(answer) == 1 else answer[rows]
    return last[at, ids.to(last.device)]


@no_type_check
def kl_to(logits, tokens, given):
    """What ``kl_from`` measures."""
    rows = tokens.row_numbers
    last = logits[torch.arange(len(rows)), tokens.mask.sum(1) - 1].float().log_softmax(-1)
    wanted = given[rows].to(last.device)
    return (wanted.exp() * (wanted - last)).sum(-1)


@no_type_check
def placed(x, tokens, where, put):
    """x with one position of each row, ``where``, replaced."""
    out = x.clone()
    out[torch.arange(len(x)), where] = put.to(x)
    return out


@no_type_check
def shifted(x, tokens, where, by):
    """x with something added at one position of each row."""
    out = x.clone()
    out[torch.arange(len(x)), where] += by.to(x)
    return out


@no_type_check
def plus(x, tokens, by):
    """x with something added at every position."""
    return x + by.to(x)


@no_type_check
def of_metric(logits, tokens, metric):
    """The metric's numbers, one a row; where it gives anything else, what it gave."""
    value = metric(logits.float(), tokens)
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _answers(lm: LM, answers: Sequence[str] | str) -> Tensor:
    found = []
    for answer in [answers] if isinstance(answers, str) else answers:
        ids = lm.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"an answer is one token, {answer!r} is {len(ids)}: take its first, or another")
        found += ids
    return torch.tensor(found)


def require_here(lm: LM, what: str) -> None:
    """ValueError for a model on a server, where something needs its weights or gradients at several sites."""
    if lm.remote:
        raise ValueError(f"{what} needs the model on this machine: load it without remote=")


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


@as_annotated
def aligned_tokens(lm: LM, prompt: str, source: str) -> list[tuple[str | None, str | None]]:
    """Both texts' tokens side by side: equal ones in one pair, None where the other side has one more (difflib)."""
    ours, theirs = lm.tokens(prompt), lm.tokens(source)
    pairs: list[tuple[str | None, str | None]] = []
    matcher = SequenceMatcher(None, [t.id for t in ours], [t.id for t in theirs], autojunk=False)
    for _, i1, i2, j1, j2 in matcher.get_opcodes():
        for k in range(max(i2 - i1, j2 - j1)):
            pairs.append((ours[i1 + k].label if i1 + k < i2 else None, theirs[j1 + k].label if j1 + k < j2 else None))
    return pairs


def measured(lm: LM, batch: TokenBatch, metric: Metric, writes: Sequence[Write] = ()) -> Float[Tensor, " batch"]:
    return numbers(lm.run(batch, writes=writes, logits=partial(of_metric, metric=metric))[1], batch)


def numbers(value: Any, batch: TokenBatch) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (len(batch.ids),):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"a metric gives one number for each row, {len(batch.ids)} here, this one gave {shape}")
    return value
