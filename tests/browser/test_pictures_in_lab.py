"""Features of a vision transformer: their items as pictures, in JupyterLab and in the page that Export gives."""

import pathlib

import pytest
from playwright.sync_api import expect

from .lab import DARK, LIGHT, chromium, open_notebook, screenshots, watch, write_notebook

REPOSITORY = pathlib.Path(__file__).parents[2]
TINY = (pathlib.Path(__file__).parent / "tiny_vit.py").read_text(encoding="utf-8")
PANELS = """from sae_lab import geometry
session = sl.Session()
shown = sl.FeatureMap(index, geometry.clusters(sae, min_cluster_size=2), session=session)
shown"""
WIDTHS = (1400, 700)


@pytest.mark.browser
def test_items_are_pictures(tmp_path: pathlib.Path) -> None:
    cells = [TINY, "panel = sl.FeatureInspector(index, session=session)\npanel"]
    path = write_notebook(tmp_path / "pictures.ipynb", [cells[0], PANELS, cells[1]])
    env = {"PYTHONPATH": str(REPOSITORY), "SAE_LAB_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    folder = screenshots(tmp_path)
    with open_notebook(path, env=env, viewport=(WIDTHS[0], 1000)) as notebook:
        notebook.run_all(timeout=300)
        panel, shown = notebook.ready(".saelab-inspector"), notebook.ready(".saelab-feature_map")
        tile = panel.locator(".saelab-tile").first
        expect(tile.locator("img")).to_have_js_property("complete", True)
        for absent in ("Try a text", "By examples", "Logit lens", "How contexts are shown"):
            found = panel.get_by_text(absent, exact=True).or_(panel.get_by_label(absent))
            expect(found.locator("visible=true")).to_have_count(0)

        # The place under the pointer, and its activation.
        area, row = notebook.python(
            "top = index[panel.feature].top[0]\nprint(top.area)\nprint(top.tokens[6], round(top.values[6], 2))"
        ).splitlines()
        assert area == "[1, 4, 4, 14]"  # the class token's bar is 14 pixels wide
        tile.locator("img").hover(position={"x": 14 + 24 * 1 + 12, "y": 24 + 12})  # row 1, column 1: the sixth place
        expect(panel.locator(".saelab-readout")).to_contain_text(f"“{row.split()[0]}” ")
        tile.locator("img").focus()
        notebook.page.keyboard.press("ArrowDown")
        expect(panel.locator(".saelab-tile img:focus")).to_have_count(1)

        # A condition finds, words are refused; a point of the map opens a feature.
        search = panel.get_by_label("Search features")
        search.fill("eye")
        expect(panel.get_by_role("alert")).to_contain_text("found by conditions")
        search.fill("density<20%")
        expect(panel.get_by_role("alert")).to_be_hidden()
        other = int(notebook.python("print(index.order('density')[3])"))
        notebook.python(f"shown.feature = {other}")
        expect(panel).to_have_attribute("data-feature", str(other))
        expect(shown.get_by_role("status").last).to_contain_text(f"Feature {other}")

        for theme, name in ((LIGHT, "light"), (DARK, "dark")):
            notebook.set_theme(theme)
            expect(panel).to_have_attribute("data-saelab-theme", name)
            assert notebook.accessibility_faults(".saelab-inspector") == []
            for width in WIDTHS:
                notebook.page.set_viewport_size({"width": width, "height": 1000})
                notebook.page.wait_for_timeout(500)
                assert panel.evaluate("(root) => root.scrollWidth <= root.clientWidth + 1"), f"{width} wide"
                notebook.screenshot(panel, folder / f"pictures_{name}_{width}.png")
                notebook.screenshot(shown, folder / f"pictures_map_{name}_{width}.png")
            notebook.page.set_viewport_size({"width": WIDTHS[0], "height": 1000})
        notebook.python("panel.to_html('page.html')\nindex.to_site('site')")
        assert notebook.problems == []

    with chromium() as page:
        problems = watch(page)
        for file in (tmp_path / "page.html", tmp_path / "site" / "index.html"):
            page.goto(file.as_uri())
            expect(page.locator(".saelab-tile img").first).to_have_js_property("naturalWidth", 96 + 14)
            page.screenshot(path=folder / f"pictures_{file.parent.name if file.name == 'index.html' else 'page'}.png")
        assert problems == []
