"""FeatureInspector as a user has it: in JupyterLab, with a live kernel behind it."""

import os
import pathlib
import statistics

import pytest
from playwright.sync_api import expect

from .lab import (
    DARK,
    LIGHT,
    accessibility_faults,
    chromium,
    open_notebook,
    opening_times,
    screenshots,
    watch,
    write_notebook,
)

HERE = pathlib.Path(__file__).parent
STAND_IN = HERE.parent / "widgets" / "standin.py"
TINY = HERE / "tiny.py"
# A kernel started elsewhere finds this checkout, installed or not; what else the path names stays.
ENV = {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))}


@pytest.mark.browser
def test_the_inspector_in_jupyterlab(tmp_path: pathlib.Path) -> None:
    cells = [
        STAND_IN.read_text(encoding="utf-8"),
        "from sae_lab.widgets import FeatureInspector\npanel = FeatureInspector(StandIn())\npanel",
    ]
    path = write_notebook(tmp_path / "panel.ipynb", cells)
    with open_notebook(path, env=ENV) as notebook:
        notebook.run_all()
        panel = notebook.ready(".saelab-inspector")
        expect(panel.get_by_role("heading", name="Feature 812")).to_be_visible()

        # From the screen to the kernel.
        panel.get_by_label("Search features").fill("grey")
        found = panel.get_by_role("listbox", name="Features").get_by_role("option")
        expect(found).to_have_count(1)
        found.first.click()
        expect(panel).to_have_attribute("data-feature", "17")
        assert notebook.python("print(panel.feature, panel.query)") == "17 grey"
        lens = panel.get_by_role("region", name="Logit lens")  # a noisy one is folded
        lens.locator("summary").click()
        expect(lens.get_by_role("note")).to_contain_text("trust the order")

        # From the kernel to the screen.
        notebook.python("panel.query = ''; panel.feature = 405")
        expect(panel).to_have_attribute("data-feature", "405")
        expect(panel.get_by_label("Search features")).to_have_value("")
        panel.get_by_role("button", name="Open feature 812, cosine").click()
        expect(panel).to_have_attribute("data-feature", "812")

        # Refused on screen, refused in the kernel.
        panel.get_by_label("Feature number").fill("9999")
        panel.get_by_label("Feature number").press("Enter")
        expect(panel.get_by_role("alert")).to_contain_text("from 0 to 4607")
        assert notebook.python("print(panel.feature)") == "812"

        # By keyboard alone; the notebook must not hear the keys ("a" would add a cell).
        cells_before = notebook.page.locator(".jp-Cell").count()
        token = panel.locator(".saelab-contexts .saelab-token[tabindex='0']")
        token.focus()
        for key in ["a", "b", "ArrowDown", "ArrowLeft"]:
            notebook.page.keyboard.press(key)
        assert notebook.page.locator(".jp-Cell").count() == cells_before
        expect(panel.locator(".saelab-token:focus")).to_be_visible()

        # A pointer over a token moves the marker; a feature opened anew takes an old complaint away.
        notebook.python("panel.feature = 17; panel.feature = 812")
        expect(panel.get_by_role("alert")).to_be_hidden()
        for theme, name in [(LIGHT, "light"), (DARK, "dark")]:
            notebook.set_theme(theme)
            expect(panel).to_have_attribute("data-saelab-theme", name)
            peak = panel.locator(".saelab-token[data-home]").nth(2)
            peak.hover()
            expect(panel.locator(".saelab-marker").first).to_have_attribute("visibility", "visible")
            assert notebook.accessibility_faults(".saelab-inspector") == []
        assert notebook.problems == []


@pytest.mark.browser
def test_a_live_inspector_in_jupyterlab(tmp_path: pathlib.Path) -> None:
    cells = [
        TINY.read_text(encoding="utf-8"),
        "session = sl.Session()\npanel = sl.FeatureInspector(index, session=session)\npanel",
        "other = sl.FeatureInspector(index, session=session)\nother",
        "session.edits",
    ]
    with open_notebook(write_notebook(tmp_path / "live.ipynb", cells), env=ENV) as notebook:
        notebook.run_all(timeout=300)
        panel = notebook.ready(".saelab-inspector")
        other = notebook.page.locator(".saelab-inspector").nth(1)
        edits = notebook.page.locator(".saelab-edits").first

        # A typed text is scored by the model; the marker stands at its largest value.
        panel.get_by_role("textbox", name="Try a text").fill("The river rose <b>in</b> March 👩‍🚀\nand fell.")
        expect(panel.locator(".saelab-trial .saelab-token").first).to_be_visible()
        expect(panel.locator(".saelab-trial [role=status]")).to_contain_text("largest")
        assert panel.locator(".saelab-trial b").count() == 0

        # Another feature, in both: they share a selection. From the click to the paint of what came back.
        times, rows = opening_times(notebook, panel, range(1, 7)), panel.locator(".saelab-result")
        expect(other).to_have_attribute("data-feature", rows.nth(6).get_attribute("data-feature") or "")
        print(f"feature click to paint: median {statistics.median(times):.0f} ms, slowest {max(times):.0f} ms")

        # A note is kept beside the index and shown in the list.
        panel.get_by_role("textbox", name="Label").fill("<i>rivers</i>")
        expect(panel.locator(".saelab-note [role=status]")).to_contain_text("saved")
        assert notebook.python("print(index.notes[panel.feature].label)") == "<i>rivers</i>"
        expect(panel.locator("[aria-selected=true] .saelab-result-label")).to_have_text("<i>rivers</i>")

        # Edits go on the session's stack, which shows and switches them.
        panel.get_by_role("button", name="Ablate").click()
        expect(edits.get_by_role("listitem")).to_have_count(1)
        edits.get_by_role("checkbox").uncheck()
        assert notebook.python("print(list(session.edits))") == "[]"
        edits.get_by_role("button", name="Remove").focus()
        notebook.page.keyboard.press("Enter")
        expect(edits.get_by_role("listitem")).to_have_count(0)

        # Pin one, open another: side by side.
        panel.get_by_role("button", name="Pin").click()
        rows.nth(0).click()
        expect(panel.locator(".saelab-compare")).to_contain_text("cosine")

        panel.get_by_role("button", name="Copy as code").click()
        expect(panel.locator(".saelab-code pre")).to_contain_text("sl.index_features(sae, lm, store")
        assert notebook.accessibility_faults(".saelab-inspector") == []
        assert notebook.accessibility_faults(".saelab-edits") == []
        panel.get_by_role("button", name="Hide the code").click()
        panel.get_by_role("button", name="Show the weakest too").click()
        expect(panel.locator(".saelab-group-label").last).to_contain_text("bottom")

        folder = screenshots(tmp_path)
        for theme, name in [(LIGHT, "light"), (DARK, "dark")]:
            notebook.set_theme(theme)
            expect(panel).to_have_attribute("data-saelab-theme", name)
            notebook.screenshot(panel, folder / f"live_inspector_{name}.png")
        page = notebook.python(f"print(panel.to_html({str(tmp_path / 'panel.html')!r}))")

        # The kernel restarts: the panel says so, and offers nothing that would not work.
        notebook.restart_kernel()
        expect(panel.locator(".saelab-lost").first).to_contain_text("run the cell again")
        expect(panel).to_have_attribute("data-connection", "lost")
        assert panel.locator("[data-needs]:not([inert])").count() == 0
        expect(panel.locator(".saelab-context").first).to_be_visible()
        assert [p for p in notebook.problems if "restart" not in p.lower()] == []

    # The page that was written needs neither kernel nor network.
    with chromium() as alone:
        problems = watch(alone)
        alone.goto(f"file://{page}")
        kept = alone.locator(".saelab-inspector")
        expect(kept).to_have_attribute("data-ready", "1")
        third = kept.locator(".saelab-result").nth(2)
        third.click()
        expect(kept).to_have_attribute("data-feature", third.get_attribute("data-feature") or "")
        kept.get_by_label("Sort features by").select_option("density")
        kept.locator(".saelab-token[data-home]").first.hover()
        expect(kept.locator(".saelab-marker").first).to_have_attribute("visibility", "visible")
        expect(kept.get_by_role("button", name="Copy as code")).to_be_hidden()
        assert accessibility_faults(alone, ".saelab-inspector") == []
        alone.screenshot(path=folder / "inspector_page.png")
        assert problems == []
