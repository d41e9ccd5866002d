"""FeatureMap as a user has it: a click on a point opens the feature in the inspector. Then what is done in all widgets
of the notebook is found in its file, in nbconvert's page, and in the files that Export gives."""

import json
import pathlib

import pytest
from nbconvert import HTMLExporter
from playwright.sync_api import expect

from .lab import DARK, LIGHT, chromium, exported, open_notebook, screenshots, watch, write_notebook

REPOSITORY = pathlib.Path(__file__).parents[2]
TINY = (pathlib.Path(__file__).parent / "tiny.py").read_text(encoding="utf-8")
INK = """(stage) => [...stage.querySelectorAll('canvas')].map((canvas) => {
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width || 1, canvas.height || 1);
    return data.some((value) => value > 0);
})"""
MAP = """from sae_lab.widgets.feature_map import FeatureMap
from sae_lab import geometry
found = geometry.clusters(sae, min_cluster_size=3)
session = sl.Session()
shown = FeatureMap(index, found, session=session)
shown"""
OTHERS = [
    "inspector = sl.FeatureInspector(index, session=session)\ninspector",
    "tokens = sl.TokenFeatures(lm, sae, 'The old bridge over the river', session=session)\ntokens",
    "live = int(index.order('max')[0])\n"
    "sliders = sl.SteeringSliders(lm, sae, {live: 1.0}, 'The ship', session=session, max_new_tokens=6)\nsliders",
    "grid = sl.PatchingGrid(lm, 'The old bridge', 'The new bridge', session=session)\ngrid",
    "monitor = sl.TrainingMonitor(sl.TopK(48, 96, k=4), store, sl.TrainConfig(steps=30, batch_size=128))\nmonitor",
    "session.edits",
]
# Whether the widget's element is still the one that was marked, and which field has the focus.
SAME = "(root) => [root.dataset.mine, root.contains(document.activeElement) && document.activeElement.ariaLabel]"


@pytest.mark.browser
def test_a_point_opens_its_feature(tmp_path: pathlib.Path) -> None:
    path = write_notebook(tmp_path / "map.ipynb", [TINY, MAP, *OTHERS])
    env = {"PYTHONPATH": str(REPOSITORY), "SAE_LAB_DATA": str(tmp_path / "data")}
    with open_notebook(path, env=env) as notebook:
        notebook.run_all()
        shown = notebook.ready(".saelab-feature_map")
        inspector = notebook.ready(".saelab-inspector")
        x, y, feature = notebook.python(
            "import base64, numpy as np\n"
            "xy = np.frombuffer(base64.b64decode(shown.points), '<u2').reshape(-1, 2) / 65535\n"
            "far = int(xy.sum(1).argmax())\n"
            "print(*xy[far], np.frombuffer(base64.b64decode(shown.features), '<u4')[far])"
        ).split()
        stage = shown.get_by_role("application")
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        assert box is not None
        at = {"x": 10 + float(x) * (box["width"] - 22), "y": 10 + float(y) * (box["height"] - 22)}
        stage.hover(position=at)  # type: ignore[arg-type]
        expect(shown.get_by_role("status").last).to_contain_text(f"Feature {feature}")
        stage.click(position=at)  # type: ignore[arg-type]
        expect(inspector.locator("h3").first).to_contain_text(feature)
        assert notebook.python("print(inspector.feature)") == feature
        stage.press("ArrowLeft")
        expect(shown.get_by_role("status").last).not_to_contain_text(f"Feature {feature}")
        stage.press("Enter")
        assert notebook.python("print(inspector.feature)") != feature
        assert notebook.accessibility_faults(".saelab-feature_map") == []
        assert stage.evaluate(INK) == [True, True]
        folder = screenshots(tmp_path)
        notebook.screenshot(shown, folder / "feature_map.png", hover=stage)
        notebook.set_theme(DARK)
        expect(shown).to_have_attribute("data-saelab-theme", "dark")
        notebook.page.wait_for_timeout(300)
        assert stage.evaluate(INK) == [True, True]  # while the theme changes JupyterLab hides the notebook
        assert notebook.accessibility_faults(".saelab-feature_map") == []
        notebook.screenshot(shown, folder / "feature_map_dark.png", hover=stage)
        assert notebook.problems == []

        # The forms that the file keeps are there, and not to be seen while the views live.
        notebook.set_theme(LIGHT)
        kept = notebook.page.locator("[class^=saelab-kept]")
        expect(kept).to_have_count(len(OTHERS) + 1)
        assert not any(kept.nth(i).is_visible() for i in range(kept.count()))
        tokens, sliders, grid, monitor, edits = (
            notebook.ready(f".saelab-{name}") for name in ("tokens", "steering", "patching", "monitor", "edits")
        )
        monitor.get_by_role("button", name="Start").click()
        tokens.get_by_role("listbox", name="Tokens").get_by_role("option").nth(2).click()
        expect(tokens.get_by_role("heading", name="Token 2")).to_be_visible()
        strength = sliders.locator("input[type=range]").first
        strength.focus()
        notebook.page.keyboard.press("ArrowRight")
        grid.locator(".saelab-heat-cell[data-row='1'][data-column='1']").click()
        edits.get_by_role("checkbox").uncheck()
        expect(monitor).to_have_attribute("data-state", "done", timeout=60_000)
        # A label is typed while the forms are renewed: the view stays as it is, and so does the focus.
        inspector.evaluate("(root) => { root.dataset.mine = 'yes'; }")
        label = inspector.get_by_role("textbox", name="Label")
        label.fill("ends of words")
        expect(inspector.locator(".saelab-note [role=status]")).to_contain_text("saved")
        expect(kept.nth(1)).to_contain_text("ends of words")
        assert inspector.evaluate(SAME) == ["yes", "Label"]
        expect(kept.nth(5)).to_contain_text("Training done: step 30 of 30")
        expect(kept.nth(6)).to_contain_text("off")
        now = "sliders.shown == sliders.version and not sliders.sliders[0]['on']"
        notebook.page.wait_for_timeout(1500)
        assert notebook.python(f"print({now})") == "True"
        strong, cell = notebook.python("print(sliders.sliders[0]['strength'], len(grid.truth))").split()
        page, picture, data = (exported(notebook.page, inspector, what, folder) for what in ("Page", "Picture", "Data"))
        assert json.loads(data.read_text(encoding="utf-8"))["note"]["label"] == "ends of words"
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
        for widget in (shown, tokens, sliders, grid, monitor, edits):
            assert exported(notebook.page, widget, "Picture", folder).stat().st_size > 2_000
            assert json.loads(exported(notebook.page, widget, "Data", folder).read_text(encoding="utf-8"))
        notebook.page.keyboard.press("Control+s")
        notebook.page.wait_for_function(
            "() => !window.jupyterapp.shell.currentWidget.context.model.dirty", timeout=10_000
        )
        assert notebook.problems == []

    outputs = [cell["outputs"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"][1:]]
    assert all(not live["data"]["text/html"] and set(form["data"]) == {"text/html"} for live, form in outputs)
    forms = ["".join(form["data"]["text/html"]) for _, form in outputs]
    assert "ends of words" in forms[1] and "Token 2" in forms[2] and f">{float(strong):g}<" in forms[3]
    assert forms[4].count("<b>") == 1 + int(cell) == 2 and "Training</b> done" in forms[5] and ">off<" in forms[6]
    converted = folder / "saved.html"
    converted.write_text(HTMLExporter(exclude_input=True).from_filename(str(path))[0], encoding="utf-8")
    with chromium() as alone:
        alone.goto(f"file://{converted}")
        for i, words in enumerate(["Map of", "ends of words", "Token 2", "Steering", "true patches", "done", "off"]):
            expect(alone.locator("[class^=saelab-kept]").nth(i)).to_contain_text(words)
        alone.screenshot(path=folder / "saved.png", full_page=True)
        problems = watch(alone)
        alone.goto(f"file://{page}")
        expect(alone.locator(".saelab-inspector")).to_contain_text("ends of words")
        assert problems == []
