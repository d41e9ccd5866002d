"""docs/results.md says what the files of benchmarks/results say."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # scripts, which are no package
    import results

    yield results
    for name in ("results", "pages"):
        sys.modules.pop(name)


def test_the_table_is_made_of_the_files(results):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    made = page.partition("<!-- claims -->\n")[2].partition("<!-- end of claims -->")[0]
    assert made.strip() == results.table().strip(), "run make results"


def test_the_papers_are_those_of_the_notebooks(results):
    for page, made in (("results", results.papers_table), ("papers", results.gallery)):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        shown = text.partition("<!-- papers -->\n")[2].partition("<!-- end of papers -->")[0]
        assert shown.strip() == made(results.papers()).strip(), "run make results"


def test_a_changed_file_changes_the_page(tmp_path):
    """The script on a copy, where one measured number is another."""
    for folder in ("benchmarks", "docs"):
        (tmp_path / folder).mkdir()
    for name in ("results.py", "pages.py"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks" / name)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    page = shutil.copy(ROOT / "docs" / "results.md", tmp_path / "docs" / "results.md")
    shutil.copy(ROOT / "docs" / "papers.md", tmp_path / "docs" / "papers.md")
    file = tmp_path / "benchmarks" / "results" / "methods.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    kept["57 lens and token lists"]["lens"]["word promoted"][0] = 0.777
    file.write_text(json.dumps(kept), encoding="utf-8")
    before = page.read_text(encoding="utf-8")
    subprocess.run([sys.executable, tmp_path / "benchmarks" / "results.py"], check=True)
    assert "0.777" in page.read_text(encoding="utf-8") and "0.777" not in before


def test_every_claim_has_a_verdict_a_command_and_figures(results):
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    for claim in results.CLAIMS:
        assert claim.verdict in (results.HOLDS, results.PART, results.NOT, results.OTHER) and claim.measured
        command = claim.command.strip("`").split()
        assert command[0] == "make" or Path(command[1]).name in scripts, claim.command


def test_put_needs_both_marks(results, tmp_path):
    (tmp_path / "page.md").write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n", encoding="utf-8")
    results.put("page.md", "x", "new", tmp_path)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == "a\n<!-- x -->\nnew\n<!-- end of x -->\nb\n"
    with pytest.raises(ValueError, match="needs the marks"):
        results.put("page.md", "y", "new", tmp_path)
