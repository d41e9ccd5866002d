"""Chats as documents: load_text takes them, harvest keeps the tokens of a role, evaluation follows the mask."""

import json

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.lm.text import padded

SITE = sl.Site("resid_post", 1)


def chat(n):
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is {n} plus {n}?"},
        {"role": "assistant", "content": f"{n} plus {n} is {2 * n}. " * (1 + n % 3)},
    ]


CHATS = [chat(n) for n in range(40)]


def column(store, name):
    return store.rows(np.arange(len(store)), name)


def contexts(lm, text, length=64):
    return list(text.contexts(lm.tokenizer, lm.prefix_id, length))


def test_contexts_of_chats_are_what_the_model_is_given(tiny_lm):
    text = sl.load_text(CHATS)
    assert len(text) == 36 and len(text.held_out) == 4 and text[0] == CHATS[0]
    for context, document in zip(contexts(tiny_lm, text, 256), text, strict=True):
        batch = tiny_lm.tokenize(document)
        assert context.ids == batch.ids[0].tolist() and [context.roles] == batch.roles


def test_a_long_chat_is_cut_and_keeps_its_roles(tiny_lm):
    ids = tiny_lm.tokenize(CHATS[5]).ids[0].tolist()
    several = contexts(tiny_lm, sl.load_text([CHATS[5]]), 16)
    assert len(several) > 2 and all(len(c.ids) == len(c.roles) == len(c.documents) <= 16 for c in several)
    assert several[0].ids + [i for c in several[1:] for i in c.ids[1:]] == ids
    assert all(c.ids[0] == tiny_lm.prefix_id and c.roles[0] == "template" for c in several)
    roles = several[0].roles + [r for c in several[1:] for r in c.roles[1:]]
    assert [roles] == tiny_lm.tokenize(CHATS[5]).roles


def test_a_store_holds_the_tokens_of_a_role(tiny_lm, tmp_path):
    text = sl.load_text(CHATS)
    store = sl.harvest(tiny_lm, SITE, text, tokens=10**6, path=tmp_path / "answers", context=64, roles="assistant")
    expected = 0
    for context in contexts(tiny_lm, text):
        batch = padded([context])
        keep = batch.role_mask("assistant") & tiny_lm.mask().keep(batch.ids, batch.positions)
        expected += int(keep.sum())
    assert 0 < len(store) <= expected  # a norm above four medians leaves out a few
    assert len(store) > 0.9 * expected
    assert store.mask.roles == ("assistant",)
    assert "chat tokens of other roles than assistant" in str(store.mask)
    tokens = "".join(tiny_lm.vocabulary[i] for i in column(store, "token").tolist())
    assert "plus" in tokens and "What" not in tokens and "brief" not in tokens and "<|im_start|>" not in tokens
    every = sl.harvest(tiny_lm, SITE, text, tokens=10**6, path=tmp_path / "all", context=64)
    assert len(every) > 1.5 * len(store) and every.mask.roles == ()
    same = sl.harvest(tiny_lm, SITE, text, tokens=10**6, path=tmp_path / "answers", context=64, roles=("assistant",))
    assert len(same) == len(store)
    with pytest.raises(ValueError, match="another harvest"):
        sl.harvest(tiny_lm, SITE, text, tokens=10**6, path=tmp_path / "answers", context=64, roles="user")


def test_a_coder_of_answers_is_measured_on_answers(tiny_lm, tmp_path):
    text = sl.load_text(CHATS)
    store = sl.harvest(tiny_lm, SITE, text, tokens=500, path=tmp_path / "store", context=64, roles="assistant")
    sae = sl.TopK(tiny_lm.width(SITE), 64, k=4)
    sl.train(sae, store, sl.TrainConfig(steps=3, batch_size=64))
    assert sae.mask.roles == ("assistant",)
    sae.save(tmp_path / "sae")
    assert sl.load(tmp_path / "sae").mask == sae.mask
    result = sl.evals.reconstruction(sae, tiny_lm, text.held_out, tokens=200)
    assert "assistant" in str(result)
    index = sl.index_features(sae, tiny_lm, store)
    assert index.store is store or len(index.store) == len(store)
    codes = sl.harvest(tiny_lm, SITE, text, tokens=500, path=tmp_path / "codes", context=64, coder=sae)
    assert len(codes) == len(store)
    assert torch.equal(column(codes, "token"), column(store, "token"))


def test_chats_from_files_and_datasets(tiny_lm, tmp_path):
    from datasets import Dataset

    lines = "\n".join(json.dumps({"messages": c, "id": i}) for i, c in enumerate(CHATS))
    (tmp_path / "chats.jsonl").write_text(lines, encoding="utf-8")
    here = contexts(tiny_lm, sl.load_text(CHATS))
    for text in (
        sl.load_text(tmp_path / "chats.jsonl", column="messages"),
        sl.load_text(Dataset.from_dict({"messages": CHATS}), column="messages"),
    ):
        assert contexts(tiny_lm, text) == here
    with pytest.raises(ValueError, match="no column 'text': pass column= one of messages, id"):
        sl.load_text(tmp_path / "chats.jsonl")


def test_one_chat_is_one_document(tiny_lm, tmp_path):
    store = sl.harvest(tiny_lm, SITE, CHATS[5], tokens=10**6, path=tmp_path / "one", context=16)
    assert set(column(store, "document").tolist()) == {0}


def test_what_is_refused(tiny_lm, tmp_path, small_text):
    def harvest(text, **settings):
        return sl.harvest(tiny_lm, SITE, text, tokens=100, path=tmp_path / "no", **settings)

    with pytest.raises(ValueError, match=r"this text holds plain documents: pass chats"):
        harvest(small_text, roles="assistant")
    with pytest.raises(ValueError, match=r"is of roles=\('asistant',\): their roles are assistant, system,"):
        harvest(CHATS, roles="asistant")
    with pytest.raises(ValueError, match="pack=True joins plain documents, and this text holds chats"):
        harvest(CHATS, pack=True)
    with pytest.raises(ValueError, match="all texts or all chats, got both"):
        sl.load_text(["plain", CHATS[0]])
    with pytest.raises(ValueError, match=r"document 0 is dict"):
        sl.load_text([{"prompt": "x"}, "y"])
    with pytest.raises(ValueError, match=r"a chat message is \{'role': str, 'content': str\}"):
        harvest([[{"role": "user", "text": "x"}] * 50])
    coder = sl.TopK(tiny_lm.width(SITE), 16, k=2)
    coder.reads = (SITE,)
    with pytest.raises(ValueError, match="leave mask= and roles= out"):
        harvest(CHATS, roles="user", coder=coder)
    with pytest.raises(ValueError, match="roles must be a list of names"):
        sl.TokenMask.from_dict({"special_ids": [], "skip_first": True, "max_norm": {}, "roles": "user"})
