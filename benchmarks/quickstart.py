"""make numbers: run the quickstart notebook, keep the executed copy and its HTML, print its headline numbers.

Then benchmarks/first_numbers.py measures, and the numbers of both replace those in docs/speed.md.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from pages import put
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

    tagged = [cell for cell in notebook.cells if "headline" in cell.metadata.get("tags", [])]
    results = [output.data["text/plain"] for cell in tagged for output in cell.outputs if "data" in output]
    headline = "\n\n".join(results)
    print(f"\nHeadline numbers of the quickstart\n{headline}")
    quiet = {**os.environ, "TQDM_DISABLE": "1"}
    command = [sys.executable, ROOT / "benchmarks" / "first_numbers.py"]
    numbers = subprocess.run(command, check=True, env=quiet, stdout=subprocess.PIPE, text=True).stdout
    print(numbers)
    shown = f"{headline}\n{numbers}the whole notebook {spent:30.0f} s"
    text = "\n".join(line.rstrip() for line in shown.splitlines())
    put("docs/speed.md", "first numbers", f"```\n{text}\n```")
    print(f"\nThe notebook took {spent:.0f} s. Executed copy: {EXECUTED / NOTEBOOK.name}\n{'':25}as HTML: {target}")


if __name__ == "__main__":
    main()
