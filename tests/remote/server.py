"""A real NDIF server on loopback: redis, an object store, Ray with NDIF's controller, and its API, all on free ports.

    with Server({"org/name": folder_or_module}) as server:
        server.url, server.hub
        server.stop("api"); server.start("api")

Needs the Debian package redis-server and what the Makefile's .venv/.ndif installs.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.remote import hub

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
START = 180.0  # seconds that a part may take to come up on a slow machine
LIMIT = 9  # seconds that the server lets a job run
SERVICES = ("redis", "store", "gcs", "client", "dashboard", "api")


class Server:
    """The processes of one server. Leaving the ``with`` ends each of them, by its id."""

    def __init__(self, models: dict[str, Path]):
        self.folder = Path(tempfile.mkdtemp(prefix="ndif-"))
        root = self.folder / "hub"
        for name, folder in models.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(folder, target_is_directory=True)
        self._hub = hub.serve(root)
        self.hub = f"http://127.0.0.1:{self._hub.server_address[1]}"
        self.port = dict(zip(SERVICES, _free_ports(len(SERVICES)), strict=True))
        self.url = f"http://127.0.0.1:{self.port['api']}"
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = self._settings()

    def _settings(self) -> dict[str, str]:
        port = self.port
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("NDIF_", "RAY_"))}
        return keep | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(HERE / "on_server"),
            "HF_HOME": str(self.folder / "models"), "HF_ENDPOINT": self.hub, "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "AWS_EC2_METADATA_DISABLED": "true", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # else a token of the user's own Ray keeps the controller out
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{port['redis']}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{port['store']}",
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{port['client']}",
            "NDIF_API_PORT": str(port["api"]),
            "NDIF_MODEL_IMPORT_PATH": "cpu_actors.ModelOnCPU",
            "NDIF_CONTROLLER_IMPORT_PATH": "cpu_actors.Controller",
            "NDIF_DEFAULT_DTYPE": "float32", "NDIF_DEFAULT_PADDING_BIAS": "0",
            "NDIF_MINIMUM_DEPLOYMENT_TIME_SECONDS": "0", "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": str(LIMIT),
            "NDIF_QUEUE_FETCH_TIMEOUT_S": "1", "NDIF_STATUS_TTL_S": "1",
        }  # fmt: skip

    def __enter__(self) -> "Server":
        try:
            for name in ("redis", "store", "ray"):
                self.start(name)
            self._run_controller()
            self.start("api")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.running)):
            self.stop(name)
        self._hub.shutdown()
        self._hub.server_close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- parts

    def start(self, name: str, **settings: str) -> None:
        """Start a part and wait until it answers; settings go to its environment."""
        port, local = self.port, "127.0.0.1"
        commands = {
            "redis": ["redis-server", "--bind", local, "--port", str(port["redis"]), "--save", ""],
            "store": [BIN / "moto_server", "-H", local, "-p", str(port["store"])],
            "ray": [
                BIN / "ray", "start", "--head", "--block", f"--node-ip-address={local}", f"--port={port['gcs']}",
                f"--ray-client-server-port={port['client']}", f"--dashboard-port={port['dashboard']}",
                f"--dashboard-host={local}", "--num-cpus=4", "--num-gpus=1", "--object-store-memory=150000000",
                f"--temp-dir={self.folder}/ray", "--disable-usage-stats",
                "--resources=" + json.dumps({"head": 10, "cuda_memory_bytes": 8e9, "cpu_memory_bytes": 8e9}),
            ],
        }  # fmt: skip
        answers: dict[str, Callable[[], bool]] = {
            "redis": lambda: _open(port["redis"]), "store": lambda: _open(port["store"]),
            "ray": lambda: _open(port["client"]),
        }  # fmt: skip
        if name.startswith("api"):
            at = port.setdefault(name, _free_ports(1)[0])
            bind = f"{local}:{at}"
            # Another than "api" is one more door to the same cluster; gunicorn would bring one more dispatcher too.
            commands[name] = (
                [BIN / "gunicorn", "--config", "python:api_settings", "--bind", bind, "ndif.services.api.app:app"]
                if name == "api"
                else [sys.executable, "-m", "another_door", local, str(at)]
            )
            settings["NDIF_API_PORT"] = str(at)
            answers[name] = lambda: _says_ok(f"http://{bind}/connected")
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                commands[name], env=self._environment | settings, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._wait(name, answers[name])

    def stop(self, name: str, kill: bool = False) -> None:
        """End a part and all it has started: by their ids, asked first unless ``kill``."""
        process = self.running.pop(name)
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for member in family if not kill else []:
            _quietly(member.terminate)
        _, left = psutil.wait_procs(family, 0 if kill else 5)
        for member in left:
            _quietly(member.kill)
        process.wait(10)
        psutil.wait_procs(family, 10)  # its ports are closed only then

    def _run_controller(self) -> None:
        with open(self.folder / "controller.log", "ab") as log:
            subprocess.run(
                [sys.executable, "-m", "ndif.services.ray.deployments.controller.controller"], check=True,
                env=self._environment | {"RAY_ADDRESS": f"127.0.0.1:{self.port['gcs']}"}, stdout=log, stderr=log,
                timeout=START,
            )  # fmt: skip

    def actors(self) -> list[psutil.Process]:
        """The processes that hold models."""
        family = psutil.Process(self.running["ray"].pid).children(recursive=True)
        return [p for p in family if "ModelOnCPU" in " ".join(_quietly(p.cmdline) or [])]

    def _wait(self, name: str, answers: Callable[[], bool]) -> None:
        end = time.monotonic() + START
        while not answers():
            code = self.running[name].poll()
            if code is not None or time.monotonic() > end:
                text = (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{name} {'ended with ' + str(code) if code is not None else 'hangs'}:\n{text}")
            time.sleep(0.2)


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _open(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


def _says_ok(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


def _quietly(call):
    """Its value, or None when the process has ended."""
    try:
        return call()
    except psutil.NoSuchProcess:
        return None


def main() -> int:
    """Run a command with a server of the bundled model beside it: python -m tests.remote.server COMMAND..."""
    from sae_lab.lm import bundled

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server's processes end with this one
    with Server({bundled.HUB_ID: Path(bundled.folder())}) as server:
        environment = os.environ | {"NDIF_HOST": server.url, "HF_ENDPOINT": server.hub}
        with subprocess.Popen(sys.argv[1:], env=environment) as command:
            try:
                return command.wait()
            except KeyboardInterrupt:
                command.send_signal(signal.SIGINT)
                return command.wait()


if __name__ == "__main__":
    sys.exit(main())
