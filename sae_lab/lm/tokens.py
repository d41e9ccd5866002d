"""Prompts to token ids and back: prefixes, padding, chat roles, and strings that map to characters."""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from sae_lab.types import TokenBatch

Chat = Sequence[dict[str, str]]
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Chat | Sequence[Chat] | TokenBatch

_MARK = "\ue000"  # a private-use character, which no template or text holds
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Token(str):
    """A token's characters, with its ``id`` and its place ``start:end`` in the text.

    "" for a prefix and for a token that only begins a character; ``label`` is what to show for those.
    """

    id: int
    start: int
    end: int
    label: str

    def __new__(cls, text: str, id: int, start: int, label: str | None = None) -> "Token":
        token = super().__new__(cls, text)
        token.id, token.start, token.end = id, start, start + len(text)
        token.label = text if label is None else label
        return token


def prefix_id(tokenizer: Any, prefix: str | int | None) -> int | None:
    """The token that stands at position 0 of every text: "auto" is the tokenizer's BOS, else its EOS."""
    if prefix == "auto":
        return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None or (isinstance(prefix, int) and 0 <= prefix < len(tokenizer)):
        return prefix
    raise ValueError(f"prefix must be 'auto', None, or a token id in 0..{len(tokenizer) - 1}, got {prefix!r}")


def is_single(prompts: Prompts) -> bool:
    """Whether this is one prompt rather than a list of them."""
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, Tensor):
        return prompts.dim() == 1
    return not isinstance(prompts, TokenBatch) and isinstance(prompts[0], int | dict)


def tokenize(tokenizer: Any, prompts: Prompts, prefix: int | None) -> TokenBatch:
    """Any kind of prompts as one right-padded batch. ValueError for nothing at all, or for a kind unknown here."""
    if isinstance(prompts, TokenBatch):
        return prompts
    many = _as_list(prompts)
    roles = None
    if all(isinstance(p, str) for p in many):
        ids = encode_texts(tokenizer, many)
        rows = [([prefix] if prefix is not None else []) + row for row in ids]
    elif all(isinstance(p, list | tuple) and p and isinstance(p[0], dict) for p in many):
        rows, roles = map(list, zip(*(_chat(tokenizer, chat) for chat in many), strict=True))
    elif all(isinstance(p, list | tuple) and all(isinstance(i, int) for i in p) for p in many):
        rows = [list(p) for p in many]
    else:
        raise ValueError("prompts must be a str, token ids, chat messages ({'role', 'content'}), or a list of one kind")
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"prompt {empty[0]} has no tokens: pass some text, or a prefix token (LM(prefix=...))")
    return pad(rows, roles)


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, Tensor):
        if prompts.dim() not in (1, 2) or prompts.is_floating_point():
            raise ValueError(f"token ids must be an integer tensor (pos) or (batch, pos), got {tuple(prompts.shape)}")
        prompts = prompts.tolist()
    if not isinstance(prompts, str | list | tuple):
        raise ValueError(
            f"prompts must be a str, token ids, chat messages or a list of them, got {type(prompts).__name__}"
        )
    if not isinstance(prompts, str) and len(prompts) == 0:
        raise ValueError("no prompts: the list is empty")
    return [prompts] if is_single(prompts) else list(prompts)


def encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without any special token added. verbose=False: long documents are cut up later."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def pad(rows: list[list[int]], roles: list[list[str]] | None = None) -> TokenBatch:
    """Rows of ids, padded on the right with id 0 (any id would do: nothing reads it)."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    positions = torch.arange(width).expand_as(ids)
    return TokenBatch(ids, positions < lengths[:, None], positions, roles)


def _chat(tokenizer: Any, messages: Chat) -> tuple[list[int], list[str]]:
    """Ids of a chat in the model's template, and each token's role ("template" for what the template adds).

    A chat that does not end with the assistant's words ends with the template's opening of its answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this model's tokenizer has no chat template: pass plain text instead of messages")
    if bad := [m for m in messages if not all(isinstance(m.get(key), str) for key in ("role", "content"))]:
        raise ValueError(f"a chat message is {{'role': str, 'content': str}}, got {bad[0]!r}")

    def render(contents: list[str]) -> str:
        chat = [{**m, "content": c} for m, c in zip(messages, contents, strict=True)]
        answer = messages[-1]["role"] != "assistant"
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)

    contents = [m["content"] for m in messages]
    text = render(contents)
    # Where the contents stand, from a rendering with marks in their places: "You" may well stand in the template too.
    marked = re.split(f"{_MARK}(\\d+){_MARK}", render([f"{_MARK}{i}{_MARK}" for i in range(len(messages))]))
    literals, order = marked[::2], [int(i) for i in marked[1::2]]
    filled = [contents, [c.strip() for c in contents]]  # some templates strip what they are given
    found = next((f for f in filled if order == list(range(len(f))) and text == _weave(literals, f)), None)
    if found is None:
        raise ValueError(
            "this chat template changes its messages, so their tokens cannot be told apart: pass plain text"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    roles = ["template"] * len(encoded["input_ids"])
    end = 0
    for message, literal, content in zip(messages, literals, found, strict=False):
        start = end + len(literal)
        end = start + len(content)
        for i, (a, b) in enumerate(encoded["offset_mapping"]):
            if a < end and b > start:
                roles[i] = message["role"]
    return encoded["input_ids"], roles


def _weave(literals: list[str], contents: list[str]) -> str:
    return "".join(a + b for a, b in zip_longest(literals, contents, fillvalue=""))


def spans(tokenizer: Any, ids: Sequence[int], prefixed: bool) -> list[Token]:
    """Token ids as strings that join to the decoded text, also where a character's bytes are split over tokens.

    Decodes a short window twice per token (with and without it): works for byte-level and SentencePiece alike. An
    unfinished character decodes to U+FFFD; it waits for the token that completes it.
    """

    def decode(part: Sequence[int]) -> str:
        return tokenizer.decode(part, clean_up_tokenization_spaces=False) if len(part) else ""

    out: list[Token] = []
    position = 0
    window, done = 0, 0  # ids[window:done] is decoded context, ids[done:i] an unfinished character
    first = 1 if prefixed else 0
    for i, token_id in enumerate(ids):
        if i < first:
            out.append(Token("", token_id, 0, decode([token_id])))
            window = done = i + 1
            continue
        piece = decode(ids[window : i + 1])[len(decode(ids[window:done])) :]
        if piece.endswith(_REPLACEMENT) and i + 1 < len(ids) and i - done < 4:  # a character has at most 4 bytes
            out.append(Token("", token_id, position, _bytes_label(tokenizer, token_id)))
            continue
        out.append(Token(piece, token_id, position, _bytes_label(tokenizer, token_id) if i > done else None))
        position += len(piece)
        window, done = done, i + 1
    return out


def label(tokenizer: Any, token_id: int) -> str:
    """What to show for a token that stands by itself: its text, or its bytes where it is part of a character."""
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    return _bytes_label(tokenizer, token_id) if _REPLACEMENT in text else text


def _bytes_label(tokenizer: Any, token_id: int) -> str:
    """What to show for part of a character: its bytes, like ⟨E2 80⟩, where the tokenizer is byte-level."""
    raw = tokenizer.convert_ids_to_tokens(token_id)
    table = _byte_alphabet()
    if all(c in table for c in raw):
        return "⟨" + " ".join(f"{table[c]:02X}" for c in raw) + "⟩"
    return raw.replace("<0x", "⟨").replace(">", "⟩")  # SentencePiece's byte tokens


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE: printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
