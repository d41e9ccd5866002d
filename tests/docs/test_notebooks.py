"""What all notebooks have in common."""

import ast
import json
import re
from pathlib import Path

import pytest

from sae_lab.evals.claims import MIME

LONGEST = 12  # lines of a cell of a paper's notebook
ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAPERS = sorted((ROOT / "notebooks" / "papers").glob("*.ipynb"))
NOTEBOOKS = [*TUTORIAL, *PAPERS]


def source(cell):
    return "".join(cell["source"])


def test_there_are_fourteen():
    assert len(TUTORIAL) == 14


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


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_paper_says_first_what_would_count(path):
    """Its plan stands before any other code, its claims have verdicts of their own making, and it is short."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    tags = [cell["metadata"].get("tags", []) for cell in code]
    assert "arxiv.org" in source(cells[0]) or "http" in source(cells[0]), "the first cell links to the paper"
    assert "install" in tags[0] and "plan" in tags[1] and "SEEDS" in source(code[1])
    (claims,) = [cell for cell, tag in zip(code, tags, strict=True) if "claims" in tag]
    (data,) = [output["data"][MIME] for output in claims["outputs"] if MIME in output.get("data", {})]
    assert data["paper"] and all(claim["verdict"] for claim in data["claims"])
    code = [cell for cell, tag in zip(code, tags, strict=True) if "checks" not in tag]
    lines = [sum(bool(line.strip()) for line in source(cell).splitlines()) for cell in code]
    assert max(lines[1:]) <= LONGEST, f"cells of at most {LONGEST} lines"
    assert path.name in (ROOT / "docs" / "papers.md").read_text(encoding="utf-8"), "run make results"
