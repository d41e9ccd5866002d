"""A working day in JupyterLab on the real model and on texts that nothing else here uses: the reference pages of the
Python language. Find a feature by a sentence, label it, see the label wherever its number stands, steer a chat with it,
patch a column, save, open the file without a kernel, export a page and open that from disk."""

import json
import pathlib
import shutil
from urllib.parse import quote

import pytest
from playwright.sync_api import Locator, expect

from .lab import (
    DARK,
    LIGHT,
    Notebook,
    chromium,
    exported,
    jupyter_lab,
    open_notebook,
    screenshots,
    watch,
    write_notebook,
)

LABEL = "raising exceptions"
SENTENCE = '"The statement raises an exception when the name is not found"'
CELLS = [
    """
import tempfile
from pydoc_data.topics import topics

import sae_lab as sl
from sae_lab import geometry
from sae_lab.widgets.feature_map import FeatureMap

lm, sae = sl.LM(), sl.load("smollm2-135m/resid_post-8")
pages = [" ".join(page.split()) for page in topics.values() if len(page) > 600]
folder = tempfile.mkdtemp()
store = sl.harvest(lm, sae.site, sl.load_text(pages), 8_000, path=folder + "/store")
index = sl.index_features(sae, lm, store, path=folder + "/index")
session = sl.Session()
""",
    "inspector = sl.FeatureInspector(index, session=session)\ninspector",
    "tokens = sl.TokenFeatures(lm, sae, 'The function raises an error', session=session)\ntokens",
    "chat = [{'role': 'user', 'content': 'What does this function do?'}]\n"
    "sliders = sl.SteeringSliders(lm, sae, prompt=chat, session=session, max_new_tokens=12)\nsliders",
    "grid = sl.PatchingGrid(lm, 'The function raises an error', 'The function returns an error', coder=sae, "
    "session=session)\ngrid",
    "shown = FeatureMap(index, geometry.clusters(sae), session=session)\nshown",
    "session.edits",
]
WIDGETS = ("inspector", "tokens", "steering", "patching", "feature_map", "edits")


def pictures(notebook: Notebook, widgets: dict[str, Locator], folder: pathlib.Path) -> None:
    """Each widget, wide and narrow, light and dark."""
    for width in (1400, 700):
        notebook.page.set_viewport_size({"width": width, "height": 1000})
        for theme, name in ((LIGHT, "light"), (DARK, "dark")):
            notebook.set_theme(theme)
            for kind, widget in widgets.items():
                expect(widget).to_have_attribute("data-saelab-theme", name)
                notebook.screenshot(widget, folder / f"day_{kind}_{width}_{name}.png")
                wide = "(root) => root.scrollWidth - root.clientWidth"
                assert widget.evaluate(wide) <= 1, f"{kind} is wider than its cell at {width}"
    notebook.set_theme(LIGHT)


@pytest.mark.browser
def test_from_a_sentence_to_a_page_on_disk(tmp_path: pathlib.Path) -> None:
    path, folder = write_notebook(tmp_path / "day.ipynb", CELLS), screenshots(tmp_path)
    with open_notebook(path, env={"SAE_LAB_DATA": str(tmp_path / "data")}, viewport=(1400, 1000)) as notebook:
        notebook.run_all(timeout=600)
        widgets = {kind: notebook.ready(f".saelab-{kind}") for kind in WIDGETS}
        inspector, tokens, sliders, grid = (widgets[kind] for kind in WIDGETS[:4])

        # Find by a sentence, label.
        inspector.get_by_label("Search features").fill(SENTENCE)
        found = inspector.locator(".saelab-result")
        wanted = notebook.python(f"print(next(i for i in index.search({SENTENCE!r}).features if any('raise' in t for t "
                                 "in index.top_tokens(i))))", 60)  # fmt: skip
        chosen = inspector.locator(f".saelab-result[data-feature='{wanted}']")
        expect(chosen).to_be_visible(timeout=30_000)
        assert found.count() > 1
        chosen.click()
        expect(inspector).to_have_attribute("data-feature", wanted)
        inspector.get_by_role("textbox", name="Label").fill(LABEL)
        expect(inspector.locator(".saelab-note [role=status]")).to_contain_text("saved")

        # Steer a chat with it.
        inspector.get_by_role("button", name="Steer", exact=True).click()
        slider = sliders.get_by_role("slider").first
        slider.focus()
        for _ in range(4):
            notebook.page.keyboard.press("ArrowRight")
        notebook.page.wait_for_timeout(500)
        expect(sliders).to_have_attribute("data-ready", "1")
        again = "lm.generate(chat, session.edits, 12) == sliders.steered and sliders.shown == sliders.version"
        for _ in range(60):
            if notebook.python(f"print({again})", 60) == "True":
                break
            notebook.page.wait_for_timeout(500)
        else:
            raise AssertionError("the sliders never show what the edits do")
        assert notebook.python("print(sliders.prompt == chat)") == "True"

        # The label stands in all six. A grid names the features of its open cell; column 0 is position 1.
        row = 29 - 8  # the last layer is the top row
        grid.locator(f".saelab-heat [data-row='{row}'][data-column='2'][role=gridcell]").click()
        tokens.get_by_role("listbox", name="Tokens").get_by_role("option").nth(3).click()
        for kind, widget in widgets.items():
            expect(widget, f"the label in {kind}").to_contain_text(LABEL, timeout=30_000)

        # Patch a column: one run, one number, in its header; then each cell alone.
        grid.locator(".saelab-heat [data-row='-1'][data-column='2']").click()
        for _ in range(60):
            if notebook.python("print(len(grid.joint))") != "0":
                break
            notebook.page.wait_for_timeout(500)
        kind, layers, positions, value = json.loads(notebook.python("import json; print(json.dumps(grid.joint[0]))"))
        assert (len(layers), positions) == (30, [3]) and kind == "resid_post"
        assert 0.5 < value < 1.5, "the one token that differs, in all layers"

        pictures(notebook, widgets, folder)
        for kind in WIDGETS:
            assert notebook.accessibility_faults(f".saelab-{kind}") == [], kind
        page = exported(notebook.page, inspector, "Page", folder)
        notebook.page.wait_for_timeout(1500)  # the saved form follows a second after the last action
        notebook.page.keyboard.press("Control+s")
        clean = "() => !window.jupyterapp.shell.currentWidget.context.model.dirty"
        notebook.page.wait_for_function(clean, timeout=10_000)
        steered = notebook.python("print(sliders.steered)")
        assert notebook.problems == []

    # Opened again, without a kernel: JupyterLab asks for one where the file names none.
    again = tmp_path / "again"
    again.mkdir()
    content = json.loads(path.read_text(encoding="utf-8"))
    content["metadata"] = {}
    (again / "day.ipynb").write_text(json.dumps(content), encoding="utf-8")
    with jupyter_lab(again) as server, chromium((1400, 1000)) as lab:
        lab.goto(f"{server.url}/lab/tree/{quote('day.ipynb')}?token={server.token}&reset", wait_until="commit")
        dialog = lab.get_by_role("dialog")
        dialog.get_by_role("combobox").select_option(label="No Kernel", timeout=60_000)
        dialog.get_by_role("button", name="Select").last.click()
        kept = lab.locator(".jp-Notebook [class^=saelab-kept]")
        expect(kept).to_have_count(len(WIDGETS), timeout=30_000)
        for i in range(len(WIDGETS)):
            kept.nth(i).scroll_into_view_if_needed()
            expect(kept.nth(i)).to_be_visible()
            expect(kept.nth(i)).to_contain_text(LABEL)  # after scrolling: JupyterLab draws what is in view
            kept.nth(i).screenshot(path=folder / f"day_kept_{WIDGETS[i]}.png")
        expect(kept.nth(2)).to_contain_text(steered.strip()[-20:].strip())

    alone = shutil.copy(page, tmp_path / "handed_on.html")
    with chromium((1400, 1000)) as browser:
        problems = watch(browser)
        browser.goto(f"file://{alone}")
        expect(browser.locator(".saelab-inspector")).to_contain_text(LABEL)
        browser.screenshot(path=folder / "day_page.png", full_page=True)
        assert problems == []
