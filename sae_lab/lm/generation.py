"""Generation: the next token of each row, again and again, on this machine or on a server.

Edits act on every position of the prompt and of what is generated. Here a new token is read with the state that the
model carries (``continuing``), or with the whole text where the state cannot be carried.
"""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sae_lab.lm import passes
from sae_lab.types import TokenBatch, Write


def continued(
    lm: Any, batch: TokenBatch, writes: list[Write], new: int, temperature: float, generator: Any, stream: bool = False
) -> Iterator[tuple[list[int], list[int | None]]]:
    """(rows, the next token of each), again and again; rows of one length after those of another.

    A token is None for a row that has met the model's end token.
    """
    lengths = batch.mask.sum(1)
    groups = [(lengths == n).nonzero().flatten() for n in lengths.unique()]
    parts = [(rows, batch.ids[rows, : int(lengths[rows[0]])]) for rows in groups]
    if lm._server:
        yield from _continued_there(lm, parts, writes, new, temperature, generator, stream)
        return
    for rows, ids in parts:
        for next_ones in _continued_here(lm, ids, rows, writes, new, temperature, generator):
            yield rows.tolist(), next_ones


def _continued_there(
    lm: Any, parts: list[tuple[Tensor, Tensor]], writes: list[Write], new: int, temperature: float, generator: Any,
    stream: bool,
) -> Iterator[tuple[list[int], list[int | None]]]:  # fmt: skip
    """The same on a server: one request makes all tokens. To stream them, the block prints each as it comes. (Names
    in the block must not be those of this module's globals, which would be sent with it.)"""
    from types import SimpleNamespace as Tokens

    import nnsight
    from transformers import DynamicCache

    if "past_key_values" not in inspect.signature(lm._module.forward).parameters:
        raise ValueError(
            f"{lm.id} keeps its state in no key-value cache, and only such a state is carried on a server: "
            "generate with the model on this machine, LM(...) without remote="
        )
    nn, steps, config = lm._nn, lm._steps((), writes, None), lm._module.config
    ends, limit = sorted(_end_ids(lm._module, lm.tokenizer)), lm.max_length
    state = None if generator is None else generator.get_state()
    said, through, pick = [], passes.through, passes.pick
    most = sum(len(rows) for rows, _ in parts)
    form = partial(_is_said, parts=parts, new=new, vocab=lm.vocab_size)
    backend = lm._server.request(nn, form, 4 * most * (16 * new + lm.vocab_size), listen=stream)
    with lm._lock, torch.no_grad(), nn.session(backend=backend):
        said = nnsight.save([])
        generator = None if state is None else torch.Generator()
        if generator is not None:
            generator.set_state(state)
        for rows, ids in parts:
            past, start = DynamicCache(config=config), 0
            done = torch.zeros(len(ids), dtype=torch.bool)
            for number in range(min(new, limit - ids.shape[1])):
                positions = torch.arange(start, start + ids.shape[1]).expand_as(ids)
                real, start = torch.ones_like(ids, dtype=torch.bool), start + ids.shape[1]
                here = Tokens(ids=ids, mask=real, positions=positions, row_numbers=rows, step=number)
                inputs = {"input_ids": ids, "past_key_values": past, "use_cache": True, "logits_to_keep": 1}
                with nn.trace(inputs):
                    through(nn, steps, here, {})
                    scores = nnsight.save(nn.output.logits[:, -1].float().cpu())
                ids = pick(scores, temperature, generator)
                done |= torch.tensor([token in ends for token in ids.flatten().tolist()])
                if bool(done.all()):
                    break
                token_ids = [-1 if end else t for t, end in zip(ids.flatten().tolist(), done.tolist(), strict=True)]
                said.append((rows.tolist(), token_ids))
                if stream:
                    print("next", *token_ids, flush=True)
    if stream:
        lines = (line.split() for line in backend.lines())
        said = (([0], _one_token(line[1:], lm.vocab_size)) for line in lines if line[:1] == ["next"])
    else:
        said = backend.saved("said")
    for rows, token_ids in said:
        yield rows, [None if t < 0 else t for t in token_ids]


def _one_token(words: list[str], vocab: int) -> list[int]:
    """The token that a line of the block's says."""
    from sae_lab.lm.remote import NDIFError

    if len(words) != 1 or not words[0].removeprefix("-").isdecimal() or not -1 <= int(words[0][:12]) < vocab:
        raise NDIFError("the server said a next token that is none of this model's: make the call again, or here")
    return [int(words[0])]


def _is_said(said: Any, parts: list[tuple[Tensor, Tensor]], new: int, vocab: int) -> bool:
    """Whether this is what the block above has said: of one part after the other its rows and as many tokens."""
    allowed = [rows.tolist() for rows, _ in parts for _ in range(new)]
    if not isinstance(said, list) or not all(isinstance(part, tuple) and len(part) == 2 for part in said):
        return False
    ways = iter(allowed)
    return all(
        rows in ways and isinstance(ids, list) and len(ids) == len(rows)
        and all(type(t) is int and -1 <= t < vocab for t in ids)
        for rows, ids in said
    )  # fmt: skip


def _continued_here(
    lm: Any, ids: Tensor, rows: Tensor, writes: list[Write], new: int, temperature: float,
    generator: torch.Generator | None,
) -> Iterator[list[int | None]]:  # fmt: skip
    """The next token of each row, again and again; None for a row that has met the model's end token. rows: the
    numbers of these rows among the user's prompts."""
    ends = _end_ids(lm._module, lm.tokenizer)
    done = torch.zeros(len(ids), dtype=torch.bool)
    with lm._lock:
        past = lm._continuing.state()
    steps = torch.zeros(ids.shape[1], dtype=torch.long)  # in which pass each token was, or would have been, read
    begin = 0  # of the tokens that the model has not seen
    for number in range(min(new, lm.max_length - ids.shape[1])):
        part = ids[:, begin:]
        positions = torch.arange(begin, ids.shape[1]).expand_as(part)
        step = number if past is not None else steps
        real = torch.ones_like(part, dtype=torch.bool)
        batch = TokenBatch(part, real, positions, rows=rows, step=step)
        _, out = lm.run(batch, writes=writes, past=past, logits=passes.last)
        token = passes.pick(out, temperature, generator)
        done |= torch.tensor([t in ends for t in token.flatten().tolist()])
        if bool(done.all()):
            return
        yield [None if end else t for t, end in zip(token.flatten().tolist(), done.tolist(), strict=True)]
        begin = 0 if past is None else ids.shape[1]
        ids = torch.cat([ids, token.to(ids)], dim=1)
        steps = torch.cat([steps, torch.tensor([number + 1])])


def pieces(
    lm: Any, batch: TokenBatch, writes: list[Write], new: int, temperature: float, generator: Any
) -> Iterator[str]:  # fmt: skip
    """The text that one prompt's new tokens add, token by token."""
    ids = batch.ids[0].tolist()
    said = lm.tokenizer.decode(ids, skip_special_tokens=True)
    for _, [token] in continued(lm, batch, writes, new, temperature, generator, stream=True):
        if token is not None:
            ids.append(token)
        text = lm.tokenizer.decode(ids, skip_special_tokens=True)
        whole = text if token is None else text.rstrip("\ufffd")  # which stands for bytes that wait for the rest
        yield whole[len(said) :]
        said = said if len(whole) < len(said) else whole
    if rest := lm.tokenizer.decode(ids, skip_special_tokens=True)[len(said) :]:
        yield rest


def _end_ids(module: Any, tokenizer: Any) -> set[int]:
    ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return {e for e in (ends if isinstance(ends, list) else [ends]) if e is not None}
