"""The widgets in marimo: they draw, a click makes a round trip, the theme is followed, no other host is asked."""

import contextlib
import json
import os
import pathlib
import secrets
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, expect

from .lab import LOOPBACK, chromium, exported, free_port, screenshots, watch

REPOSITORY = pathlib.Path(__file__).parents[2]
NOTEBOOK = """
# /// script
# [tool.marimo.display]
# theme = "{theme}"
# ///
import marimo

app = marimo.App()


@app.cell
def _():
    import marimo as mo
    import torch
    import transformers

    import sae_lab as sl
    from sae_lab.lm import bundled
    from tests.widgets.standin import StandIn

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled.folder())
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    lm = sl.LM(transformers.LlamaForCausalLM(config).eval(), tokenizer=tokenizer)
    sae = sl.TopK(48, 128, k=6).eval()
    sae.reads = sae.writes = (sl.Site("resid_post", layer=1),)
    return StandIn, lm, mo, sae, sl


@app.cell
def _(StandIn, mo, sl):
    inspector = mo.ui.anywidget(sl.FeatureInspector(StandIn()))
    inspector
    return (inspector,)


@app.cell
def _(inspector, mo):
    mo.md(f"open in Python: {{inspector.value['feature']}}")
    return


@app.cell
def _(lm, mo, sae, sl):
    panel = mo.ui.anywidget(sl.TokenFeatures(lm, sae, "The river froze in January"))
    panel
    return (panel,)


@app.cell
def _(mo, panel):
    mo.md(f"token in Python: {{panel.value['token']}}")
    return


if __name__ == "__main__":
    app.run()
"""


@contextlib.contextmanager
def marimo(notebook: pathlib.Path, timeout: float = 60) -> Iterator[str]:
    """marimo's server of one notebook as an app, with a configuration of its own; its address."""
    own, port, token = notebook.parent / "home", free_port(), secrets.token_hex(16)
    own.mkdir()
    env = {**os.environ, "HOME": str(own), "XDG_CONFIG_HOME": str(own), "PYTHONPATH": str(REPOSITORY)}
    env |= {"SAE_LAB_CACHE": os.environ.get("SAE_LAB_CACHE", str(pathlib.Path.home() / ".cache" / "sae_lab"))}
    command = [sys.executable, "-m", "marimo", "run", str(notebook), "--headless", "--host", LOOPBACK, "--no-sandbox"]
    command += ["--port", str(port), "--token", "--token-password", token]
    with (own / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + timeout
    try:
        while True:
            with contextlib.suppress(OSError), direct.open(f"http://{LOOPBACK}:{port}/health", timeout=2):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"marimo did not start:\n{(own / 'server.log').read_text()}")
            time.sleep(0.1)
        yield f"http://{LOOPBACK}:{port}/?access_token={token}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def ready(part: Locator) -> Locator:
    expect(part).to_have_attribute("data-ready", "1", timeout=60_000)
    return part


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_widgets_in_marimo(tmp_path: pathlib.Path, theme: str) -> None:
    path = tmp_path / "notebook.py"
    path.write_text(NOTEBOOK.format(theme=theme).lstrip(), encoding="utf-8")
    with marimo(path) as address, chromium((1280, 1400)) as page:
        problems = watch(page)
        page.goto(address)
        inspector, panel = ready(page.locator(".saelab-inspector")), ready(page.locator(".saelab-tokens"))

        # A trait: the screen sets it, Python answers with what to show, and another cell hears of it.
        inspector.locator(".saelab-result").nth(2).click()
        expect(inspector).not_to_have_attribute("data-feature", "812")
        ready(inspector)
        expect(page.get_by_text(f"open in Python: {inspector.get_attribute('data-feature')}")).to_be_visible()

        # A call: a message there, and one back.
        panel.locator(".saelab-token").nth(2).click()
        expect(panel.get_by_role("heading", name="Token 2")).to_be_visible()
        expect(panel.locator("tbody tr")).to_have_count(6)
        ready(panel)
        panel.get_by_label("Prompt").fill("Ships lay by the shore")
        expect(panel.get_by_role("heading", name="shore")).to_be_visible()

        for widget in (inspector, panel):
            expect(widget).to_have_attribute("data-saelab-theme", theme)
        panel.screenshot(path=screenshots(tmp_path) / f"marimo_{theme}.png")
        assert [p for p in problems if "another host" in p] == []
        assert problems == []


# The same day as in JupyterLab (test_working_day.py), on a tiny model.
LABEL = "rivers in spring"
DAY = """
import marimo

app = marimo.App(width="full")


@app.cell
def _():
{tiny}
    from sae_lab.widgets.feature_map import FeatureMap

    points = torch.randn(96, 2).numpy()
    session = sl.Session()
    return FeatureMap, index, lm, points, sae, session, sl


@app.cell
def _(index, session, sl):
    inspector = sl.FeatureInspector(index, session=session)
    inspector
    return


@app.cell
def _(lm, sae, session, sl):
    tokens = sl.TokenFeatures(lm, sae, "The river rose in the spring", session=session)
    tokens
    return


@app.cell
def _(lm, sae, session, sl):
    chat = [{{"role": "user", "content": "What does a river do?"}}]
    sliders = sl.SteeringSliders(lm, sae, prompt=chat, session=session, max_new_tokens=4)
    sliders
    return


@app.cell
def _(lm, session, sl):
    grid = sl.PatchingGrid(lm, "The river rose", "The river fell", session=session)
    grid
    return


@app.cell
def _(FeatureMap, index, points, session):
    shown = FeatureMap(index, points, session=session)
    shown
    return


if __name__ == "__main__":
    app.run()
"""


@pytest.mark.browser
def test_a_day_in_marimo(tmp_path: pathlib.Path) -> None:
    tiny = (pathlib.Path(__file__).parent / "tiny.py").read_text(encoding="utf-8").partition('"""\n\n')[2]
    path = tmp_path / "day.py"
    path.write_text(DAY.format(tiny=textwrap.indent(tiny, "    ")).lstrip(), encoding="utf-8")
    with marimo(path) as address, chromium((1400, 1400)) as page:
        problems = watch(page)
        page.goto(address)
        inspector, tokens, sliders, grid, shown = (
            ready(page.locator(f".saelab-{kind}"))
            for kind in ("inspector", "tokens", "steering", "patching", "feature_map")
        )
        inspector.get_by_label("Search features").fill('"The river rose in the spring"')
        expect(inspector).to_contain_text("for sentence", timeout=30_000)
        inspector.locator(".saelab-result").first.click()
        ready(inspector)
        inspector.get_by_role("textbox", name="Label").fill(LABEL)
        expect(inspector.locator(".saelab-note [role=status]")).to_contain_text("saved")
        inspector.get_by_role("button", name="Steer", exact=True).click()
        for widget in (inspector, tokens, sliders, shown):
            expect(widget).to_contain_text(LABEL, timeout=30_000)
        expect(sliders.locator("textarea").first).to_have_value("What does a river do?")
        grid.locator(".saelab-heat [data-row='-1'][data-column='2']").click()
        expect(grid).to_contain_text("patched together in one run", timeout=30_000)
        page.screenshot(path=screenshots(tmp_path) / "marimo_day.png", full_page=True)
        data = exported(page, inspector, "Data", tmp_path)
        assert json.loads(data.read_text(encoding="utf-8"))["note"]["label"] == LABEL
        written = exported(page, inspector, "Page", tmp_path)
        assert problems == []
        page.goto(f"file://{written}")
        expect(page.locator(".saelab-inspector")).to_contain_text(LABEL)
