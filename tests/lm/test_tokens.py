"""Chats with role masks, and token strings that map back to characters."""

import random

import pytest
import torch

import sae_lab as sl
from sae_lab.lm.tokens import Token

TRICKY = {
    "plain": "Hello, world!  Two spaces.",
    "emoji": "I 🙂 you 👩‍🚀 🇫🇷!",
    "cjk": "日本語のテキスト、中文。",
    "combining": "cafe\u0301 क्षि",
    "right to left": "שלום עולם مرحبا",
    "newlines": "one\n\ntwo\r\n\tthree\n",
    "replacement character": "a\ufffdb \ufffd\ufffd",
    "zero byte": "a\x00b",
}


@pytest.mark.parametrize("text", TRICKY.values(), ids=TRICKY)
def test_token_strings_join_to_the_text(tiny_lm, text):
    tokens = tiny_lm.tokens(text)
    assert "".join(tokens) == text
    assert [t.id for t in tokens] == tiny_lm.tokenize(text).ids[0].tolist()
    for token in tokens:
        assert text[token.start : token.end] == token
    assert [t.end for t in tokens[:-1]] == [t.start for t in tokens[1:]], "each begins where the last one ends"


def test_random_text_joins(tiny_lm):
    rng = random.Random(0)
    alphabet = "ab \n\t.é日本🙂👩‍🚀ע́\u0301\u200d\ufffd🇫🇷क्ष\x00"
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 12)))
        tokens = tiny_lm.tokens(text)
        assert "".join(tokens) == text
        assert all(text[t.start : t.end] == t for t in tokens)


def test_the_prefix_is_no_part_of_the_text(tiny_lm, make_tiny):
    first, second = tiny_lm.tokens("Hi there")[:2]
    assert (first, first.label, first.id, first.start, first.end) == ("", "<|im_start|>", 1, 0, 0)
    assert (second, second.label, second.start) == ("Hi", "Hi", 0)
    assert make_tiny("llama", prefix=None).tokens("Hi there")[0] == "Hi"


def test_halves_of_a_character_are_labelled_by_their_bytes(tiny_lm):
    tokens = tiny_lm.tokens("🦖")[1:]
    assert len(tokens) > 1, "this character must be split for the test to mean anything"
    assert [str(t) for t in tokens] == [""] * (len(tokens) - 1) + ["🦖"], "the last one holds the character"
    shown = "".join(t.label for t in tokens)
    assert shown.replace("⟩⟨", " ") == "⟨F0 9F A6 96⟩"
    assert tiny_lm.tokens("é" + "a")[-1].label == "a"


def test_a_cut_character_at_the_end(tiny_lm):
    ids = tiny_lm.tokenize("ab🦖").ids[0].tolist()[:-1]
    tokens = tiny_lm.tokens(ids)
    assert len(tokens) == len(ids)
    assert "".join(tokens) == tiny_lm.tokenizer.decode(ids)


def test_token_ids_keep_their_specials(tiny_lm):
    ids = tiny_lm.tokenizer("<|endoftext|>a", add_special_tokens=False)["input_ids"]
    assert [str(t) for t in tiny_lm.tokens(ids)] == ["<|endoftext|>", "a"]


def test_tokens_take_one_prompt(tiny_lm):
    with pytest.raises(ValueError, match="takes one prompt, got a list of 2: call it for each"):
        tiny_lm.tokens(["a", "b"])


def test_a_token_is_a_str():
    token = Token("ab", 5, 3)
    assert token == "ab" and (token.id, token.start, token.end, token.label) == (5, 3, 5, "ab")


# ---- chats

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "You"},  # stands in many templates' own words too
    {"role": "assistant", "content": "user: Hello!"},
    {"role": "user", "content": " What is 2+2? "},
]


def text_of(lm, batch, role, row=0):
    return lm.tokenizer.decode(batch.ids[row][batch.role_mask(role)[row]])


def test_roles(tiny_lm):
    batch = tiny_lm.tokenize(CHAT)
    assert text_of(tiny_lm, batch, "system") == "Be brief."
    assert text_of(tiny_lm, batch, "user") == "You What is 2+2? "
    assert text_of(tiny_lm, batch, "assistant") == "user: Hello!"
    every = sum(batch.role_mask(r).int() for r in ("system", "user", "assistant", "template"))
    assert (every == 1).all(), "each token has one role"


def test_a_short_message_is_not_found_in_the_templates_own_words(tiny_lm):
    batch = tiny_lm.tokenize([{"role": "user", "content": "You"}])  # the default system message begins with "You"
    assert text_of(tiny_lm, batch, "template").count("You are a helpful AI assistant") == 1
    assert text_of(tiny_lm, batch, "user") == "You"


def test_ids_are_the_models_template(tiny_lm):
    tokenizer = tiny_lm.tokenizer
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert tiny_lm.tokenize(CHAT).ids[0].tolist() == expected
    assert tokenizer.decode(expected).endswith("<|im_start|>assistant\n")
    answered = tiny_lm.tokenize(CHAT[:3]).ids[0]
    assert tokenizer.decode(answered).endswith("user: Hello!<|im_end|>\n")


def test_chats_in_a_batch(tiny_lm):
    batch = tiny_lm.tokenize([CHAT, CHAT[:2]])
    assert batch.role_mask("user").shape == batch.ids.shape
    assert text_of(tiny_lm, batch, "user", row=1) == "You"
    assert not (batch.role_mask("template") & ~batch.mask).any()
    assert len(tiny_lm.generate([CHAT, CHAT[:2]], max_new_tokens=1)) == 2
    assert isinstance(tiny_lm.generate(CHAT, max_new_tokens=1), str)


def test_roles_of_the_bundled_model(lm):
    batch = lm.tokenize(CHAT)
    assert text_of(lm, batch, "user") == "You What is 2+2? "


def test_a_template_that_strips_its_messages(make_module, tokenizer):
    from copy import deepcopy

    stripping = deepcopy(tokenizer)
    stripping.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"
    lm = sl.LM(make_module("llama", len(tokenizer)), tokenizer=stripping)
    assert text_of(lm, lm.tokenize(CHAT), "user") == "YouWhat is 2+2?"
    stripping.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match=r"this chat template changes its messages.*pass plain text"):
        lm.tokenize(CHAT)
    stripping.chat_template = None
    with pytest.raises(ValueError, match="no chat template: pass plain text instead of messages"):
        lm.tokenize(CHAT)


def test_messages_without_text(tiny_lm):
    with pytest.raises(ValueError, match=r"a chat message is \{'role': str, 'content': str\}, got \{'role': 'user'\}"):
        tiny_lm.tokenize([{"role": "user"}])


def test_text_has_no_roles(tiny_lm):
    with pytest.raises(ValueError, match="these prompts carry no roles: pass chat messages"):
        tiny_lm.tokenize("plain").role_mask("user")


def test_padding_is_on_the_right(tiny_lm):
    batch = tiny_lm.tokenize(["a b c", "a"])
    assert batch.mask.tolist() == [[True] * 4, [True] * 2 + [False] * 2]
    assert torch.equal(batch.positions, torch.arange(4).expand(2, 4))
