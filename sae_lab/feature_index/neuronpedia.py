"""Explanations that Neuronpedia exports: lines of JSON, often gzipped, one explanation of one feature a line."""

import json
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sae_lab.feature_index.notes import Said
from sae_lab.noting import SAID

SUFFIXES = (".jsonl", ".jsonl.gz")
MOST_BYTES = 1 << 30  # of one file, unpacked
OURS = "sae_lab"  # the type of what this library wrote in their format: whoever said it stands before
TIMEOUT = 60  # seconds without a byte
_SAME = {"gpt2": "gpt2small", "gpt2small": "gpt2small"}


class Record(NamedTuple):
    """One line. where: its file and number, for complaints."""

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
    records = [record for name, data in _files(source) for record in _records(name, data)]
    if not records:
        raise ValueError(f"{_shown(source)} holds no explanations: give a .jsonl or .jsonl.gz that Neuronpedia exports")
    records = _of(records, "model", model)
    records = _of(records, "layer", layer)
    if model is None and model_id and any(not _same_model(r.model, model_id) for r in records if r.model):
        wrong = next(r for r in records if r.model and not _same_model(r.model, model_id))
        raise ValueError(
            f"{wrong.where}: labels of the model {wrong.model!r}, and the index is of {model_id!r}: load that coder's "
            f"labels, or say model={wrong.model!r} if it is the same model by another name"
        )
    for record in records:
        number = re.match(r"\d+", record.layer)
        if layer is None and number and site_layer is not None and int(number[0]) != site_layer:
            raise ValueError(
                f"{record.where}: labels of layer {record.layer!r}, and the index is of layer {site_layer}: load that "
                f"coder's labels, or say layer={record.layer!r}"
            )
        if not 0 <= record.feature < d_sae:
            raise ValueError(
                f"{record.where}: a label of feature {record.feature}, and this coder has 0 to {d_sae - 1}: these are "
                "labels of another coder"
            )
    found: dict[int, list[Said]] = {}
    for record in records:
        said = Said(record.text, record.source)
        if said not in found.setdefault(record.feature, []):
            found[record.feature].append(said)
    return found


def _of(records: list[Record], what: str, wanted: str | None) -> list[Record]:
    """The records of one model or layer. ValueError where there are several and none is asked for, or not this one."""
    names = sorted({getattr(record, what) for record in records})
    if wanted is None:
        if len(names) > 1:
            raise ValueError(
                f"the labels are of several {what}s ({', '.join(names[:6])}): say which, {what}={names[0]!r}"
            )
        return records
    if wanted not in names:
        raise ValueError(f"no labels of {what} {wanted!r} there: the source has {', '.join(map(repr, names[:6]))}")
    return [record for record in records if getattr(record, what) == wanted]


def _same_model(theirs: str, ours: str) -> bool:
    """Whether two names mean one model: the owner, case and punctuation do not count."""
    a, b = (re.sub(r"[^a-z0-9]", "", name.split("/")[-1].lower()) for name in (theirs, ours))
    return _SAME.get(a, a) == _SAME.get(b, b)


# ---------------------------------------------------------------------------------------------- lines


def _records(name: str, data: bytes) -> Iterator[Record]:
    for number, line in enumerate(_unpacked(name, data).split(b"\n"), 1):
        if line.strip():
            yield _record(line, f"{name}, line {number}")


def _unpacked(name: str, data: bytes) -> bytes:
    if not data.startswith(b"\x1f\x8b"):
        return data
    unpacker = zlib.decompressobj(wbits=31)
    try:
        text = unpacker.decompress(data, MOST_BYTES)
    except zlib.error as err:
        raise ValueError(f"{name} is no whole gzip file ({err}): fetch it again") from err
    if unpacker.unconsumed_tail:
        raise ValueError(f"{name} unpacks to more than {MOST_BYTES >> 20} MB: split it")
    if not unpacker.eof:
        raise ValueError(f"{name} is no whole gzip file (it ends early): fetch it again")
    if unpacker.unused_data:  # several gzip files in one
        return text + _unpacked(name, unpacker.unused_data)
    return text


def _record(line: bytes, where: str) -> Record:
    try:
        fields: Any = json.loads(line)
        feature, text = int(fields["index"]), fields["description"]
        if not isinstance(text, str):
            raise TypeError(f"description is {type(text).__name__}")
    except (ValueError, LookupError, TypeError) as err:
        raise ValueError(f"{where} is no explanation of Neuronpedia (index and description): {err!r}") from err
    made = [str(fields[key]) for key in ("explanationModelName", "typeName") if fields.get(key)]
    source = made[0] if made[1:] == [OURS] else ", ".join(["neuronpedia", *made])
    return Record(feature, text.strip(), source, str(fields.get("modelId", "")), str(fields.get("layer", "")), where)


def lines(feature: int, fields: dict[str, Any], model: str, layer: str) -> Iterator[bytes]:
    """What is said of a feature (see ``sae_lab.noting``) as lines of this format."""
    for field, value in fields.items():
        source = field.removeprefix(SAID)
        made = source.split(", ")[1:] if source.startswith("neuronpedia, ") else []
        names = made if len(made) == 2 else [source, OURS]
        for text in [value] if isinstance(value, str) else [one["text"] for one in value]:
            record = {"modelId": model, "layer": layer, "index": str(feature), "description": text}
            record |= {"explanationModelName": names[0], "typeName": names[1]}
            if text:
                yield json.dumps(record, ensure_ascii=False).encode() + b"\n"


# ---------------------------------------------------------------------------------------------- files


def _files(source: str | Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every file of a source. ValueError for a source that is none."""
    address = str(source)
    if re.match(r"https?://", address):
        yield from _fetched(address)
        return
    path = Path(source).expanduser()
    if path.is_file():
        yield path.name, path.read_bytes()
    elif path.is_dir():
        yield from _folder(path)
    elif not address.endswith(SUFFIXES) and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", address):
        yield from _from_hub(address)
    else:
        raise ValueError(
            f"no labels at {source}: give a .jsonl or .jsonl.gz file, a folder of them, an http(s) address, or a data "
            "set of the hub (owner/name)"
        )


def _folder(path: Path) -> Iterator[tuple[str, bytes]]:
    files = [file for file in sorted(path.rglob("*.jsonl*")) if file.name.endswith(SUFFIXES)]
    if not files:
        raise ValueError(f"{path} holds no {' or '.join(SUFFIXES)} files: give the folder of Neuronpedia's batches")
    for file in files:
        yield file.name, file.read_bytes()


def _from_hub(source: str) -> Iterator[tuple[str, bytes]]:
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


def _fetched(address: str) -> Iterator[tuple[str, bytes]]:
    """One file, or batch-0.jsonl.gz, batch-1.jsonl.gz, ... below an address, until there is no more."""
    if urlsplit(address).path.endswith(SUFFIXES):
        yield _name(address), _get(address)
        return
    for number in count():
        batch = f"{address.rstrip('/')}/batch-{number}.jsonl.gz"
        try:
            yield _name(batch), _get(batch)
        except FileNotFoundError as err:
            if number == 0:
                raise ValueError(f"there is no {_shown(batch)}: give the address of a .jsonl.gz file or of a folder "
                                 "of batch-0.jsonl.gz and on") from err  # fmt: skip
            return


def _get(address: str) -> bytes:
    """FileNotFoundError where the server has no such file, ValueError where it cannot be read."""
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as reply:
            data = reply.read(MOST_BYTES + 1)
    except urllib.error.HTTPError as err:
        if err.code in (403, 404):  # object stores say 403 of what is not there
            raise FileNotFoundError(_shown(address)) from None
        raise ValueError(f"{_shown(address)} cannot be read: HTTP {err.code} {err.reason}") from None
    except OSError as err:
        raise ValueError(f"{_shown(address)} cannot be read ({err}): check the address and the network") from None
    if len(data) > MOST_BYTES:
        raise ValueError(f"{_shown(address)} is larger than {MOST_BYTES >> 20} MB: fetch it and split it")
    return data


def _name(address: str) -> str:
    return urlsplit(address).path.rsplit("/", 1)[-1]


def _shown(source: str | Path) -> str:
    """An address without what may be secret in it."""
    parts = urlsplit(str(source))
    return f"{parts.scheme}://{parts.hostname}{parts.path}" if parts.scheme in ("http", "https") else str(source)
