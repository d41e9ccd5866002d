"""make notebooks: run notebooks from the top and keep their outputs, for the site and for readers without a kernel.

    python tools/notebooks.py notebooks/00_quickstart.ipynb notebooks/03_load_others.ipynb

Without names all are run, but 07, which needs a server. What differs from run to run and tells a reader nothing is left
out: progress bars, times and the state of widgets, which is of no use without their kernel.
"""

import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
REMOTE = "07_remote.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"


def is_live(output) -> bool:
    """A view that needs its kernel: a progress bar, or one of our widgets, whose HTML is an output of its own."""
    return WIDGET in (data := output.get("data", {})) and not data.get("text/html")


def smaller(png: str) -> str:
    """A PNG in base64 with a palette of 128 colours, in a third of the bytes: a figure has few; as it was if that is no
    smaller."""
    out = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    made = base64.b64encode(out.getvalue()).decode()
    return made if len(made) < len(png) else png


def renew(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=1800, record_timing=False, coalesce_streams=True,
                            resources={"metadata": {"path": str(path.parent)}})  # fmt: skip
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr" and not is_live(output)]
            for output in cell.outputs:
                data = output.get("data", {})
                if "image/png" in data:
                    data["image/png"] = smaller(data["image/png"])
                if "text/html" in data:  # the number of a widget's form differs from run to run
                    pattern = "saelab-kept-[0-9a-f]+ saelab-at-[0-9]+"
                    data["text/html"] = re.sub(pattern, "saelab-kept", data["text/html"])
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def main() -> None:
    os.environ["SAE_LAB_DATA"] = tempfile.mkdtemp()  # the notes of whoever runs this stay out of the tables
    known = [*sorted(NOTEBOOKS.glob("*.ipynb")), *sorted(NOTEBOOKS.glob("papers/*.ipynb"))]
    paths = [Path(name) for name in sys.argv[1:]] or [path for path in known if path.name != REMOTE]
    for path in paths:
        start = time.perf_counter()
        renew(path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
