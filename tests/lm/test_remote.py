"""What can be said about a server without one."""

import pytest

import sae_lab as sl
from sae_lab.circuits.gradients import gradients
from sae_lab.lm import bundled
from sae_lab.lm.remote import HOSTED, NDIFError, Server, explained


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("NDIF_HOST", "NDIF_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_the_hosted_server_unless_another_is_named(monkeypatch):
    assert Server(True).host == HOSTED
    assert Server("http://10.1.2.3:5000/").host == "http://10.1.2.3:5000"
    monkeypatch.setenv("NDIF_HOST", "http://127.0.0.1:5000")
    assert Server(True).host == "http://127.0.0.1:5000"


def test_a_host_that_only_the_environment_names_is_refused(monkeypatch):
    monkeypatch.setenv("NDIF_HOST", "https://elsewhere.example")
    with pytest.raises(ValueError, match=r"would get your key.*remote='https://elsewhere.example'"):
        Server(True)
    assert Server("https://elsewhere.example").host == "https://elsewhere.example"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:5000",), "starts with http:// or https://, got 'localhost:5000'"),
        (("https://me:pw@host",), "holds no user or password"),
        ((True, None, 0), "deadline must be a positive number of seconds, got 0"),
    ],
)
def test_bad_servers(arguments, message):
    with pytest.raises(ValueError, match=message):
        Server(*arguments)


def test_the_key_is_in_nothing_that_is_shown(monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", "very-secret")
    server = Server(True)
    assert "very-secret" not in repr(server) + str(server)
    assert server.scrub("Invalid API key format: 'very-secret'") == "Invalid API key format: '<your key>'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": None, "device": "cpu"}, "device and dtype are the server's"),
        ({"device_map": "auto"}, "it takes no device_map"),
        ({"trust_remote_code": True}, "sae_lab never sets trust_remote_code"),
    ],
)
def test_what_a_model_there_does_not_take(arguments, message):
    with pytest.raises(ValueError, match=message):
        sl.LM(remote="http://127.0.0.1:9", **arguments)


def test_a_model_there_needs_a_hub_id(tiny_lm, tmp_path):
    for model in (tiny_lm._module, str(tmp_path)):
        with pytest.raises(ValueError, match="a server knows models by their hub id"):
            sl.LM(model, tokenizer=tiny_lm.tokenizer, remote="http://127.0.0.1:9")


def test_a_model_there_is_an_outline_here(lm):
    far = sl.LM(remote="http://127.0.0.1:9", deadline=60)
    assert all(p.device.type == "meta" for p in far._module.parameters())
    assert (far.id, far.n_layers, far.kinds, far.max_length) == (bundled.HUB_ID, lm.n_layers, lm.kinds, lm.max_length)
    for kind in lm.kinds:
        site = sl.Site(kind, None if kind == "embed" else 8)
        assert far.width(site) == lm.width(site) and far._sites.place(site) == lm._sites.place(site)
    assert far.tokens("The sea") == lm.tokens("The sea") and far.remote and not lm.remote
    with pytest.raises(NDIFError, match="no server answers there"):
        far.logits("The sea")


def test_jobs_are_for_servers(tiny_lm):
    with pytest.raises(ValueError, match="is for a model on a server"):
        tiny_lm.submit("logits", "The sea")
    far = sl.LM(remote="http://127.0.0.1:9", deadline=60)
    with pytest.raises(ValueError, match=r"lm\.submit takes read, logits, loss or generate"):
        far.submit("compare", "The sea", edits=[])


def test_what_servers_say():
    said = "Traceback (most recent call last):\n  File x\nOutOfOrderError: no such value"
    assert "an untrusted key gets no gradients there" in explained(said, "http://host")
    said = "Traceback (most recent call last):\n  File x\nRuntimeError: shapes differ"
    assert explained(said, "http://host").startswith("http://host: the job failed there: RuntimeError: shapes differ\n")
    assert "was not sent again" in explained("odd", "http://host", maybe_taken=True)


def test_what_needs_the_model_here():
    far, sae = sl.LM(remote="http://127.0.0.1:9", deadline=60), sl.load("smollm2-135m/attn_z-8")
    stream = sl.load("smollm2-135m/resid_post-8")
    for call in (
        lambda: sl.circuits.head_attribution(far, sae, 0, "The sea"),
        lambda: sl.circuits.invariant_edges(far, sae, stream),
        lambda: gradients(far, far.tokenize("The sea"), [sae.site], lambda acts, logits: [logits.sum()]),
    ):
        with pytest.raises(ValueError, match="needs the model on this machine: load it without remote="):
            call()
