"""The repository's address: written by one command, taken out by the same, and never somebody else's."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "notebooks" / "papers").glob("*.ipynb")]
TOOL = ROOT / "tools" / "links.py"
HOSTS = r"(?:github\.com|githubusercontent\.com|colab\.research\.google\.com/github|mybinder\.org/v2/gh)"
OWN = re.compile(HOSTS + r"/+([\w.-]+/sae[_-]lab)\b")


def run(root, owner):
    return subprocess.run([sys.executable, TOOL, owner, "--root", root], capture_output=True, text=True)


def texts(root):
    pages = [root / "README.md", root / "docs" / "install.md", root / "pyproject.toml"]
    files = [*pages, *(root / "notebooks").rglob("*.ipynb")]
    return {file.relative_to(root): file.read_text(encoding="utf-8") for file in files}


@pytest.fixture
def copy(tmp_path):
    """The files that carry the address, without one."""
    for name in ("README.md", "pyproject.toml", "docs/install.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "notebooks" / "papers").mkdir(parents=True)
    for notebook in NOTEBOOKS:
        shutil.copy(notebook, tmp_path / notebook.relative_to(ROOT))
    assert run(tmp_path, "").returncode == 0
    return tmp_path


def test_the_address_goes_everywhere_and_out_again(copy):
    without = texts(copy)
    assert not any("badge.svg" in text or "colab.research" in text for text in without.values())
    assert "git clone <address of this repository>" in without[Path("README.md")]

    assert run(copy, "someone/sae_lab").returncode == 0
    once = texts(copy)
    assert all("someone/sae_lab" in text for text in once.values())
    assert 'Repository = "https://github.com/someone/sae_lab"' in once[Path("pyproject.toml")]
    readme = once[Path("README.md")]
    assert "badge.svg" in readme and "git clone https://github.com/someone/sae_lab" in readme
    assert run(copy, "someone/sae_lab").returncode == 0
    assert texts(copy) == once  # the same again changes nothing

    assert run(copy, "another/fork").returncode == 0
    assert not any("someone" in text for text in texts(copy).values())
    assert run(copy, "").returncode == 0
    assert texts(copy) == without


@pytest.mark.parametrize("owner", ["sae_lab", "https://github.com/a/b", "a/b/c", "a b/c", "-a/b"])
def test_what_is_no_address_is_refused(copy, owner):
    before = texts(copy)
    ran = subprocess.run([sys.executable, TOOL, "--root", copy, "--", owner], capture_output=True, text=True)
    assert ran.returncode and "OWNER must be name/repository" in ran.stderr and texts(copy) == before


def test_no_file_gives_an_address_that_is_not_ours():
    """The project's own links name the repository of pyproject.toml, or nothing."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ours = re.search(r'Repository = "https://github.com/([^"]+)"', project)
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    foreign = []
    for name in files:
        if (ROOT / name) == Path(__file__) or not (ROOT / name).is_file():
            continue
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        foreign += [f"{name}: {found[0]}" for found in OWN.finditer(text) if not ours or found[1] != ours[1]]
    assert not foreign, foreign
    assert OWN.search("https://github.com/stranger/sae_lab") and OWN.search("https://mybinder.org/v2/gh/stranger/sae-lab/main")
