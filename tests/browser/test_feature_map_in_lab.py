"""FeatureMap as a user has it: a click on a point opens the feature in the inspector."""

import pathlib

import pytest
from playwright.sync_api import expect

from .lab import DARK, open_notebook, screenshots, write_notebook

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


@pytest.mark.browser
def test_a_point_opens_its_feature(tmp_path: pathlib.Path) -> None:
    cells = [TINY, MAP, "inspector = sl.FeatureInspector(index, session=session)\ninspector"]
    path = write_notebook(tmp_path / "map.ipynb", cells)
    with open_notebook(path, env={"PYTHONPATH": str(REPOSITORY)}) as notebook:
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
