"""What all notebooks have in common."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def source(cell):
    return "".join(cell["source"])


def test_there_are_fourteen():
    assert len(NOTEBOOKS) == 14


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    title, links, install, *middle, checks = notebook["cells"]
    assert source(title).startswith("# ") and title["cell_type"] == "markdown"
    assert links["metadata"]["tags"] == ["links"] and "make lab" in source(links)
    assert install["metadata"]["tags"] == ["install"] and "find_spec" in source(install)
    assert checks["metadata"]["tags"] == ["checks"] and "assert " in source(checks) and not checks["outputs"]
    for cell in middle:
        assert "NBVAL" not in source(cell)
        if cell["cell_type"] == "code":
            lines = "\n".join(line for line in source(cell).splitlines() if not line.lstrip().startswith("%"))
            assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(lines))), source(cell)
            assert not any(output["output_type"] == "error" for output in cell["outputs"])
    assert "widgets" not in notebook["metadata"]
    assert notebook["metadata"]["kernelspec"]["display_name"] == "Python 3 (ipykernel)"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_between_notebooks_and_pages_exist(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            for link in re.findall(r"\]\((?!https?:)([^)#]+)", source(cell)):
                assert (path.parent / link).exists(), link
