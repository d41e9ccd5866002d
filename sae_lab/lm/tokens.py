"""Prompts to token ids and back: prefixes, padding, chat roles, and the text of each token."""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from sae_lab.arguments import SAID
from sae_lab.spelling import check_text
from sae_lab.types import TokenBatch

Chat = Sequence[dict[str, str]]
Prompt = str | Chat
Texts = Sequence[Prompt]
Prompts = (
    Prompt | Texts | Sequence[int | np.integer] | Sequence[Sequence[int]] | Tensor | np.ndarray | dict[str, str]
    | TokenBatch
)  # fmt: skip
_KINDS = "a str, token ids, chat messages ({'role', 'content'}), or a list of one kind"
SAID[Prompts] = _KINDS
SAID[Prompt] = "a text or chat messages ({'role', 'content'})"
SAID[Texts] = "texts, or chats (lists of messages)"

_MARKS = 0xF0000  # private-use characters, which no template holds: the n-th replaces message n's characters
_KEPT = (r"\s", r"\s|<[^<>]*>|\[[^\[\]]*\]")  # not replaced: space, which templates strip; then tags, which some read
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PIECE, MARGIN, TRIES = 1 << 17, 512, 8  # characters of a long text's pieces; characters around a cut; cuts tried


class Token(str):
    """A token's characters, with its ``id`` and its place ``start:end`` in the text. "" for the prefix, and for a token
    that ends within a character's bytes; ``label`` is the text to show for a token."""

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
    """The id of the token at position 0 of every text: "auto" is the tokenizer's BOS, else its EOS."""
    if prefix == "auto":
        return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None or (isinstance(prefix, int) and 0 <= prefix < len(tokenizer)):
        return prefix
    raise ValueError(f"prefix must be 'auto', None, or a token id in 0..{len(tokenizer) - 1}, got {prefix!r}")


def is_single(prompts: Any) -> bool:
    """Whether this is one prompt rather than a list of them."""
    if isinstance(prompts, str | dict | TokenBatch):
        return not isinstance(prompts, TokenBatch)
    if isinstance(prompts, Tensor):
        return prompts.dim() == 1
    return isinstance(next(iter(prompts), None), int | np.integer | dict)


def tokenize(tokenizer: Any, prompts: Prompts, prefix: int | None) -> TokenBatch:
    """Prompts of any kind as one right-padded batch. ValueError for no prompt, an empty one, or kinds mixed."""
    if isinstance(prompts, TokenBatch):
        return prompts
    many = _as_list(prompts)
    roles = None
    if all(isinstance(p, str) for p in many):
        rows = [begun(ids, prefix) for ids in encode_texts(tokenizer, many)]
    elif all(isinstance(p, list | tuple) and p and isinstance(p[0], dict) for p in many):
        rows, roles = map(list, zip(*(chat_tokens(tokenizer, chat) for chat in many), strict=True))
    elif all(isinstance(p, list | tuple) and all(type(i) is int for i in p) for p in many):
        rows = [list(p) for p in many]
    else:
        raise ValueError(f"prompts must be {_KINDS}, got a mixture")
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"prompt {empty[0]} has no tokens: pass some text, or a prefix token (LM(prefix=...))")
    return pad(rows, roles)


def begun(ids: list[int], prefix: int | None) -> list[int]:
    """The prefix token and a text's ids; the ids alone if the text itself starts with the prefix."""
    return ids if prefix is None or ids[:1] == [prefix] else [prefix, *ids]


def prefixed(tokenizer: Any, prompt: Prompts, prefix: int | None) -> bool:
    """Whether one prompt's first token is the prefix rather than a token of the text."""
    return isinstance(prompt, str) and prefix is not None and encode_texts(tokenizer, [prompt])[0][:1] != [prefix]


def answered(tokenizer: Any, prompt: Prompts, answer: str) -> Prompts:
    """A text or a chat with the model's answer behind it."""
    if not answer or isinstance(prompt, str):
        return prompt + answer if answer else prompt  # type: ignore[operator]
    if not is_chat(prompt):
        raise ValueError(f"an answer follows a text or a chat, got a {type(prompt).__name__}: leave answer out")
    ids, roles = chat_tokens(tokenizer, prompt, answer)  # type: ignore[arg-type]
    return pad([ids], [roles])


def _as_list(prompts: Any) -> list[Any]:
    no_ids = isinstance(prompts, Tensor) and (prompts.is_floating_point() or prompts.dtype == torch.bool)
    if no_ids or (isinstance(prompts, Tensor) and prompts.dim() not in (1, 2)):
        raise ValueError(
            f"token ids must be an integer tensor (pos) or (batch, pos), got {tuple(prompts.shape)} {prompts.dtype}"
        )
    prompts = _plain(prompts)
    if isinstance(prompts, dict) and "role" in prompts:
        prompts = [prompts]  # a chat of one message
    if not isinstance(prompts, str | list | tuple):
        raise ValueError(
            f"prompts must be a str, token ids, chat messages or a list of them, got {type(prompts).__name__}"
        )
    if not isinstance(prompts, str) and len(prompts) == 0:
        raise ValueError("no prompts: the list is empty")
    return [prompts] if is_single(prompts) else list(prompts)


def _plain(prompts: Any) -> Any:
    """Tensors, arrays, pandas columns and numpy numbers, also within lists, as lists and numbers of Python."""
    if hasattr(prompts, "tolist"):
        return prompts.tolist()
    return [_plain(p) for p in prompts] if isinstance(prompts, list | tuple) else prompts


def encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens. ValueError for a text with half a surrogate pair."""
    for number, text in enumerate(texts):
        check_text(text, f"text {number}" if len(texts) > 1 else "a text")
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # no warning of long documents


def encode_parts(tokenizer: Any, parts: Iterable[str]) -> Iterator[list[int]]:
    """The ids of a text that comes in parts, made piece by piece; ``encode_texts`` of the whole text gives the same.

    A piece ends at a place where a cut does not change the ids (``_cut``); without such a place it grows.
    """
    parts = iter(parts)
    if not getattr(tokenizer, "is_fast", False):  # a slow tokenizer does not give the places of tokens
        yield encode_texts(tokenizer, ["".join(parts)])[0]
        return
    text, begin, size = "", 0, PIECE  # the text from MARGIN characters before the last cut, which is at ``begin``
    while True:
        waiting = [text]
        missing = begin + size + MARGIN - len(text)
        while missing >= 0 and (part := next(parts, None)) is not None:
            waiting.append(part)
            missing -= len(part)
        text = "".join(waiting)
        piece = text[: begin + size + MARGIN]
        ids, starts, ends = _encode(tokenizer, piece)
        first = bisect_left(starts, begin) if begin else 0
        if len(piece) == len(text):
            yield ids[first:]
            return
        cut = _cut(tokenizer, piece, ids, starts, ends, begin + size)
        if cut is None:
            size *= 2
            continue
        yield ids[first:cut]
        text, begin, size = text[starts[cut] - MARGIN :], MARGIN, PIECE


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """(ids, the start of each token, the end of each token)."""
    check_text(text, "a text")
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    places = found["offset_mapping"]
    return found["input_ids"], [start for start, _ in places], [end for _, end in places]


def _cut(
    tokenizer: Any, text: str, ids: list[int], starts: list[int], ends: list[int], before: int
) -> int | None:  # fmt: skip
    """The last token that starts before the place ``before`` and in front of which the text can be cut, or None.

    No entry of the vocabulary holds the two characters at the cut, so that no token spans the cut and neither side
    changes the tokens of the other. (For tokenizers that look up whole words, cuts are at white space only.) Also, the
    characters around the cut give the same tokens when they are encoded alone: the ends of a piece do not matter there.
    """
    apart, tries = _parter(tokenizer), 0
    for i in range(bisect_left(starts, before) - 1, bisect_left(starts, before // 2), -1):
        at = starts[i]
        if at < MARGIN or starts[i - 1] == at or ends[i - 1] > at:
            continue
        if not apart(text, ids[i - 1], ids[i], ends[i - 1], at):
            continue
        there = _encode(tokenizer, text[at - MARGIN : at + MARGIN])
        if _around(there, MARGIN, 0) == _around((ids, starts, ends), at, at - MARGIN):
            return i
        tries += 1
        if tries == TRIES:
            return None
    return None


def _around(encoded: tuple[list[int], list[int], list[int]], at: int, less: int) -> list[tuple[int, int, int]]:
    """(id, start, end) of the tokens that start near a place; starts and ends are counted from ``less``."""
    ids, starts, ends = encoded
    low, high = bisect_left(starts, at - MARGIN // 2), bisect_left(starts, at + MARGIN // 2)
    return [(ids[i], starts[i] - less, ends[i] - less) for i in range(low, high)]


@lru_cache(4)
def _parter(tokenizer: Any) -> Any:
    """(text, id, next id, end of the first, start of the next) -> whether no token can span the two."""
    kind = type(tokenizer.backend_tokenizer.model).__name__
    spanned = {entry[i : i + 2] for entry in tokenizer.get_vocab() for i in range(len(entry) - 1)}

    def parts(text: str, one: int, next_: int, end: int, start: int) -> bool:
        if kind not in ("BPE", "Unigram"):
            return end < start or text[start].isspace() or text[start - 1].isspace()
        raw, after = tokenizer.convert_ids_to_tokens([one, next_])
        if tokenizer.unk_token in (raw, after):  # several unknown characters may become one token
            return False
        lone = any(re.fullmatch(r"<0x[0-9A-F]{2}>", r) for r in (raw, after))  # bytes of an unknown character
        return lone or raw[-1:] + after[:1] not in spanned

    return parts


def pad(rows: list[list[int]], roles: list[list[str]] | None = None) -> TokenBatch:
    """Rows of ids, padded on the right with id 0, which nothing reads."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    positions = torch.arange(width).expand_as(ids)
    return TokenBatch(ids, positions < lengths[:, None], positions, roles)


def is_chat(document: Any) -> bool:
    """Whether this is a list of messages."""
    return isinstance(document, list | tuple) and bool(document) and all(isinstance(m, dict) for m in document)


class ChatTokens(NamedTuple):
    """Ids of a chat in the model's template, and each token's role: "template" for the template's own tokens."""

    ids: list[int]
    roles: list[str]


def check_chat(tokenizer: Any, messages: Sequence[Any]) -> None:
    """ValueError for a tokenizer without a chat template, and for messages that are none."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this model's tokenizer has no chat template: pass plain text instead of messages")
    for m in messages:
        if not isinstance(m, dict) or not all(isinstance(m.get(key), str) for key in ("role", "content")):
            raise ValueError(f"a chat message is {{'role': str, 'content': str}}, got {m!r}")
        check_text(m["content"], "a chat message")


def chat_tokens(tokenizer: Any, messages: Sequence[Any], answer: str = "") -> ChatTokens:
    """A chat as tokens. If the last message is not the assistant's, the template's opening of its answer follows.
    answer: what the model said to it, at the end."""
    check_chat(tokenizer, messages)
    text = _render(tokenizer, messages)
    owners = _owners(tokenizer, messages, text)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"a {type(tokenizer).__name__} does not give its tokens' places in a chat: pass plain text, or a fast "
            "tokenizer"
        )
    encoded = tokenizer(text + answer, add_special_tokens=False, return_offsets_mapping=True)
    roles = []
    for start, end in encoded["offset_mapping"]:
        own = [n for n in owners[start:end] if n is not None]
        roles.append("assistant" if end > len(text) else messages[own[-1]]["role"] if own else "template")
    return ChatTokens(encoded["input_ids"], roles)


def _render(tokenizer: Any, messages: Chat, contents: dict[int, str] | None = None) -> str:
    """A chat in its template, with other contents in some messages. ValueError for a chat that the template refuses."""
    chat = [{**m, "content": (contents or {}).get(i, m["content"])} for i, m in enumerate(messages)]
    answer = bool(messages) and messages[-1]["role"] != "assistant"
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)
    except ImportError:
        raise
    except Exception as err:  # a template is a program, and may raise anything
        raise ValueError(
            f"this model's chat template refuses this chat ({err}): change its roles or their order, or pass plain text"
        ) from err


def _owners(tokenizer: Any, messages: Chat, text: str) -> list[int | None]:
    """For each character of a rendered chat, the number of its message; None for the template's own characters.

    In a second rendering each character of message n is replaced by the n-th private-use character, which tells a
    message's words from the same words in the template. White space is not replaced, since templates strip it, nor are
    tags if the template reads them.
    """
    contents = [m["content"] for m in messages]
    for kept in _KEPT:
        marks = {i: _marked(c, chr(_MARKS + i), kept) for i, c in enumerate(contents)}
        try:
            owners = _aligned(_render(tokenizer, messages, marks), text, contents)
        except ValueError:  # the template refuses the marks
            continue
        if owners is not None:
            break
    else:
        raise ValueError(
            "this chat template changes its messages, so their tokens cannot be told apart: pass plain text"
        )
    for i, content in enumerate(contents):
        if i in owners:
            _widen(tokenizer, messages, text, owners, i)
        elif content.strip() and len(messages) > 1 and _drops(tokenizer, messages, text, i):
            raise ValueError(
                f"this chat template leaves out message {i}, of role {messages[i]['role']!r}: take a role it knows, or "
                "pass plain text"
            )
    return owners


def _marked(content: str, mark: str, kept: str) -> str:
    return "".join(part if i % 2 else mark * len(part) for i, part in enumerate(re.split(f"((?:{kept})+)", content)))


def _aligned(marked: str, text: str, contents: list[str]) -> list[int | None] | None:
    """The message of each character; None unless the renderings differ in the marked characters alone, and these are
    the characters of the messages, in order."""
    if len(marked) != len(text):
        return None
    owners = [n if 0 <= (n := ord(c) - _MARKS) < len(contents) else None for c in marked]
    if any(n is None and c != t for n, c, t in zip(owners, marked, text, strict=True)):
        return None
    left = [iter(c) for c in contents]
    if not all(n is None or t in left[n] for n, t in zip(owners, text, strict=True)):
        return None
    return owners


def _widen(tokenizer: Any, messages: Chat, text: str, owners: list[int | None], i: int) -> None:
    """Give message i the unmarked characters between its marks, and those next to the marks that belong to it."""
    content = messages[i]["content"]
    places = [p for p, n in enumerate(owners) if n == i]
    start, end = places[0], places[-1] + 1
    last = content.rindex(text[end - 1]) + 1
    first = last
    for place in reversed(places):  # the last such words: templates leave out first words (thoughts)
        first = content.rindex(text[place], 0, first)
    # White space at an end is the message's if the text changes without it; else the template strips it.
    low, high = len(content) - len(content.lstrip()), len(content.rstrip())
    low = low if low and _render(tokenizer, messages, {i: content[low:]}) == text else 0
    high = high if high < len(content) and _render(tokenizer, messages, {i: content[:high]}) == text else len(content)
    if text[:start].endswith(content[low:first]):  # all of the message's beginning; else it is the template's
        start -= len(content[low:first])
    if text[end:].startswith(content[last:high]):
        end += len(content[last:high])
    owners[start:end] = [i if n is None else n for n in owners[start:end]]


def _drops(tokenizer: Any, messages: Chat, text: str, i: int) -> bool:
    """Whether the chat reads the same without message i."""
    try:
        return _render(tokenizer, [*messages[:i], *messages[i + 1 :]]) == text
    except ValueError:
        return False


def spans(tokenizer: Any, ids: Sequence[int], prefixed: bool) -> list[Token]:
    """Token ids as strings that join to the decoded text, also if a character's bytes are split over tokens.

    A short window is decoded with and without each token, which works for byte-level BPE and SentencePiece. An
    unfinished character decodes to U+FFFD; the token that completes it gets the character.
    """
    out: list[Token] = []
    position = 0
    window, done = 0, 0  # ids[window:done] is decoded context, ids[done:i] an unfinished character
    first = 1 if prefixed else 0
    for i, token_id in enumerate(ids):
        if i < first:
            out.append(Token("", token_id, 0, label(tokenizer, token_id)))
            window = done = i + 1
            continue
        piece = _decode(tokenizer, ids[window : i + 1])[len(_decode(tokenizer, ids[window:done])) :]
        if piece.endswith(_REPLACEMENT) and i + 1 < len(ids) and i - done < 4:  # a character has at most 4 bytes
            out.append(Token("", token_id, position, label(tokenizer, token_id)))
            continue
        whole = i == done and piece and _REPLACEMENT not in piece
        out.append(Token(piece, token_id, position, None if whole else label(tokenizer, token_id, piece)))
        position += len(piece)
        window, done = done, i + 1
    return out


def label(tokenizer: Any, token_id: int, text: str | None = None) -> str:
    """The text to show for a token: its characters; its bytes, like ⟨E2 80⟩, if it holds part of a character; the
    vocabulary's spelling if it decodes to nothing. text: its characters after the tokens before it; None: alone."""
    raw = _raw(tokenizer, token_id)
    if raw is None:  # a model may have more ids than its tokenizer
        return f"⟨id {token_id}⟩"
    alone = _decode(tokenizer, [token_id])
    if _REPLACEMENT in alone:
        return _bytes_label(raw)
    return (alone if text is None else text.lstrip(_REPLACEMENT)) or str(raw)


def _once(make: Callable[[Any, int], list[str]]) -> Callable[[Any, int], list[str]]:
    """``make``, called once for each tokenizer and size, and again after tokens were added.

    49,152 tokens take half a second."""
    made: WeakKeyDictionary[Any, dict[tuple[int, int], list[str]]] = WeakKeyDictionary()

    @wraps(make)
    def kept(tokenizer: Any, size: int) -> list[str]:
        known, key = made.setdefault(tokenizer, {}), (size, len(tokenizer))
        if key not in known:
            known[key] = make(tokenizer, size)
        return list(known[key])

    return kept


@_once
def labels_alone(tokenizer: Any, size: int) -> list[str]:
    """The label of each id below ``size``, by itself."""
    return [label(tokenizer, i) for i in range(size)]


@_once
def vocabulary(tokenizer: Any, size: int) -> list[str]:
    """The label of each id below ``size``, as within a text: at the start of one, some tokenizers drop a space."""
    plain = next(iter(encode_texts(tokenizer, ["a"])[0]), None)
    before = [] if plain is None else [plain]
    start = len(_decode(tokenizer, before))
    known = [i for i in range(size) if _raw(tokenizer, i) is not None]
    texts = tokenizer.batch_decode([[*before, i] for i in known], clean_up_tokenization_spaces=False)
    found = {i: text[start:] for i, text in zip(known, texts, strict=True)}
    return [t if (t := found.get(i)) and _REPLACEMENT not in t else label(tokenizer, i) for i in range(size)]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    known = [i for i in ids if _raw(tokenizer, i) is not None]
    return tokenizer.decode(known, clean_up_tokenization_spaces=False) if known else ""


def _raw(tokenizer: Any, token_id: int) -> str | bytes | None:
    """A token in the vocabulary's spelling; None for an id that the tokenizer does not know."""
    try:
        return tokenizer.convert_ids_to_tokens(token_id)
    except (IndexError, KeyError, ValueError, OverflowError):
        return None


def _bytes_label(raw: str | bytes) -> str:
    """The bytes of a token in the vocabulary's spelling: SentencePiece's <0xE2>, or byte-level BPE's stand-ins."""
    table = _byte_alphabet()
    if isinstance(raw, str) and re.fullmatch(r"(<0x[0-9A-Fa-f]{2}>)+", raw):
        found = bytes.fromhex(re.sub(r"<0x|>", "", raw))
    elif isinstance(raw, str) and all(c in table for c in raw):
        found = bytes(table[c] for c in raw)
    else:
        found = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass")
    return "⟨" + " ".join(f"{byte:02X}" for byte in found) + "⟩"


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # makes it anew at each call

    return {stand_in: byte for byte, stand_in in bytes_to_unicode().items()}
