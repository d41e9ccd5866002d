"""What mkdocs.yml cannot say: pages made of files outside docs/, and API pages that list every public name."""

import posixpath
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

import sae_lab as sl

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("evals", "circuits", "explain", "geometry", "worlds", "widgets")
MADE_OF = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# Pages with wide tables, and the front page, do without sidebars.
HIDDEN = {page: ["navigation", "toc"] for page in ("index.md", "results.md", "coders.md", "models.md")}
NAMES = re.compile(r"<!-- names: ([\w ]+) -->")


def papers() -> list[str]:
    return [f"notebooks/papers/{path.name}" for path in sorted((ROOT / "notebooks" / "papers").glob("*.ipynb"))]


def on_config(config: Any) -> Any:
    """The notebooks of papers go into the menu behind their gallery."""
    (section,) = [entry["Papers"] for entry in config.nav if "Papers" in entry]
    section += papers()
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Any, config: Any) -> Any:
    tutorial = [f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    for name in tutorial + papers():
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    page.meta.setdefault("hide", HIDDEN.get(page.file.src_uri, []))
    if source := MADE_OF.get(page.file.src_uri):
        return for_site((ROOT / source).read_text(encoding="utf-8"))
    return NAMES.sub(lambda found: "\n\n".join(map(entry, names(found[1].split()))), markdown)


def for_site(text: str) -> str:
    """A page of the repository's root, its links as docs/ has them."""
    for page, source in MADE_OF.items():
        text = text.replace(f"]({source})", f"]({page})")
    return text.replace("](docs/", "](").replace(" ([notice](sae_lab/data/NOTICE))", "")


# ---- API pages


def names(rooms: list[str]) -> list[tuple[str, str]]:
    """(what a user types, where it is defined) of every public name of these rooms, classes after functions."""
    homes = sl._homes()
    found = {f"sl.{n}": f"{home}.{n}" for n, home in homes.items() if home.partition(".")[2].split(".")[0] in rooms}
    for room in rooms:
        if room in PACKAGES:
            module = import_module(f"sae_lab.{room}")
            typed = {path.rsplit(".", 1)[1] for path in found.values()}
            prefix = "sl" if homes.get(room) == "sae_lab" else "sae_lab"
            found |= {f"{prefix}.{room}.{n}": f"sae_lab.{room}.{n}" for n in module.__all__ if n not in typed}
    if "saes" in rooms:
        for name, value in vars(sl.saes).items():
            if callable(value) and not name.startswith("_") and f"sl.{name}" not in found:
                found[f"sl.{name}" if name in sl.saes.FAMILIES else f"sl.saes.{name}"] = path(value)
    if "cache" in rooms:
        found |= {f"sl.cache.{name}": f"sae_lab.cache.{name}" for name in ("list", "clear")}
    if "training" in rooms:
        found["sl.checkpoint"] = "sae_lab.training.checkpoint"
    return sorted(found.items(), key=lambda item: (item[0].rsplit(".", 1)[1][0].isupper(), item[0].lower()))


def path(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def entry(name: tuple[str, str]) -> str:
    typed, where = name
    label = typed.rsplit(".", 1)[1]
    return f"::: {where}\n    options:\n      heading: {typed}\n      toc_label: {label}\n"


# ---- notebooks link to each other and to docs/ by file


def on_page_content(html: str, page: Any, **_: Any) -> str:
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    folder = posixpath.dirname(page.file.src_uri)
    links = r'href="([^":#]+)\.(?:ipynb|md)(#[^"]*)?"'
    return re.sub(links, lambda m: f'href="{target(m[1], folder)}{m[2] or ""}"', html)


def target(link: str, folder: str) -> str:
    """A link of a notebook in this folder as the site has it: every page is a folder."""
    uri = posixpath.normpath(posixpath.join(folder, link)).removeprefix("docs/")
    return f"{'../' * (folder.count('/') + 2)}{uri}/"
