"""Generation: the next token of each row, pass by pass, on this machine or on a server.

Edits act on every position of the prompt and of the generated text. A pass reads the newest token alone, with the state
that the model carries (``continuing``); or the whole text, where a model's state cannot be carried.
"""

import inspect
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sae_lab.lm import passes
from sae_lab.types import TokenBatch, Write

Said = tuple[list[int], list[int]]  # (rows, the next token of each; -1 for a row that has met an end token)


def continued(
    lm: Any, batch: TokenBatch, writes: list[Write], new: int, temperature: float, generator: Any, stream: bool = False
) -> Iterator[tuple[list[int], list[int | None]]]:
    """(rows, the next token of each), pass by pass; rows of one length after those of another. The token is None for a
    row that has met the model's end token."""
    lengths = batch.mask.sum(1)
    groups = [(lengths == n).nonzero().flatten() for n in lengths.unique()]
    parts = [(rows, batch.ids[rows, : int(lengths[rows[0]])]) for rows in groups]
    said = _said_there if lm.remote else _said_here
    for rows, token_ids in said(lm, parts, writes, new, temperature, generator, stream):
        yield rows, [None if token < 0 else token for token in token_ids]


def _said_here(
    lm: Any, parts: list[tuple[Tensor, Tensor]], writes: list[Write], new: int, temperature: float, generator: Any,
    stream: bool,
) -> Iterator[Said]:  # fmt: skip
    ends = _end_ids(lm._module, lm.tokenizer)
    for rows, ids in parts:
        with lm._lock:
            past = lm._empty_state and lm._empty_state.begin()
        last_logits = partial(_last_logits, lm=lm, rows=rows, writes=writes, past=past, prompt=ids.shape[1])
        most = min(new, lm.max_length - ids.shape[1])
        for token_ids in passes.decode(last_logits, ids, most, ends, temperature, generator):
            yield rows.tolist(), token_ids


def _last_logits(
    ids: Tensor, number: int, *, lm: Any, rows: Tensor, writes: list[Write], past: Any, prompt: int
) -> Tensor:  # fmt: skip
    """``last_logits`` of ``passes.decode`` on this machine. past: the state that is carried, or None; prompt: its
    length in tokens."""
    begin = ids.shape[1] - 1 if number and past is not None else 0
    part, positions = ids[:, begin:], torch.arange(begin, ids.shape[1])
    # Without a state one pass does the work of several: each position has the number of the pass that it belongs to.
    step = number if past is not None else (positions - prompt + 1).clamp_min(0)
    real = torch.ones_like(part, dtype=torch.bool)
    batch = TokenBatch(part, real, positions.expand_as(part), rows=rows, step=step)
    return lm.run(batch, writes=writes, past=past, logits=passes.last)[1]


def _said_there(
    lm: Any, parts: list[tuple[Tensor, Tensor]], writes: list[Write], new: int, temperature: float, generator: Any,
    stream: bool,
) -> Iterable[Said]:  # fmt: skip
    """``continued`` on a server: one request makes all tokens. To stream, the block prints each token. (Names
    in the block must not be those of this module's globals, which would be sent with it.)"""
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
    said, decode, last_logits, bound = [], passes.decode, passes.last_logits_there, partial
    most = sum(len(rows) for rows, _ in parts)
    form = bound(_is_said, parts=parts, new=new, vocab=lm.vocab_size)
    backend = lm._server.request(nn, form, 4 * most * (16 * new + lm.vocab_size), listen=stream)
    with lm._lock, torch.no_grad(), nn.session(backend=backend):
        said = nnsight.save([])
        generator = None if state is None else torch.Generator()
        if generator is not None:
            generator.set_state(state)
        for rows, ids in parts:
            logits = bound(last_logits, root=nn, steps=steps, rows=rows, past=DynamicCache(config=config))
            for token_ids in decode(logits, ids, min(new, limit - ids.shape[1]), ends, temperature, generator):
                said.append((rows.tolist(), token_ids))
                if stream:
                    print("next", *token_ids, flush=True)
    if stream:
        lines = (line.split() for line in backend.lines())
        return (([0], _one_token(line[1:], lm.vocab_size)) for line in lines if line[:1] == ["next"])
    return backend.saved("said")


def _one_token(words: list[str], vocab: int) -> list[int]:
    """The token in a line that the block has printed. NDIFError for any other line."""
    from sae_lab.lm.remote import NDIFError

    if len(words) != 1 or not words[0].removeprefix("-").isdecimal() or not -1 <= int(words[0][:12]) < vocab:
        raise NDIFError("the server returned a token that is not in this model's vocabulary: repeat the call")
    return [int(words[0])]


def _is_said(said: Any, parts: list[tuple[Tensor, Tensor]], new: int, vocab: int) -> bool:
    """Whether this is a list of ``Said`` for these parts, each with its own rows and at most ``new`` tokens a row."""
    allowed = [rows.tolist() for rows, _ in parts for _ in range(new)]
    if not isinstance(said, list) or not all(isinstance(part, tuple) and len(part) == 2 for part in said):
        return False
    ways = iter(allowed)
    return all(
        rows in ways and isinstance(ids, list) and len(ids) == len(rows)
        and all(type(t) is int and -1 <= t < vocab for t in ids)
        for rows, ids in said
    )  # fmt: skip


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
        whole = text if token is None else text.rstrip("\ufffd")  # the decoder's mark for an incomplete character
        yield whole[len(said) :]
        said = said if len(whole) < len(said) else whole
    if rest := lm.tokenizer.decode(ids, skip_special_tokens=True)[len(said) :]:
        yield rest


def _end_ids(module: Any, tokenizer: Any) -> set[int]:
    ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return {e for e in (ends if isinstance(ends, list) else [ends]) if e is not None}
