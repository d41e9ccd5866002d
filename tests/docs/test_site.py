"""The site builds without a network and without a warning; its links lead somewhere; no public name is missing."""

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import sae_lab as sl

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder], cwd=ROOT, text=True,
        capture_output=True, env=os.environ | OFFLINE | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-4000:]
    assert "WARNING" not in built.stderr, built.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}


def test_no_link_is_dead(site, pages):
    dead = []
    for page, text in pages.items():
        if page.name == "404.html":
            continue
        for link in re.findall(r'(?:href|src)="([^"]*)"', text):
            file, anchor = urldefrag(unquote(unescape(link)))
            if re.match(r"[a-z]+:|//", file):
                continue
            target = (page.parent / file) if file else page
            target = target / "index.html" if target.is_dir() else target
            ids = pages.get(target.resolve(), pages.get(target, ""))
            if not target.exists() or (anchor and target.suffix == ".html" and f'id="{anchor}"' not in unescape(ids)):
                dead.append(f"{page.relative_to(site)}: {link}")
    assert not dead, dead


def test_pages_load_nothing_from_other_hosts(pages):
    loads = (
        r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]+"'
        r'|<link\b[^>]*rel="stylesheet"[^>]*href="(?:https?:)?//[^"]+"'
    )
    assert not [(page, found) for page, text in pages.items() for found in re.findall(loads, text)]


def test_inherited_methods_of_a_store_are_in_the_api(site):
    text = (site / "api/activations/index.html").read_text(encoding="utf-8")
    names = ("at", "batch", "blocks", "reserved", "rows", "training_rows", "unseen")
    assert not [name for name in names if f'id="sae_lab.activations.store.Store.{name}"' not in text]


def test_every_public_name_is_in_the_api(site):
    text = unescape(" ".join(page.read_text(encoding="utf-8") for page in (site / "api").rglob("*.html")))
    headings = set(re.findall(r"\bsl\.[\w.]+|sae_lab\.[\w.]+", text))
    packages = {name for name, home in sl._homes().items() if home == "sae_lab"}  # rooms: looked at below
    names = {*dir(sl), *sl.saes.FAMILIES} - {*packages, "__version__"}
    missing = [name for name in names if f"sl.{name}" not in headings]
    for package in ("circuits", "evals", "explain", "geometry", "worlds"):
        names = [f"sl.{package}.{name}" for name in getattr(sl, package).__all__ if not hasattr(sl, name)]
        missing += [name for name in names if name not in headings]
    assert not missing, missing


def test_notebooks_are_shown_with_their_outputs_and_without_checks(site):
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = (site / "notebooks" / notebook.stem / "index.html").read_text(encoding="utf-8")
        assert "jp-OutputArea-output" in text, notebook.name
        assert "What the text says, checked by" not in text, notebook.name
