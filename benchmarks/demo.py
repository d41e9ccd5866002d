"""make demo: run the quickstart notebook for real, keep the executed copy and its HTML, print its headline numbers."""

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "00_quickstart.ipynb"
EXECUTED = ROOT / "notebooks" / "executed"


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    start = time.perf_counter()
    print(f"Running {NOTEBOOK.relative_to(ROOT)} ...", flush=True)
    with client.setup_kernel():
        for number, cell in enumerate(tqdm(notebook.cells, desc="cells", dynamic_ncols=True)):
            client.execute_cell(cell, number)
    spent = time.perf_counter() - start
    EXECUTED.mkdir(exist_ok=True)
    notebook.metadata.pop("widgets", None)  # a widget's state is of no use without its kernel
    nbformat.write(notebook, EXECUTED / NOTEBOOK.name)
    exporter = HTMLExporter()
    # Widgets bring a static summary for readers without a kernel: prefer it to an empty widget.
    exporter.config.NbConvertBase.display_data_priority = [
        "text/html", "image/svg+xml", "image/png", "text/markdown", "text/plain",
    ]  # fmt: skip
    html, _ = exporter.from_notebook_node(notebook)
    target = (EXECUTED / NOTEBOOK.name).with_suffix(".html")
    target.write_text(html, encoding="utf-8")

    print("\nHeadline numbers of the quickstart")
    for cell in notebook.cells:
        if "headline" in cell.metadata.get("tags", []):
            print("".join(output.get("text", "") for output in cell.outputs))
    quiet = {**os.environ, "TQDM_DISABLE": "1"}
    subprocess.run([sys.executable, ROOT / "benchmarks" / "first_numbers.py"], check=True, env=quiet)
    print(f"\nThe notebook took {spent:.0f} s. Executed copy: {EXECUTED / NOTEBOOK.name}\n{'':25}as HTML: {target}")


if __name__ == "__main__":
    main()
