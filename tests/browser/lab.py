"""A real JupyterLab in a real Chromium, for tests of what a person sees.

    with open_notebook(tmp_path / "panel.ipynb") as notebook:
        notebook.run_all(timeout=300)
        panel = notebook.ready(".saelab-inspector")
        panel.get_by_role("option").first.click()
        assert notebook.python("print(panel.feature)") == "812"
        assert notebook.problems == []

The server listens on a free loopback port behind a token, with a configuration of its own in a temporary
folder; the browser cannot resolve any other host. Both end with the ``with`` block, and nothing else does.
Timeouts are seconds.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import nbformat
from playwright.sync_api import ConsoleMessage, Locator, Page, Request, WebSocket, expect, sync_playwright

LOOPBACK = "127.0.0.1"
LIGHT, DARK = "JupyterLab Light", "JupyterLab Dark"
AXE = pathlib.Path(__file__).parents[2] / "widgets" / "node_modules" / "axe-core" / "axe.min.js"

_CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
_CHROMIUM_ARGS = [
    # No name resolves and no proxy helps: a page that asks for a CDN fails here as it would offline.
    # (Playwright's own request interception would switch the HTTP cache off.)
    f"--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE {LOOPBACK}",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers often have a /dev/shm of 64 MB
]
_SHELL = "window.jupyterapp?.shell"
_NOTEBOOK = f"{_SHELL}?.currentWidget"
_KERNEL = f"{_NOTEBOOK}?.sessionContext?.session?.kernel"


class NotebookError(AssertionError):
    """A cell, or code sent to the kernel, raised."""


@dataclasses.dataclass(frozen=True)
class Server:
    """A running JupyterLab: its address, its token, and the process that a test may end."""

    url: str
    token: str
    pid: int


class Notebook:
    """One open notebook: run it, talk to its kernel, look at what it shows.

    ``page`` is Playwright's page, for all else. ``problems`` collects console errors, uncaught exceptions of
    the page and requests to other hosts, from the first moment on.
    """

    def __init__(self, page: Page, problems: list[str]) -> None:
        self.page = page
        self.problems = problems

    def run_all(self, timeout: float = 120) -> None:
        """Run every cell; returns when all are done; NotebookError has the traceback if one raised."""
        # Not awaited inside evaluate(), which knows no timeout.
        self.page.evaluate(
            """() => {
                window.__runAll = 'running';
                const end = (how) => { window.__runAll = how; };
                window.jupyterapp.commands.execute('notebook:run-all-cells').then(
                    (ok) => end(ok === false ? 'failed' : 'done'), (error) => end(`failed: ${error}`));
            }"""
        )
        # A slow poll: the two cores are the kernel's.
        self.page.wait_for_function(
            "() => window.__runAll !== 'running'", timeout=1000 * timeout, polling=250
        )
        if errors := self.errors():
            raise NotebookError("\n\n".join(errors))
        if (how := self.page.evaluate("window.__runAll")) != "done":
            raise NotebookError(f"running all cells {how}")

    def errors(self) -> list[str]:
        """The tracebacks that stand in the notebook's outputs, in order."""
        cells = self.page.evaluate(f"() => {_NOTEBOOK}.content.model.sharedModel.toJSON().cells")
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        return ["\n".join(o["traceback"]) for o in outputs if o["output_type"] == "error"]

    def python(self, code: str, timeout: float = 30) -> str:
        """Run code in the notebook's kernel, behind whatever runs there; returns what it printed."""
        answer = self.page.evaluate(
            f"""async ([code, timeout]) => {{
                const future = {_KERNEL}.requestExecute({{ code, store_history: false }});
                const answer = {{ printed: '', error: null }};
                future.onIOPub = ({{ header, content }}) => {{
                    if (header.msg_type === 'stream') answer.printed += content.text;
                    if (header.msg_type === 'error') answer.error = content.traceback.join('\\n');
                }};
                const late = new Promise((_, reject) => setTimeout(() => reject('no answer'), timeout));
                await Promise.race([future.done, late]);
                return answer;
            }}""",
            [code, 1000 * timeout],
        )
        if answer["error"] is not None:
            raise NotebookError(answer["error"])
        return answer["printed"].strip()

    def restart_kernel(self, timeout: float = 60) -> None:
        """Restart the kernel, as the user's button does; returns when the new one is idle."""
        self.page.evaluate(f"() => {_KERNEL}.restart()")
        self.page.wait_for_function(
            f"() => {_KERNEL}?.connectionStatus === 'connected' && {_KERNEL}?.status === 'idle'",
            timeout=1000 * timeout,
            polling=100,
        )

    def accessibility_faults(self, selector: str) -> list[str]:
        """What axe-core calls serious or critical in the parts that match ``selector``."""
        return accessibility_faults(self.page, selector)

    def ready(self, selector: str, timeout: float = 30) -> Locator:
        """The first widget that matches ``selector``, once it has drawn itself (``data-ready="1"``)."""
        # An idle kernel is not enough: the widget's view is made after that.
        widget = self.page.locator(f"{selector}[data-ready='1']").first
        expect(widget).to_be_visible(timeout=1000 * timeout)
        return self.page.locator(selector).first

    def set_theme(self, theme: str, timeout: float = 30) -> None:
        """Change JupyterLab's theme, to ``LIGHT`` or ``DARK``."""
        self.page.evaluate(
            "theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", theme
        )
        expect(self.page.locator("body")).to_have_attribute(
            "data-jp-theme-name", theme, timeout=1000 * timeout
        )

    def screenshot(self, part: Locator, path: pathlib.Path, hover: Locator | None = None) -> None:
        """A picture of the whole of ``part``, in a window that holds it, the pointer over ``hover``."""
        before = self.page.viewport_size
        box = part.bounding_box()
        assert before is not None and box is not None, "only something visible can be pictured"
        self.page.evaluate(f"() => {{ {_SHELL}.collapseLeft(); {_SHELL}.collapseRight(); }}")
        # The rest is JupyterLab's own bars.
        self.page.set_viewport_size({"width": before["width"], "height": int(box["height"]) + 300})
        part.scroll_into_view_if_needed()
        if hover is not None:
            hover.hover()  # last: what resizes or scrolls moves the page from under the pointer
        part.screenshot(path=path, animations="disabled")
        self.page.set_viewport_size(before)


def opening_times(notebook: Notebook, inspector: Locator, rows: Iterable[int]) -> list[float]:
    """Milliseconds from a click on each of these rows of an inspector's list to the paint of what came back.

    Between click and paint the page is not asked anything: on a notebook of some length a look by Playwright (the check
    behind ``click()``, a poll of ``expect``) holds up the page's own thread for a tenth of a second.
    """
    times, listed = [], inspector.locator(".saelab-result")
    for row in rows:
        listed.nth(row).scroll_into_view_if_needed()
        notebook.page.wait_for_timeout(300)  # the list may still move while the feature before is laid out
        listed.nth(row).hover()
        notebook.page.wait_for_timeout(200)
        notebook.page.mouse.down()
        notebook.page.mouse.up()
        notebook.page.wait_for_timeout(400)
        expect(inspector).to_have_attribute("data-feature", listed.nth(row).get_attribute("data-feature") or "")
        times.append(float(inspector.get_attribute("data-open-ms") or "nan"))
    return times


def exported(page: Page, widget: Locator, what: str, folder: pathlib.Path) -> pathlib.Path:
    """The file that a widget's Export gives."""
    widget.locator("summary", has_text="Export").click()
    with page.expect_download() as waiting:
        widget.locator(".saelab-export").get_by_role("button", name=what).click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


@contextlib.contextmanager
def open_notebook(
    path: pathlib.Path,
    *,
    env: Mapping[str, str] | None = None,
    viewport: tuple[int, int] = (1280, 1000),
    start_timeout: float = 60,
) -> Iterator[Notebook]:
    """A server on the folder of ``path`` and a browser with that notebook open and its kernel idle.

    JupyterLab may save: give it a copy (``fresh_copy``). ``env`` is added to the environment of the kernels.
    """
    with jupyter_lab(path.parent, env=env, timeout=start_timeout) as server, chromium(viewport) as page:
        problems = watch(page)
        page.goto(f"{server.url}/lab/tree/{quote(path.name)}?token={server.token}&reset", wait_until="commit")
        page.wait_for_function(
            f"() => {_KERNEL}?.connectionStatus === 'connected' && {_KERNEL}?.status === 'idle'",
            timeout=1000 * start_timeout,
            polling=100,
        )
        yield Notebook(page, problems)


@contextlib.contextmanager
def jupyter_lab(
    folder: pathlib.Path, *, env: Mapping[str, str] | None = None, timeout: float = 60
) -> Iterator[Server]:
    """JupyterLab on ``folder``; the user's own Jupyter configuration is neither read nor written."""
    with tempfile.TemporaryDirectory(prefix="lab") as temporary:
        own = pathlib.Path(temporary)
        token, port = secrets.token_hex(16), free_port()
        log = own / "server.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                _command(folder, port, token), env=_environment(own, env), stdout=output, stderr=output
            )
        server = Server(f"http://{LOOPBACK}:{port}", token, process.pid)
        try:
            _await_server(server, process, log, timeout)
            yield server
        finally:
            _end(process)


def _command(folder: pathlib.Path, port: int, token: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--ServerApp.ip={LOOPBACK}",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",  # another port would be somebody else's server
        f"--ServerApp.root_dir={folder}",
        f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True",  # window.jupyterapp
        "--LabApp.extension_manager=readonly",
    ]


def _environment(own: pathlib.Path, more: Mapping[str, str] | None) -> dict[str, str]:
    names = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"]
    names += ["JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"]
    places = {name: str(own / name.lower()) for name in names}
    settings = pathlib.Path(places["JUPYTERLAB_SETTINGS_DIR"], "@jupyterlab", "apputils-extension")
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}  # else it asks the internet, and then the user
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    return {**os.environ, **places, **(more or {})}


def _await_server(
    server: Server, process: subprocess.Popen[bytes], log: pathlib.Path, timeout: float
) -> None:
    request = urllib.request.Request(f"{server.url}/api", headers={"Authorization": f"token {server.token}"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended with code {process.returncode}:\n{log.read_text()}")
        with contextlib.suppress(OSError), direct.open(request, timeout=2):
            return
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not answer within {timeout} s:\n{log.read_text()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # the server ends its kernels
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def chromium(viewport: tuple[int, int] = (1280, 1000)) -> Iterator[Page]:
    """A page of a headless Chromium: the system's if there is one, else Playwright's own."""
    installed = next(filter(None, map(shutil.which, _CHROMIUM_NAMES)), None)
    args = _CHROMIUM_ARGS + (["--no-sandbox"] if os.geteuid() == 0 else [])  # root has no sandbox to use
    width, height = viewport
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed, args=args)
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


def accessibility_faults(page: Page, selector: str) -> list[str]:
    """What axe-core calls serious or critical in the parts of a page that match ``selector``."""
    assert AXE.exists(), f"no {AXE}: `make widgets` installs it"
    page.evaluate(AXE.read_text(encoding="utf-8"))  # as text: a page's policy may forbid script elements
    found = page.evaluate(
        """async (selector) => {
            const { violations } = await axe.run({ include: [[selector]] }, { resultTypes: ['violations'] });
            return violations.filter(({ impact }) => impact === 'serious' || impact === 'critical').map(
                ({ id, help, nodes }) => `${id}: ${help}: ${nodes.map(({ html }) => html.slice(0, 200)).join(' | ')}`);
        }""",
        selector,
    )
    return list(found)


def watch(page: Page) -> list[str]:
    """A list that grows by every console error, uncaught exception and request to another host."""
    problems: list[str] = []

    def console(message: ConsoleMessage) -> None:
        if message.type == "error":
            problems.append(f"console: {message.text} ({message.location.get('url', '')})")

    def request(asked: Request | WebSocket) -> None:
        address = urlsplit(asked.url)
        if address.scheme in ("http", "https", "ws", "wss") and address.hostname != LOOPBACK:
            problems.append(f"request to another host: {asked.url}")

    page.on("console", console)
    page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
    page.on("request", request)
    page.on("websocket", request)
    return problems


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def write_notebook(path: pathlib.Path, cells: Sequence[str]) -> pathlib.Path:
    """A notebook of these code cells, without outputs."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path


def fresh_copy(notebook: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy of a notebook without outputs: what a test then sees was made by the test."""
    content: Any = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    copy = folder / notebook.name
    nbformat.write(content, copy)
    return copy


def screenshots(default: pathlib.Path) -> pathlib.Path:
    """Where screenshots go: the folder in ``SAE_LAB_SCREENSHOTS``, else ``default``."""
    folder = pathlib.Path(os.environ.get("SAE_LAB_SCREENSHOTS") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
