"""tests/needs.sh: nothing to do, apt for root, the command to run for everybody else; on a PATH of our own making."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "needs.sh"
NEEDED = ("chromium", "node", "npm", "redis-server")


def program(folder, name, text="exit 0"):
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


@pytest.fixture
def path(tmp_path):
    """A folder of programs that do nothing: all that are needed, and an ``id`` that says we are no root."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in NEEDED:
        program(folder, name)
    program(folder, "id", "echo 1000")
    return folder


def run(path):
    environment = {"PATH": str(path), "HOME": str(path)}
    done = subprocess.run(["/bin/bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_nothing_is_said_where_all_is_there(path):
    assert run(path) == (0, "", "")


@pytest.mark.parametrize(
    ("name", "packages"),
    [("chromium", "chromium fonts-dejavu-core"), ("node", "nodejs"), ("npm", "npm"), ("redis-server", "redis-server")],
)
def test_it_stops_with_the_command_to_run(path, name, packages):
    (path / name).unlink()
    code, _, said = run(path)
    assert code == 1 and f"not on this machine: {packages}. To install them" in said and "package manager" in said
    program(path, "brew")
    assert "brew install node redis" in run(path)[2]
    program(path, "apt-get", "echo called >&2")
    code, _, said = run(path)
    assert code == 1 and f"sudo apt-get update && sudo apt-get install -y {packages}" in said and "called" not in said


def test_a_node_that_is_too_old(path):
    program(path, "node", '[ "$1" = --version ] && echo v18.20.4 || exit 1')
    code, _, said = run(path)
    assert code == 1 and "Node.js is v18.20.4, the widgets need 20 or newer" in said


def test_a_chromium_of_playwright_will_do(path):
    (path / "chromium").unlink()
    (path / ".cache" / "ms-playwright" / "chromium-1187").mkdir(parents=True)
    assert run(path) == (0, "", "")


def test_root_gets_what_is_missing_by_apt(path):
    """This apt-get puts down what it is asked for; as that of nodesource.com, its nodejs brings npm."""
    program(path, "id", "echo 0")
    for name in NEEDED:
        (path / name).unlink()
    put = '[ "$1" = update ] && exit\nname=${!#}\necho "$name" >> "$HOME/asked"\n'
    put += 'for file in ${name/nodejs/node npm}; do echo "#!/bin/bash" > "$HOME/$file"; /bin/chmod +x $HOME/$file; done'
    program(path, "apt-get", put)
    code, said, errors = run(path)
    assert code == 0, errors
    assert "apt-get installs them" in said and not errors
    assert (path / "asked").read_text().split() == ["chromium", "fonts-dejavu-core", "nodejs", "redis-server"]


def test_root_is_told_when_apt_fails(path):
    program(path, "id", "echo 0")
    (path / "redis-server").unlink()
    program(path, "apt-get", "echo no network >&2; exit 100")
    code, _, said = run(path)
    assert code == 1 and "no network" in said
    assert "sudo apt-get update && sudo apt-get install -y redis-server" in said


def test_make_test_asks_first():
    """Before a virtual environment is made: `make test` must not fail after an hour."""
    rule = next(line for line in (SCRIPT.parents[1] / "Makefile").read_text().splitlines() if line.startswith("test:"))
    assert rule.split()[1] == "needs" and os.access(SCRIPT, os.X_OK)
