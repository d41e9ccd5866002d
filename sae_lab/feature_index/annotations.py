"""Labels and notes that a person writes on a coder's features, and what others say they are: ``sl.notes(sae)``."""

import gzip
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from sae_lab import cache, files, noting
from sae_lab.arguments import as_annotated
from sae_lab.feature_index import neuronpedia
from sae_lab.noting import SAID, Said
from sae_lab.results import MOST_TITLE, counted
from sae_lab.saes.base import SparseCoder
from sae_lab.spelling import check_text
from sae_lab.types import check_feature

UNKNOWN_TIME = 1.0  # given to lines without a time, so that all others are newer


class Note(NamedTuple):
    """label: a few words, which a search finds. text: as long as you like."""

    label: str = ""
    text: str = ""


@as_annotated
def notes(coder: SparseCoder) -> "Notes":
    """What you and others say of a coder's features; the same for all its stores and indexes.

    They are kept in your data folder (``SAE_LAB_DATA`` names another) under ``sae.id``, and ``sl.cache.clear()`` leaves
    them there. ``sae.save`` writes a copy beside the coder, of which ``sl.load`` takes what is newer.
    """
    model = coder.meta.get("model")
    layer = coder.reads[0].layer if len(coder.reads) == 1 else None
    return Notes(noting.of(coder), coder.d_sae, model if isinstance(model, str) and model != "unknown" else "", layer)


T = TypeVar("T", bound=Sequence[Any])


@as_annotated
class OfFeatures(Generic[T]):
    """What a log holds of features: ``said[7]``, ``len(said)``, ``for feature in said``."""

    def __init__(self, log: noting.Log, d_sae: int):
        self._log, self.d_sae = log, d_sae

    def _of(self, fields: Mapping[str, Any]) -> T:
        raise NotImplementedError

    def __getitem__(self, feature: int) -> T:
        return self._of(self._log.fields(int(feature)))

    def _all(self) -> dict[int, T]:
        found = {i: self._of(fields) for i, fields in self._log.all().items() if i < self.d_sae}
        return {i: said for i, said in found.items() if any(said)}

    def __len__(self) -> int:
        return len(self._all())

    def __iter__(self) -> Iterator[int]:
        return iter(self._all())

    def _holding(self, text: str, of: Callable[[T], str]) -> list[int]:
        """Features of which this is said, case ignored."""
        needle = text.strip().lower()
        return [i for i, said in self._all().items() if needle in of(said).lower()]


@as_annotated
class Notes(OfFeatures[Note]):
    """Notes on features: ``notes[7].label``, ``notes.write(7, "months")``, ``for feature in notes``.

    Each change is on disk before ``write`` returns. Several panels, kernels and machines may write: the latest label
    counts, and the latest text. ``explanations``: what others say. ``file``: the file that holds all of it.
    """

    def __init__(self, log: noting.Log, d_sae: int, model: str = "", layer: int | None = None):
        super().__init__(log, d_sae)
        self.model, self.layer = model, layer
        self.explanations = Explanations(log, d_sae)

    @property
    def file(self) -> Path:
        return self._log.file

    @property
    def listeners(self) -> list[Any]:
        """Functions that are called after each change in this process, with the set of changed features."""
        return self._log.listeners

    def _of(self, fields: Mapping[str, Any]) -> Note:
        return Note(fields.get("label", ""), fields.get("text", ""))

    def __repr__(self) -> str:
        return f"Notes(on {counted(len(self), 'feature')}, in {self.file})"

    def write(
        self, feature: Any, label: str | None = None, text: str | None = None, *, seen: dict[str, str] | None = None,
        typed: dict[str, float] | None = None,
    ) -> Note:  # fmt: skip
        """Set a feature's label or text (None leaves it as it is; "" removes it). Returns the note as it then is.

        seen, typed: for screens, by field: what was shown while the user typed, and the time of typing in seconds. A
        value equal to what was shown is no change, and what another writer wrote after that time stays.
        """
        given = {"label": None if label is None else label.strip(), "text": text}
        fields = {name: value for name, value in given.items() if value is not None}
        for name, value in fields.items():
            check_text(value, name)
        if len(fields.get("label", "")) > MOST_TITLE:
            raise ValueError(
                f"a label has at most {MOST_TITLE:,} characters, got {len(fields['label']):,}: put more into its text"
            )
        feature = check_feature(feature, self.d_sae)
        self._log.write({feature: fields}, seen, typed)
        return self[feature]

    def heading(self, feature: int) -> str:
        """What stands beside a feature's top tokens: your label, else the first explanation that somebody else gave,
        else "". (A name that stands alone, ``index.names[7]``, has the tokens before explanations.)"""
        return self[feature].label or self.explanations.label(feature)

    def find(self, text: str) -> list[int]:
        """Features whose label or text contains this, case ignored."""
        return self._holding(text, "\n".join)

    def to_pandas(self):
        """One row a feature: feature, label, text."""
        import pandas as pd

        rows = [{"feature": i, **note._asdict()} for i, note in self._all().items()]
        return pd.DataFrame(rows, columns=["feature", "label", "text"])

    def save(
        self, path: str | Path, format: Literal["lines", "neuronpedia"] = "lines", model: str | None = None,
        layer: str | None = None,
    ) -> Path:  # fmt: skip
        """Write all of it into one file, gzipped where its name ends in ".gz". Returns the path.

        format: "lines", one JSON object a line with feature, what is said and when; or "neuronpedia", its format of
        explanations, in which a label and a text of yours are lines of their own. model, layer: as Neuronpedia names
        them ("gpt2-small", "8-res-jb"); None: the coder's model and the number of its layer.
        """
        changes = [change for change in self._log.changes() if change.feature < self.d_sae]
        if format == "neuronpedia":
            named = (model or self.model.split("/")[-1], layer or ("" if self.layer is None else str(self.layer)))
            lines = [line for change in changes for line in neuronpedia.lines(change.feature, change.fields, *named)]
        else:
            lines = [change.line for change in changes]
        path, data = Path(path), b"".join(lines)
        cache.make_folder(path.parent)
        with cache.atomic(path) as temporary:
            temporary.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
        return path

    def load(self, source: str | Path, model: str | None = None, layer: str | None = None) -> int:
        """Bring in what ``save`` wrote, or explanations that Neuronpedia exports. Returns the number of features.

        What is newer here stays. A line without a time counts only where nothing is written yet.

        Args:
            source: a .jsonl or .jsonl.gz file, a folder of them, the http(s) address of either, or a data set of the
                hub ("owner/name", "owner/name/folder"). An address of a folder is read as its batch-0.jsonl.gz and on.
            model, layer: whose labels, in Neuronpedia's names ("gpt2-small", "8-res-jb"), where the source holds
                several, or where it names this coder's model in another way.

        ValueError for labels of another model or layer, for features that this coder does not have, and for a source
        that cannot be read; then nothing is kept.
        """
        if (data := _own_lines(Path(source).expanduser())) is not None:
            changes, damaged = noting.parsed(data, UNKNOWN_TIME)
            if damaged or (wrong := [c for c in changes if c.feature >= self.d_sae]):
                line = damaged[0] if damaged else wrong[0].line
                raise ValueError(
                    f"{source} holds a line that is no note on a feature from 0 to {self.d_sae - 1}: {line[:120]!r}; "
                    "mend it or take it out"
                )
            self._log.add(b"".join(change.line for change in changes))
            return len({change.feature for change in changes})
        said = neuronpedia.read_labels(source, self.d_sae, self.model, self.layer, model, layer)
        own = {i: {s.source: s.text for s in several if s.source in Note._fields} for i, several in said.items()}
        self._log.add(b"".join(noting.line(i, fields, UNKNOWN_TIME) for i, fields in own.items() if fields))
        others = {i: [s for s in several if s.source not in Note._fields] for i, several in said.items()}
        self.explanations.write(others)
        return len(said)


def _own_lines(file: Path) -> bytes | None:
    """The lines of a file that ``Notes.save`` wrote; None where it holds something else."""
    if not file.is_file():
        return None
    with open(file, "rb") as f:
        opened = gzip.open if f.read(2) == b"\x1f\x8b" else open
    try:
        with opened(file, "rb") as f:
            first = f.readline(files.MOST_UNPACKED)
            if b'"feature"' not in first or b'"description"' in first:
                return None
            data = first + f.read(files.MOST_UNPACKED)
    except (OSError, EOFError, zlib.error):
        return None  # the reader of Neuronpedia's files then reports what is wrong
    if len(data) > files.MOST_UNPACKED:
        raise ValueError(f"{file} unpacks to more than {files.MOST_UNPACKED >> 20} MB: split it")
    return data


class Explanations(OfFeatures[list[Said]]):
    """What others say of features, the latest first: ``explanations[7]``. Your own labels stand in ``Notes`` alone."""

    def _of(self, fields: Mapping[str, Any]) -> list[Said]:
        several = [(name.removeprefix(SAID), said) for name, said in fields.items() if name.startswith(SAID)]
        return [Said(one["text"], source, one["scores"]) for source, said in reversed(several) for one in said]

    def label(self, feature: int) -> str:
        """The first of its texts, "" where nobody said anything."""
        return next((said.text for said in self[feature]), "")

    def write(self, said: Mapping[int, list[Said]]) -> None:
        """Put these first, in place of what the same source said of the same feature before. They are on disk before
        this returns."""
        self._log.write({check_feature(i, self.d_sae): _by_source(several) for i, several in said.items()})

    def find(self, text: str) -> list[int]:
        """Features of which somebody says this, case ignored."""
        return self._holding(text, lambda several: "\n".join(said.text for said in several))


def _by_source(said: list[Said]) -> dict[str, Any]:
    """Fields of the log, in reverse order: the log gives the latest first."""
    fields: dict[str, Any] = {}
    for one in said:
        scores = {name: round(float(value), 4) for name, value in one.scores.items() if math.isfinite(value)}  # no NaN
        fields.setdefault(SAID + one.source, []).append({"text": one.text, "scores": scores})
    return dict(reversed(fields.items()))
