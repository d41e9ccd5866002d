"""A server's answers: read within limits of time and size, and checked before use.

A server may be broken, hostile, or no NDIF server at all. So each question runs on a thread that its caller leaves at
the deadline. A result is refused (``NoAnswer``) if it is too large, before or after unpacking, or if its names and
shapes are not those that the request asked for.
"""

import io
import json
import pickletools
import re
import threading
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import torch
import websocket

from sae_lab import files

TALK = 1 << 20  # most bytes of any answer but a result: the longest is a status with a traceback
TOLD = 4000  # characters of a server's message that an error repeats
SLACK = 10  # a result may have this many times the expected bytes: names, padding, a wider dtype
WAKE = 0.1  # seconds after which a waiting thread looks at the clock again
_LOADED = re.compile(r"torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage|collections OrderedDict")
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,200}")


class NoAnswer(Exception):
    """An answer that an NDIF server would not give. ``busy``: the server may answer later."""

    def __init__(self, text: str, busy: bool = False):
        super().__init__(text)
        self.busy = busy


class Failure(NamedTuple):
    """Why a question has no answer. unsent: no server has received it; again: asking again may help."""

    text: str
    unsent: bool = False
    again: bool = False


def within(
    left: Callable[[], float], call: Callable[[], Any], stop: Callable[[], Any], scrub: Callable[[str], str]
) -> tuple[Any, Failure | None]:
    """(the call's value, None), or (None, its failure). When no time is left, ``stop`` breaks the connection, which
    ends the call's thread.

    No exception leaves that thread, since exceptions of libraries hold the headers that were sent, with the key. The
    failure's text is scrubbed there too, since a debugger shows the variables of a frame.
    """
    found: list[Any] = []
    failed: list[Failure] = []
    ended = threading.Event()

    def work() -> None:
        try:
            found.append(call())
        except BaseException as err:  # a library may raise anything for a hostile answer
            failed.append(_failure(err, scrub))
        finally:
            ended.set()

    threading.Thread(target=work, name="sae_lab asks a server", daemon=True).start()
    try:
        while not ended.is_set() and (rest := left()) > 0:
            ended.wait(min(rest, WAKE))
    except BaseException:  # the user's interrupt
        stop()
        raise
    if not ended.is_set():
        stop()
        return None, Failure("no answer in time")
    return (found[0], None) if found else (None, failed[0])


def _failure(err: BaseException, scrub: Callable[[str], str]) -> Failure:
    text = scrub(f"{type(err).__name__}: {err}" if not isinstance(err, NoAnswer) else str(err))[:TOLD]
    if isinstance(err, NoAnswer):
        return Failure(text, err.busy, err.busy)
    unsent = isinstance(err, httpx.ConnectError | httpx.ConnectTimeout | ConnectionRefusedError)
    broken = isinstance(err, httpx.TransportError | OSError | websocket.WebSocketException)
    refused = isinstance(err, httpx.UnsupportedProtocol | websocket.WebSocketBadStatusException)
    return Failure(text, unsent, broken and not refused)


def read(answer: httpx.Response, most: int, left: Callable[[], float]) -> bytes:
    """The body of an answer with status 200 and at most ``most`` bytes. NoAnswer for any other."""
    if answer.status_code != 200:
        body = _body(answer, TALK, left)
        if answer.is_redirect:
            raise NoAnswer("it sends us to another address: name the server by that address")
        try:
            told = str(json.loads(body)["detail"])  # as FastAPI writes an error
        except (ValueError, KeyError, TypeError, RecursionError):
            told = body[:2000].decode(errors="replace")
        raise NoAnswer(f"it answered with status {answer.status_code}: {told}", answer.status_code in (502, 503, 504))
    return _body(answer, most, left)


def _body(answer: httpx.Response, most: int, left: Callable[[], float]) -> bytes:
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise NoAnswer("it compressed its answer, which was not asked for")  # and could unpack to any size
    body = bytearray()
    for part in answer.iter_raw():
        body += part
        if len(body) > most:
            raise NoAnswer(f"its answer has more than the {most:,} bytes that it may have")
        if left() <= 0:
            raise NoAnswer("its answer did not end in time")
    return bytes(body)


def status(text: str | bytes, id: str | None, scrub: Callable[[str], str]) -> Any:
    """One status of job ``id`` (None: of any job) as nnsight's ResponseModel, scrubbed. NoAnswer for anything else."""
    from nnsight.schema.response import ResponseModel, Status
    from pydantic import ValidationError

    try:
        found = ResponseModel.model_validate_json(text)
    except (ValidationError, ValueError):
        head = text[:2000].decode(errors="replace") if isinstance(text, bytes) else text[:2000]
        raise NoAnswer(f"this is no status of a job: {head or 'nothing'}") from None
    if not _is_name(found.id, scrub) or (id is not None and found.id != id):
        raise NoAnswer(f"it answers about job {found.id[:200]!r}, which this session did not send")
    if found.status != Status.COMPLETED:
        return ResponseModel(id=found.id, status=found.status, description=scrub(found.description))
    if not isinstance(found.data, str) or scrub(found.data) != found.data:
        raise NoAnswer("it does not say where the result is")
    return ResponseModel(id=found.id, status=found.status, data=found.data)


def _is_name(text: Any, scrub: Callable[[str], str]) -> bool:
    """Whether a text can be the name of a job or a session: such names get into addresses and messages."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None and scrub(text) == text


def session_id(message: Any, scrub: Callable[[str], str]) -> str:
    """The name of a session, from the first message on a websocket."""
    try:
        found = json.loads(message)["session_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not _is_name(found, scrub):
        raise NoAnswer("it did not begin with the name of a session")
    return str(found)


class Socket(websocket.WebSocket):
    """A websocket that receives at most ``most`` bytes in all, until the deadline."""

    def __init__(self, most: int, left: Callable[[], float]):
        super().__init__()
        self._most, self._left = most, left

    def _recv(self, bufsize: int) -> bytes:
        if self._left() <= 0:
            raise websocket.WebSocketTimeoutException("its message did not end in time")
        part = super()._recv(bufsize)
        self._most -= len(part)
        if self._most < 0:
            raise NoAnswer("it sends more than any job's messages need")
        return part


def loaded(content: bytes, most: int, packed: bool) -> Any:
    """A request's result: tensors and plain data, of at most ``most`` bytes. NoAnswer for anything else.

    ``weights_only=True`` runs no code, but allows calls that can fill the memory. So the pickle's instructions are read
    first: they may only make tensors of records, and no record may be compressed.
    """
    if packed:
        import zstandard

        if zstandard.frame_content_size(content) > most:
            raise NoAnswer(f"its result has more than the {most:,} bytes that it may have")
        content = zstandard.ZstdDecompressor().decompress(content, max_output_size=most)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = archive.infolist()
        if sum(r.file_size for r in records) > min(most, len(content)) or any(r.compress_type for r in records):
            raise NoAnswer("its result unpacks to more than was sent")
        names = [r.filename for r in records if r.filename.endswith("/data.pkl")]
        if len(names) != 1:
            raise NoAnswer("its result was not written by torch")
        plan = archive.read(names[0])
    for op, argument, _ in pickletools.genops(plan):
        if op.name == "GLOBAL" and not _LOADED.fullmatch(str(argument)):
            raise NoAnswer(f"its result holds {argument}: only tensors, numbers and text are read")
    found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    try:
        files.check_plain(found, most)
    except ValueError as err:
        raise NoAnswer(f"its result is not what was asked for: {err}") from None
    return found
