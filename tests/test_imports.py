"""The house: imports point down only, and `import sae_lab` is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sae_lab

PACKAGE = Path(sae_lab.__file__).parent

# From the bottom up. An import may point to any lower floor, or along its own, but never up.
FLOORS = [
    {"types", "cache", "arguments", "spelling", "files", "results", "noting"},
    {"worlds", "saes", "lm"},
    {"store", "reading"},
    {"harvesting"},
    {"training", "control", "watching", "checkpoint", "distributed", "edit", "grouping", "matching", "rules"},
    {"evals", "circuits", "feature_index", "sweeping", "estimating", "finding", "dosing", "explain", "geometry"},
    {"widgets", "plots"},
]
# These rooms share a floor and a wall: what knows language models knows no coders, and the other way round.
APART = [{"saes", "lm"}, {"worlds", "lm"}, {"worlds", "saes"}]
HEAVY = ["transformers", "nnsight", "datasets", "matplotlib", "ipywidgets", "anywidget", "IPython", "circuitsvis",
         "pandas", "scipy", "sklearn"]  # fmt: skip


def imported(source, module, is_package, rooms):
    """Rooms of sae_lab that a module imports, also in functions and under TYPE_CHECKING. ``?x`` is what is no room."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {
                n.split(".")[1] if "." in n else "?the package itself" for n in names if n.split(".")[0] == "sae_lab"
            }
        elif isinstance(node, ast.ImportFrom):
            base = (package[: len(package) - node.level + 1] if node.level else []) + (node.module or "").split(".")
            base = [part for part in base if part]
            if base[:1] != ["sae_lab"]:
                continue
            if len(base) > 1:
                found.add(base[1])
            else:  # from sae_lab import x: a room, or a name of the package's own (__version__)
                names = {alias.name for alias in node.names}
                found |= {n if n in rooms else f"?{n}" for n in names if not n.startswith("__")}
    return found


def faults(room, others):
    """What is wrong with these imports in this room."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = []
    for other in sorted(others - {room}):
        if other not in floor:
            wrong.append(f"{room} imports {other.lstrip('?')!r} from sae_lab: import from the room that defines it")
        elif floor[other] > floor[room]:
            wrong.append(f"{room} imports {other}, which is above it")
        elif {room, other} in APART:
            wrong.append(f"{room} and {other} never import each other")
    return wrong


def modules():
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):  # the package's own front door opens every room
            yield file, parts


def test_every_room_has_its_floor():
    rooms = {parts[0] for _, parts in modules()}
    assert rooms - set().union(*FLOORS) == set(), "a new room needs its floor in FLOORS"
    assert {"types", "lm", "store"} <= rooms


def test_imports_point_down():
    rooms = set().union(*FLOORS)
    wrong = []
    for file, parts in modules():
        is_package = parts[-1] == "__init__"
        module = ".".join(["sae_lab", *parts[: -1 if is_package else None]])
        wrong += [f"{module}: {f}" for f in faults(parts[0], imported(file.read_text(), module, is_package, rooms))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "module", "words"),
    [
        ("from sae_lab.store import harvest", "sae_lab.lm.model", "lm imports store, which is above it"),
        ("from ..store import harvest", "sae_lab.lm.model", "lm imports store, which is above it"),
        ("from .. import store", "sae_lab.lm.model", "lm imports store, which is above it"),
        ("from sae_lab import plots", "sae_lab.training", "training imports plots, which is above it"),
        ("import sae_lab.training as t", "sae_lab.cache", "cache imports training, which is above it"),
        ("def f():\n    from sae_lab.evals import x", "sae_lab.training", "training imports evals, which is above it"),
        ("from ..lm import LM", "sae_lab.saes.base", "saes and lm never import each other"),
        ("from sae_lab.saes import TopK", "sae_lab.lm.model", "lm and saes never import each other"),
        ("import sae_lab", "sae_lab.store", "imports 'the package itself'"),
        ("from sae_lab import LM", "sae_lab.store", "imports 'LM' from sae_lab: import from the room"),
        ("from sae_lab import __version__, cache", "sae_lab.store", None),
        ("from .tokens import pad\nfrom ..types import Site", "sae_lab.lm.model", None),
        ("from sae_lab.store import Store\nimport torch, saes", "sae_lab.evals.probing", None),
    ],
)
def test_the_walker_finds_what_it_looks_for(source, module, words):
    rooms = set().union(*FLOORS)
    found = faults(module.split(".")[1], imported(source, module, False, rooms))
    assert (len(found) == 1 and words in found[0]) if words else found == []


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_importing_is_light():
    """Under a second beyond torch, and none of the heavy libraries: a notebook's first cell should not feel them."""
    code = (
        "import time, sys, torch; before = set(sys.modules); start = time.perf_counter(); import sae_lab; "
        "print(time.perf_counter() - start); print(*(m for m in set(sys.modules) - before if '.' not in m))"
    )
    # The second of two runs: the first may compile the package's files.
    seconds, loaded = [run(code) for _ in range(2)][-1].splitlines()
    assert float(seconds) < 1.0
    assert set(HEAVY) & set(loaded.split()) == set()


def test_every_name_at_the_door_opens():
    code = (
        "import sae_lab as sl\n"
        "for name in sl.__all__:\n"
        "    assert getattr(sl, name) is not None, name\n"
        "print(len(sl.__all__), set(sl.__all__) - set(dir(sl)))\n"
        "try:\n    sl.no_such_name\nexcept AttributeError as err:\n    print('no_such_name' in str(err))"
    )
    assert run(code).splitlines()[0].endswith(" set()")


def test_main_names_are_there():
    for name in ("LM", "Site", "load_text", "harvest", "Store", "cache"):
        assert hasattr(sae_lab, name)
