"""A model hub on loopback: the few answers of the Hugging Face hub that loading a model by its id needs."""

import hashlib
import json
import struct
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40  # the one revision there is


def serve(root: Path) -> ThreadingHTTPServer:
    """Serve the folders ``root/org/name`` in a thread; ``.server_address`` tells where, ``.shutdown()`` ends it."""

    class Handler(_Hub):
        folder = root

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, name="hub", daemon=True).start()
    return server


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._about(self.folder.joinpath(*parts[2:4]), "/".join(parts[2:4]), parts[4:])
        elif "resolve" in parts:  # org/name/resolve/revision/file
            at = parts.index("resolve")
            self._file(self.folder.joinpath(*parts[:at]), parts[at + 2 :])
        else:
            self._answer(404)

    do_HEAD = do_GET

    def _about(self, repo: Path, name: str, rest: list[str]) -> None:
        if not repo.is_dir():
            self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["tree"] and len(rest) <= 2:
            self._answer(200, [{"type": "file", "path": f.name, "size": f.stat().st_size} for f in repo.iterdir()])
        elif rest[:1] == ["tree"]:
            self._answer(404, headers={"X-Error-Code": "EntryNotFound"})
        else:
            count = _parameters(repo / "model.safetensors")
            self._answer(200, {
                "id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0,
                "pipeline_tag": "text-generation", "library_name": "transformers",
                "siblings": [{"rfilename": f.name} for f in repo.iterdir()],
                "safetensors": {"parameters": {"F32": count}, "total": count},
            })  # fmt: skip

    def _file(self, repo: Path, rest: list[str]) -> None:
        file = repo.joinpath(*rest)
        if not repo.is_dir() or not file.is_file():
            self._answer(404, headers={"X-Error-Code": "EntryNotFound" if repo.is_dir() else "RepoNotFound"})
            return
        mark = hashlib.sha256(f"{file}{file.stat().st_size}".encode()).hexdigest()
        headers = {"ETag": f'"{mark}"', "X-Repo-Commit": COMMIT, "Content-Length": str(file.stat().st_size)}
        self._answer(200, file, headers)

    def _answer(self, status: int, body: object = None, headers: dict[str, str] | None = None) -> None:
        content = b"" if body is None or isinstance(body, Path) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content))}.items():
            if name not in (headers or {}):
                self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(body, Path):
            with open(body, "rb") as f:
                while part := f.read(1 << 20):
                    self.wfile.write(part)
        else:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _parameters(file: Path) -> int:
    """How many a safetensors file has, from its header."""
    with open(file, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for axis in tensor["shape"]:
                size *= axis
            total += size
    return total
