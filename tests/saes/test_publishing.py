"""``sae.push_to_hub`` through the real client to a small hub here; what it took, ``sl.load`` and SAELens read."""

import base64
import functools
import json
import socket
import threading
from http.server import ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants

import sae_lab as sl
from sae_lab.results import Result, figure, result
from tests.saes.conftest import D_IN, D_SAE
from tests.saes.test_exchange import X, close

# The loopback hub, and where the client is pointed at it.
from tests.saes.test_releases import COMMIT, Hub, _point_at

SAELENS = ("cfg.json", "sae_weights.safetensors")
ATTACK = "<script>alert(1)</script> | `x` \u202e"


class Taking(Hub):
    """A hub that also takes: it makes repositories and commits files, or refuses with a status; 0: it hangs up."""

    refuse: dict[str, int] = {}  # noqa: RUF012 (each test sets its own)
    private: dict[str, bool] = {}  # noqa: RUF012

    def do_GET(self):
        parts = urlparse(self.path).path.strip("/").split("/")
        if parts[:2] != ["api", "models"] or len(parts) > 4:
            return super().do_GET()
        repo = self.root / parts[2] / parts[3]
        if not repo.is_dir():
            return self._send(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        name = "/".join(parts[2:4])
        files = [{"rfilename": str(f.relative_to(repo))} for f in repo.rglob("*") if f.is_file()]
        about = {"id": name, "sha": COMMIT, "private": self.private.get(name, False), "siblings": files, "tags": []}
        self._send(200, json.dumps(about).encode(), Content_Type="application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlparse(self.path).path).strip("/")
        kind = next(k for k in ("repos/create", "preupload", "commit", "validate-yaml") if k in path)
        self.asked.append(f"{kind} {self.headers.get('Authorization')}")
        if status := self.refuse.get(kind):
            return self._send(status, b'{"error": "no"}', Content_Type="application/json")
        answer = json.dumps(getattr(self, "_" + kind.split("/")[-1].replace("-", "_"))(path, body)).encode()
        if kind in self.refuse:  # it did what was asked, and the answer is lost
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        self._send(200, answer, Content_Type="application/json")

    def _create(self, path, body):
        said = json.loads(body)
        name = f"{said['organization']}/{said['name']}"
        (self.root / name).mkdir(parents=True)
        self.private[name] = said.get("visibility") == "private"
        return {"url": f"http://127.0.0.1/{name}", "id": name}

    def _preupload(self, path, body):
        files = json.loads(body)["files"]
        return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}

    def _validate_yaml(self, path, body):
        return {"errors": [], "warnings": []}

    def _commit(self, path, body):
        repo = self.root.joinpath(*path.split("/")[2:4])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                file = repo / line["value"]["path"]
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        name = "/".join(path.split("/")[2:4])
        return {"commitUrl": f"{constants.ENDPOINT}/{name}/commit/{COMMIT}", "commitOid": COMMIT}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """(folder of repositories, what was asked)"""
    root, asked = tmp_path / "hub", []
    root.mkdir()
    monkeypatch.setattr(Taking, "refuse", {})
    monkeypatch.setattr(Taking, "private", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Taking, root, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _point_at(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its client's tries
    yield root, asked
    server.shutdown()


@pytest.fixture
def coder():
    coder = sl.TopK(D_IN, D_SAE, k=4).eval()
    coder.reads = coder.writes = (sl.Site("resid_post", 2),)
    coder.meta |= {"model": "owner/tiny", "text": ATTACK, "train_tokens": 12_345, "dead": 0.25}
    coder.meta["card"] = {"held_out": {"news": {"fvu": 0.1318, "l0": 32.7}, ATTACK: {"fvu": 0.5}}}
    return coder


@result
class Measured(Result):
    """A report's stand-in."""

    fvu: float = figure("fvu", "on held-out text")


def test_there_and_back(hub, coder, tmp_path):
    root, asked = hub
    sl.notes(coder).write(1, "private")
    coder.path = "here"
    address = coder.push_to_hub("user/name", private=True, report=Measured(0.125))
    assert address.startswith("http://127.0.0.1:") and address.endswith("/user/name") and coder.path == "here"
    repo = root / "user" / "name"
    files = {str(f.relative_to(repo)) for f in repo.rglob("*") if f.is_file()}
    assert files == {"README.md", "config.json", "sae.safetensors"} | {f"saelens/{name}" for name in SAELENS}
    assert Taking.private == {"user/name": True} and all(one.endswith("Bearer hf_secret") for one in asked)
    again = sl.load("user/name")
    assert again.fingerprint() == coder.fingerprint() and again.meta["card"] == coder.meta["card"]
    theirs = pytest.importorskip("sae_lens").SAE.from_pretrained("user/name", "saelens")
    close(coder.encode(X), theirs.encode(X))
    card = (repo / "README.md").read_text()
    assert card.startswith('---\nbase_model: "owner/tiny"\nlibrary_name: sae_lab\n')
    assert all(part in card for part in ("| 0.1318 | 32.7 |", "12,345", "| 0.5 | – |", "0.125", 'sl.load("user/name")'))
    assert "<script" not in card and "\u202e" not in card and "&lt;script&gt;" in card

    # What a person writes around the card stays; the card itself is renewed.
    (repo / "README.md").write_text("---\nlicense: mit\n---\nMine.\n" + card.split("---\n", 2)[2] + "\nAlso mine.\n")
    coder.meta["card"]["held_out"]["news"]["fvu"] = 0.25
    coder.push_to_hub("user/name")
    now = (repo / "README.md").read_text()
    assert now.startswith("---\nlicense: mit\n---\nMine.\n") and now.endswith("\nAlso mine.\n")
    assert "| 0.25 | 32.7 |" in now and "0.1318" not in now and now.count("# user/name") == 1


def test_a_coder_that_saelens_cannot_hold(hub):
    coder = sl.TopK(D_IN, D_SAE, k=4, d_out=D_IN).eval()
    coder.push_to_hub("user/other")
    repo = hub[0] / "user" / "other"
    assert not (repo / "saelens").exists() and "SAELens cannot hold it: " in (repo / "README.md").read_text()
    assert sl.load("user/other").fingerprint() == coder.fingerprint()


@pytest.mark.parametrize(("status", "words"), [
    (401, "it does not know your token: log in"), (403, "your token may not write there"),
    (409, "somebody changes it at the same time"), (500, "it answers 500: try again later"),
])  # fmt: skip
@pytest.mark.parametrize("at", ["repos/create", "commit"])
def test_a_hub_that_refuses(hub, coder, status, words, at):
    Taking.refuse[at] = status
    with pytest.raises(ValueError, match=f"did not take user/name, of which no file was changed.*{words}") as found:
        coder.push_to_hub("user/name")
    assert "\n" not in str(found.value) and ("is there now, empty" in str(found.value)) == (at == "commit")
    assert [f for f in hub[0].rglob("*") if f.is_file()] == []
    Taking.refuse.clear()
    coder.push_to_hub("user/name")  # and the next time it goes
    assert sl.load("user/name").fingerprint() == coder.fingerprint()


@pytest.mark.parametrize("at", ["repos/create", "preupload", "commit"])
def test_a_connection_that_breaks(hub, coder, at):
    """Nobody knows then whether the hub did what was asked: no word that it did not, and the next push is whole."""
    Taking.refuse[at] = 0
    with pytest.raises(ValueError, match=r"hub cannot be reached for user/name .*check the network.*again") as found:
        coder.push_to_hub("user/name")
    said = str(found.value)
    assert "no file was changed" not in said and "\n" not in said
    assert ("whether it took the files is not known" in said) == (at in ("preupload", "commit"))
    Taking.refuse.clear()
    coder.push_to_hub("user/name")
    assert sl.load("user/name").fingerprint() == coder.fingerprint()


def test_no_network(hub, coder, monkeypatch, tmp_path):
    _point_at(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"the hub cannot be reached for user/name .*: check the network, HF_ENDPOINT"):
        coder.push_to_hub("user/name")


def test_what_is_there_already(hub, coder):
    root = hub[0]
    with pytest.raises(ValueError, match="a repository is named 'user/name', got 'name'"):
        coder.push_to_hub("name")
    model = root / "user" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"user/model holds something else .* take another name"):
        coder.push_to_hub("user/model")
    (root / "user" / "public").mkdir()
    with pytest.raises(ValueError, match="user/public is public, and private=True does not change that"):
        coder.push_to_hub("user/public", private=True)
    assert (model / "config.json").read_text() == "{}" and list((root / "user" / "public").iterdir()) == []
