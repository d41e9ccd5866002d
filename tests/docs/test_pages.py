"""Every call of ours on a page runs as it stands, with fewer tokens; every name of another library exists there."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

import sae_lab as sl

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r'^```python(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PEERS = {"SAELens": "sae_lens", "TransformerLens": "transformer_lens", "dictionary_learning": "dictionary_learning"}
NOT_HERE = {"Neuronpedia"}  # its client is not installed: docs.neuronpedia.org has the call
SMALLER = {
    "tokens=1_000_000": "tokens=5_000", "tokens=100_000": "tokens=10_000", "tokens=20_000": "tokens=5_000",
    "8 * lm.width(site)": "lm.width(site)", "steps=1_000": "steps=5", "steps=20": "steps=4",
    "tokens=2_000": "tokens=500", "buffer=8_192": "buffer=1_024", "buffer=4_096": "buffer=1_024",
    "tokens=4_096, batch_size=1024": "tokens=1_024, batch_size=256",
    "tokens=2_048": "tokens=256", "harvest(lm, sae.site, text)": "harvest(lm, sae.site, text, tokens=5_000)",
    "text.held_out))": "text.held_out, tokens=256))", "features=512": "features=96", "features=200": "features=64",
    "features=256": "features=96",
}  # fmt: skip


def blocks(page):
    """(title, code) of the page's Python."""
    return [(found[1] or "", found[2]) for found in BLOCK.finditer((ROOT / page).read_text(encoding="utf-8"))]


def runs(page):
    return [code for title, code in blocks(page) if not title]


def test_readme_is_a_landing_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(re.findall(r"^!\[.*\]\(docs/.*\.webp\)$", text, re.MULTILINE)) == 2
    (code,) = runs("README.md")
    assert len([line for line in code.splitlines() if line]) <= 11  # the import and ten lines
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link


def test_every_block_is_ours_or_named():
    titles = {title for page in PAGES for title, _ in blocks(page)}
    assert titles == {"", *PEERS, *NOT_HERE, "train.py", "in_ray.py", "on NDIF"}


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    scope = {}
    for number, code in enumerate(runs(page)):
        for large, small in SMALLER.items():
            code = code.replace(large, small)
        exec(compile(code, f"{page}, block {number}", "exec"), scope)


@pytest.mark.parametrize("title", PEERS)
def test_names_of_another_library_exist_there(title):
    codes = [code for page in PAGES for name, code in blocks(page) if name == title]
    looked = 0
    for node in (node for code in codes for node in ast.walk(ast.parse(code))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                importlib.import_module(f"{node.module}.{alias.name}") if alias.name == "patching" else None
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                looked += 1
    assert looked


def test_the_script_for_several_processes(tmp_path):
    ((_, code),) = [block for block in blocks("docs/several-gpus.md") if block[0] == "train.py"]
    smaller = {"16384, k": "256, k", "20_000_000": "4_000", "=16384": "=256", "2_000_000": "6_000", '"mix"': ""}
    for large, small in smaller.items():
        assert large in code
        code = code.replace(large, small)
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"],
        cwd=tmp_path, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert sl.load(tmp_path / "run").d_sae == 256 and len(sl.Store(tmp_path / "store")) >= 6_000
