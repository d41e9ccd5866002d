"""A page has all widgets' style sheets at once: what one says of a class must not reach another's elements."""

import re
from collections import defaultdict
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "widgets" / "src"
# The page of all features ("site") stands alone with the inspector.
WIDGETS = sorted({folder.name for folder in SOURCES.iterdir()} - {"shared", "site"})


def selectors(file):
    text = re.sub(r"/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    for head in re.findall(r"([^{}]+)\{", text):
        if not head.strip().startswith(("@", "from", "to")):
            yield from (part.strip() for part in re.split(r",(?![^(]*\))", head.split(";")[-1]))


def loose(widget):
    """(selector, its classes) of a widget's own sheet that do not name the widget's root."""
    for file in sorted((SOURCES / widget).glob("*.css")):
        for selector in selectors(file):
            if not re.search(rf"\.saelab-{widget}(?![\w-])", selector):
                yield selector, set(re.findall(r"\.(saelab-[\w-]+)", selector))


def used(widget):
    """The classes that a widget's own sources speak of."""
    files = [*(SOURCES / widget).glob("*.ts"), *(SOURCES / widget).glob("*.css")]
    return set(re.findall(r"saelab-[\w-]+", "\n".join(file.read_text(encoding="utf-8") for file in files)))


def test_every_selector_is_the_projects_own():
    for file in SOURCES.rglob("*.css"):
        for selector in selectors(file):
            assert selector.startswith(".saelab"), f"{file.name}: {selector}"


def test_no_style_reaches_another_widget():
    shared = set(re.findall(r"saelab-[\w-]+", "\n".join(f.read_text() for f in (SOURCES / "shared").iterdir())))
    found = defaultdict(list)
    others = {w: set().union(*(used(v) for v in WIDGETS if v != w)) for w in WIDGETS}
    for widget in WIDGETS:
        for selector, classes in loose(widget):
            # All classes of the selector must exist elsewhere for it to match something there; without any it does.
            if classes <= others[widget] | shared:
                found[widget].append(selector)
    assert not found, f"begin these with the widget's own class: {dict(found)}"
