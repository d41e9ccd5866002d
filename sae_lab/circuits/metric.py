"""Metrics of a model's answers, and the functions of torch alone that run where the model runs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.lm.model import LM
from sae_lab.lm.network import Network
from sae_lab.lm.tokens import Texts, label
from sae_lab.types import TokenBatch, Write

ROWS = 32  # prompts, or copies of them, in one batch
Metric = Callable[[Tensor, TokenBatch], Tensor]  # (logits "batch pos vocab", tokens) -> a number for each row


@as_annotated
def logit_difference(lm: LM, right: Sequence[str] | str, wrong: Sequence[str] | str) -> Metric:
    """``metric = logit_difference(lm, " Mary", " John")``: logit of the right answer minus logit of the wrong one,
    after each prompt's last token.

    Args: right, wrong: one answer for all rows, or one for each; an answer is one token.
    """
    ids = [_answers(lm, side) for side in (right, wrong)]
    return partial(difference, right=ids[0], wrong=ids[1])


@as_annotated
def log_probability(lm: LM, answer: Sequence[str] | str) -> Metric:
    """``metric = log_probability(lm, " Mary")``: log p(answer) after each prompt's last token, nats.

    Args: answer: one for all rows, or one for each; an answer is one token.
    """
    return partial(log_chance, answer=_answers(lm, answer))


@as_annotated
def kl_from(lm: LM, sources: str | Texts) -> Metric:
    """``metric = kl_from(lm, sources)``: KL(source ‖ prompt) of the next token after each prompt's last one, nats.

    0 if a prompt and its source predict the same. It needs no answer, and counts every change of the prediction.

    Args: sources: one for each row of the prompts.
    """
    many: Texts = [sources] if isinstance(sources, str) else sources
    form = Float[Tensor, f"{len(many)} {lm.vocab_size}"]
    return partial(kl_to, given=lm.run(lm.tokenize(many), logits=final_log_chances, form=form)[1].cpu())


def _answers(lm: LM, answers: Sequence[str] | str) -> Tensor:
    answers = [answers] if isinstance(answers, str) else answers
    return torch.tensor([one_token(lm, one, "an answer") for one in answers])


def one_token(lm: LM, token: str | int, what: str = "a target") -> int:
    """The id of a text that is one token, or of an id that the model knows. ValueError for any other."""
    ids = [token] if isinstance(token, int) else lm.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = " ".join(repr(label(lm.tokenizer, i)) for i in ids[:5]) or "nothing"
        raise ValueError(f"{what} is one token, {token[:40]!r} is {len(ids)} ({pieces}): take one of them")  # type: ignore[index]
    if not 0 <= ids[0] < lm.vocab_size:
        raise ValueError(f"{what}'s id must lie in 0..{lm.vocab_size - 1}, got {ids[0]}")
    return ids[0]


def measured(lm: Network, batch: TokenBatch, metric: Metric, writes: Sequence[Write] = ()) -> Float[Tensor, " batch"]:
    """The metric's numbers, one per row, with activations changed by ``writes``."""
    return numbers(lm.run(batch, writes=writes, logits=partial(of_metric, metric=metric))[1], batch)


def numbers(value: Any, batch: TokenBatch) -> Tensor:
    """What a metric returned. ValueError unless it is one number for each row."""
    if not isinstance(value, Tensor) or value.shape != (len(batch.ids),):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"a metric gives one number for each row, {len(batch.ids)} here, this one gave {shape}")
    return value


@no_type_check
def of_metric(logits, tokens, metric):
    """What the metric returns: tensors on the CPU, anything else unchanged."""
    value = metric(logits.float() if isinstance(logits, torch.Tensor) else logits, tokens)
    return value.cpu() if isinstance(value, torch.Tensor) else value


@no_type_check
def final_logits(logits, tokens):
    """Logits of the token after each row's last token, "batch vocab"."""
    return logits[torch.arange(len(logits)), tokens.mask.sum(1) - 1]


@no_type_check
def final_log_chances(logits, tokens):
    """Log-probabilities of the token after each row's last token, "batch vocab"."""
    return final_logits(logits, tokens).float().log_softmax(-1)


@no_type_check
def picked(x, tokens, answer):
    """The entry of each row of x at its answer. answer: one for all of the user's prompts, or one for each."""
    rows = tokens.row_numbers
    ids = answer.expand(int(rows.max()) + 1)[rows] if len(answer) == 1 else answer[rows]
    return x[torch.arange(len(rows)), ids.to(x.device)]


@no_type_check
def difference(logits, tokens, right, wrong):
    """The numbers of ``logit_difference``."""
    last = final_logits(logits, tokens)
    return picked(last, tokens, right) - picked(last, tokens, wrong)


@no_type_check
def log_chance(logits, tokens, answer):
    """The numbers of ``log_probability``."""
    return picked(final_log_chances(logits, tokens), tokens, answer)


@no_type_check
def kl_to(logits, tokens, given):
    """The numbers of ``kl_from``. given: the sources' log-probabilities, "prompts vocab"."""
    last = final_log_chances(logits, tokens)
    wanted = given[tokens.row_numbers].to(last.device)
    return (wanted.exp() * (wanted - last)).sum(-1)


@no_type_check
def placed(x, tokens, rows, where, put):
    """x with ``put`` in place of the positions ``where`` of these rows, one by one."""
    out = x.clone()
    out[rows, where] = put.to(x)
    return out


@no_type_check
def shifted(x, tokens, where, by):
    """x with ``by`` added at one position, ``where``, of each row."""
    out = x.clone()
    out[torch.arange(len(x)), where] += by.to(x)
    return out


@no_type_check
def plus(x, tokens, by):
    """x with ``by`` added at every position."""
    return x + by.to(x)
