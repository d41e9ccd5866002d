"""Asking what hangs, raises or talks nonsense; a server's key stays where it is."""

import http.server
import json
import pickle
import threading
import time

import pytest

import sae_lab as sl
from sae_lab.explain.asking import PATIENCE, Asker, local_chat, openai_compatible
from sae_lab.explain.explainers import read_explanation

KEY = "sk-secret-4711"


def words(text):
    if not text.isalpha():
        raise ValueError("no word")
    return text


def test_an_answer_and_its_count():
    asker = Asker(lambda prompt: prompt)
    assert asker.ask("ship", words).value == "ship" and asker.summary == "1 of 1 question answered"


def test_failures_are_retried_and_counted():
    answers = iter(["", "12", "ship"])
    asker = Asker(lambda prompt: next(answers), retries=2)
    assert asker.ask("?", words).value == "ship"
    assert asker.tries == {"returned an empty answer": 1, "not readable": 1}


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda prompt: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda prompt: (_ for _ in ()).throw(SystemExit(1)), "raised SystemExit"),
        (lambda prompt: None, "returned NoneType, no str"),
        (lambda prompt: " \n", "returned an empty answer"),
        (lambda prompt: "12", "not readable: no word"),
    ],
)
def test_what_goes_wrong_is_named(fn, reason):
    asker = Asker(fn, retries=1)
    answer = asker.ask("?", words)
    assert (answer.value, answer.failure) == (None, reason)
    assert sum(asker.tries.values()) == 2 and (asker.asked, asker.answered) == (1, 0)


def test_one_that_hangs_is_left_and_in_the_end_not_asked():
    release, calls = threading.Event(), []

    def hangs(prompt):
        calls.append(prompt)
        release.wait(30)
        return "late"

    asker = Asker(hangs, deadline=0.05, retries=1)
    start = time.perf_counter()
    failures = [asker.ask("?", words).failure for _ in range(PATIENCE + 2)]
    assert time.perf_counter() - start < 5
    release.set()
    assert failures[0] == "no answer within 0.05 s" and failures[-1].startswith("not asked: the 3 questions before")
    assert len(calls) == 2 * PATIENCE and asker.asked == PATIENCE + 2


def test_what_is_refused():
    with pytest.raises(ValueError, match="deadline must be a positive number of seconds, got 0"):
        Asker(str, deadline=0.0)
    with pytest.raises(ValueError, match="retries must be a whole number of at least 0, got -1"):
        Asker(str, retries=-1)


# ---- a server


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        self._say()

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Authorization"), None))
        self._say()

    def _say(self):
        code, reply = self.server.reply
        self.send_response(code)
        if code == 302:
            self.send_header("Location", reply)
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.seen, made.reply = [], (200, '{"choices": [{"message": {"content": "EXPLANATION: ships"}}]}')
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()


def url(server):
    return f"http://127.0.0.1:{server.server_port}/v1"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


def test_a_server_is_asked_with_the_key(server):
    ask = openai_compatible(url(server), "small", key_from="TEST_KEY", max_tokens=50)
    assert Asker(ask).ask("what?", read_explanation).value == "ships"
    path, authorization, body = server.seen[0]
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body == {
        "model": "small", "messages": [{"role": "user", "content": "what?"}], "temperature": 0, "max_tokens": 50,
    }  # fmt: skip


def test_the_key_is_nowhere(server, caplog):
    ask = openai_compatible(url(server), "small", key_from="TEST_KEY")
    server.reply = 401, f"wrong key {KEY}"
    asker = Asker(ask, retries=0)
    failure = asker.ask("what?", str).failure
    assert "HTTP 401" in failure and "***" in failure
    with pytest.raises(OSError, match="HTTP 401") as caught:
        ask("what?")
    assert caught.value.__context__ is None and caught.value.__cause__ is None
    everything = [repr(ask), str(vars(ask)), repr(asker), asker.summary, failure, str(caught.value), caplog.text]
    assert not any(KEY in text for text in everything) and KEY.encode() not in pickle.dumps(ask)


def test_the_key_follows_no_redirect(server):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        other.seen, other.reply = [], (200, "{}")
        threading.Thread(target=other.serve_forever, daemon=True).start()
        server.reply = 302, url(other)
        with pytest.raises(OSError, match="no chat completion"):
            openai_compatible(url(server), "small", key_from="TEST_KEY")("what?")
        other.shutdown()
    assert [authorization for _, authorization, _ in other.seen] == [None]


def test_no_key_where_none_is_needed_and_none_where_it_is_missing(server, monkeypatch):
    openai_compatible(url(server), "small", key_from=None)("what?")
    assert server.seen[0][1] is None
    openai_compatible(url(server), "small", key_from=lambda: "typed")("what?")
    assert server.seen[1][1] == "Bearer typed"
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(ValueError, match="the environment variable TEST_KEY holds no key"):
        openai_compatible(url(server), "small", key_from="TEST_KEY")("what?")


@pytest.mark.parametrize(
    "reply", ["not json", "{}", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}']
)
def test_a_reply_that_is_none(server, reply):
    server.reply = 200, reply
    with pytest.raises(
        OSError, match=r"small at 127\.0\.0\.1: its (answer is no chat completion|message holds NoneType)"
    ):
        openai_compatible(url(server), "small", key_from=None)("what?")


def test_no_server():
    with pytest.raises(OSError, match=r"small at 127\.0\.0\.1: URLError"):
        openai_compatible("http://127.0.0.1:9/v1", "small", key_from=None, timeout=2.0)("what?")


@pytest.mark.parametrize(
    ("base_url", "key_from", "words"),
    [
        ("ftp://x/v1", None, "must be an http"),
        ("https://user:pass@x/v1", None, "no user, password or query"),
        ("https://x/v1?key=1", None, "no user, password or query"),
        ("http://example.org/v1", "TEST_KEY", "would go to example.org unencrypted"),
        ("https://example.org/v1", KEY, "it is not the key itself"),
    ],
)
def test_addresses_that_are_refused(base_url, key_from, words):
    with pytest.raises(ValueError, match=words) as caught:
        openai_compatible(base_url, "small", key_from=key_from)
    assert KEY not in str(caught.value) and "pass@" not in str(caught.value)


# ---- a model here


def test_a_model_here(lm):
    ask = local_chat(lm, max_new_tokens=8)
    said = ask("Say hello.")
    assert isinstance(said, str) and 0 < len(said) < 100 and "Say hello" not in said
    assert "SmolLM2" in ask.name


def test_a_model_without_a_chat_template(make_module):
    from transformers import AutoTokenizer

    from sae_lab.lm import bundled

    tokenizer = AutoTokenizer.from_pretrained(bundled.folder())
    tokenizer.chat_template = None
    model = sl.LM(make_module("llama", len(tokenizer)), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="has no chat template: give a chat"):
        local_chat(model)
