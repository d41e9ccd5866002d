"""Twenty widgets on one page: all are drawn, each answers for itself, and a cleared output takes its views along."""

import pathlib
import time

import pytest
from playwright.sync_api import expect

from .lab import open_notebook, write_notebook
from .test_inspector_in_lab import ENV, STAND_IN

MANY = 20
CELLS = [
    STAND_IN.read_text(encoding="utf-8"),
    "from sae_lab.widgets import FeatureInspector",
    f"many = [FeatureInspector(StandIn(), feature=i) for i in range({MANY})]\nfor one in many: display(one)",
]


@pytest.mark.browser
def test_twenty_widgets_on_a_page(tmp_path: pathlib.Path) -> None:
    with open_notebook(write_notebook(tmp_path / "many.ipynb", CELLS), env=ENV) as notebook:
        begin = time.monotonic()
        notebook.run_all()
        panels = notebook.page.locator(".saelab-inspector[data-ready='1']")
        expect(panels).to_have_count(MANY, timeout=60_000)
        print(f"{MANY} inspectors from running the cells to all drawn: {time.monotonic() - begin:.1f} s")
        panels.nth(MANY - 1).locator(".saelab-result").nth(2).click()
        expect(panels.nth(MANY - 1)).to_have_attribute("data-feature", "405")
        assert notebook.python("print([one.feature for one in many] == [*range(19), 405])") == "True"

        notebook.page.evaluate("() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        expect(notebook.page.locator(".saelab-inspector")).to_have_count(0)
        assert notebook.python("many[0].feature = 812; print(many[0].view['feature'])") == "812"  # nobody looks
        assert notebook.problems == []
