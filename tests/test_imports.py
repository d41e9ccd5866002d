"""The house: imports point down only, without circles, the core knows no method, and `import sae_lab` is light."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import sae_lab

PACKAGE = Path(sae_lab.__file__).parent

# From the bottom up. A room imports from lower floors only; modules of a room from each other, without circles.
CORE = [
    {"types", "cache", "arguments", "spelling", "files", "results", "noting", "stats", "costs", "processes"},
    {"saes", "lm"},
    {"nets"},
    {"activations"},
    {"edits"},
    {"feature_index"},
    {"training"},
]
METHODS = [{"worlds"}, {"evals", "circuits", "explain", "geometry"}]
FACES = [{"plots", "widgets"}]
FLOORS = [*CORE, *METHODS, *FACES]
GROUND = CORE[0]  # single modules: they import from each other
HEAVY = ["transformers", "nnsight", "datasets", "matplotlib", "ipywidgets", "anywidget", "IPython", "circuitsvis",
         "pandas", "scipy", "sklearn"]  # fmt: skip


def modules():
    """{module: (its file, whether it is a package)}. The package itself is left out: its door opens every room."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if package else parts)] = (file, package)
    del found["sae_lab"]
    return found


def imported(source, module, package, known):
    """Modules of sae_lab that a module imports, also in functions and under TYPE_CHECKING. ``?x``: x is no module."""
    home = module.split(".") if package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "sae_lab"]
            found |= {name if name in known else f"?{name}" for name in names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(home[: len(home) - node.level + 1] if node.level else []), *filter(None, [node.module])])
            if base.split(".")[0] != "sae_lab":
                continue
            for name in (alias.name for alias in node.names if not alias.name.startswith("__")):
                inside = f"{base}.{name}"
                found.add(inside if inside in known else base if base in known else f"?{inside}")
    return found - {module}


def room(module):
    return module.split(".")[1]


def faults(module, others):
    """What is wrong with these imports of a module."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = []
    for other in sorted(others):
        if other.startswith("?"):
            wrong.append(f"{module} imports {other[1:]}: import from the module that defines it")
        elif room(other) == room(module) or {room(other), room(module)} <= GROUND:
            continue
        elif floor[room(other)] >= floor[room(module)]:
            wrong.append(f"{module} imports {other}, which is not below it")
    return wrong


def test_every_room_has_its_floor():
    rooms = {room(module) for module in modules()}
    assert rooms - set().union(*FLOORS) == set(), "a new room needs its floor in FLOORS"
    assert {"types", "lm", "activations"} <= rooms


def test_imports_point_down_and_have_no_circle():
    known = modules()
    graph = {m: imported(file.read_text(), m, package, known) for m, (file, package) in known.items()}
    wrong = [fault for module, others in graph.items() for fault in faults(module, others)]
    assert not wrong, "\n".join(wrong)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as err:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(err.args[1]))}")


def test_no_module_bears_the_name_of_a_public_function():
    """``sae_lab.evals.x`` would then be the module or the function, as it happens."""
    packages = ["sae_lab", *(m for m, (_, package) in modules().items() if package)]
    for package in packages:
        opened = import_module(package)
        inside = {m.rpartition(".")[2] for m in modules() if m.rpartition(".")[0] == package}
        functions = {n for n in [*sae_lab.__all__, *dir(opened)] if callable(getattr(opened, n, None))}
        functions |= {n for n in sae_lab.__all__ if callable(getattr(sae_lab, n))}
        assert inside & functions == set(), package


@pytest.mark.parametrize(
    ("source", "module", "words"),
    [
        ("from sae_lab.activations.store import x", "lm.model", "imports sae_lab.activations.store, which is not"),
        ("from ..activations.store import x", "lm.model", "imports sae_lab.activations.store, which is not below"),
        ("from .. import activations", "lm.model", "imports sae_lab.activations, which is not below it"),
        ("from sae_lab import plots", "training.loop", "imports sae_lab.plots, which is not below it"),
        ("import sae_lab.training.loop as t", "cache", "imports sae_lab.training.loop, which is not below it"),
        ("def f():\n    from sae_lab.evals import x", "training.loop", "imports sae_lab.evals, which is not below it"),
        ("if T:\n    from sae_lab.circuits import x", "evals.probes", "imports sae_lab.circuits, which is not below"),
        ("from ..lm import LM", "saes.base", "imports sae_lab.lm, which is not below it"),
        ("from sae_lab.saes import TopK", "lm.model", "imports sae_lab.saes, which is not below it"),
        ("import sae_lab", "activations.store", "imports sae_lab: import from the module that defines it"),
        ("from sae_lab import LM", "activations.store", "imports sae_lab.LM: import from the module"),
        ("from sae_lab import __version__, cache", "activations.store", None),
        ("from .tokens import pad\nfrom ..types import Site", "lm.model", None),
        ("from sae_lab.activations.store import Store\nimport torch, saes", "evals.probes", None),
    ],
)
def test_the_walker_finds_what_it_looks_for(source, module, words):
    found = faults(f"sae_lab.{module}", imported(source, f"sae_lab.{module}", False, modules()))
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


def test_tab_shows_four_families_and_at_most_sixty_names():
    from sae_lab.saes import FAMILIES

    shown = set(dir(sae_lab))
    assert shown & set(FAMILIES) == {"TopK", "BatchTopK", "JumpReLU", "Transcoder"}
    assert len(shown) <= 60
    assert all(getattr(sae_lab, name) is family for name, family in FAMILIES.items())
    assert set(FAMILIES) <= set(dir(sae_lab.saes))


def test_main_names_are_there():
    for name in ("LM", "Site", "load_text", "harvest", "Store", "cache"):
        assert hasattr(sae_lab, name)
