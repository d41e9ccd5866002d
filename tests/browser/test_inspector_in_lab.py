"""FeatureInspector as a user has it: in JupyterLab, with a live kernel behind it."""

import pathlib

import pytest
from playwright.sync_api import expect

from .lab import DARK, LIGHT, open_notebook, screenshots, write_notebook

STAND_IN = pathlib.Path(__file__).parents[1] / "widgets" / "standin.py"
REPOSITORY = pathlib.Path(__file__).parents[2]

CELLS = [
    STAND_IN.read_text(encoding="utf-8"),
    "from sae_lab.widgets import FeatureInspector\npanel = FeatureInspector(StandIn())\npanel",
]


@pytest.mark.browser
def test_the_inspector_in_jupyterlab(tmp_path: pathlib.Path) -> None:
    path = write_notebook(tmp_path / "panel.ipynb", CELLS)
    # A kernel started elsewhere finds this checkout, installed or not.
    with open_notebook(path, env={"PYTHONPATH": str(REPOSITORY)}) as notebook:
        notebook.run_all()
        panel = notebook.ready(".saelab-inspector")
        expect(panel.get_by_role("heading", name="Feature 812")).to_be_visible()

        # From the screen to the kernel.
        panel.get_by_label("Search features by token").fill("grey")
        found = panel.get_by_role("listbox", name="Features").get_by_role("option")
        expect(found).to_have_count(1)
        found.first.click()
        expect(panel).to_have_attribute("data-feature", "17")
        assert notebook.python("print(panel.feature, panel.query)") == "17 grey"
        expect(panel.get_by_role("note")).to_contain_text("Caution")

        # From the kernel to the screen.
        notebook.python("panel.query = ''; panel.feature = 405")
        expect(panel).to_have_attribute("data-feature", "405")
        expect(panel.get_by_label("Search features by token")).to_have_value("")
        panel.get_by_role("button", name="Open feature 812").click()
        expect(panel).to_have_attribute("data-feature", "812")

        # Refused on screen, refused in the kernel.
        panel.get_by_label("Feature number").fill("9999")
        panel.get_by_label("Feature number").press("Enter")
        expect(panel.get_by_role("alert")).to_contain_text("from 0 to 4607")
        assert notebook.python("print(panel.feature)") == "812"

        # By keyboard alone; the notebook must not hear the keys ("a" would add a cell).
        cells = notebook.page.locator(".jp-Cell").count()
        token = panel.locator(".saelab-token[tabindex='0']")
        token.focus()
        for key in ["a", "b", "ArrowDown", "ArrowLeft"]:
            notebook.page.keyboard.press(key)
        assert notebook.page.locator(".jp-Cell").count() == cells
        expect(panel.locator(".saelab-token:focus")).to_be_visible()

        # A pointer over a token moves the marker; a feature opened anew takes an old complaint away.
        notebook.python("panel.feature = 17; panel.feature = 812")
        expect(panel.get_by_role("alert")).to_be_hidden()
        folder = screenshots(tmp_path)
        for theme, name in [(LIGHT, "light"), (DARK, "dark")]:
            notebook.set_theme(theme)
            expect(panel).to_have_attribute("data-saelab-theme", name)
            peak = panel.locator(".saelab-token[data-home]").nth(2)
            peak.hover()
            expect(panel.locator(".saelab-marker")).to_have_attribute("visibility", "visible")
            notebook.screenshot(panel, folder / f"inspector_{name}.png", hover=peak)

        assert notebook.problems == []
