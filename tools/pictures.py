"""The pictures of README and docs/howto/widgets.md: the panels of notebook 08 in a real JupyterLab, light and dark.

    python tools/pictures.py

It runs the notebook in Chromium (minutes), and writes docs/lab_*.webp with a palette.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.browser.lab import DARK, LIGHT, fresh_copy, open_notebook  # noqa: E402

PANELS = ("tokens", "inspector", "steering", "patching", "monitor")
BENCH = ROOT / "notebooks" / "08_lab_bench.ipynb"


def save(notebook, panel, name: str) -> None:
    """The panel as docs/name_light.webp and docs/name_dark.webp."""
    for theme, ending in ((LIGHT, "light"), (DARK, "dark")):
        notebook.set_theme(theme)
        notebook.page.wait_for_timeout(1000)
        path = ROOT / "docs" / f"{name}_{ending}.png"
        notebook.screenshot(panel, path)
        picture = Image.open(path).convert("RGB")
        path.unlink()
        if picture.width > 1100:
            picture = picture.resize((1100, round(picture.height * 1100 / picture.width)), Image.Resampling.LANCZOS)
        picture = picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
        picture.save(path.with_suffix(".webp"), lossless=True, quality=100, method=6)  # two thirds of a PNG
    notebook.set_theme(LIGHT)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        env = {"SAE_LAB_DATA": f"{folder}/notes"}
        with open_notebook(fresh_copy(BENCH, Path(folder)), env=env) as notebook:
            notebook.run_all(timeout=1200)
            for name in PANELS:
                save(notebook, notebook.ready(f".saelab-{name}"), f"lab_{name}")


if __name__ == "__main__":
    main()
