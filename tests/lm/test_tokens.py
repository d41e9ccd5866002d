"""Chats with role masks, and token strings that map back to characters."""

import json
import random
from copy import deepcopy
from importlib import import_module
from itertools import chain

import numpy as np
import pytest
import tiny_models
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import sae_lab as sl
from sae_lab.lm import tokens as tok
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


@pytest.fixture(scope="module")
def sentencepiece():
    """As Llama 2's tokenizer.json: a space is put before the text and taken off again, unknown characters are bytes."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False, limit_alphabet=80)
    trained.train_from_iterator([d[:4000] for d in sl.load_text()[:8]], trainer)
    written = json.loads(trained.to_str()) | {"pre_tokenizer": None}
    written["added_tokens"] = written["added_tokens"][:3]  # bytes are tokens like others
    made = Tokenizer.from_str(json.dumps(written))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def wordpiece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    made.train_from_iterator([d[:4000] for d in sl.load_text()[:8]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(scope="module")
def spm_lm(make_module, sentencepiece):
    return sl.LM(make_module("llama", len(sentencepiece)), tokenizer=sentencepiece)


def test_bytes_of_sentencepiece(spm_lm):
    for text in ("🦖 dino", "café “q” при", "日本 and"):
        tokens = spm_lm.tokens(text)
        assert "".join(tokens) == text
        shown = "".join(t.label for t in tokens).replace("⟩⟨", " ")
        for char in "🦖é“при日":
            hexes = " ".join(f"{byte:02X}" for byte in char.encode())
            assert (char not in text) or char in shown or hexes in shown
    assert [t.label for t in spm_lm.tokens("🦖")[1:]] == ["▁", "⟨F0⟩", "⟨9F⟩", "⟨A6⟩", "⟨96⟩"]


def test_a_tokenizer_without_a_prefix(make_module, wordpiece):
    lm = sl.LM(make_module("llama", len(wordpiece)), tokenizer=wordpiece)
    assert lm.prefix_id is None
    tokens = lm.tokens("the of [SEP] ☃ the")
    assert [t.label for t in tokens] == ["the", " of", " [SEP]", " [UNK]", " the"]
    assert lm.vocabulary[wordpiece.convert_tokens_to_ids("of")] == " of"


@pytest.mark.parametrize("text", ["ab🦖", "日本語 is 🙂"])
def test_no_label_is_the_replacement_character(tiny_lm, spm_lm, text):
    for lm in (tiny_lm, spm_lm):
        ids = lm.tokenize(text).ids[0].tolist()
        for start in range(len(ids)):
            for end in range(start + 1, len(ids) + 1):
                labels = [t.label for t in lm.token_strings(ids[start:end])]
                assert all(labels) and not any("\ufffd" in label for label in labels)


def test_what_follows_a_broken_character_is_itself(tiny_lm):
    half = tiny_lm.tokenize("🦖").ids[0].tolist()[1:-1]
    after = tiny_lm.tokenizer("a", add_special_tokens=False)["input_ids"]
    assert [t.label for t in tiny_lm.token_strings(half + after)][-1] == "a"
    assert [t.label for t in tiny_lm.tokens("x\ufffdb")][-1] == "b"


def test_the_bytes_of_tokens_are_looked_up_in_one_table(tiny_lm, monkeypatch):
    module = import_module("transformers.convert_slow_tokenizer")
    made, make = [], module.bytes_to_unicode
    monkeypatch.setattr(module, "bytes_to_unicode", lambda: made.append(1) or make())
    labels = [t.label for t in tiny_lm.tokens("🦖 and 🙂")]
    assert sum(label.startswith("⟨") for label in labels) > 1 >= len(made), "it takes longer than all else"


@pytest.mark.parametrize("made", [tok.vocabulary, tok.labels_alone])
def test_a_vocabulary_is_decoded_once(made, monkeypatch):
    """And anew for another size, and when the tokenizer has more tokens."""
    tokenizer, decoded = deepcopy(tiny_models.tokenizer()), []
    raw = tok._raw  # private: asked for each id that is decoded
    monkeypatch.setattr(tok, "_raw", lambda *args: (decoded.append(args[1]), raw(*args))[1])
    first = made(tokenizer, len(tokenizer))
    assert set(decoded) >= set(range(len(tokenizer)))
    decoded.clear()
    made(tokenizer, len(tokenizer)).clear()  # a list of the caller's own
    assert made(tokenizer, len(tokenizer)) == first and not decoded
    assert made(tokenizer, 9) == first[:9] and decoded
    tokenizer.add_tokens(["river"])
    assert made(tokenizer, len(tokenizer)) == [*first, "river"]


def test_the_vocabulary(spm_lm, tiny_lm, sentencepiece, make_module, tokenizer):
    assert not any("\ufffd" in text for text in tiny_lm.vocabulary)
    ids = {text: i for i, text in enumerate(spm_lm.vocabulary)}
    assert ids[" the"] == sentencepiece.convert_tokens_to_ids("▁the"), "the space is part of it"
    assert spm_lm.vocabulary[sentencepiece.convert_tokens_to_ids("<0xF0>")] == "⟨F0⟩"
    wide = sl.LM(make_module("llama", len(tokenizer) + 3), tokenizer=tokenizer)
    assert len(wide.vocabulary) == wide.vocab_size == len(tokenizer) + 3
    assert wide.vocabulary[-1] == f"⟨id {len(tokenizer) + 2}⟩" == wide.tokens([5, len(tokenizer) + 2])[1].label
    assert wide.vocabulary[:-3] == tiny_lm.vocabulary


def test_a_prefix_that_the_text_writes_out(tiny_lm, small_text):
    chat = tiny_lm.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    ids = tiny_lm.tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert ids[0] == tiny_lm.prefix_id
    assert tiny_lm.tokenize(chat).ids[0].tolist() == ids
    assert "".join(tiny_lm.tokens(chat)) == chat
    assert tiny_lm.tokens(chat)[0].label == "<|im_start|>"
    assert tiny_lm.tokenize(["a", chat]).ids[0, :2].tolist() == [1, ids_of(tiny_lm, "a")[0]]
    [first, *_] = sl.load_text([chat]).contexts(tiny_lm.tokenizer, tiny_lm.prefix_id, 128)
    assert first.ids == ids
    twice = "<|im_start|><|im_start|>a"
    assert tiny_lm.tokenize(twice).ids[0].tolist() == ids_of(tiny_lm, twice), "as written"


# The type checker of the test run objects to what is no prompt before this can; its own words count.
unchecked = getattr(tok.tokenize, "__wrapped__", tok.tokenize)


def ids_of(lm, text):
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_half_a_surrogate_pair_is_refused(tiny_lm):
    bad = json.loads('"half an emoji: \\ud83d, and on"')
    for prompt in (bad, ["fine", bad], [{"role": "user", "content": bad}]):
        with pytest.raises(ValueError, match=r"half a surrogate pair at character 15 .*repair it with text\.encode"):
            tiny_lm.tokenize(prompt)
    repaired = bad.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert "".join(tiny_lm.tokens(repaired)) == bad.replace("\ud83d", "\ufffd")
    assert "".join(tiny_lm.tokens(json.loads('"\\ud83d\\ude42"'))) == "🙂", "a whole pair is a character"


def test_ids_that_the_model_lacks(make_module, tokenizer, tmp_path):
    more = deepcopy(tokenizer)
    more.add_special_tokens({"pad_token": "[PAD]"})
    lm = sl.LM(make_module("llama", len(tokenizer)), tokenizer=more)
    words = r"token ids must lie in 0\.\.49151, got .*49152 \('\[PAD\]'\): the tokenizer is another model's"
    with pytest.raises(ValueError, match=words):
        lm.logits("hello [PAD] world")
    with pytest.raises(ValueError, match=words):
        sl.harvest(lm, "resid_post-0", ["hello [PAD] world " * 9] * 2, tokens=20, path=tmp_path, context=16)
    with pytest.raises(ValueError, match=r"got -1\.\.5"):
        lm.logits([5, -1])


def test_ids_in_other_containers(tiny_lm):
    want = tiny_lm.tokenize([5, 6]).ids
    for ids in (np.array([5, 6]), [np.int64(5), np.int64(6)], (5, 6), torch.tensor([5, 6])):
        assert torch.equal(tiny_lm.tokenize(ids).ids, want)
        assert tok.is_single(ids)
    assert tiny_lm.tokenize(np.array([[5, 6], [7, 8]])).ids.tolist() == [[5, 6], [7, 8]]
    for wrong in ([True, False], torch.tensor([True, False]), torch.tensor([0.5, 1.0]), [5, "a"], [5.0, 6.0]):
        with pytest.raises(ValueError, match=r"prompts must be a str, token ids|token ids must be an integer tensor"):
            unchecked(tiny_lm.tokenizer, wrong, 1)


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


def test_an_answer_behind_its_prompt(tiny_lm):
    lm, answer = tiny_lm, " Four. <b>"
    render = lm.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    strings = lm.tokens(CHAT, answer)
    assert [t.id for t in strings] == [t.id for t in lm.tokens(render + answer)] and "".join(strings) == render + answer
    ids, roles = tok.chat_tokens(lm.tokenizer, CHAT, answer)
    assert lm.tokenizer.decode([i for i, role in zip(ids, roles, strict=True) if role == "assistant"]).endswith(answer)
    assert roles[: len(lm.tokens(CHAT))] == lm.tokenize(CHAT).roles[0], "the prompt's are as without an answer"
    assert lm.tokens("2+2 is", " four") == lm.tokens("2+2 is four") and lm.tokens([5, 6]) == lm.tokens([5, 6], "")
    of_chat, of_text = lm.compare(CHAT, [], answer), lm.compare(render + answer, [])
    assert torch.allclose(of_chat.logprob, of_text.logprob, atol=1e-5, equal_nan=True)
    assert len(of_chat.tokens) == len(ids)
    for wrong in ([5, 6], [CHAT]):
        with pytest.raises(ValueError, match="an answer follows a text or a chat, got a list: leave answer out"):
            lm.compare(wrong, [], answer) if wrong == [5, 6] else lm.tokens(wrong, answer)


@pytest.fixture
def templated(make_module, tokenizer):
    """templated(template): a model with this chat template."""

    def make(template):
        other = deepcopy(tokenizer)
        other.chat_template = template
        return sl.LM(make_module("llama", len(tokenizer)), tokenizer=other)

    return make


def check_chat(lm, chat, **said):
    """The ids are the template's, and each role's tokens read so."""
    answer = chat[-1]["role"] != "assistant"
    text = lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)
    batch = lm.tokenize(chat)
    assert batch.ids[0].tolist() == ids_of(lm, text)
    assert {role: text_of(lm, batch, role) for role in said} == said


def test_a_template_that_strips_its_messages(templated):
    lm = templated("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}")
    assert text_of(lm, lm.tokenize(CHAT), "user") == "YouWhat is 2+2?"
    with pytest.raises(ValueError, match=r"this chat template changes its messages.*pass plain text"):
        templated("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}").tokenize(CHAT)
    with pytest.raises(ValueError, match="no chat template: pass plain text instead of messages"):
        templated(None).tokenize(CHAT)


# As Gemma 3: the system's words stand in the user's turn, as they are; the turn's own are stripped.
MIXED = """{% if messages[0]['role'] == 'system' %}{% set pre = messages[0]['content'] + '\n\n' %}
{%- set rest = messages[1:] %}{% else %}{% set pre = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{{ '<turn>' + m['role'] + '\n' + (pre if loop.first else '') }}{{ m['content'] | trim }}
{{- '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""


@pytest.mark.parametrize("system", ["Be kind.", "Be kind.\n", "\nBe kind."])
@pytest.mark.parametrize("user", ["Hi there", "Hi there\n", "\n Hi", "user"])
def test_a_template_that_strips_some_of_its_messages(templated, system, user):
    lm = templated(MIXED)
    chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    check_chat(lm, chat)
    batch = lm.tokenize(chat)  # a token may hold the ends of two messages
    assert text_of(lm, batch, "system").strip() == system.strip()
    assert text_of(lm, batch, "user").strip() == user.strip()


# As Qwen 3: thoughts of earlier turns are left out, those of the last are written anew.
THINKING = """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role != 'assistant' %}
{{- '<|im_start|>' + m.role + '\n' + m.content }}{% else %}{% set c = m.content %}{% set r = '' %}
{%- if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.index0 > ns.last %}
{{- '<|im_start|>assistant\n<think>\n' + r + '\n</think>\n\n' + c }}{% else %}
{{- '<|im_start|>assistant\n' + c }}{% endif %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"""


def test_a_template_that_writes_thoughts_anew(templated):
    lm = templated(THINKING)
    thought = {"role": "assistant", "content": "<think>\nadd\n4\n</think>\n\n4"}
    asked = {"role": "user", "content": "2+2?"}
    check_chat(lm, [asked, {"role": "assistant", "content": "4"}], user="2+2?", assistant="4")
    check_chat(lm, [asked, thought], user="2+2?", assistant=thought["content"])
    check_chat(lm, [asked, thought, asked], user="2+2?2+2?", assistant="4")
    silent = {"role": "assistant", "content": "<think>\nadd\n</think>"}
    check_chat(lm, [asked, silent, asked], user="2+2?2+2?", assistant="")


def test_a_template_that_moves_a_message(templated):
    lm = templated("{% for m in messages[1:] %}[{{ m['content'] }}]{% endfor %}{{ messages[0]['content'] }}")
    check_chat(lm, [{"role": "system", "content": "kind"}, {"role": "user", "content": "Hi"}], system="kind", user="Hi")


def test_a_chat_that_its_template_refuses(templated):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    words = "{{ '[' + m['role'] + ']' + m['content'] }}"
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    lm = templated(no_system + "{% for m in messages %}" + words + "{% endfor %}")
    with pytest.raises(ValueError, match=r"chat template refuses this chat \(System role not supported\): change its"):
        lm.generate(chat)
    check_chat(lm, chat[1:], user="Hi")
    with pytest.raises(ValueError, match=r"chat template refuses this chat .*change its roles"):
        templated("{{ messages[0].parts[0].text }}").tokenize(chat)
    some = templated("{% for m in messages %}{% if m['role'] == 'user' %}" + words + "{% endif %}{% endfor %}")
    with pytest.raises(ValueError, match="leaves out message 0, of role 'system': take a role it knows"):
        some.tokenize(chat)


def test_messages_without_text(tiny_lm):
    with pytest.raises(ValueError, match=r"a chat message is \{'role': str, 'content': str\}, got \{'role': 'user'\}"):
        tiny_lm.tokenize([{"role": "user"}])
    for mixed in ([CHAT[0], "and you?"], [CHAT, "plain"], ["plain", CHAT[0]], [CHAT[0], 5], [[5, 6], "plain"]):
        with pytest.raises(ValueError, match=r"a chat message is|prompts must be a str, token ids"):
            unchecked(tiny_lm.tokenizer, mixed, 1)
    assert torch.equal(tiny_lm.tokenize(CHAT[1]).ids, tiny_lm.tokenize([CHAT[1]]).ids), "one message is a chat"


def test_text_has_no_roles(tiny_lm):
    with pytest.raises(ValueError, match="these prompts carry no roles: pass chat messages"):
        tiny_lm.tokenize("plain").role_mask("user")


def test_padding_is_on_the_right(tiny_lm):
    batch = tiny_lm.tokenize(["a b c", "a"])
    assert batch.mask.tolist() == [[True] * 4, [True] * 2 + [False] * 2]
    assert torch.equal(batch.positions, torch.arange(4).expand(2, 4))

def _made(model, trainer, texts, normalizer=None, before=None):
    made = Tokenizer(model)
    if normalizer:
        made.normalizer = normalizer
    if before:
        made.pre_tokenizer = before
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.fixture(scope="module")
def kinds(lm):
    """Tokenizers of four kinds: byte-level BPE; Unigram behind Metaspace; BPE of the whole text at once, with bytes for
    what it does not know (as Llama's); WordPiece."""
    texts = [document[:20_000] for document in sl.load_text()[:30]]
    texts.append("海は広いな大きいな。月がのぼるし日が沈む。" * 20)
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    return {
        "byte-level BPE": lm.tokenizer,
        "Unigram": _made(
            models.Unigram(), trainers.UnigramTrainer(vocab_size=1500, unk_token="<unk>", special_tokens=["<unk>"]),
            texts, before=pre_tokenizers.Metaspace(),
        ),
        "BPE with bytes": _made(
            models.BPE(unk_token="<unk>", byte_fallback=True),
            trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", *fallback], max_token_length=12),
            [word for text in texts for word in text[:5000].split(" ")],
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        ),
        "WordPiece": _made(
            models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=1500, special_tokens=["<unk>"]),
            texts, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(),
        ),
    }  # fmt: skip


LONG_TEXTS = {
    "prose": lambda: "\n\n".join(sl.load_text()[:6])[:60_000],
    "no spaces": lambda: "".join(random.Random(0).choices("海は広いな大きいな月がのぼるし日が沈む。、鯨", k=12_000)),
    "one letter": lambda: "a word " * 300 + "a" * 7_003 + " and words after it" * 600,
    "white space": lambda: "words   here\n\n\n" * 900 + " " * 5_001 + "\t\n" * 900 + "and more. " * 900,
    "numbers": lambda: "x = " + "".join(random.Random(1).choices("0123456789", k=9_001)) + ", then 12345. " * 700,
    "signs": lambda: "".join(random.Random(2).choices("ab1 .,\n\t'é🙂<>|\u0301", k=20_000)),
}


@pytest.mark.parametrize("name", LONG_TEXTS)
@pytest.mark.parametrize("kind", ["byte-level BPE", "Unigram", "BPE with bytes", "WordPiece"])
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(kinds, kind, name, monkeypatch):
    monkeypatch.setattr(tok, "PIECE", 1500)
    monkeypatch.setattr(tok, "MARGIN", 200)
    tokenizer, text = kinds[kind], LONG_TEXTS[name]()
    pieces = list(tok.encode_parts(tokenizer, (text[i : i + 700] for i in range(0, len(text), 700))))
    assert list(chain(*pieces)) == tok.encode_texts(tokenizer, [text])[0]
    if name == "prose":  # the control: it was cut
        assert len(pieces) > 20
