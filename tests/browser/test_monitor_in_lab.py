"""TrainingMonitor as a user has it: curves that grow while the notebook stays free, and a hand on what runs."""

import pathlib
import re

import pytest
from playwright.sync_api import expect

from .lab import DARK, LIGHT, Notebook, open_notebook, screenshots, write_notebook

REPOSITORY = pathlib.Path(__file__).parents[2]

CELLS = [
    """import pathlib, tempfile, time, torch
import sae_lab as sl
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
dictionary = torch.nn.functional.normalize(torch.randn(256, 48, generator=g), dim=1)
on = torch.rand(20_000, 256, generator=g)
x = (on * (on > 0.97)) @ dictionary + 0.05 * torch.randn(20_000, 48, generator=g)
path = pathlib.Path(tempfile.mkdtemp()) / "run"
config = sl.TrainConfig(steps=4000, batch_size=256, lr=2e-3, dead_after=20_000)
sae = sl.BatchTopK(48, 256, k=16)""",
    "monitor = sl.TrainingMonitor(sae, x, config, path=path)\nmonitor",
    "swept = sl.TrainingMonitor()\nswept",
]
SWEEP = """grid = {"TopK": {"k": [4, 8, 16]}, "JumpReLU": {"sparsity": 0.1}}
sweep = sl.sweep(grid, x, sl.TrainConfig(steps=600, batch_size=256, lr=2e-3), d_sae=256, callbacks=[swept])"""


def run_beside(notebook: Notebook, code: str) -> None:
    """Run code in the kernel without waiting for it."""
    kernel = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
    notebook.page.evaluate(f"code => {{ {kernel}.requestExecute({{ code }}); }}", code)


@pytest.mark.browser
def test_the_monitor_in_jupyterlab(tmp_path: pathlib.Path) -> None:
    path = write_notebook(tmp_path / "monitor.ipynb", CELLS)
    with open_notebook(path, env={"PYTHONPATH": str(REPOSITORY)}, viewport=(1280, 1200)) as notebook:
        notebook.run_all()
        panel = notebook.page.locator(".saelab-monitor").nth(0)
        expect(panel).to_have_attribute("data-ready", "1")
        expect(panel.locator(".saelab-state")).to_have_text("○ waiting")

        # It trains, the curves grow, and the kernel answers meanwhile.
        panel.get_by_role("button", name="Start").click()
        expect(panel).to_have_attribute("data-state", "running")
        curve = panel.locator("[data-measure='fvu'] .saelab-line").first
        expect(curve).to_have_attribute("d", re.compile("M.*L.*L"), timeout=20_000)
        assert notebook.python("print(monitor.state, 6 * 7)") == "running 42"

        # Pause, by keyboard; another k; and on.
        panel.get_by_role("button", name="Pause").focus()
        notebook.page.keyboard.press("Enter")
        expect(panel).to_have_attribute("data-state", "paused")
        step = notebook.python("print(monitor.status['step'])")
        k = panel.get_by_label("k", exact=True)
        k.fill("999")
        k.press("Enter")
        expect(panel.get_by_role("alert").first).to_contain_text("k must be an integer from 1 to d_sae=256, got 999")
        k.fill("8")
        k.press("Enter")
        expect(panel.get_by_role("alert").first).to_be_hidden()
        assert notebook.python("print(monitor.status['step'])") == step
        panel.get_by_role("button", name="Resume").click()
        expect(panel.locator(".saelab-monitor-changes li")).to_have_text(f"step {int(step):,}: k 16 → 8")
        expect(panel.locator("[data-measure='l0'] .saelab-note-line")).to_have_count(1)
        notebook.page.wait_for_timeout(2500)

        # From the kernel to the screen; then stop and save.
        notebook.python("monitor.change(lr=5e-4)")
        expect(panel.get_by_label("Peak learning rate")).to_have_value("0.0005")
        notebook.page.wait_for_timeout(1500)
        folder = screenshots(tmp_path)
        for theme, name in [(LIGHT, "light"), (DARK, "dark")]:
            notebook.set_theme(theme)
            expect(panel).to_have_attribute("data-saelab-theme", name)
            fvu = panel.locator("[data-measure='fvu'] svg").first
            notebook.screenshot(panel, folder / f"monitor_{name}.png", hover=fvu)
        panel.get_by_role("button", name="Stop and save").click()
        expect(panel.locator(".saelab-state")).to_have_text("■ stopped early, and complete", timeout=20_000)
        saved = notebook.python("run = monitor.wait(1); print(sl.load(path).k, run.stopped, len(run.changes))")
        assert saved == "8 True 3"

        # A sweep in a cell: a line for each coder, and clicks are heard while the cell runs.
        sweep = notebook.page.locator(".saelab-monitor").nth(1)
        run_beside(notebook, SWEEP)
        expect(sweep).to_have_attribute("data-state", "running", timeout=20_000)
        expect(sweep.locator("[data-measure='l0'] .saelab-chart-plot .saelab-line")).to_have_count(4)
        sweep.get_by_role("button", name="Pause").click()
        expect(sweep).to_have_attribute("data-state", "paused", timeout=20_000)  # when the step is done
        sweep.get_by_role("combobox", name="Coder").select_option("TopK k=4")
        sweep.get_by_label("k", exact=True).fill("6")
        sweep.get_by_role("button", name="Apply").click()
        sweep.get_by_role("button", name="Resume").click()
        expect(sweep.locator(".saelab-monitor-changes li")).to_contain_text("TopK k=4, k 4 → 6")
        sweep.get_by_role("combobox", name="Coder").select_option("all")
        notebook.page.wait_for_timeout(1500)
        notebook.screenshot(sweep, folder / "monitor_sweep.png")
        sweep.get_by_role("button", name="Stop and save").click()
        expect(sweep.locator(".saelab-state")).to_contain_text("stopped early", timeout=30_000)
        ends = notebook.python("print(sweep.coders[0].k, [len(run.history) < 600 for run in sweep.runs])")
        assert ends == "6 [True, True, True, True]"
        assert notebook.problems == []
