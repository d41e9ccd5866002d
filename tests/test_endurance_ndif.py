"""The fast part of the hostile server's tries, and what must stay small: long texts, logits, many edits."""

import itertools
import time

import pytest
import torch
from batteries import ndif

import sae_lab as sl
from sae_lab.lm import model, tokens
from sae_lab.lm import text as text_module
from sae_lab.widgets.session import EditStack


def test_whatever_a_server_answers_is_our_error_in_time_and_without_the_key():
    counts = ndif.run(full=False)
    bad = counts.pop("bad")
    assert counts.pop("tries") == 30
    assert not any(counts.values()), "\n".join([str(counts), *bad])


# ---- long texts, large results, many edits


def test_a_large_file_is_read_in_parts_and_its_first_contexts_come_at_once(tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "LONG", 1000)
    monkeypatch.setattr(text_module, "PART", 700)
    path = tmp_path / "long.txt"
    words = "The fox ran over the hill.\r\n" * 2000
    path.write_bytes(b"\xef\xbb\xbf" + words.encode())
    text, same = sl.load_text(path), sl.load_text([words.replace("\r\n", "\n")])
    assert isinstance(text._data[0]["text"], text_module.File)
    assert text[0] == same[0] and text.fingerprint == same.fingerprint
    sizes, read = [], text_module.File.parts

    def counted(file):
        for part in read(file):
            sizes.append(len(part))
            yield part

    monkeypatch.setattr(text_module.File, "parts", counted)
    monkeypatch.setattr(tokens, "PIECE", 3000)
    contexts = text.contexts(tiny_lm.tokenizer, tiny_lm.prefix_id, 32)
    assert next(contexts) == next(same.contexts(tiny_lm.tokenizer, tiny_lm.prefix_id, 32))
    assert sum(sizes) < 10_000
    path.write_text("another")
    with pytest.raises(ValueError, match="has changed since it was loaded: call load_text again"):
        text[0]


def test_few_long_documents_are_not_waited_for(tiny_lm, monkeypatch):
    monkeypatch.setattr(text_module, "WINDOW_TOKENS", 500)
    contexts = (text_module.Context([1] * 50, [0] * 50) for _ in itertools.count())
    assert len(next(text_module._windows(contexts))) == 10


def test_losses_and_logits_in_parts_are_those_of_the_whole(tiny_lm, monkeypatch):
    """To rounding: a product of more rows may be summed in another order."""
    prompts = ["The fox ran over the hill", "A cat", "The dog sat on the mill and slept", "a b c"]
    coder = sl.TopK(tiny_lm.width("layers.1"), 64, k=4)
    coder.reads = coder.writes = (sl.Site("resid_post", 1),)
    coder.calibrate([torch.randn(500, coder.d_in, generator=torch.Generator().manual_seed(0))])
    edits = [sl.Steer(coder.eval(), 3, rows=[2, 3])]
    whole = [tiny_lm.logits(prompts, edits), tiny_lm.loss(prompts, edits, per_token=True), tiny_lm.loss(prompts, edits)]
    asked, run = [], sl.LM.run
    monkeypatch.setattr(model, "LOGITS_BYTES", 1)
    monkeypatch.setattr(sl.LM, "run", lambda lm, batch, **k: asked.append(len(batch.ids)) or run(lm, batch, **k))
    parts = [tiny_lm.logits(prompts, edits), tiny_lm.loss(prompts, edits, per_token=True), tiny_lm.loss(prompts, edits)]
    assert asked == [1] * 12
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert not torch.equal(whole[1].nan_to_num(), tiny_lm.loss(prompts, per_token=True).nan_to_num())  # the edit acts


def test_a_thousand_edits(tiny_lm):
    """A few seconds of this process's time at most, on a stack and in a list; what is shown is right at once."""
    coder = sl.TopK(tiny_lm.width("layers.1"), 64, k=4)
    coder.reads = coder.writes = (sl.Site("resid_post", 1),)
    coder.calibrate([torch.randn(500, coder.d_in)])
    coder.eval()
    tiny_lm.logits("A cat", [sl.Steer(coder, 0)])
    began = time.process_time()
    edits, stack = [sl.Steer(coder, i % 64) for i in range(1000)], EditStack()
    for edit in edits:
        stack.add(edit)
    assert time.process_time() - began < 5  # under one on a free machine
    assert [row["key"] for row in stack.rows] == list(range(1000)) and len(stack) == 1000
    began = time.process_time()
    tiny_lm.logits("A cat", stack)
    assert time.process_time() - began < 8  # a third of a second where no test looks at every function's arguments
