"""Explanations as Neuronpedia exports and imports them: lines of JSON, often gzipped, one of one feature a line."""

import hashlib
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from io import BufferedIOBase, BytesIO
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sae_lab import files
from sae_lab.noting import SAID, Said

SUFFIXES = (".jsonl", ".jsonl.gz")
MOST_LABELS = 1_000_000  # of one source: each takes some 300 bytes of memory and its text
MOST_NAMES = 1_000  # of models and of layers, for messages
OURS = "sae_lab"  # begins the notes of explanations that this library wrote; behind it stands who said it
CREATOR = "clkht01d40000jv08hvalcvly"  # the user whom every Neuronpedia has, for uploads (its prisma/seed.ts)
TIMEOUT = 60  # seconds without a byte
_BACKSLASHES = re.compile(r"\\\\|\\u0000")
_SAME = {"gpt2": "gpt2small", "gpt2small": "gpt2small"}


class Record(NamedTuple):
    """One line. where: its file and line number, for messages."""

    feature: int
    text: str
    source: str
    model: str
    layer: str
    where: str


def read_labels(
    source: str | Path, d_sae: int, model_id: str, site_layer: int | None, model: str | None, layer: str | None
) -> dict[int, list[Said]]:
    """All explanations of a source by feature; see ``FeatureIndex.load_labels``. ValueError where one does not fit."""
    found: dict[int, dict[tuple[str, str], Said]] = {}
    names: dict[str, set[str]] = {"model": set(), "layer": set()}
    complaint, kept = "", 0
    for record in map(_record, files.read_lines(_files(source))):
        if record is None or not _wanted(record, names, {"model": model, "layer": layer}):
            continue
        if (kept := kept + 1) > MOST_LABELS:
            raise ValueError(
                f"{record.where}: more than {MOST_LABELS:,} explanations in all (sae_lab.feature_index.neuronpedia."
                "MOST_LABELS; set it higher if you trust the source)"
            )
        complaint = complaint or _complaint(record, d_sae, model_id, site_layer, model, layer)
        if not complaint:
            said = found.setdefault(record.feature, {})
            said.setdefault((record.text, record.source), Said(record.text, record.source))
    if not names["model"]:
        raise ValueError(f"{_shown(source)} holds no explanations: give a .jsonl or .jsonl.gz that Neuronpedia exports")
    for what, wanted in (("model", model), ("layer", layer)):
        there = sorted(names[what])
        if wanted is None and len(there) > 1:
            raise ValueError(f"the labels are of several {what}s ({', '.join(there[:6])}): choose, {what}={there[0]!r}")
        if wanted is not None and wanted not in there:
            raise ValueError(f"no labels of {what} {wanted!r} there: the source has {', '.join(map(repr, there[:6]))}")
    if complaint:
        raise ValueError(complaint)
    return {feature: list(said.values()) for feature, said in found.items()}


def _wanted(record: Record, names: dict[str, set[str]], wanted: dict[str, str | None]) -> bool:
    """Whether it is of the wanted model and layer. ``names`` collects the names in the source."""
    for what, name in wanted.items():
        value = getattr(record, what)
        if len(names[what]) < MOST_NAMES or value == name:
            names[what].add(value)
        if name is not None and value != name:
            return False
    return True


def _complaint(
    record: Record, d_sae: int, model_id: str, site_layer: int | None, model: str | None, layer: str | None
) -> str:
    """Why a label cannot belong to this index; "" if it may."""
    if model is None and model_id and record.model and not _same_model(record.model, model_id):
        return (
            f"{record.where}: labels of the model {record.model!r}, and the index is of {model_id!r}: load that "
            f"coder's labels, or say model={record.model!r} if it is the same model by another name"
        )
    number = re.match(r"\d{1,9}", record.layer)
    if layer is None and number and site_layer is not None and int(number[0]) != site_layer:
        return (
            f"{record.where}: labels of layer {record.layer!r}, and the index is of layer {site_layer}: load that "
            f"coder's labels, or say layer={record.layer!r}"
        )
    if not 0 <= record.feature < d_sae:
        return (
            f"{record.where}: a label of feature {record.feature}, and this coder has 0 to {d_sae - 1}: these are "
            "labels of another coder"
        )
    return ""


def _same_model(theirs: str, ours: str) -> bool:
    """Whether two names mean one model: the owner, case and punctuation do not count."""
    a, b = (re.sub(r"[^a-z0-9]", "", name.split("/")[-1].lower()) for name in (theirs, ours))
    return _SAME.get(a, a) == _SAME.get(b, b)


def _record(line: tuple[str, int, bytes]) -> Record | None:
    """A line's explanation; None for an empty line. ValueError for a line that is no explanation."""
    name, number, content = line
    if not content.strip():
        return None
    where = f"{name}, line {number}"
    try:
        fields: Any = files.parse_json(content)
        feature, text = fields["index"], fields["description"]
        if not isinstance(text, str) or isinstance(feature, bool) or not isinstance(feature, int | str):
            raise TypeError(f"index is {type(feature).__name__}, description is {type(text).__name__}")
        made = [str(fields[key])[:200] for key in ("explanationModelName", "typeName") if fields.get(key)]
        model, layer = (str(fields.get(key, ""))[:200] for key in ("modelId", "layer"))
        noted = str(fields.get("notes") or "")
        ours = noted.removeprefix(f"{OURS}: ")[:200] if noted.startswith(f"{OURS}: ") else ""
        source = sys.intern(ours or ", ".join(["neuronpedia", *made]))
        f"{text}{source}{model}{layer}".encode()  # half a surrogate pair is no text
        return Record(int(feature), text.strip(), source, sys.intern(model), sys.intern(layer), where)
    except (ValueError, LookupError, TypeError, AttributeError) as err:
        raise ValueError(f"{where} is no explanation of Neuronpedia (index and description): {err!r:.300}") from err


def lines(feature: int, fields: dict[str, Any], model: str, layer: str) -> Iterator[bytes]:
    """What is said of a feature (see ``sae_lab.noting``) as lines of this format, which the importer takes: its names
    of explainers must be there already, so that others than its own go into ``notes``."""
    for field, value in fields.items():
        source = field.removeprefix(SAID)
        made = source.split(", ")[1:] if source.startswith("neuronpedia, ") else []
        names = made if len(made) == 2 else [None, None]
        for text in [value] if isinstance(value, str) else [one["text"] for one in value]:
            record = {"id": identity("explanation", model, layer, feature, source, text), "modelId": model}
            record |= {"layer": layer, "index": str(feature), "description": text, "authorId": CREATOR}
            record |= {"explanationModelName": names[0], "typeName": names[1]}
            record |= {"notes": None if len(made) == 2 else f"{OURS}: {source}"}
            if text:
                yield as_line(record)


def identity(*parts: object) -> str:
    """The key of a row in its tables, the same for the same content: what is imported twice is there once."""
    return "c" + hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:24]


def as_line(record: dict[str, Any]) -> bytes:
    """One line. The importer replaces the letters \\u0000 anywhere, also in a text that has them behind a backslash: a
    character 0 becomes a space here already, and each backslash is written by its number."""
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    safe = _BACKSLASHES.sub(lambda found: " " if found[0] == r"\u0000" else r"\u005c", text)
    return safe.encode("utf-8", "replace") + b"\n"


def _files(source: str | Path) -> Iterator[tuple[str, BufferedIOBase]]:
    """(name, stream) of every file of a source. ValueError for a source that is none."""
    address = str(source)
    if re.match(r"https?://", address):
        yield from _fetched(address)
        return
    path = Path(source).expanduser()
    if path.is_file():
        with open(path, "rb") as f:
            yield path.name, f
    elif path.is_dir():
        yield from _folder(path)
    elif not address.endswith(SUFFIXES) and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", address):
        yield from _from_hub(address)
    else:
        raise ValueError(
            f"no labels at {source}: give a .jsonl or .jsonl.gz file, a folder of them, an http(s) address, or a data "
            "set of the hub (owner/name)"
        )


def _folder(path: Path) -> Iterator[tuple[str, BufferedIOBase]]:
    found = [file for file in sorted(path.rglob("*.jsonl*")) if file.name.endswith(SUFFIXES) and file.is_file()]
    if not found:
        raise ValueError(f"{path} holds no {' or '.join(SUFFIXES)} files: give the folder of Neuronpedia's batches")
    for file in found:
        with open(file, "rb") as f:
            yield file.name, f


def _from_hub(source: str) -> Iterator[tuple[str, BufferedIOBase]]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, name, *below = source.strip("/").split("/")
    within = "/".join([*below, ""]) if below else ""
    patterns = [f"{within}*{suffix}" for suffix in SUFFIXES]
    try:
        folder = snapshot_download(f"{owner}/{name}", repo_type="dataset", allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as err:
        raise ValueError(
            f"there is no file or folder {source}, and the hub gives no data set of that name ({type(err).__name__}): "
            "check the name and the network"
        ) from err
    yield from _folder(Path(folder) / within if (Path(folder) / within).is_dir() else Path(folder))


def _fetched(address: str) -> Iterator[tuple[str, BufferedIOBase]]:
    """One file, or batch-0.jsonl.gz, batch-1.jsonl.gz, ... below an address, until there is no more."""
    if urlsplit(address).path.endswith(SUFFIXES):
        yield _name(address), BytesIO(_get(address))
        return
    for number in count():
        batch = f"{address.rstrip('/')}/batch-{number}.jsonl.gz"
        try:
            yield _name(batch), BytesIO(_get(batch))
        except FileNotFoundError as err:
            if number == 0:
                raise ValueError(f"there is no {_shown(batch)}: give the address of a .jsonl.gz file or of a folder "
                                 "of batch-0.jsonl.gz and on") from err  # fmt: skip
            return


def _get(address: str) -> bytes:
    """FileNotFoundError where the server has no such file, ValueError where it cannot be read."""
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as reply:
            data = reply.read(files.MOST_LINES + 1)
    except urllib.error.HTTPError as err:
        if err.code in (403, 404):  # object stores say 403 of what is not there
            raise FileNotFoundError(_shown(address)) from None
        raise ValueError(f"{_shown(address)} cannot be read: HTTP {err.code} {err.reason}") from None
    except OSError as err:
        raise ValueError(f"{_shown(address)} cannot be read ({err}): check the address and the network") from None
    if len(data) > files.MOST_LINES:
        raise ValueError(f"{_shown(address)} has more bytes than {files.limited('MOST_LINES')}: fetch it and split it")
    return data


def _name(address: str) -> str:
    return urlsplit(address).path.rsplit("/", 1)[-1]


def _shown(source: str | Path) -> str:
    """An address without what may be secret in it."""
    parts = urlsplit(str(source))
    return f"{parts.scheme}://{parts.hostname}{parts.path}" if parts.scheme in ("http", "https") else str(source)
