"""The quickstart as a newcomer has it: the notebook in JupyterLab, every cell run on the real model, the panel used."""

import pathlib

import pytest
from playwright.sync_api import expect

from .lab import DARK, LIGHT, fresh_copy, open_notebook, screenshots

REPOSITORY = pathlib.Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "notebooks" / "00_quickstart.ipynb"
# Two to four minutes on two idle cores; a busy machine takes several times that.
RUN_SECONDS = 1200


@pytest.mark.browser
def test_the_quickstart_in_jupyterlab(tmp_path: pathlib.Path, cache_folder: pathlib.Path) -> None:
    # The user's own cache, which holds the harvest if the notebook was run before: the model's files link into it.
    model = next((cache_folder / "models").glob("*/config.json"))
    env = {"SAE_LAB_CACHE": str(model.resolve().parents[2])}
    with open_notebook(fresh_copy(QUICKSTART, tmp_path), env=env) as notebook:
        notebook.run_all(timeout=RUN_SECONDS)
        panel = notebook.ready(".saelab-inspector")
        first = int(notebook.python("print(panel.feature)"))
        expect(panel).to_have_attribute("data-feature", str(first))
        assert notebook.python("print(index.counts[panel.feature] > 0)") == "True"

        # Search a token, click what is found: the kernel knows.
        panel.get_by_label("Search features").fill("war")
        found = panel.get_by_role("listbox", name="Features").get_by_role("option")
        war = notebook.python("print(war)")
        expect(found.first).to_contain_text(war)
        found.first.click()
        expect(panel).to_have_attribute("data-feature", war)
        assert notebook.python("print(panel.feature)") == war != str(first)

        # The panel's feature steers, as in the README.
        edited = notebook.python("print(lm.generate('I went to the', [sl.Steer(sae, panel.feature, strength=3)], 8))")
        assert edited.startswith("I went to the")

        folder = screenshots(tmp_path)
        for theme, name in [(LIGHT, "light"), (DARK, "dark")]:
            notebook.set_theme(theme)
            expect(panel).to_have_attribute("data-saelab-theme", name)
            peak = panel.locator(".saelab-token[data-home]").nth(2)
            peak.hover()
            notebook.screenshot(panel, folder / f"inspector_{name}.png", hover=peak)
            notebook.page.screenshot(path=folder / f"quickstart_{name}.png")

        assert notebook.problems == []
