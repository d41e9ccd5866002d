"""Running on an NDIF server: requests with a deadline, errors that say what to do, and no pickles.

nnsight sends the source of a traced block and the values that it names; the server returns what the block saved. A call
can wait for its result, run in the background (``Job``), or be taken up again after the kernel died. ``answers`` reads
results as tensors and plain data, so that no server can run code here, block a call or fill the memory.
"""

import itertools
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import websocket
from nnsight.intervention.backends.display import StatusDisplay
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.ndif import register
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status

from sae_lab.lm import answers, forms

log = logging.getLogger(__name__)

HOSTED = "https://api.ndif.us"
# Modules whose functions are sent as source. Not imported here, since most of them import ``lm``.
TRAVELLING = (
    "sae_lab.lm.passes", "sae_lab.saes.portable", "sae_lab.edits.rules", "sae_lab.activations.reading",
    "sae_lab.activations.reconstructing", "sae_lab.feature_index.directions", "sae_lab.circuits.metric",
    "sae_lab.evals.errors", "sae_lab.evals.hesitation", "sae_lab.explain.lens",
    "sae_lab.explain.selfexplain", "sae_lab.explain.trees",
)  # fmt: skip
RETRIES, PAUSE = 3, 0.5  # of requests that are safe to repeat: those that no server accepted, and those for a status
KNOWN = 3.0  # seconds after which an earlier kernel's job that the server does not know counts as lost
POLL = (0.05, 1.0)  # seconds between two looks at a job's status, at first and at most


def register_travelling() -> None:
    """Tell nnsight which modules' functions it sends as source."""
    for module in TRAVELLING:
        register(module)


class NDIFError(RuntimeError):
    """A failure on the way to a server or on it, and what to do."""


class NDIFTimeout(NDIFError, TimeoutError):
    """The deadline passed."""


class Server:
    """An NDIF server: its address, the key, and the time that a call may take.

    Args:
        host: its address; True: ``NDIF_HOST``, else the hosted NDIF. key: None: ``NDIF_API_KEY``. deadline: seconds.

    Attributes: ``asked``: the argument ``host``; ``host``: the server's address; ``sent``, ``received``: bytes of
    requests and of results so far.

    Raises ValueError for an address without http(s), one from the environment that is neither the hosted NDIF nor on
    this machine, and a deadline that is no positive number.
    """

    def __init__(self, host: bool | str, key: str | None = None, deadline: float = 600.0):
        named = isinstance(host, str)
        self.asked = host
        self.host: str = (host if isinstance(host, str) else os.environ.get("NDIF_HOST") or CONFIG.API.HOST).rstrip("/")
        url = urlsplit(self.host)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"an NDIF server's address starts with http:// or https://, got {self.host!r}")
        if url.username or url.password:
            raise ValueError("an NDIF server's address holds no user or password: pass api_key=, or set NDIF_API_KEY")
        if not named and self.host != HOSTED and url.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise ValueError(
                f"{self.host} comes from the environment, and would get your key and your prompts: if you trust it, "
                f"name it, LM(..., remote={self.host!r})"
            )
        if not deadline > 0:
            raise ValueError(f"deadline must be a positive number of seconds, got {deadline}")
        self._key = key or os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY or ""
        self.deadline = float(deadline)
        self.sent = self.received = 0
        self._present = threading.local()  # .job: the job whose call this thread makes

    def __repr__(self) -> str:
        return f"Server({self.host!r}, deadline={self.deadline:g})"

    def request(self, model: Any, form: Any, expected: int, listen: bool = False) -> "Request":
        """One request, for ``trace(backend=)`` or ``session(backend=)``. form: of its result, see ``forms.has``;
        expected: the result's bytes; listen: whether ``lines()`` gives what it prints."""
        register_travelling()
        job, most = getattr(self._present, "job", None), answers.TALK + answers.SLACK * expected
        return Request(self, model.to_model_key(), model._remoteable_get_env(), form, most, listen, job)

    @cached_property
    def trusted(self) -> Any:
        """The trusted certificates, read once since that takes a while."""
        return httpx.create_ssl_context()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While open, requests do not belong to the present job: an edit that reads the model makes such requests."""
        job, self._present.job = getattr(self._present, "job", None), None
        try:
            yield
        finally:
            self._present.job = job

    def scrub(self, text: str) -> str:
        """A server's text without the key, in any case or quoted for an address, and without control characters."""
        for secret in {self._key, quote(self._key, safe="")} - {""}:
            text = re.sub(re.escape(secret), "<your key>", text, flags=re.IGNORECASE)
        return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


class Job:
    """A call that runs on a server in the background: ``job = lm.submit(...)``, then ``job.result()``.

    Attributes: id: the server's name for it; after a restart the same call with ``job=id`` takes it up again. status:
    "SENDING", then NDIF's RECEIVED, QUEUED, DISPATCHED, RUNNING, COMPLETED or ERROR; or "CANCELLED". seconds: since the
    call.
    """

    def __init__(self, what: str, call: Callable[[], Any], server: Server, id: str | None = None):
        self.id, self.status, self._what = id, "SENDING", what
        self.cancelled = threading.Event()
        self._started, self._ended = time.monotonic(), None
        self._answer: list[Any] = []
        self._error: BaseException | None = None
        self._sent = threading.Event()

        def work() -> None:
            server._present.job = self
            try:
                self._answer.append(call())
            except BaseException as err:  # ``result`` raises it
                self._error = err
            finally:
                self._ended = time.monotonic()
                self._sent.set()

        self._thread = threading.Thread(target=work, name=f"sae_lab {what}", daemon=True)
        self._thread.start()
        self._sent.wait()  # from here on ``id`` is known

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def seconds(self) -> float:
        return (self._ended or time.monotonic()) - self._started

    def result(self, timeout: float | None = None) -> Any:
        """The call's value; raises the call's error. NDIFTimeout after ``timeout`` seconds: the job goes on, and
        ``result`` can be called again."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise NDIFTimeout(f"job {self.id} is {self.status} after {self.seconds:.0f} s: ask again later")
        if self._error is not None:
            raise self._error
        return self._answer[0]

    def cancel(self) -> None:
        """Stop waiting. NDIF cannot stop a job: on the server it runs to its end or to the server's time limit."""
        self.cancelled.set()
        self._thread.join(5)

    def __repr__(self) -> str:
        return f"Job({self._what}, id={self.id!r}, status={self.status}, {self.seconds:.1f} s)"


class Request(RemoteBackend):
    """nnsight's remote backend, which here only sends; ``saved()`` waits, after the trace, without the model's lock.

    The status is polled, so that a broken connection loses nothing. With ``listen`` the lines that a block prints come
    through a websocket; if that breaks, the request fails. form: of the result, see ``forms.has``; most: bytes
    that the result may have.
    """

    def __init__(
        self, server: Server, model_key: str, env: dict[str, Any], form: Any, most: int, listen: bool, job: Job | None
    ):
        sent = job.id if job else None
        super().__init__(model_key, server.host, server._key or None, env, blocking=False, job_id=sent)
        self.api_key = server._key  # without a key, RemoteBackend takes one from the environment
        self._keys = {"ndif-api-key": server._key} if server._key else {}
        self.display = StatusDisplay(enabled=False)
        self.server, self.form, self.most, self.listen, self.job = server, form, most, listen, job
        self.ends = time.monotonic() + server.deadline
        self.known_by = time.monotonic() + KNOWN if sent else self.ends  # an earlier job has a status already
        self.client = httpx.Client(verify=server.trusted)
        self.socket: Any = None

    def __call__(self, tracer: Any = None) -> None:
        if self.job_id is not None:  # an earlier job
            return
        try:
            blob = self._serialize(tracer)
        except Exception as err:
            raise NDIFError(
                f"this call cannot be sent, for it names a value that does not travel ({type(err).__name__}: {err}): a "
                "metric or edit of your own must be a function that uses torch and numbers only"
            ) from err
        request = RequestModel(model_key=self.model_key, compress=self.compress, env=self.env)
        if self.listen:
            request.session_id = self._ask(self._subscribe)
        response = self._ask(partial(self._send, request, blob), sending=True)
        self.job_id = response.id
        self.server.sent += len(blob)
        self._note(response)

    def saved(self, name: str) -> Any:
        """Wait for the value that the block saved under this name."""
        pause = POLL[0]
        try:
            while True:
                response = self._ask(self._status)
                if response is None and time.monotonic() > self.known_by:
                    raise NDIFError(
                        f"{self.host} knows no job {self.job_id}: its id may be misspelled, or its result no longer "
                        "kept; make the call without job="
                    )
                if response is not None and self._note(response):
                    return self._ask(partial(self._result, response.data, name))
                time.sleep(max(0.0, min(pause, self._left())))
                pause = min(1.5 * pause, POLL[1])
        finally:
            self._stop()

    def _send(self, request: RequestModel, blob: bytes) -> ResponseModel:
        headers = {
            "ndif-timestamp": repr(time.time()), "nnsight-version": version("nnsight"), "python-version": sys.version,
        }  # fmt: skip
        fields, files = {"data": request.metadata()}, {"blob": ("request", blob, "application/octet-stream")}
        with self._open("POST", f"{self.host}/request", headers | self._keys, data=fields, files=files) as answer:
            return answers.status(answers.read(answer, answers.TALK, self._left), None, self.server.scrub)

    def _status(self) -> ResponseModel | None:
        where = f"{self.host}/response/{quote(str(self.job_id), safe='')}"
        with self._open("GET", where, self._keys) as answer:
            if answer.status_code == 404:
                return None  # no status yet
            return answers.status(answers.read(answer, answers.TALK, self._left), self.job_id, self.server.scrub)

    def _result(self, where: str, name: str) -> Any:
        with self._open("GET", where, {}) as answer:  # another host may store it: the key is not sent
            content = answers.read(answer, self.most, self._left)
        found = answers.loaded(content, self.most, self.compress)
        if not isinstance(found, dict) or name not in found:
            raise answers.NoAnswer(f"its result is not what was asked for: {name}, got {forms.said(found)}")
        self.server.received += len(content)
        if not forms.has(found[name], self.form):
            said = f"{forms.said(self.form)}, got {forms.said(found[name])}"
            raise answers.NoAnswer(f"its result is not what was asked for: {said}")
        return found[name]

    def _open(self, method: str, where: str, headers: dict[str, str], **what: Any) -> Any:
        headers = headers | {"Accept-Encoding": "identity"}
        return self.client.stream(method, where, headers=headers, timeout=max(0.1, self._left()), **what)

    def _subscribe(self) -> str:
        self.socket = answers.Socket(answers.TALK + self.most, self._left)
        # A redirect would send the key to another host.
        where, left = f"{self.ws_host}/subscribe", max(0.1, self._left())
        self.socket.connect(where, header=self._keys, timeout=left, redirect_limit=0)
        return answers.session_id(self.socket.recv(), self.server.scrub)

    def lines(self) -> Iterator[str]:
        """The lines that the block prints, as they come."""
        try:
            while True:
                response = self._ask(self._message)
                if response is None:  # a pickle of the result, which ends the job
                    return
                if response.status == Status.LOG:
                    yield from response.description.splitlines()
                elif self._note(response):
                    return
        finally:
            self._stop()

    def _message(self) -> ResponseModel | None:
        self.socket.settimeout(max(0.1, self._left()))
        try:
            message = self.socket.recv()
        except (OSError, websocket.WebSocketException):
            raise answers.NoAnswer("it broke the connection in mid-job: the same call can be made again") from None
        return answers.status(message, self.job_id, self.server.scrub) if isinstance(message, str) else None

    def _left(self) -> float:
        """Seconds until the deadline; 0 after ``cancel``."""
        cancelled = self.job is not None and self.job.cancelled.is_set()
        return 0.0 if cancelled else self.ends - time.monotonic()

    def _check_time(self, last: str = "") -> None:
        if self.job is not None and self.job.cancelled.is_set():
            self.job.status = "CANCELLED"
            raise NDIFError(f"job {self.job_id} was cancelled")
        if self._left() <= 0:
            what = f"job {self.job_id}" if self.job_id else "a request"
            again = f"; lm.submit(..., job={self.job_id!r}) still gets its result" if self.job_id else ""
            raise NDIFTimeout(
                f"{what} on {self.host} was not done after {self.server.deadline:g} s (its status: "
                f"{self.status.value if self.status else 'unknown'}{last and f'; the last failure: {last}'}): pass "
                f"LM(..., deadline=) more seconds, or fewer prompts{again}"
            )

    def _note(self, response: ResponseModel) -> bool:
        """Keep a status; returns whether the job is done. NDIFError for a job that failed."""
        if response.status != Status.LOG:
            self.status = response.status
        if self.job is not None:
            self.job.id, self.job.status = self.job_id, self.status.value if self.status else "SENDING"
            self.job._sent.set()
        log.debug("job %s: %s", self.job_id, response.status.value)
        if response.status == Status.ERROR:
            raise NDIFError(explained(response.description[-answers.TOLD :], self.host))
        return response.status == Status.COMPLETED

    def _ask(self, question: Callable[[], Any], sending: bool = False) -> Any:
        """The answer, or NDIFError, which holds neither the key nor another exception. Requests that no server
        accepted, and those for a status, are repeated until the deadline; a request that a server may have is not."""
        patience = RETRIES if self.job_id is None else sys.maxsize  # for a running job until the deadline
        last = ""
        for attempt in itertools.count(1):
            self._check_time(last)
            answer, failure = answers.within(self._left, question, self._stop, self.server.scrub)
            if failure is None:
                return answer
            last = failure.text
            self._check_time(last)
            pause = min(PAUSE * attempt, 2.0)
            again = failure.again and (failure.unsent or not sending)
            late = self.job_id is None and pause > self._left()
            if not again or attempt >= patience or late:
                raise NDIFError(explained(last, self.host, sending and failure.again and not failure.unsent))
            time.sleep(min(pause, max(0.0, self._left())))

    def _stop(self) -> None:
        """Close the connections."""
        self.client.close()
        if self.socket is not None:
            self.socket.shutdown()


# Words in a message of NDIF or nnsight -> what the message means for the user
_KEYS = "NDIF gives keys at https://login.ndif.us"
_LATER = "try again in a few minutes"
_MEANINGS = {
    "missing or invalid api key": f"the server wants an API key: pass LM(..., api_key=) or set NDIF_API_KEY; {_KEYS}",
    "invalid api key": f"the server does not accept the API key in api_key= or NDIF_API_KEY; {_KEYS}",
    "auth backend unavailable": f"the server cannot check keys at the moment: {_LATER}",
    "below the minimum": "this nnsight is too old for the server: pip install --upgrade nnsight",
    "version was not provided": "this nnsight is too old for the server: pip install --upgrade nnsight",
    "reconnecting": f"the server has lost its compute nodes for the moment: {_LATER}",
    "could not deploy": "the server cannot run this model: nnsight.status() shows what it runs, under which ids",
    "exceeded the execution timeout": "the job took longer than the server allows: fewer or shorter prompts a call",
    "could not be read": "the server could not read the request: nnsight.compare() shows how its versions differ",
    "architecture doesn't match": "the server's model is another than this one: name the hub id and revision it runs",
    "outofordererror": "an untrusted key gets no gradients there: ask for a trusted key, or use a model here",
    "cancelled or preempted": "the server stopped the job: make the call again",
    "connection refused": "no server answers there: look at the address, and whether it is up",
    "name or service not known": "there is no such host: look at the address",
}


def explained(text: str, host: str, maybe_taken: bool = False) -> str:
    """A failure explained to the user, with the server's message. maybe_taken: whether the server may have the job."""
    last = text.strip().splitlines()[-1] if text.strip() else "no reason given"
    meaning = next((meaning for sign, meaning in _MEANINGS.items() if sign in text.lower()), None)
    doubt = "; the server may have taken it, so it was not sent again" if maybe_taken else ""
    if meaning is None:
        return f"{host}: {last}{doubt}" if text.count("\n") < 2 else f"{host}: the job failed there: {last}\n{text}"
    return f"{host}: {meaning}{doubt} (it said: {last[:200]})"
