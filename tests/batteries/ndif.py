"""A hostile NDIF server on loopback: whatever it answers, a call ends as NDIFError, in time, without the key.

A try is a moment of the protocol and a fault, drawn from all pairs that make sense: the server is honest up to that
moment. It knows the key (it is sent it) and puts it into whatever it says.
"""

import base64
import hashlib
import io
import itertools
import json
import pickle
import random
import socket
import struct
import tempfile
import threading
import time
import traceback
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import zstandard

import sae_lab as sl
from sae_lab.lm.remote import NDIFError, Server

TITLE = "hostile NDIF server"
KEY = "sk-SECRET-0123456789"
JOB = "5f0c1c4e-7c0f-4c39-8f2e-8d2c0d5c9a11"
DEADLINE, GRACE = 2.0, 1.0
WORKERS = 3  # more would wait for each other


# ---------------------------------------------------------------------------------- faults of any answer over HTTP


def _answer(body: bytes, status: str = "200 OK", **headers: Any) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    if "Transfer_Encoding" not in headers and "Content_Length" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def _drip(out: socket.socket, data: bytes, pause: float = 0.05) -> None:
    for byte in itertools.chain(data, itertools.repeat(ord(" "))):
        out.sendall(bytes([byte]))
        time.sleep(pause)


def _flood(out: socket.socket, head: bytes, part: bytes) -> None:
    out.sendall(head)
    while True:
        out.sendall(part)


def _silence(out: socket.socket) -> None:
    while out.recv(1 << 16):
        pass


HTTP: dict[str, Callable[[socket.socket, str], Any]] = {
    "says nothing": lambda out, other: _silence(out),
    "hangs up": lambda out, other: None,
    "drips its headers": lambda out, other: _drip(out, _answer(b"{}", X_Key=KEY * 50)),
    "drips its body": lambda out, other: (out.sendall(_answer(b"", Content_Length=10**6)), _drip(out, b"{")),
    "endless headers": lambda out, other: _flood(out, b"HTTP/1.1 200 OK\r\n", f"X-Key: {KEY}\r\n".encode() * 500),
    "endless body": lambda out, other: _flood(out, b"HTTP/1.1 200 OK\r\n\r\n", KEY.encode() * 5000),
    "says a huge length": lambda out, other: _flood(out, _answer(b"", Content_Length=10**14), b" " * 60000),
    "no HTTP": lambda out, other: out.sendall(f"220 {KEY} ESMTP\r\n".encode()),
    "an HTML page": lambda out, other: out.sendall(_answer(f"<html>sign in, {KEY}\x1b[2J</html>".encode())),
    "cut JSON": lambda out, other: out.sendall(_answer(f'{{"id": "{KEY}", "sta'.encode())),
    "deep JSON": lambda out, other: out.sendall(_answer(b"[" * 200_000)),
    "no content": lambda out, other: out.sendall(_answer(b"", "204 No Content")),
    "too long a length": lambda out, other: out.sendall(_answer(b"{}", Content_Length=5000)),
    "two lengths": lambda out, other: out.sendall(_answer(b"{}", Content_Length="2\r\nContent-Length: 3")),
    "bad chunks": lambda out, other: out.sendall(_answer(b"zz\r\n{}\r\n", Transfer_Encoding="chunked")),
    "packed without end": lambda out, other: out.sendall(_answer(_packed_zeros(), Content_Encoding="zstd")),
    "another address": lambda out, other: out.sendall(_answer(b"", "307 Temporary Redirect", Location=other)),
    "an error that names the key": lambda out, other: out.sendall(
        _answer(json.dumps({"detail": f"no {KEY}"}).encode(), "500 Internal Server Error")
    ),
    "busy for ever": lambda out, other: out.sendall(_answer(KEY.encode(), "503 Service Unavailable")),
    "forbidden": lambda out, other: out.sendall(_answer(f"<p>{KEY}</p>".encode(), "403 Forbidden")),
}


def _packed_zeros(most: int = 1 << 32) -> bytes:
    """A zstd frame of so many zeros: blocks of one byte that is repeated, 128 KiB in four."""
    block, last = ((1 << 17 << 3 | 2 | end).to_bytes(3, "little") + b"\0" for end in (0, 1))
    return b"\x28\xb5\x2f\xfd\xc0\x70" + most.to_bytes(8, "little") + block * ((most >> 17) - 1) + last


# ------------------------------------------------------------------------------------------ faults of what is said

STATUS: dict[str, Any] = {
    "another's job": {"id": "somebody-elses", "status": "COMPLETED", "data": "{result}"},
    "a job named by the key": {"id": KEY, "status": "RUNNING"},
    "a job with a path for a name": {"id": "../../admin?", "status": "RUNNING"},
    "a job that is a number": {"id": 7, "status": "RUNNING"},
    "a status that is none": {"id": JOB, "status": "DONE"},
    "a list": [JOB],
    "not a number": float("nan"),
    "done, and nowhere": {"id": JOB, "status": "COMPLETED"},
    "done, in a list": {"id": JOB, "status": "COMPLETED", "data": [1, 2]},
    "done, in a file": {"id": JOB, "status": "COMPLETED", "data": "file:///etc/passwd"},
    "done, at no address": {"id": JOB, "status": "COMPLETED", "data": f"http://[{KEY}/\x00"},
    "done, where nobody is": {"id": JOB, "status": "COMPLETED", "data": "http://127.0.0.1:9/result"},
    "an error with the key": {"id": JOB, "status": "ERROR", "description": f"Traceback\n a\n b\nBad: {KEY}\x1b[31m"},
    "an error without words": {"id": JOB, "status": "ERROR"},
    "never done": {"id": JOB, "status": "RUNNING", "description": KEY},
}


class _Runs:
    """A pickle that leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def _calls(function: Any, *arguments: Any) -> Any:
    class Call:
        def __reduce__(self) -> Any:
            return function, arguments

    return Call()


def _tensor(numbers: torch.Tensor, shape: tuple[Any, ...]) -> Any:
    storage = torch.storage.TypedStorage(
        wrap_storage=numbers.untyped_storage(), dtype=numbers.dtype, _internal=True
    )
    return _calls(torch._utils._rebuild_tensor_v2, storage, 0, shape, (1, 1), False, OrderedDict())


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _repacked(data: bytes) -> bytes:
    """The same archive with a record that is small here and large unpacked."""
    source, out = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record) + bytes(10**8) * record.filename.endswith("data/0"))
    return out.getvalue()


def _results(good: torch.Tensor, mark: Path) -> dict[str, Callable[[], bytes]]:
    """What comes instead of the result, before it is packed."""

    def of(value: Any) -> bytes:
        return _saved({"found": {"": value}})

    wrong: dict[str, Any] = {
        "other names": {"found": {"resid_post": good}}, "no names": [good], "nothing": {}, "text": KEY,
        "a name more": {"found": {"": good, "x": 1}},
    }  # fmt: skip
    tensors = {
        "too few tokens": lambda: good[:-1], "too wide": lambda: good.repeat(1, 2), "another axis": lambda: good[None],
        "whole numbers": lambda: good.long(), "one number everywhere": lambda: torch.zeros(1).expand(10**9, 10**4),
        "a sparse one": lambda: torch.sparse_coo_tensor(size=tuple(good.shape)), "words": lambda: [KEY] * 3,
        "a shape of NaN": lambda: _tensor(good, (float("nan"), 1.0)),
        "a larger shape than its numbers": lambda: _tensor(torch.ones(4), (10**7, 10**5)),
        "a program": lambda: _Runs(mark), "bytes without end": lambda: _calls(bytearray, 10**12),
        "a tensor of no numbers": lambda: torch.empty(10**6, 10**6, device="meta"),
    }  # fmt: skip
    made: dict[str, Callable[[], bytes]] = {name: partial(_saved, value) for name, value in wrong.items()}
    made |= {name: (lambda make=make: of(make())) for name, make in tensors.items()}
    return made | {
        "a plain pickle": lambda: pickle.dumps({"found": {"": _Runs(mark)}}),
        "an old file": lambda: _old_file(good),
        "an archive in an archive": lambda: _repacked(of(good)),
        "noise": lambda: random.Random(0).randbytes(5000),
        "empty": lambda: b"",
    }


def _old_file(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"found": {"": value}}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


# -------------------------------------------------------------------------------------------- faults of a websocket


def _frame(data: bytes, kind: int = 1, end: bool = True, length: int | None = None) -> bytes:
    n = len(data) if length is None else length
    return struct.pack("!BBQ", (0x80 if end else 0) | kind, 127, n) + data


def _line(text: str) -> bytes:
    return _frame(json.dumps({"id": JOB, "status": "LOG", "description": text}).encode())


SOCKET: dict[str, Callable[[socket.socket], Any]] = {
    "says nothing": _silence,
    "hangs up": lambda out: None,
    "noise": lambda out: out.sendall(random.Random(1).randbytes(4000)),
    "drips a message": lambda out: (out.sendall(_frame(b"", length=10**6)), _drip(out, b"{")),
    "a message of 2^60 bytes": lambda out: _flood(out, _frame(b"", length=1 << 60), b" " * 60000),
    "parts without end": lambda out: _flood(out, _frame(b"{", end=False), _frame(b" " * 60000, kind=0, end=False)),
    "pings without end": lambda out: _flood(out, b"", _frame(b"x" * 100, kind=9) * 100),
    "lines without end": lambda out: _flood(out, b"", _line("next 5") * 100),
    "an HTML page": lambda out: out.sendall(_frame(f"<html>{KEY}".encode())),
    "no UTF-8": lambda out: out.sendall(_frame(b"\xff\xfe")),
    "a token that is none": lambda out: (out.sendall(_line(f"next {KEY}")), _silence(out)),
    "a token beyond the vocabulary": lambda out: (out.sendall(_line("next 99999999")), _silence(out)),
    "another's job": lambda out: (out.sendall(_frame(b'{"id": "x", "status": "RUNNING"}')), _silence(out)),
}


# ------------------------------------------------------------------------------------------------------ the server


class _Hostile:
    """A server that is honest but at one moment. ``leaks``: how often another address was sent the key."""

    def __init__(self, good: torch.Tensor, mark: Path):
        self.good, self.results = good, _results(good, mark)
        self.leaks = 0
        self.door, self.other = (socket.create_server(("127.0.0.1", 0), backlog=64) for _ in range(2))
        for door, serve in ((self.door, self._serve), (self.other, self._listen)):
            threading.Thread(target=self._accept, args=(door, serve), daemon=True).start()

    def url(self, moment: str, fault: str) -> str:
        """The address at which it has this fault: the first part of each path names it."""
        name = base64.urlsafe_b64encode(f"{moment}|{fault}".encode()).decode().rstrip("=")
        return f"http://127.0.0.1:{self.door.getsockname()[1]}/{name}"

    def _accept(self, door: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        while True:
            try:
                connection, _ = door.accept()
            except OSError:  # it is closed
                return
            threading.Thread(target=self._quietly, args=(connection, serve), daemon=True).start()

    @staticmethod
    def _quietly(connection: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        connection.settimeout(30)
        with connection:
            try:
                serve(connection)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):  # so that what was sent arrives
                    pass
            except OSError:
                pass

    def _listen(self, connection: socket.socket) -> None:
        if KEY.encode() in connection.recv(1 << 16):
            self.leaks += 1

    def _serve(self, connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        while line := stream.readline():
            headers = {}
            for header in iter(stream.readline, b"\r\n"):
                name, _, value = header.decode().partition(":")
                headers[name.lower()] = value.strip()
            stream.read(int(headers.get("content-length", 0)))
            _, name, *path = line.split()[1].decode().split("/")
            moment, fault = base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode().split("|")
            stage = {"request": "sending", "response": "status", "result": "result", "subscribe": "socket"}[path[0]]
            if not self._answers(connection, stage, headers, moment, fault):
                return

    def _answers(self, out: socket.socket, stage: str, headers: dict[str, str], moment: str, fault: str) -> bool:
        """One answer; whether the connection goes on."""
        at, other = self.url(moment, fault), f"http://127.0.0.1:{self.other.getsockname()[1]}/"
        if moment == f"{stage} over HTTP":
            HTTP[fault](out, other)
            return False
        if stage == "socket":
            accept = hashlib.sha1((headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode())
            out.sendall(
                _answer(
                    b"", "101 Switching Protocols", Upgrade="websocket", Connection="Upgrade", Content_Length=0,
                    Sec_WebSocket_Accept=base64.b64encode(accept.digest()).decode(),
                )
            )  # fmt: skip
            if moment == "its first message":
                SOCKET[fault](out)
                return False
            out.sendall(_frame(b'{"session_id": "s1"}'))
            time.sleep(0.3)  # until the request has come
            SOCKET[fault](out)
            return False
        said: Any = {"id": JOB, "status": "RECEIVED"}
        if stage == "status":
            said = {"id": JOB, "status": "COMPLETED", "data": f"{at}/result"}
        if moment == stage:
            said = STATUS[fault]
        body = json.dumps(said).replace("{result}", f"{at}/result").encode()
        if stage == "result":
            saved = self.results.get(fault) if moment == "what was saved" else None
            data = saved() if saved else _saved({"found": {"": self.good}})
            body = _packed_zeros(1 << 33) if fault == "packed without end" else zstandard.compress(data)
            body = body[: len(body) // 2] if fault == "cut" else data if fault == "not packed" else body
        out.sendall(_answer(body))
        return True


def _all(results: dict[str, Any]) -> list[tuple[str, str]]:
    of_status = [f for f in STATUS if "done" not in f and f not in ("another's job", "never done")]
    return [
        *itertools.product(["sending over HTTP", "status over HTTP", "result over HTTP", "socket over HTTP"], HTTP),
        *itertools.product(["sending"], of_status), *itertools.product(["status"], STATUS),
        *itertools.product(["what was saved"], [*results, "packed without end", "cut", "not packed"]),
        *itertools.product(["its first message", "its messages"], SOCKET),
    ]  # fmt: skip


def _try(lm: Any, url: str, streams: bool, deadline: float = DEADLINE) -> tuple[float, BaseException | None]:
    lm._server = Server(url, KEY, deadline)
    began = time.monotonic()
    try:
        "".join(lm.stream("hi there", max_new_tokens=4)) if streams else lm.logits("hi there")
    except BaseException as err:
        return time.monotonic() - began, err
    return time.monotonic() - began, None


def _shown(err: BaseException) -> str:
    """All that can be seen of an error: its chain, arguments, notes, and the variables of every frame."""
    chain, seen = [err], []
    while chain:
        one = chain.pop()
        seen += [repr(one.args), repr(getattr(one, "__notes__", "")), repr(vars(one))]
        seen += traceback.TracebackException.from_exception(one, capture_locals=True).format()
        chain += [next_ for next_ in (one.__cause__, one.__context__) if next_ is not None]
    return "".join(seen)


def run(full: bool, seed: int = 0) -> dict[str, object]:
    counts: dict[str, Any] = {"tries": 0, "no_error": 0, "late": 0, "key": 0, "leaks": 0, "executions": 0}
    bad: list[str] = []
    url = "http://127.0.0.1:9"
    lms = [sl.LM(remote=url, api_key=KEY, deadline=DEADLINE) for _ in range(WORKERS)]
    ids = lms[0].tokenize("hi there").ids
    good = torch.randn(ids.numel(), lms[0].vocab_size)
    free: list[Any] = list(lms)

    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "ran"
        hostile = _Hostile(good, mark)
        drawn = _all(hostile.results)
        random.Random(seed).shuffle(drawn)
        drawn = drawn if full else drawn[:30]

        def one(what: tuple[str, str]) -> tuple[tuple[str, str], float, BaseException | None]:
            lm = free.pop()
            try:
                return what, *_try(lm, hostile.url(*what), what[0].startswith(("socket", "its")))
            finally:
                free.append(lm)

        control = _try(lms[0], hostile.url("no moment", "none"), False, deadline=60)[1]
        assert control is None, control  # an honest server is answered
        with ThreadPoolExecutor(len(lms)) as threads:
            for (moment, fault), seconds, err in threads.map(one, drawn):
                text = "" if err is None else _shown(err)
                faults = {
                    "no_error": not isinstance(err, NDIFError), "late": seconds > DEADLINE + GRACE, "key": KEY in text
                }  # fmt: skip
                counts["tries"] += 1
                for name in [name for name, wrong in faults.items() if wrong]:
                    counts[name] += 1
                    bad.append(f"{moment}, {fault}: {name} after {seconds:.1f} s, {type(err).__name__}: {err}"[:300])
        counts["leaks"], counts["executions"] = hostile.leaks, int(mark.exists())
        hostile.door.close()
        hostile.other.close()
    return counts | {"bad": bad}
