"""Questions to an explainer or a judge, any ``str -> str`` function, which may hang, raise or answer nonsense."""

import json
import logging
import os
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from sae_lab.arguments import Count, as_annotated
from sae_lab.lm.model import LM
from sae_lab.results import counted

log = logging.getLogger(__name__)

T = TypeVar("T")
PATIENCE = 3  # questions in a row that hang to the last try, after which nothing more is asked


@dataclass(frozen=True)
class Answer(Generic[T]):
    """The answer to a question: a value, or None and the reason of the failure."""

    value: T | None
    failure: str = ""


@as_annotated
@dataclass
class Asker:
    """``Asker(judge, deadline=60)``: asks ``fn`` with a deadline in seconds, again after a failure (``retries`` times),
    and counts the failures.

    ``ask`` raises nothing that ``fn`` raises. A call that hangs keeps its thread, which nothing can end; after three
    questions in a row that hung at each try, no more is asked.

    Attributes:
        asked, answered: questions. tries: how often each failed try happened, by reason.
    """

    fn: Callable[[str], str]
    deadline: float = 60.0
    retries: Count = 2
    asked: int = 0
    answered: int = 0
    tries: Counter[str] = field(default_factory=Counter)
    _hung: int = 0

    def __post_init__(self) -> None:
        if not self.deadline > 0:
            raise ValueError(f"deadline must be a positive number of seconds, got {self.deadline!r}")

    def ask(self, prompt: str, read: Callable[[str], T]) -> Answer[T]:
        """``read`` makes a value of the answer, or raises ValueError."""
        self.asked += 1
        reasons = [f"not asked: the {PATIENCE} questions before had no answer"]
        if self._hung < PATIENCE:
            late, reasons = f"no answer within {self.deadline:g} s", []
            for _ in range(1 + self.retries):
                answer = self._try(prompt, read, late)
                if not answer.failure:
                    self.answered += 1
                    self._hung = 0
                    return answer
                reasons.append(why := answer.failure)
                self.tries[why.split(":")[0] if why.startswith("not readable") else why] += 1
            self._hung = self._hung + 1 if all(r == late for r in reasons) else 0
        log.warning("a question failed: %s", reasons[-1])
        return Answer(None, reasons[-1])

    def _try(self, prompt: str, read: Callable[[str], T], late: str) -> Answer[T]:
        box: list[Answer[Any]] = []

        def call() -> None:
            try:
                box.append(Answer(self.fn(prompt)))
            except BaseException as err:  # a failure of this question alone; SystemExit and the like end the thread
                said = f": {str(err)[:200]}" * isinstance(err, Exception)
                box.append(Answer(None, f"raised {type(err).__name__}{said}"))

        thread = threading.Thread(target=call, name="sae_lab asks", daemon=True)
        thread.start()
        thread.join(self.deadline)
        if not box:
            return Answer(None, late)
        text = box[0].value
        if box[0].failure:
            return box[0]
        if not isinstance(text, str):
            return Answer(None, f"returned {type(text).__name__}, no str")
        if not text.strip():
            return Answer(None, "returned an empty answer")
        try:
            return Answer(read(text))
        except ValueError as err:
            return Answer(None, f"not readable: {err}")

    @property
    def summary(self) -> str:
        """How many questions were answered, and why tries failed."""
        why = "; ".join(f"{n} x {reason}" for reason, n in self.tries.most_common(5))
        tries = f" (failed tries: {why})" if why else ""
        return f"{self.answered} of {counted(self.asked, 'question')} answered{tries}"


def name_of(fn: Any) -> str:
    """What to call an explainer or judge: its ``name``, else that of the function."""
    return str(getattr(fn, "name", None) or getattr(fn, "__qualname__", None) or type(fn).__name__)


@dataclass(frozen=True)
class ChatEndpoint:
    """A ``str -> str`` function that asks a server. Made by ``openai_compatible``; it holds no key."""

    url: str
    model: str
    key_from: str | Callable[[], str] | None
    settings: Mapping[str, Any]
    timeout: float

    @property
    def name(self) -> str:
        return f"{self.model} at {urlsplit(self.url).hostname}"

    def __repr__(self) -> str:
        return f"openai_compatible({self.url.removesuffix('/chat/completions')!r}, {self.model!r})"

    def __call__(self, prompt: str) -> str:
        """The model's answer. ValueError for an answer without text, OSError for a server that does not answer."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **self.settings}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        key = self._key()
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")  # it goes to no other server
        failure = ""
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                text = json.loads(reply.read())["choices"][0]["message"]["content"]
                if isinstance(text, str):
                    return text
                failure = f"its message holds {type(text).__name__}, no text"
        except urllib.error.HTTPError as err:
            said = err.read(300).decode(errors="replace")
            failure = f"HTTP {err.code} {err.reason}: {said}"
        except (OSError, HTTPException) as err:
            failure = f"{type(err).__name__}: {err}"
        except (ValueError, LookupError, TypeError) as err:
            failure = f"its answer is no chat completion ({type(err).__name__})"
        # Raised outside the handlers: the error then refers to no other exception, which could hold the key.
        raise OSError(f"{self.name}: {failure.replace(key, '***') if key else failure}")

    def _key(self) -> str:
        if self.key_from is None:
            return ""
        key = self.key_from() if callable(self.key_from) else os.environ.get(self.key_from, "")
        if not key or not key.isascii() or not key.isprintable():
            where = "key_from()" if callable(self.key_from) else f"the environment variable {self.key_from}"
            raise ValueError(f"{where} holds no key: set os.environ[...] = getpass.getpass(), or pass key_from=None")
        return key


@as_annotated
def openai_compatible(
    base_url: str, model: str, key_from: str | Callable[[], str] | None = "OPENAI_API_KEY", *, timeout: float = 60.0,
    **settings: Any,
) -> ChatEndpoint:  # fmt: skip
    """A chat model behind an OpenAI-compatible server, as an explainer or judge.

    Args:
        base_url: e.g. "https://api.openai.com/v1", or "http://localhost:8000/v1" of a server of your own.
        key_from: the environment variable that holds the key, or a function that returns it (``getpass.getpass``), or
            None for a server without keys. It is read for each question and not kept.
        timeout: seconds. settings: of the request, e.g. ``temperature=0, max_tokens=300``.

    ValueError for a URL that holds a password, or that would send a key over plain http to another machine.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("base_url must be an http(s) URL such as 'https://api.openai.com/v1'")
    if parts.username or parts.password or parts.query:
        raise ValueError("base_url must hold no user, password or query: keys come from key_from alone")
    here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme == "http" and not here and key_from is not None:
        raise ValueError(f"a key would go to {parts.hostname} unencrypted: use https, or key_from=None")
    if isinstance(key_from, str) and not key_from.isidentifier():
        raise ValueError("key_from names an environment variable (it is not the key itself), e.g. 'OPENAI_API_KEY'")
    url = base_url.rstrip("/")
    url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
    return ChatEndpoint(url, model, key_from, {"temperature": 0} | settings, timeout)


@as_annotated
def local_chat(lm: LM | str | None = None, max_new_tokens: Count = 200) -> Callable[[str], str]:
    """A chat model on this machine, as an explainer or judge: an LM, a hub id or folder, None the bundled one.

    Its chat template is applied, and its answer is greedy. The bundled model is far too small to explain or to judge:
    with it one sees that the machinery runs.
    """
    model = lm if isinstance(lm, LM) else LM(lm) if lm is not None else LM()
    if not getattr(model.tokenizer, "chat_template", None):
        raise ValueError(f"{model} has no chat template: give a chat (instruct) model")

    def ask(prompt: str) -> str:
        return "".join(model.stream([{"role": "user", "content": prompt}], max_new_tokens=max_new_tokens))

    ask.name = f"{model} here"  # type: ignore[attr-defined]
    return ask
