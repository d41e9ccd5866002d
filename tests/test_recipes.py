"""CONTRIBUTING's recipes for a coder and for an eval, run as they are written there, in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(title):
    """(the text since the block before, the code) of each Python block of a recipe."""
    recipe = re.search(rf"## Recipe: {title}\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL)[1]
    parts = re.split(r"```(\w*)\n(.*?)```\n", recipe, flags=re.DOTALL)
    found = zip(parts[::3], parts[1::3], parts[2::3], strict=False)
    return [(text, code) for text, kind, code in found if kind == "python"]


@pytest.fixture
def copy(tmp_path):
    """The package and its tests; what is large is linked."""
    large = shutil.ignore_patterns("data", "static", "__pycache__")
    for folder in ("sae_lab", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=large)
    (tmp_path / "sae_lab/data").symlink_to(ROOT / "sae_lab/data")
    (tmp_path / "sae_lab/widgets/static").symlink_to(ROOT / "sae_lab/widgets/static")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def follow(copy, title):
    """Do what a recipe says: a block whose text names a file that is not there makes it, the others go into theirs."""
    for text, code in blocks(title):
        named = re.findall(r"`((?:sae_lab|tests)/[\w/]+\.py)`", text)
        file = copy / named[-1]
        if not file.exists():
            file.write_text(code)
        elif file.name == "__init__.py":  # before what looks through the imports
            source = file.read_text()
            at = re.search(r"\n\n(FAMILIES|__all__)", source).start()
            file.write_text(f"{source[:at]}\n{code}{source[at:]}")
        elif "REFUSED" in text:
            head, opening, rest = re.split(r"(REFUSED\b[^\n]*\[\n)", file.read_text(), maxsplit=1)
            file.write_text(f"{head}{opening}{code}{rest}")
        else:
            file.write_text(f"{file.read_text()}\n\n{code}")


def run(copy, *arguments):
    env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    found = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, "\n".join(line for line in found.stdout.splitlines() if "it/s" not in line)[-3000:]
    return int(re.search(r"(\d+) passed", found.stdout)[1])


def test_the_recipe_of_a_coder(copy):
    follow(copy, "a coder")
    passed = run(copy, "tests/saes/test_contract.py", "tests/saes/test_families.py", "tests/saes/test_wiring.py", "-k",
                 "GroupTopK or grouptopk or every_family")  # fmt: skip
    assert passed > 10


def test_the_recipe_of_an_eval(copy):
    follow(copy, "an eval")
    assert run(copy, "tests/evals/test_pointing.py") == 1
    code = blocks("an eval")[0][1]
    body = code[code.index("@result") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 40, "an eval is at most 40 lines"
